#!/usr/bin/env python3
"""Revocation and renewal in a mesh of N agents on the loopback device of this network namespace. Started by run.sh.

Revocation: one agent serves an echo app; every other holds a TCP stream to it through the mesh and sends a byte whenever
one comes back. The time is from the start of `weft revoke` (a process of its own) until a stream carries nothing any more;
the figure is the last stream's. Renewal: `weft ca rotate` brings every node to renew its certificate, spread over 15 s on
purpose; the time is from the command until every node publishes under a new certificate, as one agent sees it."""
import argparse, asyncio, contextlib, json, os, shutil, statistics, subprocess, sys, tempfile, time

WEFT = os.environ["WEFT"]
APP = ("127.0.0.1", 7000)
UPSTREAM = 9292


def address(at):
    return f"127.0.{1 + at // 200}.{1 + at % 200}"


async def http(ip, method, path, body=b""):
    async def exchange():
        reader, writer = await asyncio.open_connection(ip, 8500)
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\nhost: {ip}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            raw = await reader.read()
        finally:
            writer.close()
        head, _, rest = raw.partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), rest
    return await asyncio.wait_for(exchange(), 20)


async def until(what, test, limit=120):
    end = time.time() + limit
    while time.time() < end:
        with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError, IndexError, KeyError):
            if await test():
                return time.time()
        await asyncio.sleep(0.1)
    raise SystemExit(f"after {limit} s still not: {what}")


class Mesh:
    def __init__(self, count):
        self.count, self.dir, self.procs = count, tempfile.mkdtemp(prefix="weft-identity-"), {}

    def run(self, *argv):
        return subprocess.run([WEFT, *argv], check=True, capture_output=True, text=True).stdout

    def spawn(self, at):
        base = f"{self.dir}/{at}"
        os.makedirs(base, exist_ok=True)
        argv = [WEFT, "agent", "-node", f"n{at}", "-data-dir", f"{base}/data", "-bind", address(at), "-client", address(at), "-workers", "1", "-default-intention-policy=allow"]
        argv += ["-issuer", f"{self.dir}/ca/issuer-1"] if at == 0 else ["-join", address(0), "-token", self.token]
        log = open(f"{base}/log", "ab")
        self.procs[at] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def alive(self, at):
        _, body = await http(address(at), "GET", "/v1/mesh/info")
        return json.loads(body)["Members"]["Alive"]

    async def start(self):
        self.run("ca", "init", "-dir", f"{self.dir}/ca", "-trust-domain", "bench.test")
        out = self.run("token", "create", "-ca", f"{self.dir}/ca", "-node", "n*", "-serve", "*", "-ttl", "2h")
        self.token = next(word for word in out.split() if word.startswith("weft1-"))
        self.spawn(0)
        await until("the first agent answers", lambda: self.alive(0))
        for at in range(1, self.count):
            self.spawn(at)
            await asyncio.sleep(0.02)
        async def all_there():
            return await self.alive(0) >= self.count
        await until("all are members", all_there, 180)

    async def put(self, at, body):
        status, answer = await http(address(at), "PUT", "/v1/agent/service/register", json.dumps(body).encode())
        if status != 200:
            raise SystemExit(f"register at n{at}: {answer.decode()}")

    async def stream(self, at):
        """Opens a stream and sees it echo; the task of the result ends, with the time, when nothing comes any more."""
        opened = []
        async def greets():
            reader, writer = await asyncio.open_connection(address(at), UPSTREAM)
            writer.write(b"x")
            if await asyncio.wait_for(reader.read(1), 5):
                opened.append((reader, writer))
                return True
            writer.close()
        await until(f"a stream of n{at}", greets)
        reader, writer = opened[0]
        async def carry():
            last = time.time()
            with contextlib.suppress(OSError):
                while True:
                    writer.write(b"x")
                    if not await reader.read(1):
                        break
                    last = time.time()
                    await asyncio.sleep(0.02)
            with contextlib.suppress(OSError):
                writer.close()
            return last, time.time()
        return asyncio.create_task(carry())

    async def certificates(self, at):
        _, body = await http(address(at), "GET", "/v1/mesh/certificates")
        return {shown["Node"]: (shown["Intermediate"]["Key"], shown.get("Root")) for shown in json.loads(body)}

    def stop(self):
        for proc in self.procs.values():
            with contextlib.suppress(OSError):
                proc.kill()
            proc.wait()
        shutil.rmtree(self.dir, ignore_errors=True)


