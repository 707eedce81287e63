use std::time::Duration;

use serde_json::json;
use tokio::sync::watch::Receiver;

use super::testing::{named, service, ttl_check};
use super::*;

struct Rig {
    handle: RegistryHandle,
    publication: Receiver<Arc<Publication>>,
    tasks: Tasks,
    stop: CancellationToken,
}

impl Rig {
    async fn try_start(store: &Store, scope: &str, config: ConfigDefinitions) -> Result<Self, RegistryStartError> {
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        let scope: ServeScope = scope.parse().unwrap();
        let params = RegistryParams {
            store: store.clone(),
            scope: Arc::new(move || scope.clone()),
            node: "n1".parse().unwrap(),
            gateway_ip: [10, 0, 0, 1].into(),
            config,
            check_settings: CheckSettings::default(),
            metrics: Metrics::new(),
            tasks: tasks.clone(),
            stop: stop.clone(),
            first_index: 1000,
        };
        let (handle, publication) = Registry::start(params).await?;
        Ok(Self { handle, publication, tasks, stop })
    }

    async fn start(store: &Store) -> Self {
        Self::try_start(store, "*", ConfigDefinitions::default()).await.unwrap()
    }

    async fn stop(self) {
        self.stop.cancel();
        self.tasks.join().await;
        assert_eq!(self.tasks.failure(), None);
    }

    fn status(&self, check: &str) -> HealthStatus {
        self.handle.state().checks[check].status
    }

    async fn pass(&self, check: &str) {
        self.handle.update_ttl(check.parse().unwrap(), HealthStatus::Passing, "ok".into()).await.unwrap();
    }

    /// Waits on a level, at most five minutes of (paused) time.
    async fn wait_for(&self, level: impl Fn(&LocalState) -> bool) {
        let mut states = self.handle.subscribe();
        let reached = tokio::time::timeout(Duration::from_mins(5), states.wait_for(|state| level(state))).await;
        reached.expect("the level is reached in time").unwrap();
    }
}

fn with_ttl(name: &str) -> ServiceDefinition {
    service(&json!({"Name": name, "Port": 80, "Check": {"TTL": "15s"}}))
}

fn files(services: Vec<ServiceDefinition>) -> ConfigDefinitions {
    ConfigDefinitions { services, ..ConfigDefinitions::default() }
}

fn id(name: &str) -> InstanceId {
    name.parse().unwrap()
}

