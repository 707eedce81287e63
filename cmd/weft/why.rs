//! `weft why`: everything that decides over a call, in words.

use serde_json::Value;

use crate::cli::{CheckArgs, Format, WhyArgs};
use crate::client::Client;
use crate::failure::Failure;
use crate::table;

/// `weft why SRC DST`
pub(crate) fn why(args: &WhyArgs) -> Result<(), Failure> {
    let WhyArgs { question, output } = args;
    let path = format!("/v1/mesh/why?{}", CheckArgs::query(question));
    let answer = Client::new(&question.client)?.get(&path)?;
    match output.format {
        Format::Json => println!("{answer:#}"),
        Format::Pretty => print!("{}", pretty(&answer)),
    }
    Ok(())
}

fn text(value: &Value, key: &str) -> String {
    match value.get(key) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn list(value: &Value, key: &str) -> Vec<Value> {
    value.get(key).and_then(Value::as_array).cloned().unwrap_or_default()
}

fn part<'v>(value: &'v Value, key: &str) -> &'v Value {
    value.get(key).unwrap_or(&Value::Null)
}

fn pretty(answer: &Value) -> String {
    let mut lines =
        vec![format!("{} -> {}: {}", text(answer, "Source"), text(answer, "Destination"), text(answer, "Verdict"))];
    if let Some(request) = answer.get("Request").filter(|request| request.is_object()) {
        lines.push(format!("  request: {} {}", text(request, "Method"), text(request, "Path")));
    }
    way(answer, &mut lines);
    policy(part(answer, "Policy"), &mut lines);
    instances(answer, &mut lines);
    caller(answer, &mut lines);
    let data = part(answer, "Data");
    let isolated = if data.get("Isolated") == Some(&Value::Bool(true)) {
        "; THIS NODE IS ISOLATED: this is what it last knew"
    } else {
        ""
    };
    let compared = match text(data, "DocumentsComparedSeconds") {
        seconds if seconds.is_empty() => "with nobody yet".to_owned(),
        seconds => format!("{seconds} s ago"),
    };
    lines.push(format!(
        "data of {}: oldest records signed {} s ago, {} intentions, documents {} compared {compared}{isolated}",
        text(answer, "AskedNode"),
        text(data, "OldestRecordsSeconds"),
        text(data, "Intentions"),
        text(data, "DocumentsHash")
    ));
    let change = list(answer, "ToChange");
    if !change.is_empty() {
        lines.push("\nTo let it pass:".to_owned());
        lines.extend(change.iter().filter_map(Value::as_str).map(|one| format!("  - {one}")));
    }
    lines.join("\n") + "\n"
}

