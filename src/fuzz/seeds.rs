//! Writes the corpus' seeds: what honest agents send, and the same written otherwise.
//!
//! Keys are made anew at each run, so all seeds are; regressions (`regression-*`) stay, and those that hold signatures
//! then only test that they are refused.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hickory_proto::op::{Edns, Message as Dns, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use rustls::pki_types::CertificateDer;
use serde_json::json;

use super::{NONCE, NOW};
use crate::authz::{PathRule, Rule};
use crate::gossip::engine::{Held, HelloReply, Message, Request as Ask, SyncReply, Trade};
use crate::membership::{Core, Leave, LifeClaim, MemberEntry, MeshId, Output, Profile, Standing, Statement};
use crate::model::{Entry, EntryKey, Generation, NodeInfo, Protocol, ServiceRecord};
use crate::pki::join::{Answer, Denied, Hello, Request, Role, Welcome, Why, renewal_message};
use crate::pki::{
    CaDir, DocumentKey, Issuer, JoinKey, NodeAuthority, Revoked, Rotation, Signatory, SpkiHash, TokenClaims,
    create_token,
};
use crate::policy::{
    ConfigBody, Content, Document, DocumentId, DocumentKind, HeldDigest, IntentionBody, RevocationBody, RootLink,
    link_name,
};
use crate::replica::{Digest, HeadSigner, Params, Replica};
use crate::wire;

/// The order of the group of P-256 (SEC 2, 2.4.2), big-endian.
const ORDER: [u8; 32] = [
    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6, 0xfa,
    0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
];

/// The other signature that is as good: (r, s) and (r, n - s) both hold, whoever writes the second.
pub(super) fn twin(signature: &[u8]) -> Vec<u8> {
    let r_bytes = usize::from(signature[3]);
    let r = &signature[2..4 + r_bytes];
    let s = &signature[6 + r_bytes..];
    let mut wide = [0; 32];
    let trimmed: Vec<u8> = s.iter().copied().skip_while(|byte| *byte == 0).collect();
    wide[32 - trimmed.len()..].copy_from_slice(&trimmed);
    let (mut other, mut borrow) = (Vec::new(), 0);
    for at in (0..32).rev() {
        let left = i16::from(ORDER[at]) - i16::from(wide[at]) - borrow;
        borrow = i16::from(left < 0);
        other.insert(0, u8::try_from(left.rem_euclid(256)).unwrap());
    }
    let mut other: Vec<u8> = other.into_iter().skip_while(|byte| *byte == 0).collect();
    if other[0] >= 0x80 {
        other.insert(0, 0);
    }
    let s = [vec![2, u8::try_from(other.len()).unwrap()], other].concat();
    [vec![0x30, u8::try_from(r.len() + s.len()).unwrap()], r.to_vec(), s].concat()
}

/// The same certificate under the twin of its signature.
pub(super) fn twin_certificate(der: &[u8]) -> Vec<u8> {
    // 30 82 LL LL | to be signed | algorithm, 12 bytes | 03 LL 00 signature
    let signed = 4 + usize::from(u16::from_be_bytes([der[6], der[7]]));
    let head = &der[4..4 + signed + 12];
    let signature = twin(&der[4 + signed + 12 + 3..]);
    let bits = [vec![3, u8::try_from(signature.len() + 1).unwrap(), 0], signature].concat();
    let length = u16::try_from(head.len() + bits.len()).unwrap().to_be_bytes();
    [vec![0x30, 0x82, length[0], length[1]], head.to_vec(), bits].concat()
}

struct Writer(PathBuf);

impl Writer {
    fn put(&self, target: &str, name: &str, bytes: &[u8]) {
        fs::create_dir_all(self.0.join(target)).unwrap();
        fs::write(self.0.join(target).join(name), bytes).unwrap();
    }

    /// A message with the byte in front that says which it is.
    fn say<T: serde::Serialize>(&self, target: &str, name: &str, kind: u8, message: &T) {
        self.put(target, name, &[vec![kind], wire::encode(message).unwrap()].concat());
    }
}

struct Signer<'a> {
    authority: &'a NodeAuthority,
    last: RefCell<Vec<u8>>,
}

impl Signer<'_> {
    fn last(&self) -> Vec<u8> {
        self.last.borrow().clone()
    }
}

