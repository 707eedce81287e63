//! `weft demo`: three agents on loopback, two echo instances, requests through the mesh, a fail-over.
//!
//! Everything is real: a fresh mesh CA on disk, tokens, joins, the HTTP API, QUIC with mutual TLS.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weft::clock;
use weft::config::{Config, Host, Inputs, Mode, Setting, load};
use weft::model::SpiffeId;
use weft::node::Node;
use weft::pki::{self, CaDir, TokenClaims};
use weft::telemetry;

use crate::cli::DemoArgs;
use crate::failure::Failure;

/// Connections that the demo calls over at once.
const CALLERS: usize = 8;
/// Requests of the first round, over all connections.
const REQUESTS: usize = 4_000;
/// Requests sent while one instance ends.
const FAILOVER_REQUESTS: usize = 2_000;
/// How long each step of the set-up may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// An echo server that says its name: the demo's service.
struct Echo {
    name: &'static str,
    addr: SocketAddr,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl Echo {
    async fn start(name: &'static str, ip: Ipv4Addr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((ip, 0)).await.context("cannot bind the echo server")?;
        let addr = listener.local_addr()?;
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        #[expect(clippy::disallowed_methods, reason = "joined in `Echo::end`")]
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    () = stopping.cancelled() => return,
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => {
                            connections.spawn(serve_echo(stream, name));
                        }
                        Err(_) => return,
                    },
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { name, addr, stop, serving })
    }

    /// Ends the instance: the port closes and its connections with it.
    async fn end(self) {
        self.stop.cancel();
        let _ended = self.serving.await;
    }
}

async fn serve_echo(stream: TcpStream, name: &'static str) {
    let answer = service_fn(move |request: Request<hyper::body::Incoming>| async move {
        let caller = request.headers().get("x-forwarded-client-cert").and_then(|v| v.to_str().ok()).unwrap_or("-");
        let head = format!("{name} {} {} from {caller}\n", request.method(), request.uri().path());
        let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let bytes = [head.as_bytes(), &body].concat();
        let response = Response::builder().header("x-instance", name).body(Full::new(Bytes::from(bytes)));
        Ok::<_, Infallible>(response.unwrap_or_default())
    });
    // A caller that goes away in mid-request is no event for an echo server.
    let _ended = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
}

/// What a round of requests saw.
#[derive(Default)]
struct Round {
    latencies: Vec<Duration>,
    by_instance: BTreeMap<String, usize>,
    failed: usize,
    last_failure: Option<String>,
}

impl Round {
    fn add(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        for (name, count) in other.by_instance {
            *self.by_instance.entry(name).or_default() += count;
        }
        self.failed += other.failed;
        self.last_failure = other.last_failure.or(self.last_failure.take());
    }

    /// The latency below which `share` of the requests lie.
    fn quantile(&mut self, share: f64) -> Duration {
        self.latencies.sort_unstable();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index below the length"
        )]
        let at = ((self.latencies.len() as f64) * share) as usize;
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get(at.min(last)).copied().unwrap_or_default()
    }
}

/// Sends `requests` over [`CALLERS`] keep-alive connections to `upstream`.
async fn round(upstream: SocketAddr, requests: usize) -> Round {
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        callers.spawn(call(upstream, requests / CALLERS));
    }
    let mut total = Round::default();
    while let Some(ended) = callers.join_next().await {
        if let Ok(one) = ended {
            total.add(one);
        }
    }
    total
}

#[expect(clippy::disallowed_methods, reason = "measures real latencies")]
async fn call(upstream: SocketAddr, requests: usize) -> Round {
    let mut seen = Round::default();
    let mut sender = None;
    let mut driver = JoinSet::new();
    for _ in 0..requests {
        let begun = Instant::now();
        match call_once(upstream, &mut sender, &mut driver).await {
            Ok(instance) => {
                seen.latencies.push(begun.elapsed());
                *seen.by_instance.entry(instance).or_default() += 1;
            }
            Err(why) => {
                sender = None;
                seen.failed += 1;
                seen.last_failure = Some(format!("{why:#}"));
            }
        }
    }
    seen
}

type Sender = hyper::client::conn::http1::SendRequest<Full<Bytes>>;

