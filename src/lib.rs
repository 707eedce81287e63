#![doc = include_str!("ARCHITECTURE.md")]

pub mod catalogue;
pub mod clock;
pub mod gossip;
pub mod join;
pub mod membership;
pub mod metrics;
pub mod model;
pub mod pki;
pub mod proxy;
pub mod registry;
pub mod replica;
pub mod routing;
pub mod store;
pub mod supervise;
pub mod transport;
pub mod wire;