#[tokio::test]
async fn services_checks_and_statuses_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let rig = Rig::start(&store).await;
    rig.handle.register_service(with_ttl("web"), false).await.unwrap();
    rig.handle.register_check(ttl_check("own", Some("web"), 60)).await.unwrap();
    rig.pass("service:web").await;
    let before = rig.handle.state();
    rig.stop().await;
    drop(store);

    let rig = Rig::start(&Store::open(dir.path()).unwrap()).await;
    let after = rig.handle.state();
    assert_eq!(after.services["web"].definition, before.services["web"].definition);
    assert_eq!(rig.status("service:web"), HealthStatus::Passing);
    assert_eq!(rig.status("own"), HealthStatus::Critical);
    assert_eq!(after.checks["own"].service_name, "web");
    rig.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_ttl_without_a_word_becomes_critical() {
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    rig.handle.register_service(with_ttl("web"), false).await.unwrap();
    rig.pass("service:web").await;
    let begin = crate::clock::now();
    rig.wait_for(|state| state.checks["service:web"].status == HealthStatus::Critical).await;
    let waited = crate::clock::now() - begin;
    assert!((Duration::from_secs(14)..Duration::from_secs(16)).contains(&waited), "{waited:?}");
    assert!(rig.handle.state().checks["service:web"].output.contains("TTL of 15s expired"));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_stays_critical_is_deregistered() {
    let store = Store::in_memory().unwrap();
    let rig = Rig::start(&store).await;
    let mut web = with_ttl("web");
    web.checks[0].deregister_critical_after = Some(Duration::from_mins(1));
    rig.handle.register_service(web, false).await.unwrap();
    rig.wait_for(|state| state.services.is_empty() && state.checks.is_empty()).await;
    assert!(store.services().unwrap().is_empty());
}

#[tokio::test]
async fn a_service_outside_the_scope_is_refused_and_not_kept() {
    let store = Store::in_memory().unwrap();
    let rig = Rig::try_start(&store, "web,api-*", ConfigDefinitions::default()).await.unwrap();
    let error = rig.handle.register_service(named("db"), false).await.unwrap_err();
    assert_eq!(error, RegistryError::OutOfScope { service: "db".into(), scope: "web,api-*".into() });
    assert!(store.services().unwrap().is_empty() && rig.handle.state().services.is_empty());
    rig.handle.register_service(named("api-1"), false).await.unwrap();
    rig.stop().await;

    // The certificate became narrower: what is stored stays stored, and is not published.
    let rig = Rig::try_start(&store, "web", ConfigDefinitions::default()).await.unwrap();
    assert!(rig.publication.borrow().records.is_empty());
    assert_eq!(store.services().unwrap().len(), 1);
    let refused = Rig::try_start(&store, "web", files(vec![named("db")])).await;
    assert!(matches!(refused, Err(RegistryStartError::Config(RegistryError::OutOfScope { .. }))));
}

#[tokio::test]
async fn one_local_port_goes_to_one_upstream() {
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    let with_upstream = |id: &str, name: &str, to: &str, bind: &str| {
        let upstreams = json!([{"DestinationName": to, "LocalBindAddress": bind, "LocalBindPort": 9191}]);
        service(&json!({"ID": id, "Name": name, "Port": 80, "Proxy": {"Upstreams": upstreams}}))
    };
    rig.handle.register_service(with_upstream("a", "a", "db", "127.0.0.1"), false).await.unwrap();
    for bind in ["127.0.0.1", "0.0.0.0"] {
        let error = rig.handle.register_service(with_upstream("b", "b", "db", bind), false).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("\"a\"") && text.contains("\"b\"") && text.contains("9191"), "{text}");
    }
    rig.handle.register_service(with_upstream("b", "b", "db", "127.0.0.2"), false).await.unwrap();
    // Another instance of the same service shares the port.
    rig.handle.register_service(with_upstream("a2", "a", "db", "127.0.0.1"), false).await.unwrap();
    assert_eq!(rig.publication.borrow().view.upstreams.len(), 2);
}

#[tokio::test]
async fn gateways_are_told_to_the_data_plane_with_their_address_and_nothing_is_relayed_to_them() {
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    let gateway = |id: &str, address: &str| {
        service(&json!({"ID": id, "Name": "edge", "Kind": "ingress-gateway", "Address": address, "Port": 8080}))
    };
    for (id, address) in [("edge-1", ""), ("edge-2", "10.0.0.7"), ("edge-3", "10.0.0.7")] {
        rig.handle.register_service(gateway(id, address), false).await.unwrap();
    }
    let publication = rig.publication.borrow().clone();
    let at: Vec<String> = publication.view.gateways.iter().map(|one| format!("{} {}", one.service, one.ip)).collect();
    assert_eq!(at, ["edge 10.0.0.1", "edge 10.0.0.7"], "the agent's own address, or its own");
    assert!(publication.view.instances.is_empty());
    assert_eq!(publication.records.len(), 3);
    rig.handle.deregister_service("edge-1".parse().unwrap()).await.unwrap();
    assert_eq!(rig.publication.borrow().view.gateways.len(), 1);
}

#[tokio::test]
async fn a_check_id_belongs_to_one_service() {
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    rig.handle.register_service(with_ttl("web"), false).await.unwrap();
    rig.handle.register_service(named("db"), false).await.unwrap();
    let error = rig.handle.register_check(ttl_check("service:web", Some("db"), 9)).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Invalid(text) if text.contains("service:web")), "{error}");
    let error = rig.handle.register_check(ttl_check("x", Some("nope"), 9)).await.unwrap_err();
    assert_eq!(error, RegistryError::UnknownService { id: "nope".into() });
}

