//! How a node gets its certificate at a start, and how it keeps it.

use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use prometheus::Gauge;
use rand::RngExt as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::glue::{Connections, stored_documents};
use crate::catalogue::SnapshotReader;
use crate::clock::{self, UnixSeconds};
use crate::config::{Config, IdentitySource, MESH_PORT_DEFAULT};
use crate::gossip::{GossipHandle, MemberView};
use crate::join::{self, JoinError};
use crate::metrics::Metrics;
use crate::model::{MemberStatus, NodeName, TrustDomain};
use crate::pki::{
    self, DocumentKey, Identity, Issuer, IssuerCell, JoinKey, NodeAuthority, PkiError, Token, TokenError, TrustBundle,
};
use crate::store::{Store, StoreError};
use crate::telemetry::Chain;

/// When a node first looks: the members are there by then, and a certificate that became due while it was off waits no longer.
const FIRST_LOOK: Duration = Duration::from_secs(5);
/// Longest pause between two looks at what must be renewed.
const LOOK: Duration = Duration::from_secs(30);
/// First pause between two tries to get or renew the node's certificate.
const RETRY: Duration = Duration::from_millis(500);
/// How long a start waits for an issuer's word on a certificate that may have been revoked.
const ASK_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest pause between two tries.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// A node that nobody answered for so long asks issuers whether the mesh has another root.
const ALONE_FOR: Duration = Duration::from_secs(10);
/// It does so no sooner again once an issuer has answered.
const WALK_REST: Duration = Duration::from_mins(5);
/// Nodes renew within this time under a new root.
const ROOT_RENEWAL_WITHIN: Duration = Duration::from_secs(15);
/// Most members that a renewal asks: each that is gone takes seconds.
const ASKED_MAX: usize = 16;
/// Seconds of a day.
const DAY: f64 = 86_400.0;

