//! `weft why`: everything that decides over a call, in words.

use std::fmt::Write as _;

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

fn pretty(answer: &Value) -> String {
    let text = |value: &Value, key: &str| match value.get(key) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let list = |value: &Value, key: &str| value.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let null = Value::Null;
    let mut out = String::new();
    let mut line = |text: String| {
        // Writing to a String cannot fail.
        let _written = writeln!(out, "{text}");
    };
    line(format!("{} -> {}: {}", text(answer, "Source"), text(answer, "Destination"), text(answer, "Verdict")));
    if let Some(request) = answer.get("Request").filter(|request| request.is_object()) {
        line(format!("  request: {} {}", text(request, "Method"), text(request, "Path")));
    }
    line("\nIntentions, the most exact first:".to_owned());
    let policy = answer.get("Policy").unwrap_or(&null);
    let considered = list(policy, "Considered");
    for one in &considered {
        let decides = if one.get("Decides") == Some(&Value::Bool(true)) { "decides" } else { "" };
        let audit = if one.get("Audit") == Some(&Value::Bool(true)) { " (audit)" } else { "" };
        let says = text(one, "Says") + audit;
        line(
            format!(
                "  {:<24} {:<22} precedence {}  version {} by {}  {decides}",
                text(one, "Name"),
                says,
                text(one, "Precedence"),
                text(one, "Version"),
                text(one, "Signer")
            )
            .trim_end()
            .to_owned(),
        );
    }
    let decides = if text(policy, "Rule") == "default" { "  decides" } else { "" };
    line(format!("  default                  {}{decides}", text(policy, "Default")));
    for one in list(policy, "Quarantined") {
        line(format!(
            "  quarantined: {} version {}: {}",
            text(&one, "Name"),
            text(&one, "Version"),
            text(&one, "Reason")
        ));
    }
    let protocol = text(answer, "Protocol");
    let protocol = if protocol.is_empty() { String::new() } else { format!(" (protocol {protocol})") };
    line(format!("\nInstances of {}{protocol}:", text(answer, "Destination")));
    let rows: Vec<[String; 7]> = list(answer, "Instances")
        .iter()
        .map(|one| {
            let certificate = one.get("Certificate").unwrap_or(&null);
            let (node, id) = (text(one, "Node"), text(one, "ID"));
            let next = list(one, "NextOfWorkers").len();
            let why = match next {
                0 => text(one, "Why"),
                _ => format!("{}, next of {next} workers here", text(one, "Why")),
            };
            let age = one.get("RecordsAgeSeconds").and_then(Value::as_u64);
            [
                node,
                id,
                text(one, "Address"),
                text(one, "Status"),
                age.map_or_else(String::new, |age| format!("{age}s")),
                text(certificate, "Ends"),
                why,
            ]
        })
        .collect();
    let header = ["Node", "Instance", "Address", "Status", "Records", "Certificate ends", "Why"];
    table::render(header, &rows).lines().for_each(|row| line(format!("  {row}")));
    for one in list(answer, "Workers") {
        for tunnel in list(&one, "Tunnels") {
            let (worker, peer, ends) = (text(&one, "Worker"), text(&tunnel, "Peer"), text(&tunnel, "Ends"));
            line(format!("  worker {worker} has a tunnel to {peer}, whose certificate ends {ends}"));
        }
        let none = text(&one, "WhyNone");
        if !none.is_empty() {
            line(format!("  worker {} picks nobody: {none}", text(&one, "Worker")));
        }
    }
    let here = match answer.get("SourceCertificate").filter(|shown| shown.is_object()) {
        Some(own) => format!(
            "caller: {}, until {} (its node's until {})",
            text(own, "ID"),
            text(own, "Ends"),
            text(own, "NodeEnds")
        ),
        None => format!(
            "caller: {} is not registered on {}: ask on its own node for its certificate and tunnels",
            text(answer, "Source"),
            text(answer, "AskedNode")
        ),
    };
    line(format!("\n{here}"));
    let data = answer.get("Data").unwrap_or(&null);
    let isolated = if data.get("Isolated") == Some(&Value::Bool(true)) {
        "; THIS NODE IS ISOLATED: this is what it last knew"
    } else {
        ""
    };
    line(format!(
        "data of {}: oldest records signed {} s ago, {} intentions, documents {}{isolated}",
        text(answer, "AskedNode"),
        text(data, "OldestRecordsSeconds"),
        text(data, "Intentions"),
        text(data, "DocumentsHash")
    ));
    let change = list(answer, "ToChange");
    if !change.is_empty() {
        line("\nTo let it pass:".to_owned());
        change.iter().filter_map(Value::as_str).for_each(|one| line(format!("  - {one}")));
    }
    out
}
