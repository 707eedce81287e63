"""Says each MESSAGE over one WebSocket and prints what comes back: python3 ws.py PORT MESSAGE..."""

import socket
import sys

stream = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
stream.sendall(
    b"GET /chat HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
reader = stream.makefile("rb")
print(reader.readline().decode().strip())
while reader.readline().strip():
    pass
for message in sys.argv[2:]:
    payload = message.encode()[:125]
    stream.sendall(bytes([0x81, 0x80 | len(payload)]) + bytes(4) + payload)  # text, masked with zeros
    length = reader.read(2)[1]
    print(reader.read(length).decode())
stream.sendall(bytes([0x88, 0x80]) + bytes(4))
