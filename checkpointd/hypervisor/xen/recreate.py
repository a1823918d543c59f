"""Creates a domain from libxl's JSON, which `xl create` does not read, and runs it.

    python -m checkpointd.hypervisor.xen.recreate [--replace DOMID] < CONFIG

CONFIG is what `xl list -l` gives under "config". The new domid goes to standard output, what libxl has to complain of
to standard error. Exit code 3: it could not be done. `--replace` destroys the domain that was it before.

It is a process of its own, for libxl forks and takes SIGCHLD for itself; and it both destroys and creates, so that the
death of whoever started it in between does not lose the guest. libxl is called through ctypes: its functions of
interest take pointers and numbers only, and are the same in each release since 4.13 (LIBXL_API_VERSION 0x041300).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from typing import Any, Final

from checkpointd.errors import HypervisorError
from checkpointd.hypervisor.xen import versions

# Octets for a libxl_domain_config, whose size only libxl's headers tell: it has 1288 in Xen 4.17. libxl gets its
# address and touches what its own release takes it for, so that more room than that is harmless.
CONFIG_ROOM: Final = 1 << 16
LEVEL_WARN: Final = 7  # XTL_WARN (xentoollog.h): below it libxl tells stories


class Libxl:
    """libxl of the running release. Complaints go to the standard error of this process."""

    def __init__(self, version: versions.Version) -> None:
        name = f"libxenlight.so.{version}"
        try:
            self._library: Any = ctypes.CDLL(name)
            logs: Any = ctypes.CDLL("libxentoollog.so.1")
        except OSError as error:
            raise HypervisorError(
                f"libxl cannot be used ({error}): install it for the Xen that runs (Debian: libxenmisc{version})"
            ) from error
        logs.xtl_createlogger_stdiostream.restype = ctypes.c_void_p
        stderr = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr")
        logger = ctypes.c_void_p(logs.xtl_createlogger_stdiostream(stderr, LEVEL_WARN, 0))
        self._context = ctypes.c_void_p()
        # Version 0 is LIBXL_VERSION, and has been in every release.
        self._do("begin", self._library.libxl_ctx_alloc(ctypes.byref(self._context), 0, 0, logger))

    def destroy(self, domid: int) -> None:
        self._do(
            f"destroy domain {domid}",
            self._library.libxl_domain_destroy(self._context, ctypes.c_uint32(domid), None),
        )

    def create(self, config: str) -> int:
        """Its domid. The domain is whole, and paused."""
        room = ctypes.create_string_buffer(CONFIG_ROOM)
        domid = ctypes.c_uint32()
        self._library.libxl_domain_config_init(room)
        self._do(
            "understand the configuration",
            self._library.libxl_domain_config_from_json(self._context, room, config.encode()),
        )
        self._do(
            "create the domain",
            self._library.libxl_domain_create_new(
                self._context, room, ctypes.byref(domid), None, None
            ),
        )
        return domid.value

    def unpause(self, domid: int) -> None:
        self._do(
            f"run domain {domid}, which is there and paused",
            self._library.libxl_domain_unpause(self._context, ctypes.c_uint32(domid), None),
        )

    @staticmethod
    def _do(what: str, rc: int) -> None:
        if rc:
            raise HypervisorError(f"libxl does not {what} (error {rc})")


def for_a_new_domain(config: str) -> str:
    """Of a domain that was, without its domid: Xen has the next one for it."""
    fields = json.loads(config)
    fields["c_info"].pop("domid", None)
    return json.dumps(fields)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m checkpointd.hypervisor.xen.recreate")
    parser.add_argument("--replace", type=int, metavar="DOMID")
    old = parser.parse_args().replace
    try:
        config = for_a_new_domain(sys.stdin.read())
        libxl = Libxl(versions.running())
        if old is not None:
            libxl.destroy(old)
        domid = libxl.create(config)
        libxl.unpause(domid)
    except (HypervisorError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.stderr.write(f"{error}\n")
        return HypervisorError.exit_code
    sys.stdout.write(f"{domid}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
