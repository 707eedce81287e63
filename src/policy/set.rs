//! All documents that a node holds, and what follows from them.
//!
//! The set is a join: for each id the greatest version wins, among equal ones the smaller hash, so that nodes which were
//! offered the same documents hold the same, in whatever order. Two things take documents away: their own end, and a
//! document of a root that takes back the key that signed them: an operator's, or an older root's with everything that
//! stands under it. Only a root can do the latter: two operators that revoke each other would else chase each other round
//! the mesh; and only a newer root can take an older one back: a thief of the old key would else do so first.
//!
//! Links between roots stay, whoever takes their signer back: they lead those on who were off. But who knows that a root
//! was taken back follows no link of its any more that leads to a root unheard of.

use std::collections::{BTreeMap, BTreeSet};

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::bundle::{RootLink, link_name};
use super::document::{Document, DocumentDigest, DocumentError, DocumentId, DocumentKind};
use super::revocation::RevocationBody;
use super::written::{ConfigBody, IntentionBody, check_entry, entry_ends, intention_ends};
use super::{DOCUMENT_BYTES_MAX, SKEW_MAX};
use crate::clock::UnixSeconds;
use crate::model::{NodeName, OperatorScope, Right, TrustDomain};
use crate::pki::{
    self, DocumentSigner, PkiError, Revocations, Revoked, Signed, SpkiHash, TrustBundle, Utc, VerifyError,
    verify_document,
};

/// Most documents: their digests fit one frame, and only operators can make any.
pub const DOCUMENTS_MAX: usize = 2048;
/// Most bytes of documents.
pub const SET_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Of these, places that intentions and config entries leave free: a revocation always finds one.
const RESERVED: usize = 256;
/// Of these, bytes that intentions and config entries leave free.
const RESERVED_BYTES: usize = 2 * 1024 * 1024;
/// Most forks that are remembered as reported.
const FORKS_MAX: usize = 256;
/// Most bytes of losing contents that are kept, beside those of the set, so that others hear of the forks: past it a fork is
/// known to those alone who were offered both contents.
const RIVALS_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Most roots: at one a year more than a lifetime.
const ROOTS_MAX: usize = 64;

/// Why a document is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It is another mesh's.
    #[error("the document is of trust domain `{theirs}`, this mesh is `{ours}`: sign it with this mesh's CA")]
    TrustDomain {
        /// This mesh's.
        ours: TrustDomain,
        /// The document's.
        theirs: TrustDomain,
    },
    /// It has ended.
    #[error("the document was valid until {} and this host's clock says {}: check the clock, or sign it anew", Utc(*.until), Utc(*.now))]
    Ended {
        /// Its end.
        until: UnixSeconds,
        /// This host's wall time.
        now: UnixSeconds,
    },
    /// It begins in the future.
    #[error("the document is valid from {} and this host's clock says {}: check the clocks of both hosts (NTP)", Utc(*.from), Utc(*.now))]
    Early {
        /// Its beginning.
        from: UnixSeconds,
        /// This host's wall time.
        now: UnixSeconds,
    },
    /// Begin, end and the signer's certificate do not fit together.
    #[error("the document does not lie within its signer's certificate: sign it anew")]
    Span,
    /// The signature or its signer is not believed.
    #[error("the document is not believed ({0})")]
    Signature(#[source] VerifyError),
    /// The content names another key than the certificate's.
    #[error("the document names another signer than its certificate: it was altered")]
    OtherSigner,
    /// The signer may not sign this.
    #[error("{id} must be signed by the root key: use the CA directory that holds root.key")]
    NotAllowed {
        /// What was signed.
        id: DocumentId,
    },
    /// The operator may not sign this.
    #[error(
        "operator `{operator}` may sign `{may}`, not {right} of `{name}`: ask an operator who may, or the holder of the root for a wider certificate"
    )]
    OutsideScope {
        /// Who signed.
        operator: NodeName,
        /// What it may sign.
        may: OperatorScope,
        /// What it would need.
        right: Right,
        /// Over which name.
        name: String,
    },
    /// The body is malformed.
    #[error("the document's body is malformed")]
    Body(#[source] DocumentError),
    /// The name is not what the body says.
    #[error("{id} must be named `{wanted}`")]
    Name {
        /// How it is named.
        id: DocumentId,
        /// How it should be.
        wanted: String,
    },
    /// There are too many.
    #[error("the mesh holds its most documents ({DOCUMENTS_MAX}, {SET_BYTES_MAX} bytes): let old ones end first")]
    Full,
}

/// What became of an offered document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offered {
    /// It is held from here on, and counts.
    Stored,
    /// It was held already.
    Known,
    /// A newer version is held.
    Older,
}

