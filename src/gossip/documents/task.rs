//! The task: `select -> apply`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::carry::{self, Asked, Compare, Compared, Given, Took};
use super::ends::Ends;
use super::patience::{After, Patience};
use super::shown::{revoked_nodes, view};
use super::{
    CLOCKS_MAX, COMPARES_MAX, CONFIRM_TIME_MAX, ClockSkew, DocumentMetrics, DocumentStore, DocumentView,
    DocumentsHandle, DocumentsParams, DocumentsView, FORWARDS, GIVEN_BYTES_MAX, JOIN_COMPARES, LINKS_MAX,
    ORIGIN_PUSHES_MAX, OfferError, OnTrust, Order, PUSH_TIME_MAX, PUSH_TRIES_MAX, PUSHES_MAX, PUSHES_WAITING_MAX,
    Spread,
};
use crate::clock::{self, UnixSeconds};
use crate::gossip::exchange::ExchangeError;
use crate::gossip::reach::reach;
use crate::gossip::{Command, MemberView, Members};
use crate::metrics::Metrics;
use crate::model::{MemberStatus, NodeName};
use crate::pki::Identity;
use crate::policy::{Document, DocumentDigest, DocumentId, DocumentKind, DocumentSet, Fork, Offered, Refused};
use crate::transport::ControlTransport;

/// A skew from here on is worth a warning: certificates begin 60 s in the past, and a minute is soon used up.
const SKEW_WARN_SECONDS: f64 = 10.0;

/// How many times rarer comparisons are while the last one found nothing: what the pushes missed is found by comparing
/// with members that come back, and at last by these.
const QUIET_FACTOR: u32 = 6;

/// A push that waits or runs.
#[derive(Debug, Clone)]
struct Push {
    to: MemberView,
    digest: DocumentDigest,
    bytes: Arc<Vec<u8>>,
    /// How many pushes to this member went before.
    tries: u8,
}

/// An operator who waits for confirmations.
#[derive(Debug)]
struct Waiting {
    digest: DocumentDigest,
    offered: Offered,
    left: BTreeSet<NodeName>,
    confirmed: usize,
    alive: usize,
    /// How keeping it on disk ended; none while that runs.
    kept: Option<Result<(), String>>,
    until: Instant,
    reply: oneshot::Sender<Result<Spread, OfferError>>,
}

/// How a piece of work ended.
#[derive(Debug)]
enum Done {
    Pushed(Push, Result<Took, ExchangeError>),
    Compared(NodeName, Result<Compare, ExchangeError>),
    Kept(DocumentDigest, Result<(), String>),
}

#[derive(Debug)]
enum Event {
    Stop,
    Order(Order),
    Done(Done),
    Members,
    Wake,
}

/// Where a document came from.
#[derive(Debug, Clone, Copy)]
enum Origin<'a> {
    Operator,
    Peer(&'a NodeName),
}

/// What gossip gives the tasks of documents and of shared maps.
#[derive(Clone)]
pub(in crate::gossip) struct Around {
    pub(in crate::gossip) own: NodeName,
    pub(in crate::gossip) identity: Arc<Identity>,
    pub(in crate::gossip) transport: ControlTransport,
    pub(in crate::gossip) gossip: mpsc::Sender<Command>,
    pub(in crate::gossip) interval: Duration,
    pub(in crate::gossip) stop: CancellationToken,
}

