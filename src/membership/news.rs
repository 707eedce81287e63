//! News on its way: what this node passes on, how often, and what goes first.
//!
//! ```text
//!   add -> one item per subject, the newest -> fill: least often sent first, as much as the packet takes -> copies sent: gone
//! ```
//!
//! Invariants: one item per subject, so that news about one member drives out the older; at most [`ITEMS_MAX`] items; an
//! item goes out as often as it takes to reach everybody by chance, and no more.
//!
//! Not here: whom it is sent to (`ring`), when (`effects`), whether it is true (`inbound`, the owner).

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::id::Life;
use super::packet::{self, Broadcast};
use super::statement::Statement;
use crate::model::{Generation, NodeName};
use crate::wire;

/// Most items: 2 MB of the usual size. What is driven out is repaired by comparing (records) and by feeds (lives).
pub(super) const ITEMS_MAX: usize = 8192;
/// How many items that do not fit are passed over while one packet is filled.
const MISFITS_MAX: usize = 8;
/// The smallest item is larger: a packet with less room is full.
const ROOM_MIN: usize = 24;

/// What an item is about: at most four per node, and one per accusation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Records(NodeName),
    Leave(NodeName),
    Life(NodeName),
    /// The accused, the accuser.
    Accuse(NodeName, Option<NodeName>),
    Demand(NodeName),
}

/// Orders the news about one subject: the greater is the newer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Records(Generation, u64),
    Life(Life, u16),
    Demand(Life, u32),
}

#[derive(Debug)]
struct Item {
    subject: Subject,
    rank: Rank,
    bytes: Bytes,
    sent: u32,
    /// It is not sent more often.
    most: u32,
}

/// Everything that is on its way from this node.
#[derive(Debug, Default)]
pub(super) struct News {
    items: BTreeMap<u64, Item>,
    by_subject: BTreeMap<Subject, u64>,
    /// The bytes of every item: most of what comes in a storm is what goes out.
    bytes: BTreeSet<Bytes>,
    /// How often each was sent, and which: the first goes first.
    order: BTreeSet<(u32, u64)>,
    number: u64,
    /// Bytes of all items in packets.
    weight: usize,
}

fn classify(broadcast: &Broadcast) -> (Subject, Rank) {
    match broadcast {
        Broadcast::Delta { node, generation, version, .. } | Broadcast::IHave { node, generation, version, .. } => {
            (Subject::Records(node.clone()), Rank::Records(*generation, *version))
        }
        Broadcast::Said(Statement::Leave(leave)) => (Subject::Leave(leave.node.clone()), Rank::Life(leave.life, 0)),
        Broadcast::Said(Statement::Life(claim)) => {
            (Subject::Life(claim.id.name.clone()), Rank::Life(claim.id.life, claim.incarnation))
        }
        Broadcast::Said(Statement::Accuse(word)) => {
            let subject = Subject::Accuse(word.accused.clone(), Some(word.accuser.clone()));
            (subject, Rank::Life(word.life, word.incarnation))
        }
        Broadcast::Said(Statement::Demand(claim)) => {
            (Subject::Demand(claim.node.clone()), Rank::Demand(claim.life, claim.number))
        }
    }
}

impl News {
    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    /// Bytes that all items take in packets.
    pub(super) fn weight(&self) -> usize {
        self.weight
    }

    pub(super) fn clear(&mut self) {
        self.weight = 0;
        self.items.clear();
        self.by_subject.clear();
        self.bytes.clear();
        self.order.clear();
    }

    /// Whether `item`, as it stands in a packet, is on its way from here.
    pub(super) fn holds(&self, item: &[u8]) -> bool {
        self.bytes.contains(item)
    }

    /// Takes `broadcast` in; false if something newer about its subject waits already, or it is too large.
    pub(super) fn add(&mut self, broadcast: &Broadcast) -> bool {
        self.add_at_most(broadcast, u32::MAX)
    }

