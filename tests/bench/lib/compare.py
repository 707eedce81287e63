#!/usr/bin/env python3
"""weft beside its peers: the works that the harness has, those that it lacks, and the table of goals.

args: HARNESS-COPY REPO OUT-PARENT [options]; called by tests/bench/compare.  Only the standard library is used.

  client -> proxy A -> (veth: MTU 1500 | 9000 | 1 % of the packets lost) -> proxy B -> backend

Every namespace, process and rule is made here and taken away here (rules inside the two namespaces alone)."""
import argparse, atexit, contextlib, fcntl, glob, json, os, re, resource, shutil, signal, statistics, subprocess, sys, tempfile, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import goals, lab_of

HARNESS, REPO, OUT = sys.argv[1:4]
if os.path.basename(HARNESS).startswith("weft-compare."):       # the copy that tests/bench/compare made
    atexit.register(shutil.rmtree, HARNESS, True)
lab = lab_of.load(HARNESS)

# Which peers take part in which work; `direct` and weft take part in all that they can.
WORKS = dict(
    http=["haproxy-http", "nginx-http", "envoy-h2", "envoy-h3"],
    l4=["nginx-stream", "haproxy-tcp", "envoy-tcp"],
    conn=["envoy-h2", "envoy-tcp", "haproxy-tcp", "nginx-stream"],
    h2=["haproxy-http", "envoy-h2", "envoy-h3"],
    bulk=["envoy-tcp", "envoy-h2", "envoy-h3", "haproxy-tcp", "nginx-stream"],
    bulk9000=["envoy-tcp", "envoy-h2", "haproxy-tcp", "nginx-stream"],
    idle=["haproxy-http", "haproxy-tcp", "nginx-http", "nginx-stream", "envoy-h2", "envoy-h3", "envoy-tcp"],
    idle10k=["envoy-h2"],         # the others need two descriptors for a connection on one side: over RLIMIT_NOFILE here
    open=["haproxy-http", "nginx-http", "envoy-h2", "envoy-h3"],
    loss=["envoy-h2", "haproxy-http"],
)
IDLE_MANY = 10_000
LOSS_PERCENT = 1
TURNS = ["http", "l4", "h2", "bulk", "open", "loss", "conn", "bulk9000"]    # what pairs that stand at once can take turns at
PORTS_APART = 40                  # between the ports of two pairs that stand at once
BODY_KIB = 16                     # responses of the goodput test

# More connections than 8,192, and a location with a body; the rest is the harness's.
BACKEND = lab.NGINX_BACKEND.replace("worker_connections 8192", "worker_connections 16384").replace(
    'location / {{ return 200 "hello from the backend\\n"; }} }}',
    'location / {{ return 200 "hello from the backend\\n"; }} location /body {{ set $k "%s"; return 200 "%s"; }} }}'
    % ("k" * 1024, "$k" * BODY_KIB), 1)
assert BACKEND.count("/body") == 1 and "16384" in BACKEND, "the harness's backend has changed: adapt BACKEND"
lab.NGINX_BACKEND = BACKEND


