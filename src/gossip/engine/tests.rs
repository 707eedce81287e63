//! The engine alone: its bounds, and what it says without a network.

use super::records::PULL_PATIENCE;
use super::*;
use crate::membership::Broadcast;
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

/// As [`Trust`], after a renewal of the node's certificate; with a new key or with the one that the node had.
struct Renewed(NodeName, Key);

#[derive(Clone, Copy)]
enum Key {
    New,
    Same,
}

impl HeadSigner for Renewed {
    fn chain(&self) -> Vec<Vec<u8>> {
        vec![self.0.as_str().as_bytes().to_vec(), b"renewed".to_vec()]
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, String> {
        let mut signature = Trust(self.0.clone()).sign(message)?;
        signature.extend(matches!(self.1, Key::New).then_some(b'2'));
        Ok(signature)
    }
}

impl HeadVerifier for Renewed {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String> {
        let signed = if chain.len() == 1 { Trust(self.0.clone()).sign(message)? } else { self.sign(message)? };
        let scope: ServeScope = "*".parse().unwrap();
        let head = VerifiedHead { node: self.0.clone(), scope, not_after: UnixSeconds(u64::MAX) };
        if signed == signature { Ok(head) } else { Err("bad signature".to_owned()) }
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

/// `from` tells `engine` that it holds the records of `of`.
fn tell_of(engine: &mut Engine, trust: &Trust, from: usize, of: usize, now: Instant) {
    let from = MeshId::new(name(from), SocketAddr::from(([10, 0, 1, 1], 8301)), Generation::default());
    let generation = Generation { number: 1, nonce: 1 };
    let broadcast = Broadcast::IHave { node: name(of), generation, version: 1, hash: 7 };
    engine.received(&from, &broadcast, &turn(trust, now));
}

fn name(number: usize) -> NodeName {
    format!("n{number}").parse().unwrap()
}

/// The pulls that `engine` has begun: from whom, and of how many states.
fn pulls(engine: &mut Engine) -> Vec<(String, usize)> {
    let begun = exchanges(engine).into_iter().filter_map(|(exchange, message, _)| match (exchange, message) {
        (Exchange::Pull(peer), Message::Request(Request::Pull(have))) => Some((peer.to_string(), have.len())),
        _ => None,
    });
    begun.collect()
}

#[test]
fn what_one_packet_tells_of_is_pulled_at_once_and_together_and_a_storm_of_it_in_batches() {
    let now = crate::clock::now() + Duration::from_mins(1);
    let (mut engine, trust) = engine(0, now);
    for of in 100..130 {
        tell_of(&mut engine, &trust, 1, of, now);
    }
    engine.settle(&turn(&trust, now));
    assert_eq!(pulls(&mut engine), [("n1".to_owned(), 30)]);
    // Many tell of one each. The last pull that the pace allows asks for all of it.
    let most = usize::try_from(PULL_BURST).unwrap();
    for from in 2..40 {
        tell_of(&mut engine, &trust, from, 200 + from, now);
    }
    engine.settle(&turn(&trust, now));
    let begun = pulls(&mut engine);
    assert_eq!(begun.len(), most - 1);
    assert_eq!(begun.iter().map(|(_, states)| states).sum::<usize>(), 38);
    assert_eq!(begun.iter().filter(|(_, states)| *states == 1).count(), most - 2);
    assert_eq!((engine.sizes().pulls, engine.sizes().wanted), (PULLS_MAX, 68));
    // Who answers with nothing is asked again, by the pace, and others are asked for what they told of.
    for (peer, _) in &begun {
        engine.handle_end(&Exchange::Pull(peer.parse().unwrap()), Ending::Complete, &turn(&trust, now));
    }
    assert!(pulls(&mut engine).is_empty(), "not before its time");
    assert!(engine.poll_timeout() <= now + PULL_EVERY);
    engine.handle_timeout(&turn(&trust, now + PULL_EVERY));
    assert_eq!(pulls(&mut engine).iter().map(|(_, states)| *states).collect::<Vec<_>>(), [38]);
}

#[test]
fn a_state_that_does_not_come_is_asked_of_others_and_given_up_in_the_end() {
    let now = crate::clock::now() + Duration::from_mins(1);
    let (mut engine, trust) = engine(0, now);
    let end = |engine: &mut Engine, peer: usize, ending| {
        engine.handle_end(&Exchange::Pull(name(peer)), ending, &turn(&trust, now));
    };
    tell_of(&mut engine, &trust, 1, 9, now);
    engine.settle(&turn(&trust, now));
    tell_of(&mut engine, &trust, 2, 9, now);
    end(&mut engine, 1, Ending::Failed);
    assert_eq!(pulls(&mut engine), [("n1".to_owned(), 1), ("n2".to_owned(), 1)]);
    end(&mut engine, 2, Ending::Complete);
    assert_eq!(pulls(&mut engine), [("n2".to_owned(), 1)]);
    end(&mut engine, 2, Ending::Complete);
    assert_eq!((pulls(&mut engine), engine.sizes().wanted), (Vec::new(), 0));
    tell_of(&mut engine, &trust, 3, 9, now);
    engine.settle(&turn(&trust, now));
    end(&mut engine, 3, Ending::NoLink);
    assert_eq!((pulls(&mut engine).len(), engine.sizes().wanted), (1, 0), "who cannot be reached is not asked again");
}

#[test]
fn a_liar_that_tells_of_everything_and_never_answers_holds_it_for_a_second_alone() {
    let now = crate::clock::now() + Duration::from_mins(1);
    let (mut engine, trust) = engine(0, now);
    (100..130).for_each(|of| tell_of(&mut engine, &trust, 1, of, now));
    engine.settle(&turn(&trust, now));
    assert_eq!(pulls(&mut engine), [("n1".to_owned(), 30)]);
    // Another has them as well; the liar says its part again, and always last.
    for of in 100..130 {
        tell_of(&mut engine, &trust, 2, of, now);
        tell_of(&mut engine, &trust, 1, of, now);
    }
    engine.settle(&turn(&trust, now));
    assert!(pulls(&mut engine).is_empty(), "it has its time");
    assert!(engine.poll_timeout() <= now + PULL_PATIENCE);
    let later = now + PULL_PATIENCE;
    engine.handle_timeout(&turn(&trust, later));
    assert_eq!(pulls(&mut engine), [("n2".to_owned(), 30)]);
    // The end of the pull that stalled takes nothing from the one that runs, and nobody believes the liar before the other.
    engine.handle_end(&Exchange::Pull(name(1)), Ending::Failed, &turn(&trust, later));
    (100..130).for_each(|of| tell_of(&mut engine, &trust, 1, of, later));
    engine.settle(&turn(&trust, later));
    assert_eq!((pulls(&mut engine), engine.sizes().wanted, engine.sizes().pulls), (Vec::new(), 30, 1));
    engine.handle_end(&Exchange::Pull(name(2)), Ending::Complete, &turn(&trust, later));
    assert_eq!(pulls(&mut engine), [("n2".to_owned(), 30)], "it told of them, and has not brought them yet");
}

#[test]
fn a_renewal_with_a_new_key_has_the_own_word_said_anew_and_one_with_the_same_key_does_not() {
    for (key, want) in [(Key::New, 1), (Key::Same, 0)] {
        let now = crate::clock::now();
        let (mut engine, trust) = engine(1, now);
        let word = |engine: &Engine| engine.membership().own_word().unwrap().clone();
        assert_eq!(word(&engine).incarnation, 0);
        let renewed = Renewed(trust.0.clone(), key);
        let at =
            |seconds| Turn { signer: &renewed, verifier: &renewed, ..turn(&trust, now + Duration::from_secs(seconds)) };
        engine.handle_timeout(&at(7));
        assert_eq!(engine.replica().state(&trust.0).unwrap().chain(), renewed.chain());
        assert_eq!(word(&engine).incarnation, 0, "the others have to learn of the certificates first");
        engine.handle_timeout(&at(14));
        let word = word(&engine);
        assert_eq!(word.incarnation, want);
        let (signature, word) = (word.signature.clone(), crate::membership::Statement::Life(word));
        assert!(renewed.verify(&renewed.chain(), &word.message().unwrap(), &signature).is_ok());
        engine.handle_timeout(&at(21));
        assert_eq!(engine.membership().own_word().unwrap().incarnation, want, "once");
    }
}

/// As [`Trust`], of one who holds another node's certificates in the place of a stranger's.
struct Misled(Trust, NodeName);

impl HeadVerifier for Misled {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String> {
        self.0.verify(chain, message, signature)
    }

