"""One agent, many that wait: see tests/bench/watchers.  Only the standard library is used."""
import argparse, http.client, json, os, resource, select, socket, subprocess, sys, tempfile, threading, time

IP, PORT = "127.78.0.1", 8500
# A loopback address has some 28,000 ports to dial from: each thousand of connections takes its own.
SOURCE = "127.78.1.%d"


def rss_kib(pid):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))


def ask(method, path, body=None):
    client = http.client.HTTPConnection(IP, PORT, timeout=60)
    client.request(method, path, body)
    answer = client.getresponse()
    text = answer.read().decode()
    client.close()
    if answer.status != 200:
        sys.exit(f"{method} {path}: {answer.status} {text}")
    return answer, text


def connect(at):
    stream = socket.socket()
    stream.bind((SOURCE % (1 + at // 1000), 0))
    stream.connect((IP, PORT))
    return stream


def watch(stream, service, index):
    stream.send(f"GET /v1/health/service/s{service}?index={index}&wait=10m HTTP/1.1\r\nhost: {IP}\r\n\r\n".encode())


def read(stream):
    """Reads one answer whole; returns its index."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += stream.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += stream.recv(65536)
    return int(fields[b"x-consul-index"])


def waiting():
    _, text = ask("GET", "/v1/agent/metrics?format=prometheus")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("weft_api_blocking_queries "))


def register(service, round):
    body = {"ID": f"s{service}", "Name": f"s{service}", "Port": 80, "Meta": {"round": str(round)}}
    ask("PUT", "/v1/agent/service/register", json.dumps(body))


def percentile(values, share):
    values = sorted(values)
    return values[int(share * (len(values) - 1))] * 1000


def changes(args, streams, of, index):
    poll = select.epoll()
    for at, stream in enumerate(streams):
        poll.register(stream, select.EPOLLIN)
    by_fd = {stream.fileno(): at for at, stream in enumerate(streams)}
    took, foreign = [], 0
    for round in range(1, args.changes + 1):
        service = round % args.services
        expected = sum(1 for other in of if other == service)
        changer = threading.Thread(target=register, args=(service, round))
        begun = time.monotonic()
        changer.start()
        woken, new = 0, index[service]
        while woken < expected:
            for fd, _ in poll.poll(10) or sys.exit(f"round {round}: {woken} of {expected} watchers were woken"):
                now, at = time.monotonic(), by_fd[fd]
                new = read(streams[at])
                watch(streams[at], of[at], new)
                if of[at] == service:
                    woken += 1
                    took.append(now - begun)
                else:
                    foreign += 1
        changer.join()
        index[service] = new
        # Whoever was woken without need answers meanwhile.
        foreign += len(poll.poll(0.02))
    print(f"{args.changes} changes, {len(took) // args.changes} watchers each: from the request to a watcher's answer, ms: "
          f"p50 {percentile(took, 0.5):.2f}, p99 {percentile(took, 0.99):.2f}; others answered: {foreign}")


def others(args, name):
    """How long a client waits that asks every 5 ms."""
    client = http.client.HTTPConnection(IP, PORT, timeout=60)
    took, end = [], time.monotonic() + args.seconds
    while time.monotonic() < end:
        begun = time.monotonic()
        client.request("GET", "/v1/status/leader")
        client.getresponse().read()
        took.append(time.monotonic() - begun)
        time.sleep(0.005)
    print(f"{name}: an answer takes, ms: p50 {percentile(took, 0.5):.2f}, p99 {percentile(took, 0.99):.2f}, "
          f"max {percentile(took, 1):.2f} (of {len(took)})")


def flood(stop):
    head = b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: %s\r\n" % (n, b"y" * 500) for n in range(200))
    while not stop.is_set():
        try:
            with connect(19000) as stream:
                stream.sendall(head)
                stream.recv(4096)
        except OSError:
            pass


def main():
    parser = argparse.ArgumentParser()
    for name, default in [("watchers", 10_000), ("services", 1_000), ("changes", 100), ("idle", 10_000), ("seconds", 5)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Each connection is a descriptor here and one in the agent, which has others.
    room = hard - args.watchers - 300
    if room < args.idle:
        print(f"the limit of {hard} open files leaves room for {room} idle connections")
        args.idle = room
    with tempfile.TemporaryDirectory() as log:
        out = open(f"{log}/log", "w")
        command = [os.environ["WEFT_BIN"], "agent", "-dev", "-node", "n1", f"-bind={IP}", "-log-level", "warn"]
        agent = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            for _ in range(200):
                try:
                    socket.create_connection((IP, PORT)).close()
                    break
                except OSError:
                    time.sleep(0.1)
            for service in range(args.services):
                register(service, 0)
            index = []
            for service in range(args.services):
                answer, _ = ask("GET", f"/v1/health/service/s{service}")
                index.append(int(answer.headers["x-consul-index"]))
            others(args, "alone")
            before = rss_kib(agent.pid)
            streams = [connect(at) for at in range(args.watchers)]
            of = [at % args.services for at in range(args.watchers)]
            for stream, service in zip(streams, of):
                watch(stream, service, index[service])
            while waiting() < args.watchers:
                time.sleep(0.05)
            after = rss_kib(agent.pid)
            print(f"{args.watchers} watchers of {args.services} services: {(after - before) / args.watchers:.2f} KiB each "
                  f"(RSS {before / 1024:.1f} -> {after / 1024:.1f} MiB)")
            changes(args, streams, of, index)
            others(args, f"beside {args.watchers} watchers")
            idle = [connect(10_000 + at) for at in range(args.idle)]
            for at, stream in enumerate(idle):
                if at % 2:
                    stream.send(b"GET / HTTP/1.1\r\nx-slow: ")
            others(args, f"and {args.idle} idle connections")
            stop = threading.Event()
            floods = [threading.Thread(target=flood, args=(stop,)) for _ in range(8)]
            for thread in floods:
                thread.start()
            others(args, "and a flood of heads")
            stop.set()
            for thread in floods:
                thread.join()
            print(f"RSS at the end {rss_kib(agent.pid) / 1024:.1f} MiB; still waiting: {waiting()}")
        finally:
            agent.terminate()
            agent.wait()


if __name__ == "__main__":
    main()
