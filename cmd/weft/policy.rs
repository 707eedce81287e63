//! The verbs about policy: `ca operator`, `intention`, `config`, `export`, `import`.
//!
//! Policy is signed here, with the operator's file of `-operator` or `WEFT_OPERATOR`, and brought to any one agent. Without
//! one the agent is asked to sign, which it does if it has `policy_authority` set.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use weft::authz::{self, Party};
use weft::clock::{self, UnixSeconds};
use weft::config::{parse_duration, read_document_or_input};
use weft::model::{NodeName, OperatorScope};
use weft::pki::{CaDir, DocumentKey, Revoked, Utc};
use weft::policy::{Document, DocumentId, Draft, INERT_KINDS};

use crate::cli::{
    CaListArgs, CheckArgs, ClientArgs, CompareArgs, ConfigDeleteArgs, ConfigListArgs, ConfigReadArgs, ConfigWriteArgs,
    CreateArgs, EndsArgs, ExportArgs, Format, GetArgs, ImportArgs, ListArgs, MatchArgs, OperatorAdoptArgs,
    OperatorCreateArgs, OperatorRenewArgs, OperatorRevokeArgs, SignerArgs,
};
use crate::client::{Client, segment};
use crate::failure::Failure;
use crate::revoke::{self, bring, bring_or_write, documents};
use crate::table;

/// The kind of entry that is intentions.
const INTENTIONS: &str = "service-intentions";
/// What to do about an entry that another has written.
const DECIDE_ANEW: &str = "read it again (`weft config read`) and decide anew";

/// `weft ca operator create`
pub(crate) fn create_operator(args: &OperatorCreateArgs) -> Result<(), Failure> {
    let name: NodeName = args.name.parse().context("cannot use -name")?;
    let may: OperatorScope = args.may.parse().context("cannot use -may")?;
    let life = parse_duration(&args.ttl).map_err(Failure::text)?;
    let made = CaDir::open(&args.ca).create_operator(&name, &may, life, &args.out, clock::wall());
    let ends = made.map_err(|err| {
        Failure::from(err).hint("-ca names a directory that `weft ca init` made, with its root.key; -out a new file")
    })?;
    println!("Made operator {name}, who may sign {may} until {}.", Utc(ends));
    println!("{} holds its key: keep it where the operator works, and use it with", args.out.display());
    println!("  export WEFT_OPERATOR={}", args.out.display());
    Ok(())
}

/// `weft ca operator list`
pub(crate) fn list_operators(args: &CaListArgs) -> Result<(), Failure> {
    let now = clock::wall();
    let known = documents(&args.client).unwrap_or_default();
    let rows: Vec<[String; 5]> = CaDir::open(&args.ca)
        .operators()?
        .into_iter()
        .map(|operator| {
            let key = operator.facts.key.to_string();
            let is_revoked = known.iter().any(|one| revoke::says(one).contains(&format!("key {key}")));
            let state = match () {
                () if is_revoked => "revoked",
                () if now > operator.facts.not_after => "ended",
                () => "good",
            };
            let ends = Utc(operator.facts.not_after).to_string();
            [operator.name.to_string(), state.to_owned(), operator.may.to_string(), ends, key]
        })
        .collect();
    table::show(args.output.format, ["Operator", "State", "May sign", "Ends", "Key"], &rows);
    Ok(())
}

/// `weft ca operator revoke`
pub(crate) fn revoke_operator(args: &OperatorRevokeArgs) -> Result<(), Failure> {
    let operators = CaDir::open(&args.ca).operators()?;
    let found = operators.into_iter().find(|operator| operator.name.as_str() == args.name);
    let unknown = || {
        Failure::text(format!("{} has no operator `{}`", args.ca.display(), args.name))
            .hint(format!("weft ca operator list -ca {} names them", args.ca.display()))
    };
    let facts = found.ok_or_else(unknown)?.facts;
    let entries = vec![Revoked::Key(facts.key)];
    let ends = facts.not_after.plus(std::time::Duration::from_hours(24));
    let name = format!("key.{}", facts.key);
    revoke::publish_by_root(&args.ca, &name, entries, ends, &args.sign, &format!("Revoked operator {}", args.name))?;
    println!("Everything that it signed is void on every node: write anew what shall stay.");
    Ok(())
}