async fn call_once(
    upstream: SocketAddr,
    sender: &mut Option<Sender>,
    driver: &mut JoinSet<()>,
) -> anyhow::Result<String> {
    if sender.as_ref().is_none_or(Sender::is_closed) {
        let stream = TcpStream::connect(upstream).await?;
        stream.set_nodelay(true)?;
        let (fresh, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        driver.spawn(async move {
            let _closed = connection.await;
        });
        *sender = Some(fresh);
    }
    let Some(ready) = sender.as_mut() else { bail!("no connection") };
    let request = Request::get("/hello").header("host", "echo.weft").body(Full::default())?;
    ready.ready().await?;
    let response = ready.send_request(request).await?;
    let status = response.status();
    let instance = response.headers().get("x-instance").and_then(|v| v.to_str().ok()).unwrap_or("?").to_owned();
    let body = response.into_body().collect().await?.to_bytes();
    ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
    Ok(instance)
}

/// One agent of the demo, running.
struct Member {
    node: Arc<Node>,
    api: SocketAddr,
    running: tokio::task::JoinHandle<()>,
}

impl Member {
    /// Starts an agent by the settings that its flags would give.
    async fn start(name: &str, ip: Ipv4Addr, dir: &Path, more: Vec<Setting>) -> anyhow::Result<Self> {
        let node =
            Node::start(config(name, ip, dir, more)?).await.with_context(|| format!("cannot start agent {name}"))?;
        let node = Arc::new(node);
        let api = *node.api().first().context("the agent has no API")?;
        let running = Arc::clone(&node);
        #[expect(clippy::disallowed_methods, reason = "joined in `Member::end`")]
        let running = tokio::spawn(async move {
            if let Err(err) = running.run_until_stopped().await {
                eprintln!("error: {}", telemetry::Chain(&err));
            }
        });
        Ok(Self { node, api, running })
    }

    async fn end(self) {
        self.node.shutdown();
        let _ended = self.running.await;
    }
}

fn config(name: &str, ip: Ipv4Addr, dir: &Path, more: Vec<Setting>) -> anyhow::Result<Config> {
    let setting = |flag, key, value: String| Setting { flag, key, value: value.into() };
    let mut settings = vec![
        setting("-node", "node_name", name.to_owned()),
        setting("-bind", "bind_addr", ip.to_string()),
        setting("-client", "client_addr", ip.to_string()),
        setting("-data-dir", "data_dir", dir.join(name).display().to_string()),
        // The demo is about calls that pass.
        setting("-default-intention-policy", "default_intention_policy", "allow".to_owned()),
        // The demo's agents share one process and end with it.
        setting("-drain-timeout", "drain_timeout", "1s".to_owned()),
    ];
    settings.extend(more);
    Ok(load(&Inputs { mode: Mode::Durable, paths: Vec::new(), settings }, &Host::read())?)
}

/// Runs `weft demo`.
pub(crate) fn run(args: &DemoArgs) -> Result<(), Failure> {
    telemetry::init(&"error".parse().map_err(|err| anyhow::anyhow!("{err}"))?, telemetry::LogFormat::Text)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("weft-demo")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime
        .block_on(Box::pin(demo(args)))
        .map_err(|err| Failure::from(err).hint("addresses of another demo or agent in use? try -subnet 127.9.9"))
}

async fn demo(args: &DemoArgs) -> anyhow::Result<()> {
    let first = |last: u8| format!("{}.{last}", args.subnet).parse::<Ipv4Addr>().ok().filter(Ipv4Addr::is_loopback);
    let (Some(a), Some(b), Some(c)) = (first(1), first(2), first(3)) else {
        bail!("-subnet {} is not three numbers of a loopback address, such as 127.0.0", args.subnet);
    };
    let ips = [a, b, c];
    let dir = WorkDir::new()?;
    println!("weft demo: three agents in this process, data in {}", dir.0.display());
    let ca = CaDir::init(&dir.0.join("ca"), &"demo.weft".parse()?, clock::wall())?;
    let issuer = ca.path().join("issuer-1").display().to_string();
    let one =
        Member::start("host-1", a, &dir.0, vec![Setting { flag: "-issuer", key: "issuer", value: issuer.into() }])
            .await?;
    println!("  host-1 at {a} made its own certificate: it is the issuer");
    let two = Member::start("host-2", b, &dir.0, joining(ca.path(), "host-2", "echo", a)?).await?;
    println!("  host-2 at {b} joined through {a} with a token for the service echo");
    let three = Member::start("host-3", c, &dir.0, joining(ca.path(), "host-3", "caller", a)?).await?;
    println!("  host-3 at {c} joined through {a} with a token for the service caller");
    let echoes = [Echo::start("echo-1", a).await?, Echo::start("echo-2", b).await?];
    let shown = show(&one, &two, &three, echoes, ips, args).await;
    for member in [three, two, one] {
        member.end().await;
    }
    shown
}

/// The settings of an agent that joins through `seed` with a fresh token.
fn joining(ca: &Path, node: &str, serve: &str, seed: Ipv4Addr) -> anyhow::Result<Vec<Setting>> {
    let claims = TokenClaims {
        id: *uuid::Uuid::new_v4().as_bytes(),
        node: node.parse()?,
        serve: serve.parse()?,
        not_after: clock::wall().plus(Duration::from_mins(10)),
        uses: 1,
    };
    let token = pki::create_token(ca, &claims)?.to_string();
    Ok(vec![
        Setting { flag: "-join", key: "retry_join", value: seed.to_string().into() },
        Setting { flag: "-token", key: "token", value: token.into() },
    ])
}

/// A directory for the demo's CA and data; removed at the end.
struct WorkDir(std::path::PathBuf);

impl WorkDir {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("weft-demo-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(err) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} stays: {err}", self.0.display());
        }
    }
}

