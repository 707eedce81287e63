"""Callers that do not read: see tests/bench/slow.  Only the standard library is used."""
import argparse, http.client, http.server, json, os, signal, socket, subprocess, sys, tempfile, threading, time

FIRST, SECOND = "127.78.0.1", "127.78.0.2"
PORT = 7900
MIB = 1 << 20
sent, lock = 0, threading.Lock()


class App(http.server.BaseHTTPRequestHandler):
    """`/endless` has no end, everything else two bytes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global sent
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")
            return
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        piece = bytes(65536)
        try:
            while True:
                self.wfile.write(piece)
                with lock:
                    sent += len(piece)
        except OSError:
            self.close_connection = True

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True


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


def asks(path):
    caller = socket.create_connection((FIRST, PORT), timeout=20)
    caller.sendall(f"GET {path} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n".encode())
    return caller


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--callers", type=int, default=100)
    parser.add_argument("--protocol", default="http", choices=["http", "tcp"])
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
        web = {"Name": "web", "Address": SECOND, "Port": PORT, "Protocol": args.protocol}
        api(SECOND, "PUT", "/v1/agent/service/register", web)
        upstream = {"DestinationName": "web", "LocalBindAddress": FIRST, "LocalBindPort": PORT}
        caller = {"Name": "caller", "Port": 1, "Connect": {"SidecarService": {"Proxy": {"Upstreams": [upstream]}}}}
        api(FIRST, "PUT", "/v1/agent/service/register", caller)
        answered = lambda: asks("/").recv(64).startswith(b"HTTP/1.1 200")
        until("web answers", answered)
        for _ in range(50):
            answered()
        before = [rss(agent.pid) for agent in agents]
        slow = [asks("/endless") for _ in range(args.callers)]

        def stuck():
            was = sent
            time.sleep(1)
            return sent == was and was > 0

        until("the app is stuck as well", stuck, 120)
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
    print(f"{args.callers} callers that read nothing ({args.protocol}); the app sent {taken / MIB:.0f} MiB, and then no more")
    for name, a, b, c in zip(["caller's agent", "app's agent"], before, during, after):
        each = (b - a) / args.callers / 1024
        print(f"{name:15} RSS {a / MIB:6.1f} MiB, stuck {b / MIB:6.1f} MiB ({each:.0f} KiB a caller), after {c / MIB:6.1f} MiB")
    print(f"another caller was answered in {took * 1000:.1f} ms meanwhile")


main()
