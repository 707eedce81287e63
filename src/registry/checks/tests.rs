use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::model::HealthStatus;
use crate::registry::definition::check_from_json;
use crate::registry::testing::DEFAULTS;

/// What the check that `value` defines finds in one run.
async fn run(mut value: Value) -> Outcome {
    run_with(&mut value, &Tools::new(CheckSettings::default()).unwrap()).await
}

async fn run_with(value: &mut Value, tools: &Tools) -> Outcome {
    value["Name"] = json!("c");
    value["Interval"] = json!("1s");
    probe(&check_from_json(value, &DEFAULTS).unwrap(), tools).await
}

/// Answers every connection with what `answer` makes of the request's first line, and closes it.
async fn serve(answer: impl Fn(&str) -> String + Send + 'static) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                if stream.read_buf(&mut request).await.unwrap() == 0 {
                    break;
                }
            }
            stream.write_all(answer(&String::from_utf8_lossy(&request)).as_bytes()).await.unwrap();
        }
    });
    (addr, tasks)
}

fn get(url: &str) -> Value {
    json!({"HTTP": url})
}

fn response(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test]
async fn http_statuses_are_judged_as_consul_judges_them() {
    let (addr, _server) = serve(|request| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        response(path.trim_start_matches('/').replace('_', " ").as_str(), "body")
    })
    .await;
    for (status, want) in [
        ("200_OK", HealthStatus::Passing),
        ("204_No_Content", HealthStatus::Passing),
        ("429_Too_Many_Requests", HealthStatus::Warning),
        ("404_Not_Found", HealthStatus::Critical),
        ("500_Internal_Server_Error", HealthStatus::Critical),
    ] {
        let outcome = run(get(&format!("http://{addr}/{status}"))).await;
        assert_eq!(outcome.status, want, "{}", outcome.output);
    }
    let outcome = run(get(&format!("http://{addr}/200_OK"))).await;
    assert_eq!(outcome.output, format!("HTTP GET http://{addr}/200_OK: 200 OK Output: body"));
}

#[tokio::test]
async fn redirects_are_followed_up_to_ten_unless_disabled() {
    let (addr, _server) = serve(|request| match request.split(' ').nth(1) {
        Some("/once") => "HTTP/1.1 302 Found\r\nlocation: /end\r\ncontent-length: 0\r\n\r\n".into(),
        Some("/end") => response("200 OK", "there"),
        _ => "HTTP/1.1 302 Found\r\nlocation: /loop\r\ncontent-length: 0\r\n\r\n".into(),
    })
    .await;
    let outcome = run(get(&format!("http://{addr}/once"))).await;
    assert_eq!(outcome.status, HealthStatus::Passing, "{}", outcome.output);
    let outcome = run(get(&format!("http://{addr}/loop"))).await;
    assert!(outcome.output.contains("more than 10 redirects"), "{}", outcome.output);
    let outcome = run(json!({"HTTP": format!("http://{addr}/once"), "DisableRedirects": true})).await;
    assert_eq!(outcome.status, HealthStatus::Critical);
}

#[tokio::test]
async fn method_headers_and_body_are_sent() {
    let (addr, _server) = serve(|request| {
        let lower = request.to_ascii_lowercase();
        let is_right = request.starts_with("PUT /x?y HTTP/1.1")
            && lower.contains("x-a: 1\r\n")
            && lower.contains("host: app.test\r\n")
            && lower.contains("content-length: 2\r\n");
        response(if is_right { "200 OK" } else { "400 Bad Request" }, request)
    })
    .await;
    let url = format!("http://{addr}/x?y");
    let asked = json!({"HTTP": url, "Method": "put", "Body": "hi", "Header": {"X-A": ["1"], "Host": ["app.test"]}});
    let outcome = run(asked).await;
    assert_eq!(outcome.status, HealthStatus::Passing, "{}", outcome.output);
}

#[tokio::test]
async fn an_endless_body_is_cut() {
    let (addr, _server) = serve(|_| response("200 OK", &"x".repeat(100_000))).await;
    let outcome = run(get(&format!("http://{addr}/"))).await;
    assert_eq!(outcome.status, HealthStatus::Passing);
    assert!(outcome.output.len() < 5000, "{}", outcome.output.len());
}

#[tokio::test]
async fn an_app_that_does_not_answer_is_critical_after_the_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let outcome = run(json!({"HTTP": format!("http://{}/", listener.local_addr().unwrap()), "Timeout": "20ms"})).await;
    assert_eq!(outcome.status, HealthStatus::Critical);
    assert!(outcome.output.contains("no answer within 20ms"), "{}", outcome.output);
}

