//! The verbs that sign for the whole mesh: `revoke`, `ca issuer retire`, `token revoke`, `document`.
//!
//! A document is signed here, with the CA directory, and brought to any one agent; it needs no trust in that agent. Where
//! the CA's host reaches no agent, `-out` writes the document and `weft document apply` brings it later.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use weft::clock::{self, UnixSeconds};
use weft::model::NodeName;
use weft::pki::{CaDir, DocumentKey, Revoked, Signatory, SpkiHash, Utc};
use weft::policy::{Content, Document, DocumentError, DocumentId, DocumentKind, RevocationBody};

use crate::cli::{CaListArgs, ClientArgs, DocumentArgs, Format, ListArgs, RevokeArgs, SignArgs};
use crate::client::Client;
use crate::failure::Failure;
use crate::table;

const DAY: Duration = Duration::from_hours(24);
/// A node's certificate lives 7 days and can be renewed for 30 more with its key.
const NODE_ENTRY_LIFE: Duration = Duration::from_hours(24 * 38);
/// A key of which nothing is known may be an issuer's: a year, and what it signed in its last hour.
const UNKNOWN_ENTRY_LIFE: Duration = Duration::from_hours(24 * (365 + 38));

/// One thing to revoke, with the name of its document and when its entry can end.
#[derive(Debug)]
struct Target {
    name: String,
    entries: Vec<Revoked>,
    ends: UnixSeconds,
    shown: String,
}

/// `weft revoke`
pub(crate) fn revoke(args: &RevokeArgs) -> Result<(), Failure> {
    if args.list {
        return list(&args.sign.client, args.output.format, Some(DocumentKind::Revocation));
    }
    let ca = args.ca.as_deref().ok_or_else(|| {
        Failure::text("revoking needs the CA directory").hint("give -ca DIR, as `weft ca init` made it")
    })?;
    if args.targets.is_empty() {
        return Err(
            Failure::text("nothing to revoke").hint("name a node, a certificate's serial number or an SPKI hash")
        );
    }
    for target in &args.targets {
        let target = resolve(ca, target, &args.sign.client)?;
        let shown = target.shown.clone();
        publish(ca, target, &args.sign, &format!("Revoked {shown}"))?;
    }
    Ok(())
}

/// `weft ca issuer retire`
pub(crate) fn retire_issuer(ca: &Path, name: &str, sign: &SignArgs) -> Result<(), Failure> {
    let issuer = CaDir::open(ca).issuer(name)?;
    let key = issuer.facts.key;
    let target = Target {
        name: format!("issuer.{key}"),
        entries: vec![Revoked::Issuer { key, from: clock::wall() }],
        ends: issuer.facts.not_after.plus(NODE_ENTRY_LIFE),
        shown: name.to_owned(),
    };
    publish(ca, target, sign, &format!("Retired {name}"))?;
    println!("What it signed before stays good until its end (7 days at most); its nodes renew with other issuers.");
    Ok(())
}

/// `weft ca issuer list`
pub(crate) fn list_issuers(args: &CaListArgs) -> Result<(), Failure> {
    let now = clock::wall();
    let known = documents(&args.client).unwrap_or_default();
    let said = |needle: &str| known.iter().any(|document| says(document).iter().any(|text| text.starts_with(needle)));
    let rows: Vec<[String; 4]> = CaDir::open(&args.ca)
        .issuers()?
        .into_iter()
        .map(|issuer| {
            let facts = issuer.facts;
            let state = if said(&format!("key {}", facts.key)) {
                "revoked"
            } else if said(&format!("issuer {}", facts.key)) {
                "retired"
            } else if now > facts.not_after {
                "ended"
            } else {
                "good"
            };
            [issuer.name, state.to_owned(), Utc(facts.not_after).to_string(), facts.key.to_string()]
        })
        .collect();
    table::show(args.output.format, ["Issuer", "State", "Ends", "Key"], &rows);
    Ok(())
}

