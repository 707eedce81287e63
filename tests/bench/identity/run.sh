#!/usr/bin/env bash
# What identity costs and how fast it acts: one table.
#
#   tests/bench/identity/run.sh [-o FILE.json] [--repeats 3] [N ...]     default: 3 20 100
#
# First the micro-benchmarks (`cargo bench`: handshakes, verification, minting; SKIP_MICRO=1 leaves them out), then N real
# agents in a network namespace of their own (needs root and python3). WEFT names their binary (default
# target/release/weft). The agents have addresses 127.0.x.y of the namespace's own loopback device; nothing outside is touched.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export WEFT=${WEFT:-$here/../../../target/release/weft}
[ -x "$WEFT" ] || { echo "no binary at $WEFT: cargo build --release --bin weft" >&2; exit 1; }
if [ -z "${SKIP_MICRO:-}" ]; then
  (cd "$here/../../.." && cargo bench --bench bench -- identity/ --warm-up-time 1 --measurement-time 4) | grep -E '^identity|time:'
fi
netns=weft-identity-bench-$$
ip netns add "$netns"
trap 'ip netns del "$netns"' EXIT
ip -n "$netns" link set lo up
ip netns exec "$netns" python3 "$here/bench.py" "$@"
