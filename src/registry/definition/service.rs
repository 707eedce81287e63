//! A service from Consul's JSON.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::Value;

use super::check::{self, refuse_tenancy};
use super::fields::{Field, Fields};
use super::unused::why_unused;
use super::{
    CheckDefinition, DefinitionDefaults, DefinitionError, META_PROXY_PROTOCOL, ServiceDefinition, UpstreamDefinition,
};
use crate::model::{CheckId, INGRESS_GATEWAY, InstanceId, NameError, Protocol, ServiceName, ServiceRecord, Weights};

/// Most pairs in `Meta` (Consul's bound).
const META_PAIRS_MAX: usize = 64;
/// Longest key in `Meta`, in bytes (Consul's bound).
const META_KEY_BYTES_MAX: usize = 128;
/// Longest value in `Meta`, in bytes (Consul's bound).
const META_VALUE_BYTES_MAX: usize = 512;
/// Largest weight (Consul's bound).
const WEIGHT_MAX: u32 = 65_535;

/// Decodes the body of a service's registration.
///
/// The id defaults to the name, the protocol to `tcp`: it is read from `Protocol` (weft's own field), then from
/// `Config.protocol` of the sidecar's proxy, then of the service's. An app whose address is a host name is looked for
/// on 127.0.0.1 unless `LocalServiceAddress` says otherwise.
///
/// # Errors
/// [`DefinitionError`]; its text is the answer's body.
pub fn service_from_json(
    value: &Value,
    defaults: &DefinitionDefaults<'_>,
) -> Result<ServiceDefinition, DefinitionError> {
    let mut fields = Fields::of(&Field { path: String::new(), value })?;
    refuse_unused(&mut fields)?;
    let name_text = fields.text(&["name"])?;
    let id_text = fields.text(&["id"])?;
    let kind = fields.text(&["kind"])?;
    let address = fields.text(&["address"])?;
    let port = fields.port(&["port"])?;
    let tags = fields.texts(&["tags"])?;
    let meta = fields.pairs(&["meta"])?;
    let tagged_addresses = tagged_addresses(&mut fields)?;
    let weights = weights(&mut fields)?;
    let enable_tag_override = fields.flag(&["enabletagoverride"])?;
    let declared = protocol(&mut fields)?;
    let check_fields = check_fields(&mut fields)?;
    let proxy = fields.take(&["proxy"])?.map(|field| proxy(&field, defaults)).transpose()?;
    let mut connect =
        fields.take(&["connect"])?.map(|field| connect(&field, defaults)).transpose()?.unwrap_or_default();
    fields.finish()?;

    if name_text.is_empty() {
        return Err(DefinitionError::MissingServiceName);
    }
    let name: ServiceName = name_text.parse().map_err(|error| invalid("service name", &error))?;
    let id = if id_text.is_empty() { &name_text } else { &id_text };
    let id: InstanceId = id.parse().map_err(|error| invalid("service ID", &error))?;
    let is_gateway = kind == INGRESS_GATEWAY;
    if !kind.is_empty() && !is_gateway {
        return Err(DefinitionError::Invalid {
            path: "Kind".into(),
            problem: format!(
                "kind {kind:?} is not supported by this version of weft, \"{INGRESS_GATEWAY}\" is; the agent is the proxy: put Proxy.Upstreams into the service itself, or use Connect.SidecarService"
            ),
        });
    }
    if address.parse().is_ok_and(|ip: IpAddr| ip.is_unspecified()) {
        return Err(DefinitionError::ServiceAddress);
    }
    meta_is_bounded(&meta)?;
    let asked = meta.iter().find(|(key, _)| key.as_str() == META_PROXY_PROTOCOL);
    let proxies: Vec<Proxy> = connect.proxy.take().into_iter().chain(proxy).collect();
    for proxy in &proxies {
        proxy.is_for(&name, &id)?;
    }
    let local = |pick: fn(&Proxy) -> Option<IpAddr>| proxies.iter().find_map(pick);
    let app_ip = local(|proxy| proxy.local_ip).or_else(|| address.parse().ok());
    let app_port = proxies.iter().find_map(|proxy| proxy.local_port).unwrap_or(port);
    let protocol = declared.or_else(|| proxies.iter().find_map(|proxy| proxy.protocol)).unwrap_or_default();
    if let Some((_, version)) = asked {
        proxy_protocol_is_possible(version, protocol)?;
    }
    let app_addr = if is_gateway {
        gateway_is_possible(&name, &connect, &proxies)?;
        // Nothing is relayed to it: an address without a port says where it listens, if it says so.
        SocketAddr::new(app_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), 0)
    } else {
        SocketAddr::new(app_ip.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), app_port)
    };
    let checks = checks(&check_fields, &id, &name)?;
    Ok(ServiceDefinition {
        socket_path: String::new(),
        app_addr,
        upstreams: proxies.into_iter().flat_map(|proxy| proxy.upstreams).collect(),
        sidecar: connect.sidecar,
        native: connect.native,
        checks,
        record: ServiceRecord {
            id,
            name,
            kind: kind.into(),
            tags: tags.into_iter().map(Into::into).collect(),
            meta: meta.into_iter().map(|(key, value)| (key, value.into())).collect(),
            address: address.into(),
            port,
            tagged_addresses: tagged_addresses
                .into_iter()
                .map(|(tag, (address, port))| (tag, (address.into(), port)))
                .collect(),
            weights,
            protocol,
            enable_tag_override,
        },
    })
}