/// `weft ca operator renew`
pub(crate) fn renew_operator(args: &OperatorRenewArgs) -> Result<(), Failure> {
    let name: NodeName = args.name.parse().context("cannot use the operator's name")?;
    let life = parse_duration(&args.ttl).map_err(Failure::text)?;
    let renewed = CaDir::open(&args.ca).renew_operator(&name, life, clock::wall());
    let (file, ends) = renewed.map_err(|err| {
        Failure::from(err).hint(format!("weft ca operator list -ca {} names them", args.ca.display()))
    })?;
    println!("Certified operator {name} again, until {}.", Utc(ends));
    println!("Where its file is: weft ca operator adopt {} -operator FILE", file.display());
    Ok(())
}

/// `weft ca operator adopt`
pub(crate) fn adopt_certificate(args: &OperatorAdoptArgs) -> Result<(), Failure> {
    let path = &args.certificate;
    let pem = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let entry = weft::pki::adopt_certificate(&args.operator, &pem).map_err(|err| {
        Failure::from(err).hint(format!("{} must certify the key in {}", path.display(), args.operator.display()))
    })?;
    let ends = Utc(entry.facts.not_after);
    println!(
        "{} is certified until {ends}: operator {}, who may sign {}.",
        args.operator.display(),
        entry.name,
        entry.may
    );
    Ok(())
}

/// `weft intention create`
pub(crate) fn create_intention(args: &CreateArgs) -> Result<(), Failure> {
    let mut fields = Map::new();
    if let Some(path) = &args.file {
        fields.extend(read_document_or_input(path).map_err(|problems| weft::config::ConfigError { problems })?.root);
    }
    for (key, text) in [("SourceName", &args.source), ("DestinationName", &args.destination)] {
        if let Some(text) = text {
            fields.retain(|own, _| !own.replace('_', "").eq_ignore_ascii_case(key));
            fields.insert(key.to_owned(), json!(text));
        }
    }
    let action = if args.deny { Some("deny") } else { args.allow.then_some("allow") };
    let has_rule = |fields: &Map<String, Value>| {
        fields.keys().any(|key| ["action", "permissions"].contains(&key.to_ascii_lowercase().as_str()))
    };
    if let Some(action) = action.or((!has_rule(&fields)).then_some("allow")) {
        fields.insert("Action".to_owned(), json!(action));
    }
    if args.audit {
        fields.insert("Audit".to_owned(), json!(true));
    }
    if let Some(text) = &args.description {
        fields.insert("Description".to_owned(), json!(text));
    }
    if !args.meta.is_empty() {
        let pair = |pair: &String| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key.to_owned(), json!(value))
        };
        fields.insert("Meta".to_owned(), Value::Object(args.meta.iter().map(pair).collect()));
    }
    let intention = authz::from_json(&Value::Object(fields), None).context("cannot use the intention")?;
    let shape = authz::to_json(&intention, 0);
    let (source, destination) = (intention.source.clone(), intention.destination.clone());
    let draft = Draft::intention(intention)?;
    if !args.replace
        && args.signer.out.is_none()
        && held(draft.id(), &args.signer.client)?.is_some_and(|held| held.says)
    {
        return Err(Failure::text(format!("there is an intention {source} -> {destination} already"))
            .hint("give -replace to write a new version of it"));
    }
    let path = exact(&source, &destination);
    write(draft, &args.signer, &format!("Wrote intention {source} -> {destination}"), |client| {
        client.put(&path, Some(&shape))
    })
}

/// `weft intention delete`
pub(crate) fn delete_intention(args: &EndsArgs) -> Result<(), Failure> {
    let (source, destination) = ends(&args.source, &args.destination)?;
    let draft = Draft::no_intention(&source, &destination)?;
    let is_there = args.signer.out.is_some() || held(draft.id(), &args.signer.client)?.is_some_and(|held| held.says);
    if !is_there {
        return Err(Failure::text(format!("there is no intention {source} -> {destination}"))
            .hint("`weft intention list` shows all"));
    }
    let path = exact(&source, &destination);
    write(draft, &args.signer, &format!("Deleted intention {source} -> {destination}"), |client| client.delete(&path))
}

/// `weft intention get`
pub(crate) fn get_intention(args: &GetArgs) -> Result<(), Failure> {
    let args = &args.ends;
    let (source, destination) = ends(&args.source, &args.destination)?;
    println!("{:#}", Client::new(&args.signer.client)?.get(&exact(&source, &destination))?);
    Ok(())
}

