#!/usr/bin/env python3
"""What weft costs as the mesh grows.  args: REPO OUT-FOLDER [options]; called by tests/bench/scale.

Each part starts its own mesh of release agents with everything on that is on by default, loads it and prints rows."""
import argparse, concurrent.futures, contextlib, json, os, re, resource, signal, statistics, subprocess, sys, threading, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from mesh import Mesh, cpu_s, of, rss_kib

REPO, OUT = sys.argv[1:3]
PARTS = ["catalogue", "peers", "idle", "churn"]
UPSTREAM, BY_HOST, IDLE_PORT = 9101, 8480, 9102
SERVICES, INSTANCES, HOLDERS = 1_000, 5_000, 20      # the catalogue part: 250 instances on each of 20 more nodes
PEERS, IDLE_CONNS = 100, 10_000
CHURNED = 40                                          # services that come and go in each round
LOAD_RATE = 400                                       # requests per second while the catalogue churns

WEB = 'services = [ { name = "web", port = 8080, protocol = "http" }, { name = "web-l4", port = 8080 } ]\n'
CALLER = """service {
  name = "client"
  port = 1
  proxy {
    upstreams = [
      { destination_name = "%s", local_bind_port = 9101 },
      { destination_name = "web-l4", local_bind_port = 9102 },
    ]
  }
}
"""


def wrk(port, secs, host="web.weft", conns=64):
    out = subprocess.run(of("a", "wrk", "-t1", f"-c{conns}", f"-d{secs}s", "--latency", "-H", f"Host: {host}", f"http://127.0.0.1:{port}/"),
                         text=True, capture_output=True).stdout
    found = re.search(r"Requests/sec:\s+([\d.]+)", out)
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    if not found or bad:
        raise SystemExit(f"wrk on port {port}: {out[-400:]}")
    return float(found.group(1))


def loaded(agents, load):
    """Runs a load; returns its rate and the agents' CPU seconds per 1,000 requests."""
    before, start = sum(cpu_s(x.pid) for x in agents), time.time()
    rate = load()
    return rate, 1000 * (sum(cpu_s(x.pid) for x in agents) - before) / max(1, rate * (time.time() - start))


