"""Callers that do not read, and apps that do not: see tests/bench/slow.  Only the standard library is used."""
import argparse, http.client, http.server, json, os, signal, socket, struct, subprocess, sys, tempfile, threading, time

FIRST, SECOND = "127.78.0.1", "127.78.0.2"
PORT = 7900
MIB = 1 << 20
ENDLESS = 1 << 40
sent, lock = 0, threading.Lock()


def counted(size):
    global sent
    with lock:
        sent += size


class App(http.server.BaseHTTPRequestHandler):
    """The answer of `/endless` has no end, of the body of a POST nothing is read; everything else gets two bytes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")
            return
        self.send_header("Content-Length", str(ENDLESS))
        self.end_headers()
        piece = bytes(65536)
        try:
            while True:
                self.wfile.write(piece)
                counted(len(piece))
        except OSError:
            self.close_connection = True

    def do_POST(self):
        time.sleep(3600)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True


class Caller:
    """One connection over HTTP/1.1: it asks, and reads nothing; with an upload it sends as long as anybody takes it."""

    def __init__(self, path, method="GET"):
        self.socket = socket.create_connection((FIRST, PORT), timeout=20)
        self.ask(path, method)
        self.socket.setblocking(False)

    def ask(self, path, method):
        length = f"Content-Length: {ENDLESS}\r\n" if method == "POST" else ""
        self.socket.sendall(f"{method} {path} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n{length}\r\n".encode())

    def upload(self):
        """Sends until the kernel takes no more."""
        piece = bytes(65536)
        try:
            while True:
                counted(self.socket.send(piece))
        except BlockingIOError:
            pass

    def close(self):
        self.socket.close()


class Caller2(Caller):
    """One connection over HTTP/2 (RFC 9113), `streams` requests on it. What it downloads its windows let in without end, so that
    nothing but TCP holds the sender back; what it uploads keeps to the windows that it is given."""

    streams = 1

    def ask(self, path, method):
        self.windows, self.initial, self.whole, self.left, self.rest = {}, 65535, 65535, b"", b""
        settings = struct.pack("!HI", 4, (1 << 31) - 1)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self.frame(4, 0, 0, settings) + self.frame(8, 0, 0, struct.pack("!I", (1 << 31) - 65536)))
        # Of HPACK (RFC 7541): fields of the static table, and literals without indexing.
        text = lambda value: bytes([len(value)]) + value.encode()
        fields = bytes([0x82 if method == "GET" else 0x83, 0x86]) + b"\x04" + text(path) + b"\x01" + text("web")
        for at in range(self.streams):
            self.windows[2 * at + 1] = self.initial
            self.socket.sendall(self.frame(1, 4 if method == "POST" else 5, 2 * at + 1, fields))

    @staticmethod
    def frame(kind, flags, stream, payload):
        return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload

    def read(self):
        """Takes in what the other side says of its windows."""
        try:
            while piece := self.socket.recv(65536):
                self.left += piece
        except BlockingIOError:
            pass
        while len(self.left) >= 9 and len(self.left) >= 9 + (size := int.from_bytes(self.left[:3], "big")):
            kind, flags, stream = self.left[3], self.left[4], int.from_bytes(self.left[5:9], "big")
            payload, self.left = self.left[9 : 9 + size], self.left[9 + size :]
            if kind == 8:
                more = int.from_bytes(payload, "big")
                if stream:
                    self.windows[stream] += more
                else:
                    self.whole += more
            elif kind == 4 and not flags & 1:
                for key, value in struct.iter_unpack("!HI", payload):
                    if key == 4:
                        self.windows = {at: window + value - self.initial for at, window in self.windows.items()}
                        self.initial = value
                self.rest += self.frame(4, 1, 0, b"")
            elif kind == 6 and not flags & 1:
                self.rest += self.frame(6, 1, 0, payload)

    def upload(self):
        self.read()
        self.flush()
        for stream in self.windows:
            while not self.rest and (size := min(16384, self.whole, self.windows[stream])) > 0:
                self.rest = self.frame(0, 0, stream, bytes(size))
                self.windows[stream] -= size
                self.whole -= size
                counted(size)
                self.flush()
            self.flush()

    def flush(self):
        try:
            while self.rest:
                self.rest = self.rest[self.socket.send(self.rest) :]
        except BlockingIOError:
            pass


def api(host, method, path, body=None):
    connection = http.client.HTTPConnection(host, 8500, timeout=10)
    connection.request(method, path, body and json.dumps(body))
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {text[:300]}")
    return json.loads(text) if text else None


def until(what, test, seconds=30):
    end = time.monotonic() + seconds
    while True:
        try:
            if test():
                return
        except (OSError, RuntimeError, http.client.HTTPException):
            pass
        if time.monotonic() > end:
            sys.exit(f"not in {seconds} s: {what}")
        time.sleep(0.1)


def rss(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def answered():
    connection = http.client.HTTPConnection(FIRST, PORT, timeout=20)
    connection.request("GET", "/", headers={"Connection": "close"})
    status = connection.getresponse().status
    connection.close()
    return status == 200


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--callers", type=int, default=100)
    parser.add_argument("--protocol", default="http", choices=["http", "h2", "tcp"])
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--upload", action="store_true")
    args = parser.parse_args()
    weft, dirs = os.environ["WEFT_BIN"], tempfile.TemporaryDirectory()
    run = lambda *words: subprocess.run([weft, *words], check=True, capture_output=True, text=True).stdout
    ca = f"{dirs.name}/ca"
    run("ca", "init", "-dir", ca, "-trust-domain", "slow.test")
    words = run("token", "create", "-ca", ca, "-node", "n2", "-serve", "*", "-ttl", "1h").split()
    token = next(word for word in words if word.startswith("weft1-"))
    agents = []

    def start(name, host, *more):
        command = [weft, "agent", "-node", name, "-data-dir", f"{dirs.name}/{name}", f"-bind={host}", f"-client={host}"]
        command += ["-default-intention-policy=allow", "-log-level", "warn", *more]
        agents.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        until(f"{name} answers", lambda: api(host, "GET", "/v1/agent/self"))

    try:
        start("n1", FIRST, "-issuer", f"{ca}/issuer-1")
        start("n2", SECOND, "-join", FIRST, "-token", token)
        threading.Thread(target=Server((SECOND, PORT), App).serve_forever, daemon=True).start()
        web = {"Name": "web", "Address": SECOND, "Port": PORT, "Protocol": "tcp" if args.protocol == "tcp" else "http"}
        api(SECOND, "PUT", "/v1/agent/service/register", web)
        upstream = {"DestinationName": "web", "LocalBindAddress": FIRST, "LocalBindPort": PORT}
        caller = {"Name": "caller", "Port": 1, "Connect": {"SidecarService": {"Proxy": {"Upstreams": [upstream]}}}}
        api(FIRST, "PUT", "/v1/agent/service/register", caller)
        until("web answers", answered)
        for _ in range(50):
            answered()
        before = [rss(agent.pid) for agent in agents]
        Caller2.streams = args.streams
        kind = Caller2 if args.protocol == "h2" else Caller
        slow = [kind("/endless", "POST" if args.upload else "GET") for _ in range(args.callers)]

        def stuck():
            was, end = sent, time.monotonic() + 1
            while time.monotonic() < end:
                if args.upload:
                    for one in slow:
                        one.upload()
                time.sleep(0.05)
            return sent == was and was > 0

        until("the senders are stuck", stuck, 120)
        during = [rss(agent.pid) for agent in agents]
        began = time.monotonic()
        assert answered(), "another caller is not answered"
        took = time.monotonic() - began
        taken = sent
        for one in slow:
            one.close()
        time.sleep(3)
        after = [rss(agent.pid) for agent in agents]
    finally:
        for agent in agents:
            agent.send_signal(signal.SIGKILL)
            agent.wait()
    streams = args.callers * (args.streams if args.protocol == "h2" else 1)
    who = "callers send what the app does not read" if args.upload else "callers read nothing"
    by = "the callers" if args.upload else "the app"
    print(f"{args.callers} {who} ({args.protocol}, {streams} requests); {by} sent {taken / MIB:.0f} MiB, and then no more")
    for name, a, b, c in zip(["caller's agent", "app's agent"], before, during, after):
        each = (b - a) / streams / 1024
        print(f"{name:15} RSS {a / MIB:6.1f} MiB, stuck {b / MIB:6.1f} MiB ({each:.0f} KiB a request), after {c / MIB:6.1f} MiB")
    print(f"another caller was answered in {took * 1000:.1f} ms meanwhile")


main()
