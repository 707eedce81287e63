//! Meshes of thousands of agents in one process, in virtual time: how fast news travels and what it costs.
//!
//! ```text
//! cargo run --release --example swim_scale -- --nodes 1000 --svg plot.svg
//! cargo run --release --example swim_scale -- --nodes 50 --seeds 20 --loss 0.1
//! cargo run --release --example swim_scale -- --scenario lives --nodes 12 --seeds 1000
//! cargo run --release --example swim_scale -- --figures
//! ```
//!
//! The engine is the one that ships (`weft::gossip::engine`); connections, streams, disks and clocks are simulated
//! (tests/sim). A failure prints its seed, and `--seed` repeats it alone.

#[path = "../tests/sim/mod.rs"]
mod sim;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use sim::stats::{self, Times, show};
use sim::world::{Settings, World};
use sim::{figures, scenarios, script, svg};

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Kills and registrations in a mesh that exists at once; the replicas stay small.
    Scale,
    /// The same in a mesh that joins and replicates everything.
    Full,
    /// A minute of random faults and churn, then quiet, then everything must hold.
    Lives,
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
    /// Part of the packets that is lost, from 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// Regions, 12 ms apart.
    #[arg(long, default_value_t = 1)]
    regions: usize,
    /// Kills and registrations per seed.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// What happens.
    #[arg(long, value_enum, default_value_t = Scenario::Scale)]
    scenario: Scenario,
    /// Writes a plot of detection and dissemination to this file.
    #[arg(long)]
    svg: Option<std::path::PathBuf>,
    /// Measures every figure that the mesh must reach.
    #[arg(long)]
    figures: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.figures {
        return measure_figures();
    }
    if args.scenario == Scenario::Lives {
        return lives(&args);
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
            Scenario::Scale | Scenario::Lives => {
                let settings = Settings { sync_interval: Duration::from_secs(3600), ..Settings::default() };
                World::preloaded(args.nodes, seed, settings)
            }
        };
        world.net.loss = args.loss;
        world.net.regions = args.regions;
        // Handshakes and the first round of probes.
        world.run(Duration::from_secs(5));
        let before: Vec<_> = world.hosts.iter().map(|host| host.traffic).collect();
        let rest = Duration::from_secs(10);
        world.run(rest);
        let spent: Vec<_> = world.hosts.iter().zip(&before).map(|(host, before)| host.traffic.since(before)).collect();
        let per_node = |sum: u64| sum as f64 / args.nodes as f64 / rest.as_secs_f64();
        let bytes = per_node(spent.iter().map(sim::host::Traffic::wire_bytes).sum());
        let dials = per_node(spent.iter().map(|traffic| traffic.dials).sum());
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
            format!("{bytes:.0}"),
            format!("{dials:.3}"),
        ]);
        detection.add(kills);
        dissemination.add(news);
        eprintln!("seed {seed}: {} events", world.steps);
    }
    print!("{}", stats::table(&rows));
    (detection, dissemination)
}

fn lives(args: &Args) -> ExitCode {
    let mut failed = Vec::new();
    let mut settled = Times::default();
    for seed in args.seed..args.seed + args.seeds {
        match std::panic::catch_unwind(|| script::live(args.nodes, Duration::from_secs(60), seed)) {
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

fn measure_figures() -> ExitCode {
    let mut rows = vec![["figure", "must reach", "measured", ""].map(str::to_owned).to_vec()];
    figures::all(&mut |figure| {
        // One line as soon as it is known; the table at the end.
        eprintln!("{}", figure.cells().join(" | "));
        rows.push(figure.cells());
    });
    print!("{}", stats::table(&rows));
    ExitCode::SUCCESS
}
