//! Watches a service with rs-consul and prints each state that it sees: `<queries so far> <instances>`, the passing ones as
//! `id@address:port` in order. Usage: `rs_consul_client http://ADDR SERVICE`; runs until it is ended.

use rs_consul::types::{GetNodesRequest, GetServiceNodesRequest, QueryOptions};
use rs_consul::{Config, Consul};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [address, service] = words.as_slice() else { panic!("usage: rs_consul_client http://ADDR SERVICE") };
    let mut config = Config::from_env();
    config.address.clone_from(address);
    config.token = None;
    let consul = Consul::new(config);

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
        let options =
            QueryOptions { index, wait: Some(wait), timeout: Some(wait * 2), ..QueryOptions::default() };
        let answer = consul.get_service_nodes(request, Some(options)).await.expect("a blocking query");
        queries += 1;
        index = Some(answer.index);
        let mut seen: Vec<String> = answer
            .response
            .into_iter()
            .map(|one| format!("{}@{}:{}", one.service.id, one.service.address, one.service.port))
            .collect();
        seen.sort();
        println!("{queries} {}", seen.join(" "));
    }
}
