//! What callers say of those before them: whose word is passed on.

use std::net::IpAddr;

use serde_json::json;

use super::routed::say;
use super::*;

const SAID: [&str; 5] = [
    "x-forwarded-for=203.0.113.9",
    "x-forwarded-proto=https",
    "forwarded=for=203.0.113.9",
    "x-real-ip=203.0.113.9",
    "x_forwarded_for=203.0.113.9",
];

/// What the app is told by a caller at `from` that claims to ask for another.
async fn told(worker: &Rc<Loopback>, from: Option<&str>) -> Vec<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let caller = Caller { source: Source::Service("api".parse().unwrap()), destination: "web".parse().unwrap() };
    let port = listener.local_addr().unwrap();
    let (worker, from) = (Rc::clone(worker), from.map(|addr| addr.parse::<IpAddr>().unwrap()));
    tokio::task::spawn_local(async move {
        let (stream, _) = listener.accept().await.unwrap();
        outbound::serve_from(worker, stream, Route::Service(caller), from).await;
    });
    let said = SAID.map(|line| line.replacen('=', ": ", 1)).join("\r\n");
    let answer =
        raw(port, format!("GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n{said}\r\n\r\n").as_bytes()).await;
    let (head, lines) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    let is_about_before = |line: &&str| ["for=", "real-ip=", "-proto="].iter().any(|part| line.contains(part));
    lines.lines().filter(is_about_before).map(str::to_owned).collect()
}

#[test]
fn a_stranger_s_word_is_forgotten_and_that_of_a_trusted_hop_and_of_this_host_s_apps_passes() {
    run(async {
        // With its app's messages: who drops them ends the app.
        let setup = setup().await;
        let worker = &setup.worker;
        say(worker, &[("proxy-defaults", "global", json!({"TrustedHops": ["10.1.0.0/16"]}))]);
        let mut passed = SAID.map(str::to_owned).to_vec();
        passed.sort();
        for believed in ["10.1.2.3", "127.0.0.1", "::1", "::ffff:10.1.2.3"] {
            assert_eq!(told(worker, Some(believed)).await, passed, "{believed}");
        }
        for stranger in ["192.0.2.7", "10.2.0.1", "2001:db8::1"] {
            let of_itself = [format!("x-forwarded-for={stranger}"), "x-forwarded-proto=http".to_owned()];
            assert_eq!(told(worker, Some(stranger)).await, of_itself, "{stranger}");
        }
        assert_eq!(told(worker, None).await, [""; 0], "a caller that has no address is none of them");
    });
}