def at_once(work, of_each):
    """A few at a time: two cores serve them all."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, of_each))


def quiet(agents, secs=90):
    """Waits until the agents have nothing to do with each other: below a tenth of a core in all, twice in a row."""
    seen, end = 0, time.time() + secs
    while seen < 2 and time.time() < end:
        before = sum(cpu_s(x.pid) for x in agents)
        time.sleep(1)
        seen = seen + 1 if sum(cpu_s(x.pid) for x in agents) - before < 0.1 else 0


def pair(mesh, destination="web"):
    """Starts backend, server and caller, and waits until a request goes through."""
    mesh.backend("b")
    b = mesh.agent("b", "b", hcl=WEB)
    a = mesh.agent("a", "a", hcl=CALLER % destination, flags=["-shared-http-port", BY_HOST])
    return a, b


def join(mesh, caller, count, hcl=""):
    """Starts a crowd, ten at a time: each makes keys and shakes hands, and all of them share these cores."""
    crowd = []
    for first in range(0, count, 10):
        crowd += [mesh.agent(f"c{i}", place=i, workers=1, hcl=hcl) for i in range(first, min(first + 10, count))]
        alive = lambda: sum(m["Status"] == 1 for m in caller.get("/v1/agent/members"))
        mesh.until(f"{len(crowd) + 2} nodes are alive in the caller's eyes", lambda: (n := alive()) == len(crowd) + 2 or n, 120)
    return crowd


def answers(port):
    ok = subprocess.run(of("a", "curl", "-s", "-m", "3", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}/"), text=True, capture_output=True)
    return ok.stdout == "200"


class Table:
    def __init__(self):
        self.rows, self.data = [], {}

    def add(self, part, work, figure, **data):
        print(f"  {part:10s} {work:58s} {figure}", flush=True)
        self.rows.append((part, work, figure))
        self.data.setdefault(part, []).append(dict(work=work, figure=figure, **data))

    def page(self):
        head = ("part", "work", "cost")
        widths = [max(len(r[i]) for r in [head, *self.rows]) for i in range(3)]
        line = lambda r: "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |"
        return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, self.rows)])


# ---------------------------------------------------------------- parts
def catalogue(a, table):
    """The same requests with 2 services in the catalogue, with 1,000 services of 5,000 instances, and with 2 again."""
    with Mesh(os.environ["WEFT_BIN"], a.workers) as mesh:
        caller, server = pair(mesh)
        holders = join(mesh, caller, HOLDERS)
        mesh.until("a request goes through", lambda: answers(UPSTREAM))
        few = len(caller.get("/v1/catalog/services"))
        rates = {}

        def measure(phase):
            for how, port in (("upstream port", UPSTREAM), ("shared port, by Host", BY_HOST)):
                for _ in range(a.repeats):
                    rates.setdefault((phase, how), []).append(loaded([caller, server], lambda: wrk(port, a.secs)))

        def fill():
            share = INSTANCES // HOLDERS
            at_once(lambda x: x[1].register(*[dict(ID=f"s{i % SERVICES}-{i}", Name=f"service-{i % SERVICES}", Port=8080, Protocol="http")
                                              for i in range(x[0] * share, (x[0] + 1) * share)]), enumerate(holders))

        def settled(services):
            mesh.until(f"{services} services are in the caller's catalogue", lambda: (n := len(caller.get("/v1/catalog/services"))) == services or n, 180)

        quiet([caller, server, *holders])
        measure("few")
        memory = [rss_kib(x.pid) for x in (caller, server)]
        started = time.time()
        fill()
        settled(SERVICES + few)
        spread = time.time() - started
        quiet([caller, server, *holders])                       # the crowd's share of the CPU is not the caller's
        measure("many")
        grown = [rss_kib(x.pid) for x in (caller, server)]
        at_once(lambda x: x.deregister(*x.get("/v1/agent/services")), holders)
        settled(few)
        quiet([caller, server, *holders])
        measure("few again")
        for how in ("upstream port", "shared port, by Host"):
            value = {phase: [statistics.median(x[i] for x in rates[phase, how]) for i in (0, 1)] for phase in ("few", "many", "few again")}
            rate, cpu = (statistics.mean([value["few"][i], value["few again"][i]]) for i in (0, 1))
            for phase, name in (("few", f"{few} services"), ("many", f"{SERVICES:,} services, {INSTANCES:,} instances"), ("few again", f"{few} services again")):
                table.add("catalogue", f"HTTP/1.1, 64 connections, {how}: {name}", f"{value[phase][0]:,.0f} req/s, {value[phase][1]:.4f} CPU-s per 1,000",
                          how=how, phase=phase, rps=[x[0] for x in rates[phase, how]], cpu=[x[1] for x in rates[phase, how]])
            table.add("catalogue", f"{how}: all services to {few}", f"{value['many'][0] / rate:.2f}x the rate, {value['many'][1] / cpu:.2f}x the CPU",
                      rate_ratio=value["many"][0] / rate, cpu_ratio=value["many"][1] / cpu)
        table.add("catalogue", f"RSS of the caller's agent: {few} services, then all", f"{memory[0] / 1024:.1f} -> {grown[0] / 1024:.1f} MiB "
                  f"({(grown[0] - memory[0]) * 1024 / INSTANCES:.0f} bytes per instance)", before_kib=memory, after_kib=grown)
        table.add("catalogue", f"{INSTANCES:,} registrations over the API, until the caller has them", f"{spread:.1f} s", secs=spread)


def peers(a, table):
    """100 nodes with one instance each; every worker of the caller comes to hold a tunnel to each."""
    with Mesh(os.environ["WEFT_BIN"], a.workers) as mesh:
        mesh.backend("c")
        caller, server = pair(mesh, "fan")
        crowd = join(mesh, caller, PEERS, 'services = [ { name = "fan", port = 8080, protocol = "http" } ]\n')
        mesh.until("all instances are known", lambda: (n := len(caller.get("/v1/health/service/fan"))) == PEERS or n, 120)
        quiet([caller, server, *crowd])

        def idle(secs=15):
            before = cpu_s(caller.pid)
            time.sleep(secs)
            return 100 * (cpu_s(caller.pid) - before) / secs

        cold, cold_cpu = rss_kib(caller.pid), idle()
        wrk(UPSTREAM, a.secs)                                   # dials the tunnels
        rates = [loaded([caller], lambda: wrk(UPSTREAM, a.secs)) for _ in range(a.repeats)]
        tunnels = caller.metric("weft_quic_tunnels_open", 'side="dialer"')
        warm, warm_cpu = rss_kib(caller.pid), idle()
        rate, cpu = (statistics.median(x[i] for x in rates) for i in (0, 1))
        table.add("peers", f"{PEERS} peers known, no tunnels: the caller's agent", f"{cold / 1024:.1f} MiB, {cold_cpu:.2f} % of a core", rss_kib=cold, cpu_percent=cold_cpu)
        table.add("peers", f"{PEERS} peers, {tunnels:.0f} warm tunnels, idle: the caller's agent",
                  f"{warm / 1024:.1f} MiB, {warm_cpu:.2f} % of a core ({(warm - cold) / max(1, tunnels):.0f} KiB per tunnel, load's buffers included)",
                  rss_kib=warm, cpu_percent=warm_cpu, tunnels=tunnels)
        table.add("peers", f"HTTP/1.1, 64 connections over {PEERS} peers", f"{rate:,.0f} req/s, {cpu:.4f} CPU-s of the caller per 1,000", rps=[x[0] for x in rates], cpu=[x[1] for x in rates])
        kib = sorted(rss_kib(x.pid) for x in crowd)
        table.add("peers", f"RSS of one of {PEERS + 2} agents (one worker), median", f"{kib[PEERS // 2] / 1024:.1f} MiB", kib=kib)


def idle(a, table):
    """10,000 idle connections through one pair, each of which has carried one request."""
    with Mesh(os.environ["WEFT_BIN"], a.workers) as mesh:
        caller, server = pair(mesh)
        mesh.until("a request goes through", lambda: answers(UPSTREAM) and answers(IDLE_PORT))
        # By default an agent opens 1,024 connections of bytes to a service, and resets the next (api/balancing.md).
        mesh.write_config(dict(Kind="service-defaults", Name="client", UpstreamConfig=dict(Defaults=dict(Limits=dict(MaxConnections=2 * IDLE_CONNS)))))
        mesh.until("the caller knows its limit", lambda: (n := len(caller.get("/v1/config/service-defaults"))) == 1 or n)
        time.sleep(2)
        fresh = [rss_kib(x.pid) for x in (caller, server)]
        table.add("idle", "RSS of an agent that has just joined: caller / server", f"{fresh[0] / 1024:.1f} / {fresh[1] / 1024:.1f} MiB", kib=fresh)
        for kind, port in (("TCP", IDLE_PORT), ("HTTP", UPSTREAM)):
            before = [rss_kib(x.pid) for x in (caller, server)]
            holder = subprocess.Popen(of("a", sys.executable, "-c", HOLD, port, IDLE_CONNS), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            opened = int(holder.stdout.readline() or 0)
            if opened < IDLE_CONNS:
                raise SystemExit(f"idle: only {opened:,} of {IDLE_CONNS:,} {kind} connections could be opened")
            time.sleep(3)
            after = [rss_kib(x.pid) for x in (caller, server)]
            cpu = [cpu_s(x.pid) for x in (caller, server)]
            time.sleep(10)
            cpu = [10 * (cpu_s(x.pid) - c) for x, c in zip((caller, server), cpu)]
            holder.communicate("\n")
            each = [(y - x) / max(1, opened) for x, y in zip(before, after)]
            table.add("idle", f"{opened:,} idle {kind} connections: growth per connection, caller / server",
                      f"{each[0]:.1f} / {each[1]:.1f} KiB; idle CPU {cpu[0]:.1f} / {cpu[1]:.1f} %", opened=opened, before_kib=before, after_kib=after, cpu_percent=cpu)
            time.sleep(2)


HOLD = """
import resource, socket, sys
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
held = []
for _ in range(int(sys.argv[2])):
    s = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10)
    s.sendall(b"GET / HTTP/1.1\\r\\nHost: web.weft\\r\\n\\r\\n")
    if b" 200 " not in s.recv(4096):
        break
    held.append(s)
