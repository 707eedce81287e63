//! Reads what becomes of a request that a route is about: `Destination` or `Redirect`.

use http::header::{HeaderName, HeaderValue};

use super::matching::matching;
use super::{TESTS_MAX, TIME_MAX, bounded, subset, time};
use crate::traffic::entry::{Destination, HeaderEdit, MirrorRule, Redirect, Route, Then};
use crate::traffic::fields::{Node, Object, Problems};
use crate::traffic::hedge::{DELAY_MIN, Delay, Hedge, REQUESTS_MAX};
use crate::traffic::matcher::{Match, TextTest};
use crate::traffic::retry::{Condition, Retry};

/// Most headers that are added, set or removed at one place.
const EDITS_MAX: usize = 32;
/// Headers that frame a message, end at the first hop or are weft's own.
const HEADERS_OWN: [&str; 10] = [
    "host",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "x-forwarded-client-cert",
    "expect",
];

/// One route.
pub(super) fn route(node: &Node<'_>, problems: &mut Problems) -> Route {
    let mut object = node.object(problems);
    let when = matching(&mut object, problems);
    let redirect = object.object("Redirect", problems).map(|object| self::redirect(object, &when, problems));
    let destination = object.object("Destination", problems).map(|object| self::destination(object, &when, problems));
    object.finish(problems);
    let then = match (redirect, destination) {
        (Some(redirect), None) => Then::Redirect(redirect),
        (None, destination) => Then::Forward(Box::new(destination.unwrap_or_default())),
        (Some(redirect), Some(_)) => {
            problems.add(&*node.path, "has Redirect and Destination: give one of them");
            Then::Redirect(redirect)
        }
    };
    Route { when, then }
}

fn redirect(mut object: Object<'_>, when: &Match, problems: &mut Problems) -> Redirect {
    let code = object.number("Code", (301, 308), problems).unwrap_or(302);
    if matches!(code, 304..=306) {
        problems.add(object.path_of("Code"), "must be 301, 302, 303, 307 or 308");
    }
    let scheme = object.text("Scheme", problems).map(str::to_owned);
    if scheme.as_deref().is_some_and(|scheme| !matches!(scheme, "http" | "https")) {
        problems.add(object.path_of("Scheme"), "must be http or https");
    }
    let host = authority(&mut object, "Host", problems);
    let path = object.text("Path", problems).map(str::to_owned);
    if path.as_ref().is_some_and(|path| !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic())) {
        problems.add(object.path_of("Path"), "must begin with `/` and have no spaces");
    }
    let prefix_rewrite = prefix_rewrite(&mut object, when, problems);
    if path.is_none() && host.is_none() && scheme.is_none() && prefix_rewrite.is_none() {
        problems
            .add(object.path_of("Host"), "or Scheme, Path or PrefixRewrite must be given: the caller would come back");
    }
    object.finish(problems);
    Redirect { code: u16::try_from(code).unwrap_or(302), scheme, host, path, prefix_rewrite }
}

fn authority(object: &mut Object<'_>, name: &str, problems: &mut Problems) -> Option<String> {
    let path = object.path_of(name);
    let text = object.text(name, problems)?;
    if text.contains('@') || http::uri::Authority::try_from(text).is_err() {
        problems.add(path, "must be a host, with or without a port");
    }
    Some(text.to_owned())
}

