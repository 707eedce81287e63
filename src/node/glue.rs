//! Small adapters between the parts: what one part offers, in the shape that another asks for.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use prometheus::{IntCounterVec, Opts};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::reload::Reloader;
use crate::api::{BalancerView, Inspect, Reload, SeatView, TokenUse};
use crate::authz::Action;
use crate::clock::{self, UnixSeconds};
use crate::dns::{RoundTrips, Trips};
use crate::gossip::{
    Changes, DocumentStore, DocumentsHandle, DocumentsParams, GossipHandle, PeerStore, SharedHandle, SharedParams,
    SharedStore, Space,
};
use crate::hearsay::Seldom;
use crate::join::{JoinDirectory, JoinServer, JoinTrust, TokenLedger};
use crate::lww::Scope;
use crate::metrics::Metrics;
use crate::model::{MemberStatus, NodeInfo, NodeName};
use crate::pki::{Identity, IssuerCell, Plane, TrustBundle};
use crate::policy::{Document, DocumentSet, Refused};
use crate::prepared::Book;
use crate::proxy::{Inspector, OpenTunnel, Question, WorkerView};
use crate::routing::{GroupView, Standing};
use crate::store::{Store, StoreError, StoredPeer};
use crate::supervise::{Tasks, catch};
use crate::telemetry::Chain;
use crate::transport::{Accepted, Cause, Closed, ControlTransport, LiveConnections};

/// Join exchanges at once; a newcomer beyond them is closed and tries again.
const JOINS_MAX: usize = 32;
/// Join exchanges of one address at once: a host joins once; a few may stand behind one NAT.
const JOINS_PER_ADDRESS_MAX: usize = 4;
/// So often the prepared queries are read at most: up to 4 MiB of JSON, which any peer may have changed without a pause. And
/// so often they are read where all places to wait for a change are taken.
const QUERIES_READ_EVERY: Duration = Duration::from_secs(1);
/// Application code of a connection that is closed because there are too many.
const CODE_BUSY: u32 = 4;

/// Tells DNS what agents measured: this one, or another that is asked.
pub(super) struct MeasuredBy {
    pub(super) gossip: GossipHandle,
    pub(super) here: NodeName,
}

impl RoundTrips for MeasuredBy {
    fn from(&self, node: NodeName) -> BoxFuture<'static, Option<Trips>> {
        let (gossip, is_here) = (self.gossip.clone(), node == self.here);
        Box::pin(async move {
            if is_here { gossip.round_trips().await.ok() } else { gossip.round_trips_of(node).await.ok().flatten() }
        })
    }
}

/// Keeps the prepared queries decoded, for whoever cannot wait for them; ends with the shared maps.
pub(super) async fn follow_queries(shared: SharedHandle, book: Arc<ArcSwap<Book>>) {
    let all = || Scope::Prefix(String::new());
    loop {
        let Ok(answer) = shared.read(Space::Query, all()).await else { return };
        book.store(Arc::new(Book::of(&answer.rows)));
        tokio::time::sleep(QUERIES_READ_EVERY).await;
        let _no_place_to_wait = shared.changed(Space::Query, all(), answer.index).await;
    }
}

/// Keeps the peers for the next start.
pub(super) struct PeerFile(pub(super) Store);

impl PeerStore for PeerFile {
    fn save(&self, peers: Vec<StoredPeer>) {
        if let Err(err) = self.0.put_peers(&peers) {
            warn!(error = %Chain(&err), "could not keep the known peers; after a restart the seeds must answer");
        }
    }
}

/// Keeps signed documents on disk.
struct DocumentFile(Store);

impl DocumentStore for DocumentFile {
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), String> {
        self.0.put_document(key, bytes).map_err(|err| Chain(&err).to_string())
    }

    fn remove(&self, key: &str) -> Result<(), String> {
        self.0.remove_document(key).map_err(|err| Chain(&err).to_string())
    }
}

/// Keeps the records that all agents share on disk.
struct SharedFile(Store);

impl SharedStore for SharedFile {
    fn rows(&self, without: Option<&str>) -> Result<Vec<(String, Vec<u8>)>, String> {
        self.0.shared(without).map_err(|err| Chain(&err).to_string())
    }

