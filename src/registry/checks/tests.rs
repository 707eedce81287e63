use std::collections::BTreeMap;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

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

fn http_probe(url: String) -> Probe {
    Probe::Http {
        url,
        method: "GET".into(),
        headers: BTreeMap::new(),
        body: String::new(),
        disable_redirects: false,
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(10),
    }
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
        let outcome = probe(&http_probe(format!("http://{addr}/{status}"))).await;
        assert_eq!(outcome.status, want, "{}", outcome.output);
    }
    let outcome = probe(&http_probe(format!("http://{addr}/200_OK"))).await;
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
    let outcome = probe(&http_probe(format!("http://{addr}/once"))).await;
    assert_eq!(outcome.status, HealthStatus::Passing, "{}", outcome.output);
    let outcome = probe(&http_probe(format!("http://{addr}/loop"))).await;
    assert!(outcome.output.contains("more than 10 redirects"), "{}", outcome.output);
    let mut probe_of_first = http_probe(format!("http://{addr}/once"));
    if let Probe::Http { disable_redirects, .. } = &mut probe_of_first {
        *disable_redirects = true;
    }
    assert_eq!(probe(&probe_of_first).await.status, HealthStatus::Critical);
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
    let mut asked = http_probe(format!("http://{addr}/x?y"));
    if let Probe::Http { method, headers, body, .. } = &mut asked {
        *method = "PUT".into();
        *body = "hi".into();
        headers.insert("X-A".into(), vec!["1".into()]);
        headers.insert("Host".into(), vec!["app.test".into()]);
    }
    let outcome = probe(&asked).await;
    assert_eq!(outcome.status, HealthStatus::Passing, "{}", outcome.output);
}

#[tokio::test]
async fn an_endless_body_is_cut() {
    let (addr, _server) = serve(|_| response("200 OK", &"x".repeat(100_000))).await;
    let outcome = probe(&http_probe(format!("http://{addr}/"))).await;
    assert_eq!(outcome.status, HealthStatus::Passing);
    assert!(outcome.output.len() < 5000, "{}", outcome.output.len());
}

#[tokio::test]
async fn an_app_that_does_not_answer_is_critical_after_the_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut silent = http_probe(format!("http://{}/", listener.local_addr().unwrap()));
    if let Probe::Http { timeout, .. } = &mut silent {
        *timeout = Duration::from_millis(20);
    }
    let outcome = probe(&silent).await;
    assert_eq!(outcome.status, HealthStatus::Critical);
    assert!(outcome.output.contains("no answer within 20ms"), "{}", outcome.output);
}

#[tokio::test]
async fn a_tcp_check_passes_while_the_port_is_open() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let second = Duration::from_secs(1);
    let check = Probe::Tcp { target: target.clone(), interval: second, timeout: second };
    assert_eq!(
        probe(&check).await,
        Outcome { status: HealthStatus::Passing, output: format!("TCP connect {target}: Success") }
    );
    drop(listener);
    assert_eq!(probe(&check).await.status, HealthStatus::Critical);
}
