"""What a C header declares, for cffi: said in one place, the header, whoever reads it.

Not part of any package: build scripts run this file by its path.
"""

# ruff: noqa: INP001 - deliberately in no package: it must run before anything is installed

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def struct(name: str, header: Path) -> str:
    """Its definition, comments and all, which cffi takes; the struct has none of its own in it.

    Raises ValueError if the header has none.
    """
    text = header.read_text(encoding="ascii")
    begin = text.index(f"struct {name} {{")
    return text[begin : text.index("\n};", begin) + len("\n};")]


def table() -> str:
    """The table of hypervisor.h, and its bitmaps."""
    return struct("ck_bitmap", HERE / "bitmap.h") + struct("ck_hypervisor", HERE / "hypervisor.h")


def port() -> str:
    """The same, so that tests can call it as the native pause does, and the modes of harvest()."""
    modes = "".join(f"#define CK_HARVEST_{mode} ...\n" for mode in ("PEEK", "CLEAN", "FINAL"))
    return modes + table()
