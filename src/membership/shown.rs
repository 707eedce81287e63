//! What the core tells of itself: counts and sizes, for metrics and simulations.

/// What the core counted since its start, and how it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Lifeguard's local health: 0 is well, [`LOCAL_HEALTH_WORST`](super::LOCAL_HEALTH_WORST) stretches every timer ninefold.
    pub local_health: u8,
    /// Members under suspicion that counts (own, or two others').
    pub suspected: usize,
    /// Members that are back and held because they flap.
    pub held: usize,
    /// Own checks that failed: accusations that this node made.
    pub accusations: u64,
    /// Members that were declared failed here.
    pub failures: u64,
    /// Suspicions that ended with a sign of life.
    pub refuted: u64,
    /// Accusations of this node that it refuted.
    pub refutations: u64,
    /// Accusations and downs of single others that were never confirmed.
    pub advisories_ignored: u64,
    /// Sentences that a recent answer put off.
    pub vetoes: u64,
    /// Lives, returns and goodbyes refused: unsigned, or too far ahead.
    pub forged_lives: u64,
    /// Signatures that did not hold.
    pub signatures_broken: u64,
    /// Statements dropped because too many came at once.
    pub statements_dropped: u64,
    /// Wake-ups that came too late to accuse anybody.
    pub late_wakeups: u64,
}

/// How much a core holds beside its members; [`Core::sizes`](super::Core::sizes).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Timers of foca's.
    pub timers: usize,
    /// News on its way.
    pub news: usize,
    /// Reports of demand on their way, and members that made one.
    pub demands: (usize, usize),
    /// Members that somebody accuses.
    pub suspicions: usize,
    /// Most accusers of one member.
    pub votes_max: usize,
    /// Checks that are open.
    pub checks: usize,
    /// Strangers that a peer calls gone.
    pub strangers: usize,
    /// Neighbours whose turn comes before any other's comes again.
    pub turns: usize,
    /// Outputs that nobody has taken yet.
    pub outputs: usize,
}