fn destination(mut object: Object<'_>, when: &Match, problems: &mut Problems) -> Destination {
    object.tenancy(problems);
    let found = Destination {
        service: object.service("Service", problems),
        subset: subset(&mut object, "ServiceSubset", problems),
        prefix_rewrite: prefix_rewrite(&mut object, when, problems),
        host_rewrite: authority(&mut object, "HostRewrite", problems),
        request_timeout: time(&mut object, "RequestTimeout", problems),
        per_try_timeout: time(&mut object, "PerTryTimeout", problems),
        idle_timeout: time(&mut object, "IdleTimeout", problems),
        retry: retry(&mut object, problems),
        hedge: object.object("Hedge", problems).and_then(|object| hedge(object, when, problems)),
        mirror: object.object("Mirror", problems).and_then(|object| mirror(object, problems)),
        request_headers: edits(&mut object, "RequestHeaders", problems),
        response_headers: edits(&mut object, "ResponseHeaders", problems),
    };
    if let (Some(per_try), Some(timeout)) = (found.per_try_timeout, found.request_timeout)
        && per_try >= timeout
    {
        let rule = format!("= {per_try:?} must be shorter than RequestTimeout = {timeout:?}: else no attempt follows");
        problems.add(object.path_of("PerTryTimeout"), rule);
    }
    if let Some(Hedge { delay: Delay::Fixed(delay), .. }) = found.hedge {
        let limits = [("PerTryTimeout", found.per_try_timeout), ("RequestTimeout", found.request_timeout)];
        for (name, limit) in limits.into_iter().filter_map(|(name, limit)| Some((name, limit?))) {
            if delay >= limit {
                let rule = format!("= {delay:?} must be shorter than {name} = {limit:?}: else nothing is hedged");
                problems.add(format!("{}.Delay", object.path_of("Hedge")), rule);
            }
        }
    }
    object.finish(problems);
    found
}

fn hedge(mut object: Object<'_>, when: &Match, problems: &mut Problems) -> Option<Hedge> {
    let requests = object.number("MaxRequests", (2, REQUESTS_MAX.into()), problems).unwrap_or(2);
    let mut writes = Vec::new();
    for (path, method) in object.texts("Writes", 2, problems) {
        match method {
            "PUT" => writes.push(http::Method::PUT),
            "DELETE" => writes.push(http::Method::DELETE),
            _ => problems.add(path, "must be PUT or DELETE: no other method that writes may be repeated"),
        }
    }
    let grpc = object.flag("GRPC", problems);
    let covers = |method: &String| {
        matches!(&**method, "GET" | "HEAD" | "OPTIONS" | "TRACE")
            || writes.iter().any(|write| write == &**method)
            || (grpc && method == "POST")
    };
    if !when.methods.is_empty() && !when.methods.iter().any(covers) {
        problems
            .add(object.path_of("Writes"), "must name one of the route's Methods: none of them is hedged otherwise");
    }
    let path = object.path_of("Delay");
    let delay = delay(&mut object, &path, problems);
    object.finish(problems);
    Some(Hedge { delay: delay?, requests: u32::try_from(requests).unwrap_or(2), writes, grpc })
}

/// A duration, or `p50` to `p99`.
fn delay(object: &mut Object<'_>, path: &str, problems: &mut Problems) -> Option<Delay> {
    let Some(node) = object.take("Delay") else {
        problems.add(path, "must be given: a duration such as 50ms, or a percentile such as p95");
        return None;
    };
    if let Some(text) = node.value.as_str().and_then(|text| text.strip_prefix('p')) {
        let percent = text.parse().ok().filter(|percent| (50..=99).contains(percent));
        if percent.is_none() {
            problems.add(path, "must be a duration such as 50ms, or a percentile from p50 to p99");
        }
        return percent.map(Delay::Percentile);
    }
    let delay = node.duration(problems);
    if delay.is_none_or(|delay| delay < DELAY_MIN || delay > TIME_MAX) {
        problems.add(path, "must be from 1ms to 24h, or a percentile from p50 to p99");
    }
    delay.map(Delay::Fixed)
}