/// Refuses what a gateway has no use for: its agent carries what its config entry says, and nothing else.
fn gateway_is_possible(name: &ServiceName, connect: &Connect, proxies: &[Proxy]) -> Result<(), DefinitionError> {
    let (path, problem) = if connect.sidecar || connect.native {
        ("Connect", "a gateway is in the mesh by itself: leave it out".to_owned())
    } else if let Some(proxy) = proxies.iter().find(|proxy| !proxy.upstreams.is_empty() || proxy.local_port.is_some()) {
        let problem =
            format!("a gateway has the ports that the config entry ingress-gateway {name} lists, and no others");
        (proxy.path.as_str(), problem)
    } else {
        return Ok(());
    };
    Err(DefinitionError::Invalid { path: path.to_owned(), problem })
}

/// Checks what `Meta` asks for under [`META_PROXY_PROTOCOL`].
fn proxy_protocol_is_possible(version: &str, protocol: Protocol) -> Result<(), DefinitionError> {
    let problem = match (version, protocol) {
        ("v2", Protocol::Tcp) => return Ok(()),
        ("v2", _) => "it is for services of protocol tcp; requests carry `x-forwarded-client-cert`".to_owned(),
        (other, _) => format!("{other:?} is no version that weft writes; the value is \"v2\""),
    };
    Err(DefinitionError::Invalid { path: format!("Meta[\"{META_PROXY_PROTOCOL}\"]"), problem })
}

pub(super) fn invalid(what: &str, error: &NameError) -> DefinitionError {
    DefinitionError::Invalid { path: what.to_owned(), problem: error.to_string() }
}

/// Takes the fields of Consul's that nothing here acts on; empty ones pass.
fn refuse_unused(fields: &mut Fields<'_>) -> Result<(), DefinitionError> {
    fields.refuse(&["socketpath"], "a unix socket")?;
    fields.refuse(&["locality"], "a locality")?;
    fields.refuse(&["ports"], "a list of ports")?;
    refuse_tenancy(fields)
}

fn protocol(fields: &mut Fields<'_>) -> Result<Option<Protocol>, DefinitionError> {
    let Some(field) = fields.take(&["protocol"])? else { return Ok(None) };
    let text = field.text()?;
    if text.is_empty() {
        return Ok(None);
    }
    let parsed = text.parse().map(Some);
    parsed.map_err(|problem| DefinitionError::Invalid { path: field.path, problem })
}

