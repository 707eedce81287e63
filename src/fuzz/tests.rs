//! The corpus, and what a simple mutator makes of it, on every `cargo test`.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use super::seeds::{twin, twin_certificate};
use super::*;
use crate::pki::{Revocations, Revoked, TrustBundle, VerifyError, verify_presented};
use crate::policy::{DocumentSet, Offered};

/// Most that a target may hold at once for an input: serde reserves up to a mebibyte for each list that is open (see `wire`),
/// three deep at most, and a target builds some state around it.
const HELD_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Most files in the corpus: it is in every checkout, and replayed by every test run.
const FILES_MAX: usize = 300;
/// Mutations of each target on every test run: some seconds of all; a real search is cargo-fuzz's.
const MUTATIONS: u32 = 5_000;

/// Reads bytes; whether they are what it reads.
type Reader = fn(&[u8]) -> bool;

/// The documents of the fixture under the twins of their signatures.
const TWINS: [&str; 5] = ["operator-twin", "root-twin", "link-twin", "intention-twin", "entry-twin"];

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let files = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Runs a target; what it held at most, in bytes.
#[track_caller]
fn measured(target: &Target, bytes: &[u8], what: &str) -> u64 {
    let ran = catch_unwind(AssertUnwindSafe(|| allocation_counter::measure(|| (target.run)(bytes))));
    let held = ran.unwrap_or_else(|_| panic!("{} of {what}: see above; input {bytes:02x?}", target.name)).bytes_max;
    assert!(held <= HELD_BYTES_MAX, "{} of {what} held {held} bytes for {} bytes of input", target.name, bytes.len());
    held
}

#[test]
fn every_target_bears_its_corpus() {
    // Read once, so that it is not counted.
    fixture();
    let mut files = 0;
    for target in &TARGETS {
        let corpus = corpus(target.name);
        assert!(!corpus.is_empty(), "{} has no corpus", target.name);
        files += corpus.len();
        for (path, bytes) in corpus {
            // A first run fills what is made once.
            (target.run)(&bytes);
            measured(target, &bytes, &path.display().to_string());
        }
    }
    assert!(files <= FILES_MAX, "{files} files");
}

/// A corpus whose seeds are all refused at the first byte tests little: those that should be taken are.
#[test]
fn the_seeds_that_are_good_are_taken() {
    let readers: [(&str, Reader); 8] = [
        ("operator", crate::pki::fuzz::operator),
        ("documents", crate::gossip::fuzz_documents),
        ("shared", crate::gossip::fuzz_shared),
        ("intention", documents::intention),
        ("entry", documents::entry),
        ("rules", rules::entries),
        ("prepared", crate::prepared::fuzz::definition),
        ("filter", crate::filter::fuzz::expression),
    ];
    for (target, is_taken) in readers {
        let mut taken = 0;
        for (path, bytes) in corpus(target) {
            let name = path.file_name().unwrap().to_str().unwrap();
            let should = !name.starts_with("bad-") && !name.starts_with("regression-");
            assert!(is_taken(&bytes) == should || name.starts_with("regression-"), "{}", path.display());
            taken += u32::from(should);
        }
        assert!(taken > 0, "{target}");
    }
    let fixture = fixture();
    for document in &fixture.documents {
        let mut set = DocumentSet::new(&fixture.bundle);
        assert_eq!(set.offer(document.clone(), NOW).unwrap(), Offered::Stored, "{}", document.content().id);
    }
}

#[test]
fn every_target_bears_what_a_mutator_makes_of_its_corpus() {
    fixture();
    for target in &TARGETS {
        search(target, MUTATIONS, 0x7eef);
    }
}

/// A longer search where there is no cargo-fuzz: `cargo test --lib fuzz:: -- --ignored a_long`.
#[test]
#[ignore = "takes minutes"]
fn a_long_search_of_every_target_finds_nothing() {
    fixture();
    let seed = rand::random();
    println!("seed {seed}");
    for target in &TARGETS {
        search(target, 200_000, seed);
    }
}