#[tokio::test]
async fn a_full_node_refuses_with_the_number_of_bytes() {
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    let big = |name: &str| service(&json!({"Name": name, "Port": 80, "Tags": ["x".repeat(25_000)]}));
    rig.handle.register_service(big("a"), false).await.unwrap();
    rig.handle.register_service(big("b"), false).await.unwrap();
    let error = rig.handle.register_service(big("c"), false).await.unwrap_err();
    assert!(error.to_string().contains("would take 75") && error.to_string().contains("61440"), "{error}");
    rig.handle.deregister_service(id("a")).await.unwrap();
    rig.handle.register_service(big("c"), false).await.unwrap();
}

#[tokio::test]
async fn an_output_alone_publishes_nothing() {
    let mut rig = Rig::start(&Store::in_memory().unwrap()).await;
    rig.handle.register_service(with_ttl("web"), false).await.unwrap();
    rig.pass("service:web").await;
    rig.publication.borrow_and_update();
    let check: CheckId = "service:web".parse().unwrap();
    rig.handle.update_ttl(check.clone(), HealthStatus::Passing, "other words".into()).await.unwrap();
    assert_eq!(rig.handle.state().checks["service:web"].output, "other words");
    assert!(!rig.publication.has_changed().unwrap());
    rig.handle.update_ttl(check, HealthStatus::Warning, "other words".into()).await.unwrap();
    assert!(rig.publication.has_changed().unwrap());
}

#[tokio::test]
async fn registering_again_keeps_statuses_and_replaces_checks_only_if_told() {
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    rig.handle.register_service(with_ttl("web"), false).await.unwrap();
    rig.pass("service:web").await;
    let mut again = with_ttl("web");
    again.record.port = 81;
    again.checks[0].notes = "other".into();
    rig.handle.register_service(again, false).await.unwrap();
    assert_eq!(rig.status("service:web"), HealthStatus::Passing);
    rig.handle.register_service(named("web"), false).await.unwrap();
    assert_eq!(rig.handle.state().checks.len(), 1);
    rig.handle.register_service(named("web"), true).await.unwrap();
    assert!(rig.handle.state().checks.is_empty());
}

#[tokio::test]
async fn unknown_ids_are_named() {
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    let error = rig.handle.deregister_service(id("x")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Unknown service ID \"x\". Ensure that the service ID is passed, not the service name."
    );
    let check = || "x".parse::<CheckId>().unwrap();
    assert_eq!(rig.handle.deregister_check(check()).await, Err(RegistryError::UnknownCheck { id: "x".into() }));
    let mut maintenance = ttl_check("x", None, 1);
    maintenance.probe = Probe::Static;
    rig.handle.register_check(maintenance).await.unwrap();
    let update = rig.handle.update_ttl(check(), HealthStatus::Passing, String::new()).await;
    assert_eq!(update, Err(RegistryError::NotTtl { id: "x".into() }));
    let handle = rig.handle.clone();
    rig.stop().await;
    assert_eq!(handle.deregister_check(check()).await, Err(RegistryError::Closed));
}

#[tokio::test]
async fn a_reload_replaces_the_files_services_and_only_those() {
    let store = Store::in_memory().unwrap();
    let rig = Rig::try_start(&store, "*", files(vec![named("file-1"), with_ttl("file-2")])).await.unwrap();
    rig.handle.register_service(named("api"), false).await.unwrap();
    rig.pass("service:file-2").await;
    assert!(matches!(rig.handle.register_service(named("file-1"), false).await, Err(RegistryError::Invalid(_))));
    assert!(matches!(rig.handle.replace_config(files(vec![named("api")])).await, Err(RegistryError::Invalid(_))));
    rig.handle.replace_config(files(vec![with_ttl("file-2"), named("file-3")])).await.unwrap();
    let names: Vec<_> = rig.handle.state().services.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["api", "file-2", "file-3"]);
    assert_eq!(rig.status("service:file-2"), HealthStatus::Passing);
    assert_eq!(store.services().unwrap().len(), 1);
}

