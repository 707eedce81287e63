#!/usr/bin/env python3
"""Measures a mesh of N agents on the loopback device of this network namespace. Started by run.sh.

What a figure is: watchers at every agent wait in blocking queries (`/v1/health/service/S?passing&index=...`); the time
is from the order (signal, PUT) to the answer of the last one. One process reads all answers: at N=200 that adds some
50 ms. Bytes are those of the loopback device, IP and UDP headers included, counted once, at the receiver."""
import argparse, asyncio, contextlib, json, os, random, shutil, signal, statistics, subprocess, sys, tempfile, time

WEFT = os.environ["WEFT"]
SERF = shutil.which(os.environ.get("SERF", "serf"))
HZ = os.sysconf("SC_CLK_TCK")
PATIENCE = 90


async def http(ip, method, path, body=b"", timeout=60):
    """One request on a connection of its own: (status, headers, body)."""
    async def exchange():
        reader, writer = await asyncio.open_connection(ip, 8500)
        try:
            head = f"{method} {path} HTTP/1.1\r\nhost: {ip}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            raw = await reader.read()
        finally:
            writer.close()
        head, _, rest = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        return int(lines[0].split(" ")[1]), headers, rest
    return await asyncio.wait_for(exchange(), timeout)


def counters():
    """Bytes and packets that the loopback device has received."""
    for line in open("/proc/net/dev"):
        if line.strip().startswith("lo:"):
            words = line.split(":")[1].split()
            return int(words[0]), int(words[1])


def cpu_seconds(pid):
    words = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / HZ


def memory_kib(pid):
    """Resident memory: all of it, and what is this process's alone."""
    rows = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    return int(rows["VmRSS"].split()[0]), int(rows["RssAnon"].split()[0])


def address(at):
    return f"127.0.{1 + at // 200}.{1 + at % 200}"


def spread(samples):
    """Median and most of what was reached; how many were not."""
    reached = sorted(s for s in samples if s is not None)
    if not reached:
        return None
    return dict(median=round(statistics.median(reached), 3), max=round(reached[-1], 3), n=len(samples), missed=len(samples) - len(reached))


