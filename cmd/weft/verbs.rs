//! The verbs that ask or order a running agent, and `validate`.

use std::path::{Path, PathBuf};

use regex::Regex;
use serde_json::{Value, json};
use weft::config::{ConfigError, Host, Inputs, read_document_or_input, validate as validate_config};

use crate::cli::{
    ClientArgs, DeregisterArgs, ForceLeaveArgs, Format, FormatArgs, JoinArgs, ListArgs, MaintArgs, MembersArgs,
    NodesArgs, RegisterArgs, ServicesArgs, ValidateArgs,
};
use crate::client::{Client, segment};
use crate::failure::Failure;
use crate::table;

/// Lists the members; in JSON as Consul shapes them.
pub(crate) fn members(args: &MembersArgs) -> Result<(), Failure> {
    let status = args.status.as_deref().unwrap_or_default();
    let status = Regex::new(status).map_err(|error| Failure::text(format!("-status is no expression: {error}")))?;
    let MembersArgs { detailed, wan, list: args, .. } = args;
    let is_json = args.output.format == Format::Json;
    if is_json || *detailed || *wan {
        let path = if *wan { "/v1/agent/members?wan=1" } else { "/v1/agent/members" };
        let mut members = Client::new(&args.client)?.get(path)?;
        if let Value::Array(members) = &mut members {
            members.retain(|member| status.is_match(consul_status(member)));
        }
        if is_json {
            println!("{members:#}");
        } else {
            print!("{}", table::render(["Node", "Address", "Status", "Tags"], &rows(&members, detailed_row)));
        }
        return Ok(());
    }
    list(args, "/v1/mesh/members", |value| {
        if value.get("Isolated").and_then(Value::as_bool) == Some(true) {
            eprintln!(
                "warning: this node is isolated: no other member answers it. What follows is what it last knew; \
                 look at its network before you believe that the others failed"
            );
        }
        let members = value.get("Members").unwrap_or(&Value::Null);
        let row = |member: &Value| {
            let seconds = member.get("Seconds").and_then(Value::as_u64).unwrap_or_default();
            let [name, address, status] = ["Name", "Address", "Status"].map(|key| text(member, key));
            [name, address, status, rough(seconds), text(member, "Build"), text(member, "Datacenter")]
        };
        let mut rows = rows(members, row);
        rows.retain(|[_, _, own, ..]| status.is_match(own));
        if rows.is_empty() {
            eprintln!("note: no member's status matches; a member is alive, leaving, left or failed");
        }
        table::render(["Node", "Address", "Status", "For", "Build", "DC"], &rows)
    })
}

/// A member in Consul's shape, with all its tags.
fn detailed_row(member: &Value) -> [String; 4] {
    let address = text(member, "Addr");
    let port = member.get("Port").and_then(Value::as_u64).unwrap_or_default();
    let address = if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") };
    [text(member, "Name"), address, consul_status(member).to_owned(), pairs(member, "Tags")]
}

/// The pairs of a map of texts: `dc=dc1,role=node`.
fn pairs(value: &Value, key: &str) -> String {
    let pairs = value.get(key).and_then(Value::as_object).into_iter().flatten();
    let pairs: Vec<String> =
        pairs.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect();
    pairs.join(",")
}

/// The word for the number that Consul's shape has.
fn consul_status(member: &Value) -> &'static str {
    match member.get("Status").and_then(Value::as_u64) {
        Some(1) => "alive",
        Some(2) => "leaving",
        Some(3) => "left",
        Some(4) => "failed",
        _ => "none",
    }
}

/// Writes a time in its largest whole unit: 59s, 3m, 71h, 12d.
fn rough(seconds: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(3 * 86_400, "d"), (2 * 3_600, "h"), (120, "m")];
    let unit = UNITS.iter().find(|(from, _)| seconds >= *from);
    match unit {
        Some((_, "d")) => format!("{}d", seconds / 86_400),
        Some((_, "h")) => format!("{}h", seconds / 3_600),
        Some((_, unit)) => format!("{}{unit}", seconds / 60),
        None => format!("{seconds}s"),
    }
}

pub(crate) fn datacenters(args: &ListArgs) -> Result<(), Failure> {
    list(args, "/v1/catalog/datacenters", |value| {
        rows(value, |name| name.as_str().unwrap_or_default().to_owned() + "\n").concat()
    })
}

