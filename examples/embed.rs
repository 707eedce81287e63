//! An agent inside another program: start it, register a service, read the catalogue, call through the mesh, stop.
//!
//! `cargo run --example embed`. The agent runs on a loopback address of its own, with a CA and a store in memory; a
//! real one takes its `Config` from `weft::config::load`, which checks files and settings and reports every problem.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use weft::config::Config;
use weft::node::Node;
use weft::registry::definition::{DefinitionDefaults, service_from_json};

/// Any address of 127.0.0.0/8 is this host: nothing else has these ports here.
const IP: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 77, 0, 1));
/// Where the caller reaches `hello`.
const UPSTREAM: SocketAddr = SocketAddr::new(IP, 9191);

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let node = Node::start(Config::dev("embedded".parse()?, IP)).await?;
    println!("agent {} is up; its API listens on {:?}", node.name(), node.api());

    // One future runs the node to its end; dropping it half-way would leave the agent running.
    let stopped = node.run_until_stopped();
    tokio::pin!(stopped);
    let used = tokio::select! {
        ended = &mut stopped => return Ok(ended?),
        used = use_the_mesh(&node) => used,
    };
    node.shutdown();
    stopped.await?;
    println!("agent has stopped");
    used
}

async fn use_the_mesh(node: &Node) -> Result<(), Failure> {
    // The app: it greets whoever connects.
    let app = TcpListener::bind(SocketAddr::new(IP, 0)).await?;
    let app_addr = app.local_addr()?;
    let greet = async move {
        let (mut caller, _) = app.accept().await?;
        caller.write_all(b"hello from behind the mesh").await?;
        Ok::<(), Failure>(())
    };

    // The same shapes as in Consul's API and files.
    let defaults = DefinitionDefaults { bind_ip: IP, datacenter: "dc1" };
    let hello = json!({"Name": "hello", "Address": IP.to_string(), "Port": app_addr.port()});
    let caller = json!({"Name": "caller", "Port": 1, "Proxy": {"Upstreams": [
        {"DestinationName": "hello", "LocalBindPort": UPSTREAM.port()}]}});
    let mut snapshots = node.snapshot().subscribe();
    for definition in [hello, caller] {
        node.registry().register_service(service_from_json(&definition, &defaults)?, false).await?;
    }

    // What is registered is in the catalogue a moment later: wait for it, with a limit.
    let seen = snapshots.wait_for(|snapshot| snapshot.services.len() == 2);
    let snapshot = tokio::time::timeout(Duration::from_secs(5), seen).await??.clone();
    for service in snapshot.services.values() {
        for instance in &service.instances {
            println!("{} on {}: {}", service.name, instance.node.info.name, instance.status);
        }
    }

    let call = async {
        let mut greeting = String::new();
        connect(UPSTREAM).await?.read_to_string(&mut greeting).await?;
        Ok(greeting)
    };
    let ((), greeting) = tokio::try_join!(greet, call)?;
    println!("{UPSTREAM} says: {greeting}");
    Ok(())
}

/// Connects to a port that opens a moment after its registration.
async fn connect(addr: SocketAddr) -> Result<TcpStream, Failure> {
    let until_open = async {
        loop {
            match TcpStream::connect(addr).await {
                Ok(stream) => return stream,
                Err(_closed_yet) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    Ok(tokio::time::timeout(Duration::from_secs(5), until_open).await?)
}
