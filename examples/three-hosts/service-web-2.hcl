service {
  id      = "web-2"
  name    = "web"
  address = "127.0.0.2"
  port    = 8080

  check {
    http     = "http://127.0.0.2:8080/"
    interval = "2s"
  }
}
