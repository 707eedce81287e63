"""Sends COUNT datagrams of BYTES bytes from one port, one after the other: python3 ask.py PORT BYTES COUNT."""

import socket
import sys

port, size, count = map(int, sys.argv[1:])
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(1)
client.connect(("127.0.0.1", port))
for _ in range(count):
    try:
        client.send(bytes(size))
        print(client.recv(65507).decode())
    except OSError as error:
        print("no answer:", error)
