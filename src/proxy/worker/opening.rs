//! How a call gets its stream: an instance is picked, its node's tunnel found or dialled, a stream opened.
//!
//! ```text
//!   caller, tried -> pick (balancer, limits; waits for a turn) -> tunnel of (source, node) -> stream + preamble + lease
//! ```
//!
//! What fails here has reached no app: whoever asked may ask again, and meets another instance.
//! Not here: what an answer says of the instance (`Worker::observe`), trying again (`outbound`, `http`).

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::time::Instant;
use tracing::warn;

use super::{Caller, Source, Worker, within};
use crate::catalogue::ServiceEntry;
use crate::clock;
use crate::model::{HealthStatus, Instance, NodeName, ServiceName};
use crate::proxy::preamble::{Preamble, StreamKind};
use crate::proxy::tunnel::{Lease, Tunnel, TunnelKey};
use crate::routing::{Ask, Flow, Limited, NoInstance, Outcome, Picked, Tried, Turn, WAIT_MAX};
use crate::traffic::{Resolved, Target};

/// A tunnel that was dialled for nearly all of the time that a call may wait gives a stream at once, or is full.
const STREAM_WAIT_MIN: Duration = Duration::from_millis(100);

/// Who calls which service, and how.
type Ends<'a> = (&'a Source, &'a ServiceName, StreamKind);

/// A stream to an instance; nothing is sent yet.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Towards the instance.
    pub(crate) send: quinn::SendStream,
    /// From the instance.
    pub(crate) recv: quinn::RecvStream,
    /// Goes out before anything else, best in one write with the first data.
    pub(crate) preamble: Bytes,
    /// Who was picked.
    pub(crate) instance: Arc<Instance>,
    /// To be held while either half is used.
    pub(crate) lease: Lease,
    /// When it was opened; on a tunnel that was open, the look at the clock that the pick was made with ([`Tried::at`]).
    pub(crate) at: Instant,
}

/// Why no stream came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OpenError {
    /// The catalogue has no such service.
    UnknownService,
    /// None of its instances may get the call.
    NoInstance {
        /// How many there are.
        total: usize,
        /// How many of them are critical.
        critical: usize,
    },
    /// Too many of its instances failed, and it fails closed.
    FailsClosed {
        /// How many are ejected.
        out: usize,
        /// Of how many that pass their checks.
        fit: usize,
    },
    /// The instance's node cannot be reached; another instance may do better.
    Unreachable {
        /// Which node.
        node: NodeName,
        /// Why.
        reason: String,
    },
    /// The instance's node takes no more streams for now; another instance may do better.
    Full {
        /// Which node.
        node: NodeName,
    },
    /// As much is under way as the limits allow.
    Overflow(Limited),
    /// This agent stops.
    Draining,
}

/// A stream, its tunnel, and when it was opened.
type Streamed = ((quinn::SendStream, quinn::RecvStream), Rc<Tunnel>, Instant);

/// Why a tunnel gave no stream.
enum Unopened {
    /// It could not be dialled, or broke.
    Failed(String),
    /// It has as many streams as the peer allows.
    Full,
}

