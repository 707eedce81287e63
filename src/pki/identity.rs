//! The live identity of a node: its authority and current SVIDs, behind one pointer that readers load without a lock.
//!
//! Invariants: an SVID handed out was minted by the authority beside it; at most [`SERVICE_SVIDS_MAX`] service SVIDs exist.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{NodeAuthority, PeerIdentity, PkiError, Svid, TrustBundle, tls, verify};
use crate::clock::UnixSeconds;
use crate::model::ServiceName;

/// Most service SVIDs that are kept; the one longest unused gives way.
pub const SERVICE_SVIDS_MAX: usize = 1024;

/// An SVID with its renewal point, at random within 50 to 80 % of its life, so that renewals spread.
#[derive(Debug)]
struct Managed {
    svid: Arc<Svid>,
    /// Above the index of everything that changed before.
    index: u64,
    renew_at: UnixSeconds,
    used: AtomicU64,
}

impl Managed {
    fn new(svid: Svid, index: u64, now: UnixSeconds) -> Arc<Self> {
        let renew_at = svid.renew_at(rand::random());
        Arc::new(Self { svid: Arc::new(svid), index, renew_at, used: AtomicU64::new(now.0) })
    }

    /// Tells whether it can be handed out; a clock that went back also ends it.
    fn is_fresh(&self, now: UnixSeconds) -> bool {
        self.svid.not_before <= now && now < self.renew_at
    }

