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
    let is_set = |value: &Value, key: &str| value.get(key) == Some(&Value::Bool(true));
    let limit = |of: &str| {
        let limit = part(part(view, "Limits"), of);
        format!("{} of {}", text(limit, "UnderWay"), text(limit, "Most"))
    };
    let mut lines = vec![format!(
        "  worker {worker} balances by {}; under way from here: {} requests, {} connections",
        text(view, "Policy"),
        limit("Requests"),
        limit("Connections")
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
    }
    lines
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
    lines.push(format!("\nInstances of {}{protocol}:", text(answer, "Destination")));
    let row = |one: &Value| {
        let why = match list(one, "NextOfWorkers").len() {
            0 => text(one, "Why"),
            next => format!("{}, next of {next} workers here", text(one, "Why")),
        };
        let age = one.get("RecordsAgeSeconds").and_then(Value::as_u64);
        let age = age.map_or_else(String::new, |age| format!("{age}s"));
        let [node, id, address, status] = ["Node", "ID", "Address", "Status"].map(|key| text(one, key));
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
    for one in list(answer, "Workers") {
        let worker = text(&one, "Worker");
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
        let known = told(worker("round_robin", limits));
        assert!(known.contains("worker 0 balances by round_robin; under way from here: 1 of 5 requests"), "{known}");
    }
}
