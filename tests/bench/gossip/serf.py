"""serf beside weft, and what was recorded of it where it is not installed."""
import asyncio, contextlib, os, shutil, signal, subprocess, tempfile, time

from lab import address

SERF = shutil.which(os.environ.get("SERF", "serf"))

# serf 0.9.4, LAN profile, two cores, agents on one loopback device; measured before, by another harness.
RECORDED = {
    50: dict(silent_to_all_s=9.0, register_to_all_s="0.55-0.69", bytes_s=274, cpu_percent=0.2, rss_mib=15),
    100: dict(silent_to_all_s=10.0, register_to_all_s="0.55-0.69", bytes_s=274, cpu_percent=0.2, rss_mib=15),
    200: dict(silent_to_all_s=11.9, register_to_all_s="0.55-0.69", bytes_s=274, cpu_percent=0.2, rss_mib=15, converged_after_last_start_s=2.0),
}


def recorded(count):
    row = RECORDED.get(count)
    if not row:
        return None
    idle = {name: row[name] for name in ("bytes_s", "cpu_percent", "rss_mib")}
    return dict(what="recorded: serf", n=count, idle=idle, **{name: value for name, value in row.items() if name not in idle})


class Serf:
    """Agents with serf's LAN profile, timed by the lines that they log (read every 20 ms)."""

    def __init__(self, lab, count):
        self.lab, self.count = lab, count
        self.dir, self.procs, self.offsets, self.seen = tempfile.mkdtemp(prefix="serf-gossip-"), {}, {}, {}

    def scan(self):
        for at in self.procs:
            with open(f"{self.dir}/{at}", errors="replace") as log:
                log.seek(self.offsets.get(at, 0))
                for line in log:
                    if not line.endswith("\n"):
                        break
                    self.offsets[at] = self.offsets.get(at, 0) + len(line.encode())
                    if "EventMember" in line:
                        event, _, rest = line.partition("EventMember")[2].partition(":")
                        self.seen.setdefault((event, rest.split()[0]), {}).setdefault(at, time.time())
                    elif "Received event: user-event:" in line:
                        self.seen.setdefault(("User", line.split("user-event:")[1].strip()), {}).setdefault(at, time.time())

    async def until(self, test, limit=60):
        end = time.time() + limit
        while time.time() < end:
            self.scan()
            if test():
                return time.time()
            await asyncio.sleep(0.02)
        return None

    def count_of(self, event, name):
        return len(self.seen.get((event, name), {}))

    async def start(self):
        for at in range(self.count):
            ip = address(at)
            argv = [SERF, "agent", f"-node=n{at}", f"-bind={ip}:7946", f"-rpc-addr={ip}:7373", "-profile=lan", "-log-level=info"]
            argv += [f"-retry-join={address(0)}:7946", "-retry-interval=1s"] if at else []
            with open(f"{self.dir}/{at}", "wb") as log:
                self.procs[at] = subprocess.Popen(self.lab.of(at, *argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            await asyncio.sleep(0.5 if at == 0 else 0.01)
        started = time.time()
        whole = lambda: sum(len(at) for (event, _), at in self.seen.items() if event == "Join") >= self.count ** 2
        joined = await self.until(whole, 120)
        return joined and round(joined - started, 2)

    def living(self):
        return [at for at, proc in self.procs.items() if proc.poll() is None]

    async def event(self, number):
        name = f"event-{number}"
        begun = time.time()
        subprocess.run([SERF, "event", f"-rpc-addr={address(0)}:7373", "-coalesce=false", name], check=True, capture_output=True)
        end = await self.until(lambda: self.count_of("User", name) >= len(self.living()))
        return end and end - begun

    async def ends(self, at, event, number, cut=False):
        begun = time.time()
        if cut:
            self.lab.cut(at)
        self.procs[at].send_signal(number)
        want = len(self.living()) - (1 if self.procs[at].poll() is None else 0)
        end = await self.until(lambda: len(set(self.seen.get((event, f"n{at}"), {})) - {at}) >= want)
        self.procs[at].wait()
        return end and end - begun

    async def pause(self, at):
        """Stops one for 10 s: when all say failed, when all say back, how many others were called failed."""
        others = set(self.living()) - {at}
        self.scan()
        self.seen.pop(("Failed", f"n{at}"), None)
        self.seen.pop(("Join", f"n{at}"), None)
        before = sum(len(who) for (event, name), who in self.seen.items() if event == "Failed" and name != f"n{at}")
        begun = time.time()
        self.procs[at].send_signal(signal.SIGSTOP)
        gone = await self.until(lambda: others <= set(self.seen.get(("Failed", f"n{at}"), {})), 10)
        await asyncio.sleep(max(0.0, 10 - (time.time() - begun)))
        continued = time.time()
        self.procs[at].send_signal(signal.SIGCONT)
        failed = set(self.seen.get(("Failed", f"n{at}"), {}))
        back = await self.until(lambda: failed <= set(self.seen.get(("Join", f"n{at}"), {})))
        await asyncio.sleep(3)
        self.scan()
        after = sum(len(who) for (event, name), who in self.seen.items() if event == "Failed" and name != f"n{at}")
        return dict(unrouted_s=gone and round(gone - begun, 3), back_s=back and round(back - continued, 3), others_flapped=after - before)

    def stop(self):
        for proc in self.procs.values():
            with contextlib.suppress(OSError):
                proc.kill()
            proc.wait()
        shutil.rmtree(self.dir, ignore_errors=True)
