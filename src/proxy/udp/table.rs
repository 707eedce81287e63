//! The flows of one local port: who of this host's apps talks, and how far each is. A pure core.
//!
//! ```text
//!   datagram of an unknown source -> Opening {what waits} --opened--> Open --end | expire | evict--> gone
//!                                         `------ rest ------> Resting until .. --datagram--> Opening
//!                                         Open --leave--> Leaving: its answers alone --end | expire | evict--> gone
//! ```
//!
//! A flow is a source address and what it sends, until it is silent for a while: UDP knows no end.
//! Invariants: at most [`Bounds::flows`] flows, those that leave among them and the first to give way, then the one silent for
//! longest, unless it still opens: so no more are being opened at once either; what waits for a flow to open is bounded in number and bytes; a report about a flow that is
//! gone, or came anew, changes nothing (flows are numbered).
//! Not here: sockets, tasks, whom a flow leads to (`outbound`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use foldhash::HashMap;
use tokio::time::Instant;

/// A flow moves up in the order of use at most this often: a datagram is then one look into a map.
pub(super) const MOVED_UP_EVERY: Duration = Duration::from_secs(1);

/// Flows that are looked at when one is to give way: where as many of the oldest still open, the others do as well.
const LOOKED_AT_MAX: usize = 32;

/// What one table holds at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Flows.
    pub(super) flows: usize,
    /// Datagrams that wait for one flow to open.
    pub(super) waiting: usize,
    /// Bytes that wait for all flows of the table to open.
    pub(super) waiting_bytes: usize,
}

/// Why a datagram was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Dropped {
    /// Larger than the path to the other node carries.
    Oversize,
    /// As many as may wait for their flow to open.
    Waiting,
    /// The caller may not.
    Denied,
    /// No instance can be had.
    NoInstance,
    /// As many flows as there may be.
    Full,
    /// This agent stops: no new flows.
    Draining,
    /// The tunnel takes no more for now.
    Congested,
    /// The socket towards the app takes none, or the app's host refused it.
    Socket,
}

impl Dropped {
    /// Returns the label.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Oversize => "oversize",
            Self::Waiting => "waiting",
            Self::Denied => "denied",
            Self::NoInstance => "no_instance",
            Self::Full => "full",
            Self::Draining => "draining",
            Self::Congested => "congested",
            Self::Socket => "socket",
        }
    }
}

/// What is to be done with a datagram.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict<H> {
    /// It goes into this flow.
    Send(H),
    /// It waits for this flow, which is to be opened.
    Open {
        /// The flow's number.
        number: u64,
        /// What gave way.
        gone: Option<Gone<H>>,
    },
    /// It waits for a flow that opens already.
    Wait,
    /// It is dropped.
    Drop(Dropped),
}

/// A flow that was taken out of the table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone<H> {
    /// What it was opened as; none: it was not yet, and [`FlowTable::opened`] will say so.
    pub(super) handle: Option<H>,
    /// Datagrams that waited for it.
    pub(super) lost: usize,
}

#[derive(Debug)]
enum State<H> {
    Opening(Vec<Bytes>),
    Open(H),
    Resting { until: Instant, why: Dropped },
}

#[derive(Debug)]
struct Flow<H, P> {
    number: u64,
    used_at: Instant,
    /// Its place in the order of use.
    turn: u64,
    /// Counts it among all flows of the worker.
    place: P,
    state: State<H>,
}

/// A flow whose new datagrams go elsewhere.
#[derive(Debug)]
struct Leaving<H, P> {
    since: Instant,
    handle: H,
    place: P,
}

/// The flows of one port; `H` is what an open flow is sent by, `P` its place among all flows of the worker.
#[derive(Debug)]
pub(super) struct FlowTable<H, P> {
    bounds: Bounds,
    flows: HashMap<SocketAddr, Flow<H, P>>,
    /// Ascending by `used_at`.
    by_turn: BTreeMap<u64, SocketAddr>,
    /// By number; a source address may have left several.
    leaving: BTreeMap<u64, Leaving<H, P>>,
    /// Numbers and turns given out.
    given: u64,
    waiting_bytes: usize,
    is_closed: bool,
}

