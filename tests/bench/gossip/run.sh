#!/usr/bin/env bash
# Gossip of N real agents, each in a network namespace of its own (needs root, iproute2, nftables, python3; up to 200 agents).
#
#   tests/bench/gossip/run.sh [-o FILE.json] [--only KIND,...] [--repeats 30] [N ...]          default: all kinds; 20 50 100 200
#       KIND: idle register register-lossy kill silent leave moved stop split pauses
#   tests/bench/gossip/run.sh --only memory [--instances 10000] 50          RSS and bytes per instance of the catalogue
#
# WEFT names the binary (default target/release/weft), SERF that of serf (Debian: serf). serf's figures stand beside
# weft's; where it is not installed, those recorded earlier do, marked as such.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export WEFT=${WEFT:-$here/../../../target/release/weft}
[ -x "$WEFT" ] || { echo "no binary at $WEFT: cargo build --release --bin weft" >&2; exit 1; }
exec env PYTHONDONTWRITEBYTECODE=1 python3 "$here/bench.py" "$@"