/// Two contents of one version, both signed: an operator's key is used twice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fork {
    /// Which document.
    pub id: DocumentId,
    /// Which version.
    pub version: u64,
}

/// A document that is held.
#[derive(Debug, Clone)]
pub struct Held {
    /// The document.
    pub document: Document,
    /// Who signed it.
    pub signer: DocumentSigner,
    /// Another content of this version, which lost: the proof of a fork.
    pub rival: Option<Document>,
    /// The key of the root that its signer's certificate stands under: a root's own, if it signed.
    root: SpkiHash,
    bytes: usize,
}

impl Held {
    /// What others need to know to compare.
    pub fn digest(&self) -> HeldDigest {
        HeldDigest { digest: self.document.digest(), is_forked: self.rival.is_some() }
    }
}

/// What a set holds of one document, in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldDigest {
    /// The document.
    pub digest: DocumentDigest,
    /// The losing content of its version is held as well.
    pub is_forked: bool,
}

/// The set. See the module's text.
#[derive(Debug)]
pub struct DocumentSet {
    trust_domain: TrustDomain,
    /// What this node knew to begin with.
    base: Vec<CertificateDer<'static>>,
    held: BTreeMap<DocumentId, Held>,
    bytes: usize,
    forks: BTreeSet<Fork>,
    /// Every root that a walk from the base reaches, the newest first.
    roots: Vec<CertificateDer<'static>>,
    /// Keys that the roots took back: what they, or anybody certified by them, signed is void.
    banned: BTreeSet<SpkiHash>,
    revocations: Revocations,
}

/// What a good signature says.
struct Verified {
    signer: DocumentSigner,
    /// See [`Held`].
    root: SpkiHash,
}

/// How a walk goes over one link.
struct Link {
    old: CertificateDer<'static>,
    new: CertificateDer<'static>,
}

impl DocumentSet {
    /// Holds nothing; believes the roots of `base`.
    pub fn new(base: &TrustBundle) -> Self {
        Self {
            trust_domain: base.trust_domain.clone(),
            base: base.roots.clone(),
            held: BTreeMap::new(),
            bytes: 0,
            forks: BTreeSet::new(),
            roots: base.roots.clone(),
            banned: BTreeSet::new(),
            revocations: Revocations::default(),
        }
    }

    /// Takes `document` if it is new and good.
    ///
    /// # Errors
    /// [`Refused`]; the set is unchanged, but for a fork that is noted.
    pub fn offer(&mut self, document: Document, now: UnixSeconds) -> Result<Offered, Refused> {
        let content = document.content();
        if content.trust_domain != self.trust_domain {
            let (ours, theirs) = (self.trust_domain.clone(), content.trust_domain.clone());
            return Err(Refused::TrustDomain { ours, theirs });
        }
        if now > content.not_after {
            return Err(Refused::Ended { until: content.not_after, now });
        }
        if content.not_before > now.plus(SKEW_MAX) {
            return Err(Refused::Early { from: content.not_before, now });
        }
        let digest = document.digest();
        let mut is_fork = false;
        if let Some(held) = self.held.get(&digest.id) {
            let ours = held.document.digest();
            // The whole hash tells the same document: half of it could be met by another.
            if held.document.hash() == document.hash() {
                return Ok(Offered::Known);
            }
            is_fork = ours.version == digest.version;
            if !digest.replaces(&ours) && (!is_fork || held.rival.is_some()) {
                return Ok(Offered::Older);
            }
        }
        let Verified { signer, root } = self.verify(&document)?;
        if is_fork && self.forks.len() < FORKS_MAX {
            self.forks.insert(Fork { id: digest.id.clone(), version: digest.version });
        }
        let rivals: usize = self.held.values().filter_map(|held| Some(held.rival.as_ref()?.to_bytes().len())).sum();
        let is_kept = |rival: &Document| rivals + rival.to_bytes().len() <= RIVALS_BYTES_MAX;
        if let Some(held) = self.held.get_mut(&digest.id).filter(|held| !digest.replaces(&held.document.digest())) {
            held.rival = Some(document).filter(is_kept);
            return Ok(Offered::Older);
        }
        let before = self.held.get(&digest.id);
        let rival = before.filter(|_| is_fork).map(|held| held.document.clone()).filter(is_kept);
        let bytes = document.to_bytes().len();
        let freed = before.map_or(0, |held| held.bytes);
        let is_policy = digest.id.kind.is_policy();
        let (places, space) = if is_policy {
            (DOCUMENTS_MAX - RESERVED, SET_BYTES_MAX - RESERVED_BYTES)
        } else {
            (DOCUMENTS_MAX, SET_BYTES_MAX)
        };
        if (before.is_none() && self.held.len() >= places) || self.bytes - freed + bytes > space {
            return Err(Refused::Full);
        }
        self.bytes = self.bytes - freed + bytes;
        self.held.insert(digest.id, Held { document, signer, rival, root, bytes });
        // Nothing that is believed follows from policy.
        if !is_policy {
            self.derive();
        }
        Ok(Offered::Stored)
    }

