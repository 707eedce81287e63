//! Carries what all agents hold alike, signed documents and shared records, from agent to agent.
//!
//! ```text
//!   owner task: push, spread -> Pushes --a stream each--\           /-> Event::Pushed, Event::Compared
//!   members, timers ----------> Rounds --a stream each---+-> peers -+
//!                                                                   \-> Event::Round: time for what ends by itself
//!   a peer's stream -> Talk -> Places (for what is large) -> questions to the owner task
//! ```
//!
//! One carrier for each owner task: it finds the connections, gives out places, chooses partners, repeats what failed and
//! bounds all of it. A [`Cargo`] says what goes over a stream: what an item is, how two sides tell what they lack. Who owns
//! the items decides what counts, keeps it, and answers what the streams ask.
//!
//! Invariants: what is news goes at once, in bounded numbers, to each peer in its order; a push that fails and a comparison
//! that fails lead to a comparison with the same peer a second later, and one that panics is one that failed: no place is
//! lost with it; nothing waits for a slow peer but what is for it.
//! Not here: what is said on a stream (`documents::carry`, `shared::carry`), which of two contents wins (`policy`, `lww`).

mod places;
mod pushes;
mod rounds;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::error;

pub(super) use self::places::Places;
use self::pushes::Pushes;
pub(super) use self::rounds::Found;
use self::rounds::Rounds;
use super::exchange::ExchangeError;
use super::reach::reach;
use super::{Command, MemberView, Members};
use crate::clock;
use crate::model::{MemberStatus, NodeName};
use crate::supervise::catch;
use crate::transport::ControlTransport;

/// How many members a node passes an item on to that it learned from another: with three, a mesh of 1,000 is through
/// after seven hops but for some 5 %, whom the origin's own pushes and the comparisons reach.
pub(super) const FORWARDS: usize = 3;

/// How much goes at once, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// What is carried, for the log.
    pub(super) name: &'static str,
    /// Most pushes under way.
    pub(super) pushes_max: usize,
    /// Most of them to one peer.
    pub(super) pushes_per_peer_max: usize,
    /// Most pushes that wait; beyond it an item is left to the comparisons.
    pub(super) pushes_waiting_max: usize,
    /// Longest push, its handshake included: a lost handshake packet costs QUIC a second.
    pub(super) push_time_max: Duration,
    /// Most comparisons under way that this node began.
    pub(super) compares_max: usize,
    /// Longest comparison, its handshake included.
    pub(super) compare_time_max: Duration,
}

/// What is carried: what is said on the streams. Its clones go with them.
pub(super) trait Cargo: Clone + Send + 'static {
    /// How much of it goes at once.
    const BOUNDS: Bounds;
    /// News for a peer.
    type Item: Clone + Send + 'static;
    /// What a peer made of it.
    type Took: Send + 'static;
    /// What a comparison told.
    type Compared: Send + 'static;

    /// Offers `item` to the peer at the other end of `connection`.
    fn push(
        self,
        connection: Connection,
        item: Self::Item,
    ) -> impl Future<Output = Result<Self::Took, ExchangeError>> + Send + 'static;

    /// Compares what both sides hold, and evens out what there is time for.
    fn compare(
        self,
        connection: Connection,
        peer: NodeName,
    ) -> impl Future<Output = Result<Self::Compared, ExchangeError>> + Send + 'static;

    /// What that means for the next comparison.
    fn found(compared: &Self::Compared) -> Found;
}

/// What happened.
pub(super) enum Event<C: Cargo> {
    /// A push ended. One that failed is made good by a comparison.
    Pushed { to: MemberView, item: C::Item, result: Result<C::Took, ExchangeError> },
    /// A comparison ended. One that failed is begun again.
    Compared(NodeName, Result<C::Compared, ExchangeError>),
    /// A round of comparisons began.
    Round,
}

/// What gossip gives its carriers.
#[derive(Clone)]
pub(super) struct Around {
    pub(super) own: NodeName,
    pub(super) transport: ControlTransport,
    pub(super) gossip: mpsc::Sender<Command>,
    pub(super) interval: Duration,
}

/// The carrier of one owner task.
pub(super) struct Carrier<C: Cargo> {
    cargo: C,
    around: Around,
    members: watch::Receiver<Arc<Members>>,
    have_members_ended: bool,
    rounds: Rounds,
    pushes: Pushes<C::Item>,
    rng: StdRng,
    work: JoinSet<Event<C>>,
}

impl<C: Cargo> Carrier<C> {
    /// Carries `cargo` between the agents of `members`; `seed` decides whom it chooses.
    pub(super) fn new(cargo: C, around: Around, members: watch::Receiver<Arc<Members>>, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let rounds = Rounds::new(around.interval, C::BOUNDS.compares_max, rng.random(), clock::now());
        Self {
            cargo,
            around,
            members,
            have_members_ended: false,
            rounds,
            pushes: Pushes::new(C::BOUNDS),
            rng,
            work: JoinSet::new(),
        }
    }

