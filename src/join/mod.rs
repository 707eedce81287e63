//! How a newcomer gets its certificate from a seed, and how a node renews it.
//!
//! ```text
//!   request_certificate / renew --QUIC weft-join/1--> JoinServer: token, name, uses -> issuer signs
//! ```
//!
//! Invariants: a token is shown to a proven issuer only; the private key never leaves the newcomer; a renewal copies name
//! and scope from the old certificate; an exchange is bounded in time, streams and bytes.
//! Not here: the messages (`pki::join`), the accept loop and how many handshakes run at once (`transport`).

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use tracing::{info, warn};

use crate::clock::{self, UnixSeconds};
use crate::hearsay::{Excerpt, Seldom};
use crate::model::{NodeName, ServeScope};
use crate::pki::join::{
    Answer, Denied, EXPORTER_LABEL, Hello, ISSUERS_MAX, JOIN_FRAME_BYTES_MAX, KNOWN_ROOTS_MAX, LINKS_BYTES_MAX,
    Request, Role, Welcome, Why, renewal_message,
};
use crate::pki::{
    BACKDATE, Issuer, IssuerCell, JoinKey, JoinVerifier, NodeAuthority, PkiError, Plane, SpkiHash, Token, TrustBundle,
    VerifyError, check_revoked, join as checks, root_digest,
};
use crate::policy::{self, Document};
use crate::transport;
use crate::wire::{self, WireError};

/// Longest exchange, on either side: two round trips, a disk write and a signature, with room for a slow link.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// A stranger who says nothing for this long gives its place to another.
const STEP_TIMEOUT: Duration = Duration::from_secs(3);
/// How far two clocks may differ: leaves begin this long in the past.
pub const CLOCK_SKEW_MAX: Duration = Duration::from_secs(60);
/// How long after its end a certificate can still be renewed by its key.
pub const RENEW_GRACE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Most addresses that one call dials: the seeds and the issuers that they name.
const DIALS_MAX: usize = 32;
/// Lines about refusals that are logged in a minute: a rack that starts with an old token is one of them.
const REFUSALS_TOLD_MAX: u32 = 10;
/// Longest reason of a refusal that is shown, in characters.
const REASON_CHARS_MAX: usize = 512;

