//! Leaving: the goodbye, and peers that say that they heard it.
//!
//! A goodbye goes to many members as a datagram, which may be lost. So some peers are asked on a stream to confirm it;
//! each of them spreads it and ends the connection, mostly before its answer is out: either is a confirmation
//! ([`MEMBER_LEFT`]). The node may go once [`HEARD_ENOUGH`] have, or nobody is left to ask.

use rand::seq::SliceRandom as _;

use super::message::{Exchange, Message, Request, Stage, Step};
use super::{Ending, Engine, Event, Turn};
use crate::model::{MemberStatus, NodeName};

/// Why a connection to a member that left is closed; to the one that left it says that its goodbye was heard.
pub const MEMBER_LEFT: &str = "member left";
/// Confirmations that are enough: each of these spreads the news by itself.
const HEARD_ENOUGH: usize = 3;
/// Most peers that are asked at once: some of them may be gone without anybody knowing.
const ASKED_MAX: usize = 2 * HEARD_ENOUGH;

/// The state of the goodbye.
#[derive(Debug)]
pub(super) struct Goodbye {
    /// Not asked yet.
    candidates: Vec<NodeName>,
    asked: usize,
    heard: usize,
    is_told: bool,
}

impl Engine {
    /// Says goodbye. What runs here is still shown here, as leaving. [`Event::GoodbyeHeard`] tells when it was heard.
    pub fn leave(&mut self, turn: &Turn<'_>) {
        let living = self.core.members().filter(|member| member.status == MemberStatus::Alive);
        let mut candidates: Vec<NodeName> = living.map(|member| member.id.name.clone()).collect();
        candidates.shuffle(&mut self.rng);
        self.core.leave();
        self.goodbye.get_or_insert(Goodbye { candidates, asked: 0, heard: 0, is_told: false });
        self.dirty.insert(self.node.name.clone());
        self.are_members_dirty = true;
        self.settle(turn);
    }

    /// Asks as many peers as may still be needed.
    pub(super) fn say_goodbyes(&mut self) {
        let Some(leave) = self.core.goodbye().cloned() else { return };
        loop {
            let Some(goodbye) = self.goodbye.as_mut() else { return };
            let is_enough = goodbye.heard >= HEARD_ENOUGH;
            if !is_enough
                && goodbye.asked < ASKED_MAX
                && let Some(peer) = goodbye.candidates.pop()
            {
                goodbye.asked += 1;
                let first = Step::Say(Message::Request(Request::Goodbye(leave.clone())), Stage::Leaving);
                self.begin(&peer, Exchange::Goodbye(peer.clone()), first);
                continue;
            }
            if (is_enough || goodbye.asked == 0) && !goodbye.is_told {
                goodbye.is_told = true;
                let heard = goodbye.heard;
                self.tell(Event::GoodbyeHeard(heard));
            }
            return;
        }
    }

    pub(super) fn goodbye_ended(&mut self, ending: Ending) {
        if let Some(goodbye) = &mut self.goodbye {
            goodbye.asked = goodbye.asked.saturating_sub(1);
            goodbye.heard += usize::from(ending == Ending::Complete);
        }
    }
}