/// The task's state.
pub(in crate::gossip) struct Task {
    own: NodeName,
    set: DocumentSet,
    store: Arc<dyn DocumentStore>,
    identity: Arc<Identity>,
    on_trust: OnTrust,
    transport: ControlTransport,
    gossip: mpsc::Sender<Command>,
    orders: mpsc::Receiver<Order>,
    orders_sender: mpsc::Sender<Order>,
    members: watch::Receiver<Arc<Members>>,
    have_members_ended: bool,
    view: watch::Sender<Arc<DocumentsView>>,
    metrics: DocumentMetrics,
    rng: StdRng,
    work: JoinSet<Done>,
    waiting_pushes: VecDeque<Push>,
    pushes: usize,
    compares: BTreeSet<NodeName>,
    confirmations: Vec<Waiting>,
    interval: Duration,
    next_compare: Instant,
    is_quiet: bool,
    /// The others that answered when it was last looked.
    known_alive: BTreeSet<NodeName>,
    /// The latest offset of each member's clock, in milliseconds.
    clocks: VecDeque<(NodeName, i64)>,
    is_skew_told: bool,
    forks_told: BTreeSet<Fork>,
    /// What is shown, by document: what did not change is not read again.
    shown: BTreeMap<DocumentId, Arc<DocumentView>>,
    patience: Patience,
    ends: Ends,
    compared_at: Option<UnixSeconds>,
    is_own_end_told: bool,
    is_gossip_untold: bool,
    stop: CancellationToken,
}

impl Task {
    pub(in crate::gossip) fn new(
        params: DocumentsParams,
        around: Around,
        members: watch::Receiver<Arc<Members>>,
        (orders_sender, orders): (mpsc::Sender<Order>, mpsc::Receiver<Order>),
        metrics: &Metrics,
    ) -> Result<(Self, DocumentsHandle), prometheus::Error> {
        let (view, view_reader) = watch::channel(Arc::default());
        let handle = DocumentsHandle { orders: orders_sender.clone(), view: view_reader };
        let mut task = Self {
            own: around.own,
            set: params.set,
            store: params.store,
            identity: around.identity,
            on_trust: params.on_trust,
            transport: around.transport,
            gossip: around.gossip,
            orders,
            orders_sender,
            members,
            have_members_ended: false,
            view,
            metrics: DocumentMetrics::new(metrics)?,
            rng: StdRng::seed_from_u64(rand::random()),
            work: JoinSet::new(),
            waiting_pushes: VecDeque::new(),
            pushes: 0,
            compares: BTreeSet::new(),
            confirmations: Vec::new(),
            interval: around.interval,
            next_compare: clock::now() + around.interval,
            is_quiet: false,
            known_alive: BTreeSet::new(),
            clocks: VecDeque::new(),
            is_skew_told: false,
            forks_told: BTreeSet::new(),
            shown: BTreeMap::new(),
            patience: Patience::default(),
            ends: Ends::default(),
            compared_at: None,
            is_own_end_told: false,
            is_gossip_untold: false,
            stop: around.stop,
        };
        task.show();
        task.tell_ends();
        Ok((task, handle))
    }

    pub(in crate::gossip) async fn run(mut self) {
        self.trust_changed();
        loop {
            match self.select().await {
                Event::Stop => break,
                Event::Order(order) => self.order(order),
                Event::Done(done) => self.done(done),
                Event::Members => self.members_changed(),
                Event::Wake => {}
            }
            let now = clock::now();
            if self.next_compare <= now {
                self.tick(now);
            }
            self.confirm(now);
            self.start_pushes();
        }
        self.work.shutdown().await;
    }

    /// Waits for the next event. Cancel safe: every branch is.
    async fn select(&mut self) -> Event {
        let confirm = self.confirmations.iter().map(|waiting| waiting.until).min();
        let wake = confirm.map_or(self.next_compare, |at| at.min(self.next_compare));
        tokio::select! {
            () = self.stop.cancelled() => Event::Stop,
            Some(order) = self.orders.recv() => Event::Order(order),
            Some(done) = self.work.join_next() => match done {
                Ok(done) => Event::Done(done),
                Err(error) => {
                    error!(%error, "work on documents failed");
                    Event::Wake
                }
            },
            changed = self.members.changed(), if !self.have_members_ended => {
                self.have_members_ended = changed.is_err();
                Event::Members
            }
            () = tokio::time::sleep_until(wake) => Event::Wake,
        }
    }