    fn write(&self, changes: &Changes) -> Result<(), String> {
        self.0.write_shared(changes).map_err(|err| Chain(&err).to_string())
    }
}

/// What the shared maps need.
pub(super) fn shared(store: &Store, kv_bytes_max: Option<u64>) -> SharedParams {
    SharedParams { kv_bytes_max, store: Arc::new(SharedFile(store.clone())) }
}

/// Reads the documents of the last run, as far as they still count for a node that believes `base`.
pub(super) fn stored_documents(store: &Store, base: &TrustBundle) -> Result<DocumentSet, StoreError> {
    let mut set = DocumentSet::new(base);
    for bytes in store.documents()? {
        let document = match Document::from_bytes(&bytes) {
            Ok(document) => document,
            Err(err) => {
                warn!(error = %Chain(&err), "a document on disk is unreadable; others bring it again");
                continue;
            }
        };
        let id = document.content().id.clone();
        match set.offer(document, clock::wall()) {
            Ok(_) => {}
            Err(Refused::Ended { .. }) => store.remove_document(&id.to_string())?,
            // Signed by somebody who was revoked since, or this host's clock is wrong: it may count again.
            Err(error) => warn!(document = %id, error = %Chain(&error), "a document on disk does not count"),
        }
    }
    Ok(set)
}

/// What an issuer believes, and what leads others there.
struct MeshTrust {
    identity: Arc<Identity>,
    documents: DocumentsHandle,
}

impl JoinTrust for MeshTrust {
    fn bundle(&self) -> Arc<TrustBundle> {
        self.identity.bundle()
    }

    fn links(&self) -> Vec<Vec<u8>> {
        self.documents.view().links.clone()
    }
}

/// Reads the documents of the last run and lets `identity` believe what follows from them.
pub(super) fn believe(store: &Store, identity: &Identity) -> Result<DocumentSet, StoreError> {
    let set = stored_documents(store, identity.authority().bundle())?;
    identity.set_bundle(set.bundle(), clock::wall());
    Ok(set)
}

/// What answers newcomers and renewals.
pub(super) fn join_server(
    issuer: &Arc<IssuerCell>,
    identity: &Arc<Identity>,
    gossip: &GossipHandle,
    own: &NodeInfo,
    store: &Store,
) -> Arc<JoinServer> {
    let directory = Directory { gossip: gossip.clone(), own: own.clone() };
    let trust = MeshTrust { identity: Arc::clone(identity), documents: gossip.documents().clone() };
    let ledger = TokenFile(store.clone());
    JoinServer::new(Arc::clone(issuer), Arc::new(trust), Arc::new(directory), Arc::new(ledger))
}

/// What the documents need: where they are kept, and who hears of them.
pub(super) fn documents(
    set: DocumentSet,
    store: &Store,
    connections: &Connections,
    issuer: &Arc<IssuerCell>,
    default_policy: Action,
) -> DocumentsParams {
    let (rechecked, adopting) = (connections.clone(), Arc::clone(issuer));
    DocumentsParams {
        set,
        default_policy,
        store: Arc::new(DocumentFile(store.clone())),
        // Revocations alone: whether an ended certificate was renewed is looked at by the renewal task.
        on_trust: Arc::new(move |set, bundle| {
            if adopting.adopt(&set.issuer_certificates(), bundle) {
                info!("the mesh has a new root; this node's issuer signs under it from here on");
            }
            rechecked.recheck(bundle, clock::wall(), |_| true);
        }),
    }
}

/// All connections of the node, by whose peers' certificates they stand.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    pub(super) control: LiveConnections,
    pub(super) tunnels: LiveConnections,
    pub(super) closed: IntCounterVec,
}

impl Connections {
    pub(super) fn new(control: &ControlTransport, metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let name = "weft_identity_connections_closed_total";
        let opts = Opts::new(name, "Open connections closed because their peer is no longer believed.");
        let closed = metrics.add(IntCounterVec::new(opts, &["reason"])?)?;
        Ok(Self { control: control.live().clone(), tunnels: LiveConnections::default(), closed })
    }