#[tokio::test]
async fn a_tcp_check_runs_by_itself_and_stops_with_its_service() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let metrics_text = |rig: &Rig| rig.handle.state().checks["service:web"].output.clone();
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    let check = json!({"TCP": target, "Interval": "1s"});
    rig.handle.register_service(service(&json!({"Name": "web", "Port": 80, "Check": check})), false).await.unwrap();
    rig.wait_for(|state| state.checks["service:web"].status == HealthStatus::Passing).await;
    assert!(metrics_text(&rig).contains("Success"));
    rig.handle.deregister_service(id("web")).await.unwrap();
    assert!(rig.publication.borrow().records.is_empty());
    rig.stop().await;
}

fn alias(id: &str, of: &str, node: Option<&str>) -> CheckDefinition {
    let mut check = ttl_check(id, None, 10);
    check.probe = Probe::Alias { node: node.map(str::to_owned), service: Some(of.parse().unwrap()) };
    check
}

#[tokio::test]
async fn an_alias_follows_its_service_at_once() {
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    rig.handle.register_check(alias("follows", "web", None)).await.unwrap();
    rig.handle.register_check(alias("own-name", "web", Some("n1"))).await.unwrap();
    assert!(rig.handle.state().checks["follows"].output.contains("there is no service with the ID \"web\""));
    rig.handle.register_service(with_ttl("web"), false).await.unwrap();
    rig.pass("service:web").await;
    // An order is answered when what follows from it is published.
    assert_eq!((rig.status("follows"), rig.status("own-name")), (HealthStatus::Passing, HealthStatus::Passing));
    let check = || "service:web".parse().unwrap();
    rig.handle.update_ttl(check(), HealthStatus::Warning, String::new()).await.unwrap();
    assert_eq!(rig.status("follows"), HealthStatus::Warning);
    assert_eq!(rig.publication.borrow().records.len(), 4);
    rig.handle.deregister_service(id("web")).await.unwrap();
    assert_eq!(rig.status("follows"), HealthStatus::Critical);
    rig.stop().await;
}

#[tokio::test]
async fn an_alias_of_another_node_follows_the_catalogue() {
    use crate::catalogue::{Publisher, ServiceEntry, Snapshot};
    use crate::model::{CheckRecord, Instance, MemberStatus, NodeEntry, NodeInfo};
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    let info = NodeInfo {
        id: "a-uuid".to_owned(),
        name: "n2".parse().unwrap(),
        mesh_addr: "10.0.0.2:8301".parse().unwrap(),
        datacenter: "dc1".to_owned(),
        meta: BTreeMap::new(),
        build: String::new(),
        issuer: false,
    };
    let snapshot = |status: HealthStatus, member: MemberStatus| {
        let node = Arc::new(NodeEntry {
            info: info.clone().into(),
            status: member,
            generation: crate::model::Generation::default(),
            checks: Vec::new(),
            external: None,
            create_index: 1,
            modify_index: 1,
        });
        let check = CheckRecord {
            id: "service:db".parse().unwrap(),
            name: "".into(),
            status,
            notes: "".into(),
            service: Some(id("db")),
            kind: "tcp".into(),
        };
        let record = named("db").record;
        let (name, protocol) = (record.name.clone(), record.protocol);
        let (create_index, modify_index) = (1, 1);
        let instance = Instance {
            node: Arc::clone(&node),
            record: record.into(),
            checks: [check.into()].into(),
            status,
            create_index,
            modify_index,
        };
        let service = ServiceEntry { name: name.clone(), protocol, instances: vec![Arc::new(instance)], modify_index };
        Arc::new(Snapshot {
            nodes: BTreeMap::from([(info.name.clone(), node)]),
            services: BTreeMap::from([(name, Arc::new(service))]),
            ..Snapshot::empty("n1".parse().unwrap())
        })
    };
    let publisher = Publisher::new(snapshot(HealthStatus::Passing, MemberStatus::Alive));
    rig.tasks.spawn("aliases", rig.handle.clone().follow_catalogue(publisher.reader()));
    rig.handle.register_check(alias("by-name", "db", Some("n2"))).await.unwrap();
    rig.handle.register_check(alias("by-id", "db", Some("a-uuid"))).await.unwrap();
    let both = |want| move |state: &LocalState| ["by-name", "by-id"].iter().all(|id| state.checks[*id].status == want);
    rig.wait_for(both(HealthStatus::Passing)).await;
    publisher.publish(snapshot(HealthStatus::Critical, MemberStatus::Alive));
    rig.wait_for(both(HealthStatus::Critical)).await;
    publisher.publish(snapshot(HealthStatus::Warning, MemberStatus::Alive));
    rig.wait_for(both(HealthStatus::Warning)).await;
    publisher.publish(snapshot(HealthStatus::Passing, MemberStatus::Failed));
    rig.wait_for(both(HealthStatus::Critical)).await;
    rig.stop().await;
}

