//! What gossip counts.
//!
//! | name | labels | meaning |
//! |---|---|---|
//! | `weft_gossip_packets_sent_total` | `via` | membership packets sent, as `datagram` or `stream` |
//! | `weft_gossip_packets_received_total` | | membership packets received |
//! | `weft_gossip_packets_refused_total` | `reason` | packets received and refused |
//! | `weft_gossip_packets_dropped_total` | `reason` | packets given up before they were sent or read |
//! | `weft_gossip_sent_bytes_total` | | bytes of membership packets sent |
//! | `weft_gossip_received_bytes_total` | | bytes of membership packets received |
//! | `weft_gossip_connections` | | peers with an open gossip connection |
//! | `weft_gossip_dials_total` | `result` | connections dialled: `ok`, `failed` |
//! | `weft_gossip_ports_refused_total` | | members whose host said that their port is closed |
//! | `weft_gossip_refusals_answered_total` | | members that answered although their host was said to refuse the port |
//! | `weft_gossip_resets_total` | `result` | members that were asked because they had forgotten a connection: `answered`, `silent` |
//! | `weft_gossip_exchanges_total` | `kind`, `result` | exchanges begun here: `join`, `sync`, `pull`, `goodbye`; `ok`, `failed` |
//! | `weft_gossip_demand_reports_total` | `way` | reports of demand for limits of the whole mesh: `sent`, `heard` |
//! | `weft_gossip_external_conflicts` | | nodes without an agent that several living agents tell of |
//! | `weft_membership_isolated` | | 1 while no other member answers this node |
//! | `weft_membership_members` | `status` | members by status, this node included |
//! | `weft_membership_conflicts_total` | | times that another node showed this node's name |
//! | `weft_membership_local_health` | | Lifeguard's score of this node: 0 is well, 8 the worst |
//! | `weft_membership_suspected` | | members under suspicion here |
//! | `weft_membership_held` | | members that are back and held because they flap |
//! | `weft_membership_events_total` | `event` | what failure detection did, see `api/metrics.md` |
//! | `weft_replica_nodes` | | nodes whose records are held |
//! | `weft_replica_deltas_total` | `result` | deltas received: `updated`, `stale`, `behind`, `refused` |
//! | `weft_replica_outside_scope_total` | | states received with services outside their node's serve scope |
//! | `weft_replica_publishes_total` | `result` | changes of the own records: `ok`, `failed` |

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts};

use crate::membership::Stats;
use crate::metrics::Metrics;
use crate::model::MemberStatus;

/// Handles of gossip's metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct GossipMetrics {
    pub(super) sent_datagram: IntCounter,
    pub(super) sent_stream: IntCounter,
    pub(super) received: IntCounter,
    pub(super) refused: IntCounterVec,
    pub(super) dropped: IntCounterVec,
    pub(super) sent_bytes: IntCounter,
    pub(super) received_bytes: IntCounter,
    pub(super) connections: IntGauge,
    pub(super) dials: IntCounterVec,
    pub(super) exchanges: IntCounterVec,
    pub(super) demand_reports: IntCounterVec,
    pub(super) ports_refused: IntCounter,
    pub(super) refusals_answered: IntCounter,
    pub(super) resets: IntCounterVec,
    pub(super) external_conflicts: IntGauge,
    pub(super) isolated: IntGauge,
    pub(super) members: IntGaugeVec,
    pub(super) conflicts: IntCounter,
    pub(super) local_health: IntGauge,
    pub(super) suspected: IntGauge,
    pub(super) held: IntGauge,
    pub(super) events: IntCounterVec,
    pub(super) nodes: IntGauge,
    pub(super) deltas: IntCounterVec,
    pub(super) outside_scope: IntCounter,
    pub(super) publishes: IntCounterVec,
}

