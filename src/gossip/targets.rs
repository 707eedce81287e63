//! Where to join: from what an operator wrote to addresses, and one attempt at each.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use quinn::Connection;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::engine::{Attempt, JoinOutcome};
use super::exchange;
use crate::clock;
use crate::membership::MeshId;
use crate::model::NodeName;
use crate::pki::PeerIdentity;
use crate::supervise::catch;
use crate::transport::ControlTransport;

/// The mesh port where none is given.
pub(super) const DEFAULT_PORT: u16 = 8301;
/// Longest time to resolve and to connect, each.
pub(super) const CONNECT_TIME_MAX: Duration = Duration::from_secs(4);
/// Most attempts side by side.
const PARALLEL_MAX: usize = 16;
/// Most addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;

/// How many answers end an attempt of the engine's own, and how long others may still come after the first.
const JOIN_ENOUGH: usize = 3;
const JOIN_GRACE: Duration = Duration::from_millis(300);

/// When an attempt ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Thorough {
    /// When every target answered or failed: an operator wants to know of each.
    All,
    /// Soon after somebody answered: the dead of a long list must not hold up a rejoin.
    Enough,
}

/// Why a dial failed.
#[derive(Debug)]
pub(super) enum DialError {
    /// The host says that nobody has the port.
    Refused(String),
    /// Anything else, silence included.
    Failed(String),
}

impl DialError {
    pub(super) fn text(self) -> String {
        match self {
            Self::Refused(text) | Self::Failed(text) => text,
        }
    }
}

/// A connection that is closed unless it is claimed. The transport keeps every open one (a revocation has to find it), so that
/// one whose handle alone is dropped stays open: the peer takes it for the newest, prefers it, and nobody reads it.
#[derive(Debug)]
struct Unclaimed(Option<Connection>);

impl Unclaimed {
    /// Takes it over, to be read.
    fn claim(mut self) -> Option<Connection> {
        self.0.take()
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(connection) = &self.0 {
            connection.close(0u32.into(), b"not needed");
        }
    }
}

/// What became of a list of targets.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) join: JoinOutcome,
    /// To those that let this node in, in the same order.
    pub(super) connections: Vec<Connection>,
}

/// Splits `host`, `host:port`, `addr`, `[v6]:port` into host and port.
pub(super) fn host_and_port(target: &str) -> Result<(String, u16), String> {
    if let Ok(addr) = target.parse::<SocketAddr>() {
        return Ok((addr.ip().to_string(), addr.port()));
    }
    let bare = target.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(target);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok((ip.to_string(), DEFAULT_PORT));
    }
    match target.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() => match port.parse() {
            Ok(port) if port != 0 => Ok((host.to_owned(), port)),
            _ => Err(format!("`{port}` is no port between 1 and 65535")),
        },
        _ if target.is_empty() || target.contains(':') => Err("is neither a name, an address nor host:port".to_owned()),
        _ => Ok((target.to_owned(), DEFAULT_PORT)),
    }
}

async fn resolve(target: &str) -> Result<Vec<SocketAddr>, String> {
    let (host, port) = host_and_port(target)?;
    let lookup = tokio::time::timeout(CONNECT_TIME_MAX, tokio::net::lookup_host((host.as_str(), port)));
    let found = lookup.await.map_err(|_| format!("`{host}` was not resolved in time"))?;
    let found = found.map_err(|error| format!("`{host}` does not resolve: {error}"))?;
    let addrs: Vec<SocketAddr> = found.take(ADDRESSES_MAX).collect();
    if addrs.is_empty() { Err(format!("`{host}` has no address")) } else { Ok(addrs) }
}

