#!/usr/bin/env bash
# Gossip of N real agents on one machine, in a network namespace of its own (needs root, python3; nft for `silent`).
#
#   tests/bench/gossip/run.sh [-o FILE.json] [--instances 10000] [--only kill,idle,...] [N ...]     default: 20 50 100
#
# WEFT names the binary (default target/release/weft), SERF that of serf; where serf is installed its figures stand
# beside. The agents have addresses 127.0.x.y of the namespace's own loopback device; nothing outside is touched.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export WEFT=${WEFT:-$here/../../../target/release/weft}
[ -x "$WEFT" ] || { echo "no binary at $WEFT: cargo build --release --bin weft" >&2; exit 1; }
netns=weft-gossip-bench-$$
ip netns add "$netns"
trap 'ip netns del "$netns"' EXIT
ip -n "$netns" link set lo up
ip netns exec "$netns" python3 "$here/bench.py" "$@"
