//! The task: `select -> apply`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::carry::{Asked, Compare, Compared, Documents, Given, News, Took};
use super::ends::Ends;
use super::patience::{After, Patience};
use super::shown::{revoked_nodes, view};
use super::{
    CLOCKS_MAX, CONFIRM_TIME_MAX, ClockSkew, DocumentMetrics, DocumentStore, DocumentView, DocumentsHandle,
    DocumentsParams, DocumentsView, GIVEN_BYTES_MAX, LINKS_MAX, ORIGIN_PUSHES_MAX, OfferError, OnTrust, Order,
    PUSH_TRIES_MAX, Spread,
};
use crate::clock::{self, UnixSeconds};
use crate::gossip::carrier::{self, Around, Carrier, FORWARDS};
use crate::gossip::exchange::ExchangeError;
use crate::gossip::talk::answer;
use crate::gossip::{Command, MemberView, Members};
use crate::hearsay::{Excerpt, Seldom};
use crate::metrics::Metrics;
use crate::model::NodeName;
use crate::pki::Identity;
use crate::policy::{Document, DocumentDigest, DocumentId, DocumentKind, DocumentSet, Fork, Offered, Refused};
use crate::supervise::catch_blocking;

/// A skew from here on is worth a warning: certificates begin 60 s in the past, and a minute is soon used up.
const SKEW_WARN_SECONDS: f64 = 10.0;

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

#[derive(Debug)]
struct Kept(DocumentDigest, Result<(), String>);

enum Event {
    Stop,
    Order(Order),
    Carried(carrier::Event<Documents>),
    Kept(Kept),
    Wake,
}

/// Where a document came from.
#[derive(Debug, Clone, Copy)]
enum Origin<'a> {
    Operator,
    Peer(&'a NodeName),
}

/// The task's state.
pub(in crate::gossip) struct Task {
    set: DocumentSet,
    store: Arc<dyn DocumentStore>,
    identity: Arc<Identity>,
    on_trust: OnTrust,
    gossip: mpsc::Sender<Command>,
    orders: mpsc::Receiver<Order>,
    carrier: Carrier<Documents>,
    /// Writes to the disk.
    work: JoinSet<Kept>,
    view: watch::Sender<Arc<DocumentsView>>,
    metrics: DocumentMetrics,
    confirmations: Vec<Waiting>,
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
    /// What peers say of this node's documents.
    refusals_told: Seldom,
    stop: CancellationToken,
}

