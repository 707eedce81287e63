service {
  id      = "web-1"
  name    = "web"
  address = "127.0.0.1"
  port    = 8080

  check {
    http     = "http://127.0.0.1:8080/"
    interval = "2s"
  }
}
