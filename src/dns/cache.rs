//! What recursors said, for as long as they said that it holds.
//!
//! Pure: `now` comes from outside. Bounded in entries and in bytes; whoever came first goes first.
//! Not here: who is asked (`recurse`).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use tokio::time::Instant;

use super::message::Request;

/// Most answers that are kept: the names that the programs of one host ask for.
const ENTRIES_MAX: usize = 8192;
/// Most bytes of all kept answers, as they came on the wire, which is how they are kept.
const BYTES_MAX: usize = 4 * 1024 * 1024;
/// Longest time that an answer is kept, whatever its records say: a mistake elsewhere is mended here within it.
const TTL_MAX_S: u32 = 3600;
/// Longest time that the absence of something is kept (RFC 2308 §5 allows up to three hours).
const NEGATIVE_TTL_MAX_S: u32 = 300;

/// What a question is, for the cache: without the case of its letters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    name: Name,
    kind: RecordType,
    class: DNSClass,
    dnssec_ok: bool,
    checking_disabled: bool,
}

impl Key {
    /// Returns the key of a request.
    pub(super) fn of(request: &Request) -> Self {
        Self {
            name: request.query.name().to_lowercase(),
            kind: request.query.query_type(),
            class: request.query.query_class(),
            dnssec_ok: request.edns.is_some_and(|asker| asker.dnssec_ok),
            checking_disabled: request.checking_disabled,
        }
    }
}

#[derive(Debug)]
struct Entry {
    wire: Arc<[u8]>,
    stored: Instant,
    ends: Instant,
    /// Tells this entry from an earlier one of the same key.
    number: u64,
}

/// The cache.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
    /// In the order in which they came; some may have been replaced.
    order: VecDeque<(Key, u64)>,
    bytes: usize,
    number: u64,
}

impl Cache {
    /// Returns what holds for `key` at `now`, and how many whole seconds old it is.
    pub(super) fn find(&self, key: &Key, now: Instant) -> Option<(Arc<[u8]>, u32)> {
        let entry = self.entries.get(key).filter(|entry| now < entry.ends)?;
        let age = now.saturating_duration_since(entry.stored).as_secs();
        Some((Arc::clone(&entry.wire), u32::try_from(age).unwrap_or(u32::MAX)))
    }

