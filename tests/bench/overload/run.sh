#!/usr/bin/env bash
# Goodput of a service that gets three times what it bears, open loop, with and without adaptive concurrency.
#
#   tests/bench/overload/run.sh [seconds per run, default 15]
#
# Needs root, iproute2 and python3. The app serves 20 requests at once, 100 ms each, whatever the processor does: 200 a second.
# Its queue has no end, and it answers also those who have left. Callers wait for a second. Agent, app and callers are in a network
# namespace of their own; nothing outside is touched, and it ends by itself after six runs. WEFT names the binary (default
# target/release/weft). "good" are answers with 200 within that second; RSS is the agent's at the end of the run, and at its most.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
weft=${WEFT:-$here/../../../target/release/weft}
seconds=${1:-15}
[ -x "$weft" ] || { echo "no binary at $weft: cargo build --release --bin weft" >&2; exit 1; }
ulimit -n "$(ulimit -Hn)"
netns=weft-overload-$$
dir=$(mktemp -d)
agent= app=
cleanup() {
  for pid in $agent $app; do { kill "$pid" && wait "$pid"; } 2>/dev/null || true; done
  ip netns del "$netns"
  rm -rf "$dir"
}
ip netns add "$netns"
trap cleanup EXIT
ip -n "$netns" link set lo up
ip netns exec "$netns" python3 "$here/overload.py" app &
app=$!
ip netns exec "$netns" "$weft" agent -dev -node n1 -log-level warn >"$dir/log" 2>&1 &
agent=$!
ip netns exec "$netns" python3 "$here/overload.py" "$agent" "$seconds" || { cat "$dir/log" >&2; exit 1; }
