//! The encoding stands: api/documents.md promises it.

use super::*;
use crate::authz::{Action, HeaderRule, HeaderTest, Intention, Mode, Party, PathRule, Permission, Rule};
use crate::clock::UnixSeconds;
use crate::pki::{Revoked, SpkiHash};
use crate::wire;

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _written = write!(text, "{byte:02x}");
        text
    })
}

fn revocation() -> RevocationBody {
    RevocationBody {
        entries: vec![
            Revoked::Key(SpkiHash([0x11; 32])),
            Revoked::Node { node: "web-1".parse().unwrap(), until: UnixSeconds(1_800_000_000) },
            Revoked::Token([0x22; 16]),
            Revoked::Issuer { key: SpkiHash([0x33; 32]), from: UnixSeconds(7) },
        ],
        reason: "lost".to_owned(),
    }
}

#[test]
fn the_bodies_and_the_content_are_encoded_as_documented() {
    let body = revocation().to_bytes().unwrap();
    let want = format!("0104{}{}{}{}{}", key(), node(), token(), issuer(), "046c6f7374");
    assert_eq!(hex(&body), want);
    assert_eq!(RevocationBody::from_bytes(&body).unwrap(), revocation());

    let link = RootLink { root: vec![1, 2], proof: vec![3], issuers: vec![vec![4]] };
    assert_eq!(hex(&link.to_bytes().unwrap()), "01020102010301".to_owned() + "0104");

    let mut intention = Intention::plain(Party::Any, "db".parse().unwrap(), Action::Deny);
    intention.meta.insert("k".to_owned(), "v".to_owned());
    assert_eq!(
        hex(&IntentionBody(Some(intention.clone())).to_bytes().unwrap()),
        "0101012a026462000100000101".to_owned() + "6b0176"
    );
    intention.mode = Mode::Audit;
    intention.rule = Rule::Permissions(vec![Permission {
        action: Action::Allow,
        path: Some(PathRule::Prefix("/".to_owned())),
        methods: vec!["GET".to_owned()],
        headers: vec![HeaderRule { name: "x".to_owned(), test: HeaderTest::Present, is_inverted: true }],
    }]);
    let permissions = "0101000101012f01034745540101780001";
    let want = format!("0101012a026462{permissions}0100010{}", "16b0176");
    assert_eq!(hex(&IntentionBody(Some(intention)).to_bytes().unwrap()), want);
    assert_eq!(hex(&IntentionBody(None).to_bytes().unwrap()), "0100");
    assert_eq!(hex(&ConfigBody(Some("{}".to_owned())).to_bytes().unwrap()), "0101027b7d");

    let content = Content {
        trust_domain: "td".parse().unwrap(),
        id: DocumentId { kind: DocumentKind::Revocation, name: "node.web-1".parse().unwrap() },
        version: 300,
        not_before: UnixSeconds(1),
        not_after: UnixSeconds(1_800_000_000),
        signer: SpkiHash([0x44; 32]),
        body: vec![9],
    };
    let signer = "44".repeat(32);
    let want = format!("01027464010a6e6f64652e7765622d31fb2c0101fc00d2496b{signer}0109");
    assert_eq!(hex(&wire::encode(&content).unwrap()), want);
}

fn key() -> String {
    format!("00{}", "11".repeat(32))
}

fn node() -> String {
    "01057765622d31fc00d2496b".to_owned()
}

fn token() -> String {
    format!("02{}", "22".repeat(16))
}

fn issuer() -> String {
    format!("03{}07", "33".repeat(32))
}
