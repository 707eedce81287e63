//! Exchanges of gossip on streams, and the deltas in them.

use std::collections::BTreeMap;
use std::time::Duration;

use rustls::pki_types::CertificateDer;

use super::{NOW, fixture, stable};
use crate::gossip::engine::{Engine, Message, Params, Request, Stage, Step, Turn};
use crate::membership::Profile;
use crate::model::{Generation, NodeInfo, NodeName};
use crate::pki::verify_signed_by_node;
use crate::replica::{self, Applied, Delta, HeadSigner, HeadVerifier, Replica, VerifiedHead};
use crate::wire::FRAME_BYTES_MAX;

/// More outputs than one message of 256 KiB may cause: a verification, a send and an event for each of its statements.
const OUTPUTS_MAX: usize = 8192;

/// Signs the own records, which nobody checks; believes what the corpus' root leads to.
struct Keys;

impl HeadSigner for Keys {
    fn chain(&self) -> Vec<Vec<u8>> {
        Vec::new()
    }

    fn sign(&self, _message: &[u8]) -> Result<Vec<u8>, String> {
        Ok(vec![0; 70])
    }
}

impl HeadVerifier for Keys {
    fn verify(&self, chain: &[Vec<u8>], message: &[u8], signature: &[u8]) -> Result<VerifiedHead, String> {
        let chain: Vec<CertificateDer<'_>> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let verified = verify_signed_by_node(&chain, message, signature, &fixture().bundle, NOW);
        let (node, scope, not_after) = verified.map_err(|error| error.to_string())?;
        Ok(VerifiedHead { node, scope, not_after })
    }
}

fn own() -> NodeName {
    "own".parse().unwrap()
}

/// Nothing of anybody is held but what the corpus' node signed.
fn check(replica: &Replica) {
    for (node, state) in replica.nodes() {
        assert!(*node == own() || fixture().digests.contains(state.digest()), "records of {node} that nobody signed");
    }
}

/// A delta that reaches a replica.
pub(super) fn delta(bytes: &[u8]) {
    let Some(delta) = stable::<Delta>(bytes, FRAME_BYTES_MAX) else { return };
    let mut replica = Replica::new(own(), Generation { number: 1, nonce: 1 }, replica::Params::default());
    if let Ok(Applied::Updated) = replica.apply(&delta, &Keys, NOW) {
        let whole = replica.delta_for(&replica::Digest::none(delta.node().clone())).expect("it is held");
        assert_eq!(whole.digest(), delta.digest());
        assert!(matches!(replica.apply(&whole, &Keys, NOW), Ok(Applied::Stale)));
    }
    check(&replica);
}

/// A message of an exchange: the first byte says what is awaited, the rest is a frame.
pub(super) fn exchange(bytes: &[u8]) {
    let Some((kind, frame)) = bytes.split_first() else { return };
    let rounds_left = 1;
    let stage = match kind {
        0 => Stage::Asked,
        1 => Stage::Comparing,
        2 => Stage::Taking,
        3 => Stage::Greeting,
        4 => Stage::Pulling,
        5 => Stage::Leaving,
        6 => Stage::Opening { rounds_left },
        7 => Stage::Trading { rounds_left },
        _ => Stage::Ending { rounds_left },
    };
    let Ok(message) = stage.decode(frame) else { return };
    let again = message.encode().expect("what was decoded encodes");
    assert!(matches!(message, Message::Noted) || again.len() <= frame.len());
    let back = stage.decode(&again).expect("what was encoded decodes");
    assert_eq!(back.encode().unwrap(), again);

    let now = crate::clock::now();
    let turn = Turn { now, wall: NOW, signer: &Keys, verifier: &Keys };
    let mut engine = engine(&turn);
    while engine.poll_output().is_some() {}
    // The carrier hands these to the documents and the shared maps, or answers itself: none comes to the engine.
    if matches!(message, Message::Request(Request::Documents(_) | Request::Shared(_) | Request::RoundTrips)) {
        return;
    }
    let peer = fixture().digests[0].node.clone();
    let step = engine.handle_message(&peer, stage, message, &turn);
    if let Step::Say(reply, _) | Step::Again(reply, _) | Step::Last(reply) = step {
        assert!(reply.encode().expect("an answer encodes").len() <= FRAME_BYTES_MAX);
    }
    let outputs = std::iter::from_fn(|| engine.poll_output()).take(OUTPUTS_MAX).count();
    assert!(outputs < OUTPUTS_MAX, "one message, {outputs} outputs");
    check(engine.replica());
}

fn engine(turn: &Turn<'_>) -> Engine {
    let node = NodeInfo {
        id: "id".to_owned(),
        name: own(),
        mesh_addr: "10.0.0.1:8301".parse().unwrap(),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: "fuzz".to_owned(),
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
    Engine::new(params, 1, turn)
}