/// The texts of a list.
fn texts(value: &Value, key: &str) -> Vec<String> {
    list(value, key).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Says where config entries lead the call.
fn way(answer: &Value, lines: &mut Vec<String>) {
    let (way, named) = (part(answer, "Way"), text(answer, "Destination"));
    lines.push("\nWay:".to_owned());
    for fault in list(way, "Faults") {
        lines.push(format!("  service-faults {named}: {fault}"));
    }
    let route = part(way, "Route");
    let (at, of) = (text(route, "At"), route.get("Of").and_then(Value::as_u64).unwrap_or_default());
    if !at.is_empty() {
        lines.push(format!("  route {at} (of {of}, from 0) of service-router {named}: {}", text(route, "Definition")));
    } else if of > 0 && part(answer, "Request").is_object() {
        lines.push(format!("  none of the {of} routes of service-router {named} matches"));
    } else if of > 0 {
        lines.push(format!(
            "  what none of the {of} routes of service-router {named} takes (ask with -method, -path, -header)"
        ));
    }
    let mirror = part(route, "Mirror");
    let sent = [("SentPath", "path"), ("SentHost", "host")].map(|(key, what)| match text(route, key) {
        sent if sent.is_empty() => None,
        sent => Some(format!("sent with {what} {sent}")),
    });
    let copies =
        mirror.is_object().then(|| format!("{} % copied to {}", text(mirror, "Percent"), text(mirror, "Target")));
    let hedged = is_set(route, "Hedged").then(|| "hedged".to_owned());
    let more: Vec<String> = sent.into_iter().flatten().chain(hedged).chain(copies).collect();
    if !more.is_empty() {
        lines.push(format!("    {}", more.join("; ")));
    }
    let sticky = if is_set(way, "Sticky") { ", for the callers that stay there" } else { "" };
    for leg in list(way, "Legs") {
        lines.push(format!("  {} % to {}{sticky}", text(&leg, "Weight"), self::leg(&leg)));
        for rate in list(&leg, "RateLimits") {
            lines.push(format!("    limited there: {rate}"));
        }
    }
}

/// A part of the calls: where it goes, who decides, how long it may take.
fn leg(leg: &Value) -> String {
    let mut said = text(leg, "Target");
    let filter = text(leg, "Filter");
    if !filter.is_empty() {
        said = format!("{said} ({filter})");
    }
    if is_set(leg, "OnlyPassing") {
        said += " (passing ones alone)";
    }
    let failover = texts(leg, "Failover");
    if !failover.is_empty() {
        said = format!("{said}, where it has none {}", failover.join(", then "));
    }
    if leg.get("Registered") == Some(&Value::Bool(false)) {
        said = format!("{said}, which nobody has registered");
    }
    let allowed = if is_set(leg, "Allowed") { "allowed" } else { "DENIED" };
    said = format!("{said}: {allowed} by {}", text(leg, "Rule"));
    let times = [
        ("RequestTimeout", "answer within"),
        ("ConnectTimeout", "connected within"),
        ("IdleTimeout", "streams reset after a silence of"),
    ];
    for (key, what) in times {
        let time = text(leg, key);
        if !time.is_empty() {
            said = format!("{said}, {what} {time}");
        }
    }
    said
}

fn is_set(value: &Value, key: &str) -> bool {
    value.get(key) == Some(&Value::Bool(true))
}

/// The chain of a node: its own certificate, its issuer's, the root.
fn chain(certificate: &Value) -> String {
    let [node, issuer, root] = ["Ends", "IssuerEnds", "RootEnds"].map(|key| text(certificate, key));
    let root = if root.is_empty() { "no root that is believed here".to_owned() } else { format!("root until {root}") };
    format!("node until {node} <- issuer until {issuer} <- {root}")
}

fn caller(answer: &Value, lines: &mut Vec<String>) {
    let source = text(answer, "Source");
    lines.push(String::new());
    let own = part(answer, "SourceCertificate");
    if own.is_object() {
        lines.push(format!("caller: {} until {}", text(own, "ID"), text(own, "Ends")));
    } else {
        let node = text(answer, "AskedNode");
        lines.push(format!(
            "caller: {source} is not registered on {node}; only its own node knows the end of its certificate (renewed \
             hourly), its tunnels and whom it picks next: what is said of those is {node}'s own"
        ));
    }
    let instances = list(answer, "SourceInstances");
    for one in &instances {
        let (id, node) = (text(one, "ID"), text(one, "Node"));
        lines.push(format!("  {id} on {node} ({}): {}", text(one, "NodeStatus"), chain(part(one, "Certificate"))));
    }
    if instances.is_empty() && source != "*" {
        lines.push(format!("  no node of the mesh has a service {source}"));
    }
}

/// Says how a worker balances, and which instances it treats in another way than the rest.
fn balancing(worker: &str, view: &Value) -> Vec<String> {
    let limit = |of: &str| {
        let limit = part(part(view, "Limits"), of);
        format!("{} of {}", text(limit, "UnderWay"), text(limit, "Most"))
    };
    let mut lines = vec![format!(
        "  worker {worker} balances by {}; under way from here: {} requests, {} connections, {} calls that wait for a stream, {} repeated requests; {} wait for an instance",
        text(view, "Policy"),
        limit("Requests"),
        limit("Connections"),
        limit("Pending"),
        limit("Retries"),
        text(view, "Waiting")
    )];
    if is_set(view, "Panics") {
        lines.push(format!("  worker {worker}: too few instances are left, ejections are not looked at"));
    }
    for one in list(view, "Instances") {
        let (id, node, breaker) = (text(&one, "ID"), text(&one, "Node"), text(&one, "Breaker"));
        match breaker.as_str() {
            "open" => lines.push(format!(
                "  worker {worker}: breaker of {id} on {node} is open for {} s more: it failed",
                text(&one, "OpenForSeconds")
            )),
            "half-open" => {
                lines.push(format!("  worker {worker}: breaker of {id} on {node} is half-open: one request tries it"));
            }
            _ if is_set(&one, "LoweredByReports") => {
                lines.push(format!("  worker {worker}: {id} on {node} gets a tenth: other nodes ejected it"));
            }
            _ => {}
        }
        lines.extend(load(&one).map(|load| format!("  worker {worker}: {id} on {node} {load}")));
    }
    lines
}

/// Says what a worker has under way at an instance and expects of it, if it knows anything.
fn load(seat: &Value) -> Option<String> {
    let (under_way, bears, expected) = (text(seat, "UnderWay"), text(seat, "AdaptiveLimit"), text(seat, "ExpectedMs"));
    if matches!(&*under_way, "" | "0") && bears.is_empty() && expected.is_empty() {
        return None;
    }
    let bears = if bears.is_empty() { String::new() } else { format!(" of {bears} that it bears") };
    let expected = if expected.is_empty() {
        "no answer yet".to_owned()
    } else {
        format!("an answer is expected in {expected} ms")
    };
    Some(format!("has {under_way}{bears} under way; {expected}"))
}

fn policy(policy: &Value, lines: &mut Vec<String>) {
    lines.push("\nIntentions, the most exact first:".to_owned());
    for one in list(policy, "Considered") {
        let decides = if one.get("Decides") == Some(&Value::Bool(true)) { "decides" } else { "" };
        let audit = if one.get("Audit") == Some(&Value::Bool(true)) { " (audit)" } else { "" };
        let says = text(&one, "Says") + audit;
        let line = format!(
            "  {:<24} {says:<22} precedence {}  version {} by {}  {decides}",
            text(&one, "Name"),
            text(&one, "Precedence"),
            text(&one, "Version"),
            text(&one, "Signer")
        );
        lines.push(line.trim_end().to_owned());
    }
    let decides = if text(policy, "Rule") == "default" { "  decides" } else { "" };
    lines.push(format!("  default                  {}{decides}", text(policy, "Default")));
    for one in list(policy, "Quarantined") {
        let (name, version, reason) = (text(&one, "Name"), text(&one, "Version"), text(&one, "Reason"));
        lines.push(format!("  quarantined: {name} version {version}: {reason}"));
    }
}

fn instances(answer: &Value, lines: &mut Vec<String>) {
    let protocol = text(answer, "Protocol");
    let protocol = if protocol.is_empty() { String::new() } else { format!(" (protocol {protocol})") };
    let mut services: Vec<String> = Vec::new();
    for leg in list(part(answer, "Way"), "Legs") {
        let service = text(&leg, "Service");
        if !services.contains(&service) {
            services.push(service);
        }
    }
    if services.is_empty() {
        services.push(text(answer, "Destination"));
    }
    lines.push(format!("\nInstances of {}{protocol}:", services.join(", ")));
    let row = |one: &Value| {
        let mut why = text(one, "Why");
        let next = list(one, "NextOfWorkers").len();
        if next > 0 {
            why = format!("{why}, next of {next} workers here");
        }
        let reporters = texts(one, "ReportedBy");
        if !reporters.is_empty() {
            why = format!("{why}, ejected by {}", reporters.join(", "));
        }
        let age = one.get("RecordsAgeSeconds").and_then(Value::as_u64);
        let age = age.map_or_else(String::new, |age| format!("{age}s"));
        let [node, id, address, status] = ["Node", "ID", "Address", "Status"].map(|key| text(one, key));
        let service = text(one, "Service");
        // Of what stands in for others too.
        let is_of_one = service.is_empty() || (services.len() == 1 && services.contains(&service));
        let id = if is_of_one { id } else { format!("{service}/{id}") };
        [node, id, address, status, age, text(part(one, "Certificate"), "Ends"), why]
    };
    let rows: Vec<[String; 7]> = list(answer, "Instances").iter().map(row).collect();
    let header = ["Node", "Instance", "Address", "Status", "Records", "Certificate ends", "Why"];
    lines.extend(table::render(header, &rows).lines().map(|row| format!("  {row}")));
    let mut shown: Vec<String> = Vec::new();
    for one in list(answer, "Instances") {
        let line = format!("  chain of {}: {}", text(&one, "Node"), chain(part(&one, "Certificate")));
        if part(&one, "Certificate").is_object() && !shown.contains(&line) {
            shown.push(line);
        }
    }
    lines.extend(shown);
    let workers = list(answer, "Workers");
    let has_targets = workers
        .iter()
        .any(|one| text(one, "Target") != workers.first().map(|one| text(one, "Target")).unwrap_or_default());
    for one in workers {
        let mut worker = text(&one, "Worker");
        if has_targets {
            worker = format!("{worker} (to {})", text(&one, "Target"));
        }
        let view = part(&one, "Balancing");
        // A worker that knows of no such service balances nothing; why it picks nobody stands below.
        if !text(view, "Policy").is_empty() {
            lines.extend(balancing(&worker, view));
        }
        for tunnel in list(&one, "Tunnels") {
            let (peer, ends) = (text(&tunnel, "Peer"), text(&tunnel, "Ends"));
            lines.push(format!("  worker {worker} has a tunnel to {peer}, whose certificate ends {ends}"));
        }
        let none = text(&one, "WhyNone");
        if !none.is_empty() {
            lines.push(format!("  worker {worker} picks nobody: {none}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_way_and_all_that_is_known_of_instances_are_told() {
        let answer = json!({
            "Source": "shop", "Destination": "web", "Verdict": "denied by intention x (precedence 9), at dark",
            "Request": {"Method": "GET", "Path": "/api/x"},
            "Way": {
                "Faults": [{"Delay": {"Duration": "2s"}}],
                "Route": {"At": 1, "Of": 3, "Definition": {"Match": {"HTTP": {"PathPrefix": "/api/"}}},
                    "SentPath": "/x", "Hedged": true, "Mirror": {"Target": "shadow", "Percent": 10.0}},
                "Legs": [
                    {"Weight": 90.0, "Target": "v1.web", "Service": "web", "Filter": "Service.Meta.version == v1",
                        "Failover": ["v2.web"], "Allowed": true, "Rule": "default", "RequestTimeout": "2s",
                        "RateLimits": [{"RequestsPerSecond": 5.0}]},
                    {"Weight": 10.0, "Target": "dark", "Service": "dark", "Allowed": false, "Rule": "shop:dark"},
                ],
            },
            "Instances": [{"Node": "n2", "ID": "web-1", "Service": "web", "Why": "takes calls", "ReportedBy": ["n1", "n3"]}],
            "Workers": [{"Worker": 0, "Balancing": {
                "Policy": "peak_ewma", "Waiting": 4,
                "Limits": {"Requests": {"UnderWay": 1, "Most": 5}, "Connections": {"UnderWay": 2, "Most": 6},
                    "Pending": {"UnderWay": 3, "Most": 7}, "Retries": {"UnderWay": 0, "Most": 8}},
                "Instances": [{"Node": "n2", "ID": "web-1", "Breaker": "closed", "UnderWay": 3, "AdaptiveLimit": 12, "ExpectedMs": 4.2}],
            }}],
        });
        let told = pretty(&answer);
        for want in [
            "service-faults web: {\"Delay\":{\"Duration\":\"2s\"}}",
            "route 1 (of 3, from 0) of service-router web: {\"Match\":{\"HTTP\":{\"PathPrefix\":\"/api/\"}}}",
            "sent with path /x; hedged; 10.0 % copied to shadow",
            "90.0 % to v1.web (Service.Meta.version == v1), where it has none v2.web: allowed by default, answer within 2s",
            "limited there: {\"RequestsPerSecond\":5.0}",
            "10.0 % to dark: DENIED by shop:dark",
            "Instances of web, dark:",
            "web/web-1",
            "takes calls, ejected by n1, n3",
            "1 of 5 requests, 2 of 6 connections, 3 of 7 calls that wait for a stream, 0 of 8 repeated requests; 4 wait for an instance",
            "web-1 on n2 has 3 of 12 that it bears under way; an answer is expected in 4.2 ms",
        ] {
            assert!(told.contains(want), "{want:?} is not in:\n{told}");
        }
    }

    #[test]
    fn a_way_to_a_service_that_nobody_has_says_so() {
        let way = |registered: bool| {
            let leg = json!({"Weight": 100.0, "Target": "db", "Service": "db", "Registered": registered, "Allowed": true, "Rule": "default"});
            pretty(&json!({"Destination": "db", "Way": {"Legs": [leg]}}))
        };
        assert!(
            way(false).contains("100.0 % to db, which nobody has registered: allowed by default"),
            "{}",
            way(false)
        );
        assert!(way(true).contains("100.0 % to db: allowed by default"), "{}", way(true));
    }

    #[test]
    fn what_no_route_matches_is_told_apart_from_what_was_not_asked() {
        let told = |request: Value| {
            let way =
                json!({"Route": {"At": null, "Of": 2}, "Legs": [{"Weight": 100.0, "Target": "web", "Service": "web"}]});
            pretty(&json!({"Destination": "web", "Request": request, "Way": way}))
        };
        assert!(told(json!({"Method": "GET"})).contains("none of the 2 routes of service-router web matches"));
        assert!(told(Value::Null).contains("what none of the 2 routes of service-router web takes (ask with -method"));
    }

    #[test]
    fn a_worker_that_knows_of_no_such_service_says_only_why_it_picks_nobody() {
        let limits = json!({"Requests": {"UnderWay": 1, "Most": 5}, "Connections": {"UnderWay": 2, "Most": 6}});
        let worker = |policy: &str, limits: Value| json!({"Worker": 0, "Balancing": {"Policy": policy, "Limits": limits}, "WhyNone": "nobody has the service"});
        let told = |worker: Value| {
            let mut lines = Vec::new();
            instances(&json!({"Destination": "nobody", "Workers": [worker]}), &mut lines);
            lines.join("\n")
        };
        let unknown = told(worker("", json!({})));
        assert!(!unknown.contains("balances by"), "{unknown}");
        assert!(unknown.contains("worker 0 picks nobody: nobody has the service"), "{unknown}");
        let nothing = told(json!({"Worker": 0, "Balancing": null, "WhyNone": "nobody has the service"}));
        assert_eq!(nothing, unknown);
        let known = told(worker("round_robin", limits));
        assert!(known.contains("worker 0 balances by round_robin; under way from here: 1 of 5 requests"), "{known}");
    }
}
