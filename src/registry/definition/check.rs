//! A check from Consul's JSON: inside a service, or by itself.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use tracing::warn;

use super::fields::{Field, Fields};
use super::{
    CheckDefinition, DEREGISTER_AFTER_MIN, DefinitionDefaults, DefinitionError, HttpTarget, INTERVAL_MIN,
    OUTPUT_BYTES_MAX, Probe, TIMEOUT_DEFAULT, Target, TlsOptions,
};
use crate::model::{CheckId, HealthStatus, InstanceId};

/// What is run in a container where `Shell` is left out.
const SHELL_DEFAULT: &str = "/bin/sh";
/// Longest name or id of a container, in bytes: Docker's ids have 64.
const CONTAINER_BYTES_MAX: usize = 128;
/// Longest name of a systemd unit, in bytes (its own bound).
const UNIT_BYTES_MAX: usize = 255;
/// Longest `AliasNode`, in bytes: more than any node's name or id has.
const NODE_BYTES_MAX: usize = 255;
/// What makes a check, for the text that asks for it.
const KINDS: &str = "HTTP, TCP, UDP, GRPC, H2PING, TTL, Args, DockerContainerID, OSService, AliasService and AliasNode";

/// Decodes the body of a check's registration.
///
/// The id defaults to the name. A check without `ServiceID` is about the node.
///
/// # Errors
/// [`DefinitionError`]; its text is the answer's body.
pub fn check_from_json(value: &Value, _defaults: &DefinitionDefaults<'_>) -> Result<CheckDefinition, DefinitionError> {
    let (mut check, service) = decode(&Field { path: String::new(), value })?.finish(None)?;
    if check.name.is_empty() {
        return Err(DefinitionError::MissingCheckName);
    }
    let id = if check.id.is_empty() { &check.name } else { &check.id };
    let id = id.parse::<CheckId>().map_err(|error| DefinitionError::Check(error.to_string()))?;
    let invalid_service = |error: crate::model::NameError| DefinitionError::Check(error.to_string());
    let service = service.map(|id| id.parse::<InstanceId>().map_err(invalid_service)).transpose()?;
    check.id = String::new();
    Ok(check.into_definition(id, service))
}

/// Whether a check inside a service says anything at all.
pub(super) fn is_given(field: &Field<'_>) -> bool {
    !field.is_empty()
}

/// Decodes a check inside a service; the caller resolves id and name. `nth` names it where there are several.
pub(super) fn of_service(field: &Field<'_>, nth: Option<usize>) -> Result<Parsed, DefinitionError> {
    // A `ServiceID` in here can only mean the service around it, so it says nothing.
    decode(field)?.finish(nth).map(|(check, _service)| check)
}

/// A check whose id and service are not resolved.
pub(super) struct Parsed {
    pub(super) id: String,
    pub(super) name: String,
    notes: String,
    probe: Probe,
    initial: HealthStatus,
    thresholds: [u32; 3],
    output_bytes_max: usize,
    deregister_critical_after: Option<Duration>,
}

impl Parsed {
    pub(super) fn into_definition(self, id: CheckId, service: Option<InstanceId>) -> CheckDefinition {
        let [success_before_passing, failures_before_warning, failures_before_critical] = self.thresholds;
        CheckDefinition {
            id,
            name: self.name,
            notes: self.notes,
            service,
            probe: self.probe,
            initial: self.initial,
            success_before_passing,
            failures_before_warning,
            failures_before_critical,
            output_bytes_max: self.output_bytes_max,
            deregister_critical_after: self.deregister_critical_after,
        }
    }
}

/// The fields of a check, before they are held against each other.
struct Raw {
    path: String,
    id: String,
    service: String,
    name: String,
    notes: String,
    status: HealthStatus,
    kinds: Kinds,
    ttl: Option<Duration>,
    interval: Option<Duration>,
    timeout: Option<Duration>,
    success_before_passing: u32,
    failures_before_warning: Option<u32>,
    failures_before_critical: u32,
    output_bytes_max: u32,
    deregister_after: Option<Duration>,
}

/// What says which kind a check is, and the settings of single kinds.
#[derive(Default)]
struct Kinds {
    http: String,
    method: String,
    headers: BTreeMap<String, Vec<String>>,
    body: String,
    disable_redirects: bool,
    tcp: String,
    tcp_use_tls: bool,
    udp: String,
    grpc: String,
    grpc_use_tls: bool,
    h2ping: String,
    h2ping_use_tls: bool,
    tls: TlsOptions,
    args: Vec<String>,
    docker: String,
    shell: String,
    os_service: String,
    alias_service: String,
    alias_node: String,
}