/// Why no certificate was obtained.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// There is no address to dial.
    #[error("no seed address is known: give one with -join")]
    NoSeeds,
    /// Nobody answers at the address.
    #[error("no weft agent answers at {seed} (UDP): check the address, the firewall and that the agent runs")]
    Unreachable {
        /// The address.
        seed: SocketAddr,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The seed's chain is not believed; for a newcomer also: the token is of another CA.
    #[error("{seed} is not believed: {source}")]
    Untrusted {
        /// The address.
        seed: SocketAddr,
        /// Which rule is broken. Part of the text, because it says what to do.
        source: Box<VerifyError>,
    },
    /// The clocks differ too much.
    #[error(
        "clocks differ by {} s: this host's says {} and {seed}'s {} (seconds since 1970); at most {} s are allowed: \
         set both by NTP",
        ours.0.abs_diff(theirs.0), ours.0, theirs.0, CLOCK_SKEW_MAX.as_secs()
    )]
    ClockSkew {
        /// The address.
        seed: SocketAddr,
        /// This host's wall time.
        ours: UnixSeconds,
        /// The seed's.
        theirs: UnixSeconds,
    },
    /// An issuer refuses.
    #[error("{seed} refuses: {reason}")]
    Refused {
        /// The address.
        seed: SocketAddr,
        /// Its reason.
        reason: String,
    },
    /// What was shown is revoked: only a new token, with a new key, leads back.
    #[error("{seed} refuses: {reason}")]
    Revoked {
        /// The address.
        seed: SocketAddr,
        /// Its reason.
        reason: String,
    },
    /// An issuer cannot certify anybody at this moment; others were asked, too.
    #[error("the issuer at {seed} cannot: {reason}")]
    Unable {
        /// The address.
        seed: SocketAddr,
        /// Its reason.
        reason: String,
    },
    /// The seeds are no issuers and know none that answers.
    #[error("no issuer was reached by way of {seed}: start an agent with -issuer, or join by its address")]
    NoIssuer {
        /// The last address.
        seed: SocketAddr,
    },
    /// The seed does not keep to the protocol.
    #[error("{seed} broke off the join exchange")]
    Exchange {
        /// The address.
        seed: SocketAddr,
        /// How.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What was granted is not what was asked for.
    #[error("{seed} granted a certificate for `{found}`, but `{asked}` was asked for")]
    OtherName {
        /// The address.
        seed: SocketAddr,
        /// The name asked for.
        asked: NodeName,
        /// The name granted.
        found: NodeName,
    },
    /// A key, request or signature cannot be made here.
    #[error("cannot prepare to join")]
    Local(#[source] PkiError),
}

/// What an issuer must know of the mesh.
pub trait JoinDirectory: Send + Sync {
    /// Where a live node of this name is, if there is one.
    fn live_holder(&self, name: &NodeName) -> Option<SocketAddr>;
    /// Known live issuers.
    fn issuers(&self) -> Vec<SocketAddr>;
}

/// Where an issuer counts the uses of tokens; calls may block on a disk.
pub trait TokenLedger: Send + Sync {
    /// Counts one use by `key` and returns how many there were before; none if this key used the token minutes ago: its
    /// answer was lost, and it asks again.
    fn count_use(&self, id: [u8; 16], not_after: u64, key: [u8; 32]) -> Result<Option<u32>, String>;
}

/// What a node believes, and how others come to believe it.
pub trait JoinTrust: Send + Sync {
    /// What is believed at this moment.
    fn bundle(&self) -> Arc<TrustBundle>;
    /// The documents that lead from root to root, in order of the walk.
    fn links(&self) -> Vec<Vec<u8>>;
}

/// Answers newcomers and renewals on the join plane.
pub struct JoinServer {
    issuer: Arc<IssuerCell>,
    trust: Arc<dyn JoinTrust>,
    directory: Arc<dyn JoinDirectory>,
    ledger: Arc<dyn TokenLedger>,
    /// Whoever reaches the port can have itself refused, or leave.
    refusals_told: Seldom,
    ends_told: Seldom,
}

impl std::fmt::Debug for JoinServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JoinServer(issuer: {})", self.issuer.load().is_some())
    }
}

type Streams = (quinn::SendStream, quinn::RecvStream);
type Failure = Box<dyn std::error::Error + Send + Sync>;

impl JoinServer {
    /// Makes a server; without an issuer it only names others.
    pub fn new(
        issuer: Arc<IssuerCell>,
        trust: Arc<dyn JoinTrust>,
        directory: Arc<dyn JoinDirectory>,
        ledger: Arc<dyn TokenLedger>,
    ) -> Arc<Self> {
        let (refusals_told, ends_told) = (Seldom::new(REFUSALS_TOLD_MAX), Seldom::default());
        Arc::new(Self { issuer, trust, directory, ledger, refusals_told, ends_told })
    }

    /// The links that a newcomer needs who believes the roots of `knows`, as much as fits a frame, the latest first to stay.
    fn links_for(&self, knows: &[[u8; 32]]) -> Vec<Vec<u8>> {
        let bundle = self.trust.bundle();
        if bundle.roots.first().is_none_or(|root| knows.contains(&root_digest(root))) {
            return Vec::new();
        }
        let mut links = self.trust.links();
        while links.iter().map(Vec::len).sum::<usize>() > LINKS_BYTES_MAX {
            links.remove(0);
        }
        links
    }

