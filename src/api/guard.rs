//! Who may talk to the API: tokens with rights, and defence against web pages in a browser on the same host.
//!
//! A page of another site may send requests to loopback (cross-site requests) or point its own DNS name at 127.0.0.1
//! (DNS rebinding). The first carry a foreign `Origin`, the second a foreign `Host`: both are refused. No answer has a CORS
//! header, so no other site's page reads one either.
//!
//! Tokens are kept as SHA-256 digests and all of them compared in constant time. That is as good as their randomness: they
//! are made by a machine (`openssl rand -hex 32`), not by a person.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use aws_lc_rs::{constant_time, digest};
use http::{HeaderMap, Uri, header};

use super::ApiConfig;
use super::call::Refusal;
use super::query::Query;
use crate::model::NodeName;

/// What a token allows; each right includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Reading: everything but private keys.
    Read,
    /// Registering services and checks of this agent, and fetching their certificates and keys.
    Services,
    /// Everything: policy, membership, reloading, maintenance of the node.
    Operator,
}

impl Right {
    /// Returns the word of configuration files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Services => "services",
            Self::Operator => "operator",
        }
    }
}

impl FromStr for Right {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Read, Self::Services, Self::Operator].into_iter().find(|right| right.as_str() == text).ok_or(())
    }
}

/// A token of the API, kept as its SHA-256 digest.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiToken {
    digest: [u8; 32],
    right: Right,
}

impl ApiToken {
    /// Digests `token`, the text that clients show.
    pub fn new(token: &str, right: Right) -> Self {
        Self { digest: sha256(token.as_bytes()), right }
    }

    /// Takes the digest itself, for configurations that do not hold the token.
    pub fn from_digest(digest: [u8; 32], right: Right) -> Self {
        Self { digest, right }
    }

    /// What it allows.
    pub fn right(&self) -> Right {
        self.right
    }
}

impl fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiToken(…, {})", self.right.as_str())
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Which side a connection came in from; set by `serve`, loopback where it is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// On a loopback address: only this host's programs, browsers among them.
    Loopback,
    /// On any other address.
    Network,
    /// By the unix socket, which no browser reaches; `Host` says nothing there.
    Socket,
}

/// Where a connection comes from; set by `serve`, absent where it has no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer(pub(super) IpAddr);

/// Decides over each request before anything else looks at it.
#[derive(Debug)]
pub(super) struct Guard {
    tokens: Vec<ApiToken>,
    names: Vec<String>,
}

impl Guard {
    pub(super) fn new(config: &ApiConfig, node: &NodeName) -> Self {
        let names = config.names.iter().map(String::as_str).chain([node.as_str()]);
        Self { tokens: config.tokens.clone(), names: names.map(str::to_ascii_lowercase).collect() }
    }

    /// Lets a request pass that needs the right `needed`, or says why not.
    pub(super) fn admit(
        &self,
        headers: &HeaderMap,
        uri: &Uri,
        query: &Query,
        from: Arrival,
        needed: Right,
    ) -> Result<(), Refusal> {
        let host = host_of(headers, uri)?;
        if from == Arrival::Loopback && host.is_some_and(|host| !self.is_own_name(host_name(host))) {
            return Err(Refusal::forbidden(
                "Permission denied: the Host header names another host; use an IP address, `localhost` or the name of the node",
            ));
        }
        if !is_same_origin(headers, host) {
            return Err(Refusal::forbidden(
                "Permission denied: the request comes from a web page of another origin (Origin header)",
            ));
        }
        if self.tokens.is_empty() {
            return Ok(());
        }
        let Some(shown) = shown_token(headers, query) else {
            return Err(Refusal::forbidden(
                "Permission denied: the token is missing; show it as `X-Consul-Token`, `Authorization: Bearer` or `?token=`",
            ));
        };
        match self.right_of(shown) {
            Some(right) if right >= needed => Ok(()),
            Some(right) => Err(Refusal::forbidden(format!(
                "Permission denied: this needs a token with the right `{}`; the one shown has `{}`",
                needed.as_str(),
                right.as_str()
            ))),
            None => Err(Refusal::forbidden("Permission denied: the token shown is none of this agent's")),
        }
    }

    /// Returns the greatest right of the token `shown`. Every token is compared, each in constant time.
    fn right_of(&self, shown: &str) -> Option<Right> {
        let shown = sha256(shown.as_bytes());
        let is = |token: &ApiToken| constant_time::verify_slices_are_equal(&token.digest, &shown).is_ok();
        self.tokens.iter().fold(None, |best, token| best.max(is(token).then_some(token.right)))
    }

    fn is_own_name(&self, name: &str) -> bool {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        name == "localhost"
            || name.ends_with(".localhost")
            || bare.parse::<IpAddr>().is_ok()
            || self.names.contains(&name)
    }
}

/// Returns the authority that the request is for; none for an HTTP/1.0 client that names none.
fn host_of<'a>(headers: &'a HeaderMap, uri: &'a Uri) -> Result<Option<&'a str>, Refusal> {
    if let Some(authority) = uri.authority() {
        return Ok(Some(authority.as_str()));
    }
    let Some(host) = headers.get(header::HOST) else { return Ok(None) };
    let host = host.to_str().map_err(|_| Refusal::bad("Invalid Host header"))?;
    Ok((!host.is_empty()).then_some(host))
}

/// Cuts the port off `authority`.
fn host_name(authority: &str) -> &str {
    let after_brackets = authority.rfind(']').unwrap_or(0);
    match authority.rfind(':') {
        Some(colon) if colon > after_brackets => authority.split_at(colon).0,
        _ => authority,
    }
}