pub(crate) fn nodes(args: &NodesArgs) -> Result<(), Failure> {
    let path = match &args.service {
        Some(service) => format!("/v1/catalog/service/{}", segment(service)),
        None => "/v1/catalog/nodes".to_owned(),
    };
    let given = [("dc", &args.datacenter), ("near", &args.near), ("filter", &args.filter)];
    let given = given.iter().filter_map(|(key, value)| Some(format!("{key}={}", segment(value.as_ref()?))));
    list(&args.list, &with_query(&path, meta_of(&args.node_meta).chain(given)), |value| {
        let row =
            |node: &Value| [text(node, "Node"), text(node, "ID"), text(node, "Address"), text(node, "Datacenter")];
        // A node with several instances of the service is one node.
        let mut plain = rows(value, row);
        if args.detailed {
            let meta = if args.service.is_some() { "NodeMeta" } else { "Meta" };
            let more = rows(value, |node| [pairs(node, "TaggedAddresses"), pairs(node, meta)]);
            let joined = plain.into_iter().zip(more);
            let mut rows: Vec<[String; 6]> =
                joined.map(|([node, id, address, dc], [tagged, meta])| [node, id, address, dc, tagged, meta]).collect();
            rows.dedup();
            return table::render(["Node", "ID", "Address", "DC", "TaggedAddresses", "Meta"], &rows);
        }
        plain.dedup();
        table::render(["Node", "ID", "Address", "DC"], &plain)
    })
}

pub(crate) fn services(args: &ServicesArgs) -> Result<(), Failure> {
    let tags = |tags: &Value| rows(tags, |tag| tag.as_str().unwrap_or_default().to_owned()).join(",");
    let datacenter = args.datacenter.iter().map(|name| format!("dc={}", segment(name)));
    if let Some(node) = &args.node {
        // `catalog/node` answers `null` for a node that is not there.
        let path = with_query(&format!("/v1/catalog/node/{}", segment(node)), datacenter);
        return list_or_fail(&args.list, &path, |value| {
            let services = value.get("Services").and_then(Value::as_object).ok_or_else(|| {
                Failure::text(format!("there is no node `{node}`")).hint("`weft catalog nodes` names all")
            })?;
            let none = Value::Null;
            let row = |service: &Value| {
                [text(service, "Service"), text(service, "ID"), tags(service.get("Tags").unwrap_or(&none))]
            };
            let rows: Vec<[String; 3]> = services.values().map(row).collect();
            Ok(table::render(["Service", "ID", "Tags"], &rows))
        });
    }
    list(&args.list, &with_query("/v1/catalog/services", meta_of(&args.node_meta).chain(datacenter)), |value| {
        let row = |(name, its): (&String, &Value)| [name.clone(), tags(its)];
        let services: Vec<[String; 2]> = value.as_object().into_iter().flatten().map(row).collect();
        table::render(["Service", "Tags"], &services)
    })
}

/// Makes `node-meta=key:value` of each `key=value`.
fn meta_of(meta: &[String]) -> impl Iterator<Item = String> {
    meta.iter().map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        format!("node-meta={}:{}", segment(key), segment(value))
    })
}

fn with_query(path: &str, parts: impl Iterator<Item = String>) -> String {
    let parts: Vec<String> = parts.collect();
    if parts.is_empty() { path.to_owned() } else { format!("{path}?{}", parts.join("&")) }
}

pub(crate) fn info(args: &ListArgs) -> Result<(), Failure> {
    list(args, "/v1/mesh/info", |value| {
        let mut shown = String::new();
        for (name, value) in value.as_object().into_iter().flatten() {
            append_section(&mut shown, name, value, 0);
        }
        shown
    })
}

fn append_section(shown: &mut String, name: &str, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            shown.extend([&indent, name, ":\n"]);
            map.iter().for_each(|(name, value)| append_section(shown, name, value, depth + 1));
        }
        Value::String(text) => shown.extend([&indent, name, " = ", text, "\n"]),
        other => shown.extend([&indent, name, " = ", &other.to_string(), "\n"]),
    }
}

pub(crate) fn join(args: &JoinArgs) -> Result<(), Failure> {
    let client = Client::new(&args.client)?;
    for address in &args.addresses {
        client.put(&format!("/v1/agent/join/{}", segment(address)), None)?;
        println!("Joined through {address}.");
    }
    Ok(())
}