    /// Serves one connection until its exchange ends, at most [`JOIN_TIMEOUT`], and closes it.
    ///
    /// # Cancel safety
    /// Cancelling leaves the connection open to its own idle timeout; a use of a token may have been counted.
    pub async fn serve(&self, connection: quinn::Connection) {
        let exchange = async {
            self.exchange(&connection).await?;
            // The answer has left when the newcomer closes.
            connection.closed().await;
            Ok::<(), Failure>(())
        };
        match tokio::time::timeout(JOIN_TIMEOUT, exchange).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.broke_off(&connection, &error.to_string()),
            Err(_) => self.broke_off(&connection, "it took too long"),
        }
        connection.close(0u32.into(), b"done");
    }

    fn broke_off(&self, connection: &quinn::Connection, why: &str) {
        if let Some(left_out) = self.ends_told.due(clock::now()) {
            let (peer, error) = (connection.remote_address(), Excerpt(why));
            info!(%peer, %error, left_out, "join exchange broke off");
        }
    }

    async fn exchange(&self, connection: &quinn::Connection) -> Result<(), Failure> {
        let (mut send, mut recv) = tokio::time::timeout(STEP_TIMEOUT, connection.accept_bi()).await??;
        let hello: Hello = tokio::time::timeout(STEP_TIMEOUT, read(&mut recv)).await??;
        let nonce: [u8; 32] = rand::random();
        let now = clock::wall();
        let issuer = self.issuer.active(&self.trust.bundle(), now);
        let role = if let Some(issuer) = &issuer {
            Role::Issuer { certificate: issuer.certificate().to_vec(), proof: issuer.prove(&channel(connection)?)? }
        } else {
            let mut issuers = self.directory.issuers();
            issuers.truncate(ISSUERS_MAX);
            Role::Member { issuers }
        };
        write(&mut send, &Welcome { clock: now, nonce, role, links: self.links_for(&hello.knows) }).await?;
        let Some(issuer) = issuer else { return Ok(send.finish()?) };
        let Ok(Ok(request)) = tokio::time::timeout(STEP_TIMEOUT, read::<Request>(&mut recv)).await else {
            // A newcomer that finds its clock wrong asks for nothing.
            return Ok(());
        };
        let from = connection.remote_address();
        let decided = if is_skewed(hello.clock, now) {
            let limit = CLOCK_SKEW_MAX.as_secs();
            let reason =
                format!("your clock says {} and mine {}; at most {limit} s apart are allowed", hello.clock.0, now.0);
            Err(Denied::new(Why::Issuer, reason))
        } else {
            self.decide(&issuer, request, &nonce, from, now).await
        };
        let answer = match decided {
            Ok(chain) => Answer::Granted { chain: chain.iter().map(|der| der.to_vec()).collect() },
            Err(denied) => {
                let Denied { why, reason } = &denied;
                if let Some(left_out) = self.refusals_told.due(clock::now()) {
                    let (reason, own_fault) = (Excerpt(reason), *why == Why::Issuer);
                    warn!(peer = %from, %reason, own_fault, left_out, "join refused");
                }
                Answer::Denied(denied)
            }
        };
        write(&mut send, &answer).await?;
        Ok(send.finish()?)
    }

    /// Decides one request.
    async fn decide(
        &self,
        issuer: &Issuer,
        request: Request,
        nonce: &[u8; 32],
        from: SocketAddr,
        now: UnixSeconds,
    ) -> Result<Vec<CertificateDer<'static>>, Denied> {
        let refused = |reason: String| Denied::new(Why::Request, reason);
        let trust = self.trust.bundle();
        let (Request::Join { csr, .. } | Request::Renew { csr, .. }) = &request;
        let key = checks::request_key(csr).ok_or_else(|| refused("the signing request does not parse".to_owned()))?;
        if trust.revoked.has_key(&key) {
            let reason = format!("key {key} is revoked: an operator took it back; make a new key, with a new token");
            return Err(Denied::new(Why::Revoked, reason));
        }
        match request {
            Request::Join { token, node, csr } => {
                let token: Token = token.parse().map_err(|err: crate::pki::TokenError| refused(err.to_string()))?;
                let claims = token.verify(&trust, now).map_err(|err| refused(err.to_string()))?;
                if !claims.node.matches(node.as_str()) {
                    return Err(refused(format!("the token is for nodes named `{}`, not `{node}`", claims.node)));
                }
                if let Some(holder) = self.directory.live_holder(&node) {
                    return Err(refused(format!(
                        "the name `{node}` is taken by a live node at {holder}, and you come from {from}: choose another \
                         -node, or stop that agent first (`weft leave`)"
                    )));
                }
                let chain = certify(issuer, &csr, &node, &claims.serve, now)?;
                check_new(&chain, &trust, now)?;
                self.count(&claims, key).await?;
                info!(%node, scope = %claims.serve, peer = %from, "certified a newcomer");
                Ok(chain)
            }
            Request::Renew { csr, chain, signature } => {
                let chain: Vec<_> = chain.into_iter().map(CertificateDer::from).collect();
                let message = renewal_message(&csr, nonce);
                let old = checks::verify_renewal(&chain, &message, &signature, &trust, now, RENEW_GRACE);
                let (node, scope) = old.map_err(|err| {
                    let is_revoked = matches!(err, VerifyError::Revoked { .. } | VerifyError::NodeRevoked { .. });
                    Denied::new(if is_revoked { Why::Revoked } else { Why::Request }, err.to_string())
                })?;
                let chain = certify(issuer, &csr, &node, &scope, now)?;
                info!(%node, %scope, peer = %from, "renewed a node's certificate");
                Ok(chain)
            }
        }
    }

    async fn count(&self, claims: &crate::pki::TokenClaims, key: SpkiHash) -> Result<(), Denied> {
        let (ledger, id, not_after) = (Arc::clone(&self.ledger), claims.id, claims.not_after.0);
        let counted = tokio::task::spawn_blocking(move || ledger.count_use(id, not_after, key.0)).await;
        let counted = counted.unwrap_or_else(|err| Err(err.to_string()));
        let before = counted.map_err(|err| Denied::new(Why::Issuer, format!("uses cannot be counted: {err}")))?;
        if claims.uses > 0 && before.is_some_and(|before| before >= claims.uses) {
            let reason = format!("the token was good for {} uses and has had them: make a new one", claims.uses);
            return Err(Denied::new(Why::Request, reason));
        }
        Ok(())
    }
}