impl HeadSigner for Signer<'_> {
    fn chain(&self) -> Vec<Vec<u8>> {
        self.authority.chain().iter().map(|der| der.to_vec()).collect()
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, String> {
        let signature = self.authority.sign(message).map_err(|error| error.to_string())?;
        self.last.replace(signature.clone());
        Ok(signature)
    }
}

#[test]
#[ignore = "writes tests/fuzz anew, with new keys"]
fn the_corpus_is_written_anew() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    let to = Writer(root.join("corpus"));
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("ca");
    let made = NOW.minus(Duration::from_secs(3600));
    let ca = CaDir::init(&dir, &"td".parse().unwrap(), made).unwrap();
    let issuer = Issuer::load(&dir.join("issuer-1")).unwrap();
    let authority = issuer.self_certify(&"web-1".parse().unwrap(), &"web,api-*".parse().unwrap(), NOW).unwrap();
    let key = |who| DocumentKey::load(&dir, who).unwrap();
    let (by_root, by_operator) = (key(Signatory::Root), key(Signatory::Operator));
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("root.der"), by_root.certificate()).unwrap();

    certificates(&to, &issuer, &authority, by_operator.certificate());
    let claims = TokenClaims {
        id: [7; 16],
        node: "web-*".parse().unwrap(),
        serve: "web,api-*".parse().unwrap(),
        not_after: NOW.plus(Duration::from_secs(3600)),
        uses: 1,
    };
    let token = create_token(&dir, &claims).unwrap().to_string();
    to.put("token", "good", token.as_bytes());
    to.put("token", "cut-off", &token.as_bytes()[..token.len() - 7]);
    let rotation = ca.prepare_rotation(None, made).unwrap();
    let documents = documents(&to, &by_root, &by_operator, &rotation);
    joins(&to, &issuer, &authority, &token, &documents);
    gossip(&to, &authority, &documents);
    shared(&to);
    packets(&to);
    streams(&to);
    dns(&to);
}

