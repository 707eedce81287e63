node_name   = "c"
data_dir    = "/tmp/weft/c"
bind_addr   = "127.0.0.3"
client_addr = "127.0.0.3"
retry_join  = ["127.0.0.1"]
default_intention_policy = "allow"

service {
  name = "shop"
  port = 9000
  proxy {
    upstreams {
      destination_name   = "web"
      local_bind_address = "127.0.0.3"
      local_bind_port    = 9191
    }
  }
}
