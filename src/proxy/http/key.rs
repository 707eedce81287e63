//! The key of a request, where its service is balanced by one: headers, cookies, the query, the caller's address.

use std::fmt::Write as _;
use std::net::IpAddr;

use http::header::{self, HeaderMap, HeaderValue};

use super::Dial;
use super::outbound::Call;
use crate::routing::key_of;
use crate::upstream::{Balance, HashField, MadeCookie};

/// Returns the key of a request; none: its service is not balanced by a key, or the request has nothing to make one of.
///
/// A cookie that weft makes is left in the call, for the answer.
pub(super) fn of_request<D: Dial>(worker: &D, call: &Call<'_>) -> Option<u64> {
    let snapshot = worker.snapshot().peek();
    let balance = snapshot.upstreams.balance(&call.target.caller.destination);
    if balance.hash.is_empty() { None } else { of_parts(balance, call) }
}

fn of_parts(balance: &Balance, call: &Call<'_>) -> Option<u64> {
    let mut key: Option<u64> = None;
    for policy in &balance.hash {
        let found = match &policy.field {
            HashField::Header(name) => call.parts.headers.get(name).map(|value| key_of(value.as_bytes())),
            HashField::Cookie { name, make } => {
                let sent = cookie(&call.parts.headers, name).map(|value| key_of(value.as_bytes()));
                sent.or_else(|| {
                    let (value, header) = made(name, make.as_ref()?)?;
                    call.cookie.set(Some(header));
                    Some(value)
                })
            }
            HashField::Query(name) => {
                let query = call.parts.uri.query().unwrap_or_default();
                parameter(query, name).map(|value| key_of(value.as_bytes()))
            }
            HashField::SourceIp => call.from.map(key_of_ip),
        };
        let Some(found) = found else { continue };
        // As Envoy: sources count together, in order.
        key = Some(key.map_or(found, |key| key.rotate_left(1) ^ found));
        if policy.terminal {
            break;
        }
    }
    key
}

/// Hashes an address.
pub(in crate::proxy) fn key_of_ip(from: IpAddr) -> u64 {
    match from.to_canonical() {
        IpAddr::V4(from) => key_of(&from.octets()),
        IpAddr::V6(from) => key_of(&from.octets()),
    }
}

/// Finds a cookie (RFC 6265 §5.4).
fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let texts = headers.get_all(header::COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(';')).find_map(|pair| {
        let (own, value) = pair.trim().split_once('=')?;
        (own == name && !value.is_empty()).then_some(value)
    })
}

/// Finds a parameter of a query, as it stands there.
fn parameter<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    query.split('&').find_map(|pair| {
        let (own, value) = pair.split_once('=').unwrap_or((pair, ""));
        (own == name).then_some(value)
    })
}

/// Makes a cookie with a value that nobody else has; returns its key, too.
fn made(name: &str, make: &MadeCookie) -> Option<(u64, HeaderValue)> {
    let value = format!("{:016x}", rand::random::<u64>());
    let mut text = format!("{name}={value}");
    if let Some(ttl) = make.ttl {
        let _text_takes_all = write!(text, "; Max-Age={}", ttl.as_secs());
    }
    if !make.path.is_empty() {
        let _text_takes_all = write!(text, "; Path={}", make.path);
    }
    text.push_str("; HttpOnly");
    Some((key_of(value.as_bytes()), HeaderValue::try_from(text).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_and_parameters_are_found_by_their_whole_name() {
        let mut headers = HeaderMap::new();
        headers.append(header::COOKIE, HeaderValue::from_static("xseen=1; seen=abc; seen=d"));
        assert_eq!(cookie(&headers, "seen"), Some("abc"));
        assert_eq!(cookie(&headers, "een"), None);
        assert_eq!(parameter("a=1&user=7&user=8", "user"), Some("7"));
        assert_eq!(parameter("xuser=7&user", "user"), Some(""));
        assert_eq!(parameter("a=1", "user"), None);
    }

    #[test]
    fn a_made_cookie_has_the_key_that_it_gives_when_it_is_sent_back() {
        let make = MadeCookie { ttl: Some(std::time::Duration::from_secs(60)), path: "/".to_owned() };
        let (key, header) = made("seen", &make).unwrap();
        let text = header.to_str().unwrap();
        assert!(text.ends_with("; Max-Age=60; Path=/; HttpOnly"), "{text}");
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, HeaderValue::from_str(text.split(';').next().unwrap()).unwrap());
        assert_eq!(key_of(cookie(&headers, "seen").unwrap().as_bytes()), key);
    }
}