/// Signs; what fails is the request's fault only where the signing request is bad.
fn certify(
    issuer: &Issuer,
    csr: &[u8],
    node: &NodeName,
    scope: &ServeScope,
    now: UnixSeconds,
) -> Result<Vec<CertificateDer<'static>>, Denied> {
    issuer.certify_request(csr, node, scope, now).map_err(|err| {
        let is_own = matches!(err, PkiError::Expired { .. } | PkiError::Make { what: "a node certificate", .. });
        Denied::new(if is_own { Why::Issuer } else { Why::Request }, text(&err))
    })
}

/// Holds a new certificate against what is revoked before it is given away: one that begins within a minute of the revocation
/// of its name would be refused by everybody.
fn check_new(chain: &[CertificateDer<'_>], trust: &TrustBundle, now: UnixSeconds) -> Result<(), Denied> {
    match check_revoked(chain, trust) {
        Ok(()) => Ok(()),
        Err(err @ VerifyError::NodeRevoked { until, .. }) => {
            let wait = until.plus(BACKDATE).since(now).as_secs() + 1;
            Err(Denied::new(Why::Issuer, format!("{err}; a new one can be made in {wait} s")))
        }
        Err(err) => Err(Denied::new(Why::Issuer, err.to_string())),
    }
}

/// Asks the seeds, and the issuers that they name, for a certificate for `node` and `key`, and returns the new authority.
///
/// With the same key it may be asked again when the answer was lost: the token's use is counted once.
///
/// # Errors
/// The most telling [`JoinError`] of all addresses tried; a refusal ends the search, an issuer's own failure does not.
/// # Cancel safety
/// Safe; a use of the token may have been counted, and the next call with the same key does not count another.
pub async fn request_certificate(
    seeds: &[SocketAddr],
    token: &Token,
    key: &JoinKey,
    node: &NodeName,
    now: UnixSeconds,
) -> Result<NodeAuthority, JoinError> {
    search(seeds, &Asked { node, now, key, by: By::Token(token) }).await.map(|renewed| renewed.authority)
}

/// A new certificate, and the documents that led to the root above it, if that was not known.
#[derive(Debug)]
pub struct Renewed {
    /// The authority.
    pub authority: NodeAuthority,
    /// In order of the walk.
    pub links: Vec<Vec<u8>>,
}

/// Renews the certificate of `authority` for `key`, a new one or its own, up to [`RENEW_GRACE`] after its end; name and scope
/// stay. `bundle` is what this node believes; a seed under a newer root is believed once its links lead there.
///
/// # Errors
/// As [`request_certificate`].
/// # Cancel safety
/// Safe.
pub async fn renew(
    seeds: &[SocketAddr],
    authority: &NodeAuthority,
    key: &JoinKey,
    bundle: &TrustBundle,
    now: UnixSeconds,
) -> Result<Renewed, JoinError> {
    search(seeds, &Asked { node: authority.node(), now, key, by: By::Key(authority, bundle) }).await
}

enum By<'a> {
    Token(&'a Token),
    Key(&'a NodeAuthority, &'a TrustBundle),
}

struct Asked<'a> {
    node: &'a NodeName,
    now: UnixSeconds,
    key: &'a JoinKey,
    by: By<'a>,
}

