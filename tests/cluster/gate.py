"""A door between a client and a server on this machine, that can be shut: connections are cut, also in mid-request."""

from __future__ import annotations

import contextlib
import socket
import threading


class Gate:
    """Listens on `port` and passes everything on, until it is shut."""

    def __init__(self, target):
        self.target = ("127.0.0.1", target)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.is_shut = threading.Event()
        self.triggers = []
        self.cut = 0  # connections
        self.open = set()
        threading.Thread(target=self._listen, daemon=True).start()

    def shut(self, for_s=None):
        self.is_shut.set()
        for one in list(self.open):
            self._end(one)
        if for_s is not None:
            threading.Timer(for_s, self.is_shut.clear).start()

    def reopen(self):
        self.triggers = []
        self.is_shut.clear()

    def shut_at(self, trigger, for_s=None):
        """Shut in the middle of the first request that holds `trigger`, for so many seconds or until it is reopened."""
        self.triggers.append((trigger, for_s))

    def close(self):
        self.shut()
        self.listener.close()

    def _listen(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.is_shut.is_set():
                    self._end(client)
                    continue
                server = socket.create_connection(self.target)
                self.open |= {client, server}
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                found = next((entry for entry in self.triggers if entry[0] in data), None)
                if found is not None:
                    self.triggers.remove(found)
                    target.sendall(data[:40])  # half a request: S3 keeps nothing of it
                    self.shut(found[1])
                    return
                target.sendall(data)
        self._end(source)
        self._end(target)

    def _end(self, one):
        self.cut += 1
        self.open.discard(one)
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
