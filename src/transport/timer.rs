//! quinn's runtime for the control plane's connections: tokio's, with the timers of a quiet thread (`alarm`).
//!
//! Those of an idle agent's connections move with every packet that they exchange now and then; in tokio's wheels each move
//! and each wait of more than 64 ms would wake the thread once more. Not here: the data plane's workers, which keep tokio's.

use std::future::Future;
use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};

use crate::alarm::{Alarm, sleep_until};

/// tokio's runtime with [`ExactTimer`]s.
#[derive(Debug)]
pub(super) struct ControlRuntime;

impl Runtime for ControlRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        Box::pin(ExactTimer(sleep_until(at.into())))
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        TokioRuntime.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

/// A timer whose earlier times are forgotten when it is reset.
#[derive(Debug)]
struct ExactTimer(Alarm);

impl AsyncTimer for ExactTimer {
    fn reset(mut self: Pin<&mut Self>, at: Instant) {
        self.0.reset(at.into());
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.0).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_timer_rings_at_its_last_time_and_only_then() {
        let begun = tokio::time::Instant::now();
        let at = |millis| (begun + Duration::from_millis(millis)).into_std();
        let mut timer = ControlRuntime.new_timer(at(10));
        let mut polls = 0;
        std::future::poll_fn(|cx| {
            polls += 1;
            if polls == 1 {
                // Registered, then put off.
                assert!(timer.as_mut().poll(cx).is_pending());
                timer.as_mut().reset(at(5_000));
            }
            timer.as_mut().poll(cx)
        })
        .await;
        assert_eq!((begun.elapsed(), polls), (Duration::from_secs(5), 2));
        timer.as_mut().reset(at(5_001));
        std::future::poll_fn(|cx| timer.as_mut().poll(cx)).await;
        assert_eq!(begun.elapsed(), Duration::from_millis(5_001));
    }
}