    /// Checks everything that does not depend on what is held, but for roots and banned keys.
    fn verify(&self, document: &Document) -> Result<Verified, Refused> {
        let content = document.content();
        let link = match content.id.kind {
            DocumentKind::Bundle => {
                let body = RootLink::from_bytes(&content.body).map_err(Refused::Body)?;
                Some((body.certificate(), body.proof))
            }
            DocumentKind::Revocation => {
                RevocationBody::from_bytes(&content.body).map_err(Refused::Body)?;
                None
            }
            DocumentKind::Intention => {
                let body = IntentionBody::from_bytes(&content.body).map_err(Refused::Body)?;
                let ends = intention_ends(&content.id.name);
                let said = body.0.map(|intention| intention.name());
                if ends.is_none() || said.is_some_and(|said| said != content.id.name.as_str()) {
                    return Err(Refused::Name { id: content.id.clone(), wanted: "source:destination".to_owned() });
                }
                None
            }
            DocumentKind::Config => {
                let body = ConfigBody::from_bytes(&content.body).map_err(Refused::Body)?;
                let said = body.0.map(|text| check_entry(&text)).transpose().map_err(Refused::Body)?;
                let is_named = |(kind, name): (String, String)| format!("{kind}:{name}") == content.id.name.as_str();
                if entry_ends(&content.id.name).is_none() || !said.is_none_or(is_named) {
                    return Err(Refused::Name { id: content.id.clone(), wanted: "kind:name".to_owned() });
                }
                None
            }
        };
        // Whoever knows either end of a link can check it: the other end is vouched for by this one.
        let mut roots = self.roots.clone();
        if let Some((new, proof)) = &link {
            let old = document.certificate();
            pki::verify_link(old, new, proof, &self.trust_domain).map_err(Refused::Signature)?;
            if roots.contains(new) {
                roots.push(old.clone());
            }
        }
        // Checked at its end: a signer's certificate covers all of a document's time.
        let bundle = TrustBundle {
            trust_domain: self.trust_domain.clone(),
            roots,
            revoked: self.banned.iter().copied().map(Revoked::Key).collect(),
        };
        let (certificate, at) = (document.certificate(), content.not_after);
        let checked = verify_document(certificate, document.signed_bytes(), document.signature(), &bundle, at);
        let Signed { signer, may, key } = checked.map_err(Refused::Signature)?;
        if key != content.signer {
            return Err(Refused::OtherSigner);
        }
        let (begins, _) = pki::validity(certificate).map_err(|error: PkiError| match error {
            PkiError::Verify(error) => Refused::Signature(error),
            _ => Refused::Span,
        })?;
        if content.not_before < begins || content.not_after < content.not_before {
            return Err(Refused::Span);
        }
        let DocumentSigner::Operator(operator) = &signer else {
            let is_harmless = link.is_some_and(|(new, _)| self.leads_to_known(&content.id, &new));
            return if self.banned.contains(&key) && !is_harmless {
                Err(Refused::Signature(VerifyError::Revoked { role: "root", key }))
            } else {
                Ok(Verified { signer, root: key })
            };
        };
        let root = pki::root_of(certificate, &bundle, at).map_err(Refused::Signature)?;
        if self.banned.contains(&root) {
            return Err(Refused::Signature(VerifyError::Revoked { role: "root", key: root }));
        }
        let name = content.id.name.as_str();
        let named = name.split_once(':').map_or(name, |(_, named)| named);
        let (right, name) = match content.id.kind {
            DocumentKind::Bundle => return Err(Refused::NotAllowed { id: content.id.clone() }),
            DocumentKind::Revocation => (Right::Revocations, name),
            DocumentKind::Intention => (Right::Intentions, named),
            DocumentKind::Config => (Right::Config, named),
        };
        if may.allows(right, name) {
            return Ok(Verified { signer, root });
        }
        let (operator, name) = (operator.clone(), name.to_owned());
        Err(Refused::OutsideScope { operator, may, right, name })
    }