async fn show(
    one: &Member,
    two: &Member,
    three: &Member,
    echoes: [Echo; 2],
    ips: [Ipv4Addr; 3],
    args: &DemoArgs,
) -> anyhow::Result<()> {
    let [first, second] = echoes;
    register(one, &echo_service(&first)).await?;
    register(two, &echo_service(&second)).await?;
    let upstream = SocketAddr::from((ips[2], 9191));
    show_spread(three, &caller_service(upstream), one).await?;
    wait_until("both instances pass", || passing(three, 2)).await?;
    wait_until("the upstream port answers", || reachable(upstream)).await?;
    show_catalogue(three).await?;

    println!("\n{REQUESTS} requests through {upstream} (HTTP/1.1, {CALLERS} connections):");
    let mut seen = round(upstream, REQUESTS).await;
    print_round(&mut seen);
    ensure!(seen.failed == 0, "{} requests failed; the last: {}", seen.failed, seen.last_failure.unwrap_or_default());
    ensure!(seen.by_instance.len() == 2, "only {:?} answered", seen.by_instance.keys());
    show_identity(three)?;

    println!("\n{} ends while {FAILOVER_REQUESTS} more requests run:", first.name);
    let (mut seen, ()) = tokio::join!(round(upstream, FAILOVER_REQUESTS), first.end());
    print_round(&mut seen);
    ensure!(seen.by_instance.contains_key("echo-2"), "echo-2 never answered");
    wait_until("only echo-2 passes", || passing(three, 1)).await?;
    let mut after = round(upstream, FAILOVER_REQUESTS).await;
    println!("  and once the check has noticed:");
    print_round(&mut after);
    ensure!(
        after.failed == 0,
        "{} requests failed; the last: {}",
        after.failed,
        after.last_failure.unwrap_or_default()
    );

    if args.once {
        second.end().await;
        return Ok(());
    }
    println!("\nThe three agents keep running until Ctrl-C. Try, in another terminal:");
    println!("  curl http://{upstream}/hello");
    println!("  weft members -http-addr={}", three.api);
    println!("  weft catalog services -http-addr={}", three.api);
    println!("  weft info -http-addr={}", three.api);
    println!("  curl 'http://{}/v1/health/service/echo?passing'", three.api);
    println!("  curl 'http://{}/v1/agent/metrics?format=prometheus'", three.api);
    tokio::signal::ctrl_c().await?;
    second.end().await;
    Ok(())
}

fn echo_service(echo: &Echo) -> serde_json::Value {
    let addr = echo.addr;
    serde_json::json!({
        "ID": echo.name, "Name": "echo", "Address": addr.ip().to_string(), "Port": addr.port(), "Protocol": "http",
        "Check": {"HTTP": format!("http://{addr}/health"), "Interval": "1s", "Timeout": "1s"},
    })
}

fn caller_service(upstream: SocketAddr) -> serde_json::Value {
    serde_json::json!({
        "Name": "caller", "Port": 1,
        "Connect": {"SidecarService": {"Proxy": {"Upstreams": [{
            "DestinationName": "echo", "LocalBindAddress": upstream.ip().to_string(), "LocalBindPort": upstream.port(),
        }]}}},
    })
}

