//! How policy reaches those whom somebody would keep in the dark: joiners that are fed old documents, members that pass
//! nothing on, and what a flood of bad documents costs.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use weft::authz::{Action, Intention};
use weft::clock::{self, UnixSeconds};
use weft::pki::{DocumentKey, SpkiHash};
use weft::policy::{Content, Document, DocumentId, DocumentKind, HeldDigest, IntentionBody};
use weft::wire::{self, FRAME_BYTES_MAX};

use crate::agent::{Agent, Ca, Spec, at_offset, path};
use crate::lab::{Host, Lab};
use crate::netns_policy::{DENY, metric, offer, operator, verdict, wait_verdict};
use crate::netns_threats::{client, connect, identity};
use crate::wait::until;

/// Signs a version of the intention caller -> raw that begins at `from`.
fn signed(key: &DocumentKey, version: u64, action: Action, from: UnixSeconds) -> Vec<u8> {
    let intention = Intention::plain("caller".parse().unwrap(), "raw".parse().unwrap(), action);
    let content = Content {
        trust_domain: "lab.test".parse().unwrap(),
        id: DocumentId { kind: DocumentKind::Intention, name: "caller:raw".parse().unwrap() },
        version,
        not_before: from,
        not_after: key.validity().unwrap().1,
        signer: SpkiHash([0; 32]),
        body: IntentionBody(Some(intention)).to_bytes().unwrap(),
    };
    Document::sign(content, key).unwrap().to_bytes()
}

/// A mesh whose first host issues, and an operator of its intentions.
struct Mesh {
    ca: Ca,
    key: DocumentKey,
    token: String,
}

impl Mesh {
    fn new(lab: &Lab) -> (Self, Agent) {
        let ca = Ca::init("lab.test");
        let n1 = Agent::start(&Spec::on(&lab.host(1), "n1", &["-issuer", path(&ca.issuer()), DENY]));
        let key = DocumentKey::load_operator(&operator(&ca, "alice", "intentions")).unwrap();
        let token = ca.token("n*", "", "1h");
        (Self { ca, key, token }, n1)
    }

    fn spec<'a>(&self, host: &Host, name: &'a str, seed: &str) -> Spec<'a> {
        Spec::on(host, name, &["-join", seed, "-token", &self.token, DENY])
    }

    fn join(&self, host: &Host, name: &str) -> Agent {
        Agent::start(&self.spec(host, name, "10.77.0.1"))
    }

    /// An agent whose clock is 50 s behind: a version that begins in 50 s counts everywhere else, and is refused by this one
    /// for 40 s, in which it holds, shows and passes on the version before. Nobody can tell it from one that does so on purpose.
    fn join_behind(&self, host: &Host, name: &str) -> Agent {
        let mut spec = self.spec(host, name, "10.77.0.1");
        spec.wrap = at_offset("-50s");
        Agent::start(&spec)
    }
}

fn ahead() -> UnixSeconds {
    clock::wall().plus(Duration::from_secs(50))
}

#[test]
fn a_joiner_that_one_of_three_feeds_old_documents_ends_with_the_newest() {
    let Some(lab) = Lab::new(4) else { return };
    let (mesh, n1) = Mesh::new(&lab);
    let n2 = mesh.join(&lab.host(2), "n2");
    let old = mesh.join_behind(&lab.host(3), "n3");
    for agent in [&n1, &n2, &old] {
        agent.wait_members(&["n1=1", "n2=1", "n3=1"]);
    }
    assert_eq!(offer(&n1, &signed(&mesh.key, 1, Action::Allow, clock::wall())).status, 200);
    for agent in [&n1, &n2, &old] {
        wait_verdict(agent, true, "caller:raw");
    }
    let answer = offer(&n1, &signed(&mesh.key, 2, Action::Deny, ahead())).json();
    assert_eq!((&answer["Confirmed"], &answer["Alive"]), (&1.into(), &2.into()), "n3 does not take it: {answer}");
    wait_verdict(&n2, false, "caller:raw");

    // Through the one that holds on to the old version.
    let newcomer = Agent::spawn(&mesh.spec(&lab.host(4), "n4", "10.77.0.3"), tempfile::TempDir::new().unwrap());
    let (mut answered, mut old_since) = (None, None);
    let newest = until("the newcomer has the newest version", || {
        let seen = verdict(&newcomer)?;
        let now = Instant::now();
        let answered = *answered.get_or_insert(now);
        if seen == (true, "caller:raw".to_owned()) {
            old_since.get_or_insert(now);
        }
        if seen == (false, "caller:raw".to_owned()) { Ok(now - answered) } else { Err(format!("{seen:?}")) }
    });
    assert_eq!(verdict(&old).unwrap(), (true, "caller:raw".to_owned()), "n3 has held on to the old version meanwhile");
    let on_old = old_since.map(|since| since.elapsed());
    println!(
        "figure: a newcomer had the newest version {newest:.2?} after its API answered; on the old one for {on_old:?}"
    );
    assert!(newest < Duration::from_secs(10), "{newest:?}");
}

