//! Where to join: from what an operator wrote to addresses, and one attempt at each.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use quinn::Connection;
use tokio::task::JoinSet;

use super::engine::{Attempt, JoinOutcome};
use super::exchange;
use crate::membership::MeshId;
use crate::transport::ControlTransport;

/// The mesh port where none is given.
pub(super) const DEFAULT_PORT: u16 = 8301;
/// Longest time to resolve and to connect, each.
pub(super) const CONNECT_TIME_MAX: Duration = Duration::from_secs(4);
/// Most attempts side by side.
const PARALLEL_MAX: usize = 8;
/// Most addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;

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

/// Tries each of `targets` once, some side by side.
pub(super) async fn join_all(transport: ControlTransport, own: MeshId, targets: Vec<String>) -> Outcome {
    let mut outcome = Outcome::default();
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
        match running.join_next().await {
            Some(Ok((_, Ok((Attempt::Joined(welcomed), connection))))) => {
                outcome.join.joined.push(welcomed);
                outcome.connections.push(connection);
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

async fn join_one(transport: &ControlTransport, own: &MeshId, target: &str) -> Result<(Attempt, Connection), String> {
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
) -> Result<(Attempt, Connection), String> {
    let dial = tokio::time::timeout(CONNECT_TIME_MAX, transport.connect(addr, None));
    let dialled = dial.await.map_err(|_| no_answer(addr))?;
    let (connection, peer) = dialled.map_err(|error| error.to_string())?;
    if peer.node == own.name {
        connection.close(0u32.into(), b"same name");
        return Err(format!(
            "the agent at {addr} is named {} too (this agent is at {}); give one of them another name",
            own.name, own.addr
        ));
    }
    let reply = exchange::hello(&connection, own.clone()).await;
    let reply = reply.map_err(|error| format!("{addr}: {}", error.explain(Some(&connection))))?;
    Ok((Attempt::judge(reply, &peer.node, addr)?, connection))
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
