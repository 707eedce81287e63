# The caller: its upstream opens 127.0.0.3:9191, which leads to a healthy instance of web.
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