/// `weft token list`
pub(crate) fn list_tokens(args: &CaListArgs) -> Result<(), Failure> {
    let now = clock::wall();
    let known = documents(&args.client).unwrap_or_default();
    // Without an agent the list is what this directory knows.
    let counted = Client::new(&args.client)?.get("/v1/mesh/tokens").ok();
    let rows: Vec<[String; 6]> = CaDir::open(&args.ca)
        .tokens()?
        .into_iter()
        .map(|record| {
            let claims = record.claims;
            let id = uuid::Uuid::from_bytes(claims.id).to_string();
            let is_revoked = known.iter().any(|document| says(document).contains(&format!("token {id}")));
            let state = match () {
                () if is_revoked => "revoked",
                () if now > claims.not_after => "ended",
                () => "good",
            };
            let used = counted.as_ref().and_then(Value::as_array).map(|list| {
                let of = list.iter().find(|entry| entry.get("ID").and_then(Value::as_str) == Some(&id));
                of.and_then(|entry| entry.get("Uses")).and_then(Value::as_u64).unwrap_or(0)
            });
            let most = if claims.uses == 0 { "any".to_owned() } else { claims.uses.to_string() };
            let used = used.map_or_else(|| "?".to_owned(), |used| used.to_string());
            let (node, serve) = (claims.node.to_string(), claims.serve.to_string());
            [id, state.to_owned(), node, serve, format!("{used} of {most}"), Utc(claims.not_after).to_string()]
        })
        .collect();
    table::show(args.output.format, ["ID", "State", "Node", "Serve", "Used here", "Ends"], &rows);
    Ok(())
}

/// `weft token revoke`
pub(crate) fn revoke_token(ca: &Path, id: &str, sign: &SignArgs) -> Result<(), Failure> {
    let id: uuid::Uuid = id.parse().context("cannot use the token's id; `weft token list` names it")?;
    let made = CaDir::open(ca).tokens()?.into_iter().find(|record| record.claims.id == *id.as_bytes());
    let ends = made.map_or_else(|| clock::wall().plus(UNKNOWN_ENTRY_LIFE), |record| record.claims.not_after.plus(DAY));
    let target = Target {
        name: format!("token.{id}"),
        entries: vec![Revoked::Token(*id.as_bytes())],
        ends: ends.max(clock::wall().plus(DAY)),
        shown: format!("token {id}"),
    };
    publish(ca, target, sign, &format!("Revoked token {id}"))
}

/// `weft document list`
pub(crate) fn list_documents(args: &ListArgs) -> Result<(), Failure> {
    list(&args.client, args.output.format, None)
}

/// `weft document apply`
pub(crate) fn apply_documents(args: &DocumentArgs) -> Result<(), Failure> {
    for path in &args.files {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let bytes = STANDARD.decode(text.trim()).with_context(|| format!("{} holds no document", path.display()))?;
        let document = Document::from_bytes(&bytes).with_context(|| format!("{} holds no document", path.display()))?;
        bring(&document, &args.client, &format!("Applied {}", document.content().id))?;
    }
    Ok(())
}

/// Finds out what `text` names: an issuer of the directory, a key, a serial number, else a node.
fn resolve(ca: &Path, text: &str, client: &ClientArgs) -> Result<Target, Failure> {
    let now = clock::wall();
    if let Ok(key) = text.parse::<SpkiHash>() {
        let ends = now.plus(UNKNOWN_ENTRY_LIFE);
        return Ok(Target {
            name: format!("key.{key}"),
            entries: vec![Revoked::Key(key)],
            ends,
            shown: format!("key {key}"),
        });
    }
    if text.starts_with("issuer-") {
        let issuer = CaDir::open(ca).issuer(text)?;
        let (key, ends) = (issuer.facts.key, issuer.facts.not_after.plus(NODE_ENTRY_LIFE));
        return Ok(Target {
            name: format!("key.{key}"),
            entries: vec![Revoked::Key(key)],
            ends,
            shown: text.to_owned(),
        });
    }
    let serial: String = text.chars().filter(|c| *c != ':').map(|c| c.to_ascii_lowercase()).collect();
    if serial.len() >= 16 && serial.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return by_serial(text, &serial, client);
    }
    let node: NodeName = text.parse().context("cannot use the target: it is no node, serial number or SPKI hash")?;
    // The name and the time are enough; the key that is known is named too, so that it never serves another name.
    let known = certificates(client).unwrap_or_default();
    let key = known.iter().find(|shown| shown.get("Node").and_then(Value::as_str) == Some(text));
    let key = key.and_then(|shown| shown.pointer("/Intermediate/Key")?.as_str()?.parse().ok());
    let mut entries = vec![Revoked::Node { node, until: now }];
    entries.extend(key.map(Revoked::Key));
    Ok(Target { name: format!("node.{text}"), entries, ends: now.plus(NODE_ENTRY_LIFE), shown: format!("node {text}") })
}

