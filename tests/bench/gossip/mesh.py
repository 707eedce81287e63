"""A mesh of weft's agents, one per host of the lab, and what is asked of them."""
import asyncio, contextlib, json, os, random, secrets, shutil, subprocess, tempfile, time

from lab import address

WEFT = os.environ["WEFT"]
PATIENCE = 90
# Seconds between two starts: all agents share this host's processors, and a start costs a handshake with everybody near.
PACE = float(os.environ.get("PACE", "0.01"))
# The API is asked from the router's namespace, and an API that is not on loopback wants a token.
TOKEN = secrets.token_hex(16)


async def http(ip, method, path, body=b"", timeout=60):
    """One request on a connection of its own: (status, headers, body)."""
    async def exchange():
        reader, writer = await asyncio.open_connection(ip, 8500)
        try:
            head = f"{method} {path} HTTP/1.1\r\nhost: {ip}\r\nconnection: close\r\nx-consul-token: {TOKEN}\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            raw = await reader.read()
        finally:
            writer.close()
        head, _, rest = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        return int(lines[0].split(" ")[1]), headers, rest
    return await asyncio.wait_for(exchange(), timeout)


class Mesh:
    def __init__(self, lab, count, instances):
        self.lab, self.count, self.instances = lab, count, instances
        self.dir = tempfile.mkdtemp(prefix="weft-gossip-")
        self.procs, self.live, self.turns = {}, set(), []

    def spawn(self, at, host=None):
        """Starts the agent `at` on its own host or another, with what it has on disk."""
        host = at if host is None else host
        base, ip = f"{self.dir}/{at}", address(host)
        os.makedirs(base, exist_ok=True)
        argv = [WEFT, "agent", "-node", f"n{at}", "-data-dir", f"{base}/data", "-bind", ip, "-client", ip]
        argv += ["-admin-token-file", f"{self.dir}/token"]
        argv += ["-issuer", f"{self.dir}/ca/issuer-1"] if at == 0 else ["-join", address(0), "-token", self.token]
        if self.instances:
            share = self.instances // self.count
            services = [dict(id=f"s{at}-{k}", name=f"service-{k}", port=8000 + k % 1000, tags=["v1"]) for k in range(share)]
            with open(f"{base}/services.json", "w") as file:
                json.dump(dict(services=services), file)
            argv += ["-config-file", f"{base}/services.json"]
        with open(f"{base}/log", "ab") as log:
            self.procs[at] = subprocess.Popen(self.lab.of(host, *argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if host == at:
            self.live.add(at)

    async def start(self):
        run = lambda *argv: subprocess.run([WEFT, *argv], check=True, capture_output=True, text=True).stdout
        run("ca", "init", "-dir", f"{self.dir}/ca", "-trust-domain", "bench.test")
        out = run("token", "create", "-ca", f"{self.dir}/ca", "-node", "n*", "-serve", "*", "-ttl", "2h")
        self.token = next(line for line in out.split() if line.startswith("weft1-"))
        with open(f"{self.dir}/token", "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(TOKEN)
        begun = time.time()
        self.spawn(0)
        if await self.all({0}, self.is_up, 30) is None:
            raise RuntimeError("the first agent does not start: " + open(f"{self.dir}/0/log").read()[-500:])
        for at in range(1, self.count):
            self.spawn(at)
            await asyncio.sleep(PACE)
        started = time.time()
        end = await self.all(self.live, self.sees_all, 180)
        whole = None
        if end and self.instances:
            last = self.instances // self.count - 1
            async def has_last(at):
                _, _, body = await http(address(at), "GET", f"/v1/health/service/service-{last}?passing")
                return len(json.loads(body)) == self.count
            whole = await self.all(self.live, has_last, 60)
        return dict(
            spawn_s=round(started - begun, 2),
            converged_after_last_start_s=end and round(end - started, 2),
            catalogue_whole_s=whole and round(whole - started, 2),
        )

    async def sees_all(self, at):
        info = await self.info(at)
        return info and info["Members"]["Alive"] >= self.count

    async def back(self, at, service=None):
        """Starts an agent again that has ended; waits until all see all, and takes away what it was measured by."""
        self.procs[at].wait()
        self.spawn(at)
        if await self.all(self.live, self.sees_all, 60) is None:
            raise RuntimeError(f"n{at} does not come back: " + open(f"{self.dir}/{at}/log").read()[-500:])
        if service:
            await http(address(at), "PUT", f"/v1/agent/service/deregister/{service}")

    async def until_equal(self, limit):
        """When all see all and hold the same records, by their own hash of them; None: not within `limit` seconds."""
        end = time.time() + limit
        while time.time() < end:
            infos = await asyncio.gather(*(self.info(at) for at in self.live))
            if all(info and info["Members"]["Alive"] >= self.count for info in infos):
                if len({info["RecordsHash"] for info in infos}) == 1:
                    return time.time()
            await asyncio.sleep(0.05)
        return None

    async def shows_at(self, at, name, ip):
        _, _, body = await http(address(at), "GET", "/v1/agent/members")
        return any((m["Name"], m["Status"], m["Addr"]) == (name, 1, ip) for m in json.loads(body))

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
        return dict(first=round(min(times), 3) if times else None, all=None if missed else round(max(times), 3), missed=missed)

    async def register(self, at, service):
        body = json.dumps(dict(Name=service, ID=service, Port=9000)).encode()
        return await self.until_all(service, 1, lambda: http(address(at), "PUT", "/v1/agent/service/register", body))

    def victim(self):
        """Each in turn, in random order: who comes back again and again within a minute is shown late (flap damping)."""
        if not self.turns:
            self.turns = random.sample(sorted(self.live - {0}), len(self.live) - 1)
        return self.turns.pop()

    async def ends(self, service, at, order):
        self.live.discard(at)
        return await self.until_all(service, 0, order)

    def failures_logged(self, counts):
        """How often one agent said of another that it failed, where `counts(agent, other)`."""
        found = 0
        for at in self.procs:
            with open(f"{self.dir}/{at}/log", errors="replace") as log:
                named = [line.split("member=n", 1)[1].split()[0] for line in log if "member failed" in line and "member=n" in line]
                found += sum(1 for name in named if counts(at, int(name)))
        return found

    async def metric(self, who, start):
        total = 0.0
        for at in who:
            _, _, body = await http(address(at), "GET", "/v1/agent/metrics?format=prometheus")
            total += sum(float(line.split()[-1]) for line in body.decode().splitlines() if line.startswith(start))
        return total

    def signal(self, at, number):
        self.procs[at].send_signal(number)

    def stop(self):
        for proc in self.procs.values():
            with contextlib.suppress(OSError):
                proc.kill()
        for proc in self.procs.values():
            proc.wait()
        shutil.rmtree(self.dir, ignore_errors=True)