    /// Keeps `wire`, which is `message` as it came, if it may be kept at all.
    pub(super) fn store(&mut self, key: Key, message: &Message, wire: Arc<[u8]>, now: Instant) {
        let ttl_s = lifetime_s(message);
        if ttl_s == 0 {
            return;
        }
        self.number += 1;
        let ends = now + Duration::from_secs(ttl_s.into());
        self.bytes += wire.len();
        let entry = Entry { wire, stored: now, ends, number: self.number };
        self.order.push_back((key.clone(), self.number));
        if let Some(before) = self.entries.insert(key, entry) {
            self.bytes -= before.wire.len();
        }
        // The order is bounded, too: a key that is replaced over and over leaves a trace each time.
        while self.order.len() > ENTRIES_MAX || self.bytes > BYTES_MAX {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        let Some((key, number)) = self.order.pop_front() else { return };
        if self.entries.get(&key).is_some_and(|entry| entry.number == number)
            && let Some(gone) = self.entries.remove(&key)
        {
            self.bytes -= gone.wire.len();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// How long `message` may be kept, in seconds: by the shortest time of its records; what says that something is not there
/// by its SOA, and not at all without one (RFC 2308 §5).
fn lifetime_s(message: &Message) -> u32 {
    let is_negative = match message.metadata.response_code {
        ResponseCode::NoError => message.answers.is_empty(),
        ResponseCode::NXDomain => true,
        _ => return 0,
    };
    if message.metadata.truncation {
        return 0;
    }
    let soa = |record: &Record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    };
    let records = message.answers.iter().chain(&message.authorities).chain(&message.additionals);
    let shortest = records.map(|record| record.ttl).min().unwrap_or(0);
    if is_negative {
        let by_soa = message.authorities.iter().find_map(soa).unwrap_or(0);
        return shortest.min(by_soa).min(NEGATIVE_TTL_MAX_S);
    }
    shortest.min(TTL_MAX_S)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::op::{MessageType, OpCode, Query};
    use hickory_proto::rr::rdata::SOA;

    use super::super::message::Via;
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn key(text: &str) -> Key {
        let query = Query::query(name(text), RecordType::A);
        let request =
            Request { id: 1, query, recursion_desired: true, checking_disabled: false, edns: None, via: Via::UdpLocal };
        Key::of(&request)
    }

    fn wire(bytes: usize) -> Arc<[u8]> {
        vec![0; bytes].into()
    }

    fn found(ttl_s: u32) -> Message {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        message.answers.push(Record::from_rdata(
            name("a.example."),
            ttl_s,
            RData::A(Ipv4Addr::new(192, 0, 2, 1).into()),
        ));
        message
    }

    fn absent(ttl_s: u32, minimum_s: u32) -> Message {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        message.metadata.response_code = ResponseCode::NXDomain;
        let soa = SOA::new(name("ns.example."), name("h.example."), 1, 1, 1, 1, minimum_s);
        message.authorities.push(Record::from_rdata(name("example."), ttl_s, RData::SOA(soa)));
        message
    }

    #[test]
    fn an_answer_lives_as_long_as_its_shortest_record_and_no_longer_than_the_cap() {
        let check = |message: &Message, want: u32| assert_eq!(lifetime_s(message), want);
        check(&found(60), 60);
        check(&found(0), 0);
        check(&found(86_400), TTL_MAX_S);
        let mut two = found(60);
        two.additionals.push(Record::from_rdata(name("b.example."), 5, RData::A(Ipv4Addr::new(192, 0, 2, 2).into())));
        check(&two, 5);
        check(&absent(60, 30), 30);
        check(&absent(20, 30), 20);
        check(&absent(86_400, 86_400), NEGATIVE_TTL_MAX_S);
        let mut failed = found(60);
        failed.metadata.response_code = ResponseCode::ServFail;
        check(&failed, 0);
        let mut cut = found(60);
        cut.metadata.truncation = true;
        check(&cut, 0);
        let mut unsaid = absent(60, 60);
        unsaid.authorities.clear();
        check(&unsaid, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_ages_and_ends_and_case_is_no_matter() {
        let mut cache = Cache::default();
        let start = Instant::now();
        cache.store(key("A.example."), &found(10), wire(50), start);
        let (_, age) = cache.find(&key("a.EXAMPLE."), start + Duration::from_millis(9_900)).unwrap();
        assert_eq!(age, 9);
        assert!(cache.find(&key("a.example."), start + Duration::from_secs(10)).is_none());
        assert!(cache.find(&key("b.example."), start).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn the_cache_is_bounded_in_entries_and_in_bytes() {
        let mut cache = Cache::default();
        let now = Instant::now();
        for at in 0..ENTRIES_MAX + 10 {
            cache.store(key(&format!("n{at}.example.")), &found(60), wire(50), now);
        }
        assert_eq!(cache.len(), ENTRIES_MAX);
        assert!(cache.find(&key("n9.example."), now).is_none() && cache.find(&key("n10.example."), now).is_some());
        for at in 0..200 {
            cache.store(key(&format!("big{at}.example.")), &found(60), wire(65_000), now);
        }
        assert!(cache.bytes <= BYTES_MAX, "{}", cache.bytes);
        assert!(cache.find(&key("big199.example."), now).is_some());
        // One name over and over is one entry, and leaves no trail.
        for _ in 0..3 * ENTRIES_MAX {
            cache.store(key("same.example."), &found(60), wire(50), now);
        }
        assert!(cache.order.len() <= ENTRIES_MAX && cache.find(&key("same.example."), now).is_some());
        assert_eq!(cache.bytes, cache.entries.values().map(|entry| entry.wire.len()).sum::<usize>());
    }
}
