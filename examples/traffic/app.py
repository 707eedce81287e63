"""An HTTP app: python3 app.py PORT NAME.

/fail answers 503 every other time; /slow takes three seconds, /hold ten, and /tail one where NAME is v2.
"""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, NAME = int(sys.argv[1]), sys.argv[2]
count = 0


class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global count
        count += 1
        seconds = {"/slow": 3, "/hold": 10, "/tail": 1 if NAME == "v2" else 0}
        time.sleep(seconds.get(self.path, 0))
        status = 503 if self.path.startswith("/fail") and count % 2 else 200
        body = f"{NAME} {self.path} {status}\n".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET


ThreadingHTTPServer(("127.0.0.1", PORT), App).serve_forever()
