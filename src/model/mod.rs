//! The vocabulary: names, SPIFFE ids, scopes, the records that a node publishes, and what an agent makes of them.
//!
//! Every type is parsed once, at the edge; inside, a value of the type is valid. No logic, no I/O, no clock.
//!
//! ```text
//!   names ---> spiffe ---> scope, grant ---> record (what a node owns) ---> instance (as it is seen)
//! ```
//!
//! Invariants: a name fits a DNS label and a SPIFFE path segment; a record's strings are bounded by the
//! frame that carries them (64 KiB a node, see `replica`).
//! Not here: who may publish what (`pki`, `replica`), how records become a view (`catalogue`).

pub mod duration;
#[cfg(any(test, fuzzing))]
pub(crate) mod fixture;
pub mod grant;
pub mod instance;
pub mod name;
pub mod record;
pub mod scope;
pub mod spiffe;
pub mod text_map;

pub use grant::{GrantError, OperatorScope, Right};
pub use instance::{Instance, NodeEntry, Outside};
pub use name::{CheckId, InstanceId, NameError, NodeName, ServiceName, TrustDomain};
pub use record::{
    CONNECT_PROXY, CheckRecord, DEMANDS_MAX, Demand, EJECTIONS_MAX, EjectionsRecord, Entry, EntryKey, ExternalRecord,
    Generation, HealthStatus, INGRESS_GATEWAY, MemberStatus, NodeInfo, Protocol, SIDECAR_SUFFIX, ServiceRecord,
    Weights,
};
pub use scope::{NamePattern, ServeScope};
pub use spiffe::{SpiffeError, SpiffeId};
pub use text_map::TextMap;
