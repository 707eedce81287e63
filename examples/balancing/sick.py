"""A server that is well when it is checked, and fails for everybody else until /tmp/weft/well is there."""
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Sick(BaseHTTPRequestHandler):
    def do_GET(self):
        is_check = self.headers.get("User-Agent", "").startswith("weft/")
        body = b"web-2\n"
        self.send_response(200 if is_check or Path("/tmp/weft/well").exists() else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


HTTPServer(("127.0.0.2", 8080), Sick).serve_forever()
