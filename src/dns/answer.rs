//! A question and a snapshot to an answer.
//!
//! Invariants: a name that is not there, or has nothing healthy, is NXDOMAIN with the domain's SOA; a name that is there
//! without records of the type is NOERROR with the SOA and nothing else (RFC 2308), so that nobody concludes that the names
//! below it are not there either. Answers stand in the asker's domain and in its letters.
//! Not here: what fits (`message`), names of others (`recurse`).

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use rand::Rng;
use rand::seq::SliceRandom as _;

use super::message::{Answers, Request};
use super::name::{self, Asked, Lookup, ServiceName};
use super::near::Trips;
use super::zone::{Pointer, Zone};
use super::{DnsConfig, DomainName};
use crate::catalogue::virtual_ip::is_virtual;
use crate::model::{HealthStatus, Instance, NodeEntry};
use crate::prepared::{self, Book, Ends};

/// Bytes of the shortest record: a pointer to its name, type, class, TTL, length and an IPv4 address.
const RECORD_BYTES_MIN: u16 = 16;
/// Longest string of a TXT record (RFC 1035 §3.3).
const TXT_STRING_BYTES_MAX: usize = 255;
/// Keys of node meta that begin so stand in TXT by their value alone: for texts that other programs read.
const TXT_VALUE_ALONE: &str = "rfc1035-";

/// Answers questions about the agent's own domains.
#[derive(Debug)]
pub(super) struct Responder {
    config: DnsConfig,
    datacenter: String,
    domains: Vec<Domain>,
    labels: Vec<Vec<String>>,
}

#[derive(Debug)]
struct Domain {
    name: Name,
    name_server: Name,
    contact: Name,
}

impl Domain {
    fn new(domain: &DomainName) -> Self {
        // A domain is bounded and made of labels: with one label before it, it is a name.
        let of = |text: &str| Name::from_ascii(text).unwrap_or_else(|_| Name::root());
        Self {
            name: of(&format!("{domain}.")),
            name_server: of(&format!("ns.{domain}.")),
            contact: of(&format!("hostmaster.{domain}.")),
        }
    }
}

/// What answers are made from beside the zone.
pub(super) struct Beside<'a> {
    /// The order of instances, by their nodes.
    pub(super) trips: Option<&'a Trips>,
    /// The prepared queries.
    pub(super) queries: &'a Book,
    /// Returns this agent's own round trips, as far as they are known.
    pub(super) from_here: &'a dyn Fn() -> Option<Arc<Trips>>,
}

/// What a name turned out to be.
enum Outcome {
    /// Not there.
    Nothing,
    /// There; without records if it has none of the type.
    There(Section),
}

#[derive(Default)]
struct Section {
    records: Vec<(RData, u32)>,
    additionals: Vec<Record>,
    is_cut: bool,
}

impl Outcome {
    fn of(records: impl IntoIterator<Item = RData>, ttl_s: u32) -> Self {
        let records = records.into_iter().map(|data| (data, ttl_s)).collect();
        Self::There(Section { records, ..Section::default() })
    }

    /// A name that is there and has no record of its own.
    fn empty() -> Self {
        Self::There(Section::default())
    }
}

/// One question, with what it is answered from.
struct Task<'a, R> {
    responder: &'a Responder,
    zone: &'a Zone,
    request: &'a Request,
    domain: &'a Domain,
    beside: &'a Beside<'a>,
    rng: &'a mut R,
}

impl Responder {
    /// Takes the configuration and this agent's datacenter.
    pub(super) fn new(config: DnsConfig, datacenter: String) -> Self {
        let names = std::iter::once(&config.domain).chain(&config.alt_domain);
        let domains = names.clone().map(Domain::new).collect();
        let labels = names.map(|name| name.as_str().split('.').map(str::to_owned).collect()).collect();
        Self { config, datacenter, domains, labels }
    }

