//! The two tasks that export: one takes spans from the queue, one reads the metrics.
//!
//! ```text
//!   spans:   batch -> carried? -- later: the same batch again, after what the collector asks for or 1 s to 30 s
//!                        \ never, or in part: counted, the next batch
//!   metrics: every interval, once: they are cumulative, so the next time says all
//! ```
//!
//! Not here: what a request looks like (`spans`, `metrics`), how it is sent (`client`).

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Meter;
use super::client::{Carry, CarryError, Signal, Taken};
use super::message::Origin;
use super::metrics::{Starts, requests};
use super::spans;
use crate::clock;
use crate::metrics::Metrics;
use crate::trace::Span;

/// Spans of one request: the default of OpenTelemetry's batch processor.
pub(super) const BATCH_MAX: usize = 512;
/// The first pause after a failure; each further one is twice as long.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// The longest.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// What waits at a stop is sent within this time, or dropped: the agent's own limit is 5 s.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// What both tasks need.
pub(super) struct Exporter<C> {
    pub(super) client: C,
    /// For the log.
    pub(super) endpoint: String,
    pub(super) origin: Origin,
    pub(super) interval: Duration,
    pub(super) meter: Meter,
    pub(super) stop: CancellationToken,
}

/// Whether a collector takes what it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Untried,
    Takes,
    Fails,
}

impl<C: Carry> Exporter<C> {
    /// Sends one request, counts it, and logs what changed.
    async fn carry(&self, health: &mut Health, signal: Signal, body: Bytes) -> Result<Taken, CarryError> {
        let carried = self.client.carry(signal, body).await;
        let (now, result, why) = match &carried {
            Ok(Taken::Whole) => (Health::Takes, "ok", String::new()),
            Ok(Taken::Partly(refused, why)) => (Health::Fails, "partial", format!("it refused {refused}: {why}")),
            Err(error) => (Health::Fails, "failed", error.to_string()),
        };
        self.meter.exports.with_label_values(&[signal.as_str(), result]).inc();
        let before = std::mem::replace(health, now);
        let (signal, endpoint) = (signal.as_str(), self.endpoint.as_str());
        match (before, now) {
            (Health::Untried | Health::Takes, Health::Fails) => warn!(
                signal,
                endpoint,
                error = why,
                "the collector does not take telemetry; this is said once, and it is tried again: is it running, and does \
                 telemetry.otlp.endpoint name its port for OTLP over HTTP (4318 as a rule, not 4317)?"
            ),
            (Health::Fails, Health::Takes) => info!(signal, endpoint, "the collector takes telemetry again"),
            _ => {}
        }
        carried
    }

    /// Returns when the stop has lasted for [`FLUSH_MAX`].
    async fn over(stop: CancellationToken) {
        stop.cancelled().await;
        tokio::time::sleep(FLUSH_MAX).await;
    }
}

/// Exports spans until the stop, and then what waits.
pub(super) async fn traces<C: Carry>(exporter: Exporter<C>, queue: mpsc::Receiver<Span>) {
    let (stop, late) = (exporter.stop.clone(), exporter.meter.dropped("stopped"));
    let mut spans = Spans { exporter, queue, batch: Vec::new(), health: Health::Untried };
    tokio::select! {
        () = spans.export() => {}
        () = Exporter::<C>::over(stop) => {}
    }
    spans.queue.close();
    let left = spans.batch.len() + spans.queue.len();
    if left > 0 {
        late.inc_by(left as u64);
        warn!(spans = left, "the agent stops before the collector took these spans: they are lost");
    }
}

struct Spans<C> {
    exporter: Exporter<C>,
    queue: mpsc::Receiver<Span>,
    /// What is being sent.
    batch: Vec<Span>,
    health: Health,
}

impl<C: Carry> Spans<C> {
    async fn export(&mut self) {
        loop {
            let goes_on = self.gather().await;
            if !self.batch.is_empty() && !self.deliver().await {
                return;
            }
            if !goes_on && !self.fill() {
                return;
            }
        }
    }