    /// Forgets what has ended; returns what that was.
    pub fn expire(&mut self, now: UnixSeconds) -> Vec<DocumentDigest> {
        let has_ended = |held: &Held| held.document.content().not_after < now;
        let ended: Vec<DocumentDigest> =
            self.held.values().filter(|held| has_ended(held)).map(|held| held.document.digest()).collect();
        if !ended.is_empty() {
            self.held.retain(|_, held| !has_ended(held));
            self.derive();
        }
        // Nobody takes it any more, so nobody can be told.
        for held in self.held.values_mut() {
            held.rival.take_if(|rival| rival.content().not_after < now);
        }
        ended
    }

    /// Tells whether a link of a root that was taken back tells nothing but the way from it to a root that is believed.
    fn leads_to_known(&self, id: &DocumentId, new: &CertificateDer<'static>) -> bool {
        let is_good = pki::spki(new).is_ok_and(|key| !self.banned.contains(&key));
        is_good && self.roots.contains(new) && !self.held.contains_key(id)
    }

    /// Works out anew what follows from the documents.
    fn derive(&mut self) {
        self.roots = self.walk();
        self.banned = self.bans();
        let banned = &self.banned;
        let is_void = |held: &Held| banned.contains(&held.root) || banned.contains(&held.document.content().signer);
        self.held.retain(|id, held| id.kind == DocumentKind::Bundle || !is_void(held));
        self.revocations = entries(self.held.values()).collect();
        for held in self.held.values_mut() {
            held.rival.take_if(|rival| banned.contains(&rival.content().signer));
        }
        self.bytes = self.held.values().map(|held| held.bytes).sum();
    }

    /// The keys that the roots took back: each root's word counts against everybody but itself and the newer ones, unless a
    /// newer one took it back.
    fn bans(&self) -> BTreeSet<SpkiHash> {
        let mut banned = BTreeSet::new();
        let mut untouchable = BTreeSet::new();
        for root in self.roots.iter().filter_map(|root| pki::spki(root).ok()) {
            untouchable.insert(root);
            if banned.contains(&root) {
                continue;
            }
            let own = |held: &&Held| held.signer == DocumentSigner::Root && held.root == root;
            for entry in entries(self.held.values().filter(own)) {
                if let Revoked::Key(key) = entry
                    && !untouchable.contains(&key)
                {
                    banned.insert(key);
                }
            }
        }
        banned
    }

