//! The engine alone: its bounds, and what it says without a network.

use super::*;
use crate::model::ServeScope;
use crate::replica::{Digest, VerifiedHead};

/// Signs with the node's name in front of the message.
struct Trust(NodeName);

/// As [`Trust`], after this node's certificate was revoked.
struct Revoking(NodeName);

impl HeadVerifier for Revoking {
    fn verify(&self, _chain: &[Vec<u8>], _message: &[u8], _signature: &[u8]) -> Result<VerifiedHead, String> {
        Err("revoked".to_owned())
    }

    fn is_good(&self, chain: &[Vec<u8>]) -> bool {
        chain[0] != self.0.as_str().as_bytes()
    }
}

impl HeadSigner for Trust {
    fn chain(&self) -> Vec<Vec<u8>> {
        vec![self.0.as_str().as_bytes().to_vec()]
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, String> {
        Ok(crate::wire::encode(&(self.0.clone(), message.len())).unwrap())
    }
}

impl HeadVerifier for Trust {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String> {
        let node: NodeName = String::from_utf8(chain[0].clone()).unwrap().parse().unwrap();
        if signature != Self(node.clone()).sign(message)? {
            return Err("bad signature".to_owned());
        }
        let scope: ServeScope = "*".parse().unwrap();
        Ok(VerifiedHead { node, scope, not_after: UnixSeconds(u64::MAX) })
    }
}

const WALL: UnixSeconds = UnixSeconds(1_800_000_000);

fn turn(trust: &Trust, now: Instant) -> Turn<'_> {
    Turn { now, wall: WALL, signer: trust, verifier: trust }
}

fn engine(number: usize, now: Instant) -> (Engine, Trust) {
    let name: NodeName = format!("n{number}").parse().unwrap();
    let trust = Trust(name.clone());
    let node = NodeInfo {
        id: "id".to_owned(),
        name,
        mesh_addr: SocketAddr::from(([10, 0, 0, u8::try_from(number).unwrap()], 8301)),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: "test".to_owned(),
        issuer: false,
    };
    let params = Params {
        node,
        generation: Generation { number: 1, nonce: 1 },
        profile: Profile::default(),
        replica: replica::Params::default(),
        records: BTreeMap::new(),
        seeds: Vec::new(),
        known_peers: Vec::new(),
        sync_interval: Duration::from_secs(5),
    };
    let engine = Engine::new(params, 1, &turn(&trust, now));
    (engine, trust)
}

fn exchanges(engine: &mut Engine) -> Vec<(Exchange, Message, Stage)> {
    let outputs = std::iter::from_fn(|| engine.poll_output());
    let begun = outputs.filter_map(|output| match output {
        Output::Exchange { exchange, message, stage, .. } => Some((exchange, message, stage)),
        _ => None,
    });
    begun.collect()
}

#[test]
fn at_most_eight_comparisons_run_at_once_and_one_per_peer() {
    let now = crate::clock::now();
    let (mut engine, trust) = engine(0, now);
    let names: Vec<NodeName> = (1..20).map(|number| format!("n{number}").parse().unwrap()).collect();
    for name in names.iter().chain(&names) {
        engine.start_sync(name, SYNC_ROUNDS);
    }
    let begun = exchanges(&mut engine);
    assert_eq!(begun.len(), SYNCS_MAX);
    let (ended, ..) = &begun[0];
    engine.handle_end(ended, Ending::Failed, &turn(&trust, now));
    engine.start_sync(&names[15], SYNC_ROUNDS);
    assert_eq!(engine.sizes().syncs, SYNCS_MAX);
}