/// Tells whether no web page sent the request, or one that this agent served.
fn is_same_origin(headers: &HeaderMap, host: Option<&str>) -> bool {
    let foreign_site = headers.get("sec-fetch-site").is_some_and(|site| site == "cross-site");
    if foreign_site {
        return false;
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let authority = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, authority)| authority);
    authority.is_some_and(|authority| host.is_some_and(|host| host.eq_ignore_ascii_case(authority)))
}

/// Returns the token that the request shows: query, then header, then bearer.
fn shown_token<'a>(headers: &'a HeaderMap, query: &'a Query) -> Option<&'a str> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = || {
        let (scheme, token) = header("authorization")?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    };
    let tokens = [query.given("token"), header("x-consul-token"), bearer()];
    tokens.into_iter().flatten().find(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(token: Option<&str>) -> Guard {
        let tokens = token.map(|token| ApiToken::new(token, Right::Operator)).into_iter().collect();
        guard_of(tokens)
    }

    fn guard_of(tokens: Vec<ApiToken>) -> Guard {
        let config =
            ApiConfig { listen: Vec::new(), https: None, socket: None, tokens, names: vec!["Mesh.Example".to_owned()] };
        Guard::new(&config, &"web-1".parse().unwrap())
    }

    fn admit(guard: &Guard, uri: &str, headers: &[(&'static str, &str)], from: Arrival) -> Result<(), Refusal> {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        let uri: Uri = uri.parse().unwrap();
        guard.admit(&headers, &uri, &Query::parse(&uri).unwrap(), from, Right::Operator)
    }

    #[test]
    fn a_token_allows_its_right_and_those_below() {
        use Right::{Operator, Read, Services};
        let digest = |token: &str| sha256(token.as_bytes());
        let guard = guard_of(vec![
            ApiToken::from_digest(digest("reader"), Read),
            ApiToken::new("writer", Services),
            ApiToken::new("both", Read),
            ApiToken::new("root", Operator),
            ApiToken::new("both", Services),
        ]);
        let admit = |token: &str, needed| {
            let uri: Uri = format!("/?token={token}").parse().unwrap();
            guard.admit(&HeaderMap::new(), &uri, &Query::parse(&uri).unwrap(), Arrival::Network, needed)
        };
        for (token, most) in [("reader", Read), ("writer", Services), ("both", Services), ("root", Operator)] {
            for needed in [Read, Services, Operator] {
                assert_eq!(admit(token, needed).is_ok(), needed <= most, "{token} {needed:?}");
            }
        }
        let refused = admit("reader", Operator).unwrap_err().text;
        assert!(refused.contains("the right `operator`; the one shown has `read`"), "{refused}");
        assert!(admit("nobody", Read).unwrap_err().text.contains("none of this agent's"));
    }

    #[test]
    fn loopback_answers_only_to_names_of_this_host() {
        #[track_caller]
        fn check(host: &str, want: bool) {
            let got = admit(&guard(None), "/", &[("host", host)], Arrival::Loopback);
            assert_eq!(got.is_ok(), want, "{host}");
        }
        for own in ["127.0.0.1:8500", "localhost", "LOCALHOST:1", "[::1]:8500", "10.0.0.1", "web-1:80", "mesh.example"]
        {
            check(own, true);
        }
        for foreign in ["evil.example", "evil.example:8500", "127.0.0.1.evil.example", "localhost.evil.example"] {
            check(foreign, false);
        }
    }

    #[test]
    fn a_name_of_the_network_side_is_no_matter() {
        assert!(admit(&guard(None), "/", &[("host", "mesh.corp")], Arrival::Network).is_ok());
    }

    #[test]
    fn pages_of_other_origins_are_refused() {
        #[track_caller]
        fn check(headers: &[(&'static str, &str)], want: bool) {
            assert_eq!(admit(&guard(None), "/", headers, Arrival::Loopback).is_ok(), want, "{headers:?}");
        }
        let host = ("host", "127.0.0.1:8500");
        check(&[host, ("origin", "http://127.0.0.1:8500")], true);
        check(&[host, ("origin", "http://127.0.0.1:8501")], false);
        check(&[host, ("origin", "https://evil.example")], false);
        check(&[host, ("origin", "null")], false);
        check(&[("origin", "http://127.0.0.1:8500")], false);
        check(&[host, ("sec-fetch-site", "cross-site")], false);
        check(&[host, ("sec-fetch-site", "none")], true);
    }

    #[test]
    fn a_set_token_is_asked_of_everybody_in_three_places() {
        #[track_caller]
        fn check(uri: &str, headers: &[(&'static str, &str)], want: Result<(), &str>) {
            let got = admit(&guard(Some("s3cret")), uri, headers, Arrival::Loopback);
            match want {
                Ok(()) => assert_eq!(got, Ok(())),
                Err(part) => assert!(got.unwrap_err().text.contains(part)),
            }
        }
        check("/?token=s3cret", &[], Ok(()));
        check("/", &[("x-consul-token", "s3cret")], Ok(()));
        check("/", &[("authorization", "bearer s3cret")], Ok(()));
        check("/", &[], Err("token is missing"));
        check("/?token=", &[], Err("token is missing"));
        check("/", &[("authorization", "Basic s3cret")], Err("token is missing"));
        check("/?token=wrong", &[("x-consul-token", "s3cret")], Err("none of this agent's"));
    }

    #[test]
    fn a_token_is_never_printed() {
        assert_eq!(format!("{:?}", ApiToken::new("s3cret", Right::Read)), "ApiToken(…, read)");
    }
}