pub(super) fn meta_is_bounded(meta: &BTreeMap<String, String>) -> Result<(), DefinitionError> {
    let refuse = |problem| Err(DefinitionError::Invalid { path: "Meta".into(), problem });
    if meta.len() > META_PAIRS_MAX {
        return refuse(format!("{} pairs are given; at most {META_PAIRS_MAX} are allowed", meta.len()));
    }
    for (key, value) in meta {
        let start: String = key.chars().take(64).collect();
        let is_word = key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        if key.is_empty() || !is_word || key.len() > META_KEY_BYTES_MAX {
            return refuse(format!("key {start:?} must be 1 to {META_KEY_BYTES_MAX} letters, digits, `-` and `_`"));
        }
        if value.len() > META_VALUE_BYTES_MAX {
            let bytes = value.len();
            return refuse(format!("the value of {start:?} has {bytes} bytes; at most {META_VALUE_BYTES_MAX}"));
        }
    }
    Ok(())
}

pub(super) fn tagged_addresses(fields: &mut Fields<'_>) -> Result<BTreeMap<String, (String, u16)>, DefinitionError> {
    let Some(field) = fields.take(&["taggedaddresses"])? else { return Ok(BTreeMap::new()) };
    let mut addresses = BTreeMap::new();
    for (tag, value) in field.map()? {
        let start: String = tag.chars().take(64).collect();
        let mut inner = Fields::of(&Field { path: format!("{}.{start}", field.path), value })?;
        let address = (inner.text(&["address"])?, inner.port(&["port"])?);
        inner.finish()?;
        addresses.insert(tag.clone(), address);
    }
    Ok(addresses)
}

pub(super) fn weights(fields: &mut Fields<'_>) -> Result<Weights, DefinitionError> {
    let Some(field) = fields.take(&["weights"])? else { return Ok(Weights::default()) };
    let mut inner = Fields::of(&field)?;
    let passing = inner.number(&["passing"])?.unwrap_or(0);
    let warning = inner.number(&["warning"])?.unwrap_or(0);
    inner.finish()?;
    if !(1..=WEIGHT_MAX).contains(&passing) {
        return Err(DefinitionError::Weights(format!("Passing must be from 1 to {WEIGHT_MAX}, and is {passing}")));
    }
    if warning > WEIGHT_MAX {
        return Err(DefinitionError::Weights(format!("Warning must be from 0 to {WEIGHT_MAX}, and is {warning}")));
    }
    Ok(Weights { passing, warning })
}

fn check_fields<'a>(fields: &mut Fields<'a>) -> Result<Vec<Field<'a>>, DefinitionError> {
    // Two blocks of a file make a list of them.
    let mut all = fields.take(&["check"])?.map_or(Ok(Vec::new()), |field| field.elements())?;
    if let Some(field) = fields.take(&["checks"])? {
        all.extend(field.elements()?);
    }
    all.retain(check::is_given);
    Ok(all)
}