    fn touch(&self, now: UnixSeconds) {
        if self.used.load(Ordering::Relaxed) != now.0 {
            self.used.store(now.0, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Clone)]
struct State {
    authority: Arc<NodeAuthority>,
    /// What is trusted at this moment: roots and revocations come and go while an authority stays.
    bundle: Arc<TrustBundle>,
    /// Of the last change to the roots.
    roots_index: u64,
    node: Arc<Managed>,
    certified: Arc<tls::NodeCertificates>,
    services: HashMap<ServiceName, Arc<Managed>>,
}

impl State {
    fn mint(
        authority: Arc<NodeAuthority>,
        bundle: Arc<TrustBundle>,
        index: u64,
        now: UnixSeconds,
    ) -> Result<Self, PkiError> {
        let node = Managed::new(authority.mint_node(now)?, index, now);
        let certified = Arc::new(tls::NodeCertificates::new(&node.svid, authority.root(&bundle))?);
        Ok(Self { authority, bundle, roots_index: index, node, certified, services: HashMap::new() })
    }
}

/// The live identity of a node: authority, current SVIDs (minted on first use, renewed at 50-80 % of life), bundle.
/// Shared by transport, proxy, gossip, API. Reads take no lock.
#[derive(Debug)]
pub struct Identity {
    state: ArcSwap<State>,
    /// The last index given out. Milliseconds since 1970 where that is more, so that none goes back over a restart.
    index: AtomicU64,
    changes: watch::Sender<()>,
}

impl Identity {
    /// Mints the node's leaf.
    ///
    /// # Errors
    /// [`PkiError::Expired`] when the authority has ended.
    pub fn new(authority: NodeAuthority, now: UnixSeconds) -> Result<Arc<Self>, PkiError> {
        let bundle = Arc::new(authority.bundle().clone());
        let index = now.0.saturating_mul(1000);
        let state = State::mint(Arc::new(authority), bundle, index, now)?;
        let changes = watch::Sender::new(());
        Ok(Arc::new(Self { state: ArcSwap::from_pointee(state), index: AtomicU64::new(index), changes }))
    }

    /// Returns a receiver that wakes after each change: another authority, other trust, a renewed certificate.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Returns an index above all before.
    fn next_index(&self, now: UnixSeconds) -> u64 {
        let above = |last: u64| last.saturating_add(1).max(now.0.saturating_mul(1000));
        let before = self.index.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(above(last)));
        above(before.unwrap_or_else(|last| last))
    }

    /// The authority in use (swapped at renewal).
    pub fn authority(&self) -> Arc<NodeAuthority> {
        Arc::clone(&self.state.load().authority)
    }

    /// Swaps the authority after a renewal and mints everything anew: services at their next use.
    ///
    /// # Errors
    /// [`PkiError::Expired`] when the new authority has ended; nothing changes.
    pub fn replace_authority(&self, authority: NodeAuthority, now: UnixSeconds) -> Result<(), PkiError> {
        let minted = State::mint(Arc::new(authority), self.bundle(), self.next_index(now), now)?;
        // The bundle may have changed since: what is trusted is not the authority's to say.
        self.state.rcu(|current| State {
            bundle: Arc::clone(&current.bundle),
            roots_index: current.roots_index,
            ..minted.clone()
        });
        self.changes.send_replace(());
        Ok(())
    }

    /// What is trusted at this moment.
    pub fn bundle(&self) -> Arc<TrustBundle> {
        Arc::clone(&self.state.load().bundle)
    }

    /// The trusted roots and revocations with the index of the last change to the roots.
    pub fn bundle_at(&self) -> (Arc<TrustBundle>, u64) {
        let state = self.state.load();
        (Arc::clone(&state.bundle), state.roots_index)
    }

    /// Replaces what is trusted; handshakes and signatures are checked against it from here on.
    pub fn set_bundle(&self, bundle: TrustBundle, now: UnixSeconds) {
        let (bundle, index) = (Arc::new(bundle), self.next_index(now));
        self.state.rcu(|current| {
            let is_same = current.bundle.roots == bundle.roots;
            let roots_index = if is_same { current.roots_index } else { index };
            State { bundle: Arc::clone(&bundle), roots_index, ..State::clone(current) }
        });
        self.changes.send_replace(());
    }

    /// The node's current leaf.
    pub fn node_svid(&self) -> Arc<Svid> {
        Arc::clone(&self.state.load().node.svid)
    }

    /// A service's current SVID, minted if there is none.
    ///
    /// # Errors
    /// [`PkiError::OutsideScope`], [`PkiError::Expired`].
    pub fn service_svid(&self, service: &ServiceName, now: UnixSeconds) -> Result<Arc<Svid>, PkiError> {
        self.service_svid_at(service, now).map(|(svid, _)| svid)
    }

    /// As [`Identity::service_svid`], with an index that grows with each renewal.
    ///
    /// # Errors
    /// As [`Identity::service_svid`].
    pub fn service_svid_at(&self, service: &ServiceName, now: UnixSeconds) -> Result<(Arc<Svid>, u64), PkiError> {
        let state = self.state.load();
        if let Some(found) = state.services.get(service).filter(|found| found.is_fresh(now)) {
            found.touch(now);
            return Ok((Arc::clone(&found.svid), found.index));
        }
        let minted = self.managed(&state.authority, service, now)?;
        self.state.rcu(|current| {
            let mut next = State::clone(current);
            // A renewal of the authority in the meantime wins; this SVID is still good for its caller.
            if Arc::ptr_eq(&current.authority, &state.authority) {
                make_room(&mut next.services, service);
                next.services.insert(service.clone(), Arc::clone(&minted));
            }
            next
        });
        self.changes.send_replace(());
        Ok((Arc::clone(&minted.svid), minted.index))
    }

    /// Renews what is past its renewal point; returns when to call again. A service's SVID that nobody asked for during
    /// the last hour is dropped: its next use mints it.
    ///
    /// # Errors
    /// [`PkiError::Expired`] when the authority has ended; what is in use stays.
    pub fn renew_due(&self, now: UnixSeconds) -> Result<UnixSeconds, PkiError> {
        let state = self.state.load_full();
        let mut renewed = HashMap::new();
        for (service, managed) in &state.services {
            let used = UnixSeconds(managed.used.load(Ordering::Relaxed));
            if managed.is_fresh(now) {
                continue;
            }
            let is_used = now.since(used) < super::certificate::LEAF_LIFE;
            let next = if is_used { Some(self.managed(&state.authority, service, now)?) } else { None };
            if let Some(next) = &next {
                next.used.store(used.0, Ordering::Relaxed);
            }
            renewed.insert(service.clone(), next);
        }
        let node = if state.node.is_fresh(now) {
            None
        } else {
            let index = self.next_index(now);
            Some(State::mint(Arc::clone(&state.authority), Arc::clone(&state.bundle), index, now)?)
        };
        self.state.rcu(|current| {
            let mut next = State::clone(current);
            if !Arc::ptr_eq(&current.authority, &state.authority) {
                return next;
            }
            if let Some(node) = &node {
                next.node = Arc::clone(&node.node);
                next.certified = Arc::clone(&node.certified);
            }
            for (service, managed) in &renewed {
                match managed {
                    Some(managed) => next.services.insert(service.clone(), Arc::clone(managed)),
                    None => next.services.remove(service),
                };
            }
            next
        });
        if node.is_some() || !renewed.is_empty() {
            self.changes.send_replace(());
        }
        let state = self.state.load();
        let first = state.services.values().map(|managed| managed.renew_at).min();
        Ok(first.map_or(state.node.renew_at, |first| first.min(state.node.renew_at)))
    }

    fn managed(
        &self,
        authority: &NodeAuthority,
        service: &ServiceName,
        now: UnixSeconds,
    ) -> Result<Arc<Managed>, PkiError> {
        Ok(Managed::new(authority.mint_service(service, now)?, self.next_index(now), now))
    }

    /// Checks who is on the other end of an established connection; none if it showed no certificate.
    ///
    /// # Errors
    /// [`PkiError::Verify`] if the chain has ended since the handshake.
    pub fn peer_of(&self, connection: &quinn::Connection, now: UnixSeconds) -> Result<Option<PeerIdentity>, PkiError> {
        type Chain = Vec<rustls::pki_types::CertificateDer<'static>>;
        let Some(Ok(chain)) = connection.peer_identity().map(<Box<dyn std::any::Any>>::downcast::<Chain>) else {
            return Ok(None);
        };
        Ok(Some(verify::check_peer(&chain, &self.bundle(), now)?))
    }

    /// The node's certificates in the form that rustls takes, minted anew if they are due (after a suspend, before the
    /// renewal timer runs).
    pub(super) fn certified(&self, now: UnixSeconds) -> Arc<tls::NodeCertificates> {
        if !self.state.load().node.is_fresh(now) {
            // On failure the old certificate is shown, and the peer says what is wrong with it.
            let _unused = self.renew_due(now);
        }
        Arc::clone(&self.state.load().certified)
    }
}

/// Leaves the longest unused service out when the map is full.
fn make_room(services: &mut HashMap<ServiceName, Arc<Managed>>, newcomer: &ServiceName) {
    if services.len() < SERVICE_SVIDS_MAX || services.contains_key(newcomer) {
        return;
    }
    let oldest = services.iter().min_by_key(|(_, managed)| managed.used.load(Ordering::Relaxed));
    if let Some(name) = oldest.map(|(name, _)| name.clone()) {
        services.remove(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ephemeral;
    use super::*;

    const NOW: UnixSeconds = UnixSeconds(1_800_000_000);

    fn identity(scope: &str) -> Arc<Identity> {
        let ca = ephemeral(&"td".parse().unwrap(), NOW).unwrap();
        let authority = ca.issuer().self_certify(&"a".parse().unwrap(), &scope.parse().unwrap(), NOW).unwrap();
        Identity::new(authority, NOW).unwrap()
    }

    #[test]
    fn svids_are_kept_and_renewed_within_50_to_80_percent_of_their_life() {
        let identity = identity("web");
        let web = "web".parse().unwrap();
        let first = identity.service_svid(&web, NOW).unwrap();
        assert!(Arc::ptr_eq(&first, &identity.service_svid(&web, NOW).unwrap()));
        let due = identity.renew_due(NOW).unwrap();
        let life = 3660.0_f64;
        let share = |at: UnixSeconds| f64::from(u32::try_from(at.0 - (NOW.0 - 60)).unwrap()) / life;
        assert!((0.49..0.8).contains(&share(due)), "{}", share(due));
        let later = UnixSeconds(NOW.0 + 3000);
        let node = identity.node_svid();
        assert!(identity.renew_due(later).unwrap() > later);
        assert!(!Arc::ptr_eq(&node, &identity.node_svid()));
        assert!(!Arc::ptr_eq(&first, &identity.service_svid(&web, later).unwrap()));
    }

    #[test]
    fn indexes_grow_with_what_they_are_of_and_a_change_wakes_who_waits() {
        let identity = identity("web");
        let web = "web".parse().unwrap();
        let (first, index) = identity.service_svid_at(&web, NOW).unwrap();
        assert!(index >= NOW.0 * 1000);
        let mut changes = identity.subscribe();
        assert_eq!(identity.service_svid_at(&web, NOW).unwrap().1, index);
        assert!(!changes.has_changed().unwrap(), "nothing was made");
        identity.renew_due(UnixSeconds(NOW.0 + 3000)).unwrap();
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        let (second, renewed) = identity.service_svid_at(&web, UnixSeconds(NOW.0 + 3000)).unwrap();
        assert!(renewed > index && !Arc::ptr_eq(&first, &second));

        // Revocations are no roots.
        let (bundle, roots) = identity.bundle_at();
        let mut next = TrustBundle::clone(&bundle);
        next.revoked = [super::super::Revoked::Token([0; 16])].into_iter().collect();
        identity.set_bundle(next.clone(), NOW);
        assert!(changes.has_changed().unwrap());
        assert_eq!(identity.bundle_at().1, roots);
        next.roots.insert(0, next.roots[0].clone());
        identity.set_bundle(next, NOW);
        assert!(identity.bundle_at().1 > roots.max(renewed));
    }

    #[test]
    fn a_service_outside_the_scope_gets_no_svid() {
        let refused = identity("web").service_svid(&"db".parse().unwrap(), NOW).unwrap_err();
        assert!(matches!(refused, PkiError::OutsideScope { .. }));
    }

    #[test]
    fn a_suspended_node_shows_a_fresh_certificate_unaided() {
        let identity = identity("web");
        let later = UnixSeconds(NOW.0 + 8 * 3600);
        identity.certified(later);
        assert!(identity.node_svid().not_after > later);
    }

    #[test]
    fn an_svid_that_nobody_asked_for_in_an_hour_goes_and_one_that_is_asked_for_is_renewed() {
        let identity = identity("*");
        let [web, db] = ["web", "db"].map(|name| name.parse::<ServiceName>().unwrap());
        let held = || {
            let mut names: Vec<_> = identity.state.load().services.keys().map(ToString::to_string).collect();
            names.sort();
            names
        };
        let first = identity.service_svid(&web, NOW).unwrap();
        identity.service_svid(&db, NOW).unwrap();
        let later = UnixSeconds(NOW.0 + 1000);
        identity.service_svid(&web, later).unwrap();
        // Both are past their renewal points; one was used within the hour.
        identity.renew_due(UnixSeconds(NOW.0 + 4000)).unwrap();
        assert_eq!(held(), ["web"]);
        assert!(!Arc::ptr_eq(&first, &identity.service_svid(&web, UnixSeconds(NOW.0 + 4000)).unwrap()));
    }

    #[test]
    fn what_was_made_while_the_clock_was_ahead_is_made_anew_once_it_is_right() {
        let identity = identity("web");
        let web = "web".parse().unwrap();
        let ahead = identity.service_svid(&web, UnixSeconds(NOW.0 + 1800)).unwrap();
        assert!(ahead.not_before > NOW);
        let right = identity.service_svid(&web, NOW).unwrap();
        assert!(right.not_before <= NOW && !Arc::ptr_eq(&ahead, &right));
    }

    #[test]
    fn the_longest_unused_service_gives_way() {
        let mut services = HashMap::new();
        let svid = identity("*").service_svid(&"x".parse().unwrap(), NOW).unwrap();
        for number in 0..SERVICE_SVIDS_MAX {
            let used = AtomicU64::new(if number == 7 { 1 } else { 2 });
            let managed = Managed { svid: Arc::clone(&svid), index: 0, renew_at: NOW, used };
            services.insert(format!("s{number}").parse().unwrap(), Arc::new(managed));
        }
        make_room(&mut services, &"new".parse().unwrap());
        assert_eq!(services.len(), SERVICE_SVIDS_MAX - 1);
        assert!(!services.contains_key("s7"));
    }
}