enum Outcome {
    Granted(Box<Renewed>),
    Others(Vec<SocketAddr>),
}

async fn search(seeds: &[SocketAddr], asked: &Asked<'_>) -> Result<Renewed, JoinError> {
    let mut queue: VecDeque<SocketAddr> = seeds.iter().copied().take(DIALS_MAX).collect();
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut failed = JoinError::NoSeeds;
    while let Some(seed) = queue.pop_front() {
        if tried.len() >= DIALS_MAX || tried.contains(&seed) {
            continue;
        }
        tried.push(seed);
        let attempt = Box::pin(ask(seed, asked));
        let outcome = tokio::time::timeout(JOIN_TIMEOUT, attempt).await;
        let error = match outcome {
            Ok(Ok(Outcome::Granted(renewed))) => return Ok(*renewed),
            Ok(Ok(Outcome::Others(issuers))) => {
                queue.extend(issuers.into_iter().take(ISSUERS_MAX));
                JoinError::NoIssuer { seed }
            }
            Ok(Err(error @ (JoinError::Refused { .. } | JoinError::Revoked { .. }))) => return Err(error),
            Ok(Err(error)) => error,
            Err(elapsed) => JoinError::Unreachable { seed, source: elapsed.into() },
        };
        // Silence says less than any answer.
        let says_more = !matches!(error, JoinError::Unreachable { .. } | JoinError::NoIssuer { .. });
        if says_more || matches!(failed, JoinError::NoSeeds | JoinError::NoIssuer { .. }) {
            failed = error;
        }
    }
    Err(failed)
}

