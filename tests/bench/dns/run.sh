#!/usr/bin/env bash
# DNS of one agent that has one core: queries a second, and latency at a steady rate.
#
#   tests/bench/dns/run.sh [seconds per run, default 10]
#
# Needs root, two cores, iproute2, curl, python3 and dnsperf (Debian); with tcpdump it tells what the server alone takes. The agent is
# pinned to core 1 and dnsperf to core 0, both in a network namespace of their own; nothing outside is touched. WEFT names the binary
# (default target/release/weft), RATES the steady rates (default 5000 20000 50000, and half of the maximum). Per core: queries by the seconds of processor time that the agent took for
# them. At last a program of twenty lines of C that only says the query back stands in weft's place: its latencies are the machine's and dnsperf's
# (ECHO names a binary of echo.c; without it the script compiles one).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
weft=${WEFT:-$here/../../../target/release/weft}
seconds=${1:-10}
rates=${RATES:-5000 20000 50000}
[ -x "$weft" ] || { echo "no binary at $weft: cargo build --release --bin weft" >&2; exit 1; }
command -v dnsperf >/dev/null || { echo "dnsperf is not installed (Debian: dnsperf)" >&2; exit 1; }
netns=weft-dns-bench-$$
dir=$(mktemp -d -p /dev/shm)
agent= watcher=
cleanup() {
  for each in $agent $watcher; do { kill "$each" && wait "$each"; } 2>/dev/null || true; done
  ip netns del "$netns"
  rm -rf "$dir"
}
ip netns add "$netns"
trap cleanup EXIT
ip -n "$netns" link set lo up
inside() { ip netns exec "$netns" "$@"; }

ip netns exec "$netns" taskset -c 1 "$weft" agent -dev -node n1 -log-level warn >"$dir/log" 2>&1 &
agent=$!
for _ in $(seq 100); do
  inside curl -sf http://127.0.0.1:8500/v1/agent/self >/dev/null && break
  sleep 0.1
done
# 100 services with three instances each, on addresses of their own.
for service in $(seq 100); do
  for instance in 1 2 3; do
    printf 'url = "http://127.0.0.1:8500/v1/agent/service/register"\nrequest = "PUT"\nsilent\noutput = "/dev/null"\ndata = "{\\"ID\\":\\"s%s-%s\\",\\"Name\\":\\"s%s\\",\\"Tags\\":[\\"v%s\\"],\\"Address\\":\\"10.9.%s.%s\\",\\"Port\\":80}"\nnext\n' \
      "$service" "$instance" "$service" "$instance" "$service" "$instance"
  done
done | sed '$d' >"$dir/register"
inside curl --config "$dir/register"
sleep 1
for service in $(seq 100); do
  echo "s$service.service.consul A" >>"$dir/a"
  echo "_s$service._tcp.service.weft SRV" >>"$dir/srv"
  echo "none$service.service.weft A" >>"$dir/none"
done
paste -d '\n' "$dir/a" "$dir/a" "$dir/a" "$dir/srv" "$dir/none" >"$dir/mix"

cpu_ticks() { awk '{ print $14 + $15 }' "/proc/$agent/stat"; }
hertz=$(getconf CLK_TCK)
printf '%-34s %12s %14s %10s\n' "as fast as it goes" "queries/s" "per core" "lost"
for kind in a srv none mix; do
  before=$(cpu_ticks)
  inside taskset -c 0 dnsperf -s 127.0.0.1 -p 8600 -d "$dir/$kind" -l "$seconds" -c 8 -q 200 -T 1 >"$dir/out" 2>/dev/null
  after=$(cpu_ticks)
  awk -v name="$kind" -v ticks="$((after - before))" -v hertz="$hertz" '
    /Queries completed/ { done = $3 } /Queries lost/ { lost = $3 } /Queries per second/ { qps = $4 }
    END { printf "%-34s %12.0f %14.0f %10d\n", name, qps, done * hertz / ticks, lost }' "$dir/out"
