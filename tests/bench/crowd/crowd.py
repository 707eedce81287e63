"""Opens idle, slow and flooding connections to an agent on 127.0.0.1:8500, then has many read a long list slowly, and measures what
others wait for an answer and what the agent holds.

Usage: crowd.py PID IDLE; the flooding clients are a second process (crowd.py flood), so that it is the agent that is measured and not
Python, whose threads take turns.
"""

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time

ADDRESS = ("127.0.0.1", 8500)
SLOW, FLOODERS, ASKED = 200, 4, 300
# Readers of a list, and the checks in it, each with as much output as is kept.
READERS, CHECKS, OUTPUT_BYTES = 500, 1000, 4096
ASK = b"GET /v1/catalog/services HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
pid, idle = (0, 0) if sys.argv[1] == "flood" else (int(sys.argv[1]), int(sys.argv[2]))
stop = threading.Event()


def connect():
    return socket.create_connection(ADDRESS, timeout=10)


def ask():
    begun = time.monotonic()
    with connect() as stream:
        stream.sendall(ASK)
        answer = b""
        while piece := stream.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:100]
    return time.monotonic() - begun


def measure(what):
    times, lost = [], 0
    for _ in range(ASKED):
        try:
            times.append(ask())
        except OSError:
            lost += 1
            if lost == 3:
                break
    times.sort()
    kib = int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{pid}/status").read())[1])
    shown = "nobody is answered"
    if times:
        p50, p99 = (1e3 * times[min(int(len(times) * q), len(times) - 1)] for q in (0.5, 0.99))
        shown = f"p50 {p50:.2f} ms, p99 {p99:.2f} ms"
    print(f"{what:34} {shown}, {lost} without an answer; the agent holds {kib / 1024:.0f} MiB", flush=True)


def drip(streams):
    """A byte of a head now and then: never whole."""
    while not stop.wait(0.5):
        for stream in streams:
            try:
                stream.send(b"x")
            except OSError:
                pass


def flood():
    """Headers without an end, again and again."""
    line = b"X-Flood: " + b"y" * 8000 + b"\r\n"
    while not stop.is_set():
        try:
            with connect() as stream:
                stream.sendall(b"GET / HTTP/1.1\r\n")
                for _ in range(1000):
                    stream.sendall(line)
        except OSError:
            pass


def fill():
    """Registers checks with long outputs: what /v1/agent/checks lists."""
    agent = http.client.HTTPConnection(*ADDRESS)
    for number in range(CHECKS):
        for path, body in [
            ("register", {"CheckID": f"c{number}", "Name": "check", "TTL": "1h"}),
            (f"update/c{number}", {"Status": "passing", "Output": "x" * OUTPUT_BYTES}),
        ]:
            agent.request("PUT", f"/v1/agent/check/{path}", json.dumps(body))
            answer = agent.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()


def read_slowly():
    """Asks for the list and takes no more than the beginning of it; returns the connection and the status."""
    stream = socket.socket()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stream.settimeout(60)
    stream.connect(ADDRESS)
    stream.sendall(b"GET /v1/agent/checks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    return stream, stream.recv(12).decode()[9:]


if sys.argv[1] == "flood":
    for _ in range(FLOODERS):
        threading.Thread(target=flood, daemon=True).start()
    sys.stdin.read()
    sys.exit()
for _ in range(100):
    try:
        ask()
        break
    except OSError:
        time.sleep(0.1)
measure("alone")
held = []
try:
    for _ in range(idle):
        held.append(connect())
except OSError as error:
    print(f"only {len(held)} idle connections: {error}")
measure(f"{len(held)} idle")
slow = []
for _ in range(SLOW):
    try:
        slow.append(connect())
        slow[-1].sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
    except OSError:
        pass
dripping = threading.Thread(target=drip, args=(slow,))
dripping.start()
measure(f"and {len(slow)} that send a head by bytes")
flooding = subprocess.Popen([sys.executable, __file__, "flood"], stdin=subprocess.PIPE)
time.sleep(0.5)
measure(f"and {FLOODERS} that send heads without end")
flooding.stdin.close()
flooding.wait()
stop.set()
dripping.join()
for stream in held + slow:
    stream.close()
fill()
measure(f"alone, with {CHECKS} checks")
readers, statuses, gone = [], {}, 0
for _ in range(READERS):
    try:
        stream, status = read_slowly()
        readers.append(stream)
        statuses[status] = statuses.get(status, 0) + 1
    except OSError:
        gone += 1
told = ", ".join(f"{count} got {status}" for status, count in sorted(statuses.items()))
measure(f"{len(readers)} that read nothing of a list")
print(f"  of these {told}" + (f", {gone} were not answered" if gone else ""))
