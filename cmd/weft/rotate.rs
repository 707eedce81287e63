//! `weft ca rotate`: a new root, and the end of the old one.

use std::path::Path;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use weft::clock;
use weft::model::TrustDomain;
use weft::pki::{CaDir, DocumentKey, OwnRoot, Revoked, Signatory, SpkiHash, Utc, spki, validity};
use weft::policy::{Content, Document, DocumentId, DocumentKind, DocumentSet, RevocationBody, RootLink, link_name};

use crate::cli::{ClientArgs, SignArgs};
use crate::client::Client;
use crate::failure::Failure;
use crate::revoke::{bring, bring_or_write, certificates, next_version};

/// `weft ca rotate`
pub(crate) fn rotate(ca: &Path, own: Option<OwnRoot<'_>>, sign: &SignArgs) -> Result<(), Failure> {
    let dir = CaDir::open(ca);
    let now = clock::wall();
    let rotation = dir.prepare_rotation(own, now)?;
    let issuers = rotation.issuers.iter().map(|der| der.to_vec()).collect();
    let link = RootLink { root: rotation.root.to_vec(), proof: rotation.proof.clone(), issuers };
    let (begins, ends) = rotation.old.validity()?;
    let content = Content {
        trust_domain: placeholder()?,
        id: DocumentId { kind: DocumentKind::Bundle, name: link_name(rotation.number) },
        // One rotation, one document: a second run of the same one changes nothing.
        version: 1,
        not_before: validity(&rotation.root)?.0.max(begins),
        not_after: ends,
        signer: SpkiHash([0; 32]),
        body: link.to_bytes()?,
    };
    let document = Document::sign(content, &rotation.old)?;
    bring_or_write(&document, sign.out.as_deref(), &sign.client, &format!("Announced root {}", rotation.number))?;
    let kept = dir.commit_rotation()?;
    println!(
        "{} holds the new root, until {}; the old one is in {}.",
        ca.display(),
        Utc(validity(&rotation.root)?.1),
        kept.display()
    );
    println!(
        "Issuers got their new certificates with the document; every node renews under the new root within a minute."
    );
    let others = dir.operators()?.into_iter().map(|operator| operator.name).filter(|name| name.as_str() != "operator");
    for name in others {
        println!(
            "Operator {name} is certified again: send {}/operators/{name}.crt, for `weft ca operator adopt`.",
            ca.display()
        );
    }
    println!(
        "Nodes that are off learn the new root when they come back. When all have renewed: weft ca rotate -finish"
    );
    Ok(())
}

/// `weft ca rotate -finish`
pub(crate) fn finish(ca: &Path, force: bool, sign: &SignArgs) -> Result<(), Failure> {
    let root = DocumentKey::load(ca, Signatory::Root)?;
    let old = CaDir::open(ca).previous_root()?;
    let old = old.ok_or_else(|| Failure::text("this CA has had one root only").hint("run `weft ca rotate` first"))?;
    let newest = root.spki()?.to_string();
    if sign.out.is_none() {
        let under = |shown: &Value| shown.get("Root").and_then(Value::as_str).map(str::to_owned);
        let behind: Vec<String> = certificates(&sign.client)?
            .iter()
            .filter(|shown| under(shown).as_ref() != Some(&newest))
            .filter_map(|shown| shown.get("Node").and_then(Value::as_str).map(str::to_owned))
            .collect();
        if !behind.is_empty() && !force {
            let failure =
                Failure::text(format!("{} nodes publish under the old root: {}", behind.len(), behind.join(", ")));
            return Err(
                failure.hint("wait until they have renewed, or use -force: they must then join again with a token")
            );
        }
    }
    if sign.out.is_none() {
        sign_again(&root, &sign.client)?;
    } else {
        println!("What the old root and its operators signed ends with this document: sign it again first, with");
        println!("`weft export` and `weft import -sign`, or run this verb where an agent can be reached.");
    }
    let key = spki(&old)?;
    let id = DocumentId { kind: DocumentKind::Revocation, name: format!("key.{key}").parse()? };
    let body = RevocationBody { entries: vec![Revoked::Key(key)], reason: sign.reason.clone() };
    let content = Content {
        trust_domain: placeholder()?,
        version: next_version(&id, sign)?,
        id,
        not_before: clock::wall(),
        // As long as anybody could show the old root.
        not_after: validity(&old)?.1.min(root.validity()?.1),
        signer: SpkiHash([0; 32]),
        body: body.to_bytes()?,
    };
    bring_or_write(&Document::sign(content, &root)?, sign.out.as_deref(), &sign.client, "Took the old root back")
}

/// Signs again, with the new root, every document that nobody would believe without the old one.
fn sign_again(root: &DocumentKey, client: &ClientArgs) -> Result<(), Failure> {
    let export = Client::new(client)?.get("/v1/mesh/export")?;
    let list = export.get("Documents").and_then(Value::as_array).cloned().unwrap_or_default();
    let (now, bundle) = (clock::wall(), root.bundle()?);
    for one in list {
        let text = one.get("Document").and_then(Value::as_str).unwrap_or_default();
        let document = Document::from_bytes(&STANDARD.decode(text).context("the agent shows a document badly")?)?;
        let content = document.content();
        let stands = DocumentSet::new(&bundle).offer(document.clone(), now).is_ok();
        if stands || content.id.kind == DocumentKind::Bundle {
            continue;
        }
        let (begins, ends) = root.validity()?;
        let again = Content {
            version: content.version + 1,
            not_before: now.max(begins),
            not_after: content.not_after.min(ends),
            ..content.clone()
        };
        let signer = one.get("Signer").and_then(Value::as_str).unwrap_or_default();
        bring(&Document::sign(again, root)?, client, &format!("Signed again what {signer} had signed"))?;
    }
    Ok(())
}

/// Replaced by the key's own when the document is signed.
fn placeholder() -> Result<TrustDomain, Failure> {
    Ok("unset".parse()?)
}