impl Task {
    pub(in crate::gossip) fn new(
        params: DocumentsParams,
        around: Around,
        (identity, stop): (Arc<Identity>, CancellationToken),
        members: watch::Receiver<Arc<Members>>,
        (orders_sender, orders): (mpsc::Sender<Order>, mpsc::Receiver<Order>),
        metrics: &Metrics,
    ) -> Result<(Self, DocumentsHandle), prometheus::Error> {
        let (view, view_reader) = watch::channel(Arc::default());
        let handle = DocumentsHandle { orders: orders_sender.clone(), view: view_reader };
        let mut task = Self {
            set: params.set,
            store: params.store,
            identity,
            on_trust: params.on_trust,
            gossip: around.gossip.clone(),
            orders,
            carrier: Carrier::new(Documents(orders_sender), around, members, rand::random()),
            work: JoinSet::new(),
            view,
            metrics: DocumentMetrics::new(metrics)?,
            confirmations: Vec::new(),
            clocks: VecDeque::new(),
            is_skew_told: false,
            forks_told: BTreeSet::new(),
            shown: BTreeMap::new(),
            patience: Patience::default(),
            ends: Ends::default(),
            compared_at: None,
            is_own_end_told: false,
            is_gossip_untold: false,
            refusals_told: Seldom::default(),
            stop,
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
                Event::Carried(event) => self.carried(event),
                Event::Kept(kept) => self.kept(kept),
                Event::Wake => {}
            }
            self.confirm(clock::now());
        }
        self.carrier.stop().await;
        self.work.shutdown().await;
    }

    /// Waits for the next event. Cancel safe: every branch is.
    async fn select(&mut self) -> Event {
        let confirm = self.confirmations.iter().map(|waiting| waiting.until).min();
        tokio::select! {
            () = self.stop.cancelled() => Event::Stop,
            Some(order) = self.orders.recv() => Event::Order(order),
            event = self.carrier.next() => Event::Carried(event),
            Some(kept) = self.work.join_next() => match kept {
                Ok(kept) => Event::Kept(kept),
                Err(error) => {
                    error!(%error, "keeping a document failed");
                    Event::Wake
                }
            },
            () = until(confirm) => Event::Wake,
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
        let mut alive = self.carrier.others();
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
                let news = News { digest: digest.clone(), bytes: Arc::clone(&bytes), tries: 0 };
                self.carrier.push(to, news);
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
            let error = error.to_string();
            warn!(%peer, error = %Excerpt(&error), "a member brings one bad document after the other: most are refused unread from here on");
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
            let kept = catch_blocking("documents", || match bytes {
                Some(bytes) => store.put(&key, &bytes),
                None => store.remove(&key),
            });
            // Who waits for it is answered in any case.
            Kept(digest, kept.unwrap_or_else(|| Err("keeping it failed in itself; the log has the reason".to_owned())))
        });
    }

    fn forward(&mut self, digest: &DocumentDigest, from: &NodeName) {
        let Some(held) = self.set.get(&digest.id) else { return };
        let bytes = Arc::new(held.document.to_bytes());
        self.forward_bytes(digest, &bytes, from);
    }

    fn forward_bytes(&mut self, digest: &DocumentDigest, bytes: &Arc<Vec<u8>>, from: &NodeName) {
        let news = News { digest: digest.clone(), bytes: Arc::clone(bytes), tries: 0 };
        self.carrier.spread([news], FORWARDS, Some(from));
    }

    fn carried(&mut self, event: carrier::Event<Documents>) {
        match event {
            carrier::Event::Pushed { to, item, result } => self.pushed(to, item, result),
            carrier::Event::Compared(peer, result) => self.compared(peer, result),
            carrier::Event::Round => self.tick(),
        }
    }

    fn pushed(&mut self, to: MemberView, news: News, result: Result<Took, ExchangeError>) {
        let is_held = matches!(result, Ok(Took::Held));
        let is_lost = result.is_err();
        self.metrics.pushes.with_label_values(&[if is_held { "ok" } else { "failed" }]).inc();
        match result {
            Ok(Took::Held | Took::Older) => {}
            Ok(Took::Refused(reason)) => {
                if let Some(left_out) = self.refusals_told.due(clock::now()) {
                    let (document, reason) = (&news.digest.id, Excerpt(&reason));
                    warn!(peer = %to.name, %document, %reason, left_out, "peer refuses a document");
                }
            }
            Err(error) => debug!(peer = %to.name, error = error.explain(None), "document was not pushed"),
        }
        let tries = news.tries + 1;
        let is_awaited = |waiting: &Waiting| waiting.digest == news.digest && waiting.left.contains(&to.name);
        if is_lost && tries < PUSH_TRIES_MAX && self.confirmations.iter().any(is_awaited) {
            return self.carrier.push(to, News { tries, ..news });
        }
        for waiting in self.confirmations.iter_mut().filter(|waiting| waiting.digest == news.digest) {
            if waiting.left.remove(&to.name) && is_held {
                waiting.confirmed += 1;
            }
        }
    }

    fn compared(&mut self, peer: NodeName, result: Result<Compare, ExchangeError>) {
        match result {
            Ok(compare) => {
                self.compared_at = Some(clock::wall());
                self.clock_seen(peer, compare.ahead_ms);
            }
            Err(error) => debug!(%peer, error = error.explain(None), "documents were not compared"),
        }
    }

    fn kept(&mut self, Kept(digest, kept): Kept) {
        if let Err(error) = &kept {
            error!(document = %digest.id, error, "a document counts but is not on disk");
        }
        for waiting in self.confirmations.iter_mut().filter(|waiting| waiting.digest == digest) {
            waiting.kept = Some(kept.clone());
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

    /// Lets ended documents go, looks again at what is open.
    fn tick(&mut self) {
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

/// Waits until `at`; for ever where there is none.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
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