    /// Takes spans until there are enough, or the first has waited for an interval; false: there will be no more.
    async fn gather(&mut self) -> bool {
        let mut due = None;
        while self.batch.len() < BATCH_MAX {
            let room = BATCH_MAX - self.batch.len();
            let waited = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.exporter.stop.cancelled() => return false,
                count = self.queue.recv_many(&mut self.batch, room) => {
                    if count == 0 {
                        return false;
                    }
                    due.get_or_insert_with(|| clock::now() + self.exporter.interval);
                }
                () = waited => return true,
            }
        }
        true
    }

    /// Takes what waits; false: nothing does.
    fn fill(&mut self) -> bool {
        while self.batch.len() < BATCH_MAX {
            let Ok(span) = self.queue.try_recv() else { break };
            self.batch.push(span);
        }
        !self.batch.is_empty()
    }

    /// Sends the batch until it is taken or refused; false: the agent stops, and the collector takes nothing.
    async fn deliver(&mut self) -> bool {
        let Self { exporter, batch, health, .. } = self;
        let body = Bytes::from(spans::request(&exporter.origin, batch).encode_to_vec());
        let mut failures = 0;
        let refused = loop {
            match exporter.carry(health, Signal::Traces, body.clone()).await {
                Ok(Taken::Whole) => break 0,
                Ok(Taken::Partly(refused, _)) => break refused,
                Err(CarryError::Never { .. }) => break batch.len() as u64,
                Err(CarryError::Later { .. }) if exporter.stop.is_cancelled() => return false,
                Err(CarryError::Later { after, .. }) => {
                    failures += 1;
                    let wait = after.unwrap_or_else(|| backoff(failures, rand::random()));
                    // A stop is tried once more.
                    let _woken = tokio::time::timeout(wait, exporter.stop.cancelled()).await;
                }
            }
        };
        exporter.meter.dropped("refused").inc_by(refused);
        batch.clear();
        true
    }
}

/// The pause after so many failures: the upper half of it by chance (`random` is 0 to 1), so that agents do not come together.
fn backoff(failures: u32, random: f64) -> Duration {
    let whole = BACKOFF_MIN.saturating_mul(1 << failures.saturating_sub(1).min(5)).min(BACKOFF_MAX);
    whole.mul_f64(0.5 + random / 2.0)
}

/// Exports metrics at every interval until the stop, and then once more.
pub(super) async fn metrics<C: Carry>(exporter: Exporter<C>, metrics: Metrics, started_ns: u64) {
    let stop = exporter.stop.clone();
    tokio::select! {
        () = export_metrics(&exporter, &metrics, started_ns) => {}
        () = Exporter::<C>::over(stop) => {}
    }
}