#[tokio::test]
async fn a_tcp_check_passes_while_the_port_is_open() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let output = format!("TCP connect {target}: Success");
    assert_eq!(run(json!({"TCP": target})).await, Outcome { status: HealthStatus::Passing, output });
    drop(listener);
    assert_eq!(run(json!({"TCP": target})).await.status, HealthStatus::Critical);
}

#[tokio::test]
async fn a_udp_check_fails_only_where_the_port_is_refused() {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let target = socket.local_addr().unwrap().to_string();
    let silent = run(json!({"UDP": target, "Timeout": "30ms"})).await;
    assert_eq!(silent.status, HealthStatus::Passing, "{}", silent.output);
    let (answered, ()) = tokio::join!(run(json!({"UDP": target})), async {
        // The first datagram is that of the silent run.
        for _ in 0..2 {
            let (length, from) = socket.recv_from(&mut [0; 8]).await.unwrap();
            assert_eq!(length, 0);
            socket.send_to(b"x", from).await.unwrap();
        }
    });
    assert_eq!(answered.output, format!("UDP connect {target}: Success"));
    drop(socket);
    let refused = run(json!({"UDP": target})).await;
    assert_eq!(refused.status, HealthStatus::Critical, "{}", refused.output);
}

/// A certificate of its own for `localhost`, as PEM and as what a server shows.
fn certificate() -> (String, Arc<rustls::ServerConfig>) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let secret = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut config = builder.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], secret).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    (certificate.pem(), Arc::new(config))
}

/// Tools that believe the certificate `pem`.
fn believing(pem: &str) -> (tempfile::TempDir, Tools) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, pem).unwrap();
    let tools = Tools::new(CheckSettings { ca_file: Some(file), ..CheckSettings::default() }).unwrap();
    (dir, tools)
}

#[tokio::test]
async fn tls_is_verified_against_the_roots_unless_told_otherwise() {
    let (pem, config) = certificate();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // A client that does not believe the certificate breaks off.
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut request = [0; 1024];
            if stream.read(&mut request).await.is_ok_and(|read| read > 0) {
                stream.write_all(response("200 OK", "secret").as_bytes()).await.unwrap();
            }
        }
    });
    let (_dir, tools) = believing(&pem);
    let url = format!("https://localhost:{port}/");
    let by_ip = format!("https://127.0.0.1:{port}/");
    let outcome = run_with(&mut get(&url), &tools).await;
    assert_eq!(outcome.status, HealthStatus::Passing, "{}", outcome.output);
    let foreign = run(get(&url)).await;
    assert!(foreign.output.contains("TLS handshake: invalid peer certificate"), "{}", foreign.output);
    assert_eq!(run(json!({"HTTP": url, "TLSSkipVerify": true})).await.status, HealthStatus::Passing);
    let misnamed = run_with(&mut get(&by_ip), &tools).await;
    assert_eq!(misnamed.status, HealthStatus::Critical, "{}", misnamed.output);
    let named = run_with(&mut json!({"HTTP": by_ip, "TLSServerName": "localhost"}), &tools).await;
    assert_eq!(named.status, HealthStatus::Passing, "{}", named.output);
    let tcp = format!("localhost:{port}");
    assert_eq!(run_with(&mut json!({"TCP": tcp, "TCPUseTLS": true}), &tools).await.status, HealthStatus::Passing);
    assert_eq!(run(json!({"TCP": tcp, "TCPUseTLS": true})).await.status, HealthStatus::Critical);
    assert_eq!(run(json!({"TCP": tcp})).await.status, HealthStatus::Passing);
    tools.reload(CheckSettings::default()).unwrap();
    assert_eq!(run_with(&mut get(&url), &tools).await.status, HealthStatus::Critical, "the roots are read anew");
}

/// Answers grpc.health.v1 over HTTP/2: services by name, none of them unknown.
async fn health_server(tls: Option<Arc<rustls::ServerConfig>>) -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let tls = tls.clone();
            connections.spawn(async move {
                match tls {
                    Some(config) => {
                        let Ok(stream) = tokio_rustls::TlsAcceptor::from(config).accept(stream).await else { return };
                        serve_health(stream).await;
                    }
                    None => serve_health(stream).await,
                }
            });
        }
    });
    (port, server)
}

