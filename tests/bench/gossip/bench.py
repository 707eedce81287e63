#!/usr/bin/env python3
"""Measures a mesh of N agents, each on a host of its own (lab.py). Started by run.sh.

What a figure is: watchers at every agent wait in blocking queries (`/v1/health/service/S?passing&index=...`); the time
is from the order (signal, PUT) to the answer of the last one. One process reads all answers: at N=200 that adds some
50 ms. Bytes are those that a host's interface sends, IP and UDP headers included."""
import argparse, asyncio, json, math, random, shutil, signal, statistics, sys, time

from lab import Lab, address, cpu_seconds, memory_kib, wakeups
from mesh import PATIENCE, Mesh, http
from serf import SERF, Serf, recorded


# Returns from `failed` are counted for so long, and the third is shown late (flap damping): what waits for a return waits so
# long before it where agents ended before.
FLAPS_FORGOTTEN = 61


def spread(samples):
    """Median, 99th percentile (nearest rank: up to 100 samples it is the most) and most of what was reached; how many were not."""
    reached = sorted(s for s in samples if s is not None)
    if not reached:
        return None
    p99 = reached[math.ceil(0.99 * len(reached)) - 1]
    return dict(median=round(statistics.median(reached), 3), p99=round(p99, 3), max=round(reached[-1], 3), n=len(samples), missed=len(samples) - len(reached))


async def idle(lab, procs, seconds):
    """What the processes, {host: process}, do by themselves; per agent."""
    pids = [proc.pid for proc in procs.values()]
    sample = lambda: (sum(map(cpu_seconds, pids)), sum(map(wakeups, pids)), lab.sent(), time.time())
    before = sample()
    await asyncio.sleep(seconds)
    after = sample()
    per = len(pids) * (after[3] - before[3])
    sent = [[after[2][at][k] - before[2][at][k] for at in procs] for k in (0, 1)]
    rss, alone = zip(*map(memory_kib, pids))
    return dict(
        cpu_percent=round(100 * (after[0] - before[0]) / per, 3),
        wakeups_s=round((after[1] - before[1]) / per, 1),
        bytes_s=round(sum(sent[0]) / per, 1),
        bytes_max_s=round(max(sent[0]) * len(pids) / per, 1),
        packets_s=round(sum(sent[1]) / per, 2),
        rss_mib=round(statistics.median(rss) / 1024, 1),
        rss_max_mib=round(max(rss) / 1024, 1),
        rss_max_at=list(procs)[rss.index(max(rss))],
        anon_mib=round(statistics.median(alone) / 1024, 1),
    )


async def weft_idle(mesh, args):
    await asyncio.sleep(args.settle)
    dials, begun = await mesh.metric(mesh.live, "weft_gossip_dials_total"), time.time()
    measured = await idle(mesh.lab, {at: mesh.procs[at] for at in sorted(mesh.live)}, args.idle)
    count = await mesh.metric(mesh.live, "weft_gossip_dials_total") - dials
    measured["dials_s"] = round(count / len(mesh.live) / (time.time() - begun), 4)
    measured["links"] = round(await mesh.metric(mesh.live, "weft_gossip_connections") / len(mesh.live), 1)
    return measured


async def ends(mesh, kind, number):
    """One agent ends in this way; seconds until all others have unrouted its service."""
    at, service = mesh.victim(), f"{kind}-{number}"
    await mesh.register(at, service)
    async def order():
        if kind == "leave":
            await http(address(at), "PUT", "/v1/agent/leave")
            return
        if kind == "silent":
            mesh.lab.cut(at)
        mesh.signal(at, signal.SIGKILL)
    seconds = (await mesh.ends(service, at, order))["all"]
    if kind == "silent":
        mesh.lab.mend(mesh.count)
    await mesh.back(at, service)
    await asyncio.sleep(2)
    return seconds


