//! `weft agent`: flags to a config, the control runtime, signals, systemd.

use std::sync::Arc;

use anyhow::Context as _;
use sd_notify::NotifyState;
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info};
use weft::config::{Config, Host, Inputs, Mode, Setting, load};
use weft::node::Node;
use weft::telemetry::{self, Chain};

use crate::cli::AgentArgs;
use crate::failure::Failure;
use crate::status::{self, notify};

/// What a shell reports for a process that an interrupt ended.
const EXIT_SECOND_SIGNAL: i32 = 130;

/// Runs an agent until a signal, `weft leave`, or a failure.
pub(crate) fn run(args: &AgentArgs) -> Result<(), Failure> {
    let inputs = inputs(args);
    let config = load(&inputs, &Host::read())?;
    telemetry::init(&config.log_filter, config.log_format)?;
    // Gossip and joins, on this thread; the API, DNS and the data plane have threads of their own (`node`).
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the control runtime")?;
    runtime.block_on(async {
        let _alarms = weft::alarm::install().context("cannot make the timer of the control runtime")?;
        Box::pin(serve(config, inputs)).await
    })
}

async fn serve(config: Config, inputs: Inputs) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    notify(&[NotifyState::Status(&status::of_start(&config))]);
    // A newcomer may wait here for its issuer, for as long as it takes: a signal ends the wait.
    let node = tokio::select! {
        started = Box::pin(Node::start_reloadable(config, Arc::new(move || load(&inputs, &Host::read())))) => started.context("cannot start the agent")?,
        () = first_of(&mut terminate, &mut interrupt) => {
            info!("stopped before the agent was up");
            return Ok(());
        }
    };
    let status = status::of(&node.gossip().members());
    notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
    let telling = status::follow(node.gossip().subscribe(), status);
    let stopped = node.run_until_stopped();
    tokio::pin!(stopped, telling);
    loop {
        tokio::select! {
            ended = &mut stopped => return Ok(ended?),
            () = first_of(&mut terminate, &mut interrupt) => break,
            never = &mut telling => match never {},
            _signal = hangup.recv() => {
                // A reload may wait for the disk: a stop does not wait for it.
                tokio::select! {
                    reloaded = node.reload() => if let Err(err) = reloaded {
                        error!(error = %Chain(&err), "configuration is not reloaded");
                    },
                    ended = &mut stopped => return Ok(ended?),
                    () = first_of(&mut terminate, &mut interrupt) => break,
                }
            }
        }
    }
    info!("stopping; a second signal ends the agent at once");
    notify(&[NotifyState::Stopping, NotifyState::Status("draining")]);
    node.shutdown();
    tokio::select! {
        ended = &mut stopped => Ok(ended?),
        () = first_of(&mut terminate, &mut interrupt) => std::process::exit(EXIT_SECOND_SIGNAL),
    }
}

async fn first_of(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _signal = terminate.recv() => {}
        _signal = interrupt.recv() => {}
    }
}

/// Turns flags into settings: the same keys, the same rules as in files.
fn inputs(args: &AgentArgs) -> Inputs {
    let texts = [
        ("-node", "node_name", &args.node),
        ("-datacenter", "datacenter", &args.datacenter),
        ("-data-dir", "data_dir", &args.data_dir),
        ("-bind", "bind_addr", &args.bind),
        ("-advertise", "advertise_addr", &args.advertise),
        ("-client", "client_addr", &args.client),
        ("-token", "token", &args.token),
        ("-token-file", "token_file", &args.token_file),
        ("-issuer", "issuer", &args.issuer),
        ("-serve", "serve", &args.serve),
        ("-trust-domain", "trust_domain", &args.trust_domain),
        ("-admin-token-file", "admin_token_file", &args.admin_token_file),
        ("-default-intention-policy", "default_intention_policy", &args.default_intention_policy),
        ("-policy-authority", "policy_authority", &args.policy_authority),
        ("-drain-timeout", "drain_timeout", &args.drain_timeout),
        ("-log-level", "log_level", &args.log_level),
        ("-domain", "domain", &args.domain),
        ("-alt-domain", "alt_domain", &args.alt_domain),
        ("-workload-socket", "workload_api.socket", &args.workload_socket),
        ("-workload-group", "workload_api.group", &args.workload_group),
        ("-otlp-endpoint", "telemetry.otlp.endpoint", &args.otlp_endpoint),
    ];
    let ports = [
        ("-mesh-port", "ports.mesh", args.mesh_port),
        ("-shared-http-port", "ports.shared_http", args.shared_http_port),
    ];
    let setting = |flag, key, value: Value| Setting { flag, key, value };
    let mut settings = Vec::new();
    settings.extend(texts.into_iter().filter_map(|(flag, key, text)| Some(setting(flag, key, json!(text.as_ref()?)))));
    settings.extend(ports.into_iter().filter_map(|(flag, key, port)| Some(setting(flag, key, json!(port?)))));
    settings.extend(args.join.iter().map(|addr| setting("-join", "retry_join", json!(addr))));
    let may_be_off = [
        ("-http-port", "ports.http", args.http_port),
        ("-dns-port", "ports.dns", args.dns_port),
        ("-https-port", "ports.https", args.https_port),
    ];
    settings.extend(may_be_off.into_iter().filter_map(|(flag, key, port)| Some(setting(flag, key, json!(port?)))));
    settings.extend(args.node_meta.iter().map(|pair| {
        let (key, value) = pair.split_once(':').unwrap_or((pair, ""));
        setting("-node-meta", "node_meta", json!({ key: value }))
    }));
    settings.extend(args.recursor.iter().map(|addr| setting("-recursor", "recursors", json!(addr))));
    settings.extend(args.workers.map(|count| setting("-workers", "workers", json!(count))));
    let switches = [
        (args.enable_script_checks, "-enable-script-checks", "enable_script_checks"),
        (args.enable_local_script_checks, "-enable-local-script-checks", "enable_local_script_checks"),
    ];
    settings.extend(switches.into_iter().filter(|(on, ..)| *on).map(|(_, flag, key)| setting(flag, key, json!(true))));
    if args.log_json {
        settings.push(setting("-log-json", "log_json", json!(true)));
    }
    let paths = args.config_file.iter().chain(&args.config_dir).cloned().collect();
    Inputs { mode: if args.dev { Mode::Dev } else { Mode::Durable }, paths, settings }
}