async def command(*argv):
    """Runs a verb; when it began and ended, and what it printed."""
    begun = time.time()
    proc = await asyncio.create_subprocess_exec(WEFT, *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = await proc.communicate()
    if proc.returncode:
        raise SystemExit(f"weft {' '.join(argv)}: {err.decode()}")
    return begun, time.time(), out.decode()


async def measure(count):
    mesh = Mesh(count)
    async def echo(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1024):
                writer.write(data)
            writer.close()
    app = await asyncio.start_server(echo, *APP)
    try:
        await mesh.start()
        victim = count - 1
        await mesh.put(victim, dict(Name="raw", Port=APP[1]))
        others = [at for at in range(count) if at != victim]
        for at in others:
            upstream = dict(DestinationName="raw", LocalBindPort=UPSTREAM, LocalBindAddress=address(at))
            await mesh.put(at, dict(Name=f"caller-{at}", Port=1, Connect=dict(SidecarService=dict(Proxy=dict(Upstreams=[upstream])))))
        # Renewal of all, under streams that must live through it.
        streams = [await mesh.stream(at) for at in others]
        before = await mesh.certificates(0)
        begun, returned, _ = await command("ca", "rotate", "-ca", f"{mesh.dir}/ca", "-http-addr", f"{address(0)}:8500")
        async def renewed():
            shown = await mesh.certificates(0)
            roots = {root for _, root in shown.values()}
            return len(shown) == count and len(roots) == 1 and roots.isdisjoint(root for _, root in before.values())
        renewal = await until("all have renewed", renewed) - begun
        lost = sum(1 for stream in streams if stream.done())
        # Revocation.
        argv = ["revoke", f"n{victim}", "-ca", f"{mesh.dir}/ca", "-http-addr", f"{address(0)}:8500"]
        begun, returned, said = await command(*argv)
        ended = await asyncio.wait_for(asyncio.gather(*streams), 60)
        last_bytes = [last - begun for last, _ in ended]
        closed = [closed - begun for _, closed in ended]
        return dict(n=count, renewal_s=renewal, streams_lost_by_renewal=lost, last_byte_s=max(last_bytes), last_closed_s=max(closed),
                    median_closed_s=statistics.median(closed), command_s=returned - begun, said=said.split(". ")[0])
    finally:
        mesh.stop()
        app.close()


ROWS = [
    ("revoke: last byte of the last stream, s", "last_byte_s"),
    ("revoke: last stream closed, s", "last_closed_s"),
    ("revoke: half of the streams closed, s", "median_closed_s"),
    ("revoke: all others have confirmed, s", "command_s"),
    ("rotate: all nodes under new certificates, s", "renewal_s"),
    ("rotate: streams cut by it", "streams_lost_by_renewal"),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=int, nargs="*", default=[3, 20, 100])
    parser.add_argument("-o", "--out")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    results = []
    for count in args.sizes or [3, 20, 100]:
        runs = []
        for _ in range(args.repeats):
            runs.append(asyncio.run(measure(count)))
            print(json.dumps(runs[-1]), file=sys.stderr)
        results.append(runs)
    head = ["median (max)"] + [f"{runs[0]['n']} agents" for runs in results]
    rows = [head]
    for name, key in ROWS:
        cells = [f"{statistics.median(run[key] for run in runs):.2f} ({max(run[key] for run in runs):.2f})" for runs in results]
        rows.append([name] + cells)
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


main()