#[tokio::test]
async fn a_reload_removes_the_files_checks_and_keeps_those_of_the_api() {
    let store = Store::in_memory().unwrap();
    let config = |checks: Vec<CheckDefinition>| ConfigDefinitions { checks, ..files(vec![named("web")]) };
    let of_files = vec![ttl_check("disk", None, 60), ttl_check("web-up", Some("web"), 60)];
    let rig = Rig::try_start(&store, "*", config(of_files.clone())).await.unwrap();
    rig.handle.register_check(ttl_check("api", None, 60)).await.unwrap();
    for check in ["disk", "web-up"] {
        rig.pass(check).await;
    }
    let error = rig.handle.register_check(ttl_check("disk", None, 5)).await.unwrap_err();
    assert!(error.to_string().contains("comes from a config file"), "{error}");
    let error = rig.handle.replace_config(config(vec![ttl_check("x", Some("nope"), 9)])).await.unwrap_err();
    assert!(error.to_string().contains("about service \"nope\", which is not here"), "{error}");
    assert_eq!(rig.handle.state().checks.len(), 3, "what is refused changes nothing");
    let mut changed = of_files[1].clone();
    changed.notes = "other".to_owned();
    rig.handle.replace_config(config(vec![changed])).await.unwrap();
    let ids: Vec<_> = rig.handle.state().checks.keys().map(ToString::to_string).collect();
    assert_eq!(ids, ["api", "web-up"]);
    assert_eq!(rig.status("web-up"), HealthStatus::Passing);
    rig.stop().await;
    // Nothing of the files is on disk.
    assert_eq!(store.checks().unwrap().len(), 1);
    assert!(store.services().unwrap().is_empty());
}

#[tokio::test]
async fn an_unchanged_check_runs_on_over_a_reload() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let web = service(&json!({"Name": "web", "Port": 80, "Check": {"TCP": target, "Interval": "1s"}}));
    let rig = Rig::try_start(&Store::in_memory().unwrap(), "*", files(vec![web.clone()])).await.unwrap();
    rig.wait_for(|state| state.checks["service:web"].status == HealthStatus::Passing).await;
    let before = Arc::clone(&rig.handle.state().checks["service:web"]);
    rig.handle.replace_config(files(vec![named("other"), web])).await.unwrap();
    // The very same value: it was not made anew.
    assert!(Arc::ptr_eq(&before, &rig.handle.state().checks["service:web"]));
    rig.stop().await;
}