pub(crate) fn leave(args: &ClientArgs) -> Result<(), Failure> {
    Client::new(args)?.put("/v1/agent/leave", None)?;
    println!("The agent has left the mesh.");
    Ok(())
}

/// Sets, ends or shows maintenance.
pub(crate) fn maint(args: &MaintArgs) -> Result<(), Failure> {
    let client = Client::new(&args.client)?;
    if !args.enable && !args.disable {
        let checks = client.get("/v1/agent/checks")?;
        let ids = ["_node_maintenance", "_service_maintenance:"];
        let is_on = |check: &&Value| ids.iter().any(|id| text(check, "CheckID").starts_with(id));
        let row = |check: &Value| {
            let (service, notes) = (text(check, "ServiceID"), text(check, "Notes"));
            let (scope, id) = if service.is_empty() { ("node", text(check, "Node")) } else { ("service", service) };
            [scope.to_owned(), id, notes]
        };
        let rows: Vec<[String; 3]> =
            checks.as_object().into_iter().flat_map(|map| map.values()).filter(is_on).map(row).collect();
        table::show(args.output.format, ["Scope", "ID", "Reason"], &rows);
        return Ok(());
    }
    let path = match &args.service {
        Some(id) => format!("/v1/agent/service/maintenance/{}", segment(id)),
        None => "/v1/agent/maintenance".to_owned(),
    };
    let reason = args.reason.as_deref().map(|reason| format!("&reason={}", segment(reason))).unwrap_or_default();
    client.put(&format!("{path}?enable={}{reason}", args.enable), None)?;
    println!("Maintenance is {}.", if args.enable { "on" } else { "off" });
    Ok(())
}

/// Reloads the agent's files; what it says takes a restart goes to standard error.
pub(crate) fn reload(args: &ClientArgs) -> Result<(), Failure> {
    for note in Client::new(args)?.put_text("/v1/agent/reload", None)?.lines() {
        eprintln!("warning: {note}");
    }
    println!("Configuration reload triggered.");
    Ok(())
}

pub(crate) fn force_leave(args: &ForceLeaveArgs) -> Result<(), Failure> {
    let prune = if args.prune { "?prune" } else { "" };
    Client::new(&args.client)?.put(&format!("/v1/agent/force-leave/{}{prune}", segment(&args.node)), None)?;
    println!("{} is {}.", args.node, if args.prune { "forgotten" } else { "taken as left" });
    Ok(())
}

pub(crate) fn version(args: &FormatArgs) {
    let version = env!("CARGO_PKG_VERSION");
    match args.format {
        Format::Pretty => println!("weft {version}"),
        Format::Json => println!("{:#}", json!({ "Version": version })),
    }
}

/// Checks what `weft agent -config-file PATH…` would start with on this host; files may be a part of it.
pub(crate) fn validate(args: &ValidateArgs) -> Result<(), Failure> {
    let inputs = Inputs { paths: args.paths.clone(), ..Inputs::default() };
    let validated = validate_config(&inputs, &Host::read())?;
    for warning in &validated.warnings {
        eprintln!("warning: {warning}");
    }
    if !validated.missing.is_empty() {
        eprintln!("note: these files are a part of a configuration; an agent also needs, from flags or other files:");
        validated.missing.iter().for_each(|missing| eprintln!("  {missing}"));
    }
    if !args.quiet {
        println!("Configuration is valid!");
    }
    Ok(())
}

pub(crate) fn register(args: &RegisterArgs) -> Result<(), Failure> {
    let client = Client::new(&args.client)?;
    // All files are read before the first service is registered: a typing error changes nothing.
    let mut services: Vec<Value> = args.name.iter().map(|name| by_flags(name, args)).collect();
    services.extend(services_of(&args.files)?);
    for service in &services {
        let notes = client.put_text("/v1/agent/service/register", Some(service))?;
        notes.lines().for_each(|note| eprintln!("warning: {note}"));
        println!("Registered service: {}", named(service, "name").unwrap_or_default());
    }
    Ok(())
}

