#![doc = include_str!("ARCHITECTURE.md")]

pub mod catalogue;
pub mod clock;
pub mod config;
pub mod gossip;
pub mod metrics;
pub mod model;
pub mod pki;
pub mod registry;
pub mod store;
pub mod supervise;
pub mod telemetry;
pub mod transport;
pub mod wire;