    fn order(&mut self, order: Order) {
        match order {
            Order::Offer(bytes, reply) => self.offered_by_operator(&bytes, reply),
            Order::Peer(Asked::Pushed(peer, bytes, reply)) => {
                let took = match self.hear(&peer, &bytes) {
                    None => Took::Refused("too many documents of this node were refused lately".to_owned()),
                    Some(Ok((_, Offered::Stored | Offered::Known))) => Took::Held,
                    Some(Ok((_, Offered::Older))) => Took::Older,
                    Some(Err(error)) => Took::Refused(error.to_string()),
                };
                answer(reply, took);
            }
            Order::Peer(Asked::Summary(reply)) => answer(reply, self.set.set_hash()),
            Order::Peer(Asked::Compared(set_hash, reply)) => {
                let digests = (set_hash != self.set.set_hash()).then(|| self.set.digests());
                answer(reply, Compared { clock_ms: clock::wall_ms(), digests });
            }
            Order::Peer(Asked::Lacking(theirs, reply)) => {
                let documents = self.set.newer_than(&theirs, GIVEN_BYTES_MAX);
                answer(reply, Given { documents, digests: self.set.digests() });
            }
            Order::Peer(Asked::Given(peer, mut given, reply)) => {
                given.documents.sort_by_key(|bytes| order_of_taking(bytes));
                for bytes in &given.documents {
                    // A refusal is told by `offer`; the others of the frame may be good.
                    let _told = self.hear(&peer, bytes);
                }
                let documents = self.set.newer_than(&given.digests, GIVEN_BYTES_MAX);
                answer(reply, Given { documents, digests: Vec::new() });
            }
        }
    }

    fn offered_by_operator(&mut self, bytes: &[u8], reply: oneshot::Sender<Result<Spread, OfferError>>) {
        let (digest, offered) = match self.offer(bytes, Origin::Operator) {
            Ok(taken) => taken,
            Err(error) => return answer(reply, Err(error)),
        };
        let mut alive = self.alive();
        let revoked = self.set.get(&digest.id).map(revoked_nodes).unwrap_or_default();
        // The members do not show it as failed yet, and it confirms nothing any more.
        alive.retain(|member| !revoked.contains(&member.name));
        let pushed: Vec<MemberView> = if offered == Offered::Older {
            Vec::new()
        } else {
            alive.iter().take(ORIGIN_PUSHES_MAX).cloned().collect()
        };
        let waiting = Waiting {
            digest: digest.clone(),
            offered,
            left: pushed.iter().map(|member| member.name.clone()).collect(),
            confirmed: 0,
            alive: alive.len(),
            kept: None,
            until: clock::now() + CONFIRM_TIME_MAX,
            reply,
        };
        if let Some(held) = self.set.get(&digest.id) {
            let bytes = Arc::new(held.document.to_bytes());
            for to in pushed {
                self.push(Push { to, digest: digest.clone(), bytes: Arc::clone(&bytes), tries: 0 });
            }
        }
        // The order is answered once the document is on disk as well; it spreads meanwhile.
        self.confirmations.push(waiting);
        self.keep(&digest);
    }

    /// Takes a document from a peer; none: too many of its documents were refused lately, this one is not looked at.
    fn hear(&mut self, peer: &NodeName, bytes: &[u8]) -> Option<Result<(DocumentDigest, Offered), OfferError>> {
        let now = clock::now();
        if self.patience.is_out(peer, now) {
            self.metrics.offered.with_label_values(&["ignored"]).inc();
            return None;
        }
        let taken = self.offer(bytes, Origin::Peer(peer));
        if let Err(error) = &taken
            && !is_blameless(error)
            && self.patience.refused(peer, now) == After::RanOut
        {
            warn!(%peer, %error, "a member brings one bad document after the other: most are refused unread from here on");
        }
        Some(taken)
    }