#[tokio::test]
async fn programs_run_only_where_the_configuration_allows_them() {
    let script = || service(&json!({"Name": "web", "Port": 80, "Check": {"Args": ["true"], "Interval": "1s"}}));
    let store = Store::in_memory().unwrap();
    let rig = Rig::start(&store).await;
    let error = rig.handle.register_service(script(), false).await.unwrap_err().to_string();
    assert!(error.starts_with("Invalid check: \"service:web\" is a script check"), "{error}");
    assert!(rig.handle.replace_config(files(vec![script()])).await.is_err());
    let local = ConfigDefinitions { scripts: ScriptPolicy::Files, ..files(vec![script()]) };
    rig.handle.replace_config(local).await.unwrap();
    rig.wait_for(|state| state.checks["service:web"].status == HealthStatus::Passing).await;
    let mut other = script();
    other.record.id = id("other");
    other.checks[0].id = "other".parse().unwrap();
    other.checks[0].service = Some(id("other"));
    assert!(rig.handle.register_service(other.clone(), false).await.is_err());
    let all = ConfigDefinitions { scripts: ScriptPolicy::All, ..files(vec![script()]) };
    rig.handle.replace_config(all).await.unwrap();
    rig.handle.register_service(other, false).await.unwrap();
    rig.stop().await;
    // A restart without the right leaves it on disk and does not run it.
    let rig = Rig::start(&store).await;
    assert!(rig.handle.state().services.is_empty());
    assert_eq!(store.services().unwrap().len(), 1);
}

#[tokio::test]
async fn a_kind_that_the_host_lacks_is_refused_by_the_api_alone() {
    let docker = json!({"DockerContainerID": "x", "Args": ["y"], "Interval": "1s"});
    let definition = service(&json!({"Name": "web", "Port": 80, "Check": docker}));
    let settings = CheckSettings { docker_socket: "/nonexistent/docker.sock".into(), ..CheckSettings::default() };
    let config = ConfigDefinitions { scripts: ScriptPolicy::All, settings: Some(settings), ..files(Vec::new()) };
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    rig.handle.replace_config(config.clone()).await.unwrap();
    let error = rig.handle.register_service(definition.clone(), false).await.unwrap_err().to_string();
    assert!(error.starts_with("Invalid check: docker checks need the Docker Engine"), "{error}");
    // The engine may start after the agent.
    rig.handle.replace_config(ConfigDefinitions { services: vec![definition], ..config }).await.unwrap();
    assert_eq!(rig.handle.state().checks.len(), 1);
    rig.stop().await;
}

#[tokio::test]
async fn checks_that_do_not_fit_into_the_nodes_records_are_told_as_one() {
    let checks: Vec<_> =
        (0..1500).map(|at| json!({"CheckID": format!("web:{at}"), "TTL": "1h", "Status": "passing"})).collect();
    let web = |checks: &[serde_json::Value], id: &str| {
        let mut value = json!({"ID": id, "Name": "web", "Port": 80, "Checks": checks});
        for check in value["Checks"].as_array_mut().unwrap() {
            check["CheckID"] = json!(format!("{id}{}", check["CheckID"].as_str().unwrap()));
        }
        service(&value)
    };
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    for part in checks.chunks(500).enumerate() {
        rig.handle.register_service(web(part.1, &format!("web-{}", part.0)), false).await.unwrap();
    }
    let records = rig.publication.borrow().records.clone();
    assert_eq!((rig.handle.state().checks.len(), records.len()), (1500, 6));
    let sum = |rig: &Rig| match &rig.publication.borrow().records[&EntryKey::Check("checks:web-1".parse().unwrap())] {
        Entry::Check(record) => (record.name.clone(), record.status),
        _ => panic!("a check"),
    };
    assert_eq!(sum(&rig), ("500 checks".into(), HealthStatus::Passing));
    let one: CheckId = "web-1web:700".parse().unwrap();
    rig.handle.update_ttl(one.clone(), HealthStatus::Warning, String::new()).await.unwrap();
    assert_eq!(sum(&rig).1, HealthStatus::Warning);
    rig.handle.update_ttl(one, HealthStatus::Passing, String::new()).await.unwrap();
    assert_eq!(sum(&rig).1, HealthStatus::Passing);
    rig.handle.deregister_service(id("web-0")).await.unwrap();
    rig.handle.deregister_service(id("web-2")).await.unwrap();
    assert_eq!(rig.publication.borrow().records.len(), 501, "each by itself where there is room");
    rig.stop().await;
}

