"""Loaded by every Python that a guarded test starts, and by its children: refuses and records what leaves this machine.

Python tells its audit hooks of every connection, datagram and look-up of a name, whoever asks for it; a library that
keeps its own reference to a function of `socket` is seen as well.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import Any

PLACES = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
"""Event → which of its arguments is the address."""


def is_local(address: Any) -> bool:
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode(errors="replace") if isinstance(host, bytes) else str(host or "")
    if not host or host.startswith(("/", "\0")):  # any interface of this machine, or a local socket
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in PLACES or is_local(arguments[PLACES[event]]):
        return
    with open(os.environ["GUARD_LOG"], "a", encoding="utf-8") as log:  # noqa: PTH123
        log.write(f"{event} {arguments[PLACES[event]]!r}\n")
    raise OSError(f"the network is blocked in this test: {event} {arguments[PLACES[event]]!r}")


sys.addaudithook(guard)
