//! DNS: the catalogue for whatever speaks nothing else.
//!
//! ```text
//!   UDP, TCP --> server --> message::decode --> name::parse --> answer (zone of the newest snapshot) --> message::encode
//!                   |                               \-- names of others --> cache | recurse --> recursors
//!                   \-- limit: what strangers get
//! ```
//!
//! With `dns_config.near` instances come nearest first (`near`). A reload puts new settings in place of the old ones between two questions.
//! All of it runs on one thread of its own, so that a flood of queries takes nothing of gossip's or the API's time. `name`, `answer`, `message`,
//! `zone`, `cache` and `limit` are pure.
//!
//! Invariants: an answer comes from the newest snapshot, so that the query after a change sees it; what strangers can fill is bounded
//! (connections, waiting questions, cache, rate by UDP); answers by UDP to other hosts are at most 1,232 bytes long.
//! Not here: which names there are (`api/dns.md`), virtual IPs (`catalogue::virtual_ip`), health.

mod answer;
mod cache;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod limit;
mod message;
mod metrics;
mod name;
mod near;
mod recurse;
mod server;
mod zone;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::limit::Sources;
use self::metrics::Meter;
use self::near::Distances;
pub use self::near::{Near, NearError, RoundTrips, Trips};
use self::recurse::Recursor;
use self::server::{Places, Settings, Shared};
use self::zone::ZoneCell;
use crate::catalogue::SnapshotReader;
use crate::clock;
use crate::metrics::Metrics;
use crate::prepared::Book;
use crate::supervise::Tasks;

/// Longest domain, in bytes: the longest node name, its kind and a datacenter fit before it into 255.
pub const DOMAIN_BYTES_MAX: usize = 100;
/// Most addresses to listen on.
pub const LISTEN_MAX: usize = 16;
/// Most recursors: the last ones would be asked after the asker gave up.
pub const RECURSORS_MAX: usize = 8;
/// How many records an answer holds for whoever takes 512 bytes alone: Consul's default.
pub const UDP_ANSWER_LIMIT_DEFAULT: usize = 3;
/// How long a recursor is waited for: Consul's default.
pub const RECURSOR_TIMEOUT_DEFAULT: Duration = Duration::from_secs(2);
/// At the end, questions that wait for recursors have so long.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of the receive buffer that are asked for: some thousand queries that wait while the thread does not run.
const RECEIVE_BUFFER_BYTES: usize = 1 << 20;
/// How often a port is looked for that is free for both UDP and TCP, where any will do.
const PORT_TRIES: u32 = 16;

/// A domain below which names are answered, in lower case: `weft`, `mesh.example.com`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainName(String);

impl DomainName {
    /// Returns the text, without a dot at its end.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is no domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be a domain of at most {DOMAIN_BYTES_MAX} bytes: labels of 1 to 63 letters, digits, `-` or `_`, joined by dots"
)]
pub struct DomainError;

impl FromStr for DomainName {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        if text.len() > DOMAIN_BYTES_MAX || !text.split('.').all(is_label) {
            return Err(DomainError);
        }
        Ok(Self(text))
    }
}

/// How long answers about services hold, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceTtls {
    /// By name, in lower case, in seconds; a name that ends in `*` is the beginning of names.
    pub by_name: BTreeMap<String, u32>,
}

impl ServiceTtls {
    /// Returns the seconds for `service`, in lower case: those of its name, or of the longest beginning of it, or 0.
    pub fn of(&self, service: &str) -> u32 {
        if self.by_name.is_empty() {
            return 0;
        }
        let by_start = || {
            let starts = self.by_name.iter().filter_map(|(name, ttl)| Some((name.strip_suffix('*')?, *ttl)));
            starts
                .filter(|(start, _)| service.starts_with(start))
                .max_by_key(|(start, _)| start.len())
                .map(|(_, ttl)| ttl)
        };
        self.by_name.get(service).copied().or_else(by_start).unwrap_or(0)
    }
}

/// Times of the SOA record, in seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SoaTimes {
    /// For secondaries, of which there are none.
    pub refresh_s: u32,
    /// For secondaries.
    pub retry_s: u32,
    /// For secondaries.
    pub expire_s: u32,
    /// How long others may remember that a name is not there.
    pub minimum_s: u32,
}

