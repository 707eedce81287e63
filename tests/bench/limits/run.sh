#!/usr/bin/env bash
# A rate limit that holds for the whole mesh (RateLimits, Scope cluster), on N real agents: what passes against its bound.
#
#   tests/bench/limits/run.sh [N ...]          default: 3 20; at most 40
#
# Each agent is in a network namespace of its own and has an instance of `web` and a caller of it. The limit is 10 requests a
# second for each agent, the burst one second's worth; twice as much is asked for 20 s, and then 10 s of four times as much
# follow 10 s of silence. Printed are what passed, and the most that passed in any window of time beyond the limit times its
# length, which the bound of api/balancing.md says is B + N at most (and more where hundreds report at once).
#
# Needs root, iproute2 and python3. Nothing outside the namespaces is touched; it ends by itself, within two minutes for both.
# WEFT names the binary (default target/release/weft).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export WEFT=${WEFT:-$here/../../../target/release/weft}
[ -x "$WEFT" ] || { echo "no binary at $WEFT: cargo build --release --bin weft" >&2; exit 1; }
exec env PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$here/../gossip" python3 "$here/limits.py" "$@"