/// `weft intention list`
pub(crate) fn list_intentions(args: &ListArgs) -> Result<(), Failure> {
    let list = Client::new(&args.client)?.get("/v1/connect/intentions")?;
    show_intentions(&list, args.output.format, &args.client);
    Ok(())
}

/// `weft intention match`
pub(crate) fn match_intentions(args: &MatchArgs) -> Result<(), Failure> {
    let by = if args.source { "source" } else { "destination" };
    let path = format!("/v1/connect/intentions/match?by={by}&name={}", segment(&args.name));
    let answer = Client::new(&args.client)?.get(&path)?;
    show_intentions(answer.get(&args.name).unwrap_or(&Value::Null), args.output.format, &args.client);
    Ok(())
}

fn show_intentions(list: &Value, format: Format, client: &ClientArgs) {
    if format == Format::Json {
        return println!("{list:#}");
    }
    // Consul's shape has no end; the documents do.
    let mut held = documents(client).unwrap_or_default();
    held.retain(|one| field(one, "Kind") == "intention");
    let text = |one: &Value, key: &str| one.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let row = |one: &Value| {
        let permissions = one.get("Permissions").and_then(Value::as_array).filter(|list| !list.is_empty());
        let permissions = permissions.map(|list| format!("{} permissions", list.len()));
        let audit = if one.get("Audit").and_then(Value::as_bool) == Some(true) { " (audit)" } else { "" };
        let says = permissions.unwrap_or_else(|| text(one, "Action")) + audit;
        let number = |key: &str| one.get(key).map(ToString::to_string).unwrap_or_default();
        [
            text(one, "SourceName"),
            text(one, "DestinationName"),
            says,
            number("Precedence"),
            number("ModifyIndex"),
            until(&held, &format!("{}:{}", text(one, "SourceName"), text(one, "DestinationName"))),
            text(one, "Description"),
        ]
    };
    let rows: Vec<[String; 7]> = list.as_array().into_iter().flatten().map(row).collect();
    let header = ["Source", "Destination", "Action", "Precedence", "Version", "Until", "Description"];
    print!("{}", table::render(header, &rows));
    warn_of_ends(&held);
}

fn field(one: &Value, key: &str) -> String {
    one.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn ends_soon(one: &Value) -> bool {
    one.get("EndsSoon").and_then(Value::as_bool) == Some(true)
}

/// When a document ends, marked if that is soon.
fn until(held: &[Value], name: &str) -> String {
    let found = held.iter().find(|one| field(one, "Name") == name);
    let mark = if found.is_some_and(ends_soon) { " ENDS SOON" } else { "" };
    found.map(|one| field(one, "NotAfter")).unwrap_or_default() + mark
}

/// Says once for each operator whose documents end soon what to do about it.
fn warn_of_ends(held: &[Value]) {
    let mut operators: BTreeMap<(String, String), (usize, String)> = BTreeMap::new();
    for one in held.iter().filter(|one| ends_soon(one)) {
        let ends = field(one, "NotAfter");
        let known = operators.entry((field(one, "Signer"), field(one, "SignerKey"))).or_insert((0, ends.clone()));
        *known = (known.0 + 1, known.1.clone().min(ends));
    }
    for ((operator, _), (count, ends)) in operators {
        eprintln!(
            "warning: {count} of these end with the certificate of operator {operator}, the first at {ends}: certify it again \
             (`weft ca operator renew {operator}`, `weft ca operator adopt`), then `weft export -out FILE` and `weft import -sign FILE`"
        );
    }
}

/// `weft intention check`: 0 allowed, 2 denied, 1 failed.
pub(crate) fn check_intention(args: &CheckArgs) -> ExitCode {
    let asked = || -> Result<bool, Failure> {
        let path = format!("/v1/connect/intentions/check?{}", args.query());
        let answer = Client::new(&args.client)?.get(&path)?;
        let rule = answer.get("Rule").and_then(Value::as_str).unwrap_or_default();
        let is_allowed = answer.get("Allowed").and_then(Value::as_bool).unwrap_or(false);
        println!("{} (by {rule})", if is_allowed { "Allowed" } else { "Denied" });
        Ok(is_allowed)
    };
    match asked() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// `weft config write`
pub(crate) fn write_config(args: &ConfigWriteArgs) -> Result<(), Failure> {
    let root = read_document_or_input(&args.file).map_err(|problems| weft::config::ConfigError { problems })?.root;
    let entry = Value::Object(root);
    if text_of(&entry, "Kind") == Some(INTENTIONS) && args.signer.out.is_none() && key(&args.signer)?.is_none() {
        return write_intentions(&entry, args);
    }
    let draft = Draft::entry(entry.to_string())?;
    fits(&draft, Some(&entry), &args.signer)?;
    let done = format!("Wrote {}", draft.id());
    let cas = compared(&draft, &args.compare, &args.signer.client)?;
    let kind = draft.id().name.as_str().split_once(':').map(|(kind, _)| kind.to_owned());
    write(draft, &args.signer, &done, |client| is_done(&client.put_for(&format!("/v1/config{cas}"), &entry)?))?;
    if let Some(kind) = kind.filter(|kind| INERT_KINDS.contains(&kind.as_str())) {
        eprintln!(
            "warning: the entry is kept and shown, and has no effect: nothing in weft acts on the kind {kind}; api/gateways.md says \
             what stands in its place"
        );
    }
    Ok(())
}

/// Has the agent write the intentions of a service as one entry: what it differs in is a document for each source.
fn write_intentions(entry: &Value, args: &ConfigWriteArgs) -> Result<(), Failure> {
    let cas = args.compare.version()?.map_or_else(String::new, |version| format!("?cas={version}"));
    is_done(&Client::new(&args.signer.client)?.put_for(&format!("/v1/config{cas}"), entry)?)?;
    println!("Wrote config/{INTENTIONS}:{}; the agent signed it.", text_of(entry, "Name").unwrap_or_default());
    Ok(())
}

/// Returns a text of an entry, whose keys come in any case.
fn text_of<'v>(entry: &'v Value, wanted: &str) -> Option<&'v str> {
    let mut fields = entry.as_object()?.iter();
    fields.find(|(key, _)| key.eq_ignore_ascii_case(wanted))?.1.as_str()
}