    /// Answers `request` from `zone`; none if the name is none of weft's. `rng` shuffles; whom `beside` has round trips of comes
    /// first, nearest before all.
    pub(super) fn answer(
        &self,
        zone: &Zone,
        request: &Request,
        beside: &Beside<'_>,
        rng: &mut impl Rng,
    ) -> Option<Answers> {
        let lower = request.query.name().to_lowercase();
        // What is no text, or has a dot inside of a label, is nobody's name.
        let label = |bytes| str::from_utf8(bytes).ok().filter(|label| !label.contains('.')).unwrap_or("\u{fffd}");
        let labels: Vec<&str> = lower.iter().map(label).collect();
        match name::parse(&labels, &self.labels) {
            Lookup::Foreign => None,
            Lookup::Pointer(ip) => self.pointer(zone, request, ip),
            Lookup::Own(at, asked) => {
                let domain = self.domains.get(at)?;
                let mut task = Task { responder: self, zone, request, domain, beside, rng };
                let outcome = task.outcome(asked);
                Some(task.answers(outcome))
            }
        }
    }

    fn pointer(&self, zone: &Zone, request: &Request, ip: IpAddr) -> Option<Answers> {
        let domain = self.domains.first()?;
        let virtual_service = || match ip {
            IpAddr::V4(v4) if is_virtual(v4) => {
                let name = zone.virtuals().service_at(v4)?;
                zone.snapshot().services.contains_key(name).then(|| in_domain(domain, &[name.as_str(), "virtual"]))?
            }
            _ => None,
        };
        let named = |pointer: &Pointer| match pointer {
            Pointer::Node { name, datacenter } => in_domain(domain, &[name.as_str(), "node", datacenter]),
            Pointer::Service { name, datacenter } => in_domain(domain, &[name.as_str(), "service", datacenter]),
        };
        let names: Vec<Name> = zone.pointers(ip).iter().filter_map(named).chain(virtual_service()).collect();
        if names.is_empty() {
            // Nobody else knows virtual IPs; all other addresses may be known elsewhere.
            let is_ours = matches!(ip, IpAddr::V4(v4) if is_virtual(v4));
            return is_ours.then(|| Answers::code(ResponseCode::NXDomain));
        }
        let mut answers = Answers::code(ResponseCode::NoError);
        if matches!(request.query.query_type(), RecordType::PTR | RecordType::ANY) {
            let ttl = self.config.node_ttl_s;
            let record = |name| Record::from_rdata(request.query.name().clone(), ttl, RData::PTR(PTR(name)));
            answers.records = names.into_iter().map(record).collect();
        }
        Some(answers)
    }
}

/// Writes `parts` before the domain; none if they make no name. A part may hold dots.
fn in_domain(domain: &Domain, parts: &[&str]) -> Option<Name> {
    let labels = parts.iter().flat_map(|part| part.split('.'));
    let mut name = Name::new();
    for label in labels {
        name = name.append_label(label.as_bytes()).ok()?;
    }
    name.append_domain(&domain.name).ok()
}

impl<'a, R: Rng> Task<'a, R> {
    fn answers(&self, outcome: Outcome) -> Answers {
        let name = self.request.query.name();
        let Outcome::There(section) = outcome else {
            return Answers { authorities: vec![self.soa()], ..Answers::code(ResponseCode::NXDomain) };
        };
        let authorities = if section.records.is_empty() { vec![self.soa()] } else { Vec::new() };
        let record = |(data, ttl_s)| Record::from_rdata(name.clone(), ttl_s, data);
        Answers {
            records: section.records.into_iter().map(record).collect(),
            authorities,
            additionals: section.additionals,
            is_cut: section.is_cut,
            ..Answers::code(ResponseCode::NoError)
        }
    }

    fn soa(&self) -> Record {
        let soa = self.soa_data();
        // RFC 2308 §5: what a negative answer lives for is the lesser of the record's own time and the minimum.
        Record::from_rdata(self.domain.name.clone(), self.config().soa.minimum_s, soa)
    }

