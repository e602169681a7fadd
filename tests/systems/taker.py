"""Tries to take a port, as any local user may, until its input ends; prints how often it had it."""

import select
import socket
import sys

port, taken, tried = int(sys.argv[1]), 0, 0
while not tried or not select.select([sys.stdin], [], [], 0.001)[0]:
    for address in ("127.0.0.1", "0.0.0.0"):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((address, port))
                sock.listen()
                taken += 1
            except OSError:
                pass
    tried += 1
    if tried == 1:
        print("trying", flush=True)
print(taken, flush=True)
