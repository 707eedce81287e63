//! Join tokens: what an operator allows a newcomer, signed offline.
//!
//! Text: `weft1-<base64url SHA-256 of the root's DER>-<base64url of {claims, operator certificate, signature}>`. The digest
//! is what the newcomer believes; the rest is what the issuer believes. A token is a secret: `Debug` hides it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::certificate::{CONTEXT_TOKEN, root_digest, sign};
use super::extension::SCOPE_BYTES_MAX;
use super::verify::{self, Utc, VerifyError};
use super::{PkiError, TrustBundle, ca};
use crate::clock::UnixSeconds;
use crate::model::{NamePattern, NodeName, OperatorScope, Right, ServeScope, TrustDomain};
use crate::wire;

/// Longest token, in bytes of text: a scope of 2 KiB, a certificate, a signature, in base64.
pub(crate) const TOKEN_BYTES_MAX: usize = 8192;
const PREFIX: &str = "weft1-";
/// A SHA-256 in unpadded base64.
const DIGEST_CHARS: usize = 43;

/// What a token allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenClaims {
    /// Unique.
    pub id: [u8; 16],
    /// Names that the newcomer may take.
    pub node: NamePattern,
    /// What it may serve.
    pub serve: ServeScope,
    /// End.
    pub not_after: UnixSeconds,
    /// How often it may be used, at each issuer; 0: without bound until it ends.
    pub uses: u32,
}

/// Why a token is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The text does not begin like a token.
    #[error("this is no join token: one begins with `weft1-`; make one with `weft token create`")]
    NotAToken,
    /// The text is too short or altered.
    #[error("the join token is cut off or altered: copy the whole line that `weft token create` printed")]
    CutOff,
    /// The text is longer than any token.
    #[error("the join token has {bytes} bytes; at most {TOKEN_BYTES_MAX} are accepted: copy one token only")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The token pins a root that is not trusted here.
    #[error(
        "the join token is of another CA than this mesh's (`{trust_domain}`): make one with this mesh's CA directory"
    )]
    WrongCa {
        /// The trust domain of this mesh.
        trust_domain: TrustDomain,
    },
    /// The token has ended.
    #[error(
        "the join token was valid until {} and this host's clock says {}: make a new one with `weft token create`, \
         or check the clock",
        Utc(*.at), Utc(*.now)
    )]
    Expired {
        /// Its end.
        at: UnixSeconds,
        /// This host's wall time.
        now: UnixSeconds,
    },
    /// The operator's certificate is refused.
    #[error(
        "the join token's operator is not certified by this mesh's CA ({0}): make the token with a valid operator key"
    )]
    Operator(VerifyError),
    /// The operator may not make tokens.
    #[error("the join token's operator `{operator}` may sign `{may}`, no tokens: ask one who has the right `tokens`")]
    NotAllowed {
        /// Who made it.
        operator: NodeName,
        /// What that operator may sign.
        may: OperatorScope,
    },
    /// An operator took the token back.
    #[error("the join token is revoked: ask the operator for a new one")]
    Revoked,
    /// The operator's signature does not fit the claims.
    #[error("the join token's signature is wrong: it was altered; make a new one with `weft token create`")]
    BadSignature,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Payload {
    claims: TokenClaims,
    operator: Vec<u8>,
    signature: Vec<u8>,
}

/// A join token. Its text is a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    root_digest: [u8; 32],
    payload: Payload,
    text: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::TooLong { bytes: text.len() });
        }
        let rest = text.strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        // The alphabet has `-` too, so the digest is told by its length.
        let (digest, rest) = rest.split_at_checked(DIGEST_CHARS).ok_or(TokenError::CutOff)?;
        let digest = URL_SAFE_NO_PAD.decode(digest).map_err(|_| TokenError::CutOff)?;
        let root_digest = digest.try_into().map_err(|_| TokenError::CutOff)?;
        let payload = rest.strip_prefix('-').ok_or(TokenError::CutOff)?;
        let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_| TokenError::CutOff)?;
        let payload = wire::decode(&payload, TOKEN_BYTES_MAX).map_err(|_| TokenError::CutOff)?;
        Ok(Self { root_digest, payload, text: text.to_owned() })
    }
}