def ends_each(count, args):
    """How often each kind of end is measured of serf: each takes one agent away, and two must be left to see it."""
    return max(1, min(args.repeats, (count - 2) // 3))


async def registers(mesh, count, tag):
    """Seconds from a registration to the last agent, `count` times."""
    return spread([(await mesh.register(mesh.victim(), f"{tag}-{k}"))["all"] for k in range(count)])


async def moved(mesh):
    """One agent is killed and started on another host with what it has on disk, then at home again: seconds from each start
    until all others show its name at the new address. They are asked in turn: some 0.1 s of it at N=20."""
    at, spare, times = mesh.victim(), mesh.count, []
    others = mesh.live - {at}
    for host in (spare, at):
        mesh.live.discard(at)
        mesh.signal(at, signal.SIGKILL)
        mesh.procs[at].wait()
        begun = time.time()
        mesh.spawn(at, host)
        end = await mesh.all(others, lambda other: mesh.shows_at(other, f"n{at}", address(host)), PATIENCE)
        times.append(end and end - begun)
        await asyncio.sleep(2)
    return times


async def split(mesh, seconds):
    """Halves that hear nothing of each other: from the healing until all see all and hold the same records."""
    hosts = sorted(mesh.live)
    side = {at: rank % 2 for rank, at in enumerate(hosts)}
    same = lambda at, other: side.get(at) == side.get(other)
    before = mesh.failures_logged(same)
    mesh.lab.split(hosts[::2], hosts[1::2])
    try:
        await asyncio.sleep(seconds / 2)
        for at in hosts[:2]:
            body = json.dumps(dict(Name=f"dark-{at}", Port=9000)).encode()
            await http(address(at), "PUT", "/v1/agent/service/register", body)
        await asyncio.sleep(seconds / 2)
        infos = await asyncio.gather(*(mesh.info(at) for at in hosts))
        apart = len({info["RecordsHash"] for info in infos if info})
    finally:
        mesh.lab.pass_all("split")
    healed = time.time()
    end = await mesh.until_equal(PATIENCE)
    return dict(hashes_apart=apart, equal_s=end and round(end - healed, 2), third_parties_flapped=mesh.failures_logged(same) - before)


async def pauses(mesh, seconds):
    """A quarter of the agents are stopped again and again, for 0.1 to 10 s, after 1 to 30 s each: how often a healthy agent
    called a healthy one failed."""
    sick = {at for at in mesh.live if at % 4 == 3}
    healthy = lambda at, other: at not in sick and other not in sick
    before, end = mesh.failures_logged(healthy), time.time() + seconds
    async def trouble(at):
        await asyncio.sleep(random.uniform(0, min(20, seconds)))
        while time.time() < end:
            mesh.signal(at, signal.SIGSTOP)
            await asyncio.sleep(0.1 * 100 ** random.random())
            mesh.signal(at, signal.SIGCONT)
            await asyncio.sleep(random.uniform(1, 30))
    await asyncio.gather(*(trouble(at) for at in sick))
    await mesh.until_equal(PATIENCE)
    return dict(healthy_called_failed=mesh.failures_logged(healthy) - before, node_hours=round(len(mesh.live) * seconds / 3600, 2))


async def paused(mesh):
    """One agent is stopped for 10 s."""
    at = mesh.victim()
    await mesh.register(at, "stopped")
    third = lambda _, other: other != at
    others, before = mesh.live - {at}, mesh.failures_logged(third)
    async def send(number):
        mesh.signal(at, number)
    begun = time.time()
    gone = await mesh.until_all("stopped", 0, lambda: send(signal.SIGSTOP), others)
    await asyncio.sleep(max(0.0, 10 - (time.time() - begun)))
    back = await mesh.until_all("stopped", 1, lambda: send(signal.SIGCONT), others)
    await asyncio.sleep(3)
    return dict(unrouted_s=gone["all"], back_s=back["all"], others_flapped=mesh.failures_logged(third) - before)


async def measure_weft(lab, count, args):
    lab.mend(count)
    mesh, result = Mesh(lab, count, args.instances), dict(what="weft", n=count, instances=args.instances)
    wanted = lambda part: not args.only or part in args.only
    try:
        result.update(await mesh.start())
        if result["converged_after_last_start_s"] is None:
            result["stuck"] = sorted((await mesh.info(at) or {}).get("Members", {}).get("Alive", 0) for at in mesh.live)
            return result
        if wanted("idle"):
            result["idle"] = await weft_idle(mesh, args)
        if wanted("register"):
            result["register_to_all_s"] = await registers(mesh, args.repeats, "event")
        if wanted("register-lossy"):
            for percent in (1, 20):
                lab.lossy(percent)
                try:
                    result[f"register_lossy_{percent}_to_all_s"] = await registers(mesh, args.repeats, f"lossy-{percent}")
                finally:
                    lab.pass_all("loss")
                await asyncio.sleep(5)
        for kind in ("kill", "silent", "leave"):
            if wanted(kind):
                result[f"{kind}_to_all_s"] = spread([await ends(mesh, kind, k) for k in range(args.repeats)])
        if wanted("moved"):
            if any(map(wanted, ("kill", "silent"))):
                await asyncio.sleep(FLAPS_FORGOTTEN)
            lab.grow(count + 1)
            lab.mend(count + 1)
            result["moved_to_all_s"] = spread([s for _ in range(math.ceil(args.repeats / 2)) for s in await moved(mesh)])
        if wanted("stop"):
            result["sigstop"] = await paused(mesh)
        if wanted("split"):
            if any(map(wanted, ("kill", "silent", "moved", "stop"))):
                await asyncio.sleep(FLAPS_FORGOTTEN)
            result["split"] = await split(mesh, args.split)
        if wanted("pauses"):
            result["pauses"] = await pauses(mesh, args.pauses)
        return result
    finally:
        if args.keep:
            shutil.copytree(mesh.dir, args.keep, dirs_exist_ok=True)
        mesh.stop()


async def measure_serf(lab, count, args):
    lab.mend(count)
    mesh, result = Serf(lab, count), dict(what="serf", n=count)
    wanted = lambda part: not args.only or part in args.only
    victim = lambda: random.choice([at for at in mesh.living() if at])
    try:
        result["converged_after_last_start_s"] = await mesh.start()
        if wanted("idle"):
            await asyncio.sleep(args.settle)
            result["idle"] = await idle(lab, mesh.procs, args.idle)
        if wanted("register"):
            result["register_to_all_s"] = spread([await mesh.event(k) for k in range(args.repeats)])
        if wanted("register-lossy"):
            for percent in (1, 20):
                lab.lossy(percent)
                try:
                    samples = [await mesh.event(f"lossy-{percent}-{k}") for k in range(args.repeats)]
                finally:
                    lab.pass_all("loss")
                result[f"register_lossy_{percent}_to_all_s"] = spread(samples)
        if wanted("kill"):
            result["kill_to_all_s"] = spread([await mesh.ends(victim(), "Failed", signal.SIGKILL) for _ in range(ends_each(count, args))])
        if wanted("silent"):
            result["silent_to_all_s"] = spread([await mesh.ends(victim(), "Failed", signal.SIGKILL, cut=True) for _ in range(ends_each(count, args))])
        if wanted("leave"):
            result["leave_to_all_s"] = spread([await mesh.ends(victim(), "Leave", signal.SIGINT) for _ in range(ends_each(count, args))])
        if wanted("stop"):
            result["sigstop"] = await mesh.pause(victim())
        return result
    finally:
        mesh.stop()


async def measure_memory(lab, count, args):
    """What an instance in the catalogue costs: the same mesh with and without them."""
    rows = []
    for instances in (0, args.instances):
        lab.mend(count)
        mesh = Mesh(lab, count, instances)
        try:
            started = await mesh.start()
            await asyncio.sleep(args.settle)
            rss, alone = zip(*(memory_kib(mesh.procs[at].pid) for at in sorted(mesh.live)))
            rows.append(dict(rss_mib=round(statistics.median(rss) / 1024, 1), rss_max_mib=round(max(rss) / 1024, 1), anon_kib=statistics.median(alone), catalogue_whole_s=started["catalogue_whole_s"]))
        finally:
            mesh.stop()
    bytes_each = 1024 * (rows[1]["anon_kib"] - rows[0]["anon_kib"]) / args.instances
    return dict(n=count, instances=args.instances, without=rows[0], with_them=rows[1], bytes_per_instance=round(bytes_each))


ROWS = [
    ("all see all, s after the last start", lambda r: r.get("converged_after_last_start_s")),
    ("registration (serf: event) at all, s", lambda r: r.get("register_to_all_s")),
    ("  with 1 % of the UDP lost, s", lambda r: r.get("register_lossy_1_to_all_s")),
    ("  with 20 % lost, s", lambda r: r.get("register_lossy_20_to_all_s")),
    ("kill -9 at all, port refused, s", lambda r: r.get("kill_to_all_s")),
    ("kill -9 at all, host cut, s", lambda r: r.get("silent_to_all_s")),
    ("leave at all, s", lambda r: r.get("leave_to_all_s")),
    ("same name back, new address, at all, s after the start", lambda r: r.get("moved_to_all_s")),
    ("SIGSTOP 10 s: failed at all, s", lambda r: r.get("sigstop", {}).get("unrouted_s")),
    ("  back after SIGCONT, s", lambda r: r.get("sigstop", {}).get("back_s")),
    ("  others that were called failed", lambda r: r.get("sigstop", {}).get("others_flapped")),
    ("split in halves, healed: all equal, s", lambda r: r.get("split", {}).get("equal_s")),
    ("  of the same half, called failed", lambda r: r.get("split", {}).get("third_parties_flapped")),
    ("a quarter pauses: healthy called failed by healthy", lambda r: r.get("pauses", {}).get("healthy_called_failed")),
    ("  in so many node-hours", lambda r: r.get("pauses", {}).get("node_hours")),
    ("idle B/s per agent", lambda r: r.get("idle", {}).get("bytes_s")),
    ("  of the busiest", lambda r: r.get("idle", {}).get("bytes_max_s")),
    ("idle packets/s per agent", lambda r: r.get("idle", {}).get("packets_s")),
    ("idle CPU, % of a core", lambda r: r.get("idle", {}).get("cpu_percent")),
    ("idle wake-ups/s", lambda r: r.get("idle", {}).get("wakeups_s")),
    ("idle handshakes begun/s", lambda r: r.get("idle", {}).get("dials_s")),
    ("open gossip connections", lambda r: r.get("idle", {}).get("links")),
    ("RSS, MiB (median)", lambda r: r.get("idle", {}).get("rss_mib")),
    ("  most", lambda r: r.get("idle", {}).get("rss_max_mib")),
    ("  anonymous (median)", lambda r: r.get("idle", {}).get("anon_mib")),
]


def shown(value):
    if isinstance(value, dict):
        return f"{value['median']} ({value['p99']}) n={value['n']}" + (f" {value['missed']} missed" if value["missed"] else "")
    return "-" if value is None else str(value)


def table(results):
    head = [""] + [f"{r['what']} {r['n']}" for r in results]
    rows = [head] + [[name] + [shown(pick(r)) for r in results] for name, pick in ROWS]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main():
    parser = argparse.ArgumentParser(prog="run.sh")
    parser.add_argument("sizes", type=int, nargs="*", default=[20, 50, 100, 200])
    parser.add_argument("-o", "--out")
    parser.add_argument("--instances", type=int, default=0, help="in the whole catalogue, by the agents' config files")
    parser.add_argument("--only", type=lambda text: set(text.split(",")), default=set(), help="idle,register,register-lossy,kill,silent,leave,moved,stop,split,pauses,memory")
    parser.add_argument("--repeats", type=int, default=5, help="samples of register, register-lossy, kill, silent, leave and moved (serf loses an agent with each kill and leave: fewer)")
    parser.add_argument("--split", type=float, default=60, help="seconds of the split")
    parser.add_argument("--pauses", type=float, default=60, help="seconds in which a quarter of the agents pauses")
    parser.add_argument("--idle", type=float, default=20, help="seconds of the idle sample")
    parser.add_argument("--settle", type=float, default=10, help="seconds before it")
    parser.add_argument("--keep", help="directory for the agents' logs")
    parser.add_argument("--no-serf", action="store_true")
    args = parser.parse_args()
    # So that the agents end when this is told to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    lab, results = Lab(), []
    try:
        for count in args.sizes:
            lab.grow(count)
            if args.only == {"memory"}:
                args.instances = args.instances or 10_000
                print(json.dumps(asyncio.run(measure_memory(lab, count, args))))
                continue
            results.append(asyncio.run(measure_weft(lab, count, args)))
            print(json.dumps(results[-1]), file=sys.stderr)
            if args.no_serf:
                continue
            beside = asyncio.run(measure_serf(lab, count, args)) if SERF else recorded(count)
            if beside:
                results.append(beside)
                print(json.dumps(beside), file=sys.stderr)
    finally:
        lab.close()
    if results:
        print("seconds: median (p99: the most, up to 100 samples)\n" + table(results))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(dict(results=results), file, indent=1)


main()
