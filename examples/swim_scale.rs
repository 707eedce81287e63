//! Meshes of thousands of agents in one process, in virtual time: how fast news travels and what it costs.
//!
//! ```text
//! cargo run --release --example swim_scale -- --nodes 1000 --svg plot.svg
//! cargo run --release --example swim_scale -- --nodes 50 --seeds 20 --loss 0.1
//! cargo run --release --example swim_scale -- --scenario lives --nodes 12 --seeds 1000
//! cargo run --release --example swim_scale -- --scenario crowd --nodes 100 --seeds 5
//! cargo run --release --example swim_scale -- --figures
//! ```
//!
//! The engine is the one that ships (`weft::gossip::engine`); connections, streams, disks and clocks are simulated
//! (tests/sim). A failure prints its seed, and `--seed` repeats it alone.

#![allow(clippy::cast_precision_loss, reason = "figures for people")]

#[path = "../tests/sim/mod.rs"]
mod sim;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use sim::processor::Machine;
use sim::stats::{self, Times, show};
use sim::world::{Settings, World};
use sim::{figures, scenarios, script, svg};

/// As the agent's: a simulation is mostly small packets made and dropped.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Kills and registrations in a mesh that exists at once; the replicas stay small.
    Scale,
    /// The same in a mesh that joins and replicates everything.
    Full,
    /// A minute of random faults and churn, then quiet, then everything must hold.
    Lives,
    /// A start of all agents at once on one machine that is too small for them.
    Crowd,
}

/// Simulates meshes.
#[derive(Debug, Parser)]
struct Args {
    /// How many agents.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds, from the first on.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Members that each agent knows beside its neighbours; none: all. By default 300 from 3,000 agents on.
    #[arg(long)]
    view: Option<usize>,
    /// Part of the packets that is lost, from 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// Regions, 12 ms apart.
    #[arg(long, default_value_t = 1)]
    regions: usize,
    /// Kills and registrations per seed.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of rest over which the traffic is measured.
    #[arg(long, default_value_t = 10)]
    rest: u64,
    /// What happens.
    #[arg(long, value_enum, default_value_t = Scenario::Scale)]
    scenario: Scenario,
    /// Most events that a life that fails prints, the last ones.
    #[arg(long, default_value_t = 80)]
    events: usize,
    /// Processors of the machine of a crowd.
    #[arg(long, default_value_t = 2)]
    processors: usize,
    /// What a packet, a message on a stream or a timer takes of one of them, in microseconds.
    #[arg(long, default_value_t = 200)]
    step_us: u64,
    /// What a handshake takes, in microseconds.
    #[arg(long, default_value_t = 2800)]
    handshake_us: u64,
    /// Writes a plot of detection and dissemination to this file.
    #[arg(long)]
    svg: Option<std::path::PathBuf>,
    /// Measures the figures that the mesh must reach: all, or one group (kill, register-1000, idle ...).
    #[arg(long, num_args = 0..=1, default_missing_value = "all")]
    figures: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(group) = &args.figures {
        return measure_figures(group);
    }
    if args.scenario == Scenario::Lives {
        return lives(&args);
    }
    if args.scenario == Scenario::Crowd {
        crowd(&args);
        return ExitCode::SUCCESS;
    }
    let (detection, dissemination) = scale(&args);
    if let Some(path) = &args.svg {
        let title = format!("weft, {} simulated agents, {} % loss", args.nodes, args.loss * 100.0);
        let plot = svg::plot(
            &title,
            &[("crash: unrouted".to_owned(), detection), ("registration: held".to_owned(), dissemination)],
        );
        if let Err(error) = std::fs::write(path, plot) {
            eprintln!("cannot write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn scale(args: &Args) -> (Times, Times) {
    let (mut detection, mut dissemination) = (Times::default(), Times::default());
    let mut rows = vec![
        ["seed", "nodes", "crash: p50", "p99", "registration: p50", "p99", "B/s per node", "dials/s"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for seed in args.seed..args.seed + args.seeds {
        let mut world = match args.scenario {
            Scenario::Full => scenarios::mesh(args.nodes, 1, seed, Settings::default()),
            Scenario::Scale | Scenario::Lives | Scenario::Crowd => {
                let view = args.view.or((args.nodes >= 3000).then_some(300));
                World::preloaded(args.nodes, view, seed, Settings::default())
            }
        };
        world.net.loss = args.loss;
        world.net.regions = args.regions;
        // Handshakes and the first round of probes.
        world.run(Duration::from_secs(5));
        let figures::Idle { wire_bytes, dials, .. } = figures::idle(&mut world, Duration::from_secs(args.rest));
        let (mut kills, mut news) = (Times::default(), Times::default());
        for _ in 0..args.rounds {
            news.add(scenarios::register_at(&mut world, Some(0)));
            kills.add(scenarios::kill(&mut world));
        }
        rows.push(vec![
            seed.to_string(),
            args.nodes.to_string(),
            show(kills.percentile(50.0)),
            show(kills.percentile(99.0)),
            show(news.percentile(50.0)),
            show(news.percentile(99.0)),
            format!("{wire_bytes:.0}"),
            format!("{dials:.3}"),
        ]);
        detection.add(kills);
        dissemination.add(news);
        eprintln!("seed {seed}: {} events", world.steps);
    }
    print!("{}", stats::table(&rows));
    (detection, dissemination)
}

fn crowd(args: &Args) {
    let machine = Machine {
        processors: args.processors,
        step: Duration::from_micros(args.step_us),
        handshake: Duration::from_micros(args.handshake_us),
    };
    for seed in args.seed..args.seed + args.seeds {
        let crowd = figures::crowd(args.nodes, Duration::from_millis(15), machine, Duration::from_mins(5), seed);
        println!("seed {seed}: {} agents, {}", args.nodes, crowd.show());
    }
}

fn lives(args: &Args) -> ExitCode {
    let mut failed = Vec::new();
    let mut settled = Times::default();
    for seed in args.seed..args.seed + args.seeds {
        let settings = Settings { events_kept: args.events, ..Settings::default() };
        match std::panic::catch_unwind(|| script::live(args.nodes, Duration::from_secs(60), seed, settings)) {
            Ok(time) => settled.0.push(time),
            Err(_) => failed.push(seed),
        }
    }
    println!(
        "{} lives of {} agents; settled after p50 {}, p99 {}, max {}; failed seeds: {failed:?}",
        args.seeds,
        args.nodes,
        show(settled.percentile(50.0)),
        show(settled.percentile(99.0)),
        show(settled.max())
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn measure_figures(group: &str) -> ExitCode {
    let chosen: Vec<figures::Group> =
        figures::GROUPS.into_iter().filter(|(name, _)| group == "all" || *name == group).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = figures::GROUPS.iter().map(|(name, _)| *name).collect();
        eprintln!("no group of figures is named {group}; there are: all, {}", names.join(", "));
        return ExitCode::FAILURE;
    }
    let mut rows = vec![["figure", "must reach", "measured", ""].map(str::to_owned).to_vec()];
    for (_, measure) in chosen {
        measure(&Settings::default(), &mut |figure| {
            // One line as soon as it is known; the table at the end.
            eprintln!("{}", figure.cells().join(" | "));
            rows.push(figure.cells());
        });
    }
    print!("{}", stats::table(&rows));
    ExitCode::SUCCESS
}
