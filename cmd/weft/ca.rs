//! The offline verbs: the mesh CA, its issuers, join tokens.

use std::path::Path;

use anyhow::Context as _;
use weft::clock;
use weft::config::parse_duration;
use weft::model::{NamePattern, ServeScope, TrustDomain};
use weft::pki::{self, CaDir, OwnRoot, TokenClaims, Utc};

use crate::failure::Failure;

/// `weft ca init`
pub(crate) fn init(dir: &Path, trust_domain: &str) -> Result<(), Failure> {
    let trust_domain: TrustDomain = trust_domain.parse().context("cannot use -trust-domain")?;
    CaDir::init(dir, &trust_domain, clock::wall())?;
    let dir = dir.display();
    println!("Made the CA of {trust_domain} in {dir}.");
    println!("Keep the root key offline. Copy {dir}/issuer-1 to the first node and start it there:");
    println!("  weft agent -node NAME -data-dir DIR -issuer {dir}/issuer-1");
    println!("For each further node make a token:");
    println!("  weft token create -ca {dir} -node NAME -serve SERVICES");
    Ok(())
}

/// `weft ca init -root-cert`
pub(crate) fn init_under(dir: &Path, trust_domain: &str, own: OwnRoot<'_>) -> Result<(), Failure> {
    let trust_domain: TrustDomain = trust_domain.parse().context("cannot use -trust-domain")?;
    let (_, requests) = CaDir::init_under(dir, &trust_domain, own, clock::wall())?;
    let shown = dir.display();
    if requests.is_empty() {
        println!(
            "Made issuer and operator of {trust_domain} in {shown}, under your root {}.",
            own.certificate.display()
        );
        println!("{shown}/root.key is a link to the root's key, for further issuers and rotations; take it offline.");
        println!(
            "Copy {shown}/issuer-1 to the first node: weft agent -node NAME -data-dir DIR -issuer {shown}/issuer-1"
        );
        return Ok(());
    }
    println!("Made keys and signing requests for {trust_domain} in {shown}. Whoever holds the root's key signs:");
    for request in &requests {
        println!("  {request}");
    }
    println!("Then check what came back: weft ca check -ca {shown}");
    Ok(())
}

/// `weft ca check`
pub(crate) fn check(ca: &Path) -> Result<(), Failure> {
    let found = CaDir::open(ca).check(clock::wall())?;
    println!("Trust domain {}, root {} until {}.", found.trust_domain, found.root.key, Utc(found.root.not_after));
    for (name, facts) in &found.good {
        println!("{name} is good until {}.", Utc(facts.not_after));
    }
    if found.waiting.is_empty() {
        return Ok(());
    }
    let commands: Vec<String> = found.waiting.iter().map(ToString::to_string).collect();
    Err(Failure::text(format!("{} certificates are not signed yet", commands.len()))
        .hint(format!("with the root's key: {}", commands.join("; "))))
}

/// `weft ca issuer create`
pub(crate) fn create_issuer(ca: &Path) -> Result<(), Failure> {
    let (issuer, request) = CaDir::open(ca).create_issuer(clock::wall()).map_err(with_ca_hint)?;
    if let Some(request) = request {
        println!("Made a key and a signing request in {}. With the root's key:\n  {request}", issuer.display());
        return Ok(());
    }
    println!("Made {}. Copy it to the node that shall certify newcomers, and start it with -issuer.", issuer.display());
    Ok(())
}

/// `weft token create`
pub(crate) fn create_token(ca: &Path, node: &str, serve: &str, ttl: &str, uses: u32) -> Result<(), Failure> {
    let node: NamePattern = node.parse().context("cannot use -node")?;
    let serve: ServeScope = serve.parse().context("cannot use -serve")?;
    let ttl = parse_duration(ttl).map_err(Failure::text)?;
    if ttl.is_zero() {
        return Err(Failure::text("a token with -ttl 0 is never good").hint("give a time, as -ttl 1h"));
    }
    let id = *uuid::Uuid::new_v4().as_bytes();
    let claims = TokenClaims { id, node, serve, not_after: clock::wall().plus(ttl), uses };
    let token = pki::create_token(ca, &claims).map_err(with_ca_hint)?;
    if let Err(err) = CaDir::open(ca).record_token(&claims, clock::wall()) {
        // The token is good; only `weft token list` will not show it.
        eprintln!("warning: {}", Failure::from(err));
    }
    println!("{token}");
    Ok(())
}

fn with_ca_hint(err: weft::pki::PkiError) -> Failure {
    Failure::from(err).hint("-ca names a directory that `weft ca init -dir DIR -trust-domain DOMAIN` made")
}
