//! The key of a request, where its service is balanced by one: headers, cookies, the query, the caller's address.

use std::fmt::Write as _;
use std::net::IpAddr;

use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;

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
    if balance.hash.is_empty() {
        return None;
    }
    let (key, cookie) = of_parts(balance, call.parts, call.from);
    if cookie.is_some() {
        call.cookie.set(cookie);
    }
    key
}

/// Makes the key of a request that came `from` there, and the cookie for its answer if it needs one.
fn of_parts(balance: &Balance, parts: &Parts, from: Option<IpAddr>) -> (Option<u64>, Option<HeaderValue>) {
    let (mut key, mut cookie): (Option<u64>, _) = (None, None);
    for policy in &balance.hash {
        let found = match &policy.field {
            HashField::Header(name) => parts.headers.get(name).map(|value| key_of(value.as_bytes())),
            HashField::Cookie { name, make } => {
                let sent = self::cookie(&parts.headers, name).map(|value| key_of(value.as_bytes()));
                sent.or_else(|| {
                    let (value, header) = made(name, make.as_ref()?)?;
                    cookie = Some(header);
                    Some(value)
                })
            }
            HashField::Query(name) => {
                let query = parts.uri.query().unwrap_or_default();
                parameter(query, name).map(|value| key_of(value.as_bytes()))
            }
            HashField::SourceIp => from.map(key_of_ip),
        };
        let Some(found) = found else { continue };
        // As Envoy: sources count together, in order.
        key = Some(key.map_or(found, |key| key.rotate_left(1) ^ found));
        if policy.terminal {
            break;
        }
    }
    (key, cookie)
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
    use crate::upstream::HashPolicy;

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

    #[test]
    fn sources_of_a_key_count_together_in_order_up_to_one_that_ends_it() {
        let header = |name: &'static str, terminal| HashPolicy {
            field: HashField::Header(header::HeaderName::from_static(name)),
            terminal,
        };
        let query = HashPolicy { field: HashField::Query("user".to_owned()), terminal: false };
        let key = |hash: &[HashPolicy], headers: &[(&str, &str)], path: &str| {
            let balance = Balance { hash: hash.to_vec(), ..Balance::default() };
            let mut request = http::Request::builder().uri(path);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            of_parts(&balance, &request.body(()).unwrap().into_parts().0, None).0
        };
        let both = [header("a", false), header("b", false)];
        let of = |a, b| key(&both, &[("a", a), ("b", b)], "/").unwrap();
        assert_eq!(of("1", "2"), of("1", "2"));
        assert!(of("1", "2") != of("2", "1") && of("1", "1") != of("2", "2") && of("1", "2") != of("1", "3"));
        // What is not there is passed over, and what ends the key does so where it gave something.
        assert_eq!(key(&both, &[("b", "2")], "/"), key(&both[1..], &[("b", "2")], "/"));
        assert_eq!(key(&both, &[], "/"), None);
        let ending = [header("a", true), query];
        assert_eq!(key(&ending, &[("a", "1")], "/?user=7"), key(&ending[..1], &[("a", "1")], "/"));
        assert_eq!(key(&ending, &[], "/?user=7"), key(&ending[1..], &[], "/?user=7"));
        assert!(key(&ending, &[], "/?user=7").is_some());
    }

    #[test]
    fn a_cookie_is_made_for_who_has_none_and_for_nobody_else() {
        let make = Some(MadeCookie { ttl: None, path: String::new() });
        let cookies = HashPolicy { field: HashField::Cookie { name: "seen".to_owned(), make }, terminal: false };
        let balance = Balance { hash: vec![cookies], ..Balance::default() };
        let parts = |cookie: &str| {
            let request = http::Request::builder().header(header::COOKIE, cookie).body(()).unwrap();
            request.into_parts().0
        };
        let (key, made) = of_parts(&balance, &parts("seen=abc"), None);
        assert_eq!((key, made), (Some(key_of(b"abc")), None));
        let (key, made) = of_parts(&balance, &parts("other=abc"), None);
        assert!(key.is_some() && made.is_some());
    }
}
