node_name   = "a"
data_dir    = "/tmp/weft/a"
bind_addr   = "127.0.0.1"
client_addr = "127.0.0.1"
issuer      = "/tmp/weft/ca/issuer-1"
default_intention_policy = "allow"

service {
  id       = "web-v1"
  name     = "web"
  address  = "127.0.0.1"
  port     = 7001
  protocol = "http"
}
service {
  id       = "web-v2"
  name     = "web"
  address  = "127.0.0.1"
  port     = 7002
  protocol = "http"
}