fn print_round(seen: &mut Round) {
    let (p50, p99) = (seen.quantile(0.5), seen.quantile(0.99));
    let done = seen.latencies.len();
    println!("  {done} answered, {} failed, p50 {:.3} ms, p99 {:.3} ms", seen.failed, millis(p50), millis(p99));
    for (instance, count) in &seen.by_instance {
        println!("  {instance} answered {count}");
    }
    if let Some(why) = &seen.last_failure {
        println!("  last failure: {why}");
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

async fn show_catalogue(from: &Member) -> anyhow::Result<()> {
    println!("\nMembers, as the third agent sees them:");
    for member in as_array(&api(from, "GET", "/v1/agent/members", None).await?) {
        let status = match member["Status"].as_u64() {
            Some(1) => "alive",
            Some(2) => "leaving",
            Some(3) => "left",
            _ => "failed",
        };
        println!("  {:<8} {}:{} {status}", text(&member["Name"]), text(&member["Addr"]), member["Port"]);
    }
    println!("Instances of echo:");
    for entry in as_array(&api(from, "GET", "/v1/health/service/echo?passing", None).await?) {
        let (node, service) = (&entry["Node"], &entry["Service"]);
        println!(
            "  {:<8} on {:<8} {}:{}",
            text(&service["ID"]),
            text(&node["Node"]),
            text(&service["Address"]),
            service["Port"]
        );
    }
    Ok(())
}

/// Tells who answers at the other end of the tunnels, from the chain that each node proved in TLS.
fn show_identity(from: &Member) -> anyhow::Result<()> {
    let tunnels = from.node.tunnels();
    ensure!(!tunnels.is_empty(), "no tunnel is open");
    println!("\nWho is at the other end (TLS 1.3 over QUIC, both sides verified):");
    for tunnel in tunnels {
        let trust_domain = from.node.identity().authority().bundle().trust_domain.clone();
        let source = match tunnel.source {
            Some(service) => SpiffeId::Service { trust_domain, service, node: from.node.name().clone() },
            None => SpiffeId::Node { trust_domain, node: from.node.name().clone() },
        };
        println!("  {source} -> {} at {}", tunnel.peer, tunnel.addr);
        println!(
            "    may serve `{}`; its chain ends in {} min",
            tunnel.scope,
            tunnel.not_after.since(clock::wall()).as_secs() / 60
        );
    }
    Ok(())
}

/// Registers `service` at one agent and tells how long it takes to stand in another's catalogue.
#[expect(clippy::disallowed_methods, reason = "measures real time")]
async fn show_spread(at: &Member, service: &serde_json::Value, elsewhere: &Member) -> anyhow::Result<()> {
    let begun = Instant::now();
    register(at, service).await?;
    let is_known = async || -> anyhow::Result<bool> {
        let known = api(elsewhere, "GET", "/v1/catalog/services", None).await?;
        Ok(known.get("caller").is_some())
    };
    while !is_known().await? {
        ensure!(begun.elapsed() < PATIENCE, "the registration never reached host-1");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    println!(
        "  a registration at host-3 was on disk there and in host-1's catalogue after {:.1} ms",
        millis(begun.elapsed())
    );
    Ok(())
}

async fn register(at: &Member, service: &serde_json::Value) -> anyhow::Result<()> {
    api(at, "PUT", "/v1/agent/service/register", Some(service)).await.map(drop)
}

async fn passing(at: &Member, want: usize) -> anyhow::Result<bool> {
    Ok(as_array(&api(at, "GET", "/v1/health/service/echo?passing", None).await?).len() == want)
}

async fn reachable(upstream: SocketAddr) -> anyhow::Result<bool> {
    Ok(TcpStream::connect(upstream).await.is_ok())
}

/// Asks `ready` until it says yes.
async fn wait_until<F: Future<Output = anyhow::Result<bool>>>(
    what: &str,
    mut ready: impl FnMut() -> F,
) -> anyhow::Result<()> {
    let asking = async {
        while !ready().await? {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, asking).await.with_context(|| format!("after {PATIENCE:?} still not: {what}"))?
}

fn as_array(value: &serde_json::Value) -> &[serde_json::Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().unwrap_or("?")
}

/// One call of an agent's HTTP API; the body of a 200 as JSON, null where it is empty.
async fn api(
    at: &Member,
    method: &str,
    path: &str,
    body: Option<&serde_json::Value>,
) -> anyhow::Result<serde_json::Value> {
    let stream = TcpStream::connect(at.api).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        let _closed = connection.await;
    });
    let bytes = body.map(ToString::to_string).unwrap_or_default();
    let request = Request::builder().method(method).uri(path).header("host", at.api.to_string());
    let response = sender.send_request(request.body(Full::new(Bytes::from(bytes)))?).await?;
    let status = response.status();
    let bytes = response.into_body().collect().await?.to_bytes();
    ensure!(status.is_success(), "{method} {path}: {status} {}", String::from_utf8_lossy(&bytes));
    if bytes.is_empty() {
        return Ok(serde_json::Value::Null);
    }
    serde_json::from_slice(&bytes).with_context(|| format!("{method} {path}: no JSON"))
}
