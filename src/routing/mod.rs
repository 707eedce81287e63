//! Picks the instance that a connection or request goes to.
//!
//! ```text
//!   Snapshot -- service --> Balancer::pick (weights, status) -- Tried, ConnectBackoff leave out --> Instance
//!                              ^                                             ^
//!                              `--- one per worker, nothing shared ----------'  failed / succeeded
//! ```
//!
//! Invariants: a critical instance is never picked; over one turn every instance is picked as often as its weight says;
//! what was tried or just failed is left out as long as there is anything else; nothing is allocated unless the service
//! changed since the last pick. State is bounded and local to one worker.
//! Not here: how often to try (`proxy`), who is healthy (`catalogue`), connecting (`transport`).

mod backoff;
mod balance;

pub use self::backoff::{BACKOFF_INSTANCES_MAX, BACKOFF_MAX, BACKOFF_START, ConnectBackoff};
pub use self::balance::{Balancer, NoInstance, SERVICES_MAX, TRIED_MAX, Tried};
