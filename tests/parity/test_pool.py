"""The ranks that parity starts."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import pytest

from distclip.parity.pool import Pool

LISTENS = "0A"  # in /proc/net/tcp


def listening(pid: int) -> list[str]:
    """The addresses at which a process accepts connections."""
    links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    addresses = []
    for name, size in (("tcp", 8), ("tcp6", 32)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and f"socket:[{inode}]" in links:
                words = bytes.fromhex(local[:size])  # of four bytes each, the last byte first
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                addresses.append(str(ipaddress.ip_address(packed)))
    return addresses


def test_nothing_listens_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if others:  # what a launcher may have set
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", others[0])
    pool = Pool(2, "spawn")
    pool.start()
    try:
        found = [each for p in pool._processes for each in listening(p.pid or 0)]
    finally:
        pool.stop()
    assert len(found) >= pool.size
    assert all(ipaddress.ip_address(each).is_loopback for each in found), found