/// Resolves ids: `service:<id>`, or `service:<id>:1..n` for several.
fn checks(fields: &[Field<'_>], id: &InstanceId, name: &ServiceName) -> Result<Vec<CheckDefinition>, DefinitionError> {
    let several = fields.len() > 1;
    let mut checks: Vec<CheckDefinition> = Vec::with_capacity(fields.len());
    for (at, field) in fields.iter().enumerate() {
        let mut parsed = check::of_service(field, several.then_some(at))?;
        let check_id = match (std::mem::take(&mut parsed.id), several) {
            (given, _) if !given.is_empty() => given,
            (_, false) => format!("service:{id}"),
            (_, true) => format!("service:{id}:{}", at + 1),
        };
        let check_id: CheckId =
            check_id.parse().map_err(|error: NameError| DefinitionError::Check(error.to_string()))?;
        if checks.iter().any(|check| check.id == check_id) {
            return Err(DefinitionError::Check(format!("two checks have the id {:?}", check_id.as_str())));
        }
        if parsed.name.is_empty() {
            parsed.name = format!("Service '{name}' check");
        }
        checks.push(parsed.into_definition(check_id, Some(id.clone())));
    }
    Ok(checks)
}

/// What `Connect` asks for.
#[derive(Default)]
struct Connect {
    native: bool,
    /// Whether `SidecarService` is there, be it empty.
    sidecar: bool,
    /// The sidecar's `Proxy`.
    proxy: Option<Proxy>,
}

fn connect(field: &Field<'_>, defaults: &DefinitionDefaults<'_>) -> Result<Connect, DefinitionError> {
    let mut fields = Fields::of(field)?;
    let native = fields.flag(&["native"])?;
    let given = fields.take(&["sidecarservice"])?;
    let proxy = given.as_ref().map(|field| sidecar(field, defaults)).transpose()?.flatten();
    fields.refuse(&["proxy"], "a managed proxy")?;
    fields.finish()?;
    Ok(Connect { native, sidecar: given.is_some(), proxy })
}

fn sidecar(field: &Field<'_>, defaults: &DefinitionDefaults<'_>) -> Result<Option<Proxy>, DefinitionError> {
    let mut fields = Fields::of(field)?;
    let own = "a sidecar with settings of its own (the agent is the proxy)";
    let unused = [
        "id",
        "name",
        "kind",
        "tags",
        "meta",
        "address",
        "port",
        "weights",
        "check",
        "checks",
        "taggedaddresses",
        "enabletagoverride",
        "connect",
    ];
    for name in unused {
        fields.refuse(&[name], own)?;
    }
    refuse_unused(&mut fields)?;
    let proxy = fields.take(&["proxy"])?.map(|field| proxy(&field, defaults)).transpose()?;
    fields.finish()?;
    Ok(proxy)
}

/// What a `Proxy` object says.
struct Proxy {
    path: String,
    service_name: String,
    service_id: String,
    local_ip: Option<IpAddr>,
    local_port: Option<u16>,
    protocol: Option<Protocol>,
    upstreams: Vec<UpstreamDefinition>,
}

impl Proxy {
    /// Refuses a proxy that names another service than the one it stands in.
    fn is_for(&self, name: &ServiceName, id: &InstanceId) -> Result<(), DefinitionError> {
        let given = [
            ("DestinationServiceName", &self.service_name, name.as_str()),
            ("DestinationServiceID", &self.service_id, id.as_str()),
        ];
        for (field, found, own) in given {
            if !found.is_empty() && found != own {
                let problem = format!("must be empty or {own:?}: a proxy for another service is not supported");
                return Err(DefinitionError::Invalid { path: format!("{}.{field}", self.path), problem });
            }
        }
        Ok(())
    }
}

fn proxy(field: &Field<'_>, defaults: &DefinitionDefaults<'_>) -> Result<Proxy, DefinitionError> {
    let mut fields = Fields::of(field)?;
    if let Some(mode) = fields.take(&["mode"])?
        && !matches!(mode.text()?, "" | "direct")
    {
        return Err(DefinitionError::Unsupported { path: mode.path, what: "a transparent proxy".into() });
    }
    mesh_gateway(&mut fields)?;
    let unused = [
        (&["expose"], "exposing paths past the proxy"),
        (&["transparentproxy"], "a transparent proxy"),
        (&["localservicesocketpath"], "a unix socket"),
        (&["accesslogs"], "access log settings"),
        (&["envoyextensions"], "an Envoy extension"),
        (&["mutualtlsmode"], "another mutual TLS mode than strict"),
    ];
    for (names, what) in unused {
        fields.refuse(names, what)?;
    }
    let local_address = fields.take(&["localserviceaddress"])?;
    let local_ip = local_address.map(|field| ip(&field)).transpose()?.flatten();
    let upstream_fields = fields.take(&["upstreams"])?.map(|field| field.elements()).transpose()?;
    let upstreams = upstream_fields.unwrap_or_default();
    let proxy = Proxy {
        path: field.path.clone(),
        service_name: fields.text(&["destinationservicename"])?,
        service_id: fields.text(&["destinationserviceid"])?,
        local_ip,
        local_port: Some(fields.port(&["localserviceport"])?).filter(|port| *port > 0),
        protocol: config_protocol(&mut fields)?,
        upstreams: upstreams.iter().map(|field| upstream(field, defaults)).collect::<Result<_, _>>()?,
    };
    fields.finish()?;
    Ok(proxy)
}

/// An IP address that can be dialled; empty is none.
fn ip(field: &Field<'_>) -> Result<Option<IpAddr>, DefinitionError> {
    match field.text()? {
        "" => Ok(None),
        "localhost" => Ok(Some(IpAddr::V4(Ipv4Addr::LOCALHOST))),
        text => match text.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() => Err(DefinitionError::ServiceAddress),
            Ok(ip) => Ok(Some(ip)),
            Err(_) => {
                let problem = format!("{text:?} is no IP address");
                Err(DefinitionError::Invalid { path: field.path.clone(), problem })
            }
        },
    }
}