impl<H: Clone, P> FlowTable<H, P> {
    /// Holds nothing yet.
    pub(super) fn new(bounds: Bounds) -> Self {
        let (flows, by_turn, leaving) = (HashMap::default(), BTreeMap::new(), BTreeMap::new());
        Self { bounds, flows, by_turn, leaving, given: 0, waiting_bytes: 0, is_closed: false }
    }

    /// Tells whether it holds no flow.
    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.leaving.is_empty()
    }

    /// Takes no new flows from here on.
    pub(super) fn close(&mut self) {
        self.is_closed = true;
    }

    /// Takes a datagram of `from` in. `place` counts a new flow among those of the worker; where it gives none, or the
    /// table is full, one that leaves gives way, or the one that is silent for longest, unless all still open.
    pub(super) fn datagram(
        &mut self,
        from: SocketAddr,
        payload: &[u8],
        now: Instant,
        place: impl FnOnce() -> Option<P>,
    ) -> Verdict<H> {
        let has_room = self.waiting_bytes.saturating_add(payload.len()) <= self.bounds.waiting_bytes;
        let given = &mut self.given;
        let Some(flow) = self.flows.get_mut(&from) else { return self.begin(from, payload, now, place) };
        move_up(&mut self.by_turn, given, flow, from, now);
        match &mut flow.state {
            State::Open(handle) => return Verdict::Send(handle.clone()),
            State::Resting { until, why } if now < *until => return Verdict::Drop(*why),
            State::Opening(waiting) if waiting.len() >= self.bounds.waiting => return Verdict::Drop(Dropped::Waiting),
            _ if !has_room => return Verdict::Drop(Dropped::Waiting),
            State::Resting { .. } if self.is_closed => return Verdict::Drop(Dropped::Draining),
            State::Opening(waiting) => {
                self.waiting_bytes += payload.len();
                waiting.push(Bytes::copy_from_slice(payload));
                return Verdict::Wait;
            }
            State::Resting { .. } => {}
        }
        // It has rested: whoever reports of the time before is not heard.
        *given += 1;
        flow.number = *given;
        flow.state = State::Opening(vec![Bytes::copy_from_slice(payload)]);
        self.waiting_bytes += payload.len();
        Verdict::Open { number: flow.number, gone: None }
    }

    /// Begins a flow.
    fn begin(
        &mut self,
        from: SocketAddr,
        payload: &[u8],
        now: Instant,
        place: impl FnOnce() -> Option<P>,
    ) -> Verdict<H> {
        if self.is_closed {
            return Verdict::Drop(Dropped::Draining);
        }
        if self.waiting_bytes.saturating_add(payload.len()) > self.bounds.waiting_bytes {
            return Verdict::Drop(Dropped::Waiting);
        }
        let own = if self.flows.len() + self.leaving.len() < self.bounds.flows { place() } else { None };
        let (place, gone) = match own {
            Some(place) => (place, None),
            None => {
                match self.take_leaving().or_else(|| self.take_first(|state| !matches!(state, State::Opening(_)))) {
                    Some((place, gone)) => (place, Some(gone)),
                    None => return Verdict::Drop(Dropped::Full),
                }
            }
        };
        self.given += 1;
        let number = self.given;
        let state = State::Opening(vec![Bytes::copy_from_slice(payload)]);
        self.waiting_bytes += payload.len();
        self.by_turn.insert(number, from);
        self.flows.insert(from, Flow { number, used_at: now, turn: number, place, state });
        Verdict::Open { number, gone }
    }

    /// Notes that a flow is open, and returns what waited for it; none: it is not wanted any more.
    pub(super) fn opened(&mut self, from: SocketAddr, number: u64, handle: H) -> Option<Vec<Bytes>> {
        let flow = self.flows.get_mut(&from).filter(|flow| flow.number == number)?;
        let State::Opening(waiting) = &mut flow.state else { return None };
        let waiting = std::mem::take(waiting);
        flow.state = State::Open(handle);
        self.waiting_bytes = self.waiting_bytes.saturating_sub(waiting.iter().map(Bytes::len).sum());
        Some(waiting)
    }

    /// Notes that a flow cannot be opened; its datagrams are dropped until `until`. Returns how many waited.
    pub(super) fn rest(&mut self, from: SocketAddr, number: u64, why: Dropped, until: Instant) -> usize {
        let Some(flow) = self.flows.get_mut(&from).filter(|flow| flow.number == number) else { return 0 };
        let State::Opening(waiting) = &mut flow.state else { return 0 };
        let waiting = std::mem::take(waiting);
        flow.state = State::Resting { until, why };
        self.waiting_bytes = self.waiting_bytes.saturating_sub(waiting.iter().map(Bytes::len).sum());
        waiting.len()
    }

    /// Notes that a flow was used.
    pub(super) fn touch(&mut self, from: SocketAddr, number: u64, now: Instant) {
        if let Some(flow) = self.flows.get_mut(&from).filter(|flow| flow.number == number) {
            move_up(&mut self.by_turn, &mut self.given, flow, from, now);
        }
    }

    /// Has new datagrams begin another flow; this one, if it is open, keeps its place for answers until it ends, gives way or
    /// expires.
    pub(super) fn leave(&mut self, from: SocketAddr, number: u64, now: Instant) {
        let is_open = |flow: &Flow<H, P>| flow.number == number && matches!(flow.state, State::Open(_));
        if self.flows.get(&from).is_some_and(is_open)
            && let Some((place, Gone { handle: Some(handle), .. })) = self.take(from)
        {
            self.leaving.insert(number, Leaving { since: now, handle, place });
        }
    }

    /// Takes a flow out, if it is still the one of this number.
    pub(super) fn end(&mut self, from: SocketAddr, number: u64) -> bool {
        let is_same = self.flows.get(&from).is_some_and(|flow| flow.number == number);
        if is_same { self.take(from).is_some() } else { self.leaving.remove(&number).is_some() }
    }

    /// Takes out a flow that leaves, or the open one that is silent for longest.
    pub(super) fn evict(&mut self) -> Option<H> {
        let taken = self.take_leaving().or_else(|| self.take_first(|state| matches!(state, State::Open(_))));
        taken?.1.handle
    }

    /// Takes out what is silent for `idle`, to the second, and what left that long ago.
    pub(super) fn expire(&mut self, now: Instant, idle: Duration) -> Vec<Gone<H>> {
        let is_over = |_: &u64, flow: &mut Leaving<H, P>| now.saturating_duration_since(flow.since) >= idle;
        let left = self.leaving.extract_if(.., is_over);
        let mut gone: Vec<Gone<H>> = left.map(|(_, flow)| Gone { handle: Some(flow.handle), lost: 0 }).collect();
        while let Some(from) = self.by_turn.first_key_value().map(|(_, from)| *from) {
            let is_silent =
                self.flows.get(&from).is_none_or(|flow| now.saturating_duration_since(flow.used_at) >= idle);
            if !is_silent {
                break;
            }
            match self.take(from) {
                Some((_, flow)) => gone.push(flow),
                None => drop(self.by_turn.pop_first()),
            }
        }
        gone
    }

    /// Takes the flow that left first, among those that still do.
    fn take_leaving(&mut self) -> Option<(P, Gone<H>)> {
        let (_, flow) = self.leaving.pop_first()?;
        Some((flow.place, Gone { handle: Some(flow.handle), lost: 0 }))
    }

    /// Takes the first one in the order of use whose state is wanted, of those silent for longest.
    fn take_first(&mut self, is_wanted: impl Fn(&State<H>) -> bool) -> Option<(P, Gone<H>)> {
        let is_found = |from: &&SocketAddr| self.flows.get(*from).is_some_and(|flow| is_wanted(&flow.state));
        let from = *self.by_turn.values().take(LOOKED_AT_MAX).find(is_found)?;
        self.take(from)
    }

    fn take(&mut self, from: SocketAddr) -> Option<(P, Gone<H>)> {
        let flow = self.flows.remove(&from)?;
        self.by_turn.remove(&flow.turn);
        let gone = match flow.state {
            State::Open(handle) => Gone { handle: Some(handle), lost: 0 },
            State::Resting { .. } => Gone { handle: None, lost: 0 },
            State::Opening(waiting) => {
                self.waiting_bytes = self.waiting_bytes.saturating_sub(waiting.iter().map(Bytes::len).sum());
                Gone { handle: None, lost: waiting.len() }
            }
        };
        Some((flow.place, gone))
    }
}