impl Token {
    /// The SHA-256 of the root that the newcomer is to believe.
    pub fn root_digest(&self) -> [u8; 32] {
        self.root_digest
    }

    /// The trust domain that it is for, unverified: its operator's. The root that it pins may name none.
    ///
    /// # Errors
    /// [`TokenError::CutOff`] if the operator's certificate does not name one.
    pub fn trust_domain(&self) -> Result<TrustDomain, TokenError> {
        verify::domain_of(&CertificateDer::from(self.payload.operator.as_slice())).map_err(|_| TokenError::CutOff)
    }

    /// What the token says, unverified: for messages to the newcomer's user.
    pub fn unverified_claims(&self) -> &TokenClaims {
        &self.payload.claims
    }

    /// Checks the token against the mesh's roots and returns what it allows.
    ///
    /// # Errors
    /// One variant of [`TokenError`] for each rule.
    pub fn verify(&self, bundle: &TrustBundle, now: UnixSeconds) -> Result<TokenClaims, TokenError> {
        let wrong_ca = || TokenError::WrongCa { trust_domain: bundle.trust_domain.clone() };
        let pinned = bundle.roots.iter().find(|root| root_digest(root) == self.root_digest).ok_or_else(wrong_ca)?;
        let pinned = TrustBundle { roots: vec![pinned.clone()], ..bundle.clone() };
        let Payload { claims, operator, signature } = &self.payload;
        let operator = CertificateDer::from(operator.as_slice());
        let (name, may) = verify::check_operator(&operator, &pinned, now).map_err(TokenError::Operator)?;
        if !may.allows(Right::Tokens, "") {
            return Err(TokenError::NotAllowed { operator: name, may });
        }
        let message = wire::encode(claims).map_err(|_| TokenError::CutOff)?;
        verify::verify_signature(&operator, &name, CONTEXT_TOKEN, &message, signature)
            .map_err(|_| TokenError::BadSignature)?;
        if bundle.revoked.has_token(&claims.id) {
            return Err(TokenError::Revoked);
        }
        if now > claims.not_after {
            return Err(TokenError::Expired { at: claims.not_after, now });
        }
        Ok(claims.clone())
    }
}

/// An operator's key and certificate.
pub(super) struct Operator {
    pub(super) key: KeyPair,
    pub(super) certificate: CertificateDer<'static>,
    pub(super) root: CertificateDer<'static>,
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Operator(key hidden)")
    }
}

impl Operator {
    /// Signs a token.
    pub(super) fn token(&self, claims: &TokenClaims) -> Result<Token, PkiError> {
        let (_, until) = verify::validity_of(&self.certificate)?;
        if claims.not_after > until {
            let remedy = "give the token a shorter -ttl";
            return Err(PkiError::Expired { what: "operator", until, now: claims.not_after, remedy });
        }
        let bytes = claims.serve.to_string().len();
        if bytes > SCOPE_BYTES_MAX {
            return Err(PkiError::ScopeTooLong { bytes, bytes_max: SCOPE_BYTES_MAX });
        }
        let message = wire::encode(claims).map_err(PkiError::Stored)?;
        let signature = sign(&self.key, CONTEXT_TOKEN, &message)?;
        let payload = Payload { claims: claims.clone(), operator: self.certificate.to_vec(), signature };
        let encoded = wire::encode(&payload).map_err(PkiError::Stored)?;
        let root_digest = root_digest(&self.root);
        let text = format!("{PREFIX}{}-{}", URL_SAFE_NO_PAD.encode(root_digest), URL_SAFE_NO_PAD.encode(encoded));
        Ok(Token { root_digest, payload, text })
    }
}