class Lab(lab.Lab):
    """The harness's lab, with more works."""
    names = {}                        # the harness's name of a work -> the name that it has here

    def emit(self, peer, test, rep, data):
        super().emit(peer, self.names.get(test, test), rep, data)

    def wants(self, peer, work):
        return work in self.a.tests and (peer in ("weft", "weft-l4") or peer in WORKS[work])

    # -------------------------------------------------- the network between the proxies
    def each_host(self, *cmd, check=True):
        for n in (lab.NSA, lab.NSB):
            lab.sh(lab.ns(n, list(cmd)), check=check)

    @contextlib.contextmanager
    def mtu(self, size):
        self.each_host("ip", "link", "set", "veth0", "mtu", str(size))
        try:
            yield
        finally:
            self.each_host("ip", "link", "set", "veth0", "mtu", "1500")

    @contextlib.contextmanager
    def loss(self):
        """Drops packets as they come in, TCP and UDP alike, at both hosts.  Segmentation is done before the link, so that
        one packet is lost and not a burst of up to 64 KiB.  Yields a function that tells (packets, lost)."""
        of_proxies = "iifname veth0 meta l4proto { tcp, udp }"
        rules = "\n".join(["table inet loss {", "chain in {", "type filter hook input priority 0",
                           f"{of_proxies} counter", f"{of_proxies} numgen random mod 100 < {LOSS_PERCENT} counter drop", "}", "}"])

        def counts():
            seen = lost = 0
            for n in (lab.NSA, lab.NSB):
                both = re.findall(r"packets (\d+)", lab.sh(lab.ns(n, ["nft", "list", "table", "inet", "loss"])).stdout)
                seen, lost = seen + int(both[0]), lost + int(both[1])
            return seen, lost

        self.each_host("ip", "link", "set", "veth0", "gso_max_segs", "1")
        try:
            self.each_host("nft", rules)
            yield counts
        finally:
            self.each_host("nft", "delete", "table", "inet", "loss", check=False)
            self.each_host("ip", "link", "set", "veth0", "gso_max_segs", "65535", check=False)

    # -------------------------------------------------- works that the harness lacks
    def t_open(self, peer, pr, rep, name, rate, secs, path="/", conns=64):
        """Requests at a constant rate, whatever the proxies do; times without coordinated omission."""
        ip, port = self.target(peer, "A_HTTP")
        cmd = [os.environ["OPEN_LOOP"], f"{ip}:{port}", path, str(conns), f"{rate:.0f}", str(secs)]
        out, m = self.measured(pr, cmd, secs + 40)
        try:
            d = json.loads(out.stdout)
        except ValueError:
            return self.emit(peer, name, rep, dict(error=(out.stdout + out.stderr)[-300:]))
        for k in ("p50", "p90", "p99", "p999", "max"):
            d[k + "_ms"] = d.pop(k + "_us") / 1000
        self.emit(peer, name, rep, dict(d, **m))

    def t_path(self, peer, pr, rep, name, path, c, secs):
        """wrk, on a path of the HTTP port."""
        ip, port = self.target(peer, "A_HTTP")
        cmd = ["wrk", "-t1", f"-c{c}", f"-d{secs}s", "--latency", "--timeout", "5s", f"http://{ip}:{port}{path}"]
        out, m = self.measured(pr, cmd, secs + 30)
        d = lab.parse_wrk(out.stdout)
        if not d.get("reqs"):
            return self.emit(peer, name, rep, dict(error=(out.stdout + out.stderr)[-300:]))
        self.emit(peer, name, rep, dict(d, **m))
        return self.rows[-1]

    def t_loss(self, peer, pr, rep, secs):
        with self.loss() as counts:
            self.t_path(peer, pr, rep, "loss_small_c64", "/", 64, secs)
            big = self.t_path(peer, pr, rep, "loss_body_c64", "/body", 64, secs)
            if big:
                big["goodput_mbit_s"] = round(big["rps"] * BODY_KIB * 1024 * 8 / 1e6, 2)
            self.t_open(peer, pr, rep, "loss_open_c64", self.a.loss_rate, secs)
            seen, lost = counts()
        self.emit(peer, "loss_packets", rep, dict(packets=seen, lost=lost, percent=round(100 * lost / max(1, seen), 3)))

    def raise_limit(self):
        """By default an agent opens 1,024 connections of bytes to a service, and resets the next (api/balancing.md)."""
        weft, shared = os.environ["WEFT_BIN"], max(glob.glob(self.dir + "/weft-*-shared"))
        operator = shared + "/bench.operator"
        subprocess.run([weft, "ca", "operator", "create", "-name", "bench", "-may", "config", "-ca", shared + "/ca", "-out", operator], check=True, stdout=subprocess.DEVNULL)
        entry = dict(Kind="service-defaults", Name="client", UpstreamConfig=dict(Defaults=dict(Limits=dict(MaxConnections=2 * IDLE_MANY))))
        write = lab.ns(lab.NSA, [weft, "config", "write", "-operator", operator, "-"])
        subprocess.run(write, input=json.dumps(entry), text=True, check=True, stdout=subprocess.DEVNULL)

    def t_idle_many(self, peer, pr, rep, kind, key):
        """Memory of many idle connections, each of which has carried one request."""
        if peer == "weft":
            self.raise_limit()
        A, B = lab.tree(pr["A"][0]), lab.tree(pr["B"][0])
        (ra, pa), (rb, pb) = lab.mem_kib(A), lab.mem_kib(B)
        ip, port = self.target(peer, key)
        p = subprocess.Popen(lab.ns(lab.NSA, [sys.executable, lab.HERE + "/idle_conns.py", ip, str(port), str(IDLE_MANY), "4"]),
                             stdout=subprocess.PIPE, text=True)
        opened = int((p.stdout.readline().split() or ["0"])[0])
        time.sleep(2)
        (ra2, pa2), (rb2, pb2) = lab.mem_kib(A), lab.mem_kib(B)
        p.wait(60)
        d = dict(opened=opened, asked=IDLE_MANY, rss_kib_a=ra2, rss_kib_b=rb2, pss_kib_a=pa2, pss_kib_b=pb2)
        if opened < IDLE_MANY:
            print(f"  {peer}: only {opened:,} of {IDLE_MANY:,} connections could be opened: no figure", file=sys.stderr)
        else:
            for side, before, after in (("a", pa, pa2), ("b", pb, pb2)):
                d[f"kib_per_conn_{side}"] = round((after - before) / opened, 2)
            d["rss_kib_per_conn_a"], d["rss_kib_per_conn_b"] = round((ra2 - ra) / opened, 2), round((rb2 - rb) / opened, 2)
        self.emit(peer, f"idle10k_{kind}", rep, d)
        time.sleep(1)

    # -------------------------------------------------- all peers at once, in turns
    @contextlib.contextmanager
    def ports(self, place):
        """The ports of the pair at a place; those of the backends stay."""
        usual = dict(lab.PORTS)
        lab.PORTS.update({k: v + PORTS_APART * place for k, v in usual.items() if not k.startswith("BK_")})
        self.env.update({k: str(v) for k, v in lab.PORTS.items()})
        try:
            yield
        finally:
            lab.PORTS.update(usual)
            self.env.update({k: str(v) for k, v in usual.items()})

    def turns(self, peers, first, count):
        """All pairs stand at once and are loaded one after the other, `count` times, so that figures of one turn are
        seconds apart; a pair that waits costs next to nothing.  Which of the destination's workers a pair's connections
        meet is settled as it starts, and with two workers it is one or both: hence several starts."""
        a, pairs = self.a, {}
        with lab.locked(os.environ.get("BENCH_LOCK")), contextlib.ExitStack() as stack:
            if "bulk9000" in a.tests:       # from the start: who finds out the path's MTU does it once in a while
                stack.enter_context(self.mtu(9000))
                self.names = dict(bulk_1="bulk9000_1")
            for place, peer in enumerate(peers):
                with self.ports(place):
                    pairs[peer] = stack.enter_context(self.pair(peer))
                    if not self.smoke(peer, pairs[peer]["caps"]["caps"], first):
                        raise SystemExit(f"{peer} does not work: see {self.dir}")
            for rep in range(first, first + count):
                for place, peer in enumerate(peers):
                    pr, caps = pairs[peer], pairs[peer]["caps"]["caps"]
                    has = lambda work, cap: self.wants(peer, work) and cap in caps
                    with self.ports(place):
                        for c in a.conns if "http" in a.tests and (peer == "direct" or has("http", "http")) else []:
                            self.t_wrk(peer, pr, rep, f"http_c{c}", "A_HTTP", c, a.secs)
                        if has("l4", "l4"):
                            self.t_wrk(peer, pr, rep, "l4_c64", "A_L4WEB", 64, a.secs)
                        if has("h2", "h2"):
                            self.t_h2(peer, pr, rep, a.short)
                        if has("bulk", "bulk") or has("bulk9000", "bulk"):
                            self.t_bulk(peer, pr, rep, 1, a.short)
                        if has("open", "http"):
                            self.t_open(peer, pr, rep, "open_half", self.most(peer, pr, first, rep) / 2, a.secs)
                        if has("loss", "http"):
                            self.t_loss(peer, pr, rep, a.secs)
                        if has("conn", "l4"):               # last: leaves TIME_WAIT behind
                            self.t_wrk(peer, pr, rep, "conn_l4", "A_L4WEB", 32, a.short, close=True)

    def most(self, peer, pr, first, rep):
        """The pair's own maximum at 64 connections: the median of its turns so far, so that a slow turn asks for no less."""
        if not (64 in self.a.conns and "http" in self.a.tests):
            self.t_wrk(peer, pr, rep, "http_c64", "A_HTTP", 64, self.a.secs)
        rates = [r["rps"] for r in self.rows if (r["peer"], r["test"]) == (peer, "http_c64") and r["rep"] >= first and "rps" in r]
        return statistics.median(rates) if rates else 0

    # -------------------------------------------------- one peer, one repeat
    def block(self, peer, rep):
        a = self.a
        with lab.locked(os.environ.get("BENCH_LOCK")):
            for part in (self.plain, self.alone):
                try:
                    part(peer, rep)
                except Exception as e:
                    self.emit(peer, "start", rep, dict(error=repr(e)[-700:]))
        time.sleep(a.rest)

    def plain(self, peer, rep):
        """What runs on the ordinary network, through one pair of proxies."""
        a = self.a
        if peer == "direct":
            if "http" in a.tests:
                with self.pair(peer) as pr:
                    for c in a.conns:
                        self.t_wrk(peer, pr, rep, f"http_c{c}", "A_HTTP", c, a.secs)
            return
        if not any(self.wants(peer, t) for t in WORKS if t not in ("bulk9000", "idle10k")):
            return
        with self.pair(peer) as pr:
            caps = pr["caps"]["caps"]
            if not self.smoke(peer, caps, rep):
                return
            if self.wants(peer, "idle"):                        # first: nothing has grown the heaps yet
                self.t_idle(peer, pr, rep, a.idle_conns)
            if self.wants(peer, "http") and "http" in caps:
                for c in a.conns:
                    self.t_wrk(peer, pr, rep, f"http_c{c}", "A_HTTP", c, a.secs)
            if self.wants(peer, "l4") and "l4" in caps:
                self.t_wrk(peer, pr, rep, "l4_c64", "A_L4WEB", 64, a.secs)
            if self.wants(peer, "h2") and "h2" in caps:
                self.t_h2(peer, pr, rep, a.short)
            if self.wants(peer, "bulk") and "bulk" in caps:
                self.t_bulk(peer, pr, rep, 1, a.short)
            if self.wants(peer, "open") and "http" in caps:
                most = [r["rps"] for r in self.rows if (r["peer"], r["test"], r["rep"]) == (peer, "http_c64", rep) and "rps" in r]
                if not most:                                    # -t open alone: its own maximum is measured first
                    self.t_wrk(peer, pr, rep, "http_c64", "A_HTTP", 64, a.secs)
                    most = [self.rows[-1].get("rps", 0)]
                if most[-1]:
                    self.t_open(peer, pr, rep, "open_half", most[-1] / 2, a.secs)
            if self.wants(peer, "loss") and "http" in caps:
                self.t_loss(peer, pr, rep, a.secs)
            if self.wants(peer, "conn") and "l4" in caps:       # last: leaves TIME_WAIT behind
                self.t_wrk(peer, pr, rep, "conn_l4", "A_L4WEB", 32, a.short, close=True)

    def alone(self, peer, rep):
        """What needs a fresh pair."""
        if peer == "direct":
            return
        if self.wants(peer, "bulk9000"):
            with self.mtu(9000), self.pair(peer) as pr:
                if "bulk" in pr["caps"]["caps"]:
                    self.names = dict(bulk_1="bulk9000_1")
                    self.t_bulk(peer, pr, rep, 1, self.a.short)
                    self.names = {}
        if self.wants(peer, "idle10k"):
            for kind, key in (("l4", "A_L4WEB"), ("http", "A_HTTP")):
                with self.pair(peer) as pr:
                    if kind in pr["caps"]["caps"] and self.smoke(peer, pr["caps"]["caps"], rep):
                        self.t_idle_many(peer, pr, rep, kind, key)