    fn soa_data(&self) -> RData {
        let times = &self.config().soa;
        let signed = |seconds: u32| i32::try_from(seconds).unwrap_or(i32::MAX);
        // Indexes begin at wall-clock milliseconds, so seconds grow across restarts; the 32 bits are compared as RFC 1982 says.
        let serial = u32::try_from((self.zone.snapshot().index / 1000) & 0xffff_ffff).unwrap_or_default();
        RData::SOA(SOA::new(
            self.domain.name_server.clone(),
            self.domain.contact.clone(),
            serial,
            signed(times.refresh_s),
            signed(times.retry_s),
            signed(times.expire_s),
            times.minimum_s,
        ))
    }

    fn config(&self) -> &DnsConfig {
        &self.responder.config
    }

    fn kind(&self) -> RecordType {
        self.request.query.query_type()
    }

    fn outcome(&mut self, asked: Asked<'_>) -> Outcome {
        match asked {
            Asked::Apex => self.apex(),
            Asked::NameServer => Outcome::of(self.local_address(), self.config().node_ttl_s),
            Asked::Service(service) => self.service(service),
            Asked::Located(service) => match self.instances(service, Reached::Directly) {
                Some(instances) if matches!(self.kind(), RecordType::SRV | RecordType::ANY) => {
                    self.srv(self.ttl_s(service), &instances, Reached::Directly)
                }
                Some(_) => Outcome::empty(),
                None => Outcome::Nothing,
            },
            Asked::Connect(service) => match self.instances(service, Reached::ByMesh) {
                Some(instances) => self.reached(self.ttl_s(service), &instances, Reached::ByMesh),
                None => Outcome::Nothing,
            },
            Asked::Ingress(service) => self.ingress(service),
            Asked::Node { name, datacenter } => self.node(&name, datacenter),
            Asked::Address { ip, datacenter } if self.is_known(datacenter) => {
                Outcome::of(self.if_wanted(ip), self.config().node_ttl_s)
            }
            Asked::Virtual(service) => self.virtual_ip(service),
            Asked::Query { name, datacenter } => self.prepared(&name, datacenter),
            Asked::Branch { datacenter } if self.is_known(datacenter) => Outcome::empty(),
            Asked::Address { .. } | Asked::Branch { .. } | Asked::Nothing => Outcome::Nothing,
        }
    }

    fn is_known(&self, datacenter: Option<&str>) -> bool {
        datacenter.is_none_or(|name| name == self.responder.datacenter || self.zone.has_datacenter(name))
    }