/// Makes a token with the operator key of a CA directory (`operator/` and `root.crt` are all it needs).
///
/// # Errors
/// [`PkiError::Ca`] if the key cannot be used, [`PkiError::Expired`] if the token would outlive the operator's certificate.
pub fn create_token(ca_dir: &Path, claims: &TokenClaims) -> Result<Token, PkiError> {
    let operator = Operator {
        key: ca::read_key(&ca_dir.join("operator/operator.key"))?,
        certificate: ca::read_certificate(&ca_dir.join("operator/operator.crt"))?,
        root: ca::read_certificate(&ca_dir.join("root.crt"))?,
    };
    operator.token(claims)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ca::{EphemeralCa, ephemeral};
    use super::*;

    const NOW: UnixSeconds = UnixSeconds(1_800_000_000);

    fn ca(domain: &str) -> EphemeralCa {
        ephemeral(&domain.parse().unwrap(), NOW).unwrap()
    }

    fn claims() -> TokenClaims {
        TokenClaims {
            id: [7; 16],
            node: "web-*".parse().unwrap(),
            serve: "web,api-*".parse().unwrap(),
            not_after: UnixSeconds(NOW.0 + 3600),
            uses: 1,
        }
    }

    #[test]
    fn a_token_survives_its_text_and_is_believed() {
        let ca = ca("prod.example");
        let token = ca.token(&claims()).unwrap();
        let parsed: Token = format!(" {token}\n").parse().unwrap();
        assert_eq!(parsed, token);
        assert_eq!(parsed.verify(ca.issuer().bundle(), NOW).unwrap(), claims());
    }

    #[test]
    fn each_bad_token_is_refused_for_its_own_reason() {
        let ca = ca("prod.example");
        let bundle = ca.issuer().bundle();
        let token = ca.token(&claims()).unwrap();
        let text = token.to_string();
        assert_eq!("hello".parse::<Token>().unwrap_err(), TokenError::NotAToken);
        assert_eq!(text[..30].parse::<Token>().unwrap_err(), TokenError::CutOff);
        assert_eq!(text[..text.len() - 8].parse::<Token>().unwrap_err(), TokenError::CutOff);
        assert!(matches!("weft1-".repeat(2000).parse::<Token>(), Err(TokenError::TooLong { .. })));

        let late = UnixSeconds(NOW.0 + 3601);
        assert!(matches!(token.verify(bundle, late), Err(TokenError::Expired { .. })));
        let long_after = UnixSeconds(NOW.0 + 400 * 86_400);
        assert!(matches!(
            token.verify(bundle, long_after),
            Err(TokenError::Operator(VerifyError::Expired { role: "operator", .. }))
        ));
        let other = super::super::ephemeral(&"prod.example".parse().unwrap(), NOW).unwrap();
        assert!(matches!(token.verify(other.issuer().bundle(), NOW), Err(TokenError::WrongCa { .. })));

        let mut tampered = token.clone();
        tampered.payload.claims.serve = "*".parse().unwrap();
        assert_eq!(tampered.verify(bundle, NOW), Err(TokenError::BadSignature));
        let mut foreign = other.token(&claims()).unwrap();
        foreign.root_digest = token.root_digest;
        assert!(matches!(foreign.verify(bundle, NOW), Err(TokenError::Operator(VerifyError::Path { .. }))));
    }

    #[test]
    fn a_node_key_signs_no_tokens() {
        let ca = ca("prod.example");
        let authority = ca.issuer().self_certify(&"a".parse().unwrap(), &"*".parse().unwrap(), NOW).unwrap();
        let mut token = ca.token(&claims()).unwrap();
        token.payload.operator = authority.chain()[0].to_vec();
        token.payload.signature = authority.sign(&wire::encode(&claims()).unwrap()).unwrap();
        assert!(matches!(token.verify(ca.issuer().bundle(), NOW), Err(TokenError::Operator(_))));
    }

    #[test]
    fn a_token_does_not_outlive_its_operator() {
        let claims = TokenClaims { not_after: UnixSeconds(NOW.0 + 366 * 86_400), ..claims() };
        assert!(matches!(ca("td").token(&claims), Err(PkiError::Expired { what: "operator", .. })));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_without_a_panic(text in "(weft1-)?[A-Za-z0-9_-]{0,200}") {
            prop_assert!(text.parse::<Token>().is_err());
        }
    }
}