/// Why a node has no usable certificate.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Nothing on disk and no way to get one.
    #[error(
        "node `{0}` has no certificate: start the first agent with -issuer DIR (made by `weft ca init`), every further one with -join ADDR and -token (made by `weft token create`)"
    )]
    None(NodeName),
    /// A token, and nobody to show it to.
    #[error("a token without -join: name an agent that is up")]
    NoSeed,
    /// The token's text.
    #[error("the join token is not usable")]
    Token(#[from] TokenError),
    /// The issuer's directory.
    #[error("cannot use the issuer in {}", dir.display())]
    Issuer {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        source: PkiError,
    },
    /// Keys or certificates.
    #[error("cannot use the node's certificate")]
    Pki(#[from] PkiError),
    /// The store.
    #[error("cannot keep the node's certificate")]
    Store(#[from] StoreError),
    /// An issuer refused, or the seed is of another mesh.
    #[error("cannot join the mesh")]
    Join(#[from] JoinError),
    /// The stored certificate is of another trust domain than the config names.
    #[error(
        "the node's certificate is of trust domain `{found}`, the configuration says `{wanted}`: use another -data-dir, or correct -trust-domain"
    )]
    TrustDomain {
        /// What the configuration says.
        wanted: TrustDomain,
        /// What the certificate says.
        found: TrustDomain,
    },
    /// The stored certificate is of another node.
    #[error("the stored certificate is of node `{found}`, this node is `{wanted}`: use another -data-dir")]
    OtherNode {
        /// This node.
        wanted: NodeName,
        /// The certificate's.
        found: NodeName,
    },
    /// The stored certificate has ended and nobody renews it.
    #[error("the node's certificate ended at {until} (this host's clock says {now}, seconds since 1970): check the clock; if it is right, start with -join ADDR to renew it (up to 30 days), or with -join and a new -token", until = until.0, now = now.0)]
    Ended {
        /// When.
        until: UnixSeconds,
        /// Our time.
        now: UnixSeconds,
    },
    /// The stored certificate is not valid yet: the clock went back.
    #[error("the node's certificate becomes valid at {from}, this host's clock says {now} (seconds since 1970): set the clock", from = from.0, now = now.0)]
    Early {
        /// When.
        from: UnixSeconds,
        /// Our time.
        now: UnixSeconds,
    },
}

/// What a node starts with.
pub(super) struct Obtained {
    /// Its issuer, if it is one.
    pub(super) issuer: Arc<IssuerCell>,
    /// Its live identity: the stored one, or a new one that is on disk.
    pub(super) identity: Arc<Identity>,
    /// The operator's key of `-dev`.
    pub(super) operator: Option<Arc<DocumentKey>>,
}

/// Gets or makes all that a node needs to prove who it is.
pub(super) async fn obtain(config: &Config, store: &Store) -> Result<Obtained, IdentityError> {
    let now = clock::wall();
    let mut operator = None;
    let issuer = IssuerCell::new(match &config.identity {
        IdentitySource::Dev { trust_domain, .. } => {
            let ca = pki::ephemeral(trust_domain, now)?;
            operator = Some(Arc::new(ca.document_key()?));
            Some(Arc::clone(ca.issuer()))
        }
        IdentitySource::Issuer { dir, .. } => {
            let load = Issuer::load(dir).map_err(|source| IdentityError::Issuer { dir: dir.clone(), source })?;
            Some(Arc::new(load))
        }
        IdentitySource::Token(_) | IdentitySource::Stored => None,
    });
    let stored = store.identity()?.map(|bytes| NodeAuthority::from_bytes(&bytes)).transpose()?;
    let active = match issuer.load() {
        Some(loaded) => {
            let documents = stored_documents(store, loaded.bundle())?;
            let bundle = documents.bundle();
            issuer.adopt(&documents.issuer_certificates(), &bundle);
            let active = issuer.active(&bundle, now);
            if active.is_none() {
                warn!("this node's issuer is retired or revoked: it certifies nobody, this node neither");
            }
            active
        }
        None => None,
    };
    let authority = match (stored, active, &config.identity) {
        // An issuer certifies itself at each start, so that a changed -serve takes effect.
        (_, Some(issuer), IdentitySource::Dev { serve, .. } | IdentitySource::Issuer { serve, .. }) => {
            issuer.self_certify(&config.node_name, serve, now)?
        }
        (Some(stored), None, IdentitySource::Token(text)) if is_revoked(store, &stored)? => {
            warn!("this node's certificate is revoked; joining anew with the token");
            by_token(config, store, &text.reveal().parse()?).await?
        }
        (Some(stored), None, IdentitySource::Token(text)) if stored.not_after() > now => {
            by_stored(config, store, stored, text.reveal()).await?
        }
        (Some(stored), ..) if stored.not_after() > now => stored,
        (Some(ended), ..) if is_askable(config, store)? => renew_ended(config, store, &ended).await?,
        (_, _, IdentitySource::Token(text)) => by_token(config, store, &text.reveal().parse()?).await?,
        (Some(ended), ..) => return Err(IdentityError::Ended { until: ended.not_after(), now }),
        (None, ..) => return Err(IdentityError::None(config.node_name.clone())),
    };
    check(config, &authority, now)?;
    store.put_identity(&authority.to_bytes()?)?;
    store.remove_join_key()?;
    Ok(Obtained { issuer, identity: Identity::new(authority, now)?, operator })
}

fn check(config: &Config, authority: &NodeAuthority, now: UnixSeconds) -> Result<(), IdentityError> {
    if *authority.node() != config.node_name {
        let (wanted, found) = (config.node_name.clone(), authority.node().clone());
        return Err(IdentityError::OtherNode { wanted, found });
    }
    let found = &authority.bundle().trust_domain;
    if let Some(wanted) = &config.trust_domain
        && wanted != found
    {
        return Err(IdentityError::TrustDomain { wanted: wanted.clone(), found: found.clone() });
    }
    if authority.not_before() > now {
        return Err(IdentityError::Early { from: authority.not_before(), now });
    }
    Ok(())
}

/// Joins as a new identity, with a key of its own.
async fn by_token(config: &Config, store: &Store, token: &Token) -> Result<NodeAuthority, IdentityError> {
    let asked = ask(config, &stored_peers(store)?, Wish::Token(token, &join_key(store)?)).await;
    match &asked {
        Ok(_) => store.put_join_token(token.unverified_claims().id)?,
        // The next attempt takes another key.
        Err(IdentityError::Join(JoinError::Revoked { .. })) => store.remove_join_key()?,
        Err(_) => {}
    }
    asked
}

/// Goes on with a stored certificate, unless it was revoked while this node was off: nobody who refuses it tells it so, but a
/// token that it has not used yet says that an operator wants it to join anew. An issuer knows.
///
/// A start waits [`ASK_TIME_MAX`] at most for that, and once for each token.
async fn by_stored(
    config: &Config,
    store: &Store,
    stored: NodeAuthority,
    text: &str,
) -> Result<NodeAuthority, IdentityError> {
    // It was good enough once; a damaged text is no reason not to start.
    let Ok(token) = text.parse::<Token>() else { return Ok(stored) };
    let id = token.unverified_claims().id;
    if store.join_token()? == Some(id) || !is_askable(config, store)? {
        return Ok(stored);
    }
    let mut seeds = resolve(&config.join).await;
    seeds.extend(stored_peers(store)?.into_iter().take(ASKED_MAX));
    let bundle = stored_documents(store, stored.bundle())?.bundle();
    let key = JoinKey::new()?;
    let renewal = join::renew(&seeds, &stored, &key, &bundle, clock::wall());
    match tokio::time::timeout(ASK_TIME_MAX, Box::pin(renewal)).await {
        Ok(Ok(renewed)) => {
            info!("the certificate on disk still counts and was renewed; the new token is not needed");
            store.put_join_token(id)?;
            Ok(renewed.authority)
        }
        Ok(Err(refused @ JoinError::Revoked { .. })) => {
            warn!(
                error = %Chain(&refused),
                "this node's certificate was revoked while it was off; discarding it and joining as a new identity with the new token"
            );
            by_token(config, store, &token).await
        }
        Ok(Err(error)) => {
            info!(error = %Chain(&error), "going on with the certificate on disk; no issuer could say whether it still counts");
            Ok(stored)
        }
        Err(_) => {
            info!(waited = ?ASK_TIME_MAX, "going on with the certificate on disk; no issuer answered in time");
            Ok(stored)
        }
    }
}

fn stored_peers(store: &Store) -> Result<Vec<SocketAddr>, StoreError> {
    Ok(store.peers()?.into_iter().map(|peer| peer.addr).collect())
}

/// Renews a certificate that ended; a token, if there is one, serves where its key no longer does.
async fn renew_ended(config: &Config, store: &Store, ended: &NodeAuthority) -> Result<NodeAuthority, IdentityError> {
    warn!(until = ended.not_after().0, "the node's certificate has ended; asking an issuer to renew it");
    let bundle = stored_documents(store, ended.bundle())?.bundle();
    let key = JoinKey::new()?;
    match (ask(config, &stored_peers(store)?, Wish::Renewal(ended, &key, &bundle)).await, &config.identity) {
        (Err(IdentityError::Join(refused)), IdentitySource::Token(text)) => {
            warn!(error = %Chain(&refused), "renewal refused; using the token");
            by_token(config, store, &text.reveal().parse()?).await
        }
        (outcome, _) => outcome,
    }
}

/// Whether the documents of the last run take the stored certificate back.
fn is_revoked(store: &Store, stored: &NodeAuthority) -> Result<bool, StoreError> {
    let bundle = stored_documents(store, stored.bundle())?.bundle();
    Ok(stored.check(&bundle).is_err())
}

/// The key of a join: on disk before it is shown to anybody, so that a crash or a lost answer costs no use of the token.
fn join_key(store: &Store) -> Result<JoinKey, IdentityError> {
    if let Some(bytes) = store.join_key()? {
        return Ok(JoinKey::from_bytes(bytes)?);
    }
    let key = JoinKey::new()?;
    store.put_join_key(&key.to_bytes())?;
    Ok(key)
}

#[derive(Clone, Copy)]
enum Wish<'a> {
    Token(&'a Token, &'a JoinKey),
    /// Of this authority, for this key, by a node that believes this.
    Renewal(&'a NodeAuthority, &'a JoinKey, &'a TrustBundle),
}

/// Whether there is anybody to ask: a seed, or a peer of the last run.
fn is_askable(config: &Config, store: &Store) -> Result<bool, StoreError> {
    Ok(!config.join.is_empty() || !store.peers()?.is_empty())
}

/// Asks the seeds, then `peers`, until one of them decides; pauses grow and are jittered.
async fn ask(config: &Config, peers: &[SocketAddr], wish: Wish<'_>) -> Result<NodeAuthority, IdentityError> {
    if config.join.is_empty() && peers.is_empty() {
        return Err(IdentityError::NoSeed);
    }
    let mut pause = RETRY;
    let mut is_first = true;
    loop {
        let mut seeds = resolve(&config.join).await;
        seeds.extend(peers.iter().take(ASKED_MAX));
        if mem::take(&mut is_first) && matches!(wish, Wish::Token(..)) {
            // Who answers nothing is waited for.
            info!(?seeds, "asking for this node's certificate");
        }
        let now = clock::wall();
        let answer = match wish {
            Wish::Token(token, key) => join::request_certificate(&seeds, token, key, &config.node_name, now).await,
            Wish::Renewal(old, key, bundle) => {
                join::renew(&seeds, old, key, bundle, now).await.map(|renewed| renewed.authority)
            }
        };
        match answer {
            Ok(authority) => return Ok(authority),
            Err(err) if is_transient(&err) => {
                let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
                warn!(error = %Chain(&err), retry_in = ?jittered, "no certificate yet");
                tokio::time::sleep(jittered).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
            Err(err) => return Err(err.into()),
        }
    }
}

/// Whether asking again, unchanged, may help.
fn is_transient(err: &JoinError) -> bool {
    matches!(
        err,
        JoinError::NoSeeds
            | JoinError::Unreachable { .. }
            | JoinError::NoIssuer { .. }
            | JoinError::Unable { .. }
            | JoinError::Exchange { .. }
    )
}

/// Resolves names, addresses and `host:port`; what does not resolve is logged and left out.
async fn resolve(targets: &[String]) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for target in targets {
        if let Ok(addr) = target.parse::<SocketAddr>() {
            found.push(addr);
        } else if let Ok(ip) = target.parse::<IpAddr>() {
            found.push(SocketAddr::new(ip, MESH_PORT_DEFAULT));
        } else {
            let with_port = if target.contains(':') { target.clone() } else { format!("{target}:{MESH_PORT_DEFAULT}") };
            match tokio::net::lookup_host(&with_port).await {
                Ok(addrs) => found.extend(addrs),
                Err(err) => warn!(target, error = %err, "the join address does not resolve"),
            }
        }
    }
    found
}

/// Days until the node's certificate ends.
pub(super) fn expiry_gauge(metrics: &Metrics, identity: &Identity) -> Result<Gauge, prometheus::Error> {
    let name = "weft_identity_node_certificate_expiry_days";
    let gauge = metrics.add(Gauge::new(name, "Days until the node's intermediate certificate ends.")?)?;
    gauge.set(days_left(identity));
    Ok(gauge)
}

#[expect(clippy::cast_precision_loss, reason = "seconds until a certificate ends are far below 2^52")]
fn days_left(identity: &Identity) -> f64 {
    identity.authority().not_after().since(clock::wall()).as_secs() as f64 / DAY
}

/// Why a certificate is renewed before half of its life is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Urgency {
    /// The mesh has a newer root.
    NewRoot,
    /// Nobody answers.
    Alone,
}