    /// Returns `ip` as a record, if the question's type takes it.
    fn if_wanted(&self, ip: IpAddr) -> Option<RData> {
        match (ip, self.kind()) {
            (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => Some(RData::A(v4.into())),
            (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => Some(RData::AAAA(v6.into())),
            _ => None,
        }
    }

    fn local_address(&self) -> Option<RData> {
        self.if_wanted(self.zone.local_node()?.info.mesh_addr.ip())
    }

    fn apex(&self) -> Outcome {
        let mut section = Section::default();
        let ttl_s = self.config().node_ttl_s;
        if matches!(self.kind(), RecordType::SOA | RecordType::ANY) {
            section.records.push((self.soa_data(), self.config().soa.minimum_s));
        }
        if matches!(self.kind(), RecordType::NS | RecordType::ANY) {
            section.records.push((RData::NS(NS(self.domain.name_server.clone())), ttl_s));
            if let Some(node) = self.zone.local_node() {
                section.additionals.push(glue(self.domain.name_server.clone(), ttl_s, node.info.mesh_addr.ip()));
            }
        }
        Outcome::There(section)
    }

    /// Returns the instances that `service` means, shuffled or nearest first; none if not one of them is healthy.
    fn instances(&mut self, service: ServiceName<'_>, reached: Reached) -> Option<Vec<&'a Instance>> {
        let zone = self.zone;
        let external = || zone.external_service(service.name).filter(|_| reached == Reached::Directly);
        let entries = zone.service(service.name).into_iter().chain(external());
        let datacenter = service.datacenter.unwrap_or(&self.responder.datacenter);
        let has_tag = |instance: &&Instance| {
            service.tag.is_none_or(|tag| instance.record.tags.iter().any(|own| own.eq_ignore_ascii_case(tag)))
        };
        let all = entries.flat_map(|entry| entry.instances.iter().map(AsRef::as_ref));
        let mut found: Vec<&Instance> = all
            .filter(|instance| self.is_healthy(instance))
            .filter(|instance| instance.node.info.datacenter == datacenter)
            .filter(has_tag)
            .collect();
        order(&mut found, self.beside.trips, self.rng);
        (!found.is_empty()).then_some(found)
    }

    fn is_healthy(&self, instance: &Instance) -> bool {
        match instance.status {
            HealthStatus::Passing => true,
            HealthStatus::Warning => !self.config().only_passing,
            HealthStatus::Critical => false,
        }
    }

    /// Finds the healthy gateways by which calls of a service come into the mesh, at the ports where they do.
    fn ingress(&mut self, service: ServiceName<'_>) -> Outcome {
        let datacenter = service.datacenter.unwrap_or(&self.responder.datacenter);
        let at_port = |(mut instance, port): (Arc<Instance>, u16)| {
            // A copy that nobody else sees: the port of a gateway's registration is none of its listeners'.
            Arc::make_mut(&mut Arc::make_mut(&mut instance).record).port = port;
            instance
        };
        let found = self.zone.snapshot().ingress(service.name).into_iter();
        let found =
            found.filter(|(instance, _)| self.is_healthy(instance) && instance.node.info.datacenter == datacenter);
        let gateways: Vec<Arc<Instance>> = found.map(at_port).collect();
        if gateways.is_empty() {
            return Outcome::Nothing;
        }
        let mut instances: Vec<&Instance> = gateways.iter().map(AsRef::as_ref).collect();
        order(&mut instances, self.beside.trips, self.rng);
        self.reached(self.ttl_s(service), &instances, Reached::Directly)
    }

    fn service(&mut self, service: ServiceName<'_>) -> Outcome {
        let Some(instances) = self.instances(service, Reached::Directly) else { return Outcome::Nothing };
        self.reached(self.ttl_s(service), &instances, Reached::Directly)
    }

    /// Executes a prepared query as HTTP does; its own order goes before the configuration's.
    fn prepared(&mut self, name: &str, datacenter: Option<&str>) -> Outcome {
        let Some(definition) = self.beside.queries.find(name) else { return Outcome::Nothing };
        let query = &definition.service;
        let is_near = !query.near.is_empty();
        let needs_distances = is_near || query.failover.nearest_n > 0;
        let from_here = needs_distances.then(|| (self.beside.from_here)()).flatten().unwrap_or_default();
        let (ends, reached) =
            if query.connect { (Ends::Mesh, Reached::ByMesh) } else { (Ends::Services, Reached::Directly) };
        let datacenter = datacenter.unwrap_or(&self.responder.datacenter);
        let found = prepared::execute(self.zone.snapshot(), query, datacenter, ends, || &from_here);
        if found.instances.is_empty() {
            return Outcome::Nothing;
        }
        let mut instances: Vec<&Instance> = found.instances.iter().map(AsRef::as_ref).collect();
        let trips = if is_near { Some(&*from_here) } else { self.beside.trips };
        order(&mut instances, trips, self.rng);
        let of_service = || self.config().service_ttl.of(&query.service.to_ascii_lowercase());
        self.reached(definition.ttl_s().unwrap_or_else(of_service), &instances, reached)
    }

    fn reached(&self, ttl_s: u32, instances: &[&Instance], reached: Reached) -> Outcome {
        match self.kind() {
            RecordType::SRV => self.srv(ttl_s, instances, reached),
            _ => self.addresses(ttl_s, instances, reached),
        }
    }

    fn ttl_s(&self, service: ServiceName<'_>) -> u32 {
        self.config().service_ttl.of(service.name)
    }

    /// Most records that can fit, and one more, by which it shows that some do not.
    fn records_max(&self) -> usize {
        usize::from(self.request.limit() / RECORD_BYTES_MIN) + 1
    }

    /// Cuts `records` to what the configuration allows in one answer; `by_type` is its own bound of this type.
    fn bound(&self, mut records: Vec<(RData, u32)>, by_type: usize) -> Section {
        if by_type > 0 {
            records.truncate(by_type);
        }
        let udp = self.config().udp_answer_limit;
        let mut is_cut = false;
        if self.request.is_plain_udp() && udp > 0 && records.len() > udp {
            records.truncate(udp);
            is_cut = self.config().enable_truncate;
        }
        Section { records, is_cut, ..Section::default() }
    }

    fn addresses(&self, ttl_s: u32, instances: &[&Instance], reached: Reached) -> Outcome {
        let mut seen = HashSet::with_hasher(foldhash::fast::RandomState::default());
        let mut records = Vec::new();
        let mut alias = None;
        for instance in instances {
            match place(instance, reached) {
                Place::Node(ip) | Place::Own(ip) => {
                    if let Some(data) = self.if_wanted(ip).filter(|_| seen.insert(ip)) {
                        records.push((data, ttl_s));
                    }
                }
                Place::Named(name) => alias = alias.or(Some(name)),
                Place::Nowhere => {}
            }
            if records.len() >= self.records_max() {
                break;
            }
        }
        let wants_address =
            matches!(self.kind(), RecordType::A | RecordType::AAAA | RecordType::ANY | RecordType::CNAME);
        // Only one alias may stand at a name, and nothing beside it (RFC 1034 §3.6.2).
        if let (true, true, Some(name)) = (seen.is_empty(), wants_address, alias) {
            return Outcome::of([RData::CNAME(CNAME(name))], ttl_s);
        }
        Outcome::There(self.bound(records, self.config().a_record_limit))
    }

    fn srv(&self, ttl_s: u32, instances: &[&Instance], reached: Reached) -> Outcome {
        let mut targets = Vec::new();
        let mut records = Vec::new();
        for instance in instances.iter().take(self.records_max()) {
            let node = &instance.node;
            let (target, ip) = match place(instance, reached) {
                Place::Node(ip) => (self.node_name(node).or_else(|| self.address_name(node, ip)), Some(ip)),
                Place::Own(ip) => (self.address_name(node, ip), Some(ip)),
                Place::Named(name) => (Some(name), None),
                Place::Nowhere => (None, None),
            };
            let Some(target) = target else { continue };
            let port = if reached == Reached::ByMesh { node.info.mesh_addr.port() } else { instance.record.port };
            let weights = instance.record.weights;
            let weight = if instance.status == HealthStatus::Passing { weights.passing } else { weights.warning };
            let weight = u16::try_from(weight).unwrap_or(u16::MAX);
            records.push((RData::SRV(SRV::new(1, weight, port, target.clone())), ttl_s));
            targets.push((target, ip));
        }
        let mut section = self.bound(records, 0);
        targets.truncate(section.records.len());
        let mut seen = HashSet::with_hasher(foldhash::fast::RandomState::default());
        for (target, ip) in targets {
            if let Some(ip) = ip.filter(|_| seen.insert(target.clone())) {
                section.additionals.push(glue(target, self.config().node_ttl_s, ip));
            }
        }
        Outcome::There(section)
    }

    fn node_name(&self, node: &NodeEntry) -> Option<Name> {
        in_domain(self.domain, &[node.info.name.as_str(), "node", &node.info.datacenter])
    }

    fn address_name(&self, node: &NodeEntry, ip: IpAddr) -> Option<Name> {
        in_domain(self.domain, &[&name::hex_of_ip(ip), "addr", &node.info.datacenter])
    }

    fn node(&self, name: &str, datacenter: Option<&str>) -> Outcome {
        let wanted = datacenter.unwrap_or(&self.responder.datacenter);
        let Some(node) = self.zone.node(name).filter(|node| node.info.datacenter == wanted) else {
            return if self.zone.is_above_a_node(name) { Outcome::empty() } else { Outcome::Nothing };
        };
        let mut records: Vec<RData> = node.ip().and_then(|ip| self.if_wanted(ip)).into_iter().collect();
        let wants_address =
            matches!(self.kind(), RecordType::A | RecordType::AAAA | RecordType::CNAME | RecordType::ANY);
        if node.ip().is_none() && wants_address {
            let alias = host_name(&node.address()).map(|name| RData::CNAME(CNAME(name)));
            return Outcome::of(alias, self.config().node_ttl_s);
        }
        if matches!(self.kind(), RecordType::TXT | RecordType::ANY) {
            records.extend(node.info.meta.iter().map(|(key, value)| text(key, value)));
        }
        Outcome::of(records, self.config().node_ttl_s)
    }

    fn virtual_ip(&self, service: ServiceName<'_>) -> Outcome {
        let Some(entry) = self.zone.service(service.name).filter(|_| self.is_known(service.datacenter)) else {
            return Outcome::Nothing;
        };
        let ip = self.zone.virtuals().address(&entry.name);
        Outcome::of(ip.and_then(|ip| self.if_wanted(ip.into())), self.config().service_ttl.of(service.name))
    }
}

/// Which way an instance is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reached {
    /// At the app's own port.
    Directly,
    /// At its agent's mesh port.
    ByMesh,
}

/// Where an instance is reached.
enum Place {
    /// At its node's address.
    Node(IpAddr),
    /// At an address of its own.
    Own(IpAddr),
    /// By another name.
    Named(Name),
    /// Its address is neither.
    Nowhere,
}

fn place(instance: &Instance, reached: Reached) -> Place {
    let (address, node) = (&*instance.record.address, &instance.node);
    if reached == Reached::ByMesh || (address.is_empty() && node.external.is_none()) {
        return Place::Node(node.info.mesh_addr.ip());
    }
    // Several agents may write one name of a node without an agent: its address says which is meant.
    let given = if address.is_empty() { node.address() } else { address.into() };
    if let Ok(ip) = given.parse() {
        return Place::Own(ip);
    }
    host_name(&given).map_or(Place::Nowhere, Place::Named)
}

fn host_name(text: &str) -> Option<Name> {
    let mut name = Name::from_ascii(text).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// Shuffles `instances`, or puts the nearest first where distances are given.
fn order(instances: &mut [&Instance], trips: Option<&Trips>, rng: &mut impl Rng) {
    instances.shuffle(rng);
    if let Some(trips) = trips {
        // Stable: those that nobody measured, and equals, stay shuffled.
        instances.sort_by_key(|instance| trips.get(&instance.node.info.name).copied().unwrap_or(Duration::MAX));
    }
}

/// An address beside an answer, so that the asker need not ask for it.
fn glue(name: Name, ttl_s: u32, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(v4) => RData::A(v4.into()),
        IpAddr::V6(v6) => RData::AAAA(v6.into()),
    };
    Record::from_rdata(name, ttl_s, data)
}

/// A pair of node meta as TXT: `key=value` (RFC 1464), in as many strings as it takes.
fn text(key: &str, value: &str) -> RData {
    let whole = if key.starts_with(TXT_VALUE_ALONE) { value.to_owned() } else { format!("{key}={value}") };
    let strings: Vec<&[u8]> = whole.as_bytes().chunks(TXT_STRING_BYTES_MAX).collect();
    RData::TXT(TXT::from_bytes(strings))
}