    /// Begins what is due and waits for the next event.
    ///
    /// # Cancel safety
    /// Cancelling loses nothing.
    pub(super) async fn next(&mut self) -> Event<C> {
        loop {
            if let Some(event) = self.begin_what_is_due() {
                return event;
            }
            tokio::select! {
                Some(ended) = self.work.join_next() => match ended {
                    Ok(ended) => return self.ended(ended),
                    Err(error) => error!(%error, cargo = C::BOUNDS.name, "an exchange with a peer failed in itself"),
                },
                changed = self.members.changed(), if !self.have_members_ended => {
                    self.have_members_ended = changed.is_err();
                    self.members_changed();
                }
                () = tokio::time::sleep_until(self.rounds.wake_at()) => {}
            }
        }
    }

    /// The others that still answer.
    pub(super) fn others(&self) -> Vec<MemberView> {
        let members = Arc::clone(&self.members.borrow());
        members.members.iter().filter(|member| self.is_other(member)).cloned().collect()
    }

    /// Pushes `item` to `to`; where too much waits, comparisons bring it.
    pub(super) fn push(&mut self, to: MemberView, item: C::Item) {
        if !self.pushes.push(to, item) {
            self.rounds.differs(clock::now());
        }
    }

    /// Pushes each of `items` to `most` others of whom `from` is none; where too much waits, comparisons bring the rest.
    pub(super) fn spread(&mut self, items: impl IntoIterator<Item = C::Item>, most: usize, from: Option<&NodeName>) {
        let members = Arc::clone(&self.members.borrow());
        let is_target = |member: &&MemberView| self.is_other(member) && Some(&member.name) != from;
        let others: Vec<&MemberView> = members.members.iter().filter(is_target).collect();
        for item in items {
            for to in others.sample(&mut self.rng, most) {
                if !self.pushes.push((*to).clone(), item.clone()) {
                    return self.rounds.differs(clock::now());
                }
            }
        }
    }

    /// Notes that a comparison may bring what the last ones could not: the next round comes within the interval.
    pub(super) fn look_soon(&mut self) {
        self.rounds.differs(clock::now());
    }

    /// Gives up what is under way.
    pub(super) async fn stop(&mut self) {
        self.work.shutdown().await;
    }

    /// A member that is leaving still answers, and what is said of it counts until it is gone.
    fn is_other(&self, member: &MemberView) -> bool {
        member.name != self.around.own && matches!(member.status, MemberStatus::Alive | MemberStatus::Leaving)
    }

    fn begin_what_is_due(&mut self) -> Option<Event<C>> {
        while let Some((to, item)) = self.pushes.begin_next() {
            self.start_push(to, item);
        }
        let now = clock::now();
        if now < self.rounds.wake_at() {
            return None;
        }
        let others = self.others();
        if let Some(peer) = self.rounds.repeat(&others, now) {
            self.start_comparison(peer);
        }
        if !self.rounds.is_round_due(now) {
            return None;
        }
        let (near, linked) = self.near_and_linked();
        if let Some(peer) = self.rounds.round(&others, &near, &linked, now) {
            self.start_comparison(peer);
        }
        Some(Event::Round)
    }

    /// The neighbours in a large mesh, and to whom connections lead.
    fn near_and_linked(&self) -> (BTreeSet<NodeName>, BTreeSet<NodeName>) {
        (self.members.borrow().neighbours.clone(), self.around.transport.live().nodes())
    }

    fn members_changed(&mut self) {
        let others = self.others();
        let (near, linked) = self.near_and_linked();
        for peer in self.rounds.members_changed(&others, &near, &linked, clock::now()) {
            self.start_comparison(peer);
        }
    }

    fn start_push(&mut self, to: MemberView, item: C::Item) {
        let (cargo, reach) = (self.cargo.clone(), reach(self.around.gossip.clone(), to.name.clone()));
        let offered = item.clone();
        self.work.spawn(async move {
            let pushed = async { cargo.push(reach.await?, offered).await };
            Event::Pushed { to, item, result: within(C::BOUNDS.name, C::BOUNDS.push_time_max, pushed).await }
        });
    }

    fn start_comparison(&mut self, peer: MemberView) {
        let (cargo, name) = (self.cargo.clone(), peer.name);
        let reach = reach(self.around.gossip.clone(), name.clone());
        self.work.spawn(async move {
            let compared = async { cargo.compare(reach.await?, name.clone()).await };
            let result = within(C::BOUNDS.name, C::BOUNDS.compare_time_max, compared).await;
            Event::Compared(name, result)
        });
    }

