//! The one integration binary: real agents, real sockets, real certificates.
//!
//! `netns_*` modules build network namespaces and need root; where namespaces cannot be made they say so, and fail if
//! `WEFT_REQUIRE_NETNS=1` (as .ci/run sets it). Everything else runs on loopback addresses without root.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::assigning_clones,
    clippy::format_push_string,
    clippy::items_after_statements,
    clippy::unused_self,
    clippy::needless_for_each,
    clippy::semicolon_if_nothing_returned,
    reason = "a test drives real processes in real time and reads its environment; it fails by panicking, plainly"
)]

mod agent;
mod app;
mod bodies;
mod checks;
mod churn;
mod cli;
mod clients;
mod crowd;
mod dns;
mod docs;
mod edges;
mod examples;
mod http;
mod imports;
mod interop;
mod lab;
mod loopback;
mod monitor;
mod netns_bad_input;
mod netns_balancing;
mod netns_cluster;
mod netns_documents;
mod netns_external;
mod netns_faults;
mod netns_gateway;
mod netns_identity;
mod netns_names;
mod netns_near;
mod netns_policy;
mod netns_shared;
mod netns_threats;
mod netns_traffic;
mod netns_udp;
mod otlp;
mod pages;
mod schema;
#[path = "../sim/mod.rs"]
mod sim;
mod simulated;
mod systemd;
mod verbs;
mod wait;
