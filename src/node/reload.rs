//! Reading the configuration again while the agent runs.
//!
//! ```text
//!   SIGHUP, PUT /v1/agent/reload -> source() -> Config, files of HTTPS
//!                                     -> registry (services, checks, CA file) -> HTTPS -> DNS -> log level -> warnings
//! ```
//!
//! Invariants: reloads run one after the other; a configuration with a problem changes nothing; what takes a restart is
//! named and not half applied.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use tracing::{info, warn};

use crate::api::{ApiError, FreshFiles, HttpsConfig, HttpsFiles};
use crate::config::{Config, ConfigError};
use crate::dns::{Dns, DnsConfig};
use crate::registry::{ConfigDefinitions, RegistryError, RegistryHandle};
use crate::telemetry;

/// Reads the configuration anew; blocks on the disk.
pub type ConfigSource = Arc<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// Why a reload changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The agent was started without files or flags to read again.
    #[error("this agent was started from a program, not from files: there is nothing to read again")]
    NoSource,
    /// The files cannot be used.
    #[error("nothing was reloaded: {0}")]
    Config(ConfigError),
    /// A file of HTTPS cannot be used.
    #[error("nothing was reloaded: {0}")]
    Https(ApiError),
    /// What they define does not fit.
    #[error("nothing was reloaded: {0}")]
    Registry(RegistryError),
}

/// Reloads one agent.
pub(super) struct Reloader {
    source: Option<ConfigSource>,
    /// What is in force.
    current: tokio::sync::Mutex<Config>,
    registry: RegistryHandle,
    /// Once it serves, if it does.
    dns: OnceLock<Arc<Dns>>,
    /// What of HTTPS is in files.
    https: OnceLock<Arc<HttpsFiles>>,
}

impl Reloader {
    pub(super) fn new(source: Option<ConfigSource>, config: Config, registry: RegistryHandle) -> Self {
        let current = tokio::sync::Mutex::new(config);
        Self { source, current, registry, dns: OnceLock::new(), https: OnceLock::new() }
    }

    /// Reloads DNS too from here on.
    pub(super) fn add_dns(&self, dns: Arc<Dns>) {
        let _first = self.dns.set(dns);
    }

    /// Reads the files of HTTPS again too from here on.
    pub(super) fn add_https(&self, files: Arc<HttpsFiles>) {
        let _first = self.https.set(files);
    }

    /// Reads the configuration and takes what can be taken; returns what the operator should know.
    ///
    /// # Errors
    /// [`ReloadError`].
    /// # Cancel safety
    /// A cancelled reload may or may not have taken effect.
    pub(super) async fn reload(&self) -> Result<Vec<String>, ReloadError> {
        let source = self.source.clone().ok_or(ReloadError::NoSource)?;
        let mut current = self.current.lock().await;
        let (files, https) = (self.https.get().cloned(), current.https.clone());
        let read = tokio::task::spawn_blocking(move || read(&source, files.as_deref(), https.as_ref())).await;
        let (new, fresh) = match read {
            Ok(read) => read?,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is going down.
                Err(_cancelled) => std::future::pending().await,
            },
        };
        self.registry.replace_config(definitions(&new)).await.map_err(ReloadError::Registry)?;
        if let (Some(files), Some(fresh)) = (self.https.get(), fresh)
            && files.show(fresh)
        {
            info!("HTTPS shows another certificate, or lets in the clients of another CA");
        }
        let dns = dns_in_force(current.dns.as_ref(), new.dns.as_ref());
        if let (Some(running), Some(config)) = (self.dns.get(), &dns)
            && current.dns != dns
        {
            running.reload(config.clone());
        }
        telemetry::set_filter(&new.log_filter);
        let mut notes: Vec<String> = new.warnings.iter().map(ToString::to_string).collect();
        let changed = restart_keys(&current, &new);
        notes.extend(changed.iter().map(|key| format!("{key} changed: it takes a restart of the agent")));
        for note in &notes {
            warn!(note, "configuration was reloaded but for this");
        }
        // What takes a restart is compared with what runs, so it is named again at the next reload.
        let Config { services, checks, scripts, check_settings, log_filter, warnings, .. } = new;
        info!(services = services.len(), checks = checks.len(), log_level = %log_filter, "configuration is reloaded");
        *current = Config { dns, services, checks, scripts, check_settings, log_filter, warnings, ..current.clone() };
        Ok(notes)
    }
}

