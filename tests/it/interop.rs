//! Somebody else's code checks weft's certificates: OpenSSL, strictly.

use std::fs;
use std::process::Command;

use crate::agent::{Agent, Ca, Spec, path};

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