fn decode(field: &Field<'_>) -> Result<Raw, DefinitionError> {
    let mut fields = Fields::of(field)?;
    // Consul took a line for a shell here once; weft runs no shell.
    fields.refuse(&["script"], "a shell's line (give Args, a list)")?;
    fields.refuse(&["exposedport"], "an exposed port")?;
    refuse_tenancy(&mut fields)?;
    let status = match fields.text(&["status"])?.as_str() {
        "passing" => HealthStatus::Passing,
        "warning" => HealthStatus::Warning,
        "critical" | "" => HealthStatus::Critical,
        _ => return Err(DefinitionError::Status),
    };
    let raw = Raw {
        path: fields.path().to_owned(),
        id: fields.text(&["checkid", "id"])?,
        service: fields.text(&["serviceid"])?,
        name: fields.text(&["name"])?,
        notes: fields.text(&["notes"])?,
        status,
        kinds: Kinds::take(&mut fields)?,
        ttl: fields.duration(&["ttl"])?,
        interval: fields.duration(&["interval"])?,
        timeout: fields.duration(&["timeout"])?,
        success_before_passing: fields.number(&["successbeforepassing"])?.unwrap_or(0),
        failures_before_warning: fields.number(&["failuresbeforewarning"])?.filter(|number| *number > 0),
        failures_before_critical: fields.number(&["failuresbeforecritical"])?.unwrap_or(0),
        output_bytes_max: fields.number(&["outputmaxsize"])?.unwrap_or(0),
        deregister_after: fields.duration(&["deregistercriticalserviceafter"])?,
    };
    fields.finish()?;
    Ok(raw)
}

impl Kinds {
    fn take(fields: &mut Fields<'_>) -> Result<Self, DefinitionError> {
        Ok(Self {
            http: fields.text(&["http"])?,
            method: fields.text(&["method"])?,
            headers: headers(fields)?,
            body: fields.text(&["body"])?,
            disable_redirects: fields.flag(&["disableredirects"])?,
            tcp: fields.text(&["tcp"])?,
            tcp_use_tls: fields.flag(&["tcpusetls"])?,
            udp: fields.text(&["udp"])?,
            grpc: fields.text(&["grpc"])?,
            grpc_use_tls: fields.flag(&["grpcusetls"])?,
            h2ping: fields.text(&["h2ping"])?,
            h2ping_use_tls: fields.flag_or(&["h2pingusetls"], true)?,
            tls: TlsOptions {
                server_name: fields.text(&["tlsservername"])?,
                skip_verify: fields.flag(&["tlsskipverify"])?,
            },
            args: fields.texts(&["args", "scriptargs"])?,
            docker: fields.text(&["dockercontainerid"])?,
            shell: fields.text(&["shell"])?,
            os_service: fields.text(&["osservice"])?,
            alias_service: fields.text(&["aliasservice"])?,
            alias_node: fields.text(&["aliasnode"])?,
        })
    }

