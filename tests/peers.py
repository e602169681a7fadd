"""Peers that listen where an agent should, and behave as a test tells them."""

import json
import socket
import threading


def read_request(sock):
    """Read a whole request; its method and path."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            return ""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
    while len(body) < length:
        piece = sock.recv(65536)
        if not piece:
            return ""
        body += piece
    return " ".join(head.decode().split(" ")[:2])


def answering(data):
    """A peer that reads a request, sends bytes, and closes."""

    def behave(raw, context):
        with context.wrap_socket(raw, server_side=True) as tls:
            read_request(tls)
            tls.sendall(data)

    return behave


def answering_json(body, status=200):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return answering(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))


def routing(routes):
    """A peer that answers by method and path: the first prefix that fits decides (status, body)."""

    def behave(raw, context):
        with context.wrap_socket(raw, server_side=True) as tls:
            asked = read_request(tls)
            status, body = next((answer for prefix, answer in routes.items() if asked.startswith(prefix)))
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            tls.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))

    return behave


class Listener:
    """Listens on a port of loopback, any by default; `serve(raw)` gets each connection in a thread of its own."""

    def __init__(self, serve, port=0):
        self._serve = serve
        self._socket = socket.create_server(("127.0.0.1", port), backlog=256)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                raw, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def close(self):
        """The thread ends before the descriptor is free: it would go on with the next listener's, which gets
        the same number."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        assert not self._thread.is_alive(), "a listener's thread has not ended"
        self._socket.close()


class Peer:
    """Something that listens where an agent should, and behaves as told."""

    def __init__(self, port, behave, context):
        self._behave = behave
        self._context = context
        self._listener = Listener(self._serve, port)
        self.close = self._listener.close

    def _serve(self, raw):
        raw.settimeout(60)
        with raw:
            try:
                self._behave(raw, self._context)
            except (OSError, ValueError):
                pass