done
maximum=$(awk '/Queries per second/ { printf "%d", $4 }' "$dir/out")

# Latencies of a run at a steady rate: as dnsperf sees them, its own wake-ups among them, and between query and answer where they pass
# lo, which is what the server and its waking take. dnsperf and tcpdump write to memory: a reader beside them would take the cores' time.
steady() {
  if command -v tcpdump >/dev/null; then
    : >"$dir/watcher"
    ip netns exec "$netns" taskset -c 0 tcpdump -i lo -n -s 80 -B 65536 -Z root -w "$dir/passed" udp port "$2" 2>"$dir/watcher" &
    watcher=$!
    for _ in $(seq 50); do
      grep -q "listening on" "$dir/watcher" && break
      sleep 0.1
    done
  fi
  inside taskset -c 0 dnsperf -v -s 127.0.0.1 -p "$2" -d "$dir/mix" -l "$seconds" -c 8 -Q "$3" -T 1 2>/dev/null >"$dir/out"
  if [ -n "$watcher" ]; then
    sleep 0.5
    kill "$watcher" && wait "$watcher" || true
  fi
  python3 - "$1 at $3/s" "$dir/out" "$2" "${watcher:+$dir/passed}" "$dir/watcher" <<'PYTHON'
import re, struct, sys
label, printed, port, passed, said = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
at = lambda times, part: times[min(len(times) - 1, int(len(times) * part))]
seen = sorted(float(line.split()[-1]) * 1000 for line in open(printed) if line.startswith("> "))
line = "%-34s %12d %10.3f %10.3f %10.3f" % (label, len(seen), at(seen, .5), at(seen, .99), at(seen, .999))
if passed:
    raw = open(passed, "rb").read()
    order = "<" if raw[:4] in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
    unit = 1e-6 if raw[:4] in (b"\x4d\x3c\xb2\xa1", b"\xa1\xb2\x3c\x4d") else 1e-3
    asked, times, place = {}, [], 24
    while place + 16 <= len(raw):
        seconds, part, kept = struct.unpack_from(order + "III", raw, place)
        frame, place = place + 16, place + 16 + kept
        ip = frame + 14  # lo has the heads of Ethernet
        udp = ip + (raw[ip] & 15) * 4
        source, target, _, _, number = struct.unpack_from(">HHHHH", raw, udp)
        now = (seconds, part)
        if target == port:
            asked[source, number] = now
        elif (target, number) in asked:
            then = asked.pop((target, number))
            times.append((now[0] - then[0]) * 1000 + (now[1] - then[1]) * unit)
    times.sort()
    dropped = re.search(r"(\d+) packets dropped by kernel", open(said).read())
    line += " %12d %10.3f %10.3f %10s" % (len(times), at(times, .5), at(times, .99), dropped[1] if dropped else "?")
print(line)
PYTHON
  watcher=
}
command -v tcpdump >/dev/null || echo "tcpdump is not installed (Debian: tcpdump): what the server alone takes is not shown" >&2
printf '%-34s %12s %10s %10s %10s %12s %10s %10s %10s\n' "steady, mixed" "queries" "p50 ms" "p99 ms" "p99.9 ms" "passed lo" "p50 ms" "p99 ms" "uncaught"
for each in $rates $((maximum / 2)); do steady weft 8600 "$each"; done
kill "$agent" && wait "$agent" || true
agent=
echo=${ECHO:-$dir/echo}
if [ -x "$echo" ] || cc -O2 -o "$echo" "$here/echo.c"; then
  ip netns exec "$netns" taskset -c 1 "$echo" 8601 &
  agent=$!
  sleep 0.2
  for each in $rates; do steady "echo in weft's place" 8601 "$each"; done
else
  echo "no C compiler: what the machine takes for itself is not measured" >&2
fi
