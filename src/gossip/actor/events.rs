//! What others see of the engine: log lines, the list of members, the gauges.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::Actor;
use crate::clock;
use crate::gossip::doubles::News;
use crate::gossip::engine::Event;
use crate::gossip::{MemberView, Members, NodeCertificates};
use crate::hearsay::{Excerpt, Seldom};
use crate::membership::{MeshId, Refused};
use crate::model::{MemberStatus, NodeName, ServiceName, SpiffeId};
use crate::pki::{facts_of, root_key_of};
use crate::replica::{ApplyError, NodeState, Report};

/// Reasons that one log line gives.
const REASONS_LOGGED: usize = 3;
/// Services that one log line names: a node may announce a thousand.
const NAMES_LOGGED: usize = 8;
/// Records that are refused, and forks, that are logged in a minute: faults of several nodes at once are told apart.
const FAULTS_TOLD_MAX: u32 = 10;

/// What was told of that which other nodes bring about at will, each with a connection, a packet or a version of its records.
#[derive(Debug)]
pub(super) struct Told {
    /// Services outside their nodes' scope.
    outside: Seldom,
    /// Lives of this node that cannot be.
    implausible: Seldom,
    /// Members that speak in another's name.
    senders: Seldom,
    /// Services' certificates.
    services: Seldom,
    /// Connections of nodes that are this one.
    twins: Seldom,
    /// Peers that go on sending packets that cannot be read.
    pub(super) unreadable: Seldom,
    refused: Seldom,
    forks: Seldom,
}

impl Default for Told {
    fn default() -> Self {
        let [outside, implausible, senders, services, twins, unreadable] = std::array::from_fn(|_| Seldom::default());
        let [refused, forks] = std::array::from_fn(|_| Seldom::new(FAULTS_TOLD_MAX));
        Self { outside, implausible, senders, services, twins, unreadable, refused, forks }
    }
}

impl Actor {
    pub(super) fn event(&mut self, event: Event) {
        match event {
            Event::MemberChanged { node, addr, before, after } if before != after => {
                log_member(&node, addr, before, after);
            }
            Event::MemberChanged { .. } => {}
            Event::Isolated => {
                self.metrics.isolated.set(1);
                warn!("this node is isolated: no other member answers it; it goes on calling those that it knows");
            }
            Event::Connected => {
                self.metrics.isolated.set(0);
                info!("this node is connected again");
            }
            Event::GoodbyeHeard(0) => {
                info!("no peer confirmed the goodbye: nobody is there, or they see this node fail");
            }
            Event::GoodbyeHeard(heard) => {
                info!(heard, "the goodbye was heard");
                self.goodbye_over();
            }
            Event::Renewed(id) => {
                info!(renewals = id.life.renewals, "the mesh took this node for gone; it is back");
            }
            Event::Outlived(generation) => {
                warn!(%generation, "a later life of this node is remembered; continuing above it");
            }
            Event::Implausible(generation) => {
                if let Some(left_out) = self.told.implausible.due(clock::now()) {
                    warn!(%generation, left_out, "a peer remembers a life of this node that lies too far ahead to be true; ignored");
                }
            }
            Event::Unsigned(error) => {
                error!(%error, "this node cannot sign what it says of members; others will not pass it on");
            }
            Event::Conflict { theirs, is_news } => {
                self.metrics.conflicts.inc();
                if is_news {
                    error!(
                        name = %theirs.name, here = %self.engine.node().mesh_addr, there = %theirs.addr,
                        generation_here = %self.engine.generation(), generation_there = %theirs.life.generation,
                        "another node goes by this node's name; stop one of them or give it another name"
                    );
                }
            }
            Event::Joined { in_vain, peers, failed } => log_joined(in_vain, &peers, &failed),
            Event::PacketRefused { from, reason } => {
                self.metrics.refused.with_label_values(&[reason.to_string()]).inc();
                match reason {
                    Refused::Sender => {
                        if let Some(left_out) = self.told.senders.due(clock::now()) {
                            warn!(peer = %from, left_out, "peer speaks in another member's name; its connection is closed");
                        }
                    }
                    Refused::Malformed | Refused::TooLarge => self.unreadable(&from),
                    Refused::OwnName | Refused::Full | Refused::Generation | Refused::Protocol => {}
                }
            }
            Event::Published(Ok(())) => self.metrics.publishes.with_label_values(&["ok"]).inc(),
            Event::Published(Err(error)) => {
                self.metrics.publishes.with_label_values(&["failed"]).inc();
                error!(%error, "own records cannot be published; the mesh keeps the old ones until they end");
            }
            Event::Delta(result) => self.metrics.deltas.with_label_values(&[result]).inc(),
            Event::Refused { node, error, is_news } => {
                if matches!(error, ApplyError::OwnName { .. }) {
                    self.metrics.conflicts.inc();
                }
                if is_news && let Some(left_out) = self.told.refused.due(clock::now()) {
                    let error = error.to_string();
                    warn!(%node, error = %Excerpt(&error), left_out, "records refused");
                }
            }
            Event::Revoked(node) => warn!(member = %node, "member's certificate is revoked: its records are dropped"),
            Event::LeaseEnded(node) => info!(%node, "records ended: their node has not renewed them"),
            Event::Report(Report::OutOfScope { node, services, .. }) => {
                self.metrics.outside_scope.inc();
                if let Some(left_out) = self.told.outside.due(clock::now()) {
                    let services = first_names(&services);
                    warn!(%node, services, left_out, "services outside the node's serve scope are not shown; others like it are counted alone for a minute");
                }
            }
            Event::Report(Report::Fork { node, generation, version }) => {
                if let Some(left_out) = self.told.forks.due(clock::now()) {
                    warn!(%node, %generation, version, left_out, "a node signed two states of one version: is its disk a copy?");
                }
            }
        }
    }

