#![doc = include_str!("ARCHITECTURE.md")]

pub mod api;
pub mod authz;
pub mod catalogue;
pub mod clock;
pub mod config;
pub mod dns;
pub mod filter;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod gossip;
pub mod join;
pub mod lww;
pub mod membership;
pub mod metrics;
pub mod model;
pub mod node;
pub mod otlp;
pub mod pki;
pub mod policy;
pub mod prepared;
pub mod proxy;
pub mod registry;
pub mod replica;
pub mod routing;
pub mod store;
pub mod supervise;
pub mod telemetry;
pub mod trace;
pub mod traffic;
pub mod transport;
pub mod unix_socket;
pub mod upstream;
pub mod wire;
pub mod workload;
