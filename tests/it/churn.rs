//! Registrations that come and go, on real agents: what they hold in the end is what they held before.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::agent::{Agent, Ca, Spec, loopback_ip, path};
use crate::bodies::resident;

/// Rounds of registering and deregistering, each of a name of its own.
const ROUNDS: usize = 10_000;
/// Rounds before it is measured: more than the names of services that are remembered after they went (4,096).
const WARM_UP: usize = 4_500;
/// Side by side.
const CLIENTS: usize = 8;
/// What an agent may hold more in the end: 420 bytes for each round would be as much.
const GROWTH_BYTES_MAX: u64 = 4 << 20;

/// Registers and deregisters `rounds` services on `agent`; `first` is the first one's number.
fn churn(agent: &Agent, first: usize, rounds: usize) {
    let next = AtomicUsize::new(first);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= first + rounds {
                        return;
                    }
                    agent.put_ok(
                        "/v1/agent/service/register",
                        &format!(r#"{{"Name":"churn-{number}","Port":80,"Tags":["round"],"Check":{{"TTL":"1h"}}}}"#),
                    );
                    agent.put_ok(&format!("/v1/agent/service/deregister/churn-{number}"), "");
                }
            });
        }
    });
}

/// By hand: `cargo test --test it ten_thousand -- --ignored --nocapture`, which prints what each agent held before and after.
#[test]
#[ignore = "29,000 registrations, each on disk before it is answered, take minutes; the simulated scenario 14 has as many"]
fn scenario_14_memory_is_what_it_was_after_ten_thousand_real_registrations_came_and_went() {
    let ca = Ca::init("churn.test");
    let n1 = Agent::start(&Spec::loopback(34, "n1", &["-issuer", path(&ca.issuer())]));
    let (join, token) = (loopback_ip(34).to_string(), ca.token("n2", "*", "1h"));
    let n2 = Agent::start(&Spec::loopback(35, "n2", &["-join", &join, "-token", &token]));
    n1.wait_members(&["n1=1", "n2=1"]);
    // The other is through with all of it once it sees what comes last.
    let settle = |last: &str| {
        n2.put_ok("/v1/agent/service/register", &format!(r#"{{"ID":"last","Name":"{last}","Port":80}}"#));
        n1.wait_passing(last, &["last"]);
        [&n1, &n2].map(|agent| resident(agent, "VmRSS:"))
    };
    churn(&n2, 0, WARM_UP);
    let before = settle("warm");
    let begun = Instant::now();
    churn(&n2, WARM_UP, ROUNDS);
    println!("figure: 14: {ROUNDS} rounds in {:.1} s", begun.elapsed().as_secs_f64());
    let after = settle("done");
    for ((agent, before), after) in [&n1, &n2].into_iter().zip(before).zip(after) {
        println!("figure: 14: {} held {} KiB, and {} KiB after them", agent.name, before >> 10, after >> 10);
        let grown = after.saturating_sub(before);
        assert!(grown < GROWTH_BYTES_MAX, "{} grew by {grown} bytes in {ROUNDS} rounds", agent.name);
    }
    let services = n1.get("/v1/catalog/services");
    assert_eq!(services.as_object().unwrap().keys().filter(|name| name.starts_with("churn")).count(), 0, "{services}");
}