impl GossipMetrics {
    /// Registers every metric.
    pub(super) fn new(metrics: &Metrics) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| metrics.add(IntCounter::new(name, help)?);
        let gauge = |name: &str, help: &str| metrics.add(IntGauge::new(name, help)?);
        let counters =
            |name: &str, help: &str, labels: &[&str]| metrics.add(IntCounterVec::new(Opts::new(name, help), labels)?);
        let sent = counters("weft_gossip_packets_sent_total", "Membership packets sent.", &["via"])?;
        let members = IntGaugeVec::new(
            Opts::new("weft_membership_members", "Members by status, this node included."),
            &["status"],
        )?;
        let made = Self {
            sent_datagram: sent.with_label_values(&["datagram"]),
            sent_stream: sent.with_label_values(&["stream"]),
            received: counter("weft_gossip_packets_received_total", "Membership packets received.")?,
            refused: counters(
                "weft_gossip_packets_refused_total",
                "Packets received and refused, by reason.",
                &["reason"],
            )?,
            dropped: counters(
                "weft_gossip_packets_dropped_total",
                "Packets given up before they were sent or read, by reason.",
                &["reason"],
            )?,
            sent_bytes: counter("weft_gossip_sent_bytes_total", "Bytes of membership packets sent.")?,
            received_bytes: counter("weft_gossip_received_bytes_total", "Bytes of membership packets received.")?,
            connections: gauge("weft_gossip_connections", "Peers with an open gossip connection.")?,
            dials: counters("weft_gossip_dials_total", "Gossip connections dialled, by result.", &["result"])?,
            exchanges: counters(
                "weft_gossip_exchanges_total",
                "Exchanges begun by this node (join, sync, pull, goodbye), by result.",
                &["kind", "result"],
            )?,
            demand_reports: counters(
                "weft_gossip_demand_reports_total",
                "Reports of demand for limits of the whole mesh, sent by this node or heard of others.",
                &["way"],
            )?,
            ports_refused: counter(
                "weft_gossip_ports_refused_total",
                "Members whose host said that their port is closed.",
            )?,
            refusals_answered: counter(
                "weft_gossip_refusals_answered_total",
                "Members that answered although their host was said to refuse the port.",
            )?,
            resets: counters(
                "weft_gossip_resets_total",
                "Members that were asked because they had forgotten a connection, by what came of it.",
                &["result"],
            )?,
            external_conflicts: gauge(
                "weft_gossip_external_conflicts",
                "Nodes without an agent that several living agents tell of.",
            )?,
            isolated: gauge("weft_membership_isolated", "1 while no other member answers this node.")?,
            members: metrics.add(members)?,
            conflicts: counter(
                "weft_membership_conflicts_total",
                "Times that another node showed the name of this node.",
            )?,
            local_health: gauge(
                "weft_membership_local_health",
                "Lifeguard's score of this node: 0 is well, 8 the worst.",
            )?,
            suspected: gauge("weft_membership_suspected", "Members under suspicion here.")?,
            held: gauge("weft_membership_held", "Members that are back and held because they flap.")?,
            events: counters("weft_membership_events_total", "What failure detection did, by event.", &["event"])?,
            outside_scope: counter(
                "weft_replica_outside_scope_total",
                "States received with services outside their node's serve scope.",
            )?,
            nodes: gauge("weft_replica_nodes", "Nodes whose records are held.")?,
            deltas: counters("weft_replica_deltas_total", "Deltas received, by result.", &["result"])?,
            publishes: counters("weft_replica_publishes_total", "Changes of the own records, by result.", &["result"])?,
        };
        made.show_all();
        Ok(made)
    }

    /// Makes every series appear at zero.
    fn show_all(&self) {
        for reason in crate::membership::Refused::ALL {
            self.refused.with_label_values(&[reason.to_string()]);
        }
        for way in ["sent", "heard"] {
            self.demand_reports.with_label_values(&[way]);
        }
        for result in ["answered", "silent"] {
            self.resets.with_label_values(&[result]);
        }
        for reason in ["queue_full", "no_link", "streams"] {
            self.dropped.with_label_values(&[reason]);
        }
        for result in ["updated", "stale", "behind", "refused"] {
            self.deltas.with_label_values(&[result]);
        }
        self.show_membership(&Stats::default());
        for status in [MemberStatus::Alive, MemberStatus::Leaving, MemberStatus::Left, MemberStatus::Failed] {
            self.members.with_label_values(&[status.as_str()]);
        }
    }

    /// Shows what the membership counted.
    pub(super) fn show_membership(&self, stats: &Stats) {
        self.local_health.set(stats.local_health.into());
        self.suspected.set(i64::try_from(stats.suspected).unwrap_or(i64::MAX));
        self.held.set(i64::try_from(stats.held).unwrap_or(i64::MAX));
        for (event, count) in [
            ("accusation", stats.accusations),
            ("failure", stats.failures),
            ("refuted", stats.refuted),
            ("refutation", stats.refutations),
            ("advisory_ignored", stats.advisories_ignored),
            ("veto", stats.vetoes),
            ("forged_life", stats.forged_lives),
            ("signature_broken", stats.signatures_broken),
            ("statement_dropped", stats.statements_dropped),
            ("late_wakeup", stats.late_wakeups),
        ] {
            let counter = self.events.with_label_values(&[event]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }

    /// Counts the end of an exchange.
    pub(super) fn exchanged(&self, kind: &str, is_ok: bool) {
        let result = if is_ok { "ok" } else { "failed" };
        self.exchanges.with_label_values(&[kind, result]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_of_the_table_is_registered_once_and_shown_with_a_help_text() {
        let metrics = Metrics::new();
        let handles = GossipMetrics::new(&metrics).unwrap();
        handles.exchanged("sync", true);
        for with_result in [&handles.dials, &handles.publishes] {
            with_result.with_label_values(&["ok"]).inc();
        }
        let text = metrics.render().unwrap();
        for line in include_str!("metrics.rs").lines().filter(|line| line.starts_with("//! | `weft_")) {
            let name = line.split('`').nth(1).unwrap();
            assert!(text.contains(&format!("# HELP {name} ")), "{name}");
        }
        assert!(GossipMetrics::new(&metrics).is_err(), "a second registration is refused");
    }
}
