//! Who may talk to the API: the admin token, and defence against web pages in a browser on the same host.
//!
//! A page of another site may send requests to loopback (cross-site requests) or point its own DNS name at 127.0.0.1
//! (DNS rebinding). The first carry a foreign `Origin`, the second a foreign `Host`: both are refused.

use std::fmt;
use std::net::IpAddr;

use aws_lc_rs::{constant_time, digest};
use http::{HeaderMap, Uri, header};

use super::ApiConfig;
use super::call::Refusal;
use super::query::Query;
use crate::model::NodeName;

/// The admin token, kept as its SHA-256 digest.
#[derive(Clone, PartialEq, Eq)]
pub struct AdminToken([u8; 32]);

impl AdminToken {
    /// Digests `token`, the text that clients show.
    pub fn new(token: &str) -> Self {
        Self(sha256(token.as_bytes()))
    }

    /// Takes the digest itself, for configurations that do not hold the token.
    pub fn from_digest(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// Compares in constant time.
    fn is(&self, shown: &str) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &sha256(shown.as_bytes())).is_ok()
    }
}

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminToken(…)")
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
}

/// Decides over each request before anything else looks at it.
#[derive(Debug)]
pub(super) struct Guard {
    token: Option<AdminToken>,
    names: Vec<String>,
}

impl Guard {
    pub(super) fn new(config: &ApiConfig, node: &NodeName) -> Self {
        let names = config.names.iter().map(String::as_str).chain([node.as_str()]);
        Self { token: config.token.clone(), names: names.map(str::to_ascii_lowercase).collect() }
    }

    /// Lets a request pass, or says why not.
    pub(super) fn admit(&self, headers: &HeaderMap, uri: &Uri, query: &Query, from: Arrival) -> Result<(), Refusal> {
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
        match (&self.token, shown_token(headers, query)) {
            (None, _) => Ok(()),
            (Some(token), Some(shown)) if token.is(shown) => Ok(()),
            (Some(_), Some(_)) => {
                Err(Refusal::forbidden("Permission denied: the token shown is not this agent's admin token"))
            }
            (Some(_), None) => Err(Refusal::forbidden(
                "Permission denied: the admin token is missing; show it as `X-Consul-Token`, `Authorization: Bearer` or `?token=`",
            )),
        }
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
        let config =
            ApiConfig { listen: Vec::new(), token: token.map(AdminToken::new), names: vec!["Mesh.Example".to_owned()] };
        Guard::new(&config, &"web-1".parse().unwrap())
    }

    fn admit(guard: &Guard, uri: &str, headers: &[(&'static str, &str)], from: Arrival) -> Result<(), Refusal> {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        let uri: Uri = uri.parse().unwrap();
        guard.admit(&headers, &uri, &Query::parse(&uri).unwrap(), from)
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
        check("/?token=wrong", &[("x-consul-token", "s3cret")], Err("not this agent's"));
    }

    #[test]
    fn a_token_is_never_printed() {
        assert_eq!(format!("{:?}", AdminToken::new("s3cret")), "AdminToken(…)");
    }
}