    /// As [`News::add`]; it goes out `most` times at most.
    pub(super) fn add_at_most(&mut self, broadcast: &Broadcast, most: u32) -> bool {
        let Ok(bytes) = wire::encode(broadcast) else { return false };
        if bytes.len() > packet::BROADCAST_BYTES_MAX {
            return false;
        }
        let (subject, rank) = classify(broadcast);
        if let Some(number) = self.by_subject.get(&subject).copied() {
            if self.items.get(&number).is_some_and(|item| item.rank > rank) {
                return false;
            }
            self.remove(number);
        }
        if let (Subject::Life(name), Rank::Life(..)) = (&subject, rank) {
            self.drop_refuted(name, rank);
        }
        if self.items.len() >= ITEMS_MAX
            && let Some((_, number)) = self.order.last().copied()
        {
            self.remove(number);
        }
        self.number += 1;
        self.order.insert((0, self.number));
        self.by_subject.insert(subject.clone(), self.number);
        let bytes = Bytes::from(bytes);
        self.weight += packet::weight_of(&bytes);
        self.bytes.insert(bytes.clone());
        self.items.insert(self.number, Item { subject, rank, bytes, sent: 0, most });
        true
    }

    /// Drops the accusations that a member's own word refutes.
    fn drop_refuted(&mut self, accused: &NodeName, word: Rank) {
        let about = self.by_subject.range(Subject::Accuse(accused.clone(), None)..);
        let about = about.take_while(|(subject, _)| matches!(subject, Subject::Accuse(of, _) if of == accused));
        let refuted = |number: &u64| self.items.get(number).is_some_and(|item| item.rank < word);
        let refuted: Vec<u64> = about.map(|(_, number)| *number).filter(refuted).collect();
        for number in refuted {
            self.remove(number);
        }
    }

    fn remove(&mut self, number: u64) {
        if let Some(item) = self.items.remove(&number) {
            self.weight -= packet::weight_of(&item.bytes);
            self.by_subject.remove(&item.subject);
            self.bytes.remove(&item.bytes);
            self.order.remove(&(item.sent, number));
        }
    }