    /// The fields that say what is done: exactly one of them makes a check.
    fn given(&self) -> Vec<&'static str> {
        let is_script = !self.args.is_empty() && self.docker.is_empty();
        let is_alias = !self.alias_service.is_empty() || !self.alias_node.is_empty();
        let kinds = [
            (!self.http.is_empty(), "HTTP"),
            (!self.tcp.is_empty(), "TCP"),
            (!self.udp.is_empty(), "UDP"),
            (!self.grpc.is_empty(), "GRPC"),
            (!self.h2ping.is_empty(), "H2PING"),
            (is_script, "Args"),
            (!self.docker.is_empty(), "DockerContainerID"),
            (!self.os_service.is_empty(), "OSService"),
            (is_alias, "AliasService"),
        ];
        kinds.into_iter().filter(|(given, _)| *given).map(|(_, name)| name).collect()
    }

    /// What is done at each run.
    fn target(self, kind: &str) -> Result<Target, String> {
        let tls = |wanted: bool, tls: TlsOptions| wanted.then_some(tls);
        match kind {
            "HTTP" => self.http_target(),
            "TCP" => {
                Ok(Target::Tcp { target: host_port("TCP", &self.tcp)?, tls: tls(self.tcp_use_tls, server(self.tls)?) })
            }
            "UDP" => Ok(Target::Udp { target: host_port("UDP", &self.udp)? }),
            "GRPC" => {
                let (target, service) = self.grpc.split_once('/').unwrap_or((&self.grpc, ""));
                let (target, service) = (host_port("GRPC", target)?, service.to_owned());
                Ok(Target::Grpc { target, service, tls: tls(self.grpc_use_tls, server(self.tls)?) })
            }
            "H2PING" => {
                let target = host_port("H2PING", &self.h2ping)?;
                Ok(Target::H2ping { target, tls: tls(self.h2ping_use_tls, server(self.tls)?) })
            }
            "Args" => Ok(Target::Script { args: command(self.args)? }),
            "DockerContainerID" => {
                let is_id = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
                if self.docker.len() > CONTAINER_BYTES_MAX || !self.docker.chars().all(is_id) {
                    return Err(format!(
                        "DockerContainerID must be 1 to {CONTAINER_BYTES_MAX} letters, digits, `-`, `_` and `.`"
                    ));
                }
                let shell = if self.shell.is_empty() { SHELL_DEFAULT.to_owned() } else { self.shell };
                Ok(Target::Docker { container: self.docker, shell, args: command(self.args)? })
            }
            _ => {
                let is_unit = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | '\\' | '@');
                if self.os_service.len() > UNIT_BYTES_MAX || !self.os_service.chars().all(is_unit) {
                    return Err("OSService must be the name of a systemd unit, such as nginx.service".to_owned());
                }
                Ok(Target::OsService { unit: self.os_service })
            }
        }
    }

    fn http_target(self) -> Result<Target, String> {
        let url = self.http;
        let uri: http::Uri = url.parse().map_err(|error| format!("HTTP {url:?} is no URL: {error}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(format!("HTTP {url:?} must begin with http:// or https://"));
        }
        if uri.host().is_none_or(str::is_empty) {
            return Err(format!("HTTP {url:?} names no host"));
        }
        let method = if self.method.is_empty() { "GET".to_owned() } else { self.method.to_ascii_uppercase() };
        http::Method::from_bytes(method.as_bytes()).map_err(|_| format!("Method {method:?} is no HTTP method"))?;
        Ok(Target::Http(HttpTarget {
            url,
            method,
            headers: self.headers,
            body: self.body,
            disable_redirects: self.disable_redirects,
            tls: server(self.tls)?,
        }))
    }
}

/// Namespaces and partitions do not exist here: only their defaults pass. An ACL token says as whom Consul's agent writes; this
/// one writes as itself, so it says nothing, and files with one load.
pub(super) fn refuse_tenancy(fields: &mut Fields<'_>) -> Result<(), DefinitionError> {
    for (name, what) in [("namespace", "a namespace"), ("partition", "an admin partition")] {
        if let Some(field) = fields.take(&[name])?
            && !matches!(field.text()?, "" | "default")
        {
            return Err(DefinitionError::Unsupported { path: field.path, what: what.to_owned() });
        }
    }
    fields.text(&["token"]).map(drop)
}

fn headers(fields: &mut Fields<'_>) -> Result<BTreeMap<String, Vec<String>>, DefinitionError> {
    let Some(field) = fields.take(&["header"])? else { return Ok(BTreeMap::new()) };
    let mut headers = BTreeMap::new();
    for (name, value) in field.map()? {
        let invalid = |what: &str| {
            let start: String = name.chars().take(64).collect();
            DefinitionError::Check(format!("header {start:?} has {what}"))
        };
        http::HeaderName::try_from(name.as_str()).map_err(|_| invalid("no valid name"))?;
        let values = Field { path: format!("{}.{name}", field.path), value }.texts()?;
        if values.iter().any(|value| http::HeaderValue::try_from(value.as_str()).is_err()) {
            return Err(invalid("a value with a character that HTTP does not allow"));
        }
        headers.insert(name.clone(), values);
    }
    Ok(headers)
}

