//! Settings for people, in the shape of the entries that set them.

use serde_json::{Map, Value, json};

use super::{Algorithm, Balance, HashField, HashPolicy, RateKey, RatePath, RateRule, RateScope};

/// Shows how calls are spread, as `LoadBalancer` says it; what is not given is left out.
pub fn show_balance(balance: &Balance) -> Value {
    let mut shown = Map::new();
    let mut say = |name: &str, value: Value| drop(shown.insert(name.to_owned(), value));
    say("Policy", balance.algorithm.as_str().into());
    match balance.algorithm {
        Algorithm::LeastRequest { choices } => say("LeastRequestConfig", json!({"ChoiceCount": choices})),
        Algorithm::RingHash { points_min, points_max } => {
            say("RingHashConfig", json!({"MinimumRingSize": points_min, "MaximumRingSize": points_max}));
        }
        _ => {}
    }
    if !balance.hash.is_empty() {
        say("HashPolicies", balance.hash.iter().map(policy).collect());
    }
    if !balance.slow_start.is_zero() {
        say("SlowStart", format!("{:?}", balance.slow_start).into());
    }
    say("Zones", if balance.prefers_zone { "prefer" } else { "ignore" }.into());
    say("Overprovisioning", balance.overprovisioning.into());
    Value::Object(shown)
}

fn policy(policy: &HashPolicy) -> Value {
    let mut shown = match &policy.field {
        HashField::Header(name) => json!({"Field": "header", "FieldValue": name.as_str()}),
        HashField::Query(name) => json!({"Field": "query_parameter", "FieldValue": name}),
        HashField::SourceIp => json!({"SourceIP": true}),
        HashField::Cookie { name, make: None } => json!({"Field": "cookie", "FieldValue": name}),
        HashField::Cookie { name, make: Some(make) } => {
            let mut config = json!({"Session": make.ttl.is_none(), "Path": make.path});
            if let (Value::Object(fields), Some(ttl)) = (&mut config, make.ttl) {
                fields.insert("TTL".to_owned(), format!("{ttl:?}").into());
            }
            json!({"Field": "cookie", "FieldValue": name, "CookieConfig": config})
        }
    };
    if let (Value::Object(fields), true) = (&mut shown, policy.terminal) {
        fields.insert("Terminal".to_owned(), true.into());
    }
    shown
}

/// Shows a limit of requests, as `RateLimits` says it.
pub fn show_rate(rule: &RateRule) -> Value {
    let mut shown = json!({
        "RequestsPerSecond": rule.rate.per_second,
        "RequestsMaxBurst": rule.rate.burst,
        "Scope": match rule.scope {
            RateScope::Node => "node",
            RateScope::Cluster => "cluster",
        },
    });
    let path = match &rule.path {
        RatePath::Any => None,
        RatePath::Exact(path) => Some(("PathExact", path.as_str())),
        RatePath::Prefix(path) => Some(("PathPrefix", path.as_str())),
        RatePath::Regex(regex) => Some(("PathRegex", regex.as_str())),
    };
    let per = match &rule.key {
        RateKey::All => None,
        RateKey::Source => Some("source".to_owned()),
        RateKey::Header(name) => Some(format!("header:{name}")),
    };
    if let Value::Object(fields) = &mut shown {
        fields.extend(path.map(|(name, path)| (name.to_owned(), Value::from(path))));
        fields.extend(per.map(|per| ("Per".to_owned(), Value::from(per))));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::super::{balance, rate_limits};
    use super::*;

    #[test]
    fn what_is_shown_may_be_written_again() {
        let written = json!({"Policy": "ring_hash", "SlowStart": "30s", "Zones": "ignore", "Overprovisioning": 2.0,
            "RingHashConfig": {"MinimumRingSize": 64, "MaximumRingSize": 128}, "HashPolicies": [
                {"Field": "header", "FieldValue": "x-user", "Terminal": true},
                {"Field": "cookie", "FieldValue": "stay", "CookieConfig": {"TTL": "1h", "Path": "/"}},
                {"Field": "query_parameter", "FieldValue": "q"}, {"SourceIP": true}]});
        let set = balance(&written).unwrap();
        assert_eq!(balance(&show_balance(&set)).unwrap(), set);
        assert_eq!(balance(&show_balance(&Balance::default())).unwrap(), Balance::default());

        let limits = json!({"InstanceLevel": {"RequestsPerSecond": 100, "RequestsMaxBurst": 7, "Per": "source",
            "Routes": [{"PathPrefix": "/search", "RequestsPerSecond": 5, "Per": "header:x-user"}]}});
        let rules = rate_limits(&limits).unwrap().rules;
        let shown: Vec<Value> = rules.iter().map(show_rate).collect();
        assert_eq!(
            shown,
            [
                json!({"PathPrefix": "/search", "RequestsPerSecond": 5.0, "RequestsMaxBurst": 5, "Per": "header:x-user", "Scope": "node"}),
                json!({"RequestsPerSecond": 100.0, "RequestsMaxBurst": 7, "Per": "source", "Scope": "node"}),
            ]
        );
    }
}