async fn serve_health(stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) {
    let Ok(mut connection) = ::h2::server::handshake(stream).await else { return };
    let Some(Ok((request, respond))) = connection.accept().await else { return };
    // The connection moves the bytes, while they are read and after.
    tokio::join!(answer_health(request, respond), async { while connection.accept().await.is_some() {} });
}

async fn answer_health(
    request: ::http::Request<::h2::RecvStream>,
    mut respond: ::h2::server::SendResponse<bytes::Bytes>,
) {
    use prost::Message as _;
    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
    let data = request.into_body().data().await.unwrap().unwrap();
    let asked = h2::HealthRequest::decode(&data[5..]).unwrap();
    let head = ::http::Response::builder().header("content-type", "application/grpc");
    let status = match asked.service.as_str() {
        "" | "good" => 1,
        "bad" => 2,
        _ => {
            respond.send_response(head.header("grpc-status", "5").body(()).unwrap(), true).unwrap();
            return;
        }
    };
    let mut stream = respond.send_response(head.body(()).unwrap(), false).unwrap();
    stream.send_data(h2::framed(&h2::HealthResponse { status }), false).unwrap();
    let mut trailers = ::http::HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    stream.send_trailers(trailers).unwrap();
}

#[tokio::test]
async fn grpc_and_h2ping_ask_as_their_protocols_say() {
    let (port, _server) = health_server(None).await;
    let check = async |service: &str, want: HealthStatus, text: &str| {
        let outcome = run(json!({"GRPC": format!("127.0.0.1:{port}{service}")})).await;
        assert_eq!(outcome.status, want, "{}", outcome.output);
        assert!(outcome.output.contains(text), "{}", outcome.output);
    };
    check("", HealthStatus::Passing, "success").await;
    check("/good", HealthStatus::Passing, "success").await;
    check("/bad", HealthStatus::Critical, "NOT_SERVING").await;
    check("/none", HealthStatus::Critical, "NOT_FOUND").await;
    let ping = run(json!({"H2PING": format!("127.0.0.1:{port}"), "H2PingUseTLS": false})).await;
    assert_eq!(ping.status, HealthStatus::Passing, "{}", ping.output);
    let with_tls = run(json!({"H2PING": format!("127.0.0.1:{port}"), "Timeout": "2s"})).await;
    assert_eq!(with_tls.status, HealthStatus::Critical, "TLS is the default: {}", with_tls.output);

    let (pem, config) = certificate();
    let (port, _server) = health_server(Some(config)).await;
    let (_dir, tools) = believing(&pem);
    let target = format!("localhost:{port}");
    let secure = run_with(&mut json!({"GRPC": target, "GRPCUseTLS": true}), &tools).await;
    assert_eq!(secure.status, HealthStatus::Passing, "{}", secure.output);
    let ping = run_with(&mut json!({"H2PING": target}), &tools).await;
    assert_eq!(ping.status, HealthStatus::Passing, "{}", ping.output);
    let plain = run(json!({"GRPC": target, "Timeout": "2s"})).await;
    assert_eq!(plain.status, HealthStatus::Critical, "{}", plain.output);
}

fn shell(line: &str) -> Value {
    json!({"Args": ["sh", "-c", line]})
}

#[tokio::test]
async fn a_script_is_judged_by_its_exit_code_and_sees_only_its_own_environment() {
    for (code, want) in [(0, HealthStatus::Passing), (1, HealthStatus::Warning), (2, HealthStatus::Critical)] {
        let outcome = run(shell(&format!("echo out; echo err >&2; exit {code}"))).await;
        assert_eq!(outcome, Outcome { status: want, output: "out\nerr\n".to_owned() });
    }
    let outcome = run(json!({"Args": ["/usr/bin/env"], "ServiceID": "web"})).await;
    let mut lines: Vec<&str> = outcome.output.lines().collect();
    lines.sort_unstable();
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(lines, ["LANG=C.UTF-8", path, "WEFT_CHECK_ID=c", "WEFT_SERVICE_ID=web"]);
    let no_shell = run(json!({"Args": ["echo", "$PATH; exit 1"]})).await;
    assert_eq!(no_shell, Outcome { status: HealthStatus::Passing, output: "$PATH; exit 1\n".to_owned() });
    let missing = run(json!({"Args": ["/no/such/program"]})).await;
    assert!(missing.output.contains("cannot start \"/no/such/program\""), "{}", missing.output);
    let killed = run(shell("kill -9 $$")).await;
    assert_eq!(killed.status, HealthStatus::Critical);
}

/// Waits until no process of the group `leader` is left.
async fn group_ends(leader: i32) {
    let gone = async {
        while nix::sys::signal::killpg(nix::unistd::Pid::from_raw(leader), None).is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(20), gone).await.expect("the group ends");
}

