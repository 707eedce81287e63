//! The signed things of the corpus, and what is known of them: whatever a target believes must be among it.

use std::sync::OnceLock;

use rustls::pki_types::CertificateDer;

use crate::clock::UnixSeconds;
use crate::pki::{PeerIdentity, Presented, Token, TokenClaims, TrustBundle, root_bundle, verify_presented};
use crate::policy::Document;
use crate::replica::{Delta, Digest};
use crate::wire::{self, FRAME_BYTES_MAX};

/// The moment at which everything in the corpus is valid.
pub(crate) const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
/// What the renewal of the corpus signs.
pub(crate) const NONCE: [u8; 32] = [3; 32];

macro_rules! corpus {
    ($path:literal) => {
        include_bytes!(concat!("../../tests/fuzz/corpus/", $path))
    };
}

/// See the module's text. Made by `seeds::the_corpus_is_written_anew`.
pub(crate) struct Fixture {
    /// Believes the root of the corpus.
    pub(crate) bundle: TrustBundle,
    /// `[leaf, node intermediate, issuer]` of a node and of a service.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests of the oracles read it"))]
    pub(crate) chains: Vec<Vec<CertificateDer<'static>>>,
    /// Whom they prove.
    pub(crate) peers: Vec<(PeerIdentity, Presented)>,
    /// What the token says.
    pub(crate) claims: TokenClaims,
    /// By an operator, by the root, from root to root, and an operator's intention and config entry.
    pub(crate) documents: Vec<Document>,
    /// The node's first state, and the next.
    pub(crate) digests: [Digest; 2],
    /// A whole renewal, as it is sent.
    pub(crate) renewal: Vec<u8>,
}

/// The fixture, read once.
pub(crate) fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let root = CertificateDer::from(include_bytes!("../../tests/fuzz/root.der").as_slice());
        let bundle = root_bundle(&root, &"td".parse().unwrap()).unwrap();
        let chains: Vec<Vec<CertificateDer<'static>>> =
            [corpus!("chain/node").as_slice(), corpus!("chain/service")].map(chain_of).into();
        let peers = chains.iter().map(|chain| verify_presented(chain, &bundle, NOW).unwrap()).collect();
        let token: Token = std::str::from_utf8(corpus!("token/good")).unwrap().parse().unwrap();
        let claims = token.verify(&bundle, NOW).unwrap();
        let documents = [
            corpus!("document/operator").as_slice(),
            corpus!("document/root"),
            corpus!("document/link"),
            corpus!("document/intention"),
            corpus!("document/entry"),
        ];
        let documents = documents.map(|bytes| Document::from_bytes(bytes).unwrap()).into();
        let digest = |bytes: &[u8]| wire::decode::<Delta>(bytes, FRAME_BYTES_MAX).unwrap().digest();
        Fixture {
            bundle,
            chains,
            peers,
            claims,
            documents,
            digests: [digest(corpus!("delta/whole")), digest(corpus!("delta/change"))],
            renewal: corpus!("join/renew").to_vec(),
        }
    })
}

fn chain_of(bytes: &[u8]) -> Vec<CertificateDer<'static>> {
    let chain: Vec<Vec<u8>> = wire::decode(bytes, FRAME_BYTES_MAX).unwrap();
    chain.into_iter().map(CertificateDer::from).collect()
}
