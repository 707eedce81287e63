#!/usr/bin/env bash
# weft as a peer of the comparison harness: two agents by their ordinary command lines, everything on that is on by default.
# Called as `weft.sh caps|b|a`; WEFT_BIN names the binary (cargo build --profile dist). Both sides share one work folder.
bin=${WEFT_BIN:-weft}
case $1 in
caps) command -v "$bin" >/dev/null || { echo "no weft binary (set WEFT_BIN)" >&2; exit 1; }
      echo "caps=http h2 l4 bulk"; echo "ready_b=udp:8301"; echo "version=$("$bin" version | head -n 1)"; exit;;
esac
set -eu
shared=${W%-?}-shared
mkdir -p "$shared" "$W/conf"
case $1 in
b)
  "$bin" ca init -dir "$shared/ca" -trust-domain bench.test >/dev/null
  "$bin" token create -ca "$shared/ca" -node a -serve client -ttl 1h | grep '^weft1-' > "$shared/token.new"
  mv "$shared/token.new" "$shared/token"
  cat > "$W/conf/services.hcl" <<X
services = [
  { name = "web", port = $BK_HTTP, protocol = "http" },
  { name = "web-l4", port = $BK_HTTP },
  { name = "web-h2", port = $BK_H2, protocol = "http2" },
  { name = "bulk", port = $BK_BULK },
]
X
  exec "$bin" agent -node b -data-dir "$W/data" -bind "$IPB" -workers "$WORKERS" -default-intention-policy allow -config-dir "$W/conf" -issuer "$shared/ca/issuer-1"
  ;;
a)
  for _ in $(seq 100); do [ -s "$shared/token" ] && break; read -r -t 0.1 <> <(:) || true; done
  cat > "$W/conf/client.hcl" <<X
service {
  name = "client"
  port = 1
  proxy {
    upstreams = [
      { destination_name = "web", local_bind_port = $A_HTTP },
      { destination_name = "web-l4", local_bind_port = $A_L4WEB },
      { destination_name = "web-h2", local_bind_port = $A_H2 },
      { destination_name = "bulk", local_bind_port = $A_L4BULK },
    ]
  }
}
X
  exec "$bin" agent -node a -data-dir "$W/data" -bind "$IPA" -workers "$WORKERS" -default-intention-policy allow -config-dir "$W/conf" -join "$IPB" -token "$(cat "$shared/token")"
  ;;
esac
