//! The end of tunnels to and from nodes that died.
//!
//! ```text
//!   snapshot: node failed -> a dial to that life is under way -> given up: who waits asks for another instance
//!                         -> a tunnel to or from it is open -> its host refuses the port? -> closed: streams end now
//! ```
//!
//! A request that is on its way to a killed agent would wait until the tunnel's idle limit, and so would what a killed
//! caller has left open here, for which the drain would wait. That a node failed is the membership's word and may be
//! wrong, so it closes nothing by itself: the peer's kernel is asked. A host that says nothing keeps its tunnels until the
//! limit. A dial carries nothing yet: the membership's word is enough.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::paths::Origin;
use super::tunnel::TunnelKey;
use super::worker::Worker;
use crate::catalogue::Snapshot;
use crate::clock;
use crate::model::{Generation, MemberStatus, NodeName};

/// Most dead tunnels, or addresses that they came from, that are asked about at once; the others end at their idle limit.
const ASKED_MAX: usize = 64;
/// Addresses of one node among them: it may have opened tunnels from as many as it likes.
const ORIGINS_MAX: usize = 4;
/// How often a host is asked, and the pause after each wait of 250 ms: it sends one such message a second, and what the
/// tunnels themselves retransmit competes for it.
const QUESTIONS_MAX: usize = 20;
const QUESTIONS_APART: Duration = Duration::from_millis(50);
/// Application code of a tunnel whose node died.
const CODE_DEAD: u32 = 3;
const DIED: &str = "node died";

/// Ends tunnels and dials of dead nodes as the catalogue changes.
pub(super) async fn run(worker: &Rc<Worker>) {
    let mut changes = worker.snapshot().subscribe();
    // A tunnel's host is asked once: either it answers, or the tunnel ends at its idle limit.
    let mut asked: BTreeSet<TunnelKey> = BTreeSet::new();
    let mut asked_of: BTreeSet<Origin> = BTreeSet::new();
    while changes.changed().await.is_ok() {
        let snapshot = Arc::clone(&changes.borrow_and_update());
        let has_failed = |key: &TunnelKey| failed_life(&snapshot, &key.node) == Some(key.generation);
        worker.tunnels().give_up_dials(has_failed);
        let to: BTreeSet<TunnelKey> = worker.tunnels().keys().into_iter().filter(has_failed).collect();
        asked.retain(|key| to.contains(key));
        for key in to {
            if asked.len() < ASKED_MAX && asked.insert(key.clone()) {
                // The drain does not wait for answers: what it would wait for are the streams.
                worker.spawn_untracked(end_if_dead(Rc::clone(worker), key));
            }
        }
        let from = worker.paths.accepted(|node| failed_life(&snapshot, node));
        asked_of.retain(|origin| from.contains_key(origin));
        for (origin, tunnels) in from {
            let of_node = asked_of.iter().filter(|other| other.0 == origin.0).count();
            if asked_of.len() < ASKED_MAX && of_node < ORIGINS_MAX && asked_of.insert(origin.clone()) {
                worker.spawn_untracked(end_accepted_if_dead(Rc::clone(worker), origin, tunnels));
            }
        }
    }
}

async fn end_if_dead(worker: Rc<Worker>, key: TunnelKey) {
    // The key names the life: whatever its host said of late is about it.
    if is_dead(&worker, (&key.node, key.addr, key.generation), Duration::MAX).await {
        info!(node = %key.node, addr = %key.addr, "the node's host says that its port is closed; its tunnel ends");
        worker.tunnels().close(&key, CODE_DEAD.into(), DIED);
    }
}

/// Closes `tunnels`, all that the node had opened from the address when it was found to have failed.
async fn end_accepted_if_dead(worker: Rc<Worker>, (node, addr, life): Origin, tunnels: Vec<quinn::Connection>) {
    // A tunnel does not say which life it is of, so only what is said from here on counts: whoever had opened one by now, in
    // whatever life, is not there then.
    if is_dead(&worker, (&node, addr, life), Duration::ZERO).await {
        let count = tunnels.len();
        info!(%node, %addr, count, "the node's host says that its port is closed; the tunnels from it end");
        // One that has moved since (RFC 9000 §9) lives.
        for tunnel in tunnels.iter().filter(|tunnel| tunnel.remote_address() == addr) {
            tunnel.close(CODE_DEAD.into(), DIED.as_bytes());
        }
    }
}

/// Asks the host until it says that nobody has the port, or the life has not failed after all; what it said within `before`
/// counts as well.
async fn is_dead(worker: &Worker, (node, addr, life): (&NodeName, SocketAddr, Generation), before: Duration) -> bool {
    let began = clock::now();
    for _ in 0..QUESTIONS_MAX {
        let since = clock::now().saturating_duration_since(began);
        if worker.is_port_refused(addr, since.saturating_add(before)).await {
            return true;
        }
        tokio::time::sleep(QUESTIONS_APART).await;
        if failed_life(&worker.snapshot().load(), node) != Some(life) {
            return false;
        }
    }
    false
}

/// Returns the life in which the node has failed.
fn failed_life(snapshot: &Snapshot, node: &NodeName) -> Option<Generation> {
    let node = snapshot.nodes.get(node)?;
    (node.status == MemberStatus::Failed).then_some(node.generation)
}