def text_of(*cmd):
    with contextlib.suppress(OSError):
        return subprocess.run(cmd, capture_output=True, text=True).stdout.strip()
    return ""


def about(a, caps):
    """What was measured, where."""
    commit = text_of("git", "-C", REPO, "rev-parse", "HEAD")
    d = dict(started=time.strftime("%FT%TZ", time.gmtime()), commit=commit,
             uncommitted=bool(text_of("git", "-C", REPO, "status", "--porcelain", "--untracked-files=no")),
             weft_profile=os.path.basename(os.path.dirname(os.environ.get("WEFT_BIN", ""))),
             cpus=os.cpu_count(), kernel=os.uname().release, machine=os.uname().machine,
             args={k: v for k, v in vars(a).items() if k not in ("out", "table", "keep")},
             versions={p: c["version"] for p, c in caps.items()},
             tools=dict(wrk=text_of("sh", "-c", "wrk -v 2>&1 | head -n 1 | cut -d' ' -f1-2"), h2load=text_of("h2load", "--version"),
                        iperf3=text_of("iperf3", "--version").split("\n")[0]))
    with contextlib.suppress(Exception):
        d["cpu_model"] = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read()).group(1)
        d["memory_mib"] = int(re.search(r"MemTotal:\s+(\d+)", open("/proc/meminfo").read()).group(1)) // 1024
    return d


