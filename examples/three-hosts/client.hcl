node_name = "client"
data_dir  = "/tmp/weft/client"
bind_addr = "127.0.0.3"
client_addr = "127.0.0.3"
retry_join = ["127.0.0.1"]
