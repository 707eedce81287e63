"""One agent, many checks: see tests/bench/checks.  Only the standard library is used."""
import argparse, asyncio, http.client, json, os, resource, signal, subprocess, sys, tempfile, time

HZ = os.sysconf("SC_CLK_TCK")
IP = "127.77.0.1"
HTTP, TCP, HANG = 18080, 18081, 18082


class Answering(asyncio.Protocol):
    seen = {}

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        now = time.monotonic()
        Answering.seen.setdefault(data.split(b" ", 2)[1], []).append(now)
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        self.transport.close()


async def target():
    """Answers checks; writes the arrival times when it is told to end."""
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    await loop.create_server(Answering, IP, HTTP, backlog=4096)
    await loop.create_server(asyncio.Protocol, IP, TCP, backlog=4096)
    await loop.create_server(asyncio.Protocol, IP, HANG, backlog=4096)
    print("up", flush=True)
    await end.wait()
    print(json.dumps(list(Answering.seen.values())), flush=True)


def cpu_s(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / HZ


def rss_kib(pid):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))


def service(at, checks, interval):
    def check(n):
        if n % 5 == 4:
            return {"TCP": f"{IP}:{TCP}", "Interval": f"{interval}s"}
        return {"HTTP": f"http://{IP}:{HTTP}/{at}-{n}", "Interval": f"{interval}s", "Timeout": "5s"}
    return {"ID": f"s{at}", "Name": f"s{at}", "Port": 80, "Checks": [check(n) for n in range(checks)]}


def hanging(at, checks, interval):
    check = {"HTTP": f"http://{IP}:{HANG}/", "Interval": f"{interval}s", "Timeout": "10s"}
    return {"ID": f"h{at}", "Name": f"h{at}", "Port": 80, "Checks": [check] * checks}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=40)
    parser.add_argument("--hang", type=int, default=0)
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = subprocess.Popen([sys.executable, __file__, "target"], stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "up\n"
    with tempfile.TemporaryDirectory() as log:
        out = open(f"{log}/log", "w")
        command = [os.environ["WEFT_BIN"], "agent", "-dev", "-node", "n1", f"-bind={IP}", "-log-level", "warn"]
        agent = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            client = http.client.HTTPConnection(IP, 8500, timeout=60)
            for _ in range(200):
                try:
                    client.connect()
                    break
                except OSError:
                    time.sleep(0.1)
            begun = time.monotonic()
            per = 100
            bodies = [service(at, min(per, args.count - at * per), args.interval) for at in range(-(-args.count // per))]
            bodies += [hanging(at, min(per, args.hang - at * per), args.interval) for at in range(-(-args.hang // per))]
            for body in bodies:
                client.request("PUT", "/v1/agent/service/register", json.dumps(body))
                answer = client.getresponse()
                text = answer.read().decode()
                if answer.status != 200:
                    sys.exit(f"{answer.status} {text}")
            registered = time.monotonic() - begun
            # Every check has run, and every slow one is known as such.
            time.sleep(args.interval + (25 if args.hang else 5))
            before, at = cpu_s(agent.pid), time.monotonic()
            time.sleep(args.seconds)
            used = (cpu_s(agent.pid) - before) / (time.monotonic() - at)
            rss = rss_kib(agent.pid)
            # The agent closed the first connection, which rested.
            client = http.client.HTTPConnection(IP, 8500, timeout=60)
            client.request("GET", "/v1/agent/metrics?format=prometheus")
            metrics = client.getresponse().read().decode()
        finally:
            agent.terminate()
            agent.wait()
            server.send_signal(signal.SIGTERM)
            arrivals = json.loads(server.stdout.readline())
            server.wait()
    drifts = []
    for times in arrivals:
        times = [t for t in times if t >= at - 0.5]
        drifts += [abs(t - times[0] - n * args.interval) for n, t in enumerate(times) if n]
    drifts.sort()
    runs = sum(len([t for t in times if at <= t < at + args.seconds]) for times in arrivals) / args.seconds
    p = lambda share: drifts[int(share * (len(drifts) - 1))] * 1000
    print(f"checks {args.count} + {args.hang} that hang, every {args.interval} s; registered in {registered:.1f} s")
    print(f"http runs per second {runs:.0f}; agent's CPU {used * 100:.1f} % of a core; RSS {rss / 1024:.1f} MiB")
    print(f"drift of starts, ms: p50 {p(0.5):.1f}, p99 {p(0.99):.1f}, max {drifts[-1] * 1000:.1f} (of {len(drifts)})")
    for line in metrics.splitlines():
        is_delay = line.startswith("weft_registry_check_start_delay_seconds_") and ("_count" in line or 'le="0.0' in line)
        # What hangs must be critical, and nothing else.
        if is_delay or line.startswith("weft_registry_checks{"):
            print("  " + line)


if __name__ == "__main__":
    if sys.argv[1:] == ["target"]:
        asyncio.run(target())
    else:
        main()
