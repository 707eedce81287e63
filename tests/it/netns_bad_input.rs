//! What goes wrong in the field, on real agents: each has a clear error and loses nothing.

use std::net::UdpSocket;

use crate::agent::{Agent, Ca, Spec, at_offset, path};
use crate::lab::Lab;

/// Starts `spec`, which must end by itself with a failure; returns its log.
#[track_caller]
fn must_fail(spec: &Spec<'_>) -> String {
    let mut agent = Agent::spawn(spec, tempfile::TempDir::new().unwrap());
    let (status, log) = agent.wait_exit();
    assert!(!status.success(), "it should refuse to start: {log}");
    log
}

#[track_caller]
fn assert_says(log: &str, words: &[&str]) {
    for word in words {
        assert!(log.contains(word), "`{word}` is missing in:\n{log}");
    }
}

#[test]
fn a_bad_token_is_refused_with_its_reason() {
    let Some(lab) = Lab::new(2) else { return };
    let ca = Ca::init("lab.test");
    let issuer = ca.issuer();
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&issuer)]));
    let join = |name: &'static str, token: &str| Spec::on(&lab.host(2), name, &["-join", "10.77.0.1", "-token", token]);

    assert_says(&must_fail(&join("n2", "weft1-nonsense")), &["token"]);
    let expired = ca.token_at("-2h", "n2", "web", "1h");
    assert_says(&must_fail(&join("n2", &expired)), &["was valid until", "weft token create"]);
    let other = Ca::init("lab.test").token("n2", "web", "1h");
    assert_says(&must_fail(&join("n2", &other)), &["another CA"]);
    let named = ca.token("web-*", "web", "1h");
    assert_says(&must_fail(&join("n2", &named)), &["web-*", "n2"]);
    let taken = ca.token("n1", "web", "1h");
    assert_says(&must_fail(&join("n1", &taken)), &["n1", "10.77.0.1", "10.77.0.2"]);
    n1.wait_members(&["n1=1"]);
}

#[test]
fn a_node_of_another_trust_domain_gets_nowhere() {
    let Some(lab) = Lab::new(2) else { return };
    let (ours, theirs) = (Ca::init("lab.test"), Ca::init("other.test"));
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&ours.issuer())]));
    let stranger = Agent::start(&Spec::on(&lab.host(2), "n2", &["-issuer", path(&theirs.issuer())]));
    let refused = stranger.put("/v1/agent/join/10.77.0.1", "");
    assert!(refused.status >= 400, "{}", refused.body);
    assert_says(&refused.body, &["10.77.0.1"]);
    n1.wait_members(&["n1=1"]);
    stranger.wait_members(&["n2=1"]);
}

#[test]
fn garbage_on_the_mesh_port_changes_nothing() {
    let Some(lab) = Lab::new(3) else { return };
    let ca = Ca::init("lab.test");
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&ca.issuer())]));
    lab.host(3).run(|| {
        let socket = UdpSocket::bind("10.77.0.3:0").unwrap();
        let mut state = 0x2545_F491_4F6C_DD1D_u64;
        for size in (0..1400).chain([9000, 60_000]) {
            let bytes: Vec<u8> = (0..size)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state.to_le_bytes()[0]
                })
                .collect();
            socket.send_to(&bytes, "10.77.0.1:8301").unwrap();
        }
    });
    let token = ca.token("n2", "web", "1h");
    let n2 = Agent::start(&Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", &token]));
    n1.wait_members(&["n1=1", "n2=1"]);
    n2.wait_members(&["n1=1", "n2=1"]);
}

#[test]
fn a_clock_an_hour_off_is_named_with_both_times() {
    let Some(lab) = Lab::new(2) else { return };
    let ca = Ca::init("lab.test");
    let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&ca.issuer())]));
    let token = ca.token("n2", "web", "10h");
    for offset in ["+90m", "-90m"] {
        let mut spec = Spec::on(&lab.host(2), "n2", &["-join", "10.77.0.1", "-token", &token]);
        spec.wrap = at_offset(offset);
        assert_says(&must_fail(&spec), &["clock"]);
    }
    n1.wait_members(&["n1=1"]);
}