    fn chain_of(&self, _node: &NodeName) -> Option<Vec<Vec<u8>>> {
        Some(Trust(self.1.clone()).chain())
    }
}

#[test]
fn a_word_that_another_node_signed_proves_nothing() {
    let now = crate::clock::now();
    for (signer, want) in [(1, true), (5, false)] {
        let (mut engine, trust) = engine(0, now);
        let id = MeshId::new(name(1), SocketAddr::from(([10, 0, 0, 1], 8301)), Generation { number: 1, nonce: 1 });
        let claim = crate::membership::LifeClaim { id, incarnation: 0, signature: Vec::new() };
        let word = crate::membership::Statement::Life(claim);
        let signature = Trust(name(signer)).sign(&word.message().unwrap()).unwrap();
        let misled = Misled(Trust(name(0)), name(signer));
        engine.verify(word.with_signature(signature), &Turn { verifier: &misled, ..turn(&trust, now) });
        assert_eq!(engine.membership().member(&name(1)).is_some(), want, "signed by n{signer}");
    }
}

#[test]
fn a_delta_counts_under_the_version_alone_that_its_broadcast_names() {
    let now = crate::clock::now();
    let (mut engine, _) = engine(0, now);
    let (other, other_trust) = self::engine(1, now);
    let delta = other.replica().delta_for(&Digest::none(name(1))).unwrap();
    let payload = crate::wire::encode(&delta).unwrap();
    let Digest { node, generation, version, hash } = delta.digest();
    let from = MeshId::new(name(2), SocketAddr::from(([10, 0, 0, 2], 8301)), Generation::default());
    for (claimed, want) in [(version + 1, false), (version, true)] {
        let (node, payload) = (node.clone(), payload.clone());
        let broadcast = Broadcast::Delta { node, generation, version: claimed, hash, payload };
        engine.received(&from, &broadcast, &turn(&other_trust, now));
        assert_eq!(engine.replica().state(&name(1)).is_some(), want, "version {claimed}");
    }
}

#[test]
fn the_records_of_who_left_go_and_do_not_come_back_in_that_life() {
    let now = crate::clock::now();
    let (mut engine, trust) = engine(0, now);
    let (other, other_trust) = self::engine(1, now);
    let id = other.membership().id().clone();
    engine.vouch_for([&id], &turn(&trust, now));
    let delta = other.replica().delta_for(&Digest::none(name(1))).unwrap();
    engine.merge(&delta, &turn(&other_trust, now)).unwrap();
    let (node, by) = (name(1), name(1));
    let leave = crate::membership::Leave { node, life: id.life, prune: false, by, signature: vec![1] };
    let word = crate::membership::Statement::Leave(leave);
    engine.core.handle_verified(word, crate::membership::Verdict::Holds, now);
    engine.settle(&turn(&trust, now));
    assert_eq!(engine.status_of(&name(1)), MemberStatus::Left);
    assert!(engine.replica().state(&name(1)).is_none(), "they go with it");
    assert!(engine.merge(&delta, &turn(&other_trust, now)).is_none());
    assert!(engine.replica().state(&name(1)).is_none(), "somebody else still had them");
    tell_of(&mut engine, &trust, 2, 1, now);
    engine.settle(&turn(&trust, now));
    assert_eq!((pulls(&mut engine), engine.sizes().wanted), (Vec::new(), 0));
}

#[test]
fn who_speaks_in_another_s_name_loses_its_connection() {
    let now = crate::clock::now();
    let (mut engine, trust) = engine(0, now);
    let (mut other, other_trust) = self::engine(1, now);
    other.vouch_for([engine.membership().id()], &turn(&other_trust, now));
    other.core.announce(engine.membership().id().clone(), now);
    other.settle(&turn(&other_trust, now));
    let outputs = std::iter::from_fn(|| other.poll_output());
    let packets: Vec<_> = outputs
        .filter_map(|output| match output {
            Output::Send { packet, .. } => Some(packet),
            _ => None,
        })
        .collect();
    let closed = |engine: &mut Engine| {
        let outputs = std::iter::from_fn(|| engine.poll_output());
        let closed = outputs.filter_map(|output| match output {
            Output::Close { peer, .. } => Some(peer),
            _ => None,
        });
        closed.collect::<BTreeSet<_>>()
    };
    closed(&mut engine);
    assert!(!packets.is_empty());
    for packet in &packets {
        engine.handle_packet(&name(1), packet, &turn(&trust, now));
    }
    assert_eq!(closed(&mut engine), BTreeSet::new());
    for packet in &packets {
        engine.handle_packet(&name(2), packet, &turn(&trust, now));
    }
    assert_eq!(closed(&mut engine), [name(2)].into(), "TLS says that it is n2");
}

#[test]
fn silence_is_isolation_for_who_was_awake_and_not_for_who_slept() {
    let begun = crate::clock::now();
    let start = || {
        let (mut engine, trust) = engine(0, begun);
        let id = MeshId::new(name(1), SocketAddr::from(([10, 0, 0, 1], 8301)), Generation { number: 1, nonce: 1 });
        engine.vouch_for([&id], &turn(&trust, begun));
        (engine, trust)
    };
    let (mut awake, trust) = start();
    let mut isolated = None;
    while isolated.is_none() {
        let at = awake.poll_timeout();
        assert!(at < begun + 2 * SILENCE_MAX, "it does not say so");
        awake.handle_timeout(&turn(&trust, at));
        while awake.poll_output().is_some() {}
        isolated = awake.is_isolated().then_some(at - begun);
    }
    assert!(isolated.is_some_and(|after| after <= SILENCE_MAX + Duration::from_millis(1)), "{isolated:?}");
    awake.leave(&turn(&trust, begun + SILENCE_MAX + Duration::from_secs(1)));
    let told = std::iter::from_fn(|| awake.poll_output());
    assert!(!told.into_iter().any(|output| matches!(output, Output::Event(Event::Connected))), "it only goes");
    let (mut slept, trust) = start();
    slept.handle_timeout(&turn(&trust, begun + 3 * SILENCE_MAX));
    assert!(!slept.is_isolated(), "what came meanwhile has yet to be read");
}
