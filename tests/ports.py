"""Ports for servers that tests start."""

import secrets
import socket


def free_port() -> int:
    """One below the kernel's own range: such a port is not given to whoever connects to something before its server is
    up. Above Ray's range for workers (10002 to 19999)."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
