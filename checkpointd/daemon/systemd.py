"""What systemd wants to hear from a service (sd_notify(3)). Nothing here ever raises."""

from __future__ import annotations

import os
import socket

READY = "READY=1"
STOPPING = "STOPPING=1"


def status(text: str) -> str:
    """The line that `systemctl status` shows."""
    return "STATUS=" + text.replace("\n", " ")


def notify(*messages: str) -> bool:
    """Send assignments such as READY; False if no systemd hears them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):  # an abstract socket: its name begins with a NUL
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as out:
            out.connect(address)
            out.send("\n".join(messages).encode())
    except (OSError, ValueError):  # gone, full, or a name that is none
        return False
    return True