fn retry(object: &mut Object<'_>, problems: &mut Problems) -> Option<Retry> {
    let times = object.number("NumRetries", (0, 10), problems);
    let mut conditions = Vec::new();
    if object.flag("RetryOnConnectFailure", problems) {
        conditions.push(Condition::ConnectFailure);
    }
    for (path, text) in object.texts("RetryOn", TESTS_MAX, problems) {
        match text.parse() {
            Ok(condition) => conditions.push(condition),
            Err(rule) => problems.add(path, rule),
        }
    }
    for node in object.list("RetryOnStatusCodes", 64, problems) {
        match node.value.as_u64().filter(|code| (400..600).contains(code)).and_then(|code| u16::try_from(code).ok()) {
            Some(code) => conditions.push(Condition::Status(code)),
            None => problems.add(node.path, "must be a status from 400 to 599"),
        }
    }
    let (mut base, mut most) = (None, None);
    if let Some(mut backoff) = object.object("RetryBackoff", problems) {
        base = time(&mut backoff, "BaseInterval", problems);
        most = time(&mut backoff, "MaxInterval", problems);
        if let (Some(base), Some(most)) = (base, most)
            && most < base
        {
            problems.add(backoff.path_of("MaxInterval"), "must not be shorter than BaseInterval");
        }
        backoff.finish(problems);
    }
    conditions.sort();
    conditions.dedup();
    if times.is_none() && conditions.is_empty() && base.is_none() && most.is_none() {
        return None;
    }
    // Consul retries once where conditions are given without a number.
    let times = times.and_then(|times| u32::try_from(times).ok()).unwrap_or(1);
    Some(Retry::new(times, conditions, base, most))
}

fn mirror(mut object: Object<'_>, problems: &mut Problems) -> Option<MirrorRule> {
    let service = object.service("Service", problems);
    if service.is_none() {
        problems.add(object.path_of("Service"), "must be given");
    }
    let subset = subset(&mut object, "ServiceSubset", problems);
    let share = object.percent("Percent", problems).unwrap_or(10_000);
    object.finish(problems);
    Some(MirrorRule { service: service?, subset, share })
}

/// What stands in place of a prefix: only where there is one.
fn prefix_rewrite(object: &mut Object<'_>, when: &Match, problems: &mut Problems) -> Option<String> {
    let path = object.path_of("PrefixRewrite");
    let text = object.text("PrefixRewrite", problems).and_then(|text| bounded(text, &path, problems))?;
    if !text.starts_with('/') || text.bytes().any(|b| !b.is_ascii_graphic() || b"?#".contains(&b)) {
        problems.add(&*path, "must be a path that begins with `/`");
    }
    if !matches!(when.path, Some(TextTest::Prefix(_) | TextTest::Exact(_))) {
        problems.add(path, "needs a PathPrefix or PathExact to stand in place of");
    }
    Some(text)
}

/// What is added to headers, set and taken out.
pub(in crate::traffic) fn edits(object: &mut Object<'_>, name: &str, problems: &mut Problems) -> HeaderEdit {
    let Some(mut object) = object.object(name, problems) else { return HeaderEdit::default() };
    let mut edit = HeaderEdit {
        add: pairs(&mut object, "Add", problems),
        set: pairs(&mut object, "Set", problems),
        remove: Vec::new(),
    };
    for (path, text) in object.texts("Remove", EDITS_MAX, problems) {
        edit.remove.extend(header_name(text, path, problems));
    }
    object.finish(problems);
    edit
}

fn pairs(object: &mut Object<'_>, name: &str, problems: &mut Problems) -> Vec<(HeaderName, HeaderValue)> {
    let mut found = Vec::new();
    for (key, node) in object.map(name, EDITS_MAX, problems) {
        let (name, text) = (header_name(key, node.path.clone(), problems), node.text(problems));
        let Some(text) = text.and_then(|text| bounded(text, &node.path, problems)) else { continue };
        match HeaderValue::try_from(text) {
            Ok(value) => found.extend(name.map(|name| (name, value))),
            Err(_) => problems.add(node.path, "must be a header's value"),
        }
    }
    found
}

fn header_name(text: &str, path: String, problems: &mut Problems) -> Option<HeaderName> {
    let name = HeaderName::try_from(text).ok();
    match &name {
        None => problems.add(path, format!("must be a header's name, and is {text:?}")),
        Some(name) if name == http::header::HOST => {
            problems.add(path, "is refused: the host is changed by HostRewrite");
        }
        Some(name)
            if HEADERS_OWN.contains(&name.as_str())
                || name.as_str().starts_with("x-weft-")
                || name.as_str().starts_with("proxy-") =>
        {
            problems.add(path, format!("is refused: `{name}` frames messages or is weft's own"));
        }
        Some(_) => {}
    }
    name
}
