//! What rs-consul does against an agent. Usage, always with `http://ADDR SERVICE` first:
//! - nothing more: watches the service and prints each state that it sees: `<queries so far> <instances>`, the passing ones as
//!   `id@address:port` in order; runs until it is ended;
//! - `write NODE ADDRESS PORT STATUS`: registers an instance on a node of its own, with a check in that status;
//! - `remove NODE`: deregisters the node with what is on it.

use std::collections::HashMap;

use rs_consul::types::{
    DeregisterEntityPayload, GetNodesRequest, GetServiceNodesRequest, QueryOptions, RegisterEntityCheck,
    RegisterEntityPayload, RegisterEntityService,
};
use rs_consul::{Config, Consul};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let [address, service, what @ ..] = words.as_slice() else {
        panic!("usage: rs_consul_client http://ADDR SERVICE …")
    };
    let mut config = Config::from_env();
    config.address = (*address).to_owned();
    config.token = None;
    let consul = Consul::new(config);
    match what {
        [] => watch(&consul, service).await,
        ["write", node, address, port, status] => {
            let payload = instance(service, node, address, port.parse().expect("a port"), status);
            consul.register_entity(&payload).await.expect("a registration");
        }
        ["remove", node] => {
            let payload = DeregisterEntityPayload {
                Node: Some((*node).to_owned()),
                Datacenter: None,
                CheckID: None,
                ServiceID: None,
                Namespace: None,
            };
            consul.deregister_entity(&payload).await.expect("a deregistration");
        }
        other => panic!("unknown words: {other:?}"),
    }
}

fn instance(service: &str, node: &str, address: &str, port: u16, status: &str) -> RegisterEntityPayload {
    let id = format!("{service}-1");
    RegisterEntityPayload {
        ID: None,
        Node: node.to_owned(),
        Address: address.to_owned(),
        Datacenter: None,
        TaggedAddresses: HashMap::new(),
        NodeMeta: HashMap::from([("external-node".to_owned(), "true".to_owned())]),
        Service: Some(RegisterEntityService {
            ID: Some(id.clone()),
            Service: service.to_owned(),
            Tags: vec!["rs".to_owned()],
            TaggedAddresses: HashMap::new(),
            Meta: HashMap::new(),
            Port: Some(port),
            Namespace: None,
        }),
        Checks: vec![RegisterEntityCheck {
            Node: None,
            CheckID: Some(format!("{service}-up")),
            Name: "is up".to_owned(),
            Notes: None,
            Status: Some(status.to_owned()),
            ServiceID: Some(id),
            Definition: HashMap::new(),
        }],
        SkipNodeUpdate: None,
    }
}

async fn watch(consul: &Consul, service: &str) {
    let nodes = consul.get_nodes(GetNodesRequest::default(), None).await.expect("nodes");
    println!("nodes {}", nodes.response.len());
    // Without `passing` the critical ones are shown too; rs-consul sends `passing=false`.
    let all = GetServiceNodesRequest { service, passing: false, ..Default::default() };
    println!("all {}", consul.get_service_nodes(all, None).await.expect("all instances").response.len());

    let mut index = None;
    let mut queries = 0;
    loop {
        let request = GetServiceNodesRequest { service, passing: true, ..Default::default() };
        let wait = std::time::Duration::from_secs(20);
        let options = QueryOptions { index, wait: Some(wait), timeout: Some(wait * 2), ..QueryOptions::default() };
        let answer = consul.get_service_nodes(request, Some(options)).await.expect("a blocking query");
        queries += 1;
        index = Some(answer.index);
        let mut seen: Vec<String> = answer
            .response
            .into_iter()
            .map(|one| {
                let own = one.service.address;
                let address = if own.is_empty() { one.node.address } else { own };
                format!("{}@{address}:{}", one.service.id, one.service.port)
            })
            .collect();
        seen.sort();
        println!("{queries} {}", seen.join(" "));
    }
}