/// Reads the services that files define, and reports every problem of all of them.
fn services_of(files: &[PathBuf]) -> Result<Vec<Value>, Failure> {
    let (mut services, mut problems) = (Vec::new(), Vec::new());
    for file in files {
        match read_document_or_input(file) {
            Ok(document) => services.extend(definitions(file, document.root)?),
            Err(found) => problems.extend(found),
        }
    }
    if problems.is_empty() { Ok(services) } else { Err(ConfigError { problems }.into()) }
}

/// Returns a text of a definition, whose keys come in any case.
fn named<'v>(service: &'v Value, wanted: &str) -> Option<&'v str> {
    let mut fields = service.as_object()?.iter();
    let (_, value) = fields.find(|(key, _)| key.eq_ignore_ascii_case(wanted))?;
    value.as_str().filter(|text| !text.is_empty())
}

/// The service that the flags say.
fn by_flags(name: &str, args: &RegisterArgs) -> Value {
    let mut service = json!({"Name": name});
    let pairs = args.meta.iter().map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let meta: serde_json::Map<String, Value> = pairs.map(|(key, value)| (key.to_owned(), json!(value))).collect();
    let given = [
        ("ID", args.id.as_ref().map(|id| json!(id))),
        ("Kind", args.kind.as_ref().map(|kind| json!(kind))),
        ("Address", args.address.as_ref().map(|address| json!(address))),
        ("Port", args.port.map(|port| json!(port))),
        ("Protocol", args.protocol.as_ref().map(|protocol| json!(protocol))),
        ("Tags", (!args.tag.is_empty()).then(|| json!(args.tag))),
        ("Meta", (!meta.is_empty()).then_some(Value::Object(meta))),
    ];
    if let Some(fields) = service.as_object_mut() {
        fields.extend(given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
    }
    service
}

/// Takes the services of a file: `service{}`, `services[]`, or a bare definition as the HTTP API takes it.
fn definitions(file: &Path, mut root: serde_json::Map<String, Value>) -> Result<Vec<Value>, Failure> {
    if root.contains_key("name") || root.contains_key("Name") {
        return Ok(vec![Value::Object(root)]);
    }
    let mut services = Vec::new();
    for key in ["service", "services"] {
        match root.remove(key) {
            Some(Value::Array(list)) => services.extend(list),
            Some(one) => services.push(one),
            None => {}
        }
    }
    match root.keys().next() {
        Some(key) => Err(Failure::text(format!("{}: {key}: only services can be registered", file.display()))
            .hint("other keys belong into the agent's config")),
        None if services.is_empty() => {
            Err(Failure::text(format!("{}: defines no service", file.display()))
                .hint("write service { name = \"web\" … }"))
        }
        None => Ok(services),
    }
}

pub(crate) fn deregister(args: &DeregisterArgs) -> Result<(), Failure> {
    let client = Client::new(&args.client)?;
    let (files, ids): (Vec<&String>, Vec<&String>) = args.targets.iter().partition(|target| is_file(target));
    let files: Vec<PathBuf> = files.into_iter().map(PathBuf::from).collect();
    let services = services_of(&files)?;
    let defined = services.iter().filter_map(|service| named(service, "id").or_else(|| named(service, "name")));
    for id in args.id.iter().chain(ids).map(String::as_str).chain(defined) {
        client.put(&format!("/v1/agent/service/deregister/{}", segment(id)), None)?;
        println!("Deregistered service: {id}");
    }
    Ok(())
}

/// Tells whether a word is a file's name, as `services register` takes it, and no ID.
fn is_file(word: &str) -> bool {
    word == "-" || Path::new(word).extension().is_some_and(|end| end == "hcl" || end == "json")
}

fn list(args: &ListArgs, path: &str, pretty: impl Fn(&Value) -> String) -> Result<(), Failure> {
    list_or_fail(args, path, |value| Ok(pretty(value)))
}

fn list_or_fail(
    args: &ListArgs,
    path: &str,
    pretty: impl Fn(&Value) -> Result<String, Failure>,
) -> Result<(), Failure> {
    let value = Client::new(&args.client)?.get(path)?;
    // Also for JSON: a failure is one whatever the output looks like.
    let shown = pretty(&value)?;
    match args.output.format {
        Format::Pretty => print!("{shown}"),
        Format::Json => println!("{value:#}"),
    }
    Ok(())
}

fn rows<T>(value: &Value, row: impl Fn(&Value) -> T) -> Vec<T> {
    value.as_array().into_iter().flatten().map(row).collect()
}

fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}