/// These hold no keys, so they can be written alone.
#[test]
#[ignore = "writes tests/fuzz/corpus/dns anew"]
fn the_corpus_of_dns_is_written_anew() {
    dns(&Writer(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus")));
}

fn dns(to: &Writer) {
    let query = |name: &str, kind: RecordType, edns: Option<u16>| {
        let mut message = Dns::new(0x1234, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(name.parse().unwrap(), kind));
        if let Some(bytes) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(bytes);
            edns.set_dnssec_ok(true);
            message.set_edns(edns);
        }
        message.to_vec().unwrap()
    };
    let put = |name: &str, kind: u8, bytes: Vec<u8>| to.put("dns", name, &[vec![kind], bytes].concat());
    put("a", 0, query("v1.WEB.service.dc1.weft.", RecordType::A, None));
    put("srv", 1, query("_web._tcp.service.consul.", RecordType::SRV, Some(1232)));
    put("many", 0, query("many.service.weft.", RecordType::SRV, Some(4096)));
    put("many-tcp", 2, query("many.service.weft.", RecordType::ANY, None));
    put("node", 1, query("n1.node.weft.", RecordType::TXT, Some(512)));
    put("address", 0, query("c000020a.addr.dc1.weft.", RecordType::A, None));
    put("virtual", 0, query("web.virtual.weft.", RecordType::A, None));
    put("apex", 2, query("weft.", RecordType::NS, Some(65_535)));
    put("pointer", 0, query("1.0.0.10.in-addr.arpa.", RecordType::PTR, None));
    put("foreign", 1, query("www.example.org.", RecordType::AAAA, Some(1232)));
    put("transfer", 2, query("weft.", RecordType::AXFR, None));
    let owner: Name = "www.example.org.".parse().unwrap();
    let mut found = Dns::new(7, MessageType::Response, OpCode::Query);
    found.add_query(Query::query(owner.clone(), RecordType::A));
    for last in 0..4 {
        let data = RData::A(std::net::Ipv4Addr::new(192, 0, 2, last).into());
        found.add_answer(Record::from_rdata(owner.clone(), 60, data));
    }
    found.set_edns(Edns::new());
    put("found", 3, found.to_vec().unwrap());
}

fn certificates(to: &Writer, issuer: &Issuer, authority: &NodeAuthority, operator: &CertificateDer<'_>) {
    let list = |chain: &[CertificateDer<'_>]| chain.iter().map(|der| der.to_vec()).collect::<Vec<_>>();
    let node = list(&authority.mint_node(NOW).unwrap().chain);
    let service = list(&authority.mint_service(&"web".parse().unwrap(), NOW).unwrap().chain);
    to.put("chain", "node", &wire::encode(&node).unwrap());
    to.put("chain", "service", &wire::encode(&service).unwrap());
    for at in 0..node.len() {
        let mut chain = node.clone();
        chain[at] = twin_certificate(&node[at]);
        to.put("chain", &format!("twin-{at}"), &wire::encode(&chain).unwrap());
    }
    to.put("chain", "published", &wire::encode(&node[1..].to_vec()).unwrap());
    to.put("chain", "operator", &wire::encode(&vec![operator.to_vec()]).unwrap());
    to.put("chain", "root", &wire::encode(&vec![issuer.bundle().roots[0].to_vec()]).unwrap());
    for (name, text) in [("usual", "web-1 web,api-*"), ("nothing", "web-1 "), ("everything", "a *")] {
        let length = u8::try_from(text.len()).unwrap();
        to.put("extension", name, &[vec![0x0c, length], text.as_bytes().to_vec()].concat());
    }
    for (name, text) in [("all", "*"), ("narrow", "intentions:web*,config:web*"), ("rights", "tokens,revocations")] {
        let length = u8::try_from(text.len()).unwrap();
        to.put("operator", name, &[vec![0x0c, length], text.as_bytes().to_vec()].concat());
    }
    to.put("operator", "bad-long-length", &[vec![0x0c, 0x81, 1], b"*".to_vec()].concat());
    to.put("operator", "bad-right", &[vec![0x0c, 4], b"root".to_vec()].concat());
    to.put("extension", "long-length", &[vec![0x0c, 0x81, 3], b"a *".to_vec()].concat());
}

fn documents(to: &Writer, root: &DocumentKey, operator: &DocumentKey, rotation: &Rotation) -> [Document; 5] {
    let content = |kind, name: &str, body: Vec<u8>| Content {
        trust_domain: "set-by-sign".parse().unwrap(),
        id: DocumentId { kind, name: name.parse().unwrap() },
        version: 1,
        not_before: NOW,
        not_after: NOW.plus(Duration::from_secs(86_400 * 30)),
        signer: SpkiHash([0; 32]),
        body,
    };
    let revoked = |entries| RevocationBody { entries, reason: "lost".to_owned() }.to_bytes().unwrap();
    let entries = vec![
        Revoked::Key(SpkiHash([1; 32])),
        Revoked::Node { node: "web-2".parse().unwrap(), until: NOW },
        Revoked::Token([2; 16]),
        Revoked::Issuer { key: SpkiHash([3; 32]), from: NOW },
    ];
    let link = RootLink { root: rotation.root.to_vec(), proof: rotation.proof.clone(), issuers: Vec::new() };
    let name = link_name(2);
    let bodies = bodies(to);
    let made = [
        ("operator", content(DocumentKind::Revocation, "node.web-2", revoked(entries.clone())), operator),
        ("root", content(DocumentKind::Revocation, "all", revoked(entries)), root),
        ("link", content(DocumentKind::Bundle, name.as_str(), link.to_bytes().unwrap()), root),
        ("intention", content(DocumentKind::Intention, "web:db", bodies[0].clone()), operator),
        ("entry", content(DocumentKind::Config, "service-defaults:web", bodies[1].clone()), operator),
    ];
    made.map(|(name, content, key)| {
        let document = Document::sign(content, key).unwrap();
        to.put("document", name, &document.to_bytes());
        let parts = (document.signed_bytes().to_vec(), document.certificate().to_vec(), twin(document.signature()));
        to.put("document", &format!("{name}-twin"), &wire::encode(&parts).unwrap());
        document
    })
}

/// Bodies of intentions and config entries; returns one of each.
fn bodies(to: &Writer) -> [Vec<u8>; 2] {
    let intention = |value: serde_json::Value| {
        IntentionBody(Some(crate::authz::from_json(&value, None).unwrap())).to_bytes().unwrap()
    };
    let plain =
        intention(json!({"SourceName": "web", "DestinationName": "db", "Action": "allow", "Meta": {"team": "shop"}}));
    let permissions = intention(json!({"SourceName": "*", "DestinationName": "db", "Permissions": [
        {"Action": "deny", "HTTP": {"PathPrefix": "/admin", "Methods": ["DELETE", "PUT"]}},
        {"Action": "allow", "HTTP": {"PathRegex": "/v[0-9]+/.*", "Header": [
            {"Name": "x-team", "Exact": "shop"}, {"Name": "x-a", "Suffix": "b", "Invert": true},
            {"Name": "x-c", "Regex": "(d|e)*"}, {"Name": "x-f", "Present": true}]}}]}));
    let audited =
        json!({"SourceName": "web", "DestinationName": "*", "Action": "deny", "Audit": true, "Description": "dry"});
    to.put("intention", "plain", &plain);
    to.put("intention", "permissions", &permissions);
    to.put("intention", "audited", &intention(audited));
    to.put("intention", "deleted", &IntentionBody(None).to_bytes().unwrap());
    to.put("intention", "bad-trailing", &[plain.clone(), vec![0]].concat());
    to.put("intention", "bad-cut-off", &permissions[..permissions.len() - 9]);
    let mut empty = crate::authz::from_json(
        &json!({"SourceName": "a", "DestinationName": "b", "Permissions": [
        {"Action": "deny", "HTTP": {"PathRegex": "x"}}]}),
        None,
    )
    .unwrap();
    if let Rule::Permissions(list) = &mut empty.rule {
        list[0].path = Some(PathRule::Regex(String::new()));
    }
    // It would deny nothing, and in JSON everything.
    to.put("intention", "bad-empty-regex", &IntentionBody(Some(empty)).to_bytes().unwrap());
    let entry = |value: &str| ConfigBody(Some(value.to_owned())).to_bytes().unwrap();
    let defaults = entry(r#"{"Kind":"service-defaults","Name":"web","Protocol":"http","Limits":[1,2.5,null,true]}"#);
    to.put("entry", "defaults", &defaults);
    to.put("entry", "mesh", &entry(r#"{"kind":"mesh"}"#));
    to.put("entry", "deleted", &ConfigBody(None).to_bytes().unwrap());
    to.put("entry", "bad-kind", &entry(r#"{"Kind":"nonsense","Name":"web"}"#));
    to.put("entry", "bad-json", &entry(r#"{"Kind":"mesh","#));
    [plain, defaults]
}

fn joins(to: &Writer, issuer: &Issuer, authority: &NodeAuthority, token: &str, documents: &[Document; 5]) {
    let certificate = issuer.certificate().to_vec();
    let links = vec![documents[2].to_bytes()];
    to.say("join", "hello", 0, &Hello { clock: NOW, knows: vec![[1; 32], [2; 32]] });
    let role = Role::Issuer { certificate, proof: issuer.prove(&NONCE).unwrap() };
    to.say("join", "issuer", 1, &Welcome { clock: NOW, nonce: NONCE, role, links });
    let role = Role::Member { issuers: vec!["10.0.0.1:8301".parse().unwrap(), "[2001:db8::1]:1".parse().unwrap()] };
    to.say("join", "member", 1, &Welcome { clock: NOW, nonce: NONCE, role, links: Vec::new() });
    let key = JoinKey::new().unwrap().pair().unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    let request = Request::Join { token: token.to_owned(), node: "web-1".parse().unwrap(), csr: csr.clone() };
    to.say("join", "join", 2, &request);
    let signature = authority.sign_renewal(&renewal_message(&csr, &NONCE)).unwrap();
    let chain: Vec<Vec<u8>> = authority.chain().iter().map(|der| der.to_vec()).collect();
    to.say("join", "renew", 2, &Request::Renew { csr: csr.clone(), chain: chain.clone(), signature });
    // A signing request with something behind it: two readers might take it for two requests.
    let csr = [csr, vec![0]].concat();
    let signature = authority.sign_renewal(&renewal_message(&csr, &NONCE)).unwrap();
    to.say("join", "renew-trailing", 2, &Request::Renew { csr, chain: chain.clone(), signature });
    to.say("join", "granted", 3, &Answer::Granted { chain });
    to.say("join", "refused", 3, &Answer::Denied(Denied::new(Why::Revoked, "no")));
}

fn records() -> BTreeMap<EntryKey, Entry> {
    let info = NodeInfo {
        id: "6e2e5bd4-0f3e-4f0c-9a43-1b1a4b8f0a11".to_owned(),
        name: "web-1".parse().unwrap(),
        mesh_addr: "10.0.0.2:8301".parse().unwrap(),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
        build: "0.1.0".to_owned(),
        issuer: false,
    };
    let service = ServiceRecord {
        tags: ["v1".into()].into(),
        address: "10.0.0.2".into(),
        port: 80,
        protocol: Protocol::Http,
        ..ServiceRecord::new("web-1".parse().unwrap(), "web".parse().unwrap())
    };
    [Entry::Node(info.into()), Entry::Service(service.into())].into_iter().map(|entry| (entry.key(), entry)).collect()
}

fn gossip(to: &Writer, authority: &NodeAuthority, documents: &[Document; 5]) {
    let node = authority.node().clone();
    let generation = Generation { number: 2, nonce: 9 };
    let mut replica = Replica::new(node.clone(), generation, Params::default());
    let signer = Signer { authority, last: RefCell::default() };
    let whole = replica.publish(records(), &signer, NOW).unwrap().unwrap();
    to.put("delta", "whole", &wire::encode(&whole).unwrap());
    let signature = signer.last();
    let bytes = wire::encode(&whole).unwrap();
    let at = bytes.windows(signature.len()).position(|part| part == signature).unwrap();
    let twin = twin(&signature);
    let length = u8::try_from(twin.len()).unwrap();
    let (front, back) = (&bytes[..at - 1], &bytes[at + signature.len()..]);
    to.put("delta", "twin", &[front, &[length], twin.as_slice(), back].concat());
    let mut fewer = records();
    fewer.retain(|key, _| *key == EntryKey::Node);
    let change = replica.publish(fewer, &signer, NOW).unwrap().unwrap();
    to.put("delta", "change", &wire::encode(&change).unwrap());

    let id = MeshId::new(node.clone(), "10.0.0.2:8301".parse().unwrap(), generation);
    let leave = Leave { node: node.clone(), life: id.life, prune: false, by: node.clone(), signature: vec![1; 70] };
    let farewells = vec![leave.clone()];
    let exchange = |name: &str, kind: u8, message: Message| {
        to.put("exchange", name, &[vec![kind], message.encode().unwrap()].concat());
    };
    let none = Digest::none(node.clone());
    exchange("hello", 0, Message::Request(Ask::Hello(id.clone())));
    exchange("pull", 0, Message::Request(Ask::Pull(vec![none.clone()])));
    exchange("goodbye", 0, Message::Request(Ask::Goodbye(leave)));
    exchange("sync", 0, Message::Request(Ask::Sync { set_hash: 5, farewells: farewells.clone() }));
    exchange("documents", 0, Message::Request(Ask::Documents(vec![1, 2, 3])));
    let digests = vec![whole.digest(), none.clone()];
    exchange("shared", 0, Message::Request(Ask::Shared(vec![1, 2, 3])));
    exchange("held", 1, Message::Held(Held { buckets: vec![0, 255], digests: digests.clone() }));
    exchange("taking", 2, Message::Deltas(vec![whole.clone(), change.clone()]));
    let entry = |standing| MemberEntry { id: id.clone(), incarnation: 3, standing };
    let members = [Standing::Alive, Standing::Suspect, Standing::Down].map(entry).into();
    exchange("welcome", 3, Message::Hello(HelloReply::Welcome { id: id.clone(), members, farewells }));
    exchange("stay-out", 3, Message::Hello(HelloReply::Refused("no".to_owned())));
    exchange("outdated", 3, Message::Hello(HelloReply::Outdated(id.life)));
    exchange("pulled", 4, Message::Deltas(vec![whole.clone()]));
    exchange("noted", 5, Message::Noted);
    exchange("same", 6, Message::Sync(SyncReply::Same));
    exchange("buckets", 6, Message::Sync(SyncReply::Buckets(vec![7; crate::replica::BUCKETS])));
    exchange("trade", 7, Message::Trade(Trade { deltas: vec![whole], wanted: digests }));

    let list: Vec<Vec<u8>> = documents.iter().map(Document::to_bytes).collect();
    let digests: Vec<_> =
        documents.iter().map(|document| HeldDigest { digest: document.digest(), is_forked: false }).collect();
    // The forms of `gossip::documents::carry`, field by field: its types are its own.
    to.put("documents", "push", &[vec![0, 1, 0], length_of(&list[0]), list[0].clone()].concat());
    to.put("documents", "compare", &[vec![0, 1, 1], vec![5], vec![7]].concat());
    to.put("documents", "held", &[1, 1, 0]);
    to.put("documents", "refused", &[&[1, 1, 2, 2], b"no".as_slice()].concat());
    to.say("documents", "equal", 2, &(5_u64, None::<Vec<u8>>));
    to.say("documents", "differ", 2, &(5_u64, Some(digests.clone())));
    to.say("documents", "given", 3, &(list, digests));
}

/// The forms of `gossip::shared::carry`, field by field: its types are its own. An enum is its variant's number and fields.
fn shared(to: &Writer) {
    let stamp = (1_800_000_000_000_u64, 3_u32, "n1");
    let head = ("app/one", stamp, Some((7_u64, 5_u32)));
    let summary = (9_u64, 1_800_000_000_000_u64, 5_u64, 0_u64);
    to.say("shared", "push", 0, &(0_u32, 0_u32, head));
    to.say("shared", "push-deletion", 0, &(0_u32, 1_u32, "q", stamp, None::<(u64, u32)>));
    to.say("shared", "compare", 0, &(1_u32, 2_u32, summary));
    to.say("shared", "send", 1, &0_u32);
    to.say("shared", "refused", 1, &(3_u32, "no"));
    to.say("shared", "same", 2, &1_u32);
    to.say("shared", "differs", 2, &(2_u32, summary, vec![1_u64; 256]));
    to.say("shared", "digests", 3, &(0_u32, 200_u8, Some([7_u8; 16])));
    to.say("shared", "want", 3, &(1_u32, [7_u8; 16]));
    to.say("shared", "take", 3, &(2_u32, head));
    to.say("shared", "page", 4, &(vec![([7_u8; 16], stamp, 11_u64, false)], true));
    to.say("shared", "head", 5, &Some(head));
}

fn length_of(bytes: &[u8]) -> Vec<u8> {
    wire::encode(&(bytes.len() as u64)).unwrap().split_off(1)
}

fn packets(to: &Writer) {
    let now = crate::clock::now();
    let id = |name: &str, last: u8| {
        MeshId::new(name.parse().unwrap(), ([10, 0, 0, last], 8301).into(), Generation { number: 1, nonce: 1 })
    };
    let mut core = Core::new(id("other", 2), Profile::default(), 7, now);
    let mut seen = BTreeMap::<String, Vec<u8>>::new();
    core.meet(&id("own", 1), now);
    core.meet(&id("third", 3), now);
    let claim = LifeClaim { id: id("fourth", 4), incarnation: 1, signature: vec![1; 70] };
    core.handle_verified(Statement::Life(claim), crate::membership::Verdict::Holds, now);
    core.set_state_hash(99, now);
    let mut at = now;
    for _ in 0..40 {
        while let Some(output) = core.poll_output() {
            match output {
                Output::Send { packet, .. } if packet.len() > 20 => {
                    seen.insert(format!("sent-{:03}", packet.len()), packet.to_vec());
                }
                Output::Sign(statement) => core.handle_signed(&statement.with_signature(vec![1; 70]), at),
                _ => {}
            }
        }
        at = core.poll_timeout().max(at);
        core.handle_timeout(at);
    }
    for (name, packet) in seen.iter().take(24) {
        to.put("packet", name, packet);
    }
}

fn streams(to: &Writer) {
    to.put("preamble", "tcp", b"\x01\x01\x05web-1\x03web");
    to.put("preamble", "http", b"\x01\x02\x05web-1\x03webGET");
    to.put("preamble", "udp", b"\x01\x03\x05web-1\x03web");
    let head = b"web:80\x06/a?b=c\x03\x01\x03*/*\x16\x015\x00\x05x-own\x011";
    let request = [vec![0, 0, u8::try_from(head.len() + 3).unwrap(), 1, 2, 6], head.to_vec()].concat();
    to.put("head", "request", &request);
    to.put("head", "response", b"\x01\x00\x08\x00\x01\x94\x01\x41\x0213");
    to.put("head", "body", b"\x02\x03abc\x41\x2c\x00\x00\x04\x01\x4a\x010");
}