    /// Fills `packet` with what was sent least often; what has been sent `copies` times is done.
    pub(super) fn fill(&mut self, packet: &mut Vec<u8>, copies: u32) {
        let mut taken = Vec::new();
        let mut misfits = 0;
        for (_, number) in &self.order {
            if misfits >= MISFITS_MAX || packet.len() + ROOM_MIN > packet::PACKET_BYTES_MAX {
                break;
            }
            let Some(item) = self.items.get(number) else { continue };
            if packet::append_bytes(packet, &item.bytes) {
                taken.push(*number);
            } else {
                misfits += 1;
            }
        }
        for number in taken {
            let Some(item) = self.items.get_mut(&number) else { continue };
            self.order.remove(&(item.sent, number));
            item.sent += 1;
            self.order.insert((item.sent, number));
            if item.sent >= copies.min(item.most) {
                self.remove(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::id::MeshId;
    use crate::membership::packet::PACKET_BYTES_MAX;
    use crate::membership::statement::{Accusation, Certainty, Leave, LifeClaim};

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    fn records(node: &str, version: u64) -> Broadcast {
        Broadcast::IHave { node: name(node), generation: Generation::default(), version, hash: 1 }
    }

    fn life(node: &str, incarnation: u16) -> Broadcast {
        let id = MeshId::new(name(node), "127.0.0.1:1".parse().unwrap(), Generation::default());
        Broadcast::Said(Statement::Life(LifeClaim { id, incarnation, signature: vec![1; 72] }))
    }

    fn accusation(of: &str, incarnation: u16, by: &str) -> Broadcast {
        let (accused, accuser, life) = (name(of), name(by), Life::default());
        let certainty = Certainty::Silent;
        let word = Accusation { accused, life, incarnation, certainty, accuser, signature: vec![1; 72] };
        Broadcast::Said(Statement::Accuse(word))
    }

    #[test]
    fn news_about_one_subject_drives_out_the_older_and_never_the_newer() {
        let mut news = News::default();
        assert!(news.add(&records("x", 5)) && news.add(&records("y", 1)) && news.add(&records("x", 6)));
        assert_eq!(news.len(), 2);
        assert!(!news.add(&records("x", 5)) && news.add(&records("x", 6)), "an equal one begins anew");
        let in_packet = |broadcast: &Broadcast| wire::encode(broadcast).unwrap();
        assert!(news.holds(&in_packet(&records("x", 6))) && !news.holds(&in_packet(&records("x", 5))));
        assert_eq!(news.bytes.len(), news.len());
        let taken: usize = [records("x", 6), records("y", 1)].iter().map(|item| in_packet(item).len() + 2).sum();
        assert_eq!(news.weight(), taken);
        let leave = Leave { node: name("x"), life: Life::default(), prune: false, by: name("x"), signature: vec![] };
        assert!(news.add(&Broadcast::Said(Statement::Leave(leave))), "records do not silence a goodbye");
        assert_eq!(news.len(), 3);
    }

    #[test]
    fn a_members_own_word_ends_the_accusations_that_it_refutes_and_no_others() {
        let mut news = News::default();
        for word in [accusation("x", 1, "a"), accusation("x", 1, "b"), accusation("x", 2, "c"), accusation("y", 1, "a")]
        {
            assert!(news.add(&word));
        }
        assert!(news.add(&life("x", 2)));
        assert_eq!(news.len(), 3, "the accusation of the present incarnation and the one of another stay");
    }

    #[test]
    fn each_item_goes_out_as_often_as_it_should_and_the_least_sent_first() {
        let mut news = News::default();
        for number in 0..30 {
            news.add(&life(&format!("n{number}"), 0));
        }
        let mut packets = 0;
        let mut bytes = 0;
        while !news.is_empty() {
            let mut packet = vec![0; 60];
            news.fill(&mut packet, 4);
            assert!(packet.len() > 60 && packet.len() <= PACKET_BYTES_MAX);
            bytes += packet.len() - 60;
            packets += 1;
            if packets == 4 {
                assert_eq!(news.len(), 30, "all are on their way before any is done");
            }
        }
        let each = wire::encode(&life("n10", 0)).unwrap().len() + 2;
        assert!((each * 30 * 4 - bytes) < 200, "{bytes} bytes in {packets} packets");
    }

    #[test]
    fn what_is_repaired_otherwise_goes_out_less_often() {
        let mut news = News::default();
        assert!(news.add_at_most(&life("few", 0), 2) && news.add(&life("many", 0)));
        let sizes = std::iter::repeat_with(|| {
            let mut packet = vec![0; 60];
            news.fill(&mut packet, 4);
            packet.len()
        });
        let sizes: Vec<usize> = sizes.take(5).collect();
        assert!(sizes[0] == sizes[1] && sizes[1] > sizes[2] && sizes[2] == sizes[3], "both, then one: {sizes:?}");
        assert!(sizes[3] > 60 && sizes[4] == 60, "{sizes:?}");
        assert_eq!(news.weight(), 0);
    }

    #[test]
    fn the_queue_is_bounded_and_gives_up_what_was_sent_most() {
        let mut news = News::default();
        for number in 0..ITEMS_MAX {
            news.add(&records(&format!("n{number}"), 1));
        }
        let mut packet = Vec::new();
        news.fill(&mut packet, 9);
        news.add(&records("late", 1));
        assert_eq!(news.len(), ITEMS_MAX);
        assert!(news.by_subject.contains_key(&Subject::Records(name("late"))));
        assert!(!news.by_subject.contains_key(&Subject::Records(name("n0"))) || news.order.last().unwrap().0 <= 1);
    }
}
