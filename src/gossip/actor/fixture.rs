//! An actor that nobody runs, and peers that a test plays.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{Actor, Rules};
use crate::authz::Action;
use crate::catalogue::SnapshotReader;
use crate::clock;
use crate::gossip::exchange::Desks;
use crate::gossip::metrics::GossipMetrics;
use crate::gossip::policy::{self, Compiler};
use crate::gossip::tests::{Ends, params};
use crate::gossip::{LINKS_MAX, Members, documents, shared};
use crate::membership::MeshId;
use crate::metrics::Metrics;
use crate::model::MemberStatus;
use crate::pki::{EphemeralCa, Identity, ephemeral};
use crate::policy::DocumentSet;
use crate::transport::ControlTransport;

/// The actor of the node `own`, and what it shows.
pub(super) struct Lone {
    pub(super) actor: Actor,
    pub(super) members: watch::Receiver<Arc<Members>>,
    pub(super) catalogue: SnapshotReader,
    pub(super) addr: std::net::SocketAddr,
    ca: EphemeralCa,
}

/// A node whose agent the test plays.
pub(super) struct Peer {
    pub(super) id: MeshId,
    pub(super) transport: ControlTransport,
    _ends: Ends,
}

impl Lone {
    pub(super) fn new() -> Self {
        let ca = ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
        let (params, _ends) = params(ca.issuer(), "own", 1, Vec::new(), LINKS_MAX);
        let (views, metrics) = (documents::views(&DocumentSet::new(ca.issuer().bundle())), Metrics::new());
        let compiled = Compiler::new(Action::Allow, &metrics).unwrap().compile(&views);
        let rules = Rules {
            policy: watch::channel(compiled).1,
            upstreams: watch::channel(Arc::new(policy::upstreams(&views))).1,
        };
        let desks = Desks { documents: documents::queue().0, shared: shared::queue().0 };
        let addr = params.node.mesh_addr;
        let (commands, metrics) = (mpsc::channel(1).1, GossipMetrics::new(&metrics).unwrap());
        let (actor, members, catalogue) = Actor::new(params, commands, desks, rules, metrics);
        Self { actor, members, catalogue, addr, ca }
    }

    /// Makes a member of it, which has not spoken yet.
    pub(super) fn peer(&mut self, name: &str) -> Peer {
        let (params, ends) = params(self.ca.issuer(), name, 1, Vec::new(), LINKS_MAX);
        let id = MeshId::new(params.node.name.clone(), params.node.mesh_addr, params.generation);
        self.actor.turn(clock::now(), |engine, turn| engine.vouch_for([&id], turn));
        Peer { id, transport: params.transport, _ends: ends }
    }

    /// Starts an endpoint of the node `name` on `socket`, with the reset key that it had.
    pub(super) fn restarted(&self, name: &str, socket: std::net::UdpSocket) -> ControlTransport {
        let authority = self.ca.issuer().self_certify(&name.parse().unwrap(), &"*".parse().unwrap(), clock::wall());
        let identity = Identity::new(authority.unwrap(), clock::wall()).unwrap();
        socket.set_nonblocking(true).unwrap();
        ControlTransport::new(socket, identity, [7; 64]).unwrap()
    }

    /// Has the peer dial, and the actor take that; returns the peer's end.
    pub(super) async fn is_dialled_by(&mut self, peer: &Peer) -> Connection {
        let transport = self.actor.transport.clone();
        let (dialled, accepted) = tokio::join!(peer.transport.connect(self.addr, None), transport.accept());
        self.actor.accepted(accepted.unwrap(), clock::now());
        dialled.unwrap().0
    }

    pub(super) fn status(&self, peer: &Peer) -> Option<MemberStatus> {
        self.actor.engine.membership().member(&peer.id.name).map(|member| member.status)
    }

    /// Runs the actor until `until` is over.
    pub(super) async fn run<T>(&mut self, until: impl Future<Output = T>) -> T {
        let mut until = pin!(until);
        let deadline = clock::now() + LIMIT;
        loop {
            tokio::select! {
                result = &mut until => return result,
                event = self.actor.select() => self.actor.step(event).await,
                () = tokio::time::sleep_until(deadline) => panic!("it does not come to an end"),
            }
        }
    }
}

/// Waits until `is_so`.
pub(super) async fn wait(mut is_so: impl FnMut() -> bool) {
    let deadline = clock::now() + LIMIT;
    while !is_so() {
        assert!(clock::now() < deadline, "it does not become so");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Longer than anything takes.
const LIMIT: Duration = Duration::from_secs(20);

/// A moment after `now`, when the time is over that somebody has to show that it lives.
pub(super) fn late(now: Instant) -> Instant {
    now + Duration::from_millis(200)
}
