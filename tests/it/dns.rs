//! DNS of real agents, asked by unmodified clients: dig, kdig, unbound and dnsmasq (Debian: bind9-dnsutils, knot-dnsutils,
//! unbound, dnsmasq-base). Where they are not installed these tests say so, and fail if `WEFT_REQUIRE_DNS=1` (as .ci/run sets it).

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::agent::{Agent, Ca, Spec, loopback_ip, path};
use crate::wait::until;

/// Tells whether the clients are installed.
pub(crate) fn has_clients() -> bool {
    let missing: Vec<&str> = ["dig", "kdig", "unbound", "dnsmasq"]
        .into_iter()
        .filter(|name| {
            let dirs = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"];
            !dirs.iter().any(|dir| std::path::Path::new(dir).join(name).exists())
        })
        .collect();
    if missing.is_empty() {
        return true;
    }
    let required = std::env::var_os("WEFT_REQUIRE_DNS").is_some_and(|v| v == "1");
    assert!(!required, "WEFT_REQUIRE_DNS=1 and these are not installed: {missing:?}");
    eprintln!("SKIPPED: not installed: {missing:?}");
    false
}

/// Asks with a program; returns what it printed.
#[track_caller]
fn ask(program: &str, server: IpAddr, port: u16, words: &str) -> String {
    let mut command = Command::new(program);
    command.arg(format!("@{server}")).arg("-p").arg(port.to_string()).args(words.split_whitespace());
    let out = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// What dig's `+short` prints, sorted.
#[track_caller]
fn short(server: IpAddr, port: u16, words: &str) -> Vec<String> {
    let text = ask("dig", server, port, &format!("+short +tries=1 +time=5 {words}"));
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The status that dig prints.
#[track_caller]
fn status(server: IpAddr, words: &str) -> String {
    let text = ask("dig", server, 8600, &format!("+tries=1 +time=5 {words}"));
    let status = text.split("status: ").nth(1).and_then(|rest| rest.split(',').next());
    status.unwrap_or_else(|| panic!("no status in: {text}")).to_owned()
}

/// A program that runs until it is dropped.
struct Running(Child);

impl Running {
    #[track_caller]
    fn start(program: &str, words: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().unwrap_or_else(|e| panic!("{program}: {e}")))
    }

    /// An unbound on `ip`, port 5300, with `lines` in its configuration.
    #[track_caller]
    fn unbound(dir: &TempDir, ip: IpAddr, lines: &str) -> Self {
        let file = dir.path().join("unbound.conf");
        let text = format!(
            "server:\n  interface: {ip}\n  port: 5300\n  access-control: 127.0.0.0/8 allow\n  do-not-query-localhost: no\n  username: \"\"\n  \
             chroot: \"\"\n  directory: \"{dir}\"\n  pidfile: \"\"\n  use-syslog: no\n  do-daemonize: no\n  module-config: \"iterator\"\n  \
             num-threads: 1\n{lines}\nremote-control:\n  control-enable: no\n",
            dir = path(dir.path())
        );
        fs::write(&file, text).unwrap();
        Self::start("/usr/sbin/unbound", &["-d", "-c", path(&file)])
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _already_ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn issuer(last: u8, name: &'static str, args: &[&str]) -> (Ca, Agent) {
    let ca = Ca::init("dns.test");
    let issuer = ca.issuer();
    let agent = Agent::start(&Spec::loopback(last, name, &[&["-issuer", path(&issuer)], args].concat()));
    (ca, agent)
}

#[test]
fn dig_and_kdig_see_every_row_and_the_question_after_a_change_sees_it() {
    if !has_clients() {
        return;
    }
    let (ca, n1) = issuer(140, "n1", &["-domain", "weft"]);
    let token = ca.token("n2", "*", "1h");
    let mut joined = Spec::loopback(141, "n2", &["-join", &loopback_ip(140).to_string(), "-token", &token]);
    let meta = TempDir::new().unwrap();
    fs::write(meta.path().join("meta.hcl"), "node_meta {\n  rack = \"a1\"\n}\n").unwrap();
    joined.args.extend(["-config-dir".to_owned(), path(meta.path()).to_owned()]);
    let n2 = Agent::start(&joined);
    let (at, ip2) = (loopback_ip(140), loopback_ip(141).to_string());
    n2.put_ok(
        "/v1/agent/service/register",
        r#"{"ID":"w1","Name":"web","Tags":["v1"],"Port":80,"Check":{"TTL":"1h","Status":"passing"}}"#,
    );
    n2.put_ok(
        "/v1/agent/service/register",
        r#"{"ID":"w2","Name":"web","Address":"192.0.2.10","Port":81,"Check":{"TTL":"1h","Status":"passing"}}"#,
    );
    n1.wait_passing("web", &["w1", "w2"]);

    let get = |words: &str| short(at, 8600, words);
    let mut both = ["192.0.2.10".to_owned(), ip2.clone()];
    both.sort();
    assert_eq!(get("web.service.consul"), both);
    let own_ip = vec![ip2.clone()];
    assert_eq!(get("v1.web.service.weft"), own_ip);
    assert_eq!(get("+tcp WEB.Service.dc1.weft"), get("web.service.weft"));
    assert_eq!(get("_web._tcp.service.weft SRV"), ["1 1 80 n2.node.dc1.weft.", "1 1 81 c000020a.addr.dc1.weft."]);
    assert_eq!(get("_web._v1.service.weft SRV"), ["1 1 80 n2.node.dc1.weft."]);
    assert_eq!(get("n2.node.weft"), own_ip);
    assert_eq!(get("n2.node.weft TXT"), ["\"rack=a1\""]);
    assert_eq!(get("c000020a.addr.dc1.weft"), ["192.0.2.10"]);
    assert_eq!(get("web.connect.weft"), own_ip);
    assert_eq!(get(&format!("-x {ip2}")), ["n2.node.dc1.weft."]);
    assert_eq!(get("weft NS"), ["ns.weft."]);
    assert!(get("weft SOA")[0].starts_with("ns.weft. hostmaster.weft. "));
    // dig takes the answers' letters as they come: they are the question's.
    assert!(ask("dig", at, 8600, "n2.NODE.wEfT").contains("\nn2.NODE.wEfT.\t"), "0x20");
    let kdig = ask("kdig", at, 8600, "+edns +bufsize=1232 web.service.weft SRV");
    for want in ["status: NOERROR", "Flags: qr aa rd", "n2.node.dc1.weft.", "c000020a.addr.dc1.weft.", "EDNS"] {
        assert!(kdig.contains(want), "`{want}` is missing in:\n{kdig}");
    }
    for (words, want) in [
        ("service.weft", "NOERROR"),
        ("web.service.weft AAAA", "NOERROR"),
        ("nobody.service.weft", "NXDOMAIN"),
        ("a.b.web.service.weft", "NXDOMAIN"),
        ("q.query.weft", "NXDOMAIN"),
        ("www.example.org", "REFUSED"),
        ("version.bind TXT CH", "REFUSED"),
        ("web.service.weft +opcode=NOTIFY", "NOTIMP"),
        ("web.service.weft +edns=1 +noednsneg", "BADVERS"),
    ] {
        assert_eq!(status(at, words), want, "{words}");
    }

    // A virtual IP is the same on both nodes, leads back, and outlives its agent.
    let own = get("web.virtual.weft");
    assert_eq!(own, short(loopback_ip(141), 8600, "web.virtual.weft"));
    assert!(own[0].split('.').next().unwrap().parse::<u8>().unwrap() >= 240, "{own:?}");
    assert_eq!(get(&format!("-x {}", own[0])), ["web.virtual.weft."]);

    // As soon as this agent knows of a change, so does the next question.
    n2.put_ok("/v1/agent/check/fail/service:w1", "");
    n1.wait_passing("web", &["w2"]);
    assert_eq!(get("web.service.weft"), ["192.0.2.10"]);
    n2.put_ok("/v1/agent/check/fail/service:w2", "");
    n1.wait_passing("web", &[]);
    assert_eq!(status(at, "web.service.weft"), "NXDOMAIN");
    n2.put_ok("/v1/agent/check/pass/service:w2", "");
    n2.put_ok("/v1/agent/check/pass/service:w1", "");
    n1.wait_passing("web", &["w1", "w2"]);
    assert_eq!(get("web.service.weft").len(), 2);
    let data = n2.kill();
    n1.wait_members(&["n1=1", "n2=4"]);
    assert_eq!(status(at, "web.service.weft"), "NXDOMAIN");
    assert_eq!(get("web.virtual.weft"), own);
    joined.args.retain(|arg| !arg.starts_with("weft1-") && arg != "-token");
    let n2 = Agent::spawn(&joined, data);
    n2.wait_ready();
    n2.put_ok("/v1/agent/check/pass/service:w1", "");
    n2.put_ok("/v1/agent/check/pass/service:w2", "");
    n1.wait_passing("web", &["w1", "w2"]);
    assert_eq!(short(loopback_ip(141), 8600, "web.virtual.weft"), own, "after a restart");

    let metrics = n1.try_get("/v1/agent/metrics?format=prometheus").unwrap().body;
    for want in [
        "weft_dns_queries_total{code=\"NXDOMAIN\",transport=\"udp\",type=\"A\"}",
        "weft_dns_queries_total{code=\"NOERROR\",transport=\"tcp\",type=\"A\"}",
        "weft_dns_queries_total{code=\"NOTIMP\",transport=\"udp\",type=\"other\"}",
        "weft_dns_query_duration_seconds_count",
    ] {
        assert!(metrics.contains(want), "`{want}` is missing in:\n{metrics}");
    }
}

#[test]
fn recursors_are_asked_in_order_kept_and_asked_by_tcp_for_what_is_long() {
    if !has_clients() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let long: Vec<String> = (0..60)
        .map(|at| format!("  local-data: \"long.example.test. 60 IN TXT {at:02}{}\"\n", "x".repeat(60)))
        .collect();
    let long = long.concat();
    let data = format!(
        "  local-zone: \"example.test.\" static\n  local-data: \"www.example.test. 60 IN A 192.0.2.7\"\n{long}"
    );
    let resolver = loopback_ip(143);
    let unbound = Running::unbound(&dir, resolver, &data);
    until("unbound answers", || {
        let got = short(resolver, 5300, "www.example.test");
        if got == ["192.0.2.7"] { Ok(()) } else { Err(format!("{got:?}")) }
    });
    // Nobody has the first one's port.
    let nobody = format!("{}:5399", loopback_ip(144));
    // The second one takes the question and says nothing.
    let silent = UdpSocket::bind((loopback_ip(144), 0)).unwrap();
    let files = TempDir::new().unwrap();
    fs::write(files.path().join("dns.hcl"), "dns_config {\n  recursor_timeout = \"1s\"\n}\n").unwrap();
    let (quiet, knows) = (silent.local_addr().unwrap().to_string(), format!("{resolver}:5300"));
    let words = ["-recursor", &nobody, "-recursor", &quiet, "-recursor", &knows, "-config-dir", path(files.path())];
    let (_ca, n1) = issuer(142, "n1", &words);
    let at = loopback_ip(142);
    assert_eq!(short(at, 8600, "WWW.example.test"), ["192.0.2.7"]);
    silent.set_nonblocking(true).unwrap();
    assert!(silent.recv(&mut [0; 512]).is_ok(), "the silent one was asked, and given up in time");
    let seen = ask("dig", at, 8600, "www.EXAMPLE.test");
    assert!(seen.contains("\nwww.EXAMPLE.test.\t") && seen.contains("flags: qr rd ra;"), "{seen}");
    assert_eq!(status(at, "no.example.test"), "NXDOMAIN");
    assert_eq!(short(at, 8600, "long.example.test TXT").len(), 60);
    assert!(ask("dig", at, 8600, "+ignore long.example.test TXT").contains("flags: qr tc rd ra;"));
    assert_eq!(short(at, 8600, "n1.node.weft"), [at.to_string()], "its own names are its own");
    drop(unbound);
    assert_eq!(short(at, 8600, "www.example.test"), ["192.0.2.7"], "kept for its 60 seconds");
    assert_eq!(status(at, "new.example.test"), "SERVFAIL");
    let metrics = n1.try_get("/v1/agent/metrics?format=prometheus").unwrap().body;
    for result in ["answered", "cached", "failed"] {
        assert!(metrics.contains(&format!("weft_dns_recursions_total{{result=\"{result}\"}}")), "{metrics}");
    }
}

#[test]
fn unbound_and_dnsmasq_forward_to_an_agent() {
    if !has_clients() {
        return;
    }
    let (_ca, n1) = issuer(145, "n1", &[]);
    let (agent, through_unbound, through_dnsmasq) = (loopback_ip(145), loopback_ip(146), loopback_ip(147));
    n1.put_ok("/v1/agent/service/register", r#"{"Name":"web","Port":80,"Check":{"TTL":"1h","Status":"passing"}}"#);
    let other =
        r#"{"ID":"web-2","Name":"web","Address":"192.0.2.77","Port":81,"Check":{"TTL":"1h","Status":"passing"}}"#;
    n1.wait_passing("web", &["web"]);
    let dir = TempDir::new().unwrap();
    // As README says it.
    let zone = format!(
        "stub-zone:\n  name: \"weft.\"\n  stub-addr: {agent}@8600\nforward-zone:\n  name: \"consul.\"\n  forward-addr: {agent}@8600"
    );
    let _unbound = Running::unbound(
        &dir,
        through_unbound,
        &format!("  domain-insecure: \"weft\"\n  domain-insecure: \"consul\"\n{zone}"),
    );
    let listen = format!("--listen-address={through_dnsmasq}");
    let servers = [format!("--server=/weft/{agent}#8600"), format!("--server=/consul/{agent}#8600")];
    let common = [
        "--keep-in-foreground",
        "--port=5300",
        "--bind-interfaces",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--user=root",
        "--pid-file=",
    ];
    let _dnsmasq = Running::start("/usr/sbin/dnsmasq", &[&common[..], &[&listen, &servers[0], &servers[1]]].concat());
    let own = vec![agent.to_string()];
    for forwarder in [through_unbound, through_dnsmasq] {
        for name in ["web.service.weft", "web.service.consul", "n1.node.dc1.weft"] {
            until(&format!("{name} through {forwarder}"), || {
                let got = short(forwarder, 5300, name);
                if got == own { Ok(()) } else { Err(format!("{got:?}")) }
            });
        }
        assert_eq!(short(forwarder, 5300, "_web._tcp.service.consul SRV"), ["1 1 80 n1.node.dc1.consul."]);
    }
    // The TTL is 0: they keep nothing. One comes, and the first fails: they follow.
    n1.put_ok("/v1/agent/service/register", other);
    n1.wait_passing("web", &["web", "web-2"]);
    for forwarder in [through_unbound, through_dnsmasq] {
        assert_eq!(short(forwarder, 5300, "web.service.weft").len(), 2);
    }
    n1.put_ok("/v1/agent/check/fail/service:web", "");
    n1.wait_passing("web", &["web-2"]);
    for forwarder in [through_unbound, through_dnsmasq] {
        assert_eq!(short(forwarder, 5300, "web.service.consul"), ["192.0.2.77"]);
    }
    n1.put_ok("/v1/agent/check/fail/service:web-2", "");
    n1.wait_passing("web", &[]);
    for forwarder in [through_unbound, through_dnsmasq] {
        assert!(short(forwarder, 5300, "web.service.weft").is_empty());
    }
}

#[test]
fn many_connections_and_garbage_keep_nobody_else_out() {
    let (_ca, n1) = issuer(148, "n1", &[]);
    let at = SocketAddr::new(loopback_ip(148), 8600);
    let open: Vec<TcpStream> = (0..300).map(|_| TcpStream::connect(at).unwrap()).collect();
    // A look takes no time: who is silent for 10 s is closed as well.
    open.iter().for_each(|stream| stream.set_nonblocking(true).unwrap());
    until("those beyond the bound are closed", || {
        let closed = open.iter().filter(|stream| matches!((&**stream).read(&mut [0]), Ok(0)));
        let count = closed.count();
        if count == 300 - 256 { Ok(()) } else { Err(count.to_string()) }
    });
    let question = [&[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], b"\x02n1\x04node\x04weft\x00\x00\x01\x00\x01"].concat();
    let udp = UdpSocket::bind((loopback_ip(149), 0)).unwrap();
    udp.connect(at).unwrap();
    for garbage in [&[][..], &[0], &[255; 11], &[0x80; 40], &question[..20], &[0; 4000]] {
        udp.send(garbage).unwrap();
    }
    // Several questions on one connection are answered in their order.
    let mut tcp = &open[0];
    tcp.set_nonblocking(false).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let length = u16::try_from(question.len()).unwrap().to_be_bytes();
    tcp.write_all(&[&length[..], &question, &length, &question].concat()).unwrap();
    for _ in 0..2 {
        let mut length = [0; 2];
        tcp.read_exact(&mut length).unwrap();
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        tcp.read_exact(&mut answer).unwrap();
        assert_eq!((&answer[..2], &answer[6..8]), (&[0, 7][..], &[0, 1][..]), "{answer:02x?}");
    }
    udp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    udp.send(&question).unwrap();
    let mut answer = [0; 512];
    let is_answer = |answer: &[u8]| answer[..2] == [0, 7] && answer[6..8] == [0, 1];
    // What could be refused was refused first.
    while !is_answer(&answer) {
        udp.recv(&mut answer).unwrap();
    }
    drop(open);
    n1.get("/v1/agent/self");
}

#[test]
fn dns_can_be_moved_and_turned_off_and_says_which_port_is_taken() {
    let (_ca, _n1) = issuer(150, "n1", &["-dns-port", "8653"]);
    assert!(TcpStream::connect((loopback_ip(150), 8653)).is_ok());
    assert!(TcpStream::connect((loopback_ip(150), 8600)).is_err());
    let (ca, _n2) = issuer(151, "n2", &["-dns-port", "-1"]);
    assert!(TcpStream::connect((loopback_ip(151), 8600)).is_err());
    let _taken = UdpSocket::bind((loopback_ip(152), 8600)).unwrap();
    let issuer = ca.issuer();
    let mut agent = Agent::spawn(&Spec::loopback(152, "n3", &["-issuer", path(&issuer)]), TempDir::new().unwrap());
    let (status, log) = agent.wait_exit();
    assert!(!status.success());
    for want in [&format!("{}:8600 (UDP)", loopback_ip(152)), "ports.dns = -1", "in use"] {
        assert!(log.contains(want), "`{want}` is missing in:\n{log}");
    }
}

#[test]
fn a_reload_changes_how_names_are_answered_and_where_it_listens_takes_a_restart() {
    if !has_clients() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let resolver = loopback_ip(154);
    let data = "  local-zone: \"example.test.\" static\n  local-data: \"www.example.test. 60 IN A 192.0.2.7\"\n";
    let unbound = Running::unbound(&dir, resolver, data);
    until("unbound answers", || {
        let got = short(resolver, 5300, "www.example.test");
        if got == ["192.0.2.7"] { Ok(()) } else { Err(format!("{got:?}")) }
    });
    let files = TempDir::new().unwrap();
    let write = |text: &str| fs::write(files.path().join("dns.hcl"), text).unwrap();
    write("dns_config {\n  node_ttl = \"7s\"\n}\n");
    let (_ca, n1) = issuer(153, "n1", &["-config-dir", path(files.path())]);
    let at = loopback_ip(153);
    let ttl = || ask("dig", at, 8600, "+noall +answer n1.node.weft").split_whitespace().nth(1).map(str::to_owned);
    assert_eq!(ttl().as_deref(), Some("7"));
    assert_eq!(status(at, "www.example.test"), "REFUSED");
    write(&format!(
        "recursors = [\"{resolver}:5300\"]\nalt_domain = \"mesh\"\ndns_config {{\n  node_ttl = \"9s\"\n}}\n"
    ));
    n1.signal(nix::sys::signal::Signal::SIGHUP);
    until("the new settings are in force", || {
        if ttl().as_deref() == Some("9") { Ok(()) } else { Err(format!("{:?}", ttl())) }
    });
    assert_eq!(short(at, 8600, "www.example.test"), ["192.0.2.7"]);
    assert_eq!(short(at, 8600, "n1.node.mesh"), [at.to_string()]);
    assert_eq!(n1.put("/v1/agent/reload", "").body, "", "nothing differs");
    // What recursors said outlives a reload that leaves them alone.
    drop(unbound);
    write(&format!("recursors = [\"{resolver}:5300\"]\nports {{\n  dns = 8699\n}}\n"));
    let said = n1.put("/v1/agent/reload", "");
    assert!(said.status == 200 && said.body.contains("ports.dns or addresses.dns changed"), "{}", said.body);
    assert_eq!(short(at, 8600, "www.example.test"), ["192.0.2.7"]);
    assert_eq!(ttl().as_deref(), Some("0"));
    // What is wrong changes nothing.
    write("dns_config {\n  near = \"n2\"\n}\n");
    let said = n1.put("/v1/agent/reload", "");
    assert!(
        said.status == 400 && said.body.contains("dns_config.near") && said.body.contains("`_ip`"),
        "{}",
        said.body
    );
    assert_eq!(short(at, 8600, "www.example.test"), ["192.0.2.7"]);
}
