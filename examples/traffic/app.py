"""An HTTP app: python3 app.py PORT NAME.

/fail answers 503 every other time, and /sick always where NAME is v2; /slow takes three seconds, /hold ten, /nap 300 ms, and
/tail one second where NAME is v2. /work takes 100 ms, and four are done at once. /seen tells how many requests came before,
/hints sends an early hint, /trailers ends with one, /from tells what the headers say of the caller. A body is answered with its
length, a WebSocket with what it sends. Where a header of the PROXY protocol comes before the request, the
answer says what it says.
"""

import base64
import hashlib
import ipaddress
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, NAME = int(sys.argv[1]), sys.argv[2]
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
WORKERS = threading.Semaphore(4)
count = 0


class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        """Reads the header of the PROXY protocol, version 2, if there is one: who calls, and from where."""
        super().setup()
        self.caller = ""
        if self.rfile.peek(12)[:12] != SIGNATURE:
            return
        family, length = struct.unpack("!13xBH", self.rfile.read(16))
        said, size = self.rfile.read(length), 4 if family >> 4 == 1 else 16
        # Two addresses and ports; then the TLV of TLS: type, length, what was verified; in it the common name.
        name = said[2 * size + 4 + 3 + 5 + 3 :].decode()
        self.caller = f" for {name} at {ipaddress.ip_address(said[:size])}"

    def do_GET(self):
        global count
        if self.path == "/seen":
            return self.answer(200, f"{NAME} {count}\n")
        count += 1
        if self.path.startswith("/from"):
            certificate = self.headers.get("X-Forwarded-Client-Cert", "").split("/svc/")[-1]
            return self.answer(200, f"{NAME} from {self.headers.get('X-Forwarded-For')} by {certificate}\n")
        if self.headers.get("Upgrade") == "websocket":
            return self.echo()
        body = self.body()
        seconds = {"/slow": 3, "/hold": 10, "/nap": 0.3, "/tail": 1 if NAME == "v2" else 0}
        time.sleep(seconds.get(self.path.split("?")[0], 0))
        if self.path == "/work":
            with WORKERS:
                time.sleep(0.1)
        if self.path == "/hints":
            self.send_response_only(103)
            self.send_header("Link", "</style.css>; rel=preload")
            self.end_headers()
        if self.path == "/trailers":
            return self.trailers()
        fails = (self.path.startswith("/fail") and count % 2) or (self.path == "/sick" and NAME == "v2")
        status = 503 if fails else 200
        self.answer(status, f"{NAME} {self.path} {status}{f' {len(body)} bytes' if body else ''}{self.caller}\n")

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def trailers(self):
        self.send_response(200)
        for name, value in (("Transfer-Encoding", "chunked"), ("Trailer", "x-sum")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"5\r\nbody\n\r\n0\r\nx-sum: 5\r\n\r\n")

    def echo(self):
        """Sends the frames of a WebSocket back (RFC 6455), up to the one that closes it."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Connection", "upgrade")
        self.send_header("Upgrade", "websocket")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while head := self.rfile.read(2):
            length = head[1] & 127
            length = struct.unpack("!H", self.rfile.read(2))[0] if length == 126 else length
            mask = self.rfile.read(4)
            payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(self.rfile.read(length)))
            size = bytes([length]) if length < 126 else struct.pack("!BH", 126, length)
            self.wfile.write(head[:1] + size + payload)
            if head[0] & 15 == 8:
                return


ThreadingHTTPServer.request_queue_size = 1024
ThreadingHTTPServer(("127.0.0.1", PORT), App).serve_forever()