    /// Closes what `bundle` no longer believes; `is_current` tells whether a node shows a good certificate.
    pub(super) fn recheck(&self, bundle: &TrustBundle, now: UnixSeconds, is_current: impl Fn(&NodeName) -> bool) {
        let mut by_node: BTreeMap<(NodeName, Cause), usize> = BTreeMap::new();
        for live in [&self.tunnels, &self.control] {
            for Closed { node, cause } in live.recheck(bundle, now, &is_current) {
                self.closed.with_label_values(&[cause.as_str()]).inc();
                *by_node.entry((node, cause)).or_default() += 1;
            }
        }
        for ((node, cause), connections) in by_node {
            warn!(%node, reason = cause.as_str(), connections, "closed connections whose peer is no longer believed");
        }
    }
}

/// Counts the uses of tokens on disk.
struct TokenFile(Store);

impl TokenLedger for TokenFile {
    fn count_use(&self, id: [u8; 16], not_after: u64, key: [u8; 32]) -> Result<Option<u32>, String> {
        self.0.count_token_use(id, not_after, key).map_err(|err| Chain(&err).to_string())
    }
}

/// Shows what a worker knows of the instances of a call.
fn balancer(group: &GroupView) -> BalancerView {
    let now = clock::now();
    let breaker = |standing| match standing {
        Standing::Closed => ("closed", None),
        Standing::Open { until } => ("open", Some(until.saturating_duration_since(now))),
        Standing::HalfOpen { .. } => ("half-open", None),
    };
    let seats = group.seats.iter().map(|seat| {
        let (breaker, out_for) = breaker(seat.standing);
        SeatView {
            node: seat.node.clone(),
            instance: seat.instance.clone(),
            breaker,
            out_for,
            pending: seat.pending,
            adaptive_limit: seat.adaptive_limit,
            delay: seat.delay,
            is_lowered: seat.is_lowered,
        }
    });
    BalancerView {
        policy: group.algorithm,
        has_table: group.has_table,
        panics: group.panics,
        under_way: group.under_way,
        waiting: group.waiting,
        most: group.most,
        seats: seats.collect(),
    }
}

/// Lets the API ask the data plane.
pub(super) fn inspect(inspector: Inspector) -> Inspect {
    let shape = |view: WorkerView| {
        let node = |tunnel: &OpenTunnel| tunnel.peer.node().cloned();
        let tunnels =
            view.tunnels.iter().filter_map(|tunnel| Some((node(tunnel)?, tunnel.peer.to_string(), tunnel.not_after)));
        crate::api::WorkerView {
            worker: view.worker,
            leg: 0,
            target: view.target.clone(),
            next: view.next.clone(),
            why_none: view.why_none.clone(),
            backing_off: view.backing_off.clone(),
            balancer: balancer(&view.group),
            tunnels: tunnels.collect(),
        }
    };
    Arc::new(move |source, destination, to| {
        let (inspector, question) = (inspector.clone(), Question { source, destination, to });
        Box::pin(async move { inspector.ask(&question).await.into_iter().map(shape).collect() })
    })
}

/// Lets the API reload the configuration.
pub(super) fn reload(reloader: &Arc<Reloader>) -> Reload {
    let reloader = Arc::clone(reloader);
    Arc::new(move || {
        let reloader = Arc::clone(&reloader);
        Box::pin(async move { reloader.reload().await.map_err(|error| error.to_string()) })
    })
}

/// The uses of tokens, for the API.
pub(super) fn token_uses(store: &Store) -> Result<Vec<TokenUse>, String> {
    let counts = store.token_counts().map_err(|err| Chain(&err).to_string())?;
    Ok(counts
        .into_iter()
        .map(|count| TokenUse { id: count.id, uses: count.uses, not_after: count.not_after })
        .collect())
}

/// Answers an issuer's questions from the membership.
struct Directory {
    gossip: GossipHandle,
    own: NodeInfo,
}

impl JoinDirectory for Directory {
    fn live_holder(&self, name: &NodeName) -> Option<SocketAddr> {
        let members = self.gossip.members();
        let live = |status| matches!(status, MemberStatus::Alive | MemberStatus::Leaving);
        let holder = members.members.iter().find(|member| member.name == *name && live(member.status));
        holder.map(|member| member.addr).or_else(|| (*name == self.own.name).then_some(self.own.mesh_addr))
    }