#[test]
fn two_engines_are_equal_after_one_comparison_and_the_second_round_says_so() {
    let now = crate::clock::now();
    let (mut a, trust_a) = engine(1, now);
    let (mut b, trust_b) = engine(2, now);
    let (name_a, name_b) = (a.node().name.clone(), b.node().name.clone());
    a.start_sync(&name_b, SYNC_ROUNDS);
    let (_, mut message, mut stage_a) = exchanges(&mut a).remove(0);
    let mut stage_b = Stage::Asked;
    let mut streams = 1;
    loop {
        let step = b.handle_message(&name_a, stage_b, message, &turn(&trust_b, now));
        let reply = match step {
            Step::Say(reply, next) => {
                stage_b = next;
                reply
            }
            Step::Last(reply) => reply,
            Step::Done => Message::End,
            Step::Again(..) => panic!("the answerer begins nothing"),
        };
        match a.handle_message(&name_b, stage_a, reply, &turn(&trust_a, now)) {
            Step::Say(next, stage) => (message, stage_a) = (next, stage),
            Step::Again(next, stage) => {
                (message, stage_a, stage_b) = (next, stage, Stage::Asked);
                streams += 1;
            }
            Step::Done => break,
            Step::Last(_) => panic!("the beginner hears the end"),
        }
    }
    assert_eq!(a.replica().set_hash(), b.replica().set_hash());
    assert_eq!((a.sizes().nodes, b.sizes().nodes, streams), (2, 2, 2));
}

#[test]
fn a_message_that_is_not_awaited_ends_the_exchange() {
    let now = crate::clock::now();
    let (mut engine, trust) = engine(0, now);
    let peer: NodeName = "n1".parse().unwrap();
    let pull = Message::Request(Request::Pull(vec![Digest::none(peer.clone())]));
    let step = engine.handle_message(&peer, Stage::Taking, pull, &turn(&trust, now));
    assert!(matches!(step, Step::Done), "{step:?}");
}

#[test]
fn a_stranger_that_calls_itself_otherwise_than_its_certificate_is_not_let_in() {
    let now = crate::clock::now();
    let (mut engine, trust) = engine(0, now);
    let id = MeshId::new("n5".parse().unwrap(), SocketAddr::from(([10, 0, 0, 5], 8301)), Generation::default());
    let hello = Message::Request(Request::Hello(id));
    let step = engine.handle_message(&"n1".parse().unwrap(), Stage::Asked, hello, &turn(&trust, now));
    let Step::Last(Message::Hello(HelloReply::Refused(reason))) = step else { panic!("{step:?}") };
    assert!(reason.contains("n1") && reason.contains("n5"), "{reason}");
}

#[test]
fn a_revoked_member_is_out_of_the_membership_at_once_and_a_later_life_brings_it_back() {
    let now = crate::clock::now();
    let (mut engine, trust) = engine(0, now);
    let (other, other_trust) = self::engine(1, now);
    let name = other.node().name.clone();
    let life = |number| MeshId::new(name.clone(), other.node().mesh_addr, Generation { number, nonce: 1 });
    engine.vouch_for([&life(1)], &turn(&trust, now));
    let delta = other.replica().delta_for(&Digest::none(name.clone())).unwrap();
    engine.merge(&delta, &turn(&other_trust, now)).unwrap();
    assert_eq!((engine.status_of(&name), engine.membership().alive_count()), (MemberStatus::Alive, 1));

    let revoking = Revoking(name.clone());
    engine.handle_trust(&Turn { verifier: &revoking, ..turn(&trust, now) });
    assert_eq!((engine.status_of(&name), engine.membership().alive_count()), (MemberStatus::Failed, 0));
    assert_eq!(engine.membership().member(&name).unwrap().status, MemberStatus::Failed, "no probe has to fail first");
    assert!(engine.replica().state(&name).is_none());
    while engine.poll_output().is_some() {}
    let mut at = now;
    while at < now + Duration::from_secs(3) {
        at = engine.poll_timeout().max(at);
        engine.handle_timeout(&turn(&trust, at));
        while let Some(output) = engine.poll_output() {
            assert!(
                !matches!(output, Output::Send { .. }),
                "nobody else is there, and it is probed no more: {output:?}"
            );
        }
    }

    engine.vouch_for([&life(2)], &turn(&trust, at));
    assert_eq!(engine.membership().member(&name).unwrap().status, MemberStatus::Alive);
    assert_eq!(engine.status_of(&name), MemberStatus::Failed, "it has to publish under its new certificate first");
}
