node_name = "web-2"
data_dir  = "/tmp/weft/web-2"
bind_addr = "127.0.0.2"
client_addr = "127.0.0.2"
retry_join = ["127.0.0.1"]
