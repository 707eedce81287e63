//! A check from Consul's JSON: inside a service, or by itself.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use tracing::warn;

use super::fields::{Field, Fields};
use super::{
    CheckDefinition, DEREGISTER_AFTER_MIN, DefinitionDefaults, DefinitionError, INTERVAL_MIN, OUTPUT_BYTES_MAX, Probe,
    TIMEOUT_DEFAULT,
};
use crate::model::{CheckId, HealthStatus, InstanceId};

/// Decodes the body of a check's registration.
///
/// The id defaults to the name. A check without `ServiceID` is about the node.
///
/// # Errors
/// [`DefinitionError`]; its text is the answer's body.
pub fn check_from_json(value: &Value, _defaults: &DefinitionDefaults) -> Result<CheckDefinition, DefinitionError> {
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
    http: String,
    method: String,
    headers: BTreeMap<String, Vec<String>>,
    body: String,
    disable_redirects: bool,
    tcp: String,
    ttl: Option<Duration>,
    interval: Option<Duration>,
    timeout: Option<Duration>,
    other_kind: Option<&'static str>,
    success_before_passing: u32,
    failures_before_warning: Option<u32>,
    failures_before_critical: u32,
    output_bytes_max: u32,
    deregister_after: Option<Duration>,
}

/// Kinds of Consul's that this version has no runner for, by folded field name.
const OTHER_KINDS: [(&[&str], &str); 7] = [
    (&["args", "scriptargs", "script"], "a script check (Args)"),
    (&["udp"], "a UDP check"),
    (&["grpc"], "a gRPC check"),
    (&["h2ping"], "an HTTP/2 ping check (H2PING)"),
    (&["osservice"], "an OS service check"),
    (&["aliasservice", "aliasnode"], "an alias check"),
    (&["dockercontainerid"], "a Docker check"),
];

fn decode(field: &Field<'_>) -> Result<Raw, DefinitionError> {
    let mut fields = Fields::of(field)?;
    let mut other_kind = None;
    for (names, what) in OTHER_KINDS {
        for name in names {
            if fields.take(&[name])?.is_some_and(|field| !field.is_empty()) {
                other_kind = Some(what);
            }
        }
    }
    // Settings of kinds that are refused by their own field, or of https: without those they mean nothing.
    for name in ["grpcusetls", "h2pingusetls", "tlsskipverify", "tlsservername", "shell"] {
        fields.take(&[name])?;
    }
    fields.refuse(&["tcpusetls"], "a TCP check over TLS")?;
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
        http: fields.text(&["http"])?,
        method: fields.text(&["method"])?,
        headers: headers(&mut fields)?,
        body: fields.text(&["body"])?,
        disable_redirects: fields.flag(&["disableredirects"])?,
        tcp: fields.text(&["tcp"])?,
        ttl: fields.duration(&["ttl"])?,
        interval: fields.duration(&["interval"])?,
        timeout: fields.duration(&["timeout"])?,
        other_kind,
        success_before_passing: fields.number(&["successbeforepassing"])?.unwrap_or(0),
        failures_before_warning: fields.number(&["failuresbeforewarning"])?.filter(|number| *number > 0),
        failures_before_critical: fields.number(&["failuresbeforecritical"])?.unwrap_or(0),
        output_bytes_max: fields.number(&["outputmaxsize"])?.unwrap_or(0),
        deregister_after: fields.duration(&["deregistercriticalserviceafter"])?,
    };
    fields.finish()?;
    Ok(raw)
}

/// Namespaces, partitions and ACL tokens do not exist here: only their defaults pass.
pub(super) fn refuse_tenancy(fields: &mut Fields<'_>) -> Result<(), DefinitionError> {
    for (name, what) in [("namespace", "a namespace"), ("partition", "an admin partition")] {
        if let Some(field) = fields.take(&[name])?
            && !matches!(field.text()?, "" | "default")
        {
            return Err(DefinitionError::Unsupported { path: field.path, what: what.to_owned() });
        }
    }
    fields.refuse(&["token"], "an ACL token")
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
    fn finish(self, nth: Option<usize>) -> Result<(Parsed, Option<String>), DefinitionError> {
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

    fn probe(&self) -> Result<Probe, String> {
        if let Some(what) = self.other_kind {
            return Err(format!("{what} is not supported by this version of weft"));
        }
        match (self.http.is_empty(), self.tcp.is_empty(), self.ttl) {
            (true, true, Some(ttl)) => match self.interval {
                None => Ok(Probe::Ttl { ttl }),
                Some(_) => Err("Interval and TTL exclude each other".to_owned()),
            },
            (false, true, None) => self.http_probe(),
            (true, false, None) => {
                target(&self.tcp)?;
                Ok(Probe::Tcp { target: self.tcp.clone(), interval: self.interval("a TCP")?, timeout: self.timeout() })
            }
            (true, true, None) => Err("it has none of HTTP, TCP and TTL".to_owned()),
            (_, _, Some(_)) if self.interval.is_some() => Err("Interval and TTL exclude each other".to_owned()),
            _ => Err("HTTP, TCP and TTL exclude each other".to_owned()),
        }
    }

    fn http_probe(&self) -> Result<Probe, String> {
        let url = &self.http;
        let uri: http::Uri = url.parse().map_err(|error| format!("HTTP {url:?} is no URL: {error}"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err("an https:// check is not supported by this version of weft".to_owned()),
            _ => return Err(format!("HTTP {url:?} must begin with http://")),
        }
        if uri.host().is_none_or(str::is_empty) {
            return Err(format!("HTTP {url:?} names no host"));
        }
        let method = if self.method.is_empty() { "GET".to_owned() } else { self.method.to_ascii_uppercase() };
        http::Method::from_bytes(method.as_bytes()).map_err(|_| format!("Method {method:?} is no HTTP method"))?;
        Ok(Probe::Http {
            url: url.clone(),
            method,
            headers: self.headers.clone(),
            body: self.body.clone(),
            disable_redirects: self.disable_redirects,
            interval: self.interval("an HTTP")?,
            timeout: self.timeout(),
        })
    }

    fn interval(&self, what: &str) -> Result<Duration, String> {
        let interval = self.interval.ok_or_else(|| format!("{what} check needs an Interval, such as \"10s\""))?;
        Ok(at_least(interval, INTERVAL_MIN, "Interval"))
    }

    fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(TIMEOUT_DEFAULT)
    }
}

/// Raises a duration to its bound, aloud: Consul does the same, so its clients rely on it.
fn at_least(found: Duration, least: Duration, field: &'static str) -> Duration {
    if found < least {
        warn!(field, ?found, ?least, "check's duration is too short; the least one is used");
    }
    found.max(least)
}

/// Tells what is wrong with a `host:port`.
fn target(text: &str) -> Result<(), String> {
    let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("TCP {text:?} must read host:port"))?;
    let is_port = port.parse::<u16>().is_ok_and(|port| port > 0);
    if host.is_empty() || !is_port {
        return Err(format!("TCP {text:?} must read host:port, with a port from 1 to 65535"));
    }
    Ok(())
}
