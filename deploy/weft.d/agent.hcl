# /etc/weft.d/agent.hcl: the agent of this host. `weft validate /etc/weft.d` checks it.

# Default: the host name.
node_name  = "web-1"
datacenter = "dc1"
data_dir   = "/var/lib/weft"

# The address that other hosts reach: UDP 8301 must be open between them.
bind_addr = "10.0.0.1"

# The HTTP API; other addresses than loopback need admin_token_file.
client_addr = "127.0.0.1"

# DNS, by UDP and TCP on client_addr (api/dns.md); -1 turns it off. Names of others go to the recursors.
#   ports { dns = 8600 }
#   recursors = ["192.0.2.53"]

# The first node of a mesh holds an issuer that `weft ca init` made:
#   issuer = "/etc/weft.d/issuer-1"
# Every further one joins with a token of `weft token create`, needed at its first start only:
#   retry_join = ["10.0.0.1"]
#   token_file = "/etc/weft.d/join-token"

# Apps fetch certificates here with any SPIFFE client; members of the group may connect (api/workload.md).
#   workload_api {
#     socket = "/run/weft/workload.sock"
#     group  = "apps"
#   }

# Spans and metrics go to a collector by OTLP over HTTP (api/telemetry.md).
#   telemetry {
#     otlp {
#       endpoint         = "http://127.0.0.1:4318"
#       sampling_percent = 1
#     }
#   }

leave_on_terminate = true
drain_timeout      = "10s"
# How long a failed node is remembered and called (8h at least).
reconnect_timeout  = "72h"
log_level          = "info"