    fn issuers(&self) -> Vec<SocketAddr> {
        let members = self.gossip.members();
        let issues = |info: &Arc<NodeInfo>| info.issuer && info.name != self.own.name;
        let alive = members.members.iter().filter(|member| member.status == MemberStatus::Alive);
        alive.filter(|member| member.info.as_ref().is_some_and(issues)).map(|member| member.addr).collect()
    }
}

/// Hands each connection of the control socket to its plane, until `stop`.
pub(super) async fn accept(
    transport: ControlTransport,
    gossip: mpsc::Sender<Accepted>,
    joins: Arc<JoinServer>,
    tasks: Tasks,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(JOINS_MAX));
    let by_address: Arc<Mutex<BTreeMap<IpAddr, usize>>> = Arc::default();
    let crowds_told = Seldom::default();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = transport.accept() => accepted,
        };
        let Some(accepted) = accepted else { return };
        let remote = accepted.connection.remote_address();
        match accepted.plane {
            Plane::Join => {
                let address = AddressPlace::take(&by_address, remote.ip());
                if let (Ok(place), Some(address)) = (Arc::clone(&places).try_acquire_owned(), address) {
                    let (joins, connection) = (Arc::clone(&joins), accepted.connection);
                    tasks.spawn("join", async move {
                        // A stranger's words: what they may do at worst is end their own exchange.
                        let _failed = catch("join", joins.serve(connection)).await;
                        drop((place, address));
                    });
                } else {
                    if let Some(left_out) = crowds_told.due(clock::now()) {
                        warn!(peer = %remote, joins_max = JOINS_MAX, left_out, "too many joins at once; the newcomer must try again");
                    }
                    accepted.connection.close(CODE_BUSY.into(), b"too many joins at once");
                }
            }
            Plane::Gossip => {
                if let Err(mpsc::error::TrySendError::Full(refused)) = gossip.try_send(accepted) {
                    debug!(peer = %remote, "gossip is busy; the connection is closed");
                    refused.connection.close(CODE_BUSY.into(), b"gossip is busy");
                }
            }
            // The control socket does not offer the tunnels' ALPN.
            Plane::Tunnel => accepted.connection.close(CODE_BUSY.into(), b"no tunnels here"),
        }
    }
}

/// One join exchange of an address; gives its place back when dropped.
struct AddressPlace {
    held: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
    address: IpAddr,
}

impl AddressPlace {
    fn take(held: &Arc<Mutex<BTreeMap<IpAddr, usize>>>, address: IpAddr) -> Option<Self> {
        let mut counts = held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= JOINS_PER_ADDRESS_MAX {
            return None;
        }
        *count += 1;
        Some(Self { held: Arc::clone(held), address })
    }
}

impl Drop for AddressPlace {
    fn drop(&mut self) {
        let mut counts = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&self.address) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(counts.remove(&self.address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn queries_that_change_without_a_pause_are_read_with_one() {
        let begun = clock::now();
        let mut task = tokio::task::JoinSet::new();
        let (shared, restless) = crate::gossip::restless(10);
        task.spawn(restless);
        follow_queries(shared, Arc::default()).await;
        assert!(clock::now() - begun >= 9 * QUERIES_READ_EVERY, "{:?}", clock::now() - begun);
    }

    #[test]
    fn one_address_holds_a_few_places_and_gives_them_back() {
        let held = Arc::default();
        let address = "192.0.2.1".parse().unwrap();
        let mut places: Vec<_> =
            (0..JOINS_PER_ADDRESS_MAX).map(|_| AddressPlace::take(&held, address).unwrap()).collect();
        assert!(AddressPlace::take(&held, address).is_none());
        assert!(AddressPlace::take(&held, "192.0.2.2".parse().unwrap()).is_some());
        places.pop();
        assert!(AddressPlace::take(&held, address).is_some());
        drop(places);
        assert!(held.lock().unwrap().is_empty(), "nothing is kept of addresses that are gone");
    }
}