async fn ask(seed: SocketAddr, asked: &Asked<'_>) -> Result<Outcome, JoinError> {
    let verifier = match &asked.by {
        By::Token(token) => {
            let domain = token.trust_domain().map_err(|source| JoinError::Local(source.into()))?;
            JoinVerifier::pinning(token.root_digest(), domain, asked.now)
        }
        By::Key(_, bundle) => JoinVerifier::trusting((*bundle).clone(), asked.now),
    };
    let unreachable = |source: Failure| JoinError::Unreachable { seed, source };
    let local: IpAddr = if seed.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let (endpoint, _helpers) = transport::dialer(local).map_err(|err| unreachable(err.into()))?;
    let config = client_config(&verifier).map_err(JoinError::Local)?;
    // The name is not checked: the chain is, and it names the node.
    let connecting = endpoint.connect_with(config, seed, "weft").map_err(|err| unreachable(err.into()))?;
    let connection = match connecting.await {
        Ok(connection) => connection,
        Err(error) => {
            return Err(match verifier.refused() {
                Some(source) => JoinError::Untrusted { seed, source: Box::new(source.clone()) },
                None => unreachable(error.into()),
            });
        }
    };
    let outcome = converse(seed, &connection, &verifier, asked).await;
    connection.close(0u32.into(), b"done");
    // The close should reach the seed, but nothing depends on it.
    let _unused = tokio::time::timeout(Duration::from_millis(200), endpoint.wait_idle()).await;
    outcome
}

async fn converse(
    seed: SocketAddr,
    connection: &quinn::Connection,
    verifier: &JoinVerifier,
    asked: &Asked<'_>,
) -> Result<Outcome, JoinError> {
    let broken = |source: Failure| JoinError::Exchange { seed, source };
    let (mut send, mut recv): Streams = connection.open_bi().await.map_err(|err| broken(err.into()))?;
    let knows = match &asked.by {
        By::Token(token) => vec![token.root_digest()],
        By::Key(_, bundle) => bundle.roots.iter().take(KNOWN_ROOTS_MAX).map(root_digest).collect(),
    };
    write(&mut send, &Hello { clock: asked.now, knows }).await.map_err(|err| broken(err.into()))?;
    let welcome: Welcome = read(&mut recv).await.map_err(|err| broken(err.into()))?;
    if is_skewed(asked.now, welcome.clock) {
        return Err(JoinError::ClockSkew { seed, ours: asked.now, theirs: welcome.clock });
    }
    let untrusted = |source: VerifyError| JoinError::Untrusted { seed, source: Box::new(source) };
    if let Some(doubt) = verifier.doubt() {
        return Err(untrusted(doubt.clone()));
    }
    if let Some(unknown) = verifier.stranger() {
        let walked = walked(asked, &welcome.links).ok_or_else(|| untrusted(unknown.clone()))?;
        verifier.check_walked(&walked).map_err(|_| untrusted(unknown.clone()))?;
    }
    let bundle = verifier.bundle().cloned().ok_or_else(|| untrusted(VerifyError::WrongRoot))?;
    let Welcome { nonce, role, links, .. } = welcome;
    let (certificate, proof) = match role {
        Role::Member { issuers } => return Ok(Outcome::Others(issuers)),
        Role::Issuer { certificate, proof } => (CertificateDer::from(certificate), proof),
    };
    let channel = channel(connection).map_err(broken)?;
    checks::verify_issuer(&certificate, &proof, &channel, asked.node, &bundle, asked.now).map_err(untrusted)?;
    let key = asked.key.pair().map_err(JoinError::Local)?;
    let request = request(asked, &key, &nonce).map_err(JoinError::Local)?;
    write(&mut send, &request).await.map_err(|err| broken(err.into()))?;
    match read(&mut recv).await.map_err(|err| broken(err.into()))? {
        Answer::Denied(Denied { why, reason }) => {
            let reason = reason.chars().filter(|c| !c.is_control()).take(REASON_CHARS_MAX).collect();
            Err(match why {
                Why::Request => JoinError::Refused { seed, reason },
                Why::Revoked => JoinError::Revoked { seed, reason },
                Why::Issuer => JoinError::Unable { seed, reason },
            })
        }
        Answer::Granted { chain } => granted(seed, asked, key, chain, bundle, links),
    }
}