/// Reads the configuration, and the files of HTTPS where they are those that are shown. Blocks on the disk.
fn read(
    source: &ConfigSource,
    files: Option<&HttpsFiles>,
    https: Option<&HttpsConfig>,
) -> Result<(Config, Option<FreshFiles>), ReloadError> {
    let new = source().map_err(ReloadError::Config)?;
    // Other files take a restart, and those of before may be gone.
    let files = files.filter(|_| new.https.as_ref() == https);
    let fresh = files.map(HttpsFiles::read).transpose().map_err(ReloadError::Https)?;
    Ok((new, fresh))
}

/// What DNS answers by after a reload: the new settings at the old addresses. It is not turned on or off by one.
fn dns_in_force(old: Option<&DnsConfig>, new: Option<&DnsConfig>) -> Option<DnsConfig> {
    match (old, new) {
        (Some(old), Some(new)) => Some(DnsConfig { listen: old.listen.clone(), ..new.clone() }),
        (old, _) => old.cloned(),
    }
}

/// What the files define, for the registry.
pub(super) fn definitions(config: &Config) -> ConfigDefinitions {
    ConfigDefinitions {
        services: config.services.clone(),
        checks: config.checks.clone(),
        scripts: config.scripts,
        settings: Some(config.check_settings.clone()),
    }
}

fn listen(config: &Config) -> Option<&[SocketAddr]> {
    config.dns.as_ref().map(|dns| dns.listen.as_slice())
}

/// Names the settings that differ and are read at the start alone.
fn restart_keys(old: &Config, new: &Config) -> Vec<&'static str> {
    let differs = [
        ("node_name", old.node_name != new.node_name),
        ("datacenter", old.datacenter != new.datacenter),
        ("data_dir", old.storage != new.storage),
        ("bind_addr or ports.mesh", old.mesh_bind != new.mesh_bind),
        ("advertise_addr", old.mesh_advertise.ip() != new.mesh_advertise.ip()),
        ("client_addr or ports.http", old.http_addr != new.http_addr),
        ("ports.shared_http", old.shared_http_addr != new.shared_http_addr),
        ("retry_join", old.join != new.join),
        ("issuer, token or serve", old.identity != new.identity),
        ("trust_domain", old.trust_domain != new.trust_domain),
        ("node_meta", old.node_meta != new.node_meta),
        ("workers", old.workers != new.workers),
        ("admin_token", old.admin_token != new.admin_token),
        ("api_token", old.api_tokens != new.api_tokens),
        ("addresses.http or unix_sockets", old.api_socket != new.api_socket),
        ("ports.https or tls.https", old.https != new.https),
        ("default_intention_policy", old.default_policy != new.default_policy),
        ("policy_authority", old.policy_authority != new.policy_authority),
        ("leave_on_terminate", old.on_terminate != new.on_terminate),
        ("drain_timeout", old.drain_timeout != new.drain_timeout),
        ("reconnect_timeout", old.reconnect_timeout != new.reconnect_timeout),
        ("workload_api", old.workload_api != new.workload_api),
        ("telemetry", old.otlp != new.otlp),
        ("kv", old.kv_bytes_max != new.kv_bytes_max),
        ("log_json", old.log_format != new.log_format),
        ("ports.dns or addresses.dns", listen(old) != listen(new)),
    ];
    differs.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_a_restart_is_named_and_what_does_not_is_not() {
        let old = Config::dev("a".parse().unwrap(), [127, 0, 0, 1].into());
        let mut new = old.clone();
        new.log_filter = "debug".parse().unwrap();
        new.scripts = crate::registry::ScriptPolicy::All;
        assert!(restart_keys(&old, &new).is_empty());
        let mut dns = new.dns.clone().unwrap();
        dns.node_ttl_s = 7;
        new.dns = Some(dns.clone());
        assert!(restart_keys(&old, &new).is_empty(), "settings of DNS are taken");
        new.datacenter = "dc2".to_owned();
        new.http_addr = None;
        dns.listen.clear();
        new.dns = Some(dns);
        assert_eq!(restart_keys(&old, &new), ["datacenter", "client_addr or ports.http", "ports.dns or addresses.dns"]);
        let kept = dns_in_force(old.dns.as_ref(), new.dns.as_ref()).unwrap();
        assert_eq!((kept.listen, kept.node_ttl_s), (old.dns.clone().unwrap().listen, 7), "at the old address");
        assert_eq!(dns_in_force(old.dns.as_ref(), None), old.dns, "a reload does not turn it off");
    }
}