async fn export_metrics<C: Carry>(exporter: &Exporter<C>, metrics: &Metrics, started_ns: u64) {
    let (mut starts, mut health, mut wait) = (Starts::new(started_ns), Health::Untried, exporter.interval);
    loop {
        let is_last = tokio::time::timeout(wait, exporter.stop.cancelled()).await.is_ok();
        wait = exporter.interval;
        let requests = requests(&exporter.origin, &metrics.registry().gather(), &mut starts, clock::wall_ns());
        for request in requests {
            let body = Bytes::from(request.encode_to_vec());
            if let Err(CarryError::Later { after, .. }) = exporter.carry(&mut health, Signal::Metrics, body).await {
                // The others would meet the same.
                wait = wait.max(after.unwrap_or_default());
                break;
            }
        }
        if is_last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    use prometheus::IntCounter;
    use tokio::time::Instant;

    use super::*;
    use crate::otlp::message::{MetricsRequest, TracesRequest};
    use crate::otlp::spans::tests::{origin, span};

    /// A collector that answers as it is told, and then takes everything.
    #[derive(Clone, Default)]
    struct Collector {
        answers: Arc<Mutex<VecDeque<Result<Taken, CarryError>>>>,
        /// It never answers.
        hangs: bool,
        seen: Arc<Mutex<Vec<(Instant, Signal, Bytes)>>>,
    }

    impl Carry for Collector {
        async fn carry(&self, signal: Signal, body: Bytes) -> Result<Taken, CarryError> {
            self.seen.lock().unwrap().push((clock::now(), signal, body));
            if self.hangs {
                std::future::pending::<()>().await;
            }
            self.answers.lock().unwrap().pop_front().unwrap_or(Ok(Taken::Whole))
        }
    }

    impl Collector {
        fn answering(answers: &[Result<Taken, CarryError>]) -> Self {
            Self { answers: Arc::new(Mutex::new(answers.iter().cloned().collect())), ..Self::default() }
        }

        /// When each request came, in seconds after `start`, and how many spans it held.
        fn batches(&self, start: Instant) -> Vec<(u64, usize)> {
            let of = |(at, _, body): &(Instant, Signal, Bytes)| {
                let request = TracesRequest::decode(body.clone()).unwrap();
                ((*at - start).as_secs(), request.resource_spans[0].scope_spans[0].spans.len())
            };
            self.seen.lock().unwrap().iter().map(of).collect()
        }
    }

    struct Run {
        collector: Collector,
        meter: Meter,
        queue: mpsc::Sender<Span>,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
        start: Instant,
    }

    fn exporter(collector: &Collector, meter: &Meter, stop: &CancellationToken) -> Exporter<Collector> {
        Exporter {
            client: collector.clone(),
            endpoint: "http://collector".to_owned(),
            origin: origin(),
            interval: Duration::from_secs(10),
            meter: meter.clone(),
            stop: stop.clone(),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the test joins its one task")]
    fn run(collector: Collector) -> Run {
        let (meter, stop) = (Meter::new(&Metrics::new()).unwrap(), CancellationToken::new());
        let (queue, spans) = mpsc::channel(2_048);
        let task = tokio::spawn(traces(exporter(&collector, &meter, &stop), spans));
        Run { collector, meter, queue, stop, task, start: clock::now() }
    }

    impl Run {
        fn put(&self, spans: usize) {
            for _ in 0..spans {
                self.queue.try_send(span(1)).unwrap();
            }
        }

        fn dropped(&self, reason: &str) -> u64 {
            IntCounter::get(&self.meter.dropped(reason))
        }

        async fn seconds(&self, seconds: u64) {
            tokio::time::sleep_until(self.start + Duration::from_secs(seconds)).await;
        }
    }

    fn later(after: Option<u64>) -> Result<Taken, CarryError> {
        Err(CarryError::Later { after: after.map(Duration::from_secs), why: "503".to_owned() })
    }

    #[tokio::test(start_paused = true)]
    async fn spans_wait_for_an_interval_or_a_full_batch() {
        let run = run(Collector::default());
        run.put(3);
        run.seconds(9).await;
        assert_eq!(run.collector.batches(run.start), []);
        run.seconds(11).await;
        assert_eq!(run.collector.batches(run.start), [(10, 3)]);
        run.seconds(20).await;
        run.put(BATCH_MAX + 1);
        run.seconds(40).await;
        assert_eq!(run.collector.batches(run.start), [(10, 3), (20, BATCH_MAX), (30, 1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_collector_that_is_busy_gets_the_same_batch_when_it_asks_for_it_and_nothing_is_lost() {
        let run = run(Collector::answering(&[later(Some(7)), later(None), later(None)]));
        run.put(BATCH_MAX);
        run.seconds(1).await;
        run.put(BATCH_MAX);
        run.seconds(60).await;
        let batches = run.collector.batches(run.start);
        assert_eq!(batches.len(), 5, "{batches:?}");
        assert!(batches.iter().all(|(_, spans)| *spans == BATCH_MAX));
        let at = |number: usize| batches[number].0;
        assert_eq!((at(0), at(1)), (0, 7), "its own wish");
        assert!((7 + 1 + 2..=7 + 2 + 4).contains(&at(3)), "then half of 2 s and of 4 s at least: {batches:?}");
        let bodies: Vec<Bytes> = run.collector.seen.lock().unwrap().iter().map(|(.., body)| body.clone()).collect();
        assert!(bodies[..4].windows(2).all(|pair| pair[0] == pair[1]), "the same bytes");
        assert_eq!(["refused", "stopped"].map(|reason| run.dropped(reason)), [0, 0]);
        assert_eq!(run.meter.exports.with_label_values(&["traces", "failed"]).get(), 3);
        assert_eq!(run.meter.exports.with_label_values(&["traces", "ok"]).get(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_collector_refuses_is_counted_and_not_sent_again() {
        let never = Err(CarryError::Never { why: "401".to_owned() });
        let run = run(Collector::answering(&[never, Ok(Taken::Partly(2, "no".to_owned()))]));
        run.put(5);
        run.seconds(11).await;
        run.put(5);
        run.seconds(60).await;
        assert_eq!(run.collector.batches(run.start), [(10, 5), (21, 5)]);
        assert_eq!(run.dropped("refused"), 5 + 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_sends_what_waits_at_once() {
        let run = run(Collector::default());
        run.put(BATCH_MAX + 9);
        run.put(1);
        run.stop.cancel();
        run.task.await.unwrap();
        assert_eq!(run.collector.batches(run.start), [(0, BATCH_MAX), (0, 10)]);
        assert_eq!(run.meter.dropped("stopped").get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_waits_two_seconds_for_a_collector_that_hangs_and_not_for_one_that_is_down() {
        let hanging = run(Collector { hangs: true, ..Collector::default() });
        hanging.put(700);
        hanging.seconds(1).await;
        hanging.stop.cancel();
        let stopped = clock::now();
        hanging.task.await.unwrap();
        assert_eq!((clock::now() - stopped).as_millis(), FLUSH_MAX.as_millis());
        assert_eq!(hanging.meter.dropped("stopped").get(), 700);

        let down = run(Collector::answering(&[later(None), later(None)]));
        down.put(7);
        down.stop.cancel();
        let stopped = clock::now();
        down.task.await.unwrap();
        assert_eq!(clock::now(), stopped);
        assert_eq!(down.meter.dropped("stopped").get(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn metrics_are_sent_every_interval_and_once_more_at_the_stop() {
        let (metrics, stop) = (Metrics::new(), CancellationToken::new());
        let meter = Meter::new(&metrics).unwrap();
        meter.dropped("refused").inc_by(3);
        let collector = Collector::answering(&[Ok(Taken::Whole), later(Some(25))]);
        let start = clock::now();
        let cancel = async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            stop.cancel();
        };
        tokio::join!(super::metrics(exporter(&collector, &meter, &stop), metrics.clone(), 1), cancel);
        let seen = collector.seen.lock().unwrap().clone();
        let at: Vec<u64> = seen.iter().map(|(at, ..)| (*at - start).as_secs()).collect();
        assert_eq!(at, [10, 20, 45, 55, 60]);
        let first = MetricsRequest::decode(seen[0].2.clone()).unwrap();
        let names: Vec<&str> =
            first.resource_metrics[0].scope_metrics[0].metrics.iter().map(|metric| metric.name.as_str()).collect();
        assert_eq!(names, ["weft.otlp.dropped_spans"]);
    }

    #[test]
    fn pauses_grow_to_half_a_minute() {
        let pauses: Vec<u64> = [1, 2, 3, 6, 7, 60].map(|failures| backoff(failures, 1.0).as_secs()).to_vec();
        assert_eq!(pauses, [1, 2, 4, 30, 30, 30]);
        assert_eq!(backoff(2, 0.0), Duration::from_secs(1));
    }
}
