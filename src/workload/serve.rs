//! The accept loop: who connects, how many, until the agent stops.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tracing::{debug, warn};

use super::attest::Caller;
use super::authority::Mended;
use super::feed::Source;
use super::metrics::Meter;
use super::rpc;
use crate::clock;
use crate::supervise::Tasks;
use crate::unix_socket::Listening;

/// Most connections at once: an app holds one, hosts run tens of apps.
const CONNECTIONS_MAX: usize = 256;
/// Most connections of one user: no user keeps the others out.
pub(super) const CONNECTIONS_PER_USER_MAX: usize = 32;
/// Most streams of one connection: a client has one for certificates and one for roots.
const STREAMS_MAX: u32 = 16;
/// Longest header list, in bytes: a gRPC client sends about 200.
const HEADERS_BYTES_MAX: u32 = 8 * 1024;
/// At the end, streams have so long to say that the agent stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after `accept` failed for want of descriptors or memory, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Runs hyper's stream tasks among the node's.
#[derive(Clone)]
struct Streams(Tasks);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Streams {
    fn execute(&self, stream: F) {
        self.0.spawn("workload-stream", stream);
    }
}

/// Accepts until the agent stops; the socket's file is removed then.
pub(super) async fn run(listening: Listening, source: Arc<Source>, meter: Meter, tasks: Tasks) {
    let places = Arc::new(Places::default());
    let agent_uid = nix::unistd::geteuid().as_raw();
    let stop = source.stop().clone();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listening.listener().accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _unnamed)) => stream,
            Err(error) => {
                warn!(%error, "cannot accept a connection of the Workload API");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Without knowing who asks there is nothing to say.
        let Ok(peer) = stream.peer_cred() else { continue };
        let uid = peer.uid();
        let Some(place) = places.take(uid) else {
            debug!(uid, "too many connections of the Workload API; this one is closed");
            continue;
        };
        let (source, meter, streams) = (Arc::clone(&source), meter.clone(), Streams(tasks.clone()));
        tasks.spawn("workload-connection", async move {
            // The host's user database may be slow, or remote.
            let user = tokio::task::spawn_blocking(move || user_of(uid)).await.ok().flatten();
            let caller = Caller { uid, user, agent_uid };
            debug!(uid, user = caller.user, pid = peer.pid(), "a workload connected");
            serve(stream, caller, source, meter, streams).await;
            drop(place);
        });
    }
}

fn user_of(uid: u32) -> Option<String> {
    nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten().map(|user| user.name)
}

async fn serve(stream: UnixStream, caller: Caller, source: Arc<Source>, meter: Meter, streams: Streams) {
    let stop = source.stop().clone();
    let service = service_fn(move |request| {
        let answered = rpc::answer(request, Arc::clone(&source), caller.clone(), meter.clone());
        async move { Ok::<_, Infallible>(answered.await) }
    });
    let mut builder = http2::Builder::new(streams);
    builder.timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX).max_header_list_size(HEADERS_BYTES_MAX);
    let (read, write) = stream.into_split();
    let stream = tokio::io::join(Mended::new(read), write);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout_at(clock::now() + DRAIN_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection of the Workload API ended early");
    }
}

/// Counts connections, in all and by user.
#[derive(Debug, Default)]
struct Places(Mutex<BTreeMap<u32, usize>>);

impl Places {
    fn take(self: &Arc<Self>, uid: u32) -> Option<Place> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.values().sum::<usize>() >= CONNECTIONS_MAX {
            return None;
        }
        let own = taken.entry(uid).or_default();
        if *own >= CONNECTIONS_PER_USER_MAX {
            return None;
        }
        *own += 1;
        Some(Place { places: Arc::clone(self), uid })
    }
}

/// A counted connection; given back when dropped.
#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    uid: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(&self.uid) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(taken.remove(&self.uid)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_user_takes_every_place_and_places_come_back() {
        let places = Arc::new(Places::default());
        let mut held: Vec<Place> = (0..CONNECTIONS_PER_USER_MAX).map(|_| places.take(7).unwrap()).collect();
        assert!(places.take(7).is_none());
        let other = places.take(8).unwrap();
        held.pop();
        held.push(places.take(7).unwrap());
        for uid in 100.. {
            let more: Vec<Place> = (0..CONNECTIONS_PER_USER_MAX).map_while(|_| places.take(uid)).collect();
            if more.is_empty() {
                break;
            }
            held.extend(more);
        }
        assert_eq!(held.len() + 1, CONNECTIONS_MAX);
        drop((held, other));
        assert!(places.0.lock().unwrap().is_empty(), "nothing is kept of users that are gone");
    }
}
