#!/usr/bin/env bash
# From an operator's order to its enforcement on every agent, N real agents in one network namespace (needs root, python3).
#
#   tests/bench/gossip/policy.sh [--changes 20] [N ...]     default: 3 20 100
#
# WEFT names the binary (default target/release/weft). The agents have addresses 127.0.x.y of the namespace's own loopback
# device; nothing outside is touched. Agents start ten at a time, and changes begin once they rest. A development build takes
# several times the processor's time: its figures say nothing about N=100.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export WEFT=${WEFT:-$here/../../../target/release/weft}
case $WEFT in */debug/*) echo "warning: $WEFT is a development build" >&2 ;; esac
[ -x "$WEFT" ] || { echo "no binary at $WEFT: cargo build --release --bin weft" >&2; exit 1; }
netns=weft-policy-bench-$$
ip netns add "$netns"
trap 'ip netns del "$netns"' EXIT
ip -n "$netns" link set lo up
ip netns exec "$netns" env PYTHONDONTWRITEBYTECODE=1 python3 "$here/policy.py" "$@"