impl Raw {
    /// Holds the fields against each other.
    fn finish(mut self, nth: Option<usize>) -> Result<(Parsed, Option<String>), DefinitionError> {
        let path = self.path.clone();
        let invalid = |problem: String| {
            DefinitionError::Check(match nth {
                Some(_) if !path.is_empty() => format!("{path}: {problem}"),
                _ => problem,
            })
        };
        let probe = self.probe().map_err(invalid)?;
        let critical = self.failures_before_critical;
        let warning = self.failures_before_warning.unwrap_or(critical);
        if warning > critical {
            let problem = format!("FailuresBeforeWarning ({warning}) is above FailuresBeforeCritical ({critical})");
            return Err(invalid(problem));
        }
        let output_bytes_max = match usize::try_from(self.output_bytes_max).unwrap_or(usize::MAX) {
            0 => OUTPUT_BYTES_MAX,
            bytes => bytes.min(OUTPUT_BYTES_MAX),
        };
        let deregister = self.deregister_after;
        let parsed = Parsed {
            deregister_critical_after: deregister
                .map(|after| at_least(after, DEREGISTER_AFTER_MIN, "DeregisterCriticalServiceAfter")),
            id: self.id,
            name: self.name,
            notes: self.notes,
            probe,
            initial: self.status,
            thresholds: [self.success_before_passing, warning, critical],
            output_bytes_max,
        };
        Ok((parsed, Some(self.service).filter(|service| !service.is_empty())))
    }

    fn probe(&mut self) -> Result<Probe, String> {
        let kinds = self.kinds.given();
        let is_alias = kinds.contains(&"AliasService");
        match (kinds.as_slice(), self.ttl, self.interval) {
            ([_, _, ..], _, _) => Err(format!("{} exclude each other", kinds.join(" and "))),
            (["AliasService"], Some(_), _) | (["AliasService"], _, Some(_)) => {
                Err("an alias check takes neither Interval nor TTL: it follows what it stands for".to_owned())
            }
            (_, Some(_), Some(_)) => Err("Interval and TTL exclude each other".to_owned()),
            ([kind], Some(_), _) => Err(format!("{kind} and TTL exclude each other")),
            ([], Some(ttl), None) => Ok(Probe::Ttl { ttl }),
            ([], None, _) => Err(format!("it says not what to do: give one of {KINDS}")),
            ([_], None, _) if is_alias => self.alias(),
            ([kind], None, None) => Err(format!("a check of kind {kind} needs an Interval, such as \"10s\"")),
            ([kind], None, Some(interval)) => {
                let kinds = std::mem::take(&mut self.kinds);
                Ok(Probe::Periodic {
                    target: kinds.target(kind)?,
                    interval: at_least(interval, INTERVAL_MIN, "Interval"),
                    timeout: self.timeout.unwrap_or(TIMEOUT_DEFAULT),
                })
            }
        }
    }

    fn alias(&self) -> Result<Probe, String> {
        let (node, service) = (&self.kinds.alias_node, &self.kinds.alias_service);
        if node.len() > NODE_BYTES_MAX {
            return Err(format!("AliasNode must have at most {NODE_BYTES_MAX} bytes"));
        }
        let service = Some(service).filter(|service| !service.is_empty());
        let service = service.map(|id| id.parse::<InstanceId>().map_err(|error| format!("AliasService: {error}")));
        Ok(Probe::Alias { node: Some(node.clone()).filter(|node| !node.is_empty()), service: service.transpose()? })
    }
}

/// Raises a duration to its bound, aloud: Consul does the same, so its clients rely on it.
fn at_least(found: Duration, least: Duration, field: &'static str) -> Duration {
    if found < least {
        warn!(field, ?found, ?least, "check's duration is too short; the least one is used");
    }
    found.max(least)
}

/// Takes a `host:port`.
fn host_port(field: &str, text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("{field} {text:?} must read host:port"))?;
    let is_port = port.parse::<u16>().is_ok_and(|port| port > 0);
    if host.is_empty() || !is_port {
        return Err(format!("{field} {text:?} must read host:port, with a port from 1 to 65535"));
    }
    Ok(text.to_owned())
}

/// Takes the TLS options, whose name must be one that a certificate can have.
fn server(tls: TlsOptions) -> Result<TlsOptions, String> {
    if !tls.server_name.is_empty() && rustls::pki_types::ServerName::try_from(tls.server_name.as_str()).is_err() {
        return Err(format!("TLSServerName {:?} is neither a DNS name nor an IP address", tls.server_name));
    }
    Ok(tls)
}

/// Takes a command line that the system can start.
fn command(args: Vec<String>) -> Result<Vec<String>, String> {
    match args.first() {
        None => Err("Args must name a program".to_owned()),
        Some(program) if program.is_empty() => Err("Args begins with an empty text: it must name a program".to_owned()),
        Some(_) if args.iter().any(|arg| arg.contains('\0')) => Err("Args must not hold a zero byte".to_owned()),
        Some(_) => Ok(args),
    }
}
