//! Somebody else's code checks weft's certificates: OpenSSL, strictly, and the SPIFFE client of PyPI; and somebody else's
//! root stands above them.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::Value;

use crate::agent::{Agent, Ca, Spec, loopback_ip, path, weft, weft_ok};
use crate::wait::until;

/// Runs `openssl`; none where it is not installed.
fn openssl(args: &[&str]) -> Option<(bool, String)> {
    let out = Command::new("openssl").args(args).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    Some((out.status.success(), text))
}

#[test]
fn openssl_believes_a_service_s_chain_strictly_and_sees_one_spiffe_id() {
    let ca = Ca::init("lab.test");
    let agent = Agent::start(&Spec::loopback(71, "n1", &["-issuer", path(&ca.issuer()), "-serve", "web"]));
    let roots = agent.get("/v1/agent/connect/ca/roots");
    let leaf = agent.get("/v1/agent/connect/ca/leaf/web");
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let chain = leaf["CertPEM"].as_str().unwrap();
    let end = "-----END CERTIFICATE-----\n";
    let (first, others) = chain.split_at(chain.find(end).unwrap() + end.len());
    let root = file("root.pem", roots["Roots"][0]["RootCert"].as_str().unwrap());
    let (leaf_file, others) = (file("leaf.pem", first), file("others.pem", others));
    let key = file("key.pem", leaf["PrivateKeyPEM"].as_str().unwrap());
    for purpose in ["sslclient", "sslserver"] {
        let args = [
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            path(&root),
            "-untrusted",
            path(&others),
            path(&leaf_file),
        ];
        let Some((is_good, text)) = openssl(&args) else {
            eprintln!("SKIPPED: openssl is not installed");
            return;
        };
        assert!(is_good, "{text}");
    }
    // X509-SVID §2, 4: one URI SAN, no cA, digitalSignature alone of the usages, both extended usages.
    let (_, text) = openssl(&["x509", "-in", path(&leaf_file), "-noout", "-text"]).unwrap();
    assert_eq!(text.matches("URI:").count(), 1, "{text}");
    assert!(text.contains("URI:spiffe://lab.test/svc/web/node/n1") && !text.contains("DNS:"), "{text}");
    assert!(text.contains("CA:FALSE") && text.contains("Digital Signature\n"), "{text}");
    assert!(!text.contains("Certificate Sign") && text.contains("TLS Web Server Authentication"), "{text}");
    // The key is the certificate's.
    let public = |args: &[&str]| openssl(args).unwrap().1;
    let of_leaf = public(&["x509", "-in", path(&leaf_file), "-noout", "-pubkey"]);
    assert_eq!(of_leaf, public(&["pkey", "-in", path(&key), "-pubout"]));
    // Another mesh's root does not lead there.
    let other = Ca::init("lab.test").dir().join("root.crt");
    let (is_good, text) =
        openssl(&["verify", "-CAfile", path(&other), "-untrusted", path(&others), path(&leaf_file)]).unwrap();
    assert!(!is_good, "{text}");
}

/// A Python that has the PyPI package `spiffe`: .ci/run makes one beside the build. None where there is none.
#[track_caller]
fn spiffe_python() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().map(|target| target.join("spiffe/bin/python3"));
    let named = std::env::var_os("WEFT_SPIFFE_PYTHON").map(PathBuf::from);
    let is_able = |python: &PathBuf| {
        let out = Command::new(python).args(["-c", "import spiffe"]).output();
        out.is_ok_and(|out| out.status.success())
    };
    let found = named.into_iter().chain(beside).chain([PathBuf::from("python3")]).find(is_able);
    if found.is_none() {
        assert!(
            std::env::var_os("WEFT_REQUIRE_SPIFFE").is_none(),
            "WEFT_REQUIRE_SPIFFE is set and no Python has spiffe"
        );
        eprintln!("SKIPPED: no Python with the package spiffe; name one by WEFT_SPIFFE_PYTHON");
    }
    found
}