    /// Takes a document from anybody; enforces, keeps and passes on what is news.
    fn offer(&mut self, bytes: &[u8], origin: Origin<'_>) -> Result<(DocumentDigest, Offered), OfferError> {
        let forks = self.set.forks().count();
        let taken = self.take(bytes);
        let result = match &taken {
            Ok((_, Offered::Stored)) => "stored",
            Ok((_, Offered::Known)) => "known",
            Ok((_, Offered::Older)) => "older",
            Err(_) => "refused",
        };
        self.metrics.offered.with_label_values(&[result]).inc();
        match &taken {
            Ok((digest, Offered::Stored)) => {
                info!(document = %digest.id, version = digest.version, "took a document");
                // Nothing that is believed follows from policy.
                if digest.id.kind.is_policy() {
                    self.show();
                } else {
                    self.trust_changed();
                }
                if let Origin::Peer(from) = origin {
                    self.forward(digest, from);
                    self.keep(digest);
                }
            }
            // The other content of a version that is held: who has heard of the fork tells those who hold the same.
            Ok((digest, Offered::Older)) if self.set.forks().count() > forks => {
                if let Origin::Peer(from) = origin {
                    self.forward_bytes(digest, &Arc::new(bytes.to_vec()), from);
                }
            }
            Ok(_) => {}
            // A peer may send bad documents at will: at `debug`, and counted.
            Err(error) => debug!(%error, ?origin, "document refused"),
        }
        self.tell_forks();
        taken
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(DocumentDigest, Offered), OfferError> {
        let document = Document::from_bytes(bytes)?;
        let digest = document.digest();
        let offered = self.set.offer(document, clock::wall())?;
        Ok((digest, offered))
    }

    /// Lets everybody believe what follows from the set.
    fn trust_changed(&mut self) {
        let bundle = self.set.bundle();
        if *self.identity.bundle() != bundle {
            self.identity.set_bundle(bundle.clone(), clock::wall());
        }
        (self.on_trust)(&self.set, &bundle);
        self.tell_gossip();
        if let Err(reason) = self.identity.authority().check(&bundle)
            && !std::mem::replace(&mut self.is_own_end_told, true)
        {
            error!(%reason, "this node's own certificate is revoked: the mesh refuses it from here on");
        }
        self.show();
    }

    /// Tells gossip, whose queue may be full: then with the next tick.
    fn tell_gossip(&mut self) {
        self.is_gossip_untold = self.gossip.try_send(Command::Trust).is_err();
    }

    /// Writes a document to the disk, or removes it if the set has let it go.
    fn keep(&mut self, digest: &DocumentDigest) {
        let (store, digest) = (Arc::clone(&self.store), digest.clone());
        let bytes = self.set.get(&digest.id).map(|held| held.document.to_bytes());
        self.work.spawn_blocking(move || {
            let key = digest.id.to_string();
            let kept = match bytes {
                Some(bytes) => store.put(&key, &bytes),
                None => store.remove(&key),
            };
            Done::Kept(digest, kept)
        });
    }

    fn alive(&self) -> Vec<MemberView> {
        let members = self.members.borrow();
        let is_other = |member: &&MemberView| {
            member.name != self.own && matches!(member.status, MemberStatus::Alive | MemberStatus::Leaving)
        };
        members.members.iter().filter(is_other).cloned().collect()
    }

    fn forward(&mut self, digest: &DocumentDigest, from: &NodeName) {
        let Some(held) = self.set.get(&digest.id) else { return };
        let bytes = Arc::new(held.document.to_bytes());
        self.forward_bytes(digest, &bytes, from);
    }

    fn forward_bytes(&mut self, digest: &DocumentDigest, bytes: &Arc<Vec<u8>>, from: &NodeName) {
        let others: Vec<MemberView> = self.alive().into_iter().filter(|member| member.name != *from).collect();
        let chosen: Vec<MemberView> = others.sample(&mut self.rng, FORWARDS).cloned().collect();
        for to in chosen {
            self.push(Push { to, digest: digest.clone(), bytes: Arc::clone(bytes), tries: 0 });
        }
    }

    fn push(&mut self, push: Push) {
        if self.waiting_pushes.len() < PUSHES_WAITING_MAX {
            self.waiting_pushes.push_back(push);
        }
    }

    fn start_pushes(&mut self) {
        while self.pushes < PUSHES_MAX {
            let Some(push) = self.waiting_pushes.pop_front() else { return };
            self.pushes += 1;
            let reach = reach(self.gossip.clone(), self.transport.clone(), push.to.clone());
            self.work.spawn(async move {
                let pushed = async {
                    let connection = reach.await?;
                    carry::push(&connection, push.bytes.to_vec()).await
                };
                let result = tokio::time::timeout(PUSH_TIME_MAX, pushed).await.unwrap_or(Err(ExchangeError::Late));
                Done::Pushed(push, result)
            });
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Pushed(push, result) => {
                self.pushes = self.pushes.saturating_sub(1);
                let is_held = matches!(result, Ok(Took::Held));
                let is_lost = result.is_err();
                self.metrics.pushes.with_label_values(&[if is_held { "ok" } else { "failed" }]).inc();
                match result {
                    Ok(Took::Held | Took::Older) => {}
                    Ok(Took::Refused(reason)) => {
                        warn!(peer = %push.to.name, document = %push.digest.id, reason, "peer refuses a document");
                    }
                    Err(error) => debug!(peer = %push.to.name, error = error.explain(None), "document was not pushed"),
                }
                let tries = push.tries + 1;
                let is_awaited =
                    |waiting: &Waiting| waiting.digest == push.digest && waiting.left.contains(&push.to.name);
                if is_lost && tries < PUSH_TRIES_MAX && self.confirmations.iter().any(is_awaited) {
                    return self.push(Push { tries, ..push });
                }
                for waiting in self.confirmations.iter_mut().filter(|waiting| waiting.digest == push.digest) {
                    if waiting.left.remove(&push.to.name) && is_held {
                        waiting.confirmed += 1;
                    }
                }
            }
            Done::Compared(peer, result) => {
                self.compares.remove(&peer);
                match result {
                    Ok(compare) => {
                        self.compared_at = Some(clock::wall());
                        self.found(compare.was_equal);
                        self.clock_seen(peer, compare.ahead_ms);
                    }
                    Err(error) => debug!(%peer, error = error.explain(None), "documents were not compared"),
                }
            }
            Done::Kept(digest, kept) => {
                if let Err(error) = &kept {
                    error!(document = %digest.id, error, "a document counts but is not on disk");
                }
                for waiting in self.confirmations.iter_mut().filter(|waiting| waiting.digest == digest) {
                    waiting.kept = Some(kept.clone());
                }
            }
        }
    }

    /// Answers the operators whose documents everybody confirmed, or who have waited long enough.
    fn confirm(&mut self, now: Instant) {
        let is_over =
            |waiting: &mut Waiting| (waiting.left.is_empty() && waiting.kept.is_some()) || waiting.until <= now;
        for over in self.confirmations.extract_if(.., is_over) {
            let Waiting { digest, offered, confirmed, alive, kept, .. } = over;
            let answered = match kept {
                Some(Ok(())) => Ok(Spread { digest, offered, confirmed, alive }),
                Some(Err(error)) => Err(OfferError::Store(error)),
                None => Err(OfferError::Store("the disk did not answer in time".to_owned())),
            };
            answer(over.reply, answered);
        }
    }

    fn members_changed(&mut self) {
        self.members.mark_unchanged();
        let alive = self.alive();
        let asked: Vec<MemberView> = if self.known_alive.is_empty() {
            alive.sample(&mut self.rng, JOIN_COMPARES).cloned().collect()
        } else {
            // Everybody sees a member come or come back: of all some three ask it.
            let share = (alive.len() / JOIN_COMPARES).max(1);
            let fresh = alive.iter().filter(|member| !self.known_alive.contains(&member.name));
            fresh.filter(|_| self.rng.random_range(0..share) == 0).cloned().collect()
        };
        self.known_alive = alive.into_iter().map(|member| member.name).collect();
        for peer in asked {
            self.compare(peer);
        }
    }

    /// Notes how a comparison ended: a difference is looked after soon.
    fn found(&mut self, was_equal: bool) {
        self.is_quiet = was_equal;
        if !was_equal {
            self.next_compare = self.next_compare.min(clock::now() + self.interval);
        }
    }

    /// Lets ended documents go, compares with a random member, looks again at what is open.
    fn tick(&mut self, now: Instant) {
        let pause = self.interval * if self.is_quiet { QUIET_FACTOR } else { 1 };
        self.next_compare = now + pause.mul_f64(self.rng.random_range(0.75..1.25));
        let ended = self.set.expire(clock::wall());
        for digest in &ended {
            let had_effect = self.shown.get(&digest.id).is_some_and(|view| view.says_policy());
            if had_effect {
                warn!(document = %digest.id, "policy ended with its operator's certificate and counts no longer: write it anew");
            } else {
                info!(document = %digest.id, "document ended");
            }
            self.keep(digest);
        }
        if !ended.is_empty() {
            self.trust_changed();
        }
        if self.is_gossip_untold {
            self.tell_gossip();
        }
        self.tell_ends();
        if let Some(peer) = self.partner() {
            self.compare(peer);
        }
    }

    /// Returns a member to compare with: a neighbour, where the mesh is large (what differs spreads over neighbours as well,
    /// and a random member would cost a handshake each time), and one that a connection leads to, if there is one.
    fn partner(&mut self) -> Option<MemberView> {
        let mut alive = self.alive();
        let near = self.members.borrow().neighbours.clone();
        alive.retain(|member| near.is_empty() || near.contains(&member.name));
        let reached = self.transport.live().nodes();
        let linked: Vec<&MemberView> = alive.iter().filter(|member| reached.contains(&member.name)).collect();
        let chosen = linked.choose(&mut self.rng).copied();
        chosen.or_else(|| alive.choose(&mut self.rng)).cloned()
    }

    fn compare(&mut self, peer: MemberView) {
        if self.compares.len() >= COMPARES_MAX || !self.compares.insert(peer.name.clone()) {
            return;
        }
        let (name, orders) = (peer.name.clone(), self.orders_sender.clone());
        let reach = reach(self.gossip.clone(), self.transport.clone(), peer);
        self.work.spawn(async move {
            let compared = async {
                let connection = reach.await?;
                carry::compare(&connection, name.clone(), &orders, clock::wall_ms).await
            };
            let result = tokio::time::timeout(carry::TIME_MAX, compared).await.unwrap_or(Err(ExchangeError::Late));
            Done::Compared(name, result)
        });
    }

    fn clock_seen(&mut self, peer: NodeName, ahead_ms: i64) {
        self.clocks.retain(|(name, _)| *name != peer);
        if self.clocks.len() >= CLOCKS_MAX {
            self.clocks.pop_front();
        }
        self.clocks.push_back((peer, ahead_ms));
        let Some(skew) = skew_of(self.clocks.iter().map(|(_, ahead_ms)| *ahead_ms)) else { return };
        self.metrics.skew.set(skew.median_seconds);
        let is_far = skew.median_seconds.abs() >= SKEW_WARN_SECONDS;
        if is_far && !self.is_skew_told {
            let seconds = skew.median_seconds;
            warn!(seconds, peers = skew.peers, "the other members' clocks differ from this host's: check NTP here");
        }
        self.is_skew_told = is_far;
        self.show();
    }

    fn tell_forks(&mut self) {
        let news: Vec<Fork> = self.set.forks().filter(|fork| !self.forks_told.contains(fork)).cloned().collect();
        for fork in news {
            error!(document = %fork.id, version = fork.version, "two contents of one version were signed: is an operator's key used twice, or stolen?");
            self.forks_told.insert(fork);
            self.show();
        }
    }

    /// Tells and counts the policy that ends soon.
    fn tell_ends(&mut self) {
        let (now, view) = (clock::wall(), Arc::clone(&self.view.borrow()));
        let (first, endings, news) = self.ends.look(&view.documents, now);
        self.metrics.first_end.set(first.map_or(f64::INFINITY, |first| days_until(first, now)));
        let count: usize = endings.iter().map(|ending| ending.documents).sum();
        self.metrics.ending.set(i64::try_from(count).unwrap_or(i64::MAX));
        for ending in news {
            warn!(
                operator = %ending.signer, key = %ending.key, ends = %crate::pki::Utc(ending.ends), documents = ending.documents,
                "policy ends soon, with the certificate of the operator who signed it: certify the operator again (`weft ca operator \
                 renew`, `adopt`) and sign it anew (`weft export`, `weft import -sign`)"
            );
        }
    }

    fn show(&mut self) {
        self.metrics.held.set(i64::try_from(self.set.len()).unwrap_or(i64::MAX));
        self.metrics.forks.set(i64::try_from(self.set.forks().count()).unwrap_or(i64::MAX));
        let forked: BTreeSet<(&DocumentId, u64)> = self.set.forks().map(|fork| (&fork.id, fork.version)).collect();
        let mut shown = std::mem::take(&mut self.shown);
        for held in self.set.iter() {
            let digest = held.document.digest();
            let is_forked = forked.contains(&(&digest.id, digest.version));
            let is_same = |view: &Arc<DocumentView>| view.digest == digest && view.is_forked == is_forked;
            let known = shown.remove(&digest.id).filter(is_same);
            self.shown.insert(digest.id, known.unwrap_or_else(|| Arc::new(view(held, is_forked))));
        }
        let view = DocumentsView {
            documents: self.shown.values().cloned().collect(),
            set_hash: self.set.set_hash(),
            skew: skew_of(self.clocks.iter().map(|(_, ahead_ms)| *ahead_ms)),
            compared_at: self.compared_at,
            links: self.set.link_documents(LINKS_MAX),
        };
        self.view.send_replace(Arc::new(view));
    }
}

/// Whether an honest peer may bring what is refused so, and refusing it cost no check of signatures: clocks differ, or there
/// is no room.
fn is_blameless(error: &OfferError) -> bool {
    matches!(error, OfferError::Refused(Refused::Early { .. } | Refused::Ended { .. } | Refused::Full))
}

/// Roots first, for others may stand under them; what takes back last, so that nothing is missed which was signed again
/// in the place of what a revocation ends.
fn order_of_taking(bytes: &[u8]) -> u8 {
    match Document::from_bytes(bytes).map(|document| document.content().id.kind) {
        Ok(DocumentKind::Bundle) => 0,
        Ok(DocumentKind::Intention | DocumentKind::Config) => 1,
        Ok(DocumentKind::Revocation) => 2,
        Err(_) => 3,
    }
}

/// Answers if the other side still waits.
fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    let _unwanted = reply.send(value);
}

