"""The work that an instrumented weft is profiled with: two agents on loopback, nginx and iperf3 behind them, wrk, h2load and
iperf3 before them.  WEFT_BIN names the binary.  Only the standard library is used; ends every process that it began."""
import contextlib, http.client, json, os, re, subprocess, sys, tempfile, time

FIRST, SECOND = "127.79.0.1", "127.79.0.2"
WEB, SINK = 7980, 7981
HTTP, STREAM, BULK = 7990, 7991, 7992
SECONDS = int(os.environ.get("TRAIN_SECONDS", "6"))

NGINX = """worker_processes 1; daemon off; user root; pid {dir}/pid; error_log stderr warn;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000000;
  client_body_temp_path {dir}/1; proxy_temp_path {dir}/2; fastcgi_temp_path {dir}/3; uwsgi_temp_path {dir}/4; scgi_temp_path {dir}/5;
  server {{ listen {host}:{port} backlog=4096;
    location / {{ return 200 "hello from the backend\\n"; }}
    location /16k {{ root {dir}; }} }} }}
"""


def api(host, method, path, body=None):
    connection = http.client.HTTPConnection(host, 8500, timeout=10)
    connection.request(method, path, body and json.dumps(body))
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {text[:300]}")
    return text


def until(what, test, seconds=60):
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
            if test():
                return
        if time.monotonic() > end:
            sys.exit(f"not in {seconds} s: {what}")
        time.sleep(0.1)


def answers(port):
    connection = http.client.HTTPConnection(FIRST, port, timeout=5)
    connection.request("GET", "/")
    return connection.getresponse().status == 200


def load(*words):
    """Runs one client and prints what it says of its speed; a client that fails ends the training."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=SECONDS * 4 + 30)
    if done.returncode:
        sys.exit(f"{words}: {done.stderr or done.stdout}")
    said = re.findall(r"Requests/sec:.*|finished in.*|.*receiver", done.stdout)
    print(" ".join(map(str, words)), "->", *said, flush=True)


def main():
    weft = os.environ["WEFT_BIN"]
    live = []
    with tempfile.TemporaryDirectory() as at:
        run = lambda *words: subprocess.run([weft, *words], check=True, capture_output=True, text=True).stdout
        begin = lambda *words: live.append(subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL))
        run("ca", "init", "-dir", f"{at}/ca", "-trust-domain", "train.test")
        words = run("token", "create", "-ca", f"{at}/ca", "-node", "n2", "-serve", "*", "-ttl", "1h").split()
        token = next(word for word in words if word.startswith("weft1-"))

        def agent(name, host, *more):
            begin(weft, "agent", "-node", name, "-data-dir", f"{at}/{name}", f"-bind={host}", f"-client={host}",
                  "-default-intention-policy=allow", "-log-level", "warn", *more)
            until(f"{name} answers", lambda: api(host, "GET", "/v1/agent/self"))

        try:
            agent("n1", FIRST, "-issuer", f"{at}/ca/issuer-1")
            agent("n2", SECOND, "-join", FIRST, "-token", token)
            with open(f"{at}/nginx.conf", "w") as file:
                file.write(NGINX.format(dir=at, host=SECOND, port=WEB))
            with open(f"{at}/16k", "w") as file:
                file.write("x" * 16384)
            begin("nginx", "-c", f"{at}/nginx.conf", "-e", "stderr")
            begin("iperf3", "-s", "-B", SECOND, "-p", SINK)
            services = [("web", WEB, "http", HTTP), ("stream", WEB, "tcp", STREAM), ("bulk", SINK, "tcp", BULK)]
            for name, port, protocol, _ in services:
                service = {"Name": name, "Address": SECOND, "Port": port, "Protocol": protocol}
                api(SECOND, "PUT", "/v1/agent/service/register", service)
            ups = [{"DestinationName": name, "LocalBindAddress": FIRST, "LocalBindPort": local} for name, _, _, local in services]
            caller = {"Name": "caller", "Port": 1, "Connect": {"SidecarService": {"Proxy": {"Upstreams": ups}}}}
            api(FIRST, "PUT", "/v1/agent/service/register", caller)
            until("web answers", lambda: answers(HTTP) and answers(STREAM))
            span = f"-d{SECONDS}s"
            for count in (64, 1, 256):
                load("wrk", "-t1", f"-c{count}", span, f"http://{FIRST}:{HTTP}/")
            load("wrk", "-t1", "-c32", span, f"http://{FIRST}:{HTTP}/16k")
            load("wrk", "-t1", "-c64", span, f"http://{FIRST}:{STREAM}/")
            load("wrk", "-t1", "-c32", span, "-H", "Connection: close", f"http://{FIRST}:{STREAM}/")
            load("h2load", "-c10", "-m32", "-t1", "-D", SECONDS, f"http://{FIRST}:{HTTP}/")
            load("iperf3", "-c", FIRST, "-p", BULK, "-t", SECONDS)
            load("iperf3", "-c", FIRST, "-p", BULK, "-t", SECONDS, "-R")
        finally:
            # The agents write their counters when they end in order.
            for process in reversed(live):
                process.terminate()
            for process in live:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


main()