/// Dials `addr` for gossip, for [`CONNECT_TIME_MAX`] at most; a host that refuses the port ends it at once.
pub(super) async fn dial(
    transport: &ControlTransport,
    addr: SocketAddr,
    expect: Option<NodeName>,
) -> Result<(Connection, PeerIdentity), DialError> {
    let dialled = tokio::time::timeout(CONNECT_TIME_MAX, transport.connect(addr, expect));
    // QUIC retransmits into a closed port until the end: the question to the kernel ends that.
    let is_refused = async {
        if !transport.is_port_refused(addr).await {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        dialled = dialled => match dialled {
            Ok(Ok(connected)) => Ok(connected),
            Ok(Err(error)) => Err(DialError::Failed(error.to_string())),
            Err(_late) => Err(DialError::Failed(no_answer(addr))),
        },
        () = is_refused => Err(DialError::Refused(nobody_listens(addr))),
    }
}

/// Tries each of `targets` once, some side by side. There is an outcome also where the attempt panics.
pub(super) async fn join_all(
    transport: ControlTransport,
    own: MeshId,
    targets: Vec<String>,
    thorough: Thorough,
) -> Outcome {
    catch("join", try_all(transport, own, targets, thorough)).await.unwrap_or_else(|| {
        let why = ("?".to_owned(), "the attempt failed in itself; the log has the reason".to_owned());
        Outcome { join: JoinOutcome { failed: vec![why], ..JoinOutcome::default() }, ..Outcome::default() }
    })
}

async fn try_all(transport: ControlTransport, own: MeshId, targets: Vec<String>, thorough: Thorough) -> Outcome {
    let mut outcome = Outcome::default();
    let mut until: Option<Instant> = None;
    let mut waiting = targets.into_iter();
    let mut running = JoinSet::new();
    loop {
        while running.len() < PARALLEL_MAX {
            let Some(target) = waiting.next() else { break };
            let (transport, own) = (transport.clone(), own.clone());
            running.spawn(async move {
                let result = join_one(&transport, &own, &target).await;
                (target, result)
            });
        }
        let next = match until {
            // Those that have not answered by then say nothing about this attempt.
            Some(until) => match tokio::time::timeout_at(until, running.join_next()).await {
                Ok(next) => next,
                Err(_enough) => return outcome,
            },
            None => running.join_next().await,
        };
        match next {
            Some(Ok((_, Ok((Attempt::Joined(welcomed), connection))))) => {
                outcome.join.joined.push(welcomed);
                outcome.connections.extend(connection.claim());
                if thorough == Thorough::Enough {
                    if outcome.join.joined.len() >= JOIN_ENOUGH {
                        return outcome;
                    }
                    until = until.or_else(|| Some(clock::now() + JOIN_GRACE));
                }
            }
            Some(Ok((target, Ok((Attempt::Outdated(life), _))))) => {
                outcome.join.outdated = outcome.join.outdated.max(Some(life));
                outcome.join.failed.push((target, "a later life of this node is remembered there".to_owned()));
            }
            Some(Ok((target, Err(reason)))) => outcome.join.failed.push((target, reason)),
            Some(Err(error)) => outcome.join.failed.push(("?".to_owned(), error.to_string())),
            None => return outcome,
        }
    }
}

async fn join_one(transport: &ControlTransport, own: &MeshId, target: &str) -> Result<(Attempt, Unclaimed), String> {
    let mut reasons = Vec::new();
    for addr in resolve(target).await? {
        if addr == own.addr {
            reasons.push(format!("{addr} is this agent itself"));
            continue;
        }
        match join_addr(transport, own, addr).await {
            Ok(attempt) => return Ok(attempt),
            Err(reason) => reasons.push(reason),
        }
    }
    Err(reasons.join("; "))
}

async fn join_addr(
    transport: &ControlTransport,
    own: &MeshId,
    addr: SocketAddr,
) -> Result<(Attempt, Unclaimed), String> {
    let (connection, peer) = dial(transport, addr, None).await.map_err(DialError::text)?;
    if peer.node == own.name {
        connection.close(0u32.into(), b"same name");
        return Err(format!(
            "the agent at {addr} is named {} too (this agent is at {}); give one of them another name",
            own.name, own.addr
        ));
    }
    let unclaimed = Unclaimed(Some(connection.clone()));
    let reply = exchange::hello(&connection, own.clone()).await;
    let reply = reply.map_err(|error| format!("{addr}: {}", error.explain(Some(&connection))))?;
    Ok((Attempt::judge(reply, &peer.node, addr)?, unclaimed))
}

fn nobody_listens(addr: SocketAddr) -> String {
    format!("{addr} refuses (its host says that no process has this UDP port): is an agent running there?")
}

fn no_answer(addr: SocketAddr) -> String {
    let seconds = CONNECT_TIME_MAX.as_secs();
    format!(
        "{addr} did not answer within {seconds} s: is an agent running there, and does the firewall let UDP port {} through?",
        addr.port()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gossip::LINKS_MAX;
    use crate::gossip::engine::{HelloReply, Message};
    use crate::gossip::talk::Talk;
    use crate::gossip::tests::params;
    use crate::membership::Life;
    use crate::model::Generation;
    use crate::wire::FRAME_BYTES_MAX;

    /// What the far end of an attempt to join does once it has heard the hello.
    enum Far {
        Says(HelloReply),
        IsSilent,
    }

    /// Tells why the connection of an attempt ended that found `far`, and how many it kept.
    async fn ended(far: Far) -> (String, usize) {
        let ca = crate::pki::ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
        let (near, _near_ends) = params(ca.issuer(), "near", 1, Vec::new(), LINKS_MAX);
        let (there, _far_ends) = params(ca.issuer(), "far", 1, Vec::new(), LINKS_MAX);
        let own = MeshId::new(near.node.name.clone(), near.node.mesh_addr, near.generation);
        let targets = vec![there.node.mesh_addr.to_string()];
        let mut join = Box::pin(join_all(near.transport.clone(), own, targets, Thorough::Enough));
        let greeted = async {
            let connection = there.transport.accept().await.unwrap().connection;
            let (send, recv) = connection.accept_bi().await.unwrap();
            let mut talk = Talk { send, recv };
            talk.hear_frame(FRAME_BYTES_MAX).await.unwrap();
            (connection, talk)
        };
        let (connection, mut talk) = tokio::select! {
            greeted = greeted => greeted,
            _ = &mut join => panic!("nobody has answered yet"),
        };
        let kept = match far {
            Far::Says(reply) => {
                talk.say_frame(&Message::Hello(reply).encode().unwrap()).await.unwrap();
                talk.finish();
                join.await.connections.len()
            }
            Far::IsSilent => {
                drop(join);
                0
            }
        };
        let reason = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await;
        (reason.map_or_else(|_| "it stays open".to_owned(), |reason| reason.to_string()), kept)
    }

    #[tokio::test]
    async fn an_attempt_leaves_no_connection_open_that_nobody_reads() {
        let life = Life { generation: Generation { number: 9, nonce: 1 }, renewals: 0 };
        let refused = HelloReply::Refused("not today".to_owned());
        for far in [Far::IsSilent, Far::Says(refused), Far::Says(HelloReply::Outdated(life))] {
            let (reason, kept) = ended(far).await;
            assert!(reason.contains("not needed"), "{reason}");
            assert_eq!(kept, 0);
        }
    }

    #[tokio::test]
    async fn the_silent_of_a_list_hold_up_a_rejoin_for_a_moment_alone() {
        let ca = crate::pki::ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
        let (near, _near_ends) = params(ca.issuer(), "near", 1, Vec::new(), LINKS_MAX);
        let (there, _far_ends) = params(ca.issuer(), "far", 1, Vec::new(), LINKS_MAX);
        let own = MeshId::new(near.node.name.clone(), near.node.mesh_addr, near.generation);
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let targets = [there.node.mesh_addr, silent.local_addr().unwrap()].map(|addr| addr.to_string());
        let begun = clock::now();
        let join = join_all(near.transport.clone(), own, targets.to_vec(), Thorough::Enough);
        let welcomed = async {
            let connection = there.transport.accept().await.unwrap().connection;
            let (send, recv) = connection.accept_bi().await.unwrap();
            let mut talk = Talk { send, recv };
            talk.hear_frame(FRAME_BYTES_MAX).await.unwrap();
            let id = MeshId::new(there.node.name.clone(), there.node.mesh_addr, there.generation);
            let reply = HelloReply::Welcome { id, members: Vec::new(), farewells: Vec::new() };
            talk.say_frame(&Message::Hello(reply).encode().unwrap()).await.unwrap();
            talk.finish();
            connection
        };
        let (outcome, _connection) = tokio::join!(join, welcomed);
        assert_eq!((outcome.join.joined.len(), outcome.connections.len()), (1, 1), "{:?}", outcome.join);
        assert!(begun.elapsed() < CONNECT_TIME_MAX / 2, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn an_agent_of_the_own_name_is_named_with_both_addresses_and_not_joined() {
        let ca = crate::pki::ephemeral(&"test.example".parse().unwrap(), clock::wall()).unwrap();
        let (near, _near_ends) = params(ca.issuer(), "near", 1, Vec::new(), LINKS_MAX);
        let (twin, _twin_ends) = params(ca.issuer(), "near", 1, Vec::new(), LINKS_MAX);
        let own = MeshId::new(near.node.name.clone(), near.node.mesh_addr, near.generation);
        let (here, there) = (own.addr.to_string(), twin.node.mesh_addr.to_string());
        let join = join_all(near.transport.clone(), own, vec![there.clone()], Thorough::All);
        let refused = async {
            let connection = twin.transport.accept().await.unwrap().connection;
            assert!(connection.closed().await.to_string().contains("same name"));
        };
        let (outcome, ()) = tokio::join!(join, refused);
        let [(target, why)] = &outcome.join.failed[..] else { panic!("{:?}", outcome.join) };
        assert!(*target == there && why.contains(&here) && why.contains(&there), "{why}");
    }

    #[test]
    fn a_target_is_a_name_an_address_or_either_with_a_port() {
        #[track_caller]
        fn check(target: &str, want: Option<(&str, u16)>) {
            let want = want.map(|(host, port)| (host.to_owned(), port));
            assert_eq!(host_and_port(target).ok(), want, "{target}");
        }
        check("seed", Some(("seed", 8301)));
        check("seed.example:9000", Some(("seed.example", 9000)));
        check("10.0.0.1", Some(("10.0.0.1", 8301)));
        check("10.0.0.1:9000", Some(("10.0.0.1", 9000)));
        check("2001:db8::1", Some(("2001:db8::1", 8301)));
        check("[2001:db8::1]", Some(("2001:db8::1", 8301)));
        check("[2001:db8::1]:9000", Some(("2001:db8::1", 9000)));
        check("", None);
        check("seed:", None);
        check("seed:0", None);
        check(":8301", None);
        check("seed:99999", None);
    }
}
