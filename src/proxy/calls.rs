//! The streams of peers that one worker serves, so that a changed intention can end those that it no longer allows.
//!
//! ```text
//!   stream -> Ticket (a place in the list, reused) -> admitted: stream | request head
//!   new table -> Calls::cut: decides anew over each -> woken, dropped, reset
//! ```
//!
//! Invariant: between a decision and its note here a task does not wait, so that no stream slips past a change. A place
//! costs no allocation. Not here: how decisions are made (`authz`).

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use crate::model::ServiceName;
use crate::pki::PeerIdentity;

/// What was decided over.
#[derive(Debug, Clone)]
pub(super) enum Admitted {
    /// Nothing yet: the decision is to come, by the newest table.
    Nothing,
    /// A stream of bytes.
    Stream,
    /// A request with this head, as it came.
    Request(Bytes),
}

/// A stream that is served.
pub(super) struct Call {
    pub(super) peer: Rc<PeerIdentity>,
    pub(super) service: ServiceName,
    pub(super) admitted: Admitted,
    is_cut: bool,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Places {
    calls: Vec<Option<Call>>,
    free: Vec<usize>,
}

/// The list.
#[derive(Default)]
pub(super) struct Calls(RefCell<Places>);

/// A place in the list, given back when dropped.
pub(crate) struct Ticket {
    calls: Rc<Calls>,
    place: usize,
}

impl Calls {
    /// Enters a stream.
    pub(super) fn enter(self: &Rc<Self>, peer: Rc<PeerIdentity>, service: ServiceName) -> Ticket {
        let call = Call { peer, service, admitted: Admitted::Nothing, is_cut: false, waker: None };
        let mut places = self.0.borrow_mut();
        let place = if let Some(place) = places.free.pop() {
            place
        } else {
            places.calls.push(None);
            places.calls.len() - 1
        };
        if let Some(slot) = places.calls.get_mut(place) {
            *slot = Some(call);
        }
        Ticket { calls: Rc::clone(self), place }
    }

    /// Ends the streams that `is_allowed` does not; returns how many.
    pub(super) fn cut(&self, mut is_allowed: impl FnMut(&Call) -> bool) -> usize {
        let mut wakers = Vec::new();
        let mut count = 0;
        for call in self.0.borrow_mut().calls.iter_mut().flatten() {
            if !call.is_cut && !matches!(call.admitted, Admitted::Nothing) && !is_allowed(call) {
                call.is_cut = true;
                count += 1;
                wakers.extend(call.waker.take());
            }
        }
        wakers.into_iter().for_each(Waker::wake);
        count
    }
}

impl Ticket {
    /// Notes what was decided over.
    pub(super) fn admit(&self, admitted: Admitted) {
        if let Some(Some(call)) = self.calls.0.borrow_mut().calls.get_mut(self.place) {
            call.admitted = admitted;
        }
    }

    /// Notes that a request with this head was admitted.
    pub(crate) fn admit_request(&self, head: Bytes) {
        self.admit(Admitted::Request(head));
    }

    fn is_cut(&self, context: &Context<'_>) -> bool {
        let mut places = self.calls.0.borrow_mut();
        let Some(Some(call)) = places.calls.get_mut(self.place) else { return false };
        if !call.is_cut && call.waker.as_ref().is_none_or(|waker| !waker.will_wake(context.waker())) {
            call.waker = Some(context.waker().clone());
        }
        call.is_cut
    }

    /// Runs `future` until it is done or the stream is cut: then it is dropped, which resets the stream.
    pub(super) async fn unless_cut<F: Future<Output = ()>>(&self, mut future: Pin<&mut F>) {
        poll_fn(|context| {
            if self.is_cut(context) {
                return Poll::Ready(());
            }
            future.as_mut().poll(context)
        })
        .await;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut places = self.calls.0.borrow_mut();
        let call = places.calls.get_mut(self.place).and_then(Option::take);
        places.free.push(self.place);
        drop(places);
        // The last handle of an identity may be here: outside the borrow.
        drop(call);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::pin;

    use super::*;
    use crate::clock::UnixSeconds;

    fn peer(service: &str) -> Rc<PeerIdentity> {
        Rc::new(PeerIdentity {
            id: format!("spiffe://td/svc/{service}/node/n1").parse().unwrap(),
            node: "n1".parse().unwrap(),
            scope: "*".parse().unwrap(),
            not_after: UnixSeconds(u64::MAX),
        })
    }

    #[tokio::test]
    async fn a_cut_ends_what_is_not_allowed_and_places_are_used_again() {
        let calls = Rc::new(Calls::default());
        let db: ServiceName = "db".parse().unwrap();
        let (web, api) = (calls.enter(peer("web"), db.clone()), calls.enter(peer("api"), db.clone()));
        let undecided = calls.enter(peer("web"), db.clone());
        web.admit(Admitted::Stream);
        api.admit_request(Bytes::new());
        let ended = Cell::new(0);
        let is_web = |call: &Call| call.peer.id.service().is_some_and(|name| name.as_str() == "web");
        let cutting = async {
            tokio::task::yield_now().await;
            assert_eq!(calls.cut(|call| !is_web(call)), 1, "one is undecided, one may go on");
            assert_eq!(calls.cut(|call| !is_web(call)), 0, "nothing is cut twice");
        };
        let served = async {
            web.unless_cut(pin!(std::future::pending())).await;
            ended.set(ended.get() + 1);
        };
        tokio::join!(served, cutting);
        assert_eq!(ended.get(), 1);
        api.unless_cut(pin!(async {})).await;
        drop((web, api, undecided));
        let again = calls.enter(peer("web"), db);
        assert_eq!((calls.0.borrow().calls.len(), calls.0.borrow().free.len()), (3, 2));
        drop(again);
    }
}
