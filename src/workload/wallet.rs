//! The certificates that apps hold: each with a key of its own, kept so that a second call gets the same one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::clock::UnixSeconds;
use crate::model::ServiceName;
use crate::pki::{Identity, NodeAuthority, PkiError, Svid};

/// A certificate, by whom it was made and when another takes its place.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) svid: Arc<Svid>,
    pub(super) renew_at: UnixSeconds,
    authority: Arc<NodeAuthority>,
}

/// Certificates of the services that are registered here, as many as were asked for.
#[derive(Debug)]
pub(super) struct Wallet {
    identity: Arc<Identity>,
    kept: Mutex<BTreeMap<ServiceName, Kept>>,
}

impl Wallet {
    pub(super) fn new(identity: Arc<Identity>) -> Self {
        Self { identity, kept: Mutex::default() }
    }

    /// Returns the certificate of `service`, made anew where it is due or the node's authority is another one.
    ///
    /// # Errors
    /// [`PkiError::OutsideScope`], [`PkiError::Expired`].
    pub(super) fn svid(&self, service: &ServiceName, now: UnixSeconds) -> Result<Kept, PkiError> {
        let authority = self.identity.authority();
        let mut all = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let is_good = |kept: &&Kept| {
            Arc::ptr_eq(&kept.authority, &authority) && kept.svid.not_before <= now && now < kept.renew_at
        };
        if let Some(kept) = all.get(service).filter(is_good) {
            return Ok(kept.clone());
        }
        let svid = Arc::new(authority.mint_service(service, now)?);
        let kept = Kept { renew_at: svid.renew_at(rand::random()), svid, authority };
        all.insert(service.clone(), kept.clone());
        Ok(kept)
    }

    /// Forgets the certificates of services that are not `registered`.
    pub(super) fn retain(&self, registered: &BTreeSet<&ServiceName>) {
        let mut all = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|service, _| registered.contains(service));
    }
}