/// What a renewal is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    /// Half of the certificate's life is over, or it has not begun.
    Due,
    /// As [`Urgency::NewRoot`].
    NewRoot,
    /// As [`Urgency::Alone`].
    Alone,
}

/// Renews leaves locally, and the node's own certificate by an issuer from half its life on.
pub(super) struct Renewal {
    pub(super) identity: Arc<Identity>,
    pub(super) issuer: Arc<IssuerCell>,
    pub(super) store: Store,
    pub(super) gossip: GossipHandle,
    pub(super) seeds: Vec<String>,
    pub(super) expiry: Gauge,
    pub(super) connections: Connections,
    pub(super) snapshot: SnapshotReader,
}

impl Renewal {
    pub(super) async fn run(self, stop: CancellationToken) {
        let jitter: f64 = rand::rng().random_range(0.0..0.1);
        let mut pause = FIRST_LOOK;
        let mut next_walk = clock::now() + ALONE_FOR;
        loop {
            let urgency = tokio::select! {
                () = stop.cancelled() => return,
                urgency = self.urgency(next_walk) => Some(urgency),
                () = tokio::time::sleep(pause) => None,
            };
            pause = LOOK;
            let now = clock::wall();
            if let Err(err) = self.identity.renew_due(now) {
                warn!(error = %Chain(&err), "could not renew leaf certificates; the old ones serve until their end");
            }
            self.expiry.set(days_left(&self.identity));
            self.recheck(now);
            let authority = self.identity.authority();
            let life = authority.not_after().since(authority.not_before());
            let is_due = now >= authority.not_before().plus(life.mul_f64(0.5 + jitter));
            let is_early = now < authority.not_before();
            if is_early {
                // Made while a clock was ahead: nobody accepts it before its time.
                error!(
                    from = authority.not_before().0,
                    now = now.0,
                    "the node's certificate is not valid yet; renewing it"
                );
            }
            if !is_due && !is_early && urgency.is_none() {
                continue;
            }
            // A certificate that is due is renewed the usual way first: an issuer by itself.
            let is_alone = urgency == Some(Urgency::Alone) && !is_due;
            let reason = match urgency {
                Some(Urgency::Alone) if is_alone && !is_early => Reason::Alone,
                Some(Urgency::NewRoot) if !is_due && !is_early => Reason::NewRoot,
                _ => Reason::Due,
            };
            match self.renew_authority(&authority, reason, now).await {
                Ok(until) => {
                    if let Some(until) = until {
                        info!(until = until.0, "renewed the node's certificate");
                    } else {
                        debug!("this node is alone, and an issuer has nothing new to tell it");
                    }
                    next_walk = clock::now() + WALK_REST;
                }
                Err(IdentityError::Join(refused @ JoinError::Revoked { .. })) => {
                    error!(
                        error = %Chain(&refused),
                        "this node's certificate is revoked: the mesh refuses it; if this host is sound, start it with a new -token"
                    );
                    next_walk = clock::now() + WALK_REST;
                }
                Err(err) if is_alone => {
                    debug!(error = %Chain(&err), "this node is alone and no issuer answers");
                    next_walk = clock::now() + LOOK;
                }
                Err(err) => {
                    let left_secs = authority.not_after().since(now).as_secs();
                    warn!(error = %Chain(&err), left_secs, "could not renew the node's certificate; trying again");
                    pause = RETRY_MAX * 2;
                    next_walk = clock::now() + LOOK;
                }
            }
        }
    }

