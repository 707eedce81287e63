#![doc = include_str!("ARCHITECTURE.md")]

pub mod catalogue;
pub mod clock;
pub mod gossip;
pub mod join;
pub mod metrics;
pub mod model;
pub mod pki;
pub mod registry;
pub mod store;
pub mod supervise;
pub mod transport;
pub mod wire;
