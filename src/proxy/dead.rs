//! The end of tunnels to nodes that died.
//!
//! ```text
//!   snapshot: node failed -> a tunnel to that life is open -> its host refuses the port? -> closed: streams end now
//! ```
//!
//! A request that is on its way to a killed agent would wait until the tunnel's idle limit. That a node failed is the
//! membership's word and may be wrong, so it closes nothing by itself: the peer's kernel is asked. A host that says
//! nothing keeps its tunnels until the limit.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::tunnel::TunnelKey;
use super::worker::Worker;
use crate::catalogue::Snapshot;
use crate::model::MemberStatus;

/// Most dead tunnels that are asked about at once; the others end at their idle limit.
const ASKED_MAX: usize = 64;
/// How often a host is asked, and the pause after each wait of 250 ms: it sends one such message a second, and what the
/// tunnels themselves retransmit competes for it.
const QUESTIONS_MAX: usize = 20;
const QUESTIONS_APART: Duration = Duration::from_millis(50);
/// Application code of a tunnel whose node died.
const CODE_DEAD: u32 = 3;

/// Closes tunnels to dead nodes as the catalogue changes.
pub(super) async fn run(worker: &Rc<Worker>) {
    let mut changes = worker.snapshot().subscribe();
    // A failure is asked about once; the life is over or back before it can fail again.
    let mut asked: BTreeSet<TunnelKey> = BTreeSet::new();
    while changes.changed().await.is_ok() {
        let snapshot = Arc::clone(&changes.borrow_and_update());
        asked.retain(|key| has_failed(&snapshot, key));
        for key in worker.tunnels().keys() {
            if asked.len() < ASKED_MAX && has_failed(&snapshot, &key) && asked.insert(key.clone()) {
                worker.spawn(end_if_dead(Rc::clone(worker), key));
            }
        }
    }
}

async fn end_if_dead(worker: Rc<Worker>, key: TunnelKey) {
    for _ in 0..QUESTIONS_MAX {
        if worker.is_port_refused(key.addr).await {
            info!(node = %key.node, addr = %key.addr, "the node's host says that its port is closed; its tunnel ends");
            worker.tunnels().close(&key, CODE_DEAD.into(), "node died");
            return;
        }
        tokio::time::sleep(QUESTIONS_APART).await;
        if !has_failed(&worker.snapshot().load(), &key) {
            return;
        }
    }
}

/// Tells whether the life that the tunnel leads to has failed.
fn has_failed(snapshot: &Snapshot, key: &TunnelKey) -> bool {
    let node = snapshot.nodes.get(&key.node);
    node.is_some_and(|node| node.status == MemberStatus::Failed && node.generation == key.generation)
}