#[test]
fn a_joiner_that_met_only_a_disk_of_yesterday_has_the_newest_once_it_meets_the_others() {
    let Some(lab) = Lab::new(4) else { return };
    let (mesh, n1) = Mesh::new(&lab);
    let (n2, n3, n4) = (mesh.join(&lab.host(2), "n2"), mesh.join(&lab.host(3), "n3"), mesh.join(&lab.host(4), "n4"));
    for agent in [&n1, &n2, &n3, &n4] {
        agent.wait_members(&["n1=1", "n2=1", "n3=1", "n4=1"]);
    }
    // n4 has its certificate and no document; n3's disk stays behind at the first version.
    let joined = n4.kill();
    assert_eq!(offer(&n1, &signed(&mesh.key, 1, Action::Allow, clock::wall())).status, 200);
    for agent in [&n1, &n2, &n3] {
        wait_verdict(agent, true, "caller:raw");
    }
    let yesterday = n3.kill();
    assert_eq!(offer(&n1, &signed(&mesh.key, 2, Action::Deny, clock::wall())).status, 200);
    wait_verdict(&n2, false, "caller:raw");

    let (now, past) = ([lab.host(1), lab.host(2)], [lab.host(3), lab.host(4)]);
    lab.split(&now, &past);
    let n3 = Agent::spawn(&mesh.spec(&lab.host(3), "n3", "10.77.0.4"), yesterday);
    let n4 = Agent::spawn(&mesh.spec(&lab.host(4), "n4", "10.77.0.3"), joined);
    wait_verdict(&n3, true, "caller:raw");
    // All that it can know: signed, whole and old.
    wait_verdict(&n4, true, "caller:raw");
    for host in now.iter().chain(&past) {
        lab.heal(host);
    }
    let healed = Instant::now();
    for agent in [&n3, &n4] {
        wait_verdict(agent, false, "caller:raw");
        println!(
            "figure: {} had the newest version {:.2?} after it could meet the others",
            agent.name,
            healed.elapsed()
        );
    }
}

/// The first frame of an exchange, as `api/wire.md` has it.
#[derive(Serialize)]
#[expect(dead_code, reason = "the number of the variant is what counts")]
enum First {
    Hello,
    Pull,
    Goodbye,
    Sync,
    Documents(Vec<u8>),
}

#[derive(Serialize)]
enum Said {
    Push(Vec<u8>),
    Compare { set_hash: u64, clock_ms: u64 },
}

#[derive(Debug, PartialEq, Deserialize)]
enum Took {
    Held,
    Older,
    Refused(String),
}

/// Opens a stream and says something about documents.
async fn say(connection: &quinn::Connection, said: &Said) -> (quinn::SendStream, quinn::RecvStream) {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    let first = wire::encode(&First::Documents(wire::encode(said).unwrap())).unwrap();
    wire::write_frame(&mut send, &first).await.unwrap();
    (send, recv)
}

async fn hear<T: serde::de::DeserializeOwned>(recv: &mut quinn::RecvStream) -> T {
    wire::decode(&wire::read_frame(recv, FRAME_BYTES_MAX).await.unwrap(), FRAME_BYTES_MAX).unwrap()
}

async fn push(connection: &quinn::Connection, document: &[u8]) -> Took {
    let (mut send, mut recv) = say(connection, &Said::Push(document.to_vec())).await;
    send.finish().unwrap();
    hear(&mut recv).await
}