/// Follows the seed's links from what is believed here; none if they lead nowhere.
fn walked(asked: &Asked<'_>, links: &[Vec<u8>]) -> Option<TrustBundle> {
    let base = match &asked.by {
        By::Key(_, bundle) => (*bundle).clone(),
        By::Token(token) => {
            // The token pins a digest; the link that its root signed holds the root itself.
            let signers = links.iter().filter_map(|link| Some(Document::from_bytes(link).ok()?.certificate().clone()));
            let pinned = signers.into_iter().find(|signer| root_digest(signer) == token.root_digest())?;
            crate::pki::root_bundle(&pinned, &token.trust_domain().ok()?).ok()?
        }
    };
    let roots = policy::walk(&base, links, asked.now);
    (roots.len() > base.roots.len()).then_some(TrustBundle { roots, ..base })
}

/// Checks what was granted. The bundle is the verified one, not the answer's: a relaying node could add a root to that.
fn granted(
    seed: SocketAddr,
    asked: &Asked<'_>,
    key: KeyPair,
    chain: Vec<Vec<u8>>,
    bundle: TrustBundle,
    links: Vec<Vec<u8>>,
) -> Result<Outcome, JoinError> {
    let chain = chain.into_iter().map(CertificateDer::from).collect();
    let authority = NodeAuthority::new(key, chain, bundle, asked.now)
        .map_err(|err| JoinError::Exchange { seed, source: err.into() })?;
    if authority.node() != asked.node {
        let (asked, found) = (asked.node.clone(), authority.node().clone());
        return Err(JoinError::OtherName { seed, asked, found });
    }
    Ok(Outcome::Granted(Box::new(Renewed { authority, links })))
}

fn request(asked: &Asked<'_>, key: &KeyPair, nonce: &[u8; 32]) -> Result<Request, PkiError> {
    let csr = CertificateParams::default()
        .serialize_request(key)
        .map_err(|source| PkiError::Make { what: "a signing request", source })?
        .der()
        .to_vec();
    Ok(match &asked.by {
        By::Token(token) => Request::Join { token: token.to_string(), node: asked.node.clone(), csr },
        By::Key(authority, _) => {
            let signature = authority.sign_renewal(&renewal_message(&csr, nonce))?;
            Request::Renew { csr, chain: authority.chain().iter().map(|der| der.to_vec()).collect(), signature }
        }
    })
}

fn client_config(verifier: &Arc<JoinVerifier>) -> Result<quinn::ClientConfig, PkiError> {
    // The transport's configuration leads the first datagram to the socket that serves joins.
    transport::client_config(Plane::Join, Arc::new(verifier.client_config()?))
        .map_err(|err| PkiError::Tls(rustls::Error::General(err)))
}

/// Returns bytes that only the two ends of this TLS session know.
fn channel(connection: &quinn::Connection) -> Result<[u8; 32], Failure> {
    let mut bytes = [0; 32];
    connection.export_keying_material(&mut bytes, EXPORTER_LABEL, b"").map_err(|_| "no TLS exporter")?;
    Ok(bytes)
}

fn is_skewed(one: UnixSeconds, other: UnixSeconds) -> bool {
    one.0.abs_diff(other.0) > CLOCK_SKEW_MAX.as_secs()
}

/// An error with its causes, on one line: it is shown on another host.
fn text(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

async fn read<T: serde::de::DeserializeOwned>(recv: &mut quinn::RecvStream) -> Result<T, WireError> {
    wire::decode(&wire::read_frame(recv, JOIN_FRAME_BYTES_MAX).await?, JOIN_FRAME_BYTES_MAX)
}

async fn write<T: serde::Serialize>(send: &mut quinn::SendStream, message: &T) -> Result<(), WireError> {
    wire::write_frame(send, &wire::encode(message)?).await
}

#[cfg(test)]
mod tests;