class Mesh:
    def __init__(self, count, instances):
        self.count, self.instances = count, instances
        self.dir = tempfile.mkdtemp(prefix="weft-gossip-")
        self.procs, self.live = {}, set()
        self.marks = {}

    def spawn(self, at, ip=None):
        base = f"{self.dir}/{at}"
        os.makedirs(base, exist_ok=True)
        ip = ip or address(at)
        argv = [WEFT, "agent", "-node", f"n{at}", "-data-dir", f"{base}/data", "-bind", ip, "-client", ip]
        argv += ["-issuer", f"{self.dir}/ca/issuer-1"] if at == 0 else ["-join", address(0), "-token", self.token]
        if self.instances:
            share = self.instances // self.count
            services = [dict(id=f"s{at}-{k}", name=f"service-{k}", port=8000 + k % 1000, tags=["v1"]) for k in range(share)]
            with open(f"{base}/services.json", "w") as file:
                json.dump(dict(services=services), file)
            argv += ["-config-file", f"{base}/services.json"]
        log = open(f"{base}/log", "ab")
        self.procs[at] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.live.add(at)

    async def start(self):
        run = lambda *argv: subprocess.run([WEFT, *argv], check=True, capture_output=True, text=True).stdout
        run("ca", "init", "-dir", f"{self.dir}/ca", "-trust-domain", "bench.test")
        out = run("token", "create", "-ca", f"{self.dir}/ca", "-node", "n*", "-serve", "*", "-ttl", "2h")
        self.token = next(line for line in out.split() if line.startswith("weft1-"))
        begun = time.time()
        self.spawn(0)
        await self.all({0}, self.is_up, 30)
        for at in range(1, self.count):
            self.spawn(at)
            await asyncio.sleep(0.01)
        started = time.time()
        async def sees_all(at):
            info = await self.info(at)
            return info and info["Members"]["Alive"] >= self.count
        end = await self.all(self.live, sees_all, 180)
        return dict(spawn_s=round(started - begun, 2), converged_after_last_start_s=end and round(end - started, 2))

    async def is_up(self, at):
        return await self.info(at) is not None

    async def info(self, at):
        with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError, IndexError):
            status, _, body = await http(address(at), "GET", "/v1/mesh/info", timeout=5)
            return json.loads(body) if status == 200 else None
        return None

    async def all(self, who, test, limit):
        """Asks those that have not got there until all have; when the last one had, or None."""
        todo, end = set(who), time.time() + limit
        while todo and time.time() < end:
            begun = time.time()
            for at in list(todo):
                if await test(at):
                    todo.discard(at)
            if todo:
                # Asking must not eat the cores that the agents need.
                await asyncio.sleep(max(0.05, 2 * (time.time() - begun)))
        return None if todo else time.time()

    async def watch(self, at, service, want, asked):
        """When this agent shows `want` passing instances; says in `asked` once it waits for a change."""
        index, said, end = None, False, time.time() + PATIENCE
        while time.time() < end:
            query = f"&index={index}&wait=30s" if index else ""
            try:
                status, headers, body = await http(address(at), "GET", f"/v1/health/service/{service}?passing{query}")
            except (OSError, asyncio.TimeoutError, IndexError):
                await asyncio.sleep(0.05)
                continue
            if status == 200 and len(json.loads(body)) == want:
                if not said:
                    asked.append(at)
                return time.time()
            index = headers.get("x-consul-index")
            if not said:
                said = True
                asked.append(at)
        return None

    async def until_all(self, service, want, order, who=None):
        """Gives `order` once every agent watches; seconds until the first and the last one saw it."""
        who = set(who or self.live)
        asked = []
        tasks = [asyncio.create_task(self.watch(at, service, want, asked)) for at in who]
        while len(asked) < len(who):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        begun = time.time()
        await order()
        seen = await asyncio.gather(*tasks)
        missed = sum(1 for t in seen if t is None)
        times = [t - begun for t in seen if t is not None]
        return dict(first=round(min(times), 3), all=None if missed else round(max(times), 3), missed=missed)

    async def register(self, at, service):
        body = json.dumps(dict(Name=service, ID=service, Port=9000)).encode()
        return await self.until_all(service, 1, lambda: http(address(at), "PUT", "/v1/agent/service/register", body))

    def victim(self):
        return random.choice(sorted(self.live - {0}))

    async def ends(self, service, at, order):
        self.live.discard(at)
        return await self.until_all(service, 0, order)

    def failures_logged(self, but):
        """How often any agent said that a member failed, leaving out `but`."""
        count = 0
        for at in self.procs:
            with open(f"{self.dir}/{at}/log", errors="replace") as log:
                count += sum(1 for line in log if "member failed" in line and f"member=n{but} " not in line + " ")
        return count

    async def dials(self, who):
        total = 0.0
        for at in who:
            _, _, body = await http(address(at), "GET", "/v1/agent/metrics?format=prometheus")
            total += sum(float(line.split()[1]) for line in body.decode().splitlines() if line.startswith("weft_gossip_dials_total"))
        return total

    def stop(self):
        for proc in self.procs.values():
            with contextlib.suppress(OSError):
                proc.kill()
        for proc in self.procs.values():
            proc.wait()
        shutil.rmtree(self.dir, ignore_errors=True)


async def idle(pids, seconds):
    cpu, net, begun = sum(map(cpu_seconds, pids)), counters(), time.time()
    await asyncio.sleep(seconds)
    took = time.time() - begun
    after = counters()
    per = len(pids) * took
    rss, alone = zip(*map(memory_kib, pids))
    return dict(
        cpu_percent=round(100 * (sum(map(cpu_seconds, pids)) - cpu) / per, 3),
        bytes_s=round((after[0] - net[0]) / per, 1),
        packets_s=round((after[1] - net[1]) / per, 2),
        rss_mib=round(statistics.median(rss) / 1024, 1),
        rss_max_mib=round(max(rss) / 1024, 1),
        anon_mib=round(statistics.median(alone) / 1024, 1),
    )


