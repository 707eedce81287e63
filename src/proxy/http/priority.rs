//! How much a request matters: what its caller claims, within what the operators let it.
//!
//! A claim may always lower: nobody gains by it but others. It raises only where the settings of the calling service say so
//! (`PriorityMax`), for that service then answers for what it passes on of its own clients' headers; and only for apps of
//! this host, for whoever reaches a port from elsewhere is nobody that weft knows. Peers' words count for nothing: the app
//! gets the header, and its own agent holds its calls against its own settings.

use std::net::IpAddr;

use http::header::{HeaderMap, HeaderName};

use crate::upstream::{Limits, Priority};

/// Says how much a request matters: `high`, `normal`, `low`, `sheddable`. Apps that forward it keep it for what they call.
pub(super) const PRIORITY: HeaderName = HeaderName::from_static("x-weft-priority");

/// Returns the priority of a request with `headers` that came `from` there; the least, if it claims several.
pub(super) fn of_request(headers: &HeaderMap, limits: &Limits, from: Option<IpAddr>) -> Priority {
    let claims = headers.get_all(PRIORITY).iter().filter_map(|value| value.to_str().ok()?.trim().parse().ok());
    let level: Priority = claims.min().unwrap_or(limits.priority).min(limits.priority_max);
    if from.is_some_and(|from| from.to_canonical().is_loopback()) { level } else { level.min(Priority::Normal) }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[track_caller]
    fn check(claims: &[&str], (usual, most): (Priority, Priority), from: &str, want: Priority) {
        let mut headers = HeaderMap::new();
        for claim in claims {
            headers.append(PRIORITY, HeaderValue::try_from(*claim).unwrap());
        }
        let limits = Limits { priority: usual, priority_max: most, ..Limits::default() };
        let found = of_request(&headers, &limits, from.parse().ok());
        assert_eq!(found, want, "{claims:?} from {from:?}");
    }

    #[test]
    fn a_claim_lowers_and_raises_only_where_it_may() {
        use Priority::{High, Low, Normal, Sheddable};
        let usual = (Normal, Normal);
        check(&[], usual, "127.0.0.1", Normal);
        check(&["low"], usual, "127.0.0.1", Low);
        check(&["Sheddable"], usual, "10.0.0.9", Sheddable);
        check(&["high"], usual, "127.0.0.1", Normal);
        check(&["high"], (Normal, High), "127.0.0.1", High);
        check(&["high"], (Normal, High), "::1", High);
        check(&["high"], (Normal, High), "::ffff:127.0.0.1", High);
        check(&["high"], (Normal, High), "10.0.0.9", Normal);
        check(&["high"], (Normal, High), "nowhere", Normal);
        check(&[], (High, High), "10.0.0.9", Normal);
        check(&["normal"], (Low, Low), "127.0.0.1", Low);
        check(&["high", "low"], (Normal, High), "127.0.0.1", Low);
        check(&["spare"], (Normal, High), "127.0.0.1", Normal);
        check(&["9"], (Low, High), "127.0.0.1", Low);
    }
}