print(len(held), flush=True)
sys.stdin.readline()
"""


def churn(a, table):
    """Services come and go all the time while requests run: memory must stay flat."""
    with Mesh(os.environ["WEFT_BIN"], a.workers) as mesh:
        caller, server = pair(mesh)
        witness = mesh.agent("c0", place=0, workers=1)
        mesh.until("a request goes through", lambda: answers(UPSTREAM))
        mesh.until("all are members", lambda: (n := len(caller.get("/v1/agent/members"))) == 3 or n)
        secs = a.minutes * 60
        load = subprocess.Popen(of("a", os.environ["OPEN_LOOP"], f"127.0.0.1:{UPSTREAM}", "/", 16, LOAD_RATE, secs), stdout=subprocess.PIPE, text=True)
        stop, rounds, broken = threading.Event(), [0], []

        def turn():
            try:
                while not stop.is_set():
                    n = rounds[0]
                    server.register(*[dict(ID=f"churn-{i}", Name=f"churn-{n % 50}-{i}", Port=8080, Tags=[f"round-{n}"]) for i in range(CHURNED)])
                    server.deregister(*[f"churn-{i}" for i in range(CHURNED)])
                    rounds[0] += 1
                    stop.wait(0.5)
            except RuntimeError as e:
                broken.append(str(e))

        turner = threading.Thread(target=turn)
        turner.start()
        agents, samples, start = dict(caller=caller, server=server, witness=witness), [], time.time()
        cpu = {k: cpu_s(x.pid) for k, x in agents.items()}
        try:
            while load.poll() is None and not broken:
                samples.append((time.time() - start, *[rss_kib(x.pid) for x in agents.values()]))
                time.sleep(max(1.0, secs / 300))
        finally:
            stop.set()
            turner.join()
        if broken:
            load.terminate()
            raise SystemExit(f"churn: {broken[0]}")
        seen = json.loads(load.stdout.read())
        lasted = time.time() - start
        table.add("churn", f"{a.minutes:g} minutes, {rounds[0]} rounds of {CHURNED} services at {LOAD_RATE} req/s: requests",
                  f"{seen['reqs']:,}, {seen['errors']} failed, p99 {seen['p99_us'] / 1000:.2f} ms", load=seen, rounds=rounds[0])
        settled = [s for s in samples if s[0] > lasted / 3]     # the heap has found its size by then
        for at, (name, x) in enumerate(agents.items(), 1):
            slope = statistics.linear_regression([s[0] for s in settled], [s[at] for s in settled]).slope * 3600 / 1024
            table.add("churn", f"RSS of the {name}'s agent: start -> end; slope of the last two thirds",
                      f"{samples[0][at] / 1024:.1f} -> {samples[-1][at] / 1024:.1f} MiB; {slope:+.2f} MiB per hour; {100 * (cpu_s(x.pid) - cpu[name]) / lasted:.1f} % of a core",
                      slope_mib_per_hour=slope, samples=[(round(s[0], 1), s[at]) for s in samples])


def main():
    ap = argparse.ArgumentParser(prog="scale")
    ap.add_argument("--parts", default=",".join(PARTS), help="of: " + ",".join(PARTS))
    ap.add_argument("--minutes", type=float, default=5, help="of churn")
    ap.add_argument("--secs", type=int, default=5, help="seconds of one wrk run")
    ap.add_argument("-r", "--repeats", type=int, default=3)
    ap.add_argument("--workers", type=int, default=2, help="data-plane workers of caller and server")
    ap.add_argument("-o", "--out", help="JSON file (default: a new one in target/scale)")
    a = ap.parse_args(sys.argv[3:])
    chosen = a.parts.split(",")
    if set(chosen) - set(PARTS):
        ap.error(f"parts are {', '.join(PARTS)}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if "idle" in chosen and hard < IDLE_CONNS + 1000:
        raise SystemExit(f"the idle part needs {IDLE_CONNS + 1000} file descriptors, the hard limit is {hard}: raise it, or choose other --parts")

    def stopped(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stopped)
    git = lambda *x: subprocess.run(["git", "-C", REPO, *x], capture_output=True, text=True).stdout.strip()
    meta = dict(started=time.strftime("%FT%TZ", time.gmtime()), commit=git("rev-parse", "HEAD"), uncommitted=bool(git("status", "--porcelain", "-uno")),
                command="tests/bench/scale " + " ".join(sys.argv[3:]), cpus=os.cpu_count(), kernel=os.uname().release,
                weft_profile=os.path.basename(os.path.dirname(os.environ["WEFT_BIN"])))
    with contextlib.suppress(Exception):
        meta["cpu_model"] = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read()).group(1)
    table = Table()
    out = a.out or os.path.join(OUT, time.strftime("%Y%m%d-%H%M%S") + ".json")
    try:
        for part in chosen:
            dict(catalogue=catalogue, peers=peers, idle=idle, churn=churn)[part](a, table)
    finally:
        with open(out, "w") as f:
            json.dump(dict(meta=meta, parts=table.data), f, indent=1)
    print(f"\n{table.page()}\n\n`{meta['command']}`, commit {meta['commit'][:12]}{' with changes' if meta['uncommitted'] else ''}, profile {meta['weft_profile']}; "
          f"{meta.get('cpu_model', '')}, {meta['cpus']} CPUs, Linux {meta['kernel']}\nresults in {os.path.relpath(out)}")


main()