async def measure_weft(count, args):
    mesh, result = Mesh(count, args.instances), dict(what="weft", n=count, instances=args.instances)
    wanted = lambda part: not args.only or part in args.only
    try:
        result.update(await mesh.start())
        if result["converged_after_last_start_s"] is None:
            result["stuck"] = sorted((await mesh.info(at) or {}).get("Members", {}).get("Alive", 0) for at in mesh.live)
            return result
        if args.instances:
            last = args.instances // count - 1
            async def has_last(at):
                _, _, body = await http(address(at), "GET", f"/v1/health/service/service-{last}?passing")
                return len(json.loads(body)) == count
            result["catalogue_whole"] = await mesh.all(mesh.live, has_last, 60) is not None
        if wanted("idle"):
            await asyncio.sleep(args.settle)
            sample = sorted(mesh.live)[:: max(1, count // 10)]
            dials, begun = await mesh.dials(sample), time.time()
            result["idle"] = await idle([proc.pid for proc in mesh.procs.values()], args.idle)
            rate = (await mesh.dials(sample) - dials) / len(sample) / (time.time() - begun)
            result["idle"]["dials_s"] = round(rate, 3)
        if wanted("register"):
            rows = []
            for k in range(args.repeats):
                rows.append((await mesh.register(mesh.victim(), f"event-{k}"))["all"])
            result["register_to_all_s"] = spread(rows)
        for kind in ("kill", "silent", "leave"):
            if not wanted(kind):
                continue
            rows = []
            for k in range(args.repeats):
                at, service = mesh.victim(), f"{kind}-{k}"
                await mesh.register(at, service)
                async def order():
                    if kind == "leave":
                        await http(address(at), "PUT", "/v1/agent/leave")
                        return
                    if kind == "silent":
                        drop = f"add table inet gone; add chain inet gone in {{ type filter hook input priority 0; }}; add rule inet gone in ip daddr {address(at)} udp dport 8301 drop"
                        subprocess.run(["nft", drop], check=True)
                    mesh.procs[at].send_signal(signal.SIGKILL)
                rows.append((await mesh.ends(service, at, order))["all"])
                await asyncio.sleep(1)
            result[f"{kind}_to_all_s"] = spread(rows)
        if wanted("stop"):
            at = mesh.victim()
            await mesh.register(at, "stopped")
            others, before = mesh.live - {at}, mesh.failures_logged(at)
            async def send(sig):
                mesh.procs[at].send_signal(sig)
            begun = time.time()
            gone = await mesh.until_all("stopped", 0, lambda: send(signal.SIGSTOP), others)
            await asyncio.sleep(max(0.0, 10 - (time.time() - begun)))
            back = await mesh.until_all("stopped", 1, lambda: send(signal.SIGCONT), others)
            await asyncio.sleep(3)
            result["sigstop"] = dict(unrouted_s=gone["all"], back_s=back["all"], others_flapped=mesh.failures_logged(at) - before)
        return result
    finally:
        if args.keep:
            print("kept:", mesh.dir, file=sys.stderr)
            shutil.copytree(mesh.dir, args.keep, dirs_exist_ok=True)
        mesh.stop()


async def measure_serf(count, args):
    """serf's LAN profile, timed by the lines that its agents log (read every 20 ms)."""
    directory, procs, result = tempfile.mkdtemp(prefix="serf-gossip-"), {}, dict(what="serf", n=count)
    offsets, seen = {}, {}

    def scan():
        for at in procs:
            with open(f"{directory}/{at}", errors="replace") as log:
                log.seek(offsets.get(at, 0))
                for line in log:
                    if "EventMember" in line:
                        event, _, rest = line.partition("EventMember")[2].partition(":")
                        seen.setdefault((event, rest.split()[0]), {}).setdefault(at, time.time())
                offsets[at] = log.tell()

    async def until(test, limit=60):
        end = time.time() + limit
        while time.time() < end:
            scan()
            if test():
                return time.time()
            await asyncio.sleep(0.02)
        return None

    try:
        for at in range(count):
            ip = address(at)
            argv = [SERF, "agent", f"-node=n{at}", f"-bind={ip}:7946", f"-rpc-addr={ip}:7373", "-profile=lan", "-log-level=info"]
            argv += [f"-retry-join={address(0)}:7946", "-retry-interval=1s"] if at else []
            log = open(f"{directory}/{at}", "wb")
            procs[at] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            await asyncio.sleep(0.5 if at == 0 else 0.01)
        started = time.time()
        joined = await until(lambda: sum(len(v) for (event, _), v in seen.items() if event == "Join") >= count * count, 120)
        result["converged_after_last_start_s"] = joined and round(joined - started, 2)
        await asyncio.sleep(args.settle)
        result["idle"] = await idle([proc.pid for proc in procs.values()], args.idle)
        for kind, event, sig in (("silent", "Failed", signal.SIGKILL), ("leave", "Leave", signal.SIGINT)):
            rows = []
            for _ in range(args.repeats):
                at = random.choice([a for a in procs if a and procs[a].poll() is None])
                want = sum(1 for p in procs.values() if p.poll() is None) - 1
                begun = time.time()
                procs[at].send_signal(sig)
                end = await until(lambda: len(set(seen.get((event, f"n{at}"), {})) - {at}) >= want)
                rows.append(end and end - begun)
                procs[at].wait()
            result[f"{kind}_to_all_s"] = spread(rows)
        return result
    finally:
        for proc in procs.values():
            proc.kill()
            proc.wait()
        shutil.rmtree(directory, ignore_errors=True)


ROWS = [
    ("all see all, s after the last start", lambda r: r.get("converged_after_last_start_s")),
    ("registration at all, s", lambda r: r.get("register_to_all_s")),
    ("kill -9 at all, port refused, s", lambda r: r.get("kill_to_all_s")),
    ("kill -9 at all, host silent, s", lambda r: r.get("silent_to_all_s")),
    ("leave at all, s", lambda r: r.get("leave_to_all_s")),
    ("SIGSTOP 10 s: unrouted, s", lambda r: r.get("sigstop", {}).get("unrouted_s")),
    ("  back after SIGCONT, s", lambda r: r.get("sigstop", {}).get("back_s")),
    ("  others that flapped", lambda r: r.get("sigstop", {}).get("others_flapped")),
    ("idle B/s per agent", lambda r: r.get("idle", {}).get("bytes_s")),
    ("idle packets/s per agent", lambda r: r.get("idle", {}).get("packets_s")),
    ("idle dials/s per agent", lambda r: r.get("idle", {}).get("dials_s")),
    ("idle CPU, % of a core", lambda r: r.get("idle", {}).get("cpu_percent")),
    ("RSS, MiB (median)", lambda r: r.get("idle", {}).get("rss_mib")),
    ("  of it anonymous", lambda r: r.get("idle", {}).get("anon_mib")),
]


def shown(value):
    if isinstance(value, dict):
        return f"{value['median']} ({value['max']})" + (f" {value['missed']} missed" if value["missed"] else "")
    return "-" if value is None else str(value)


def table(results):
    head = [""] + [f"{r['what']} {r['n']}" for r in results]
    rows = [head] + [[name] + [shown(pick(r)) for r in results] for name, pick in ROWS]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=int, nargs="*", default=[20, 50, 100])
    parser.add_argument("-o", "--out")
    parser.add_argument("--instances", type=int, default=0, help="in the whole catalogue")
    parser.add_argument("--only", type=lambda text: set(text.split(",")), default=set(), help="idle,register,kill,silent,leave,stop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--idle", type=float, default=20, help="seconds of the idle sample")
    parser.add_argument("--settle", type=float, default=8, help="seconds before it")
    parser.add_argument("--keep", help="directory for the agents' logs")
    parser.add_argument("--no-serf", action="store_true")
    args = parser.parse_args()
    # So that the agents end when this is told to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = []
    for count in args.sizes or [20, 50, 100]:
        results.append(asyncio.run(measure_weft(count, args)))
        if SERF and not args.no_serf:
            results.append(asyncio.run(measure_serf(count, args)))
        print(json.dumps(results[-1]), file=sys.stderr)
    print("seconds: median (max)\n" + table(results))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(dict(results=results), file, indent=1)


main()
