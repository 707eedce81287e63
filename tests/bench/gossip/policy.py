#!/usr/bin/env python3
"""From an operator's order to its enforcement on every agent. Started by policy.sh.

Each change is one signed intention, brought to a random agent. Every agent is watched by a blocking query on its intentions, which is
answered when its data plane has the new table; the time is from the order to each agent's answer. One process reads all answers: at
N=100 that adds some 30 ms to the last ones. p50 and p99 are of all agents and changes; all_median and all_p99 of the changes, each
counted when its last agent enforces it."""
import argparse, asyncio, contextlib, json, os, random, shutil, signal, statistics, subprocess, sys, tempfile, time

WEFT = os.environ["WEFT"]
# Agents that start together.
WAVE = 10
HZ = os.sysconf("SC_CLK_TCK")


def address(at):
    return f"127.0.{1 + at // 250}.{1 + at % 250}"


def cpu_seconds(pid):
    words = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / HZ


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


class Mesh:
    def __init__(self, count):
        self.count, self.procs = count, {}
        self.dir = tempfile.mkdtemp(prefix="weft-policy-")

    def spawn(self, at):
        base = f"{self.dir}/{at}"
        os.makedirs(base)
        argv = [WEFT, "agent", "-node", f"n{at}", "-data-dir", f"{base}/data", "-bind", address(at), "-client", address(at)]
        argv += ["-issuer", f"{self.dir}/ca/issuer-1"] if at == 0 else ["-join", address(0), "-token", self.token]
        log = open(f"{base}/log", "ab")
        self.procs[at] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def start(self):
        run = lambda *argv: subprocess.run([WEFT, *argv], check=True, capture_output=True, text=True).stdout
        run("ca", "init", "-dir", f"{self.dir}/ca", "-trust-domain", "bench.test")
        self.token = run("token", "create", "-ca", f"{self.dir}/ca", "-node", "n*", "-serve", "*", "-ttl", "2h").strip()
        self.spawn(0)
        await self.alive(0, 1)
        # In waves: joining costs handshakes and signatures, and a hundred agents that begin at once starve each other's probes.
        for begin in range(1, self.count, WAVE):
            end = min(begin + WAVE, self.count)
            for at in range(begin, end):
                self.spawn(at)
            for at in range(begin, end):
                await self.alive(at, end)
        for at in range(self.count):
            await self.alive(at, self.count)
        await self.quiet()

    async def quiet(self, limit=120):
        """Until no agent works much: what the start left behind is not the change's."""
        end = time.time() + limit
        while time.time() < end:
            used = sum(cpu_seconds(process.pid) for process in self.procs.values())
            begun = time.time()
            await asyncio.sleep(2)
            share = (sum(cpu_seconds(process.pid) for process in self.procs.values()) - used) / (time.time() - begun)
            if share < max(0.1, 0.006 * self.count):
                return
        print(f"the agents do not come to rest: {share:.2f} cores", file=sys.stderr)

    async def alive(self, at, count, limit=180):
        end = time.time() + limit
        while time.time() < end:
            with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError, IndexError):
                status, _, body = await http(address(at), "GET", "/v1/mesh/info", timeout=5)
                if status == 200 and json.loads(body)["Members"]["Alive"] >= count:
                    return
            await asyncio.sleep(0.2)
        raise SystemExit(f"n{at} does not see {count} members within {limit} s")


def signed(mesh, operator, version, action):
    """An intention's next version, signed ahead of the measurement."""
    out = f"{mesh.dir}/change-{version}"
    subprocess.run([WEFT, "intention", "create", f"-{action}", "web", "db", "-operator", operator, "-out", out,
                    "-document-version", str(version)], check=True, capture_output=True)
    return json.dumps(dict(Document=open(out).read().strip())).encode()


async def watch(at, done):
    """When this agent's table changes."""
    ip = address(at)
    _, headers, _ = await http(ip, "GET", "/v1/connect/intentions")
    query = f"/v1/connect/intentions?index={headers['x-consul-index']}&wait=30s"
    done["ready"] += 1
    await http(ip, "GET", query)
    return time.time()


async def change(mesh, document):
    done = dict(ready=0)
    tasks = [asyncio.create_task(watch(at, done)) for at in range(mesh.count)]
    while done["ready"] < mesh.count:
        await asyncio.sleep(0.01)
    # The last question must have reached its agent.
    await asyncio.sleep(0.2)
    begun = time.time()
    status, _, body = await http(address(random.randrange(mesh.count)), "PUT", "/v1/mesh/document", document)
    if status != 200:
        raise SystemExit(f"refused: {status} {body}")
    answered = time.time() - begun
    return [at - begun for at in await asyncio.gather(*tasks)], answered, json.loads(body)["Confirmed"]


async def measure(count, changes):
    mesh = Mesh(count)
    try:
        await mesh.start()
        operator = f"{mesh.dir}/bench.operator"
        subprocess.run([WEFT, "ca", "operator", "create", "-name", "bench", "-may", "intentions", "-ca", f"{mesh.dir}/ca",
                        "-out", operator], check=True, capture_output=True)
        documents = [signed(mesh, operator, version, ("deny", "allow")[version % 2]) for version in range(1, changes + 1)]
        every, last, answers, confirmed = [], [], [], []
        for document in documents:
            times, answered, count_confirmed = await change(mesh, document)
            every += times
            last.append(max(times))
            answers.append(answered)
            confirmed.append(count_confirmed)
    finally:
        for process in mesh.procs.values():
            process.kill()
        for process in mesh.procs.values():
            process.wait()
        shutil.rmtree(mesh.dir, ignore_errors=True)
    every.sort()
    p99 = every[min(len(every) - 1, int(len(every) * 0.99))]
    last.sort()
    all_p99 = last[min(len(last) - 1, int(len(last) * 0.99))]
    return dict(n=count, changes=changes, p50=round(statistics.median(every), 3), p99=round(p99, 3), max=round(every[-1], 3),
                all_median=round(statistics.median(last), 3), all_p99=round(all_p99, 3),
                order_answered_median=round(statistics.median(answers), 3),
                confirmed_least=min(confirmed))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=int, nargs="*")
    parser.add_argument("--changes", type=int, default=20)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for count in args.sizes or [3, 20, 100]:
        print(json.dumps(asyncio.run(measure(count, args.changes))), flush=True)


if __name__ == "__main__":
    main()
