"""A UDP app that answers every datagram with its name and size: python3 echo.py PORT NAME."""

import socket
import sys

app = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
app.bind(("127.0.0.1", int(sys.argv[1])))
while True:
    data, caller = app.recvfrom(65507)
    app.sendto(f"{sys.argv[2]} got {len(data)} bytes".encode(), caller)