/// Checks that an entry has the version that its change was decided about; returns what asks the agent to check it as well.
fn compared(draft: &Draft, compare: &CompareArgs, client: &ClientArgs) -> Result<String, Failure> {
    let Some(version) = compare.version()? else { return Ok(String::new()) };
    let shown = held(draft.id(), client)?.filter(|held| held.says).map_or(0, |held| held.version);
    if shown != version {
        return Err(Failure::text(format!("{} has version {shown}, not {version}", draft.id())).hint(DECIDE_ANEW));
    }
    Ok(format!("?cas={version}"))
}

/// Reads what the agent says of a change: `false` where the entry had another version by then.
fn is_done(answer: &Value) -> Result<(), Failure> {
    if *answer == Value::Bool(false) {
        return Err(Failure::text("the entry was changed meanwhile, and nothing was written").hint(DECIDE_ANEW));
    }
    Ok(())
}

/// Holds an entry that is to be written, or deleted, against itself and the entries that the mesh has.
fn fits(draft: &Draft, value: Option<&Value>, signer: &SignerArgs) -> Result<(), Failure> {
    let own = draft.id().name.as_str();
    let Some((kind, name)) = own.split_once(':') else { return Ok(()) };
    if signer.out.is_some() {
        // Without an agent to ask, by itself alone.
        let ready = value.map(|value| weft::traffic::Ready::new(kind, value)).transpose();
        return ready.map(drop).map_err(|problems| refused(own, &problems));
    }
    let held = Client::new(&signer.client)?.get("/v1/mesh/export")?;
    let others = held.get("Documents").and_then(Value::as_array).into_iter().flatten().filter_map(|one| {
        let text = |key: &str| one.get(key).and_then(Value::as_str);
        let (kind, name) = text("Name")?.split_once(':')?;
        let body = one.get("Body").filter(|body| text("Kind") == Some("config") && body.is_object())?;
        Some((kind, name, body))
    });
    weft::traffic::check_write(others, (kind, name, value)).map_err(|problems| refused(own, &problems))
}

/// One line per problem.
fn refused(name: &str, problems: &weft::traffic::Problems) -> Failure {
    let lines: Vec<String> = problems.0.iter().map(|problem| format!("  {problem}")).collect();
    Failure::text(format!("{name} is refused:\n{}", lines.join("\n")))
}