/// A running SPIFFE client, and what it has told.
struct SpiffeClient {
    child: std::process::Child,
    told: Arc<Mutex<Vec<Value>>>,
    log: String,
}

impl SpiffeClient {
    fn start(python: &Path, socket: &Path, uid: Option<u32>) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/spiffe_client.py");
        let mut command = Command::new(python);
        command.arg(&script).arg(socket).stdin(Stdio::null()).stdout(Stdio::piped());
        command.args(uid.map(|uid| uid.to_string()));
        let mut child = command.spawn().unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let (lines, kept) = (BufReader::new(child.stdout.take().unwrap()).lines(), Arc::clone(&told));
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                kept.lock().unwrap().push(serde_json::from_str(&line).unwrap_or(Value::String(line)));
            }
        });
        Self { child, told, log: format!("{}", socket.display()) }
    }

    /// Waits until it has told something that `wanted` accepts, and returns that.
    #[track_caller]
    fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        until(&format!("the client at {} tells {what}", self.log), || {
            let told = self.told.lock().unwrap();
            told.iter().rev().find(|told| wanted(told)).cloned().ok_or_else(|| format!("{told:?}"))
        })
    }
}

impl Drop for SpiffeClient {
    fn drop(&mut self) {
        let _already_ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[test]
fn an_unmodified_spiffe_client_fetches_svids_and_bundles_and_hears_of_a_rotation() {
    let Some(python) = spiffe_python() else { return };
    let ca = Ca::init("lab.test");
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("workload.sock");
    let issuer = ca.issuer();
    let args = ["-issuer", path(&issuer), "-workload-socket", path(&socket)];
    let agent = Agent::start(&Spec::loopback(72, "n1", &args));
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

    // Nobody is named yet.
    let early = SpiffeClient::start(&python, &socket, None);
    let uid = nix::unistd::geteuid();
    let refused = early.wait("a refusal", |told| told["event"] == "refused");
    let says = refused["error"].as_str().unwrap();
    assert!(says.contains("no identity issued") && says.contains("workload-user"), "{says}");
    let body = format!(r#"{{"Name":"web","Port":80,"Meta":{{"workload-user":"{uid}"}}}}"#);
    agent.put_ok("/v1/agent/service/register", &body);

    let client = SpiffeClient::start(&python, &socket, None);
    assert_eq!(client.wait("an SVID", |told| told["event"] == "fetched")["id"], "spiffe://lab.test/svc/web/node/n1");
    let bundles = client.wait("a bundle", |told| told["event"] == "bundles");
    let before = bundles["roots"]["lab.test"][0].as_str().unwrap().to_owned();
    let jwt = client.wait("no JWT", |told| told["event"] == "jwt");
    assert!(jwt["error"].as_str().unwrap().contains("X.509-SVIDs"), "{jwt}");
    let is_under = |told: &Value, root: &str| told["event"] == "svids" && told["svids"][0]["root"] == root;
    let first = client.wait("the first context", |told| is_under(told, &before));
    assert_eq!(first["svids"][0]["key_fits"], true, "{first}");

    // A rotation: first the bundle has both roots, then the certificate stands under the new one, then the old root is gone.
    let (ca_dir, at) = (ca.dir(), format!("-http-addr={}", agent.api));
    let rotated = Instant::now();
    weft_ok(&["ca", "rotate", "-ca", path(&ca_dir), &at]);
    let count = |told: &Value| told["roots"]["lab.test"].as_array().map_or(0, Vec::len);
    client.wait("two roots", |told| told["event"] == "svids" && count(told) == 2);
    println!("figure: a SPIFFE client heard of the new root {:.2?} after `weft ca rotate` began", rotated.elapsed());
    let renewed = client.wait("an SVID under the new root", |told| {
        told["event"] == "svids" && told["svids"][0]["root"].is_string() && !is_under(told, &before)
    });
    assert_ne!(renewed["svids"][0]["serial"], first["svids"][0]["serial"]);
    println!("figure: it held a certificate under the new root after {:.2?}", rotated.elapsed());
    until("nobody publishes under the old root", || {
        let out = weft(&["ca", "rotate", "-ca", path(&ca_dir), "-finish", &at]);
        if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
    });
    client.wait("the new root alone", |told| {
        told["event"] == "svids" && count(told) == 1 && told["roots"]["lab.test"][0] != before.as_str()
    });

    // Deregistered: its streams end, it is entitled to nothing.
    agent.put_ok("/v1/agent/service/deregister/web", "");
    let ended = client.wait("the end", |told| told["event"] == "ended");
    assert!(ended["error"].as_str().unwrap().contains("PERMISSION_DENIED"), "{ended}");
    let metrics = agent.try_get("/v1/agent/metrics?format=prometheus").unwrap().body;
    assert!(metrics.contains("weft_workload_calls_total{code=\"PERMISSION_DENIED\""), "{metrics}");
}

#[test]
fn only_the_named_user_gets_a_service_s_certificate_and_only_the_group_can_connect() {
    let Some(python) = spiffe_python() else { return };
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root to run clients as other users");
        return;
    }
    let ca = Ca::init("lab.test");
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = dir.path().join("workload.sock");
    let issuer = ca.issuer();
    // Users without a name on this host; the first is in the group by its primary group alone.
    let (web, db) = (61_001, 61_002);
    let args = ["-issuer", path(&issuer), "-workload-socket", path(&socket), "-workload-group", "0"];
    let agent = Agent::start(&Spec::loopback(73, "n1", &args));
    let meta = fs::metadata(&socket).unwrap();
    assert_eq!((meta.permissions().mode() & 0o777, meta.gid()), (0o660, 0));
    let of = |name: &str, user: u32| format!(r#"{{"Name":"{name}","Port":80,"Meta":{{"workload-user":"{user}"}}}}"#);
    agent.put_ok("/v1/agent/service/register", &of("web", web));
    agent.put_ok("/v1/agent/service/register", &of("db", db));

    // The group stays root's, which is the socket's.
    for (user, name) in [(web, "web"), (db, "db")] {
        let client = SpiffeClient::start(&python, &socket, Some(user));
        let told = client.wait("its SVID", |told| told["event"] == "svids" || told["event"] == "refused");
        let ids: Vec<&str> =
            told["svids"].as_array().unwrap().iter().map(|svid| svid["id"].as_str().unwrap()).collect();
        assert_eq!(ids, [format!("spiffe://lab.test/svc/{name}/node/n1")]);
    }
    // Root is named by none of them.
    let client = SpiffeClient::start(&python, &socket, None);
    let refused = client.wait("a refusal", |told| told["event"] == "refused");
    assert!(refused["error"].as_str().unwrap().contains("names user 0"), "{refused}");
    // Whoever is not of the group cannot connect at all.
    let stranger = "import os, socket, sys\nos.setgroups([])\nos.setgid(61001)\nos.setuid(61001)\n\
                    socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
    let out = Command::new(&python).args(["-c", stranger, path(&socket)]).output().unwrap();
    let says = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && says.contains("PermissionError"), "{says}");
    drop(agent);

    // A killed agent leaves its socket; the next start takes it over, and a second agent does not.
    let agent = Agent::start(&Spec::loopback(73, "n1", &args));
    assert!(UnixStream::connect(&socket).is_ok());
    let second = Ca::init("lab.test");
    let issuer = second.issuer();
    let args = ["-issuer", path(&issuer), "-workload-socket", path(&socket)];
    let mut other = Agent::spawn(&Spec::loopback(74, "n2", &args), tempfile::TempDir::new().unwrap());
    let (status, log) = other.wait_exit();
    assert!(!status.success() && log.contains("another process serves"), "{log}");
    assert!(UnixStream::connect(&socket).is_ok(), "the first agent's socket is untouched");
    drop(agent);
}

/// Makes a P-256 root as a company has one; returns certificate and key.
fn company_root(dir: &Path) -> Option<(PathBuf, PathBuf)> {
    let (certificate, key) = (dir.join("corp.pem"), dir.join("corp.key"));
    // With parameters and in SEC1 form, as this verb writes keys.
    let (is_made, text) = openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-out", path(&key)])?;
    assert!(is_made, "{text}");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let subject = "/C=CH/O=Example Industries/CN=Example Root CA";
    let extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"];
    let mut args = vec!["req", "-x509", "-new", "-sha256", "-days", "90", "-subj", subject];
    args.extend(["-key", path(&key), "-out", path(&certificate)]);
    extensions.iter().for_each(|extension| args.extend(["-addext", extension]));
    let (is_made, text) = openssl(&args).unwrap();
    assert!(is_made, "{text}");
    Some((certificate, key))
}

/// Checks the chain of a service's certificate at `agent` against `root` alone, strictly.
#[track_caller]
fn assert_leads_to(agent: &Agent, service: &str, root: &Path) {
    let leaf = agent.get(&format!("/v1/agent/connect/ca/leaf/{service}"));
    let dir = tempfile::tempdir().unwrap();
    let chain = dir.path().join("chain.pem");
    fs::write(&chain, leaf["CertPEM"].as_str().unwrap()).unwrap();
    let args = ["verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", path(root), "-untrusted", path(&chain)];
    let (is_good, text) = openssl(&[&args[..], &[path(&chain)]].concat()).unwrap();
    assert!(is_good, "{text}");
}

#[test]
fn a_mesh_stands_on_the_company_s_own_root_and_two_meshes_under_it_stay_apart() {
    let dir = tempfile::tempdir().unwrap();
    let Some((root, key)) = company_root(dir.path()) else {
        eprintln!("SKIPPED: openssl is not installed");
        return;
    };
    let init = |name: &str, domain: &str| {
        let ca = dir.path().join(name);
        let args = ["-trust-domain", domain, "-root-cert", path(&root), "-root-key", path(&key)];
        weft_ok(&[&["ca", "init", "-dir", path(&ca)], &args[..]].concat());
        ca
    };
    let (prod, staging) = (init("prod", "prod.test"), init("staging", "staging.test"));
    assert!(weft_ok(&["ca", "check", "-ca", path(&prod)]).contains("issuer-1 is good until"));
    let token = |ca: &Path| weft_ok(&["token", "create", "-ca", path(ca), "-node", "n*", "-serve", "web"]);
    let token = token(&prod).trim().to_owned();
    let start = |last, name, ca: &Path| {
        let issuer = ca.join("issuer-1");
        Agent::start(&Spec::loopback(last, name, &["-issuer", path(&issuer)]))
    };
    let (n1, other) = (start(75, "n1", &prod), start(76, "m1", &staging));
    let seed = loopback_ip(75).to_string();
    let n2 = Agent::start(&Spec::loopback(77, "n2", &["-join", &seed, "-token", &token]));
    n1.wait_members(&["n1=1", "n2=1"]);
    n2.put_ok("/v1/agent/service/register", r#"{"Name":"web","Port":80}"#);
    n1.wait_passing("web", &["web"]);
    assert_leads_to(&n2, "web", &root);
    let shown = n1.get("/v1/connect/ca/roots");
    assert_eq!((&shown["TrustDomain"], &shown["Roots"][0]["Active"]), (&Value::from("prod.test"), &Value::from(true)));

    // The root is the same and the token good, but this is another mesh: it is not shown the token.
    let seed = loopback_ip(76).to_string();
    let spec = Spec::loopback(78, "n3", &["-join", &seed, "-token", &token]);
    let mut lost = Agent::spawn(&spec, tempfile::TempDir::new().unwrap());
    let (status, log) = lost.wait_exit();
    assert!(!status.success() && log.contains("peer is of trust domain `staging.test`"), "{log}");
    assert!(!other.log().contains("join refused"), "{}", other.log());

    // A restart, and a made mesh's rotation onto the company's root.
    let n2 = Agent::spawn(&Spec::loopback(77, "n2", &[]), n2.kill());
    n2.wait_ready();
    n1.wait_members(&["n1=1", "n2=1"]);
    drop((n1, n2, other));
    let made = Ca::init("made.test");
    let issuer = made.issuer();
    let m1 = Agent::start(&Spec::loopback(79, "m1", &["-issuer", path(&issuer)]));
    let (ca_dir, at) = (made.dir(), format!("-http-addr={}", m1.api));
    let args = ["-root-cert", path(&root), "-root-key", path(&key), &at];
    weft_ok(&[&["ca", "rotate", "-ca", path(&ca_dir)], &args[..]].concat());
    let own = certificates_of(&root);
    until("the node stands under the company's root", || {
        let shown = m1.try_get("/v1/mesh/certificates")?.json();
        if shown[0]["Root"] == own.as_str() { Ok(()) } else { Err(shown.to_string()) }
    });
    assert_leads_to(&m1, "web", &root);
    let refused = weft(&["ca", "rotate", "-ca", path(&ca_dir), &at]);
    let says = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && says.contains("root of your own"), "{says}");
}

/// The hash of a certificate's key, as weft shows it.
fn certificates_of(certificate: &Path) -> String {
    let (is_read, key) = openssl(&["x509", "-in", path(certificate), "-noout", "-pubkey"]).unwrap();
    assert!(is_read, "{key}");
    let pem = certificate.with_extension("pub");
    fs::write(&pem, key).unwrap();
    let der = certificate.with_extension("spki");
    openssl(&["pkey", "-pubin", "-in", path(&pem), "-outform", "DER", "-out", path(&der)]).unwrap();
    let (_, digest) = openssl(&["dgst", "-sha256", "-r", path(&der)]).unwrap();
    digest.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn an_offline_root_signs_what_weft_asks_for_and_the_mesh_stands_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some((root, key)) = company_root(dir.path()) else {
        eprintln!("SKIPPED: openssl is not installed");
        return;
    };
    let ca = dir.path().join("ca");
    let args = ["ca", "init", "-dir", path(&ca), "-trust-domain", "prod.test", "-root-cert", path(&root)];
    let printed = weft_ok(&args);
    let waiting = weft(&["ca", "check", "-ca", path(&ca)]);
    assert!(String::from_utf8_lossy(&waiting.stderr).contains("2 certificates are not signed yet"));
    // Whoever holds the key runs what was printed.
    for line in printed.lines().filter(|line| line.trim().starts_with("openssl")) {
        let line = line.replace("ROOT.pem", path(&root)).replace("ROOT.key", path(&key));
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        let (is_signed, text) = openssl(&words).unwrap();
        assert!(is_signed, "{line}: {text}");
    }
    fs::remove_file(&key).unwrap();
    let checked = weft_ok(&["ca", "check", "-ca", path(&ca)]);
    assert!(checked.contains("issuer-1 is good until") && checked.contains("operator is good until"), "{checked}");
    let issuer = ca.join("issuer-1");
    let n1 = Agent::start(&Spec::loopback(80, "n1", &["-issuer", path(&issuer)]));
    let token = weft_ok(&["token", "create", "-ca", path(&ca), "-node", "n*", "-serve", "web"]).trim().to_owned();
    let n2 = Agent::start(&Spec::loopback(81, "n2", &["-join", &loopback_ip(80).to_string(), "-token", &token]));
    n1.wait_members(&["n1=1", "n2=1"]);
    assert_leads_to(&n2, "web", &root);
    // The operator revokes without the root; what the root alone can do says so.
    let at = format!("-http-addr={}", n1.api);
    weft_ok(&["revoke", "n2", "-ca", path(&ca), &at]);
    n1.wait_members(&["n1=1", "n2=4"]);
    let refused = weft(&["ca", "rotate", "-ca", path(&ca), &at]);
    let says = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && says.contains("root's key is not here"), "{says}");
}
