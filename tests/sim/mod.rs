//! A simulator of whole meshes: the engine that ships, over a seeded discrete-event loop in virtual time.
//!
//! ```text
//!   World: now, queue of events, Net (latency, loss, cuts) ------ events --> Host: disk, wall clock, services
//!     ^                                                                        Process: Engine, links, inbox
//!     '-- script (faults, churn) and oracle (what must hold) --'               ^ lost by a crash
//! ```
//!
//! Two programs include this directory: the integration tests (tests/it, a fixed set of seeds) and `examples/swim_scale`
//! (figures, many seeds, large meshes).
//!
//! Invariants:
//! - The same seed and the same calls give the same run: one random generator, events in order of (time, number), no
//!   iteration over a hash map.
//! - Nothing is simulated that the engine does itself; what is simulated are its hands: connections, streams, disk,
//!   clocks.
//! - A failure prints its seed and the last events.
//!
//! Not here: signatures (a cheap stand-in signs; the real ones are tested in `pki`), the data plane, the registry. Of
//! `gossip::links`: the bound on dials at once and their order (`DIALS_MAX`: here every dial that is wanted begins at once, so
//! that a start of many is easier here than it is), that of two agents which dial each other one gives up, and that among several
//! connections to a member the one to the address where it lives is taken (here the newest is).

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::unchecked_time_subtraction,
    clippy::single_match_else,
    clippy::needless_for_each,
    clippy::semicolon_if_nothing_returned,
    clippy::needless_pass_by_value,
    reason = "two programs use different parts of it; a simulation fails by panicking, plainly"
)]

pub(crate) mod documents;
pub(crate) mod figures;
pub(crate) mod host;
pub(crate) mod links;
pub(crate) mod net;
pub(crate) mod oracle;
pub(crate) mod processor;
pub(crate) mod scale;
pub(crate) mod scenarios;
pub(crate) mod script;
pub(crate) mod stats;
pub(crate) mod streams;
pub(crate) mod svg;
pub(crate) mod trust;
pub(crate) mod world;