impl Default for SoaTimes {
    /// Consul's: nobody remembers that a name is not there.
    fn default() -> Self {
        Self { refresh_s: 3600, retry_s: 600, expire_s: 86_400, minimum_s: 0 }
    }
}

/// How DNS answers. Complete and valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsConfig {
    /// Where it listens, by UDP and TCP.
    pub listen: Vec<SocketAddr>,
    /// The domain.
    pub domain: DomainName,
    /// A second domain with the same names.
    pub alt_domain: Option<DomainName>,
    /// Who is asked for names of others, in order; none: they are refused.
    pub recursors: Vec<SocketAddr>,
    /// How long each of them is waited for.
    pub recursor_timeout: Duration,
    /// How long answers about nodes hold, in seconds.
    pub node_ttl_s: u32,
    /// How long answers about services hold.
    pub service_ttl: ServiceTtls,
    /// Most records of an answer by UDP without EDNS; 0: as many as fit.
    pub udp_answer_limit: usize,
    /// Most addresses of an answer; 0: as many as fit.
    pub a_record_limit: usize,
    /// Whether an answer that `udp_answer_limit` cut says so (TC). One that did not fit always does.
    pub enable_truncate: bool,
    /// Whether instances with a warning are left out.
    pub only_passing: bool,
    /// From where instances are ordered by distance; none: they are shuffled.
    pub near: Option<Near>,
    /// Times of the SOA record.
    pub soa: SoaTimes,
}

impl DnsConfig {
    /// Returns the defaults, listening on `listen`.
    pub fn on(listen: Vec<SocketAddr>) -> Self {
        Self {
            listen,
            domain: DomainName("weft".to_owned()),
            alt_domain: Some(DomainName("consul".to_owned())),
            recursors: Vec::new(),
            recursor_timeout: RECURSOR_TIMEOUT_DEFAULT,
            node_ttl_s: 0,
            service_ttl: ServiceTtls::default(),
            udp_answer_limit: UDP_ANSWER_LIMIT_DEFAULT,
            a_record_limit: 0,
            enable_truncate: false,
            only_passing: false,
            near: None,
            soa: SoaTimes::default(),
        }
    }
}

/// What DNS needs of the agent.
pub struct DnsParams<'a> {
    /// How it answers.
    pub config: DnsConfig,
    /// This agent's datacenter: that of names that say none.
    pub datacenter: String,
    /// What it answers from.
    pub snapshot: SnapshotReader,
    /// Tells how far nodes are.
    pub round_trips: Arc<dyn RoundTrips>,
    /// The prepared queries; whoever writes it replaces it.
    pub queries: Arc<ArcSwap<Book>>,
    /// Where its metrics go.
    pub metrics: &'a Metrics,
    /// Where its tasks are named and joined.
    pub tasks: &'a Tasks,
    /// Ends it.
    pub stop: CancellationToken,
}

