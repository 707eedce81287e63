//! How checks reach their targets: names, TCP, TLS, UDP.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::state::Outcome;
use crate::model::HealthStatus;
use crate::pki::{ServerCheck, host_roots};
use crate::registry::definition::TlsOptions;

/// Most names that are looked up at once: the system's resolver blocks a thread for each and cannot be stopped.
const LOOKUPS_MAX: usize = 32;
/// How long silence is listened to: an ICMP refusal comes after a round trip.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// A connection, with TLS or without.
pub(super) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// What checks use of the host, and how their TLS is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckSettings {
    /// Certificates of CAs (PEM) that TLS checks believe beside the host's.
    pub ca_file: Option<PathBuf>,
    /// Docker's socket.
    pub docker_socket: PathBuf,
    /// The socket of D-Bus' system bus.
    pub dbus_socket: PathBuf,
}

impl Default for CheckSettings {
    fn default() -> Self {
        Self {
            ca_file: None,
            docker_socket: PathBuf::from("/var/run/docker.sock"),
            dbus_socket: PathBuf::from("/run/dbus/system_bus_socket"),
        }
    }
}

/// What the runs of all checks share.
pub(crate) struct Tools {
    settings: ArcSwap<CheckSettings>,
    tls: ArcSwap<TlsConfigs>,
    lookups: Arc<Semaphore>,
}

impl fmt::Debug for Tools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tools").field("settings", &self.settings).finish_non_exhaustive()
    }
}

struct TlsConfigs {
    verified: ClientConfig,
    unverified: ClientConfig,
}

impl Tools {
    /// Reads the roots that checks believe. Blocks on the disk.
    ///
    /// # Errors
    /// If the CA file cannot be used.
    pub(crate) fn new(settings: CheckSettings) -> Result<Self, String> {
        let tls = TlsConfigs::read(&settings)?;
        Ok(Self {
            settings: ArcSwap::from_pointee(settings),
            tls: ArcSwap::from_pointee(tls),
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
        })
    }

    /// Takes other settings, and reads the roots anew; runs that go on end under the old ones. Blocks on the disk.
    ///
    /// # Errors
    /// If the CA file cannot be used; nothing is changed then.
    pub(crate) fn reload(&self, settings: CheckSettings) -> Result<(), String> {
        self.tls.store(Arc::new(TlsConfigs::read(&settings)?));
        self.settings.store(Arc::new(settings));
        Ok(())
    }

    pub(super) fn settings(&self) -> Arc<CheckSettings> {
        self.settings.load_full()
    }

    /// Connects to `host:port`.
    pub(super) async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, String> {
        let addrs = self.resolve(host, port).await?;
        TcpStream::connect(addrs.as_slice()).await.map_err(|error| error.to_string())
    }

    /// Connects to `host:port` and shakes hands where `tls` is given, offering `alpn`.
    pub(super) async fn open(
        &self,
        host: &str,
        port: u16,
        tls: Option<&TlsOptions>,
        alpn: Option<&str>,
    ) -> Result<Box<dyn Io>, String> {
        let stream = self.connect(host, port).await?;
        let Some(options) = tls else { return Ok(Box::new(stream)) };
        let name = if options.server_name.is_empty() { host } else { &options.server_name };
        let name = ServerName::try_from(name.to_owned()).map_err(|_| format!("{name:?} is no name of a TLS server"))?;
        let configs = self.tls.load_full();
        let mut config = if options.skip_verify { configs.unverified.clone() } else { configs.verified.clone() };
        config.alpn_protocols = alpn.map(|name| name.as_bytes().to_vec()).into_iter().collect();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await.map_err(|error| format!("TLS handshake: {error}"))?;
        Ok(Box::new(stream))
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        // Held by the thread, which may outlive the run.
        let Ok(permit) = Arc::clone(&self.lookups).acquire_owned().await else { return Err("stopped".to_owned()) };
        let name = host.to_owned();
        let looked_up = tokio::task::spawn_blocking(move || {
            let _held = permit;
            (name.as_str(), port).to_socket_addrs().map(Iterator::collect)
        });
        let found: io::Result<Vec<SocketAddr>> = looked_up.await.map_err(|error| error.to_string())?;
        found.map_err(|error| format!("cannot look up {host}: {error}"))
    }

    /// The TCP check.
    pub(super) async fn tcp(&self, target: &str, tls: Option<&TlsOptions>) -> Outcome {
        let (host, port) = split(target);
        match self.open(host, port, tls, None).await {
            Ok(_stream) => passing(format!("TCP connect {target}: Success")),
            Err(problem) => critical(format!("TCP connect {target}: {problem}")),
        }
    }

    /// The UDP check: an empty datagram; silence is no failure, since most servers ignore it.
    pub(super) async fn udp(&self, target: &str, limit: Duration) -> Outcome {
        // The whole check has `limit`, the look-up of the name included: silence must not meet its end.
        match self.datagram(target, (limit / 2).min(SILENCE_MAX)).await {
            Ok(()) => passing(format!("UDP connect {target}: Success")),
            Err(problem) => critical(format!("UDP connect {target}: {problem}")),
        }
    }

    async fn datagram(&self, target: &str, silence: Duration) -> Result<(), String> {
        let (host, port) = split(target);
        let addr = *self.resolve(host, port).await?.first().ok_or("the name has no address")?;
        let any: IpAddr = if addr.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let exchange = async {
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(addr).await?;
            socket.send(&[]).await?;
            socket.recv(&mut [0]).await.map(drop)
        };
        match tokio::time::timeout(silence, exchange).await {
            Ok(Err(error)) => Err(error.to_string()),
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }
}

/// Splits a `host:port` that was checked when it was registered.
pub(super) fn split(target: &str) -> (&str, u16) {
    let (host, port) = target.rsplit_once(':').unwrap_or((target, "0"));
    (host.trim_start_matches('[').trim_end_matches(']'), port.parse().unwrap_or(0))
}

pub(super) fn passing(output: String) -> Outcome {
    Outcome { status: HealthStatus::Passing, output }
}

pub(super) fn critical(output: String) -> Outcome {
    Outcome { status: HealthStatus::Critical, output }
}

impl TlsConfigs {
    fn read(settings: &CheckSettings) -> Result<Self, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = host_roots(settings.ca_file.as_deref())?;
        let builder = || {
            let versions =
                ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
            versions.map_err(|error| error.to_string())
        };
        // Any certificate will do (`TLSSkipVerify`); the peer must hold its key.
        let believing = Arc::new(ServerCheck::new(Arc::clone(&provider), |_, _, _| Ok(())));
        let unverified = builder()?.dangerous().with_custom_certificate_verifier(believing).with_no_client_auth();
        Ok(Self { verified: builder()?.with_root_certificates(roots).with_no_client_auth(), unverified })
    }
}