    /// A node with this node's name and certificate connected from `there`.
    pub(super) fn twin_connected(&self, there: SocketAddr) {
        self.metrics.conflicts.inc();
        let node = self.engine.node();
        if let Some(left_out) = self.told.twins.due(clock::now()) {
            error!(
                name = %node.name, here = %node.mesh_addr, %there, left_out,
                "a node with this node's name and certificate connected"
            );
        }
    }

    /// A service's certificate was shown where a node's is wanted.
    pub(super) fn service_spoke(&self, id: &SpiffeId) {
        if let Some(left_out) = self.told.services.due(clock::now()) {
            warn!(peer = %id, left_out, "a service's certificate does not speak for its node in gossip; refused");
        }
    }

    /// The certificates under which nodes publish.
    pub(super) fn certificates(&self) -> Vec<NodeCertificates> {
        let bundle = self.identity.bundle();
        let lease = self.engine.replica().next_lease();
        let facts = |der: &Vec<u8>| facts_of(&CertificateDer::from(der.as_slice())).ok();
        let of = |(node, state): (&NodeName, &NodeState)| match state.chain() {
            [intermediate, issuer, ..] => Some(NodeCertificates {
                node: node.clone(),
                intermediate: facts(intermediate)?,
                issuer: facts(issuer)?,
                root: root_key_of(&CertificateDer::from(issuer.as_slice()), &bundle),
                lease_ends: state.not_after,
                lease,
            }),
            _ => None,
        };
        self.engine.replica().nodes().filter_map(of).collect()
    }

    /// When the next snapshot and list of members are due; none: everything is shown.
    pub(super) fn show_at(&self) -> Option<Instant> {
        (!self.unshown.is_empty() || self.are_members_unshown).then(|| self.show_pace.next_at())
    }

    /// Publishes a snapshot and the list of members if they changed: what this node did at once, the rest at its pace.
    pub(super) fn show_what_changed(&mut self, now: Instant) {
        self.unshown.append(&mut self.engine.take_dirty());
        self.are_members_unshown |= self.engine.take_members_changed();
        let is_own = self.unshown.contains(&self.engine.node().name) || self.builder.has_changed();
        let is_pending = !self.unshown.is_empty() || self.are_members_unshown;
        let is_due = is_own || (is_pending && self.show_pace.take(now));
        if !is_due {
            return;
        }
        for name in std::mem::take(&mut self.unshown) {
            let status = self.engine.status_of(&name);
            self.builder.set_node(&name, self.engine.replica().state(&name), status);
        }
        if let Some(snapshot) = self.builder.build() {
            if let Some(News { count, names }) = self.doubles.look(&snapshot.externals) {
                self.metrics.external_conflicts.set(i64::try_from(count).unwrap_or(i64::MAX));
                if !names.is_empty() {
                    warn!(names, "several agents tell of one node without an agent: deregister it at all but one");
                }
            }
            self.publisher.publish(snapshot);
        }
        if std::mem::take(&mut self.are_members_unshown) {
            self.show_members();
            self.watch_successors(now);
        }
    }