/// Why DNS does not start.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// An address cannot be had.
    #[error(
        "cannot bind DNS on {addr} ({protocol}): give ports.dns or addresses.dns another value, or turn DNS off with ports.dns = -1"
    )]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// `UDP` or `TCP`.
        protocol: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The operating system refuses a thread.
    #[error("cannot start the thread of DNS")]
    Thread(#[source] io::Error),
    /// A metric of that name exists.
    #[error("cannot register the metrics of DNS")]
    Metrics(#[source] prometheus::Error),
}

/// The DNS server.
#[derive(Debug)]
pub struct Dns {
    listening: Vec<SocketAddr>,
    settings: Arc<ArcSwap<Settings>>,
    datacenter: String,
    meter: Arc<Meter>,
}

impl Dns {
    /// Binds its sockets and serves them on a thread of its own until it is told to stop.
    ///
    /// Must be called inside a tokio runtime, which hears if the thread fails.
    ///
    /// # Errors
    /// [`DnsError`]; nothing is served then.
    pub fn start(params: DnsParams<'_>) -> Result<Self, DnsError> {
        let DnsParams { config, datacenter, snapshot, round_trips, queries, metrics, tasks, stop } = params;
        let meter = Arc::new(Meter::new(metrics).map_err(DnsError::Metrics)?);
        let sockets: Vec<Bound> = config.listen.iter().map(|addr| Bound::on(*addr)).collect::<Result<_, _>>()?;
        let listening: Vec<SocketAddr> = sockets.iter().map(|bound| bound.addr).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(DnsError::Thread)?;
        info!(listen = ?listening, domain = %config.domain, recursors = ?config.recursors, "DNS is up");
        let recursor = Recursor::new(config.recursors.clone(), config.recursor_timeout, Arc::clone(&meter));
        let settings = Settings::new(config, datacenter.clone(), recursor.map(Arc::new));
        let settings = Arc::new(ArcSwap::from_pointee(settings));
        let shared = Arc::new(Shared {
            settings: Arc::clone(&settings),
            distances: Arc::new(Distances::new(round_trips)),
            queries,
            zone: ZoneCell::new(snapshot),
            meter: Arc::clone(&meter),
            sources: Mutex::new(Sources::new()),
            places: Arc::new(Places::default()),
            begun: clock::now(),
            tasks: tasks.clone(),
            stop,
        });
        let (ended_tx, ended) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("weft-dns".to_owned());
        thread
            .spawn(move || {
                runtime.block_on(serve(sockets, shared));
                let _nobody_waits = ended_tx.send(());
            })
            .map_err(DnsError::Thread)?;
        tasks.spawn("dns", async move {
            ended.await.expect("the thread of DNS ends when the agent stops");
        });
        Ok(Self { listening, settings, datacenter, meter })
    }

    /// Where it listens.
    pub fn listening(&self) -> &[SocketAddr] {
        &self.listening
    }

    /// Answers by `config` from the next question on, but where it listens: that stays. What recursors said is kept for as
    /// long as they are the same ones.
    pub fn reload(&self, config: DnsConfig) {
        let before = self.settings.load();
        let kept =
            before.recursor.as_ref().filter(|recursor| recursor.is_of(&config.recursors, config.recursor_timeout));
        let new =
            || Recursor::new(config.recursors.clone(), config.recursor_timeout, Arc::clone(&self.meter)).map(Arc::new);
        let recursor = kept.cloned().or_else(new);
        self.settings.store(Arc::new(Settings::new(config, self.datacenter.clone(), recursor)));
    }
}

async fn serve(sockets: Vec<Bound>, shared: Arc<Shared>) {
    for bound in sockets {
        shared.tasks.spawn("dns-udp", server::udp(bound.udp, Arc::clone(&shared)));
        shared.tasks.spawn("dns-tcp", server::tcp(bound.tcp, Arc::clone(&shared)));
    }
    shared.stop.cancelled().await;
    if let Some(recursor) = &shared.settings.load_full().recursor {
        let _cut_off = tokio::time::timeout(DRAIN_TIMEOUT, recursor.idle()).await;
    }
    // What was answered in the same turn is sent.
    tokio::task::yield_now().await;
}

/// Both sockets of one address.
struct Bound {
    addr: SocketAddr,
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Bound {
    fn on(wanted: SocketAddr) -> Result<Self, DnsError> {
        let failed = |protocol| move |source| DnsError::Bind { addr: wanted, protocol, source };
        let mut tries = PORT_TRIES;
        loop {
            let (addr, udp) = bind_udp(wanted).map_err(failed("UDP"))?;
            tries -= 1;
            match TcpListener::bind(addr) {
                Ok(tcp) => {
                    tcp.set_nonblocking(true).map_err(failed("TCP"))?;
                    return Ok(Self { addr, udp, tcp });
                }
                // Any port was asked for, and this one is free for UDP alone.
                Err(_) if wanted.port() == 0 && tries > 0 => {}
                Err(source) => return Err(failed("TCP")(source)),
            }
        }
    }
}

fn bind_udp(wanted: SocketAddr) -> io::Result<(SocketAddr, UdpSocket)> {
    let udp = UdpSocket::bind(wanted)?;
    udp.set_nonblocking(true)?;
    // As much as the host allows; the default holds a few hundred queries.
    let _as_it_is = socket2::SockRef::from(&udp).set_recv_buffer_size(RECEIVE_BUFFER_BYTES);
    Ok((udp.local_addr()?, udp))
}