    fn ended(&mut self, ended: Event<C>) -> Event<C> {
        let now = clock::now();
        match &ended {
            Event::Pushed { to, result, .. } => {
                self.pushes.ended(&to.name);
                if result.is_err() {
                    self.rounds.missed(&to.name, now);
                }
            }
            Event::Compared(peer, result) => {
                self.rounds.ended(peer, result.as_ref().map_or(Found::Failed, C::found), now);
            }
            Event::Round => {}
        }
        ended
    }
}

/// Carries `exchange` through, for `time_max` at most; it has an outcome also if it panics.
async fn within<T>(
    name: &'static str,
    time_max: Duration,
    exchange: impl Future<Output = Result<T, ExchangeError>>,
) -> Result<T, ExchangeError> {
    match catch(name, tokio::time::timeout(time_max, exchange)).await {
        Some(Ok(result)) => result,
        Some(Err(_elapsed)) => Err(ExchangeError::Late),
        None => Err(ExchangeError::Panicked),
    }
}

/// A member that is alive.
#[cfg(test)]
fn test_member(name: &str) -> MemberView {
    MemberView {
        name: name.parse().unwrap(),
        addr: "127.0.0.1:1".parse().unwrap(),
        status: MemberStatus::Alive,
        generation: crate::model::Generation::default(),
        since: clock::now(),
        forgotten_at: None,
        info: None,
    }
}