fn mesh_gateway(fields: &mut Fields<'_>) -> Result<(), DefinitionError> {
    let Some(field) = fields.take(&["meshgateway"])? else { return Ok(()) };
    let mut inner = Fields::of(&field)?;
    let mode = inner.text(&["mode"])?;
    inner.finish()?;
    if matches!(mode.as_str(), "" | "none") {
        return Ok(());
    }
    Err(DefinitionError::Unsupported { path: field.path, what: "a mesh gateway".into() })
}

/// Reads `Config`: `protocol` is all that weft acts on.
fn config_protocol(fields: &mut Fields<'_>) -> Result<Option<Protocol>, DefinitionError> {
    let Some(field) = fields.take(&["config"])? else { return Ok(None) };
    let mut config = Fields::of(&field)?;
    let protocol = protocol(&mut config)?;
    // Whoever takes the definition tells of them: `without_effect`.
    let _told = config.take_unused(why_unused);
    match config.finish() {
        Err(DefinitionError::UnknownField { path }) => {
            Err(DefinitionError::Unsupported { path, what: "a proxy setting other than `protocol`".into() })
        }
        other => other.map(|()| protocol),
    }
}

fn upstream(field: &Field<'_>, defaults: &DefinitionDefaults<'_>) -> Result<UpstreamDefinition, DefinitionError> {
    let mut fields = Fields::of(field)?;
    if let Some(kind) = fields.take(&["destinationtype"])?
        && !matches!(kind.text()?, "" | "service")
    {
        return Err(DefinitionError::Unsupported { path: kind.path, what: "an upstream that is no service".into() });
    }
    if let Some(field) = fields.take(&["datacenter"])?
        && !["", defaults.datacenter].contains(&field.text()?)
    {
        let what = format!("an upstream in another datacenter than the agent's own, {:?},", defaults.datacenter);
        return Err(DefinitionError::Unsupported { path: field.path, what });
    }
    fields.refuse(&["destinationpeer"], "an upstream in another cluster")?;
    for name in ["destinationnamespace", "destinationpartition"] {
        if let Some(field) = fields.take(&[name])?
            && !matches!(field.text()?, "" | "default")
        {
            return Err(DefinitionError::Unsupported { path: field.path, what: "a namespace or partition".into() });
        }
    }
    for name in ["localbindsocketpath", "localbindsocketmode"] {
        fields.refuse(&[name], "a unix socket")?;
    }
    fields.refuse(&["centrallyconfigured"], "a central upstream")?;
    mesh_gateway(&mut fields)?;
    let destination = fields.text(&["destinationname"])?;
    let bind_ip = match fields.take(&["localbindaddress"])? {
        Some(field) => match field.text()? {
            "" => defaults.bind_ip,
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            text => text.parse().map_err(|_| field.wrong(format!("must be an IP address, and is {text:?}")))?,
        },
        None => defaults.bind_ip,
    };
    let port = fields.port(&["localbindport"])?;
    let protocol = config_protocol(&mut fields)?;
    let path = fields.path().to_owned();
    fields.finish()?;
    let refuse = |field: &str, problem: String| DefinitionError::Invalid { path: format!("{path}.{field}"), problem };
    let destination: ServiceName =
        destination.parse().map_err(|error: NameError| refuse("DestinationName", error.to_string()))?;
    if port == 0 {
        return Err(refuse("LocalBindPort", "an upstream needs a local port from 1 to 65535".into()));
    }
    Ok(UpstreamDefinition { destination, bind: SocketAddr::new(bind_ip, port), protocol })
}
