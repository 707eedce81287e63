//! SPIFFE ids (SPIFFE-ID standard §2) in the four shapes that weft gives out.

use std::fmt;
use std::str::FromStr;

use super::name::{NameError, NodeName, ServiceName, TrustDomain};

/// Longest SPIFFE id, in bytes (SPIFFE-ID §2.3).
pub const SPIFFE_ID_BYTES_MAX: usize = 2048;

/// Who a certificate speaks for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SpiffeId {
    /// `spiffe://td`: a signing certificate; it never authenticates.
    Authority(TrustDomain),
    /// `spiffe://td/node/<name>`: an agent.
    Node {
        /// The trust domain.
        trust_domain: TrustDomain,
        /// The agent's node.
        node: NodeName,
    },
    /// `spiffe://td/svc/<service>/node/<name>`: a service on a node.
    Service {
        /// The trust domain.
        trust_domain: TrustDomain,
        /// The service.
        service: ServiceName,
        /// The node that speaks for it.
        node: NodeName,
    },
    /// `spiffe://td/operator/<name>`: a person or machine that signs tokens and documents; it never authenticates a connection.
    Operator {
        /// The trust domain.
        trust_domain: TrustDomain,
        /// The operator's name.
        name: NodeName,
    },
}

/// Why a text is no SPIFFE id of weft's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    /// The scheme is not `spiffe`, or the URI has parts that SPIFFE forbids.
    #[error("`{text}` is no SPIFFE id: it must read spiffe://<trust domain>[/path]")]
    Uri {
        /// The text, cut to 128 characters.
        text: String,
    },
    /// The path has none of the known shapes.
    #[error("SPIFFE path `{path}` is none of /node/N, /svc/S/node/N, /operator/O")]
    Path {
        /// The path, cut to 128 characters.
        path: String,
    },
    /// A segment or the trust domain is malformed.
    #[error("SPIFFE id has a malformed part")]
    Name(#[source] NameError),
}

impl SpiffeId {
    /// Returns the trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        match self {
            Self::Authority(trust_domain)
            | Self::Node { trust_domain, .. }
            | Self::Service { trust_domain, .. }
            | Self::Operator { trust_domain, .. } => trust_domain,
        }
    }

    /// Returns the node that the id is bound to, if it authenticates a connection.
    pub fn node(&self) -> Option<&NodeName> {
        match self {
            Self::Node { node, .. } | Self::Service { node, .. } => Some(node),
            Self::Authority(_) | Self::Operator { .. } => None,
        }
    }

    /// Returns the service, if the id is a service's.
    pub fn service(&self) -> Option<&ServiceName> {
        match self {
            Self::Service { service, .. } => Some(service),
            _ => None,
        }
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let cut = |text: &str| text.chars().take(128).collect::<String>();
        if text.len() > SPIFFE_ID_BYTES_MAX {
            return Err(SpiffeError::Uri { text: cut(text) });
        }
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| SpiffeError::Uri { text: cut(text) })?;
        let (domain, path) = rest.split_once('/').map_or((rest, None), |(domain, path)| (domain, Some(path)));
        let trust_domain: TrustDomain = domain.parse().map_err(SpiffeError::Name)?;
        let Some(path) = path else { return Ok(Self::Authority(trust_domain)) };
        let segments: Vec<&str> = path.split('/').collect();
        match segments.as_slice() {
            ["node", node] => Ok(Self::Node { trust_domain, node: node.parse().map_err(SpiffeError::Name)? }),
            ["svc", service, "node", node] => Ok(Self::Service {
                trust_domain,
                service: service.parse().map_err(SpiffeError::Name)?,
                node: node.parse().map_err(SpiffeError::Name)?,
            }),
            ["operator", name] => Ok(Self::Operator { trust_domain, name: name.parse().map_err(SpiffeError::Name)? }),
            _ => Err(SpiffeError::Path { path: cut(path) }),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}", self.trust_domain())?;
        match self {
            Self::Authority(_) => Ok(()),
            Self::Node { node, .. } => write!(f, "/node/{node}"),
            Self::Service { service, node, .. } => write!(f, "/svc/{service}/node/{node}"),
            Self::Operator { name, .. } => write!(f, "/operator/{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn foreign_shapes_are_refused() {
        for text in [
            "https://td/node/a",
            "spiffe://",
            "spiffe:///node/a",
            "spiffe://TD/node/a",
            "spiffe://td/",
            "spiffe://td/node/",
            "spiffe://td/node/a/",
            "spiffe://td/node//a",
            "spiffe://td/node/a?x=1",
            "spiffe://td/node/a#x",
            "spiffe://td/node/..",
            "spiffe://td:80/node/a",
            "spiffe://u@td/node/a",
            "spiffe://td/svc/web/node/%41",
            "spiffe://td/ns/default",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn an_id_survives_its_text(td in "[a-z0-9][a-z0-9.-]{0,20}", s in "[A-Za-z0-9][A-Za-z0-9._-]{0,20}", n in "[A-Za-z0-9][A-Za-z0-9._-]{0,20}") {
            for text in [format!("spiffe://{td}"), format!("spiffe://{td}/node/{n}"), format!("spiffe://{td}/svc/{s}/node/{n}"), format!("spiffe://{td}/operator/{n}")] {
                let id: SpiffeId = text.parse().unwrap();
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn any_text_is_parsed_without_a_panic(text in ".{0,200}") {
            let _unused = text.parse::<SpiffeId>();
        }
    }
}
