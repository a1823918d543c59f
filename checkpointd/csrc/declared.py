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


def port() -> str:
    """hypervisor.h: the table, so that tests can call it as the native pause does, and its modes."""
    modes = "".join(f"#define CK_HARVEST_{mode} ...\n" for mode in ("PEEK", "CLEAN", "FINAL"))
    return modes + struct("ck_hypervisor", HERE / "hypervisor.h")
