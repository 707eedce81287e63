"""An app of known capacity, and callers that come at their own times: see run.sh.

Usage: overload.py app | overload.py AGENT_PID SECONDS
"""

import asyncio
import http.client
import json
import random
import re
import sys
import time

SLOTS, TAKES = 20, 0.1
CAPACITY = SLOTS / TAKES
PATIENCE = 1.0
APP, UPSTREAM, API = 7001, 9393, 8500
PRIORITIES = ["high"] * 2 + ["normal"] * 5 + ["low"] * 3
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def app():
    slots = asyncio.Semaphore(SLOTS)

    async def serve(reader, writer):
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                async with slots:
                    await asyncio.sleep(TAKES)
                writer.write(ANSWER)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", APP, backlog=8192)
    await server.serve_forever()


def call(method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", API, timeout=10)
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        raise RuntimeError(f"{method} {path}: {answer.status} {text}")
    return text


def until(what, done):
    for _ in range(200):
        try:
            if done():
                return
        except (OSError, RuntimeError):
            pass
        time.sleep(0.1)
    sys.exit(f"not within 20 s: {what}")


def rss_mib(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read()).group(1)) / 1024


class Callers:
    """Sends requests at the times of a Poisson process; a connection that is free is used again. What ends after the first third
    of the run and before its end counts."""

    def __init__(self, pid, rate, seconds):
        self.pid, self.rate, self.seconds = pid, rate, seconds
        self.free, self.took, self.refused, self.lost, self.most = [], [], [], 0, 0.0
        self.good, self.sent = {}, {}

    def counts(self, moment):
        return self.start + self.seconds / 3 <= moment < self.start + self.seconds

    async def ask(self, priority):
        begun = time.monotonic()
        pair = None
        try:
            async with asyncio.timeout(PATIENCE):
                pair = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", UPSTREAM)
                reader, writer = pair
                writer.write(f"GET / HTTP/1.1\r\nHost: web\r\nx-weft-priority: {priority}\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head).group(1)))
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            if pair:
                pair[1].transport.abort()
            self.lost += self.counts(time.monotonic())
            return
        self.free.append(pair)
        if not self.counts(time.monotonic()):
            return
        took = time.monotonic() - begun
        if head.startswith(b"HTTP/1.1 200"):
            self.took.append(took)
            self.good[priority] = self.good.get(priority, 0) + 1
        else:
            self.refused.append(took)

    async def run(self):
        self.start = time.monotonic()
        due, tasks, draw = self.start, set(), random.Random(7)
        while due < self.start + self.seconds:
            await asyncio.sleep(max(0, due - time.monotonic()))
            priority = draw.choice(PRIORITIES)
            if self.counts(due):
                self.sent[priority] = self.sent.get(priority, 0) + 1
            task = asyncio.create_task(self.ask(priority))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if draw.random() < 0.01:
                self.most = max(self.most, rss_mib(self.pid))
            due += draw.expovariate(self.rate)
        await asyncio.gather(*tasks)
        for _, writer in self.free:
            writer.close()
        return len(self.took) / (self.seconds * 2 / 3)


def percentile(times, part):
    return sorted(times)[int((len(times) - 1) * part)] * 1000 if times else float("nan")


def main(pid, seconds):
    until("the agent answers", lambda: call("GET", "/v1/agent/self"))
    call("PUT", "/v1/agent/service/register", {"Name": "web", "Port": APP, "Protocol": "http"})
    proxy = {"Upstreams": [{"DestinationName": "web", "LocalBindPort": UPSTREAM}]}
    call("PUT", "/v1/agent/service/register", {"Name": "caller", "Port": 1, "Connect": {"SidecarService": {"Proxy": proxy}}})
    until("the app is found", lambda: json.loads(call("GET", "/v1/health/service/web?passing")))
    print(f"the app bears {CAPACITY:.0f} requests a second; callers wait for {PATIENCE:.0f} s")
    print(f"{'':32} {'good/s':>7} {'of cap.':>8} {'p50 ms':>7} {'p99 ms':>7} {'refused':>8} {'p99 ms':>7} {'lost':>6} {'RSS MiB':>8} {'most':>6}  good of high, normal, low")
    settings = [
        ("no limit", {"MaxConcurrentRequests": 1000000, "MaxPendingRequests": 1000000}),
        ("default (1,024 under way)", {}),
        ("AdaptiveConcurrency", {"AdaptiveConcurrency": True, "PriorityMax": "high"}),
    ]
    for name, limits in settings:
        call("PUT", "/v1/config", {"Kind": "service-defaults", "Name": "caller", "UpstreamConfig": {"Defaults": {"Limits": limits}}})
        at_once = {}
        for load in (1, 3):
            callers = Callers(pid, CAPACITY * load, seconds)
            goodput = asyncio.run(callers.run())
            at_once[load] = goodput
            shares = ", ".join(f"{callers.good.get(one, 0) / callers.sent[one]:.0%}" for one in ("high", "normal", "low"))
            print(
                f"{name + f', {load}x':32} {goodput:7.1f} {goodput / CAPACITY:8.1%} {percentile(callers.took, 0.5):7.0f} "
                f"{percentile(callers.took, 0.99):7.0f} {len(callers.refused):8} {percentile(callers.refused, 0.99):7.1f} "
                f"{callers.lost:6} {rss_mib(pid):8.1f} {callers.most:6.1f}  {shares}",
                flush=True,
            )
            # What the app still has in its queue is no part of the next run: it serves those who left too.
            backlog = max(0, CAPACITY * (load - 1) * seconds) if name != "AdaptiveConcurrency" else 0
            time.sleep(min(60, 3 + backlog / CAPACITY))
        print(f"{name + ', 3x to 1x':32} {at_once[3] / max(at_once[1], 0.001):7.2f}", flush=True)


if sys.argv[1] == "app":
    asyncio.run(app())
else:
    main(int(sys.argv[1]), float(sys.argv[2]))
