"""A server that is well when it is checked, and fails for everybody else."""
from http.server import BaseHTTPRequestHandler, HTTPServer


class Sick(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.headers.get("User-Agent", "").startswith("weft/") else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


HTTPServer(("127.0.0.2", 8080), Sick).serve_forever()