def save(out, rows, meta):
    with open(out + "/raw.jsonl", "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    summary = lab.summarise(rows)
    with open(out + "/result.json", "w") as f:
        json.dump(dict(meta=meta, goals=goals.verdicts(summary, rows), figures=summary), f, indent=1)
    return summary


def parse_args():
    ap = argparse.ArgumentParser(prog="compare HARNESS")
    ap.add_argument("-p", "--peers", help="comma separated (default: direct, weft and all that are installed)")
    ap.add_argument("-t", "--tests", default=",".join(WORKS), help="of: " + ",".join(WORKS))
    ap.add_argument("-r", "--repeats", type=int, default=3)
    ap.add_argument("--turns", action="store_true", help="all pairs stand at once and take turns, -r times: " + ", ".join(TURNS))
    ap.add_argument("--starts", type=int, default=1, help="with --turns: start all pairs anew so often, -r turns each")
    ap.add_argument("-c", "--conns", default="1,64,256", help="connections of the HTTP work")
    ap.add_argument("--secs", type=int, default=6, help="seconds of one wrk or open-loop run")
    ap.add_argument("--short", type=int, default=5, help="seconds of one bulk, connection or h2 run")
    ap.add_argument("--idle-conns", type=int, default=1000)
    ap.add_argument("--loss-rate", type=int, default=1000, help="requests/s of the open-loop run under loss")
    ap.add_argument("--workers", type=int, default=2)
    ap.add_argument("--rest", type=float, default=1.0, help="seconds between two peers")
    ap.add_argument("--noise", type=float, default=0.25, help="repeat a run when other processes used more cores than this")
    ap.add_argument("-o", "--out", help="results folder; an existing one is added to")
    ap.add_argument("--keep", action="store_true", help="keep the temporary folder with configs and logs")
    ap.add_argument("--table", metavar="DIR", help="only print the table of a results folder")
    a = ap.parse_args(sys.argv[4:])
    a.tests, a.conns = a.tests.split(","), [int(x) for x in a.conns.split(",")]
    if a.starts < 1 or a.starts > 1 and not a.turns:
        ap.error("--starts is 1 or more, and above 1 for --turns: without it every repeat starts its pair anew")
    if a.turns:
        if a.tests == list(WORKS):
            a.tests = [t for t in TURNS if t != "bulk9000"]
        alone = [t for t in a.tests if t in WORKS and t not in TURNS]
        if alone:
            ap.error(f"no turns are taken at {', '.join(alone)}: --turns is for {', '.join(TURNS)}")
        if "bulk9000" in a.tests and len(a.tests) > 1:
            ap.error("--turns takes bulk9000 alone: the link has one MTU")
    unknown = set(a.tests) - set(WORKS)
    if unknown:
        ap.error(f"no such work: {', '.join(sorted(unknown))}")
    return a


def main():
    a = parse_args()
    if a.table:
        rows = [json.loads(x) for x in open(a.table + "/raw.jsonl")]
        meta = json.load(open(a.table + "/result.json"))["meta"]
        return print(goals.page(save(a.table, rows, meta), meta, rows))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if "idle10k" in a.tests and hard < IDLE_MANY + 1000:
        raise SystemExit(f"idle10k needs {IDLE_MANY + 1000} file descriptors, the hard limit is {hard}: raise it, or leave the work out with -t")
    env = dict(os.environ, **{k: str(v) for k, v in lab.PORTS.items()})
    known = sorted({p for peers in WORKS.values() for p in peers})
    asked = a.peers.split(",") if a.peers else ["direct", "weft"] + known
    caps = {p: lab.peer_caps(p, env) for p in asked}
    for p in asked:
        if not caps[p]["available"]:
            print(f"skipped: {p}: {caps[p]['why']}")
    peers = [p for p in asked if caps[p]["available"]]
    only = open(os.path.join(tempfile.gettempdir(), lab.PREFIX + ".running"), "a")
    try:
        fcntl.flock(only, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit("another run is going on (it owns the namespaces)")
    a.out = a.out or os.path.join(OUT, time.strftime("%Y%m%d-%H%M%S"))
    os.makedirs(a.out, exist_ok=True)
    bench = Lab(a)
    meta = about(a, {p: caps[p] for p in peers})
    with contextlib.suppress(FileNotFoundError):
        bench.rows = [json.loads(x) for x in open(a.out + "/raw.jsonl")]
        meta["versions"] = {**json.load(open(a.out + "/result.json"))["meta"]["versions"], **meta["versions"]}
    base = max([r["rep"] for r in bench.rows], default=0)

    def stop(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    try:
        bench.up()
        if a.turns:
            for start in range(a.starts):
                bench.turns(peers, base + 1 + start * a.repeats, a.repeats)
                save(a.out, bench.rows, meta)
        for rep in [] if a.turns else range(base + 1, base + a.repeats + 1):
            for p in peers:
                bench.block(p, rep)
                save(a.out, bench.rows, meta)
    finally:
        bench.down()
        summary = save(a.out, bench.rows, meta)
    print(goals.page(summary, meta, bench.rows))
    print(f"results in {os.path.relpath(a.out)}")


main()
