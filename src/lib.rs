#![doc = include_str!("ARCHITECTURE.md")]

pub mod api;
pub mod catalogue;
pub mod clock;
pub mod gossip;
pub mod metrics;
pub mod model;
pub mod pki;
pub mod registry;
pub mod store;
pub mod supervise;
pub mod transport;
pub mod wire;
