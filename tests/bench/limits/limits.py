"""Requests that pass a limit of the whole mesh: see run.sh."""
import asyncio, json, random, re, subprocess, sys, time

from lab import ROUTER, Lab, address
from mesh import TOKEN, WEFT, Mesh, http

EACH = 10
APP, UPSTREAM = 7000, 9191
PATIENCE = 5.0
# (seconds, requests a second for each agent)
PHASES = [(20, 2 * EACH), (10, 0), (10, 4 * EACH)]


async def app():
    """All instances are this server, outside of the hosts: it answers at once."""
    async def serve(reader, writer):
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):  # cancelled: the run is over
            pass
        finally:
            writer.close()

    return await asyncio.start_server(serve, ROUTER, APP, backlog=1024)


class Callers:
    """Calls from every host's agent, at the times of a Poisson process."""

    def __init__(self, count):
        self.count, self.free = count, {at: [] for at in range(count)}
        self.asked, self.passed, self.limited, self.other = 0, [], 0, {}

    async def ask(self, at):
        pair = None
        try:
            async with asyncio.timeout(PATIENCE):
                pair = self.free[at].pop() if self.free[at] else await asyncio.open_connection(address(at), UPSTREAM)
                reader, writer = pair
                writer.write(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                if length := re.search(rb"(?i)content-length: (\d+)", head):
                    await reader.readexactly(int(length.group(1)))
                else:  # in chunks
                    await reader.readuntil(b"\r\n0\r\n\r\n")
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            if pair:
                pair[1].transport.abort()
            return type(error).__name__
        self.free[at].append(pair)
        return int(head.split(b" ")[1])

    async def one(self, at):
        said = await self.ask(at)
        if said == 200:
            self.passed.append(time.monotonic())
        elif said == 429:
            self.limited += 1
        else:
            self.other[said] = self.other.get(said, 0) + 1

    async def run(self, seconds, rate):
        draw, tasks, due = random.Random(seconds), set(), time.monotonic()
        end = due + seconds
        while rate and due < end:
            await asyncio.sleep(max(0, due - time.monotonic()))
            task = asyncio.create_task(self.one(draw.randrange(self.count)))
            self.asked += 1
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += draw.expovariate(rate)
        await asyncio.gather(*tasks)
        await asyncio.sleep(max(0, end - time.monotonic()))


def beyond(times, limit):
    """The most that passed in any window beyond the limit times its length."""
    most, least = 0.0, None
    for at, moment in enumerate(sorted(times)):
        before = at - limit * moment
        least = before if least is None else min(least, before)
        most = max(most, before + 1 - least)
    return most


def write(mesh, entry):
    file, signer = f"{mesh.dir}/entry.json", f"{mesh.dir}/ops.operator"
    with open(file, "w") as out:
        json.dump(entry, out)
    words = ["config", "write", file, "-operator", signer, "-http-addr", f"{address(0)}:8500", "-token", TOKEN]
    subprocess.run([WEFT, *words], check=True, capture_output=True)


async def measure(lab, count):
    lab.grow(count)
    mesh = Mesh(lab, count, 0)
    server = await app()
    try:
        if (await mesh.start())["converged_after_last_start_s"] is None:
            raise RuntimeError("the agents do not find each other")
        signer = ["-ca", f"{mesh.dir}/ca", "-out", f"{mesh.dir}/ops.operator", "-may", "config,intentions"]
        subprocess.run([WEFT, "ca", "operator", "create", "-name", "ops", *signer], check=True, capture_output=True)
        limit = EACH * count
        rates = {"RequestsPerSecond": limit, "RequestsMaxBurst": limit, "Scope": "cluster"}
        write(mesh, {"Kind": "service-defaults", "Name": "web", "Protocol": "http", "RateLimits": {"InstanceLevel": rates}})
        allow = ["intention", "create", "caller", "web", "-operator", f"{mesh.dir}/ops.operator"]
        subprocess.run([WEFT, *allow, "-http-addr", f"{address(0)}:8500", "-token", TOKEN], check=True, capture_output=True)
        for at in range(count):
            web = {"Name": "web", "Address": ROUTER, "Port": APP, "Protocol": "http"}
            upstream = {"DestinationName": "web", "LocalBindAddress": address(at), "LocalBindPort": UPSTREAM}
            caller = {"Name": "caller", "Port": 1, "Connect": {"SidecarService": {"Proxy": {"Upstreams": [upstream]}}}}
            for body in (web, caller):
                status, _, said = await http(address(at), "PUT", "/v1/agent/service/register", json.dumps(body).encode())
                assert status == 200, said
        async def has_all(at):
            _, _, body = await http(address(at), "GET", "/v1/health/service/web?passing")
            return len(json.loads(body)) == count
        assert await mesh.all(mesh.live, has_all, 60), "not every agent knows every instance"
        async def answers(at):
            return await Callers(count).ask(at) in (200, 429)
        assert await mesh.all(mesh.live, answers, 30), "not every caller is answered"
        # What that took of the buckets comes back.
        await asyncio.sleep(3)
        callers, shares = Callers(count), []
        for seconds, rate in PHASES:
            begun = time.monotonic()
            await callers.run(seconds, rate * count)
            last = [moment for moment in callers.passed if begun + seconds - 5 <= moment < begun + seconds]
            if rate:
                shares.append(len(last) / 5 / limit)
        over = beyond(callers.passed, limit)
        heard = await mesh.metric(mesh.live, 'weft_gossip_demand_reports_total{way="sent"}')
        print(
            f"{count} agents, L = {limit}/s, B = {limit}: {callers.asked} asked, {len(callers.passed)} passed, {callers.limited} got 429,"
            f" others {callers.other}; beyond L t in any window {over:.0f}, bound B + N {limit + count};"
            f" in the last 5 s of each load {', '.join(f'{share:.2f}' for share in shares)} of L; {heard:.0f} reports sent",
            flush=True,
        )
        return over <= limit + count
    finally:
        server.close()
        mesh.stop()


async def main():
    counts = [int(one) for one in sys.argv[1:]] or [3, 20]
    assert all(2 <= count <= 40 for count in counts), "2 to 40 agents"
    lab = Lab()
    try:
        if not all([await measure(lab, count) for count in counts]):
            sys.exit("more passed than the bound allows")
    finally:
        lab.close()


asyncio.run(main())
