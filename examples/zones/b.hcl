node_name   = "b"
data_dir    = "/tmp/weft/b"
bind_addr   = "127.0.0.2"
client_addr = "127.0.0.2"
retry_join  = ["127.0.0.1"]
node_meta {
  zone = "south"
}
default_intention_policy = "allow"

service {
  id       = "web-b1"
  name     = "web"
  address  = "127.0.0.1"
  port     = 7003
  protocol = "http"
}