/// `weft config delete`
pub(crate) fn delete_config(args: &ConfigDeleteArgs) -> Result<(), Failure> {
    let draft = Draft::no_entry(&args.kind, &args.name)?;
    fits(&draft, None, &args.signer)?;
    let done = format!("Deleted {}", draft.id());
    let path = format!("/v1/config/{}/{}", segment(&args.kind), segment(&args.name));
    if args.signer.out.is_none() {
        // A name that was mistyped is told, not signed away.
        Client::new(&args.signer.client)?.get(&path)?;
    }
    let cas = compared(&draft, &args.compare, &args.signer.client)?;
    write(draft, &args.signer, &done, |client| is_done(&client.delete_for(&format!("{path}{cas}"))?))
}

/// `weft config read`
pub(crate) fn read_config(args: &ConfigReadArgs) -> Result<(), Failure> {
    let path = format!("/v1/config/{}/{}", segment(&args.kind), segment(&args.name));
    println!("{:#}", Client::new(&args.client)?.get(&path)?);
    Ok(())
}

/// `weft config list`: names and versions, and whether two contents of a version were signed. What was deleted is listed only
/// where that is so: somebody may think that it is there.
pub(crate) fn list_config(args: &ConfigListArgs) -> Result<(), Failure> {
    let mut held = documents(&args.client)?;
    let is = |one: &Value, what: &str| one.get(what).and_then(Value::as_bool) == Some(true);
    held.retain(|one| ["config", "intention"].contains(&field(one, "Kind").as_str()));
    held.retain(|one| !is(one, "Deleted") || is(one, "Fork"));
    let wanted = |one: &Value| {
        let own = if field(one, "Kind") == "config" { field(one, "Name") } else { "service-intentions:".to_owned() };
        args.kind.as_ref().is_none_or(|kind| own.split(':').next() == Some(kind))
    };
    held.retain(wanted);
    if args.output.format == Format::Json {
        println!("{:#}", Value::from(held));
        return Ok(());
    }
    let row = |one: &Value| {
        let fork = if is(one, "Fork") { " FORK" } else { "" };
        let version = one.get("Version").map(ToString::to_string).unwrap_or_default() + fork;
        [
            field(one, "Kind"),
            field(one, "Name"),
            version,
            field(one, "Signer"),
            until(std::slice::from_ref(one), &field(one, "Name")),
            revoke::says(one).join(", "),
        ]
    };
    let rows: Vec<[String; 6]> = held.iter().map(row).collect();
    print!("{}", table::render(["Kind", "Name", "Version", "Signed by", "Until", "What"], &rows));
    warn_of_ends(&held);
    for one in held.iter().filter(|one| is(one, "Fork")) {
        eprintln!(
            "warning: two contents of {} were signed as one version; every node holds the same one of them. Write it anew, \
             and ask whether an operator's key is in two hands",
            field(one, "Name")
        );
    }
    Ok(())
}

/// `weft export`
pub(crate) fn export(args: &ExportArgs) -> Result<(), Failure> {
    let text = format!("{:#}\n", Client::new(&args.client)?.get("/v1/mesh/export")?);
    match &args.out {
        Some(path) => std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?,
        None => print!("{text}"),
    }
    Ok(())
}

/// `weft import`: brings every document as it was signed, or signs policy anew.
pub(crate) fn import(args: &ImportArgs) -> Result<(), Failure> {
    let text = std::fs::read_to_string(&args.file).with_context(|| format!("cannot read {}", args.file.display()))?;
    let backup: Value = serde_json::from_str(&text)
        .with_context(|| format!("{} is no backup; `weft export` makes one", args.file.display()))?;
    let list = backup.get("Documents").and_then(Value::as_array);
    let list = list.ok_or_else(|| Failure::text(format!("{} holds no Documents", args.file.display())))?;
    let (mut done, mut failed) = (0, 0);
    for one in list {
        let name = ["Kind", "Name"].map(|key| one.get(key).and_then(Value::as_str).unwrap_or_default()).join("/");
        let result = if args.sign { sign_anew(one, args) } else { bring_again(one, &args.signer.client) };
        match result {
            Ok(outcome) => {
                done += 1;
                println!("{name}: {outcome}");
            }
            Err(failure) => {
                failed += 1;
                eprintln!("{name}: {failure}");
            }
        }
    }
    println!("{done} documents brought, {failed} refused.");
    if failed == 0 { Ok(()) } else { Err(Failure::text(format!("{failed} documents were refused"))) }
}