#[tokio::test]
async fn nodes_without_an_agent_are_published_shown_and_outlive_a_restart() {
    use super::external::tests::{check, write};
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let rig = Rig::start(&store).await;
    let checks = vec![check("up", None, HealthStatus::Passing)];
    rig.handle.register_external(ExternalWrite { checks, ..write("h1", "192.0.2.1", Some("db")) }).await.unwrap();
    rig.handle.register_external(write("h2", "192.0.2.2", Some("db"))).await.unwrap();
    let key = |name: &str| EntryKey::External(name.parse().unwrap());
    let published = rig.publication.borrow().records[&key("h1")].clone();
    let Entry::External(record) = &published else { panic!("{published:?}") };
    assert_eq!((record.services.len(), record.checks.len()), (1, 1));
    assert_eq!(rig.handle.state().externals["h1"].notes["up"].output, "up says so");
    rig.handle.deregister_external("h2".parse().unwrap(), ExternalPart::Node).await.unwrap();
    assert!(!rig.publication.borrow().records.contains_key(&key("h2")));
    rig.handle.deregister_external("nobody".parse().unwrap(), ExternalPart::Node).await.unwrap();
    rig.stop().await;

    let rig = Rig::start(&store).await;
    assert_eq!(rig.publication.borrow().records[&key("h1")], published);
    assert_eq!(rig.handle.state().externals.keys().map(NodeName::as_str).collect::<Vec<_>>(), ["h1"]);
    rig.stop().await;

    // A narrower certificate leaves the service out; the node stays.
    let rig = Rig::try_start(&store, "web", ConfigDefinitions::default()).await.unwrap();
    assert_eq!(rig.handle.state().externals["h1"].record.services.len(), 0);
    let refused = rig.handle.register_external(write("h3", "192.0.2.3", Some("db"))).await.unwrap_err();
    assert!(matches!(refused, RegistryError::OutOfScope { .. }), "{refused}");
    assert!(!rig.handle.state().externals.contains_key("h3"));
    rig.stop().await;
}

#[tokio::test]
async fn nodes_without_an_agent_share_the_records_room_and_leave_services_the_most_of_it() {
    use super::external::tests::write;
    let rig = Rig::start(&Store::in_memory().unwrap()).await;
    let with_meta = |at: usize| {
        let mut write = write(&format!("h{at}"), "192.0.2.1", None);
        write.facts.as_mut().unwrap().meta.insert("k".to_owned(), "x".repeat(500));
        write
    };
    let mut taken = 0;
    let refused = loop {
        match rig.handle.register_external(with_meta(taken)).await {
            Ok(()) => taken += 1,
            Err(refused) => break refused.to_string(),
        }
    };
    assert!((30..60).contains(&taken), "{taken}");
    assert!(refused.contains(&format!("at most {EXTERNAL_BYTES_MAX}")), "{refused}");
    assert_eq!(rig.handle.state().externals.len(), taken, "what is refused changes nothing");
    let large = |at: usize| {
        service(&json!({"Name": format!("s{at}"), "Port": 1, "Meta": {"k": "y".repeat(512), "l": "y".repeat(512)}}))
    };
    let mut services = 0;
    let refused = loop {
        match rig.handle.register_service(large(services), false).await {
            Ok(()) => services += 1,
            Err(refused) => break refused.to_string(),
        }
    };
    assert!((30..40).contains(&services), "{services} fit into what is left");
    assert!(refused.contains("of nodes without an agent"), "{refused}");
    for at in 0..taken {
        rig.handle.deregister_external(format!("h{at}").parse().unwrap(), ExternalPart::Node).await.unwrap();
    }
    rig.handle.register_service(large(services), false).await.unwrap();
    rig.stop().await;
}