/// Puts a flow at the end of the order of use, unless it came there lately.
fn move_up<H, P>(
    by_turn: &mut BTreeMap<u64, SocketAddr>,
    given: &mut u64,
    flow: &mut Flow<H, P>,
    from: SocketAddr,
    now: Instant,
) {
    if now.saturating_duration_since(flow.used_at) < MOVED_UP_EVERY {
        return;
    }
    by_turn.remove(&flow.turn);
    *given += 1;
    (flow.turn, flow.used_at) = (*given, now);
    by_turn.insert(*given, from);
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::*;

    const IDLE: Duration = Duration::from_secs(60);
    const BOUNDS: Bounds = Bounds { flows: 3, waiting: 2, waiting_bytes: 10 };

    type Table = FlowTable<&'static str, ()>;

    fn start() -> Instant {
        use std::sync::LazyLock;
        static START: LazyLock<Instant> = LazyLock::new(crate::clock::now);
        *START
    }

    fn at(seconds: u64) -> Instant {
        start() + Duration::from_secs(seconds)
    }

    fn source(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    fn send(table: &mut Table, port: u16, payload: &[u8], seconds: u64) -> Verdict<&'static str> {
        table.datagram(source(port), payload, at(seconds), || Some(()))
    }

    #[track_caller]
    fn open(table: &mut Table, port: u16, handle: &'static str, seconds: u64) -> u64 {
        let Verdict::Open { number, .. } = send(table, port, b"x", seconds) else { panic!("{port} is known") };
        assert_eq!(table.opened(source(port), number, handle).unwrap(), [&b"x"[..]]);
        number
    }

    #[test]
    fn what_comes_before_a_flow_is_open_waits_in_order_and_within_bounds() {
        let mut table = Table::new(BOUNDS);
        let Verdict::Open { number, gone: None } = send(&mut table, 1, b"one", 0) else { panic!() };
        assert_eq!(send(&mut table, 1, b"two", 0), Verdict::Wait);
        assert_eq!(send(&mut table, 1, b"three", 0), Verdict::Drop(Dropped::Waiting), "two may wait");
        // Of all flows together: 6 of 10 bytes are taken.
        assert_eq!(send(&mut table, 2, b"12345", 0), Verdict::Drop(Dropped::Waiting));
        let Verdict::Open { number: second, .. } = send(&mut table, 2, b"1234", 0) else { panic!() };
        assert_eq!(table.opened(source(1), number, "h").unwrap(), [&b"one"[..], b"two"]);
        assert_eq!(send(&mut table, 1, b"four", 0), Verdict::Send("h"));
        assert_eq!(send(&mut table, 2, b"567890", 0), Verdict::Wait, "what was taken is free again");
        assert_eq!(table.rest(source(2), second, Dropped::Denied, at(5)), 2);
        assert_eq!(table.waiting_bytes, 0);
    }

    #[test]
    fn a_flow_that_was_denied_is_tried_again_once_it_has_rested() {
        let mut table = Table::new(BOUNDS);
        let Verdict::Open { number, .. } = send(&mut table, 1, b"x", 0) else { panic!() };
        assert_eq!(table.rest(source(1), number, Dropped::Denied, at(5)), 1);
        assert_eq!(send(&mut table, 1, b"x", 4), Verdict::Drop(Dropped::Denied));
        let Verdict::Open { number: again, gone: None } = send(&mut table, 1, b"x", 5) else { panic!() };
        assert_eq!(table.opened(source(1), number, "late"), None, "of the time before");
        assert!(table.opened(source(1), again, "h").is_some());
    }

    #[test]
    fn so_many_datagrams_wait_for_a_flow_and_none_for_one_that_would_begin_while_it_drains() {
        let mut table = Table::new(Bounds { waiting_bytes: 1 << 20, ..BOUNDS });
        let verdicts: Vec<_> = (0..BOUNDS.waiting + 3).map(|_| send(&mut table, 1, b"x", 0)).collect();
        let count = |of: &dyn Fn(&Verdict<&'static str>) -> bool| verdicts.iter().filter(|one| of(one)).count();
        assert_eq!(count(&|one| *one == Verdict::Wait), BOUNDS.waiting - 1);
        assert_eq!(count(&|one| *one == Verdict::Drop(Dropped::Waiting)), 3);
        let Some(Verdict::Open { number, .. }) = verdicts.first() else { panic!() };
        table.rest(source(1), *number, Dropped::Denied, at(5));
        table.close();
        assert_eq!(send(&mut table, 1, b"x", 6), Verdict::Drop(Dropped::Draining));
    }

    #[test]
    fn the_flow_that_is_silent_for_longest_gives_way_with_its_place() {
        let mut table = FlowTable::new(BOUNDS);
        let places = Rc::new(Cell::new(0));
        let send = |table: &mut FlowTable<u16, Rc<()>>, port: u16, seconds: u64, free: bool| {
            let take = || {
                places.set(places.get() + 1);
                Rc::new(())
            };
            let place = || free.then(take);
            match table.datagram(source(port), b"x", at(seconds), place) {
                Verdict::Open { number, gone } => {
                    table.opened(source(port), number, port);
                    gone.map(|gone| gone.handle)
                }
                verdict => {
                    assert_eq!(verdict, Verdict::Send(port));
                    None
                }
            }
        };
        for port in [1, 2, 3] {
            assert_eq!(send(&mut table, port, 0, true), None);
        }
        assert_eq!(send(&mut table, 1, 2, true), None, "used again");
        assert_eq!(send(&mut table, 4, 3, true), Some(Some(2)));
        assert_eq!(table.flows.len(), 3);
        // The worker has no place left: one of this table's is taken over.
        table.end(source(3), table.flows[&source(3)].number);
        assert_eq!(send(&mut table, 5, 4, false), Some(Some(1)));
        assert_eq!(places.get(), 3, "no place was asked for where there is none, nor where the table is full");
        assert_eq!(table.evict(), Some(4));
        assert_eq!(table.evict(), Some(5));
        assert_eq!(table.evict(), None);
        let none = table.datagram(source(9), b"x", at(5), || None);
        assert_eq!(none, Verdict::Drop(Dropped::Full));
    }

    #[test]
    fn a_flood_of_new_sources_opens_no_more_flows_than_there_may_be() {
        let mut table = Table::new(BOUNDS);
        let verdicts: Vec<_> = (1..=100).map(|port| send(&mut table, port, b"x", 0)).collect();
        let opened = verdicts.iter().filter(|verdict| matches!(verdict, Verdict::Open { gone: None, .. })).count();
        let full = verdicts.iter().filter(|verdict| **verdict == Verdict::Drop(Dropped::Full)).count();
        assert_eq!((opened, full), (3, 97));
    }

    #[test]
    fn silence_ends_a_flow_and_either_direction_keeps_it() {
        let mut table = Table::new(BOUNDS);
        let one = open(&mut table, 1, "one", 0);
        open(&mut table, 2, "two", 0);
        table.touch(source(1), one, at(30));
        table.touch(source(1), one + 100, at(80));
        assert_eq!(table.expire(at(59), IDLE), []);
        assert_eq!(table.expire(at(60), IDLE), [Gone { handle: Some("two"), lost: 0 }]);
        assert_eq!(table.expire(at(89), IDLE), [], "an answer came at 30");
        assert_eq!(table.expire(at(90), IDLE), [Gone { handle: Some("one"), lost: 0 }]);
        assert!(table.is_empty() && table.by_turn.is_empty());
    }

    #[test]
    fn a_closed_table_carries_what_it_has_and_begins_nothing() {
        let mut table = Table::new(BOUNDS);
        let number = open(&mut table, 1, "one", 0);
        table.close();
        assert_eq!(send(&mut table, 1, b"x", 1), Verdict::Send("one"));
        assert_eq!(send(&mut table, 2, b"x", 1), Verdict::Drop(Dropped::Draining));
        assert!(!table.end(source(1), number + 1) && table.end(source(1), number) && table.is_empty());
    }

    #[test]
    fn a_flow_that_leaves_keeps_its_place_for_a_while_and_is_the_first_to_give_it() {
        let mut table = Table::new(BOUNDS);
        let left = ["a", "b", "c"].map(|handle| {
            let number = open(&mut table, 1, handle, 0);
            table.leave(source(1), number, at(1));
            number
        });
        // A destination that says so again and again opens no more than there may be.
        let Verdict::Open { number, gone } = send(&mut table, 1, b"x", 1) else { panic!() };
        assert_eq!(gone, Some(Gone { handle: Some("a"), lost: 0 }));
        table.opened(source(1), number, "d").unwrap();
        assert!(!table.end(source(1), left[0]) && table.end(source(1), left[1]), "one gave way, one came to its end");
        assert_eq!(send(&mut table, 1, b"x", 2), Verdict::Send("d"), "its successor is another");
        // Where a limit is reached elsewhere than here it goes first as well.
        let last = open(&mut table, 2, "e", 2);
        assert_eq!((table.evict(), table.evict()), (Some("c"), Some("d")));
        table.leave(source(2), last + 1, at(2));
        assert_eq!(send(&mut table, 2, b"x", 2), Verdict::Send("e"), "another one left");
        table.leave(source(2), last, at(2));
        assert_eq!(table.expire(at(61), IDLE), []);
        assert!(!table.is_empty(), "the drain waits for it");
        assert_eq!(table.expire(at(62), IDLE), [Gone { handle: Some("e"), lost: 0 }]);
        assert!(table.is_empty());
    }

    proptest! {
        #[test]
        fn any_history_stays_within_the_bounds_and_in_order(
            steps in prop::collection::vec((0_u8..7, 0_u16..6, 0_u64..8, 0_usize..6), 0..200),
        ) {
            let mut table: FlowTable<u64, ()> = FlowTable::new(BOUNDS);
            let (mut now, mut numbers) = (0, std::collections::HashMap::new());
            for (what, port, passes, bytes) in steps {
                now += passes;
                let number = numbers.get(&port).copied().unwrap_or(0);
                match what {
                    0..=2 => {
                        let verdict = table.datagram(source(port), &[0; 6][..bytes], at(now), || Some(()));
                        if let Verdict::Open { number, .. } = verdict {
                            numbers.insert(port, number);
                        }
                    }
                    3 => drop(table.opened(source(port), number, number)),
                    4 => {
                        table.rest(source(port), number, Dropped::Denied, at(now + 3));
                    }
                    5 => table.leave(source(port), number, at(now)),
                    _ => drop(table.expire(at(now), Duration::from_secs(10))),
                }
                let waiting = |flow: &Flow<u64, ()>| match &flow.state {
                    State::Opening(waiting) => waiting.iter().map(Bytes::len).sum(),
                    _ => 0,
                };
                prop_assert!(table.flows.len() + table.leaving.len() <= BOUNDS.flows);
                prop_assert!(table.waiting_bytes <= BOUNDS.waiting_bytes);
                prop_assert_eq!(table.waiting_bytes, table.flows.values().map(waiting).sum::<usize>());
                prop_assert_eq!(table.by_turn.len(), table.flows.len());
                let used: Vec<Instant> = table.by_turn.values().map(|from| table.flows[from].used_at).collect();
                prop_assert!(used.is_sorted());
            }
        }
    }
}