#[test]
fn scenario_17_an_insider_that_replays_pretends_and_floods_is_cheap_and_keeps_nobody_from_the_newest() {
    let Some(lab) = Lab::new(3) else { return };
    let (mesh, n1) = Mesh::new(&lab);
    let n2 = mesh.join(&lab.host(2), "n2");
    n1.wait_members(&["n1=1", "n2=1"]);
    let first = signed(&mesh.key, 1, Action::Allow, clock::wall());
    assert_eq!(offer(&n1, &first).status, 200);
    assert_eq!(offer(&n1, &signed(&mesh.key, 2, Action::Deny, clock::wall())).status, 200);
    for agent in [&n1, &n2] {
        wait_verdict(agent, false, "caller:raw");
    }
    // A valid node certificate, and no agent behind it: it says what it likes.
    let stolen = identity(&mesh.ca.issuer(), "n3", "").node_svid();
    let foreign = Ca::init("lab.test");
    let stranger = DocumentKey::load_operator(&operator(&foreign, "alice", "*")).unwrap();
    let forged: Vec<Vec<u8>> = (0..400).map(|at| signed(&stranger, 10 + at, Action::Allow, clock::wall())).collect();
    let next = signed(&mesh.key, 3, Action::Allow, clock::wall());
    let (spread, lasted) = lab.host(3).run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (_, config) = client(&stolen, &stolen);
            let (_endpoint, connection) = connect(&config).await.unwrap();
            assert_eq!(push(&connection, &first).await, Took::Older, "a replay is old news");
            // It pretends to hold newer versions of all that it is shown, so that it is given nothing, and gives the old one.
            let (mut send, mut recv) = say(&connection, &Said::Compare { set_hash: 1, clock_ms: 0 }).await;
            let (_, digests): (u64, Option<Vec<HeldDigest>>) = hear(&mut recv).await;
            let mut digests = digests.expect("the hashes differ");
            assert_eq!((digests.len(), digests[0].digest.version), (1, 2));
            digests[0].digest.version = u64::MAX;
            wire::write_frame(&mut send, &wire::encode(&(vec![first.clone()], digests)).unwrap()).await.unwrap();
            let (given, _): (Vec<Vec<u8>>, Vec<HeldDigest>) = hear(&mut recv).await;
            assert_eq!(given.len(), 0);
            assert_eq!(verdict(&n1).unwrap(), (false, "caller:raw".to_owned()));

            // A flood, eight streams at a time; half-way an operator changes the policy at the node that is flooded.
            let (mut unread, mut spread, flooded) = (0, None, Instant::now());
            for (round, some) in forged.chunks(8).enumerate() {
                let took = futures_util::future::join_all(some.iter().map(|one| push(&connection, one))).await;
                for one in took {
                    let Took::Refused(why) = one else { panic!("a forged document is taken: {one:?}") };
                    unread += u32::from(why.contains("too many"));
                }
                if round == 25 {
                    let begun = Instant::now();
                    assert_eq!(offer(&n1, &next).status, 200);
                    wait_verdict(&n2, true, "caller:raw");
                    spread = Some(begun.elapsed());
                }
            }
            assert!(unread >= 300, "only {unread} of 400 were refused unread");
            (spread.expect("there are more than 25 rounds"), flooded.elapsed())
        })
    });
    println!("figure: beside a flood of forged documents a change took {spread:.2?} to the other node");
    assert!(spread < Duration::from_secs(2), "{spread:?}");
    assert!(metric(&n1, "weft_documents_offered_total{result=\"ignored\"}") >= 300.0);
    let log = n1.log();
    // Each second buys one more look, and what that finds is told again.
    let told = log.lines().filter(|line| line.contains("one bad document after the other")).count();
    assert!((1..=1 + usize::try_from(lasted.as_secs()).unwrap()).contains(&told), "{told} in {lasted:?}: {log}");
}

#[test]
fn an_insider_that_withholds_keeps_nobody_from_a_change() {
    let Some(lab) = Lab::new(4) else { return };
    let (mesh, n1) = Mesh::new(&lab);
    let n2 = mesh.join(&lab.host(2), "n2");
    let n3 = mesh.join(&lab.host(3), "n3");
    let withholds = mesh.join_behind(&lab.host(4), "n4");
    for agent in [&n1, &n2, &n3, &withholds] {
        agent.wait_members(&["n1=1", "n2=1", "n3=1", "n4=1"]);
    }
    assert_eq!(offer(&n1, &signed(&mesh.key, 1, Action::Allow, clock::wall())).status, 200);
    for agent in [&n1, &n2, &n3, &withholds] {
        wait_verdict(agent, true, "caller:raw");
    }
    // The node that the operator tells cannot reach n3: only others can pass it on, and one of the two does not.
    lab.split(&[lab.host(1)], &[lab.host(3)]);
    let change = signed(&mesh.key, 2, Action::Deny, ahead());
    let begun = Instant::now();
    let order = std::thread::scope(|scope| {
        let order = scope.spawn(|| offer(&n1, &change).json());
        wait_verdict(&n3, false, "caller:raw");
        let passed = begun.elapsed();
        println!("figure: past one that withholds, a change took {passed:.2?} to a node that the first cannot reach");
        assert!(passed < Duration::from_secs(1), "{passed:?}");
        order.join().unwrap()
    });
    wait_verdict(&n2, false, "caller:raw");
    assert_eq!(verdict(&withholds).unwrap(), (true, "caller:raw".to_owned()), "it holds on to the old version");
    // The operator is told who did not confirm in number: n3 by its silence, n4 by its refusal.
    assert_eq!((&order["Confirmed"], &order["Alive"]), (&1.into(), &3.into()), "{order}");
}