    /// Whether the mesh has a newer root than the one above this certificate.
    fn is_behind(&self, authority: &NodeAuthority) -> bool {
        let bundle = self.identity.bundle();
        bundle.roots.len() > 1 && !authority.is_under(&bundle)
    }

    /// Waits for a reason to renew before half of the life is over.
    ///
    /// A newer root: then for a random moment, so that a rotation does not bring every node to the issuers at once.
    /// Nobody answers: perhaps the others have another root, and an issuer can lead there.
    async fn urgency(&self, next_walk: Instant) -> Urgency {
        let (mut members, mut certificates) = (self.gossip.subscribe(), self.identity.subscribe());
        let mut alone_since = None;
        loop {
            certificates.mark_unchanged();
            if self.is_behind(&self.identity.authority()) {
                let rest = ROOT_RENEWAL_WITHIN.mul_f64(rand::rng().random_range(0.1..1.0));
                tokio::time::sleep(rest).await;
                return Urgency::NewRoot;
            }
            let now = clock::now();
            let is_alive = |member: &&MemberView| member.status == MemberStatus::Alive;
            let is_alone = members.borrow_and_update().members.iter().filter(is_alive).count() <= 1;
            alone_since = is_alone.then(|| alone_since.unwrap_or(now));
            let walk_at = alone_since.map(|since| next_walk.max(since + ALONE_FOR));
            if walk_at.is_some_and(|at| now >= at) {
                return Urgency::Alone;
            }
            let walk = async {
                match walk_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let is_ending = tokio::select! {
                changed = members.changed() => changed.is_err(),
                changed = certificates.changed() => changed.is_err(),
                () = walk => false,
            };
            if is_ending {
                // The agent stops.
                return std::future::pending().await;
            }
        }
    }

    /// Closes connections whose node's certificate has ended, unless the node has renewed it: then its records, which
    /// are signed with the newer one, stand in the catalogue.
    fn recheck(&self, now: UnixSeconds) {
        let snapshot = self.snapshot.load();
        let is_current =
            |node: &NodeName| snapshot.nodes.get(node).is_some_and(|node| node.status == MemberStatus::Alive);
        self.connections.recheck(&self.identity.bundle(), now, is_current);
    }

    /// Renews the certificate and returns its end; none: what an issuer granted says no more than the old one.
    async fn renew_authority(
        &self,
        old: &NodeAuthority,
        reason: Reason,
        now: UnixSeconds,
    ) -> Result<Option<UnixSeconds>, IdentityError> {
        let bundle = self.identity.bundle();
        // An issuer that nobody answers may itself stand under a root that the others have left.
        let issuer = self.issuer.active(&bundle, now).filter(|_| reason != Reason::Alone);
        let renewed = if let Some(issuer) = issuer {
            issuer.self_certify(old.node(), old.scope(), now)?
        } else {
            let key = next_key(old, reason)?;
            let renewed = join::renew(&self.askable().await, old, &key, &bundle, now).await?;
            for link in renewed.links {
                if let Err(err) = self.gossip.documents().offer(link).await {
                    debug!(error = %Chain(&err), "a link between roots is of no use here");
                }
            }
            if reason == Reason::Alone && renewed.authority.chain().get(1) == old.chain().get(1) {
                return Ok(None);
            }
            renewed.authority
        };
        let bytes = renewed.to_bytes()?;
        let until = renewed.not_after();
        self.identity.replace_authority(renewed, now)?;
        // A full disk must not cost the node its identity: it serves from memory, and the log says so.
        let store = self.store.clone();
        if let Ok(Err(err)) = tokio::task::spawn_blocking(move || store.put_identity(&bytes)).await {
            error!(error = %Chain(&err), "the renewed certificate is in use but not on disk; a restart begins with the old one");
        }
        Ok(Some(until))
    }

    /// Live issuers first, in random order, then whoever is alive (it names the issuers that it knows), then the failed
    /// and the seeds: a node whose certificate has ended sees everybody as failed.
    async fn askable(&self) -> Vec<SocketAddr> {
        let members = self.gossip.members();
        let own = self.identity.authority();
        let mut others: Vec<_> = members.members.iter().filter(|member| member.name != *own.node()).collect();
        others.sort_by_cached_key(|member| {
            let is_issuer = member.info.as_ref().is_some_and(|info| info.issuer);
            (member.status != MemberStatus::Alive, !is_issuer, rand::random::<u32>())
        });
        let mut askable: Vec<SocketAddr> = others.into_iter().take(ASKED_MAX).map(|member| member.addr).collect();
        askable.extend(resolve(&self.seeds).await);
        if askable.is_empty() {
            // Nobody answered since the start: those of the last run.
            let store = self.store.clone();
            let peers = tokio::task::spawn_blocking(move || store.peers()).await;
            let peers = peers.ok().and_then(Result::ok).unwrap_or_default();
            askable.extend(peers.into_iter().take(ASKED_MAX).map(|peer| peer.addr));
        }
        askable
    }
}

/// The key of the next certificate. A new one comes with each half of a certificate's life, and in between the old one stays:
/// what it signed is on its way to others, and would look forged to whoever has heard of another.
fn next_key(old: &NodeAuthority, reason: Reason) -> Result<JoinKey, PkiError> {
    if reason == Reason::Due { JoinKey::new() } else { old.key() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_comes_with_each_half_of_a_life_and_the_old_one_stays_in_between() {
        let now = UnixSeconds(1_800_000_000);
        let ca = pki::ephemeral(&"td".parse().unwrap(), now).unwrap();
        let old = ca.issuer().self_certify(&"a".parse().unwrap(), &"*".parse().unwrap(), now).unwrap();
        let own = old.key().unwrap().to_bytes();
        for (reason, is_new) in [(Reason::Due, true), (Reason::NewRoot, false), (Reason::Alone, false)] {
            assert_eq!(next_key(&old, reason).unwrap().to_bytes() != own, is_new, "{reason:?}");
        }
    }
}