fn by_serial(text: &str, serial: &str, client: &ClientArgs) -> Result<Target, Failure> {
    let known = certificates(client)?;
    let found =
        known.iter().flat_map(|shown| ["Intermediate", "Issuer"].map(|role| shown.get(role))).flatten().find(|facts| {
            let own = facts.get("Serial").and_then(Value::as_str).unwrap_or_default();
            own.trim_start_matches('0') == serial.trim_start_matches('0')
        });
    let unknown = || {
        Failure::text(format!("no node publishes under a certificate with the serial number {text}"))
            .hint("revoke the node by its name, or the key by its SPKI hash")
    };
    let facts = found.ok_or_else(unknown)?;
    let key: SpkiHash =
        facts.get("Key").and_then(Value::as_str).and_then(|key| key.parse().ok()).ok_or_else(unknown)?;
    let ends =
        facts.get("NotAfterUnix").and_then(Value::as_u64).map_or(clock::wall(), UnixSeconds).plus(NODE_ENTRY_LIFE);
    let shown = format!("certificate {text}");
    Ok(Target { name: format!("key.{key}"), entries: vec![Revoked::Key(key)], ends, shown })
}

/// Signs a revocation and brings it to the agent, or writes it.
fn publish(ca: &Path, target: Target, sign: &SignArgs, done: &str) -> Result<(), Failure> {
    let body = RevocationBody { entries: target.entries, reason: sign.reason.clone() };
    let id = DocumentId { kind: DocumentKind::Revocation, name: target.name.parse()? };
    let content = Content {
        version: next_version(&id, sign)?,
        id,
        not_before: clock::wall(),
        not_after: target.ends,
        body: body.to_bytes()?,
        // Both are the key's to say.
        trust_domain: "unset".parse().context("a fixed name")?,
        signer: SpkiHash([0; 32]),
    };
    bring_or_write(&sign_with(ca, content)?, sign.out.as_deref(), &sign.client, done)
}

/// As [`publish`], signed by the root alone: what only it can take back.
pub(crate) fn publish_by_root(
    ca: &Path,
    name: &str,
    entries: Vec<Revoked>,
    ends: UnixSeconds,
    sign: &SignArgs,
    done: &str,
) -> Result<(), Failure> {
    let root = DocumentKey::load(ca, Signatory::Root).map_err(|err| {
        Failure::from(err).hint("an operator is taken back by the root alone: use the directory with root.key")
    })?;
    let id = DocumentId { kind: DocumentKind::Revocation, name: name.parse()? };
    let content = Content {
        version: next_version(&id, sign)?,
        id,
        not_before: clock::wall(),
        not_after: ends.min(root.validity()?.1),
        body: RevocationBody { entries, reason: sign.reason.clone() }.to_bytes()?,
        // Both are the key's to say.
        trust_domain: "unset".parse().context("a fixed name")?,
        signer: SpkiHash([0; 32]),
    };
    bring_or_write(&Document::sign(content, &root)?, sign.out.as_deref(), &sign.client, done)
}

/// Brings a document to the agent, or writes it to the file of `-out`.
pub(crate) fn bring_or_write(
    document: &Document,
    out: Option<&Path>,
    client: &ClientArgs,
    done: &str,
) -> Result<(), Failure> {
    let Some(path) = out else { return bring(document, client, done) };
    let text = STANDARD.encode(document.to_bytes()) + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("Wrote {}. Bring it to any agent: weft document apply {}", path.display(), path.display());
    Ok(())
}

