# /etc/weft.d/web.hcl: a service of this host. One file per service keeps them apart.

service {
  name = "web"
  port = 8080

  check {
    http     = "http://127.0.0.1:8080/"
    interval = "10s"
    timeout  = "2s"
  }
}
