#!/usr/bin/env bash
# The HTTP API among idle, slow and flooding clients, and those who read nothing of a long list: how long others wait for an answer, and what the agent holds.
#
#   tests/bench/crowd/run.sh [idle connections, default 10000]
#
# Needs root, iproute2 and python3. Agent and clients are in a network namespace of their own; nothing outside is touched, and it
# ends by itself after about a minute. WEFT names the binary (default target/release/weft).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
weft=${WEFT:-$here/../../../target/release/weft}
idle=${1:-10000}
[ -x "$weft" ] || { echo "no binary at $weft: cargo build --release --bin weft" >&2; exit 1; }
ulimit -n "$(ulimit -Hn)"
netns=weft-crowd-$$
dir=$(mktemp -d)
agent=
cleanup() {
  [ -z "$agent" ] || { kill "$agent" && wait "$agent"; } 2>/dev/null || true
  ip netns del "$netns"
  rm -rf "$dir"
}
ip netns add "$netns"
trap cleanup EXIT
ip -n "$netns" link set lo up
# What nobody reads is to wait in the agent, not in the kernel.
ip netns exec "$netns" sysctl -qw net.ipv4.tcp_wmem="4096 16384 65536"
ip netns exec "$netns" "$weft" agent -dev -node n1 -log-level warn >"$dir/log" 2>&1 &
agent=$!
ip netns exec "$netns" python3 "$here/crowd.py" "$agent" "$idle"