#[expect(clippy::cast_precision_loss, reason = "seconds until a certificate ends are far below 2^52")]
fn days_until(end: UnixSeconds, now: UnixSeconds) -> f64 {
    end.since(now).as_secs() as f64 / 86_400.0
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds between two clocks are far below 2^52")]
fn skew_of(offsets_ms: impl Iterator<Item = i64>) -> Option<ClockSkew> {
    let mut sorted: Vec<i64> = offsets_ms.collect();
    sorted.sort_unstable();
    // Of an even number the one nearer to this clock: one member of two that is off is its own trouble.
    let (lower, upper) = (*sorted.get(sorted.len().checked_sub(1)? / 2)?, *sorted.get(sorted.len() / 2)?);
    let median_ms = if lower.unsigned_abs() < upper.unsigned_abs() { lower } else { upper };
    let max_ms = sorted.iter().map(|ms| ms.unsigned_abs()).max()?;
    Some(ClockSkew {
        median_seconds: median_ms as f64 / 1000.0,
        max_seconds: max_ms as f64 / 1000.0,
        peers: sorted.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_clocks_is_not_moved_by_one_that_is_off() {
        #[track_caller]
        fn check(offsets_ms: &[i64], want: Option<(f64, f64)>) {
            let skew = skew_of(offsets_ms.iter().copied());
            assert_eq!(skew.map(|skew| (skew.median_seconds, skew.max_seconds)), want, "{offsets_ms:?}");
        }
        check(&[], None);
        check(&[-2000], Some((-2.0, 2.0)));
        check(&[25_000, 10], Some((0.01, 25.0)));
        check(&[-25_000, 10], Some((0.01, 25.0)));
        check(&[-1, 25_000, 2], Some((0.002, 25.0)));
        check(&[-25_000, -24_000, 0, -25_500], Some((-24.0, 25.5)));
    }
}
