#!/usr/bin/env bash
# Installs the clients that tests/it/clients.rs, edges.rs, otlp.rs and schema.rs run, each from its registry: install.sh [DIR], by default beside the
# build, in target/clients. Programs of Debian (HAProxy, nginx, VictoriaMetrics, node) are looked for on the PATH: .ci/run installs them.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
dir="${1:-${CARGO_TARGET_DIR:-$here/../../target}/clients}"
mkdir -p "$dir"
dir="$(cd "$dir" && pwd)"

py_consul=1.8.0 schemathesis=4.32.5 consul=2.0.1 grpcio=1.85.1 websockets=17.4 otlp=1.45.2 hypercorn=0.18.0

if ! "$dir/py/bin/python3" -c 'import consul, schemathesis, grpc, websockets, opentelemetry.proto, hypercorn' 2>/dev/null; then
  python3 -m venv --clear "$dir/py"
  "$dir/py/bin/pip" install --quiet --disable-pip-version-check "py-consul==$py_consul" "schemathesis==$schemathesis" \
    "grpcio==$grpcio" "websockets==$websockets" "opentelemetry-proto==$otlp" "hypercorn==$hypercorn"
fi

if [ ! -d "$dir/npm/node_modules/consul" ]; then
  mkdir -p "$dir/npm"
  npm install --silent --no-audit --no-fund --no-package-lock --prefix "$dir/npm" "consul@$consul"
fi

# A crate of its own: what rs-consul needs is no dependency of weft's.
CARGO_TARGET_DIR="$dir/rs" cargo build --quiet --locked --manifest-path "$here/rs_consul/Cargo.toml"