#[tokio::test]
async fn a_script_that_overruns_its_time_is_killed_with_all_that_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let line = format!("echo begun; sleep 600 & echo $$ > {}; wait", file.display());
    let outcome = run(json!({"Args": ["sh", "-c", line], "Timeout": "1s"})).await;
    assert_eq!(outcome.status, HealthStatus::Critical);
    assert_eq!(outcome.output, "killed after the timeout of 1s; its output until then: begun\n");
    group_ends(std::fs::read_to_string(&file).unwrap().trim().parse().unwrap()).await;
}

#[tokio::test]
async fn what_a_script_leaves_behind_neither_holds_the_check_nor_stays() {
    let begin = crate::clock::now();
    let outcome = run(shell("sleep 600 & echo $$")).await;
    assert_eq!(outcome.status, HealthStatus::Passing);
    assert!(crate::clock::now() - begin < Duration::from_secs(60));
    group_ends(outcome.output.trim().parse().unwrap()).await;
}

#[tokio::test]
async fn a_script_that_is_cut_off_ends() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let line = format!("echo $$ > {}.new; mv {0}.new {0}; sleep 600", file.display());
    let mut running = JoinSet::new();
    running.spawn(run(shell(&line)));
    while !file.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.abort_all();
    group_ends(std::fs::read_to_string(&file).unwrap().trim().parse().unwrap()).await;
}

#[tokio::test]
async fn a_flood_of_output_is_read_and_cut() {
    let outcome = run(shell("head -c 5000000 /dev/zero | tr '\\0' x; exit 1")).await;
    assert_eq!((outcome.status, outcome.output.len()), (HealthStatus::Warning, 4096));
}

/// A unix socket in a directory of its own.
fn socket() -> (tempfile::TempDir, std::path::PathBuf, tokio::net::UnixListener) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    (dir, path, listener)
}

#[tokio::test]
async fn a_docker_check_runs_a_program_in_its_container() {
    let (_dir, docker_socket, listener) = socket();
    let mut server = JoinSet::new();
    server.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.windows(4).any(|end| end == b"\r\n\r\n") || (request[0] == b'P' && !request.ends_with(b"}"))
            {
                stream.read_buf(&mut request).await.unwrap();
            }
            let text = String::from_utf8_lossy(&request).into_owned();
            let answer = match text.split(' ').nth(1).unwrap() {
                "/containers/web/exec" => {
                    let cmd = text.contains(r#""Cmd":["/bin/bash","/check","-x"]"#);
                    if cmd { r#"{"Id":"abc1"}"# } else { r#"{"Id":"other"}"# }
                }
                "/exec/abc1/start" => "\x01\0\0\0\0\0\0\x06warm\n!",
                "/exec/abc1/json" => r#"{"ExitCode":1,"Running":false}"#,
                _ => {
                    let text = r#"{"message":"No such container: gone"}"#;
                    stream.write_all(response("404 Not Found", text).as_bytes()).await.unwrap();
                    continue;
                }
            };
            stream.write_all(response("200 OK", answer).as_bytes()).await.unwrap();
        }
    });
    let tools = Tools::new(CheckSettings { docker_socket, ..CheckSettings::default() }).unwrap();
    let mut check = json!({"DockerContainerID": "web", "Shell": "/bin/bash", "Args": ["/check", "-x"]});
    let outcome = run_with(&mut check, &tools).await;
    assert_eq!(outcome, Outcome { status: HealthStatus::Warning, output: "warm\n!".to_owned() });
    check["DockerContainerID"] = json!("gone");
    let outcome = run_with(&mut check, &tools).await;
    let want = "Docker container gone: Docker answers 404 Not Found: No such container: gone";
    assert_eq!(outcome, Outcome { status: HealthStatus::Critical, output: want.to_owned() });
}

/// A message of a bus that answers: big-endian, as a bus of another host would be.
fn bus_answer(serial: u32, kind: u8, signature: &str, body: &[u8]) -> Vec<u8> {
    let mut fields = vec![5, 1, b'u', 0];
    fields.extend(serial.to_be_bytes());
    if kind == 3 {
        fields.extend([4, 1, b's', 0, 0, 0, 0, 1, b'E', 0]);
    }
    fields.resize(fields.len().next_multiple_of(8), 0);
    fields.extend([8, 1, b'g', 0, u8::try_from(signature.len()).unwrap()]);
    fields.extend(signature.bytes());
    fields.push(0);
    let mut message = vec![b'B', kind, 0, 1];
    message.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
    message.extend(7_u32.to_be_bytes());
    message.extend(u32::try_from(fields.len()).unwrap().to_be_bytes());
    message.extend(fields);
    message.resize(message.len().next_multiple_of(8), 0);
    message.extend(body);
    message
}