    /// Follows the links from the base, both ways, and puts the roots in order, the newest first.
    fn walk(&self) -> Vec<CertificateDer<'static>> {
        let links: Vec<Link> = self.links().collect();
        let mut known: Vec<&CertificateDer<'static>> = self.base.iter().collect();
        let mut has_grown = true;
        while has_grown && known.len() < ROOTS_MAX {
            let before = known.len();
            for link in &links {
                let (has_old, has_new) = (known.contains(&&link.old), known.contains(&&link.new));
                match (has_old, has_new) {
                    (true, false) => known.push(&link.new),
                    (false, true) => known.push(&link.old),
                    _ => {}
                }
            }
            has_grown = known.len() > before;
        }
        // The further along the links, the newer: a root's rank is the number of links that lead up to it.
        let rank = |root: &CertificateDer<'_>| links.iter().rposition(|link| link.new == *root).map_or(0, |at| at + 1);
        let mut roots: Vec<CertificateDer<'static>> = known.into_iter().cloned().collect();
        roots.sort_by_key(|root| std::cmp::Reverse(rank(root)));
        roots
    }

    fn links(&self) -> impl Iterator<Item = Link> {
        let bundles = self.held.iter().filter(|(id, _)| id.kind == DocumentKind::Bundle);
        bundles.filter_map(|(_, held)| {
            let body = RootLink::from_bytes(&held.document.content().body).ok()?;
            Some(Link { old: held.document.certificate().clone(), new: body.certificate() })
        })
    }

    /// The issuers' certificates that the links brought.
    pub fn issuer_certificates(&self) -> Vec<CertificateDer<'static>> {
        let bundles = self.held.iter().filter(|(id, _)| id.kind == DocumentKind::Bundle);
        let bodies = bundles.filter_map(|(_, held)| RootLink::from_bytes(&held.document.content().body).ok());
        bodies.flat_map(|link| link.issuers).map(CertificateDer::from).collect()
    }

    /// The links between roots, for a newcomer or a node that was off: at most `count`, the latest, in order of the walk.
    pub fn link_documents(&self, count: usize) -> Vec<Vec<u8>> {
        let bundles = self.held.iter().filter(|(id, _)| id.kind == DocumentKind::Bundle);
        let links: Vec<Vec<u8>> = bundles.map(|(_, held)| held.document.to_bytes()).collect();
        links.iter().skip(links.len().saturating_sub(count)).cloned().collect()
    }

    /// The number that the next root would have: one more than that of the last link, and 2 where there is none.
    pub fn next_root(&self) -> u32 {
        let last = (2..).take(ROOTS_MAX).take_while(|number| {
            self.held.contains_key(&DocumentId { kind: DocumentKind::Bundle, name: link_name(*number) })
        });
        last.last().map_or(2, |number| number + 1)
    }

    /// Every root that follows from the base, the newest first.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Everything that is taken back.
    pub fn revocations(&self) -> &Revocations {
        &self.revocations
    }

    /// What a verifier is to believe: the roots that are not taken back, and all revocations.
    pub fn bundle(&self) -> TrustBundle {
        let is_good = |root: &&CertificateDer<'static>| pki::spki(root).is_ok_and(|key| !self.banned.contains(&key));
        // Never empty: nobody takes the newest back.
        let roots: Vec<_> = self.roots.iter().filter(is_good).cloned().collect();
        let (trust_domain, revoked) = (self.trust_domain.clone(), self.revocations.clone());
        TrustBundle { trust_domain, roots, revoked }
    }

    /// What is held, in order of id.
    pub fn iter(&self) -> impl Iterator<Item = &Held> {
        self.held.values()
    }

    /// Looks one up.
    pub fn get(&self, id: &DocumentId) -> Option<&Held> {
        self.held.get(id)
    }

    /// How many are held.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The forks that were seen.
    pub fn forks(&self) -> impl Iterator<Item = &Fork> {
        self.forks.iter()
    }

    /// Equal in two sets that hold the same documents and know of the same forks: the exclusive or of the hashes' first 8
    /// bytes, each rotated by half where the document is forked.
    pub fn set_hash(&self) -> u64 {
        let one = |held: &Held| {
            let HeldDigest { digest, is_forked } = held.digest();
            if is_forked { digest.hash.rotate_left(32) } else { digest.hash }
        };
        self.held.values().fold(0, |hash, held| hash ^ one(held))
    }

    /// What is held, as digests in order of id; at most [`DOCUMENTS_MAX`].
    pub fn digests(&self) -> Vec<HeldDigest> {
        self.held.values().map(Held::digest).collect()
    }

    /// Tells whether a document with this digest would be news.
    pub fn is_news(&self, digest: &DocumentDigest) -> bool {
        self.held.get(&digest.id).is_none_or(|held| digest.replaces(&held.document.digest()))
    }

    /// What is held here and is news to a set with `theirs`, in order of id, at most `bytes_max` of it: newer versions, and
    /// the other content of a version that was signed twice, which loses there and is reported.
    pub fn newer_than(&self, theirs: &[HeldDigest], bytes_max: usize) -> Vec<Vec<u8>> {
        let theirs: BTreeMap<&DocumentId, &HeldDigest> =
            theirs.iter().map(|theirs| (&theirs.digest.id, theirs)).collect();
        let mut newer = Vec::new();
        let mut bytes = 0;
        for held in self.held.values() {
            let ours = held.document.digest();
            let news = match theirs.get(&ours.id) {
                Some(theirs) if theirs.digest == ours => held.rival.as_ref().filter(|_| !theirs.is_forked),
                Some(theirs) if theirs.digest.version > ours.version => None,
                _ => Some(&held.document),
            };
            let Some(news) = news.map(Document::to_bytes) else { continue };
            bytes += news.len();
            if bytes > bytes_max.max(DOCUMENT_BYTES_MAX) {
                break;
            }
            newer.push(news);
        }
        newer
    }
}

/// Follows `links` from the roots of `base`, checking each, and returns all roots that they lead to, the newest first.
pub fn walk(base: &TrustBundle, links: &[Vec<u8>], now: UnixSeconds) -> Vec<CertificateDer<'static>> {
    let mut set = DocumentSet::new(base);
    let documents = links.iter().take(ROOTS_MAX).filter_map(|bytes| Document::from_bytes(bytes).ok());
    for document in documents.filter(|document| document.content().id.kind == DocumentKind::Bundle) {
        // What does not lead on is of no use; the caller sees where the walk ends.
        let _refused = set.offer(document, now);
    }
    set.roots
}

fn entries<'h>(held: impl Iterator<Item = &'h Held>) -> impl Iterator<Item = Revoked> {
    let of_kind = held.filter(|held| held.document.content().id.kind == DocumentKind::Revocation);
    // The body was checked when the document was taken.
    of_kind
        .filter_map(|held| RevocationBody::from_bytes(&held.document.content().body).ok())
        .flat_map(|body| body.entries)
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
