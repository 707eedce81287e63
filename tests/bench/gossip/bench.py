#!/usr/bin/env python3
"""Measures a mesh of N agents, each on a host of its own (lab.py). Started by run.sh.

What a figure is: watchers at every agent wait in blocking queries (`/v1/health/service/S?passing&index=...`); the time
is from the order (signal, PUT) to the answer of the last one. One process reads all answers: at N=200 that adds some
50 ms. Bytes are those that a host's interface sends, IP and UDP headers included."""
import argparse, asyncio, json, random, shutil, signal, statistics, sys, time

from lab import Lab, address, cpu_seconds, memory_kib, wakeups
from mesh import Mesh, http
from serf import SERF, Serf, recorded


def spread(samples):
    """Median and most of what was reached; how many were not."""
    reached = sorted(s for s in samples if s is not None)
    if not reached:
        return None
    return dict(median=round(statistics.median(reached), 3), max=round(reached[-1], 3), n=len(samples), missed=len(samples) - len(reached))


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
    await asyncio.sleep(1)
    return seconds


def ends_each(count, args):
    """How often each kind of end is measured: each takes one agent away, and two must be left to see it."""
    return max(1, min(args.repeats, (count - 2) // 3))


async def paused(mesh):
    """One agent is stopped for 10 s."""
    at = mesh.victim()
    await mesh.register(at, "stopped")
    others, before = mesh.live - {at}, mesh.failures_logged(at)
    async def send(number):
        mesh.signal(at, number)
    begun = time.time()
    gone = await mesh.until_all("stopped", 0, lambda: send(signal.SIGSTOP), others)
    await asyncio.sleep(max(0.0, 10 - (time.time() - begun)))
    back = await mesh.until_all("stopped", 1, lambda: send(signal.SIGCONT), others)
    await asyncio.sleep(3)
    return dict(unrouted_s=gone["all"], back_s=back["all"], others_flapped=mesh.failures_logged(at) - before)


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
            result["register_to_all_s"] = spread([(await mesh.register(mesh.victim(), f"event-{k}"))["all"] for k in range(args.repeats)])
        for kind in ("kill", "silent", "leave"):
            if wanted(kind):
                result[f"{kind}_to_all_s"] = spread([await ends(mesh, kind, k) for k in range(ends_each(count, args))])
        if wanted("stop"):
            result["sigstop"] = await paused(mesh)
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
    ("kill -9 at all, port refused, s", lambda r: r.get("kill_to_all_s")),
    ("kill -9 at all, host cut, s", lambda r: r.get("silent_to_all_s")),
    ("leave at all, s", lambda r: r.get("leave_to_all_s")),
    ("SIGSTOP 10 s: failed at all, s", lambda r: r.get("sigstop", {}).get("unrouted_s")),
    ("  back after SIGCONT, s", lambda r: r.get("sigstop", {}).get("back_s")),
    ("  others that were called failed", lambda r: r.get("sigstop", {}).get("others_flapped")),
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
        return f"{value['median']} ({value['max']})" + (f" {value['missed']} missed" if value["missed"] else "")
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
    parser.add_argument("--only", type=lambda text: set(text.split(",")), default=set(), help="idle,register,kill,silent,leave,stop,memory")
    parser.add_argument("--repeats", type=int, default=5)
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
        print("seconds: median (max)\n" + table(results))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(dict(results=results), file, indent=1)


main()