fn bus_text(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes(), b"\0"].concat()
}

/// Serves one connection as the system bus with systemd behind it.
async fn serve_bus(mut stream: UnixStream) {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await.unwrap());
    }
    assert!(line.starts_with(b"\0AUTH EXTERNAL "));
    stream.write_all(b"OK 0123\r\n").await.unwrap();
    let mut begin = [0; 7];
    stream.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"BEGIN\r\n");
    let mut unit = String::new();
    loop {
        let mut fixed = [0; 16];
        if stream.read_exact(&mut fixed).await.is_err() {
            return;
        }
        let number = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().unwrap());
        let rest = usize::try_from(number(12)).unwrap().next_multiple_of(8) + usize::try_from(number(4)).unwrap();
        let mut bytes = vec![0; rest];
        stream.read_exact(&mut bytes).await.unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let variant = |value: &str| [&b"\x01s\0\0"[..], &bus_text(value)].concat();
        let answer = if text.contains("LoadUnit") {
            unit = ["nginx.service", "dead.service", "slow.service"]
                .into_iter()
                .find(|unit| text.contains(*unit))
                .unwrap_or("")
                .to_owned();
            ("o", bus_text("/org/freedesktop/systemd1/unit/x"))
        } else if text.contains("LoadState") {
            ("v", variant(if unit.is_empty() { "not-found" } else { "loaded" }))
        } else if text.contains("ActiveState") {
            let state = match unit.as_str() {
                "nginx.service" => "active",
                "slow.service" => "activating",
                _ => "inactive",
            };
            ("v", variant(state))
        } else if text.contains("SubState") {
            ("v", variant("running"))
        } else {
            // A signal comes between, as NameAcquired does.
            stream.write_all(&bus_answer(99, 4, "s", &bus_text(":1.1"))).await.unwrap();
            ("s", bus_text(":1.1"))
        };
        stream.write_all(&bus_answer(number(8), 2, answer.0, &answer.1)).await.unwrap();
    }
}

#[tokio::test]
async fn an_os_service_check_asks_systemd_over_the_bus() {
    let (_dir, dbus_socket, listener) = socket();
    let mut server = JoinSet::new();
    server.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            serve_bus(stream).await;
        }
    });
    let tools = Tools::new(CheckSettings { dbus_socket, ..CheckSettings::default() }).unwrap();
    for (unit, want, text) in [
        ("nginx.service", HealthStatus::Passing, "OS service nginx.service: active (running)"),
        ("slow.service", HealthStatus::Warning, "OS service slow.service: activating (running)"),
        ("dead.service", HealthStatus::Critical, "OS service dead.service: inactive (running)"),
        ("none.service", HealthStatus::Critical, "OS service none.service: systemd has no such unit (not-found)"),
    ] {
        let outcome = run_with(&mut json!({"OSService": unit}), &tools).await;
        assert_eq!(outcome, Outcome { status: want, output: text.to_owned() });
    }
}

#[tokio::test]
async fn a_kind_that_this_host_lacks_says_what_is_missing() {
    let gone = std::path::PathBuf::from("/nonexistent/socket");
    let settings = CheckSettings { ca_file: None, docker_socket: gone.clone(), dbus_socket: gone };
    let tools = Tools::new(settings).unwrap();
    let why = async |mut value: Value| {
        value["Name"] = json!("c");
        value["Interval"] = json!("1s");
        unavailable(&tools, &check_from_json(&value, &DEFAULTS).unwrap().probe).await
    };
    let docker = why(json!({"DockerContainerID": "x", "Args": ["y"]})).await.unwrap();
    assert!(docker.contains("cannot connect to /nonexistent/socket"), "{docker}");
    let systemd = why(json!({"OSService": "x.service"})).await.unwrap();
    assert!(systemd.contains("D-Bus"), "{systemd}");
    assert_eq!(why(json!({"TCP": "127.0.0.1:1"})).await, None);
}

proptest::proptest! {
    #[test]
    fn any_message_of_the_bus_is_read_or_refused(
        mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
        known in proptest::prelude::any::<bool>(),
    ) {
        if known && !bytes.is_empty() {
            bytes[0] = b'l';
        }
        let _unused = os_service::decode(bytes);
    }
}