impl Worker {
    /// Opens a stream to an instance of `caller.destination` that `tried` does not hold, and adds it there.
    ///
    /// After [`OpenError::Unreachable`] and [`OpenError::Full`], and after a status that allows it, the caller may ask again.
    ///
    /// # Cancel safety
    /// Cancelling leaves at most an unused stream, which is reset.
    pub(crate) async fn open(
        self: &Rc<Self>,
        caller: &Caller,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> Result<Opened, OpenError> {
        if self.closed.is_cancelled() {
            return Err(OpenError::Draining);
        }
        let service = || self.snapshot.peek().services.get(&caller.destination).cloned();
        let to = (&caller.source, &caller.destination, kind);
        let picked = self.pick_in_turn(to, || service().ok_or(OpenError::UnknownService), tried).await?;
        self.dial(to, picked, None).await
    }

    /// Opens a stream to an instance of the first target of `to` that has one which `tried` does not hold; adds it there.
    /// A target with as much under way as its limits allow has one: what is too much for it goes nowhere else.
    ///
    /// # Cancel safety
    /// As [`Worker::open`].
    pub(crate) async fn open_to(
        self: &Rc<Self>,
        source: &Source,
        to: &Resolved,
        kind: StreamKind,
        tried: &RefCell<Tried>,
    ) -> Result<Opened, OpenError> {
        if self.closed.is_cancelled() {
            return Err(OpenError::Draining);
        }
        let mut first = None;
        for target in std::iter::once(&to.target).chain(&to.failover) {
            let ends = (source, &target.service, kind);
            match self.pick_in_turn(ends, || self.instances(target), tried).await {
                Ok(picked) => return self.dial(ends, picked, to.connect_timeout).await,
                Err(error @ OpenError::Overflow(_)) => return Err(error),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or(OpenError::UnknownService))
    }

    /// Picks an instance of what `service` returns; where all have as much as they bear, waits for a turn.
    ///
    /// # Cancel safety
    /// Cancelling leaves the queue; the next one is called.
    async fn pick_in_turn(
        &self,
        ends: Ends<'_>,
        service: impl Fn() -> Result<Arc<ServiceEntry>, OpenError>,
        tried: &RefCell<Tried>,
    ) -> Result<(Picked, Instant), OpenError> {
        let found = service()?;
        let mut picked = self.pick(ends, &found, &mut tried.borrow_mut());
        if matches!(picked, Err(OpenError::Overflow(Limited::Instances))) {
            let entered = self.enter(ends, &found, &tried.borrow());
            picked = match entered {
                // In a box, as all that seldom happens on the way of a request: its task has room for what is common.
                Some(Ok(turn)) => Box::pin(self.wait_in_turn(ends, service, tried, &turn)).await,
                Some(Err(what)) => Err(OpenError::Overflow(what)),
                None => picked,
            };
        }
        picked
    }

    async fn wait_in_turn(
        &self,
        ends: Ends<'_>,
        service: impl Fn() -> Result<Arc<ServiceEntry>, OpenError>,
        tried: &RefCell<Tried>,
        turn: &Turn,
    ) -> Result<(Picked, Instant), OpenError> {
        loop {
            let called = tokio::time::timeout_at(turn.until(), poll_fn(|context| turn.poll_called(context)));
            if called.await.is_err() {
                self.metrics.queued.with_label_values(&["timeout"]).inc();
                return Err(OpenError::Overflow(Limited::Instances));
            }
            tried.borrow_mut().is_called = true;
            let picked = service().and_then(|service| self.pick(ends, &service, &mut tried.borrow_mut()));
            tried.borrow_mut().is_called = false;
            if !matches!(picked, Err(OpenError::Overflow(Limited::Instances))) {
                self.metrics.queued.with_label_values(&[if picked.is_ok() { "served" } else { "refused" }]).inc();
                return picked;
            }
        }
    }

    /// Enters the queue of a service; none: such calls do not wait.
    fn enter(
        &self,
        (source, destination, kind): Ends<'_>,
        service: &ServiceEntry,
        tried: &Tried,
    ) -> Option<Result<Turn, Limited>> {
        if kind != StreamKind::Http || !tried.priority.waits() {
            return None;
        }
        let snapshot = self.snapshot.peek();
        let (source, now) = (source.service(), clock::now());
        let ask = Ask { snapshot: &snapshot, source, destination, service, flow: Flow::Request, now };
        Some(self.balancer.borrow_mut().enter(&ask, tried).map_err(|_| Limited::Pending))
    }

    /// Returns the instances of a target.
    pub(in crate::proxy) fn instances(&self, target: &Arc<Target>) -> Result<Arc<ServiceEntry>, OpenError> {
        let snapshot = self.snapshot.peek();
        let service = snapshot.services.get(&target.service).ok_or(OpenError::UnknownService)?;
        if target.view.is_none() {
            return Ok(Arc::clone(service));
        }
        let here = snapshot.nodes.get(&snapshot.local_node).map_or("", |node| &node.info.datacenter);
        Ok(self.views.borrow_mut().of(target, service, here))
    }

    /// Picks an instance of `service`, which are those of `destination` or some of them, that `tried` does not hold, and adds
    /// it there. Also returns the time.
    fn pick(
        &self,
        (source, destination, kind): Ends<'_>,
        service: &ServiceEntry,
        tried: &mut Tried,
    ) -> Result<(Picked, Instant), OpenError> {
        let snapshot = self.snapshot.peek();
        let flow = match kind {
            StreamKind::Http => Flow::Request,
            StreamKind::Tcp | StreamKind::Udp => Flow::Connection,
        };
        let (source, now) = (source.service(), tried.now.take().unwrap_or_else(clock::now));
        let ask = Ask { snapshot: &snapshot, source, destination, service, flow, now };
        let picked = self.balancer.borrow_mut().pick(&ask, tried, &self.backoff.borrow());
        match picked {
            // The balancer comes back to what was tried where there is nothing else; one call meets an instance once.
            Ok(picked) if !tried.contains(&picked.instance) => {
                tried.add(Arc::clone(&picked.instance));
                Ok((picked, now))
            }
            Err(NoInstance::Overflow { what, .. }) => Err(OpenError::Overflow(what)),
            Err(NoInstance::FailsClosed { out, fit, .. }) => Err(OpenError::FailsClosed { out, fit }),
            Ok(_) | Err(_) => Err(no_instance(service)),
        }
    }

    /// Opens a stream to the instance of `destination` that was picked at `now`, connecting to its node within `limit` if
    /// there is one.
    async fn dial(
        self: &Rc<Self>,
        (source, destination, kind): Ends<'_>,
        (Picked { instance, load }, now): (Picked, Instant),
        limit: Option<Duration>,
    ) -> Result<Opened, OpenError> {
        let waiting = load.wait().ok_or(OpenError::Overflow(Limited::Pending))?;
        let node = &instance.node.info;
        let unreachable = |reason| OpenError::Unreachable { node: node.name.clone(), reason };
        let key = TunnelKey {
            source: source.service().cloned(),
            node: node.name.clone(),
            addr: node.mesh_addr,
            generation: instance.node.generation,
        };
        let opened = match self.stream_of_open(&key, destination, now) {
            Some(opened) => Ok(opened),
            None => Box::pin(self.stream(&key, destination, limit, now)).await,
        };
        drop(waiting);
        let ((send, recv), tunnel, at) = match opened {
            Ok(opened) => opened,
            // As much is under way there as may be: no fault of the instance, so nothing is counted against it.
            Err(Unopened::Full) => return Err(OpenError::Full { node: node.name.clone() }),
            Err(Unopened::Failed(reason)) => {
                self.connect_failed(&instance);
                self.observe(load.observer(), Outcome::GatewayFailure, Duration::ZERO, clock::now());
                return Err(unreachable(reason));
            }
        };
        let preamble = Preamble { kind, instance: instance.record.id.clone(), service: destination.clone() }.encode();
        Ok(Opened { send, recv, preamble, instance, lease: Lease::new(tunnel, load), at })
    }

    /// Opens a stream on the tunnel of `key` if that is open and has one: most times it is and does.
    fn stream_of_open(&self, key: &TunnelKey, destination: &ServiceName, now: Instant) -> Option<Streamed> {
        let tunnel = self.tunnels.opened(key, now)?;
        let covers = tunnel.peer.scope.covers(destination.as_str());
        let streams = covers.then(|| tunnel.connection.open_bi().now_or_never())??.ok()?;
        Some((streams, tunnel, now))
    }

    /// Opens a stream on the tunnel of `key`, which is dialled where it is not open; a tunnel that turns out to be lost is
    /// dialled once more, in what is left of the time. A tunnel that does not come within `limit` has failed; one that gives no
    /// stream in that time is full. Also returns when that was.
    async fn stream(
        &self,
        key: &TunnelKey,
        destination: &ServiceName,
        limit: Option<Duration>,
        now: Instant,
    ) -> Result<Streamed, Unopened> {
        let patience = limit.map_or(WAIT_MAX, |limit| limit.min(WAIT_MAX));
        let until = now + patience;
        let left = || until.saturating_duration_since(clock::now()).max(STREAM_WAIT_MIN.min(patience));
        let dialling = self.tunnel(key, destination);
        let dialled = match limit {
            // A dial has a time limit of its own, and all who wait for it learn how it ended.
            None => dialling.await,
            Some(limit) => {
                let late = || Err(format!("no connection within {limit:?}, the connect timeout"));
                within(limit, dialling).await.unwrap_or_else(late)
            }
        };
        let mut tunnel = dialled.map_err(Unopened::Failed)?;
        let mut is_second = false;
        loop {
            let opened = within(left(), tunnel.connection.open_bi()).await;
            match opened {
                Some(Ok(streams)) => return Ok((streams, tunnel, clock::now())),
                None => return Err(Unopened::Full),
                Some(Err(lost)) if is_second => return Err(Unopened::Failed(lost.to_string())),
                Some(Err(_lost)) => self.tunnels.forget(key, &tunnel),
            }
            is_second = true;
            let late = || Err(format!("the tunnel to {} was lost, and no other came in time", key.node));
            let again = within(left(), self.tunnel(key, destination)).await.unwrap_or_else(late);
            tunnel = again.map_err(Unopened::Failed)?;
        }
    }

    /// Returns a tunnel to a node that may serve `destination`.
    async fn tunnel(&self, key: &TunnelKey, destination: &ServiceName) -> Result<Rc<Tunnel>, String> {
        let tunnel = self.tunnels.get(key, &self.endpoint).await.map_err(|error| error.to_string())?;
        let scope = &tunnel.peer.scope;
        if !scope.covers(destination.as_str()) {
            self.metrics.outside_scope.inc();
            if let Some(left_out) = self.outside_told.due(clock::now()) {
                warn!(node = %key.node, %scope, service = %destination, left_out, "node announces a service outside its scope");
            }
            return Err(format!("{} may not serve {destination}: its scope is `{scope}`", key.node));
        }
        Ok(tunnel)
    }
}

/// Says how many instances there are, and how many of them are critical.
fn no_instance(service: &ServiceEntry) -> OpenError {
    let is_critical = |instance: &&Arc<Instance>| instance.status == HealthStatus::Critical;
    let critical = service.instances.iter().filter(is_critical).count();
    OpenError::NoInstance { total: service.instances.len(), critical }
}
