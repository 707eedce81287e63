node_name   = "a"
data_dir    = "/tmp/weft/a"
bind_addr   = "127.0.0.1"
client_addr = "127.0.0.1"
issuer      = "/tmp/weft/ca/issuer-1"
node_meta {
  zone = "north"
}
default_intention_policy = "allow"

service {
  id       = "web-a1"
  name     = "web"
  address  = "127.0.0.1"
  port     = 7001
  protocol = "http"
}
service {
  id       = "web-a2"
  name     = "web"
  address  = "127.0.0.1"
  port     = 7002
  protocol = "http"
}

# The caller, in the same zone.
service {
  name = "shop"
  port = 9000
  proxy {
    upstreams {
      destination_name = "web"
      local_bind_port  = 9191
    }
  }
}
