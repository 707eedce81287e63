//! Who may call whom: intentions, compiled to a table that the data plane asks.
//!
//! ```text
//!   Intention --Guard::compile--> Guard --Table::new--> Table --of_stream, of_request--> Decision { action, by }
//!    (as signed)                  (regexes)             (by destination, by source)
//! ```
//!
//! The most exact intention decides alone, in Consul's order: exact source and destination (9), any source (8), any
//! destination (6), any of both (5); none: the default. An intention with permissions looks at the request: the first
//! permission that matches decides, and where none does, the default. An intention that is audited decides nothing: what
//! it would have decided is told, and the next one counts.
//!
//! Invariants: a decision reads nothing but the table and the request, takes no lock and allocates nothing (a path that
//! is not in its normal form excepted), and tries expressions on 4 KiB at most; what nobody can tell for certain (a path that
//! apps read in two ways, a text that is too long to be tried) is denied; what has permissions denies a stream of bytes, whose requests nobody sees.
//! A pure core. Not here: signatures (`policy`), off which thread a table is made (`gossip`), what a denial looks like
//! (`proxy`).

mod compile;
mod intention;
mod path;
mod shape;
mod table;
#[cfg(test)]
mod tests;

pub use compile::{CompileError, Guard, Origin, REGEX_INPUT_BYTES_MAX, whole};
pub use intention::{
    Action, HeaderRule, HeaderTest, INTENTION_BYTES_MAX, Intention, IntentionError, Mode, Party, PathRule, Permission,
    Rule,
};
pub use path::{READINGS_MAX, readings};
pub use shape::{ShapeError, from_json, to_json};
pub use table::{Decision, Quarantined, Request, Table};