fn bring_again(one: &Value, client: &ClientArgs) -> Result<String, Failure> {
    let text = one.get("Document").and_then(Value::as_str).unwrap_or_default();
    Document::from_bytes(&STANDARD.decode(text).context("the document is no base64")?)?;
    let answer = Client::new(client)?.put_for("/v1/mesh/document", &json!({"Document": text}))?;
    Ok(answer.get("Outcome").and_then(Value::as_str).unwrap_or("brought").to_owned())
}

fn sign_anew(one: &Value, args: &ImportArgs) -> Result<String, Failure> {
    let body = one.get("Body").unwrap_or(&Value::Null);
    let draft = match (one.get("Kind").and_then(Value::as_str), body) {
        (Some("intention"), Value::Object(_)) => Draft::intention(authz::from_json(body, None)?)?,
        (Some("config"), Value::Object(_)) => Draft::entry(body.to_string())?,
        _ => return Ok("left out: neither an intention nor a config entry".to_owned()),
    };
    let key = key(&args.signer)?.ok_or_else(no_operator)?;
    let held = held(draft.id(), &args.signer.client)?;
    let document = draft.sign(
        held.as_ref().map_or(0, |held| held.version) + 1,
        held.map(|held| held.ends),
        &key,
        clock::wall(),
    )?;
    let version = document.content().version;
    let text = STANDARD.encode(document.to_bytes());
    Client::new(&args.signer.client)?.put_for("/v1/mesh/document", &json!({"Document": text}))?;
    Ok(format!("signed as version {version}"))
}

fn no_operator() -> Failure {
    Failure::text("signing needs an operator's file")
        .hint("set WEFT_OPERATOR or give -operator FILE, as `weft ca operator create` made it")
}

/// What the agent holds of a document.
struct Held {
    version: u64,
    ends: UnixSeconds,
    /// Whether it is not deleted.
    says: bool,
}

fn held(id: &DocumentId, client: &ClientArgs) -> Result<Option<Held>, Failure> {
    let is_same = |one: &&Value| {
        let field = |key: &str| one.get(key).and_then(Value::as_str).unwrap_or_default();
        field("Kind") == id.kind.to_string() && field("Name") == id.name.as_str()
    };
    let all = documents(client)?;
    let number = |one: &Value, key: &str| one.get(key).and_then(Value::as_u64).unwrap_or(0);
    Ok(all.iter().find(is_same).map(|one| Held {
        version: number(one, "Version"),
        ends: UnixSeconds(number(one, "NotAfterUnix")),
        says: revoke::says(one) != ["deleted"],
    }))
}

/// Signs with the operator's file, or asks the agent to.
fn write(
    draft: Draft,
    signer: &SignerArgs,
    done: &str,
    by_agent: impl FnOnce(&Client) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let Some(key) = key(signer)? else {
        if signer.out.is_some() {
            return Err(no_operator());
        }
        by_agent(&Client::new(&signer.client)?)?;
        println!("{done}; the agent signed it.");
        return Ok(());
    };
    let held = if signer.out.is_some() { None } else { held(draft.id(), &signer.client)? };
    let next = held.as_ref().map_or(0, |held| held.version) + 1;
    let version = signer.document_version.unwrap_or(next);
    let document = draft.sign(version, held.map(|held| held.ends), &key, clock::wall())?;
    match &signer.out {
        Some(path) => bring_or_write(&document, Some(path), &signer.client, done),
        None => bring(&document, &signer.client, done),
    }
}

fn key(signer: &SignerArgs) -> Result<Option<DocumentKey>, Failure> {
    let load = |path: &Path| {
        DocumentKey::load_operator(path)
            .map_err(|err| Failure::from(err).hint("`weft ca operator create -out FILE` makes an operator's file"))
    };
    signer.operator.as_deref().filter(|path| !path.as_os_str().is_empty()).map(load).transpose()
}

fn ends(source: &str, destination: &str) -> Result<(Party, Party), Failure> {
    Ok((source.parse().context("cannot use the source")?, destination.parse().context("cannot use the destination")?))
}

fn exact(source: &Party, destination: &Party) -> String {
    let (source, destination) = (segment(source.as_str()), segment(destination.as_str()));
    format!("/v1/connect/intentions/exact?source={source}&destination={destination}")
}