/// Room for everything.
#[cfg(test)]
fn test_bounds() -> Bounds {
    Bounds {
        name: "test",
        pushes_max: 100,
        pushes_per_peer_max: 100,
        pushes_waiting_max: 100,
        push_time_max: Duration::from_secs(1),
        compares_max: 4,
        compare_time_max: Duration::from_secs(1),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::transport::fixture::pair;

    /// Says nothing: no connection comes about in these tests.
    #[derive(Clone)]
    struct Nothing;

    impl Cargo for Nothing {
        const BOUNDS: Bounds = Bounds {
            name: "nothing",
            pushes_max: 2,
            pushes_per_peer_max: 2,
            pushes_waiting_max: 2,
            push_time_max: Duration::from_secs(1),
            compares_max: 4,
            compare_time_max: Duration::from_secs(1),
        };
        type Item = u32;
        type Took = ();
        type Compared = ();

        async fn push(self, _connection: Connection, _item: u32) -> Result<(), ExchangeError> {
            Ok(())
        }

        async fn compare(self, _connection: Connection, _peer: NodeName) -> Result<(), ExchangeError> {
            Ok(())
        }

        fn found(_compared: &()) -> Found {
            Found::Equal
        }
    }

    fn transport() -> ControlTransport {
        let ca = crate::pki::ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
        let authority =
            ca.issuer().self_certify(&"own".parse().unwrap(), &"*".parse().unwrap(), clock::wall()).unwrap();
        let identity = crate::pki::Identity::new(authority, clock::wall()).unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        ControlTransport::new(socket, identity, [7; 64]).unwrap()
    }

    /// A carrier between `names` with an own node, gossip's end, which never finds a connection, and the members.
    fn carrier(names: &[&str]) -> (Carrier<Nothing>, mpsc::Receiver<Command>, watch::Sender<Arc<Members>>) {
        carrier_of(Nothing, names)
    }

    /// The same, of any cargo.
    fn carrier_of<C: Cargo>(
        cargo: C,
        names: &[&str],
    ) -> (Carrier<C>, mpsc::Receiver<Command>, watch::Sender<Arc<Members>>) {
        let (gossip, commands) = mpsc::channel(64);
        let members = names.iter().map(|name| test_member(name)).collect();
        let (sender, receiver) = watch::channel(Arc::default());
        sender.send_replace(Arc::new(Members { members, ..Members::default() }));
        let around =
            Around { own: "own".parse().unwrap(), transport: transport(), gossip, interval: Duration::from_secs(5) };
        (Carrier::new(cargo, around, receiver, 7), commands, sender)
    }

    /// Runs `carrier` for `time` while every attempt to reach a peer fails; returns when each was tried, in seconds.
    async fn tried(
        carrier: &mut Carrier<Nothing>,
        commands: &mut mpsc::Receiver<Command>,
        time: Duration,
    ) -> BTreeMap<String, Vec<f64>> {
        let begun = clock::now();
        let mut tried: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        loop {
            tokio::select! {
                _event = carrier.next() => {}
                Some(command) = commands.recv() => {
                    // The answer is dropped with it: it cannot be reached.
                    let Command::Reach(peer, _) = command else { panic!("{command:?}") };
                    tried.entry(peer.to_string()).or_default().push((clock::now() - begun).as_secs_f64());
                }
                () = tokio::time::sleep_until(begun + time) => return tried,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn comparisons_that_fail_at_the_join_are_begun_again_within_seconds() {
        let (mut carrier, mut commands, _members) = carrier(&["n1", "n2", "n3", "own"]);
        let tried = tried(&mut carrier, &mut commands, Duration::from_secs(4)).await;
        assert_eq!(tried.keys().collect::<Vec<_>>(), ["n1", "n2", "n3"]);
        for (peer, at) in &tried {
            assert!(at.len() >= 3 && at[0] < 0.1 && at[1] < 1.4 && at[2] < 3.9, "{peer}: {at:?}");
        }
    }

    /// A carrier that has compared with all of `names` and found nothing.
    fn settled(names: &[&str]) -> (Carrier<Nothing>, mpsc::Receiver<Command>) {
        let (mut carrier, commands, _ended) = carrier(names);
        carrier.members.mark_unchanged();
        carrier.have_members_ended = true;
        let (others, now) = (carrier.others(), clock::now());
        for peer in carrier.rounds.members_changed(&others, &BTreeSet::new(), &BTreeSet::new(), now) {
            carrier.rounds.ended(&peer.name, Found::Equal, now);
        }
        (carrier, commands)
    }

    #[tokio::test(start_paused = true)]
    async fn a_push_that_fails_is_made_good_by_a_comparison_with_that_peer() {
        let (mut carrier, mut commands) = settled(&["n1", "n2", "own"]);
        carrier.push(test_member("n1"), 1);
        let tried = tried(&mut carrier, &mut commands, Duration::from_millis(1400)).await;
        let [pushed_at, compared_at] = tried["n1"][..] else { panic!("{tried:?}") };
        assert!(pushed_at < 0.1 && (0.7..1.3).contains(&compared_at), "{tried:?}");
        assert_eq!(tried.len(), 1, "{tried:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_finds_no_room_in_the_queue_is_left_to_a_round_that_comes_soon() {
        let (mut carrier, _commands) = settled(&["n1", "n2", "own"]);
        let nobody = BTreeSet::new();
        carrier.rounds.round(&[], &nobody, &nobody, clock::now());
        assert!(carrier.rounds.wake_at() > clock::now() + Duration::from_secs(20));
        carrier.spread([1, 2, 3], 2, None);
        assert!(carrier.rounds.wake_at() <= clock::now() + Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_reason_to_look_is_not_kept_waiting_by_rare_rounds() {
        let (mut carrier, mut commands) = settled(&["n1", "own"]);
        let nobody = BTreeSet::new();
        carrier.rounds.round(&[], &nobody, &nobody, clock::now());
        assert!(tried(&mut carrier, &mut commands, Duration::from_secs(20)).await.is_empty(), "rounds are rare");
        carrier.look_soon();
        let tried = tried(&mut carrier, &mut commands, Duration::from_secs(6)).await;
        assert!(tried["n1"][0] <= 5.1, "{tried:?}");
    }

    /// Panics whatever it is to carry.
    #[derive(Clone)]
    struct Doomed;

    impl Cargo for Doomed {
        const BOUNDS: Bounds = Bounds { name: "doomed", pushes_max: 1, compares_max: 1, ..Nothing::BOUNDS };
        type Item = u32;
        type Took = ();
        type Compared = ();

        async fn push(self, _connection: Connection, item: u32) -> Result<(), ExchangeError> {
            panic!("cannot push {item}")
        }

        async fn compare(self, _connection: Connection, peer: NodeName) -> Result<(), ExchangeError> {
            panic!("cannot compare with {peer}")
        }

        fn found(_compared: &()) -> Found {
            Found::Equal
        }
    }

    #[tokio::test]
    async fn an_exchange_that_panics_gives_its_place_back_and_is_one_that_failed() {
        let pair = pair().await;
        let (mut carrier, mut commands, _members) = carrier_of(Doomed, &["n1", "own"]);
        let mut reaching = JoinSet::new();
        reaching.spawn(async move {
            while let Some(Command::Reach(_, reply)) = commands.recv().await {
                let _unwanted = reply.send(Ok(pair.dialer.clone()));
            }
        });
        for item in 0..2 {
            carrier.push(test_member("n1"), item);
        }
        // There is one place for pushes and one for comparisons; the second comparison repeats the first.
        let (mut pushed, mut compared) = (Vec::new(), 0);
        while pushed.len() < 2 || compared < 2 {
            match tokio::time::timeout(Duration::from_secs(20), carrier.next()).await.expect("a place is lost") {
                Event::Pushed { item, result, .. } => {
                    assert!(matches!(result, Err(ExchangeError::Panicked)), "{result:?}");
                    pushed.push(item);
                }
                Event::Compared(_, result) => {
                    assert!(matches!(result, Err(ExchangeError::Panicked)), "{result:?}");
                    compared += 1;
                }
                Event::Round => {}
            }
        }
        assert_eq!(pushed, [0, 1]);
    }
}
