//! Fuzz targets of this module; see `crate::fuzz`.

#![allow(clippy::unwrap_used, reason = "a target fails by panicking")]

use std::sync::OnceLock;

use rustls::pki_types::CertificateDer;

use super::extension::{self, NodeExtension};
use super::join::{Answer, Hello, JOIN_FRAME_BYTES_MAX, Request, Role, Welcome, renewal_message, request_key};
use super::revocation::{Revocations, Revoked};
use super::{EphemeralCa, Token, TokenError, TrustBundle, ephemeral, verify};
use crate::fuzz::{NONCE, NOW, fixture, stable};
use crate::model::Right;
use crate::policy;
use crate::wire::{self, FRAME_BYTES_MAX};

/// The value of the extension of a node intermediate.
pub(crate) fn extension(bytes: &[u8]) {
    let Some(NodeExtension::Present(node, scope)) = extension::parse(bytes) else { return };
    let again = extension::encode(&node, &scope).expect("what was read fits a certificate");
    assert_eq!(extension::parse(again.content()), Some(NodeExtension::Present(node, scope)));
    assert_eq!(again.content(), bytes, "an extension that has two encodings");
}

/// The value of an operator's extension; what is read gives the same rights when it is written again.
pub(crate) fn operator(bytes: &[u8]) -> bool {
    let Some(may) = extension::parse_operator(bytes) else { return false };
    let again = extension::encode_operator(&may).expect("what was read fits a certificate");
    assert_eq!(again.content(), bytes, "an extension that has two encodings");
    let text = may.to_string();
    let named = |right: &str| text.split(',').any(|one| one == "*" || one.split(':').next() == Some(right));
    for (right, word) in
        [(Right::Intentions, "intentions"), (Right::Config, "config"), (Right::Revocations, "revocations")]
    {
        assert!(!may.allows(right, "web") || named(word), "`{text}` gives {word}");
    }
    true
}

fn revoking(entry: Revoked) -> TrustBundle {
    TrustBundle { revoked: Revocations::from_iter([entry]), ..fixture().bundle.clone() }
}

/// A list of certificates, as a peer shows them: none proves anything but what was certified, and none, however it is
/// written, outlives the revocation of its key.
pub(crate) fn chain(bytes: &[u8]) {
    let Ok(chain) = wire::decode::<Vec<Vec<u8>>>(bytes, FRAME_BYTES_MAX) else { return };
    let chain: Vec<CertificateDer<'static>> = chain.into_iter().map(CertificateDer::from).collect();
    let fixture = fixture();
    for der in chain.iter().take(verify::CHAIN_CERTIFICATES_MAX) {
        let _any = (super::facts_of(der), super::validity(der), verify::public_key_of(der));
        let _any = (verify::check_operator(der, &fixture.bundle, NOW), verify::root_of(der, &fixture.bundle));
        if let Ok(bundle) = super::root_bundle(der, &fixture.bundle.trust_domain) {
            let _any = verify::check_issuer(der, &bundle, NOW);
        }
    }
    if let Ok(found) = super::verify_presented(&chain, &fixture.bundle, NOW) {
        assert!(fixture.peers.contains(&found), "a peer that nobody certified: {found:?}");
        let (_, shown) = found;
        for key in shown.leaf.into_iter().chain([shown.intermediate, shown.issuer]) {
            let refused = super::verify_presented(&chain, &revoking(Revoked::Key(key)), NOW);
            assert!(refused.is_err(), "a revoked key counts");
        }
    }
    if let Ok((node, scope, _)) = verify::verify_node_chain(&chain, &fixture.bundle, NOW) {
        let known = fixture.peers.iter().any(|(peer, _)| peer.node == node && peer.scope == scope);
        assert!(known, "a node that nobody certified: {node}, {scope}");
    }
}

/// A join token's text.
pub(crate) fn token(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(token) = text.parse::<Token>() else { return };
    assert_eq!(token.to_string(), text.trim());
    let fixture = fixture();
    if let Ok(claims) = token.verify(&fixture.bundle, NOW) {
        assert_eq!(claims, fixture.claims, "a token that nobody signed counts");
        let revoked = token.verify(&revoking(Revoked::Token(claims.id)), NOW);
        assert_eq!(revoked, Err(TokenError::Revoked));
    }
}

fn issuing() -> &'static EphemeralCa {
    static CA: OnceLock<EphemeralCa> = OnceLock::new();
    CA.get_or_init(|| ephemeral(&"td".parse().unwrap(), NOW).unwrap())
}

/// A message of the join plane: the first byte says which, the rest is a frame.
pub(crate) fn join(bytes: &[u8]) {
    let Some((kind, frame)) = bytes.split_first() else { return };
    match kind {
        0 => drop(stable::<Hello>(frame, JOIN_FRAME_BYTES_MAX)),
        1 => {
            if let Some(welcome) = stable::<Welcome>(frame, JOIN_FRAME_BYTES_MAX) {
                welcomed(&welcome);
            }
        }
        2 => {
            if let Some(request) = stable::<Request>(frame, JOIN_FRAME_BYTES_MAX) {
                requested(&request);
            }
        }
        _ => drop(stable::<Answer>(frame, JOIN_FRAME_BYTES_MAX)),
    }
}

fn welcomed(welcome: &Welcome) {
    let fixture = fixture();
    if let Role::Issuer { certificate, proof } = &welcome.role {
        let certificate = CertificateDer::from(certificate.as_slice());
        let name = "own".parse().unwrap();
        // The proof of the corpus is for this channel.
        if super::join::verify_issuer(&certificate, proof, &NONCE, &name, &fixture.bundle, NOW).is_ok() {
            let issuer = fixture.peers.first().map(|(_, shown)| shown.issuer);
            assert_eq!(super::spki(&certificate).ok(), issuer, "somebody else passes for an issuer");
        }
    }
    assert!(policy::walk(&fixture.bundle, &welcome.links, NOW).len() <= 2);
}

fn requested(request: &Request) {
    let fixture = fixture();
    let (Request::Join { csr, .. } | Request::Renew { csr, .. }) = request;
    let certified = issuing().issuer().certify_request(csr, &"a".parse().unwrap(), &"web".parse().unwrap(), NOW).ok();
    if let (Some(der), Some(key)) = (certified.and_then(|chain| chain.into_iter().next()), request_key(csr)) {
        // Revocations are held against the one, the certificate is for the other.
        assert_eq!(Some(key), super::spki(&der).ok(), "another key is certified than the one that was checked");
    }
    match request {
        Request::Join { token: text, .. } => token(text.as_bytes()),
        Request::Renew { csr, chain, signature } => {
            let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
            let message = renewal_message(csr, &NONCE);
            let grace = std::time::Duration::from_secs(86_400);
            let renewed = super::join::verify_renewal(&chain, &message, signature, &fixture.bundle, NOW, grace);
            if let Ok((node, scope)) = renewed {
                let known = fixture.peers.iter().any(|(peer, _)| peer.node == node && peer.scope == scope);
                assert!(known, "a renewal for somebody else: {node}, {scope}");
                let (_, known) = fixture.renewal.split_first().unwrap();
                let Request::Renew { csr: signed, .. } = wire::decode(known, JOIN_FRAME_BYTES_MAX).unwrap() else {
                    panic!("the corpus' renewal is one")
                };
                // Of the corpus one renewal has a byte behind its signing request: signed as well, and not to be parsed.
                let key = request_key(csr);
                assert!(key.is_none() || key == request_key(&signed), "a renewal of another key than was signed");
            }
        }
    }
}