/// Signs with the operator's key, and with the root's where the operator's certificate ends too early or is not there.
fn sign_with(ca: &Path, content: Content) -> Result<Document, Failure> {
    let hint = "-ca names a directory that `weft ca init -dir DIR -trust-domain DOMAIN` made";
    let operator = DocumentKey::load(ca, Signatory::Operator);
    let signed = operator.map(|key| Document::sign(content.clone(), &key));
    match signed {
        Ok(Ok(document)) => Ok(document),
        Ok(Err(error @ DocumentError::OutlivesSigner { .. })) => match DocumentKey::load(ca, Signatory::Root) {
            Ok(root) => Ok(Document::sign(content, &root)?),
            Err(_) => Err(Failure::from(error)),
        },
        Ok(Err(error)) => Err(error.into()),
        Err(error) => match DocumentKey::load(ca, Signatory::Root) {
            Ok(root) => Ok(Document::sign(content, &root)?),
            Err(_) => Err(Failure::from(error).hint(hint)),
        },
    }
}

/// One more than the version that the mesh holds; 1 if it holds none, or no agent is asked.
pub(crate) fn next_version(id: &DocumentId, sign: &SignArgs) -> Result<u64, Failure> {
    if sign.out.is_some() {
        return Ok(sign.document_version.unwrap_or(1));
    }
    let is_same = |document: &&Value| {
        let field = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
        field("Kind") == id.kind.to_string() && field("Name") == id.name.as_str()
    };
    let held = documents(&sign.client)?;
    let version = held.iter().find(is_same).and_then(|document| document.get("Version")?.as_u64());
    Ok(sign.document_version.unwrap_or(version.unwrap_or(0) + 1))
}

/// Brings a document to the agent and says how far it has spread.
#[expect(clippy::disallowed_methods, reason = "tells people how long it took")]
pub(crate) fn bring(document: &Document, client: &ClientArgs, done: &str) -> Result<(), Failure> {
    let begun = std::time::Instant::now();
    let body = json!({ "Document": STANDARD.encode(document.to_bytes()) });
    let answer = Client::new(client)?.put_for("/v1/mesh/document", &body)?;
    let took = begun.elapsed();
    let number = |key: &str| answer.get(key).and_then(Value::as_u64).unwrap_or(0);
    let (confirmed, alive) = (number("Confirmed"), number("Alive"));
    println!(
        "{done}: {confirmed} of {alive} other members confirmed in {:.2} s. Document {} version {}, until {}.",
        took.as_secs_f64(),
        document.content().id,
        document.content().version,
        Utc(document.content().not_after)
    );
    if confirmed < alive {
        println!("The others learn it from any member within seconds of answering again.");
    }
    Ok(())
}

pub(crate) fn documents(client: &ClientArgs) -> Result<Vec<Value>, Failure> {
    let answer = Client::new(client)?.get("/v1/mesh/documents")?;
    Ok(answer.get("Documents").and_then(Value::as_array).cloned().unwrap_or_default())
}

pub(crate) fn certificates(client: &ClientArgs) -> Result<Vec<Value>, Failure> {
    let answer = Client::new(client)?.get("/v1/mesh/certificates")?;
    Ok(answer.as_array().cloned().unwrap_or_default())
}

pub(crate) fn says(document: &Value) -> Vec<String> {
    let says = document.get("Says").and_then(Value::as_array);
    says.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn list(client: &ClientArgs, format: Format, kind: Option<DocumentKind>) -> Result<(), Failure> {
    let kind = kind.map(|kind| kind.to_string());
    let field = |document: &Value, key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut held = documents(client)?;
    held.retain(|document| kind.as_ref().is_none_or(|kind| field(document, "Kind") == *kind));
    if format == Format::Json {
        println!("{:#}", Value::from(held));
        return Ok(());
    }
    let row = |document: &Value| {
        let version = document.get("Version").map(ToString::to_string).unwrap_or_default();
        let fork = document.get("Fork").and_then(Value::as_bool).unwrap_or(false);
        let version = if fork { format!("{version} FORK") } else { version };
        let says = says(document).join(", ");
        [
            field(document, "Kind"),
            version,
            field(document, "Signer"),
            field(document, "NotAfter"),
            says,
            field(document, "Reason"),
        ]
    };
    let rows: Vec<[String; 6]> = held.iter().map(row).collect();
    print!("{}", table::render(["Kind", "Version", "Signed by", "Until", "What", "Reason"], &rows));
    Ok(())
}