    fn show_members(&self) {
        let (node, replica) = (self.engine.node(), self.engine.replica());
        let info = |name: &NodeName| replica.state(name).and_then(|state| state.info.clone());
        let own = MemberView {
            name: node.name.clone(),
            addr: node.mesh_addr,
            status: self.engine.status_of(&node.name),
            generation: self.engine.generation(),
            since: self.engine.started_at(),
            forgotten_at: None,
            info: Some(Arc::new(node.clone())),
        };
        let mut members = vec![own];
        members.extend(self.engine.membership().members().map(|member| MemberView {
            name: member.id.name.clone(),
            addr: member.id.addr,
            status: self.engine.status_of(&member.id.name),
            generation: member.id.life.generation,
            since: member.since(),
            forgotten_at: self.engine.membership().forgotten_at(member),
            info: info(&member.id.name),
        }));
        members.sort_by(|a, b| a.name.cmp(&b.name));
        for status in [MemberStatus::Alive, MemberStatus::Leaving, MemberStatus::Left, MemberStatus::Failed] {
            let count = members.iter().filter(|member| member.status == status).count();
            self.metrics.members.with_label_values(&[status.as_str()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.metrics.nodes.set(i64::try_from(replica.nodes().count()).unwrap_or(i64::MAX));
        let neighbours = self.engine.membership().few_neighbours();
        self.members.send_replace(Arc::new(Members { members, isolated: self.engine.is_isolated(), neighbours }));
    }
}

fn log_member(node: &NodeName, addr: Option<SocketAddr>, before: Option<MemberStatus>, after: Option<MemberStatus>) {
    let addr = addr.map(tracing::field::display);
    match (before, after) {
        (None, Some(MemberStatus::Alive)) => info!(member = %node, addr, "member joined"),
        (_, Some(MemberStatus::Alive)) => info!(member = %node, addr, "member is back"),
        (_, Some(MemberStatus::Failed)) => warn!(member = %node, addr, "member failed"),
        (_, Some(MemberStatus::Leaving)) => info!(member = %node, addr, "member is leaving"),
        (_, Some(MemberStatus::Left)) => info!(member = %node, addr, "member left"),
        (_, None) => info!(member = %node, "member forgotten"),
    }
}

/// Returns the first names on one line, and how many more there are.
fn first_names(names: &[ServiceName]) -> String {
    let shown: Vec<&str> = names.iter().take(NAMES_LOGGED).map(ServiceName::as_str).collect();
    match names.len().saturating_sub(NAMES_LOGGED) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Returns the first reasons on one line, and how many more there are.
fn first_reasons(failed: &[(String, String)]) -> String {
    let mut reasons: Vec<_> =
        failed.iter().take(REASONS_LOGGED).map(|(target, why)| format!("{target}: {}", Excerpt(why))).collect();
    if failed.len() > REASONS_LOGGED {
        reasons.push(format!("and {} more", failed.len() - REASONS_LOGGED));
    }
    reasons.join("; ")
}

fn log_joined(in_vain: u32, peers: &[MeshId], failed: &[(String, String)]) {
    if !failed.is_empty() && peers.is_empty() {
        // It is tried for ever: every line but the first few would say the same.
        if in_vain.is_power_of_two() || in_vain == 0 {
            warn!(targets = failed.len(), attempts = in_vain, reasons = first_reasons(failed), "could not join");
        }
    } else if !failed.is_empty() {
        info!(targets = failed.len(), reasons = first_reasons(failed), "joined, but not through all");
    }
    for peer in peers {
        info!(peer = %peer.name, addr = %peer.addr, "joined through");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::watch;

    use super::*;
    use crate::gossip::actor::fixture::Lone;
    use crate::gossip::tests::records;

    const MS: Duration = Duration::from_millis(1);

    /// Something of another node changes, at `now`; tells whether that is shown.
    fn other_changes(actor: &mut Actor, members: &mut watch::Receiver<Arc<Members>>, now: Instant) -> bool {
        actor.unshown.insert("other".parse().unwrap());
        actor.are_members_unshown = true;
        actor.show_what_changed(now);
        let is_shown = members.has_changed().unwrap();
        members.mark_unchanged();
        is_shown
    }

    #[tokio::test]
    async fn what_others_change_is_shown_eight_times_as_it_comes_and_then_ten_times_a_second() {
        let Lone { mut actor, mut members, .. } = Lone::new();
        assert_eq!(members.borrow_and_update().members.len(), 1, "what is known at the start is shown at once");
        let begun = clock::now() + Duration::from_mins(1);
        // One in 10 ms.
        let mut shown = Vec::new();
        for millis in (0..1000).step_by(10) {
            if other_changes(&mut actor, &mut members, begun + millis * MS) {
                shown.push(millis);
            }
        }
        let want: Vec<u32> = (0..80).step_by(10).chain((100..1000).step_by(100)).collect();
        assert_eq!(shown, want);
        // What came since is shown when it is time, though nothing more comes; then there is nothing to wake for.
        assert_eq!(actor.show_at(), Some(begun + 1000 * MS));
        actor.show_what_changed(begun + 999 * MS);
        assert!(!members.has_changed().unwrap());
        actor.show_what_changed(begun + 1000 * MS);
        assert!(members.has_changed().unwrap());
        assert_eq!(actor.show_at(), None);
        // After a rest it is as quick as before.
        members.mark_unchanged();
        let rested = begun + 5000 * MS;
        let at_once = (0..20).filter(|_| other_changes(&mut actor, &mut members, rested)).count();
        assert_eq!(at_once, 8);
    }

    #[tokio::test]
    async fn what_this_node_does_is_shown_at_once_and_takes_along_what_waits() {
        let Lone { mut actor, mut members, catalogue, .. } = Lone::new();
        let now = clock::now() + Duration::from_mins(1);
        assert_eq!((0..100).take_while(|_| other_changes(&mut actor, &mut members, now)).count(), 8);
        assert!(actor.show_at().is_some_and(|at| at > now), "another's change waits");
        for round in 0..20 {
            let own = records(&format!("own-{round}"), "v1".to_owned());
            actor.turn(now, |engine, turn| engine.handle_records(own, turn));
            actor.show_what_changed(now);
            let name: ServiceName = format!("own-{round}").parse().unwrap();
            assert!(catalogue.load().services.contains_key(&name), "{name}");
        }
        assert!(members.has_changed().unwrap());
        assert_eq!(actor.show_at(), None);
    }

    #[tokio::test]
    async fn a_member_that_comes_is_watched_from_when_it_is_shown() {
        let mut lone = Lone::new();
        assert_eq!(lone.actor.beat.at(), None, "there is nobody to watch");
        let _peer = lone.peer("peer");
        lone.actor.show_what_changed(clock::now());
        assert_eq!(lone.members.borrow().members.len(), 2);
        assert!(lone.actor.beat.at().is_some(), "its port is asked at each beat");
    }

    #[test]
    fn what_a_node_brings_about_at_will_is_told_shortly() {
        let names: Vec<ServiceName> = (0..1000).map(|number| format!("s{number}").parse().unwrap()).collect();
        assert_eq!(first_names(&names[..2]), "s0, s1");
        assert_eq!(first_names(&names), "s0, s1, s2, s3, s4, s5, s6, s7 and 992 more");
        let failed = ["x".repeat(10_000), "two\nlines".to_owned()].map(|why| ("seed".to_owned(), why));
        let reasons = first_reasons(&failed);
        assert!(reasons.len() < 600 && reasons.ends_with("; seed: two\\nlines"), "{reasons}");
    }
}