fn search(target: &Target, rounds: u32, seed: u64) {
    let seeds: Vec<Vec<u8>> = corpus(target.name).into_iter().map(|(_, bytes)| bytes).collect();
    let mut rng = StdRng::seed_from_u64(seed);
    for bytes in &seeds {
        (target.run)(bytes);
    }
    for round in 0..rounds {
        let mut bytes = seeds.choose(&mut rng).unwrap().clone();
        for _ in 0..rng.random_range(1..4) {
            mutate(&mut bytes, &seeds, &mut rng);
        }
        measured(target, &bytes, &format!("seed {seed}, round {round}"));
    }
}

/// One of the changes that find most: a bit, a telling byte, a piece cut out, doubled, put in, or taken from elsewhere.
fn mutate(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut StdRng) {
    const TELLING: [u8; 12] = [0, 1, 2, 0x7f, 0x80, 0x81, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff];
    let at = rng.random_range(0..=bytes.len());
    let end = (at + rng.random_range(0..32)).min(bytes.len());
    match rng.random_range(0..7) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << rng.random_range(0..8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = *TELLING.choose(rng).unwrap();
            }
        }
        2 => drop(bytes.drain(at..end)),
        3 => {
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece);
        }
        4 => {
            let piece: Vec<u8> = (0..rng.random_range(1..9)).map(|_| rng.random()).collect();
            bytes.splice(at..at, piece);
        }
        5 => bytes.truncate(at),
        _ => {
            let other = seeds.choose(rng).unwrap();
            let from = rng.random_range(0..=other.len());
            let to = (from + rng.random_range(0..200)).min(other.len());
            bytes.splice(at..end, other[from..to].iter().copied());
        }
    }
}

#[test]
fn a_certificate_under_the_twin_of_its_signature_is_revoked_with_it() {
    let fixture = fixture();
    for at in 0..3 {
        let mut chain = fixture.chains[0].clone();
        let der = twin_certificate(&chain[at]);
        assert_ne!(der, chain[at].to_vec());
        chain[at] = der.into();
        // Anybody can write it, and it proves no more and no less than the one that was signed.
        assert_eq!(verify_presented(&chain, &fixture.bundle, NOW).unwrap(), fixture.peers[0]);
        let (_, shown) = &fixture.peers[0];
        let key = [shown.leaf.unwrap(), shown.intermediate, shown.issuer][at];
        let revoked = Revocations::from_iter([Revoked::Key(key)]);
        let bundle = TrustBundle { revoked, ..fixture.bundle.clone() };
        let refused = verify_presented(&chain, &bundle, NOW).unwrap_err();
        assert!(refused.to_string().contains("is revoked"), "{refused}");
    }
}

#[test]
fn a_document_under_the_twin_of_its_signature_makes_no_second_version_and_no_fork() {
    let fixture = fixture();
    for (document, name) in fixture.documents.iter().zip(TWINS) {
        let bytes = corpus("document").into_iter().find(|(path, _)| path.ends_with(name)).unwrap().1;
        let other = crate::policy::Document::from_bytes(&bytes).unwrap();
        assert_eq!(other.signature(), twin(document.signature()));
        assert_ne!(other.signature(), document.signature());
        let mut set = DocumentSet::new(&fixture.bundle);
        assert_eq!(set.offer(other.clone(), NOW).unwrap(), Offered::Stored, "it is as good");
        assert_eq!(set.offer(document.clone(), NOW).unwrap(), Offered::Known);
        assert_eq!((set.len(), set.forks().count()), (1, 0));
        assert_eq!(other.digest(), document.digest());
    }
    // What is no signature at all is none in any writing.
    let mut chain = fixture.chains[0].clone();
    let mut der = chain[1].to_vec();
    *der.last_mut().unwrap() ^= 1;
    chain[1] = der.into();
    let refused = verify_presented(&chain, &fixture.bundle, NOW).unwrap_err();
    assert!(matches!(refused, crate::pki::PkiError::Verify(VerifyError::Path { .. })), "{refused}");
}
