//! Meshes of thousands of agents in one process, in virtual time: how fast news travels and what it costs.
//!
//! ```text
//! cargo run --release --example swim_scale -- --nodes 10000                 a table, and a plot: swim_scale.svg
//! cargo run --release --example swim_scale -- --nodes 50 --seeds 20 --loss 0.1
//! cargo run --release --example swim_scale -- --scenario lives --nodes 12 --seeds 1000
//! cargo run --release --example swim_scale -- --scenario crowd --nodes 100 --seeds 5
//! cargo run --release --example swim_scale -- --figures
//! cargo run --release --example swim_scale -- --figures idle-1000 --packet-us 60
//! ```
//!
//! From 3,000 agents on each has a partial view (`--view`): it knows 300 random others, its neighbours on the ring and a few
//! that all know, whose ends and registrations are followed; replicas stay small. A real agent knows everybody and holds all.
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
    /// Where the plot of detection, dissemination and bytes per node goes (scenarios scale and full).
    #[arg(long, default_value = "swim_scale.svg")]
    svg: std::path::PathBuf,
    /// What a UDP datagram costs a real agent beside its engine, sent and received, in microseconds: for the CPU of --figures
    /// idle and idle-1000. Measure it with 20 agents: (CPU per agent less that of the engine) / datagrams sent per second
    /// (tests/bench/gossip/run.sh --only idle 20; --figures idle).
    #[arg(long)]
    packet_us: Option<u64>,
    /// Measures the figures that the mesh must reach: all, or one group (kill, register-1000, idle ...).
    #[arg(long, num_args = 0..=1, default_missing_value = "all")]
    figures: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(group) = &args.figures {
        return measure_figures(group, args.packet_us.map(Duration::from_micros));
    }
    if args.scenario == Scenario::Lives {
        return lives(&args);
    }
    if args.scenario == Scenario::Crowd {
        crowd(&args);
        return ExitCode::SUCCESS;
    }
    let Scaled { detection, dissemination, wire_bytes } = scale(&args);
    let title = format!("weft, {} simulated agents, {} % loss", args.nodes, args.loss * 100.0);
    let series = [("crash: unrouted".to_owned(), detection), ("registration: held".to_owned(), dissemination)];
    let idle = svg::Bar { name: "idle: B/s per node".to_owned(), value: wire_bytes, bound: 1000.0 };
    let how = args.how();
    if !how.is_empty() {
        println!("{how}");
    }
    let plot = svg::plot(&title, &series, &[idle], &[how.as_str()]);
    if let Err(error) = std::fs::write(&args.svg, plot) {
        eprintln!("cannot write {}: {error}; name another file with --svg", args.svg.display());
        return ExitCode::FAILURE;
    }
    println!("plot: {}", args.svg.display());
    ExitCode::SUCCESS
}

impl Args {
    /// The members that each agent knows beside those that all know; none: everybody.
    fn view(&self) -> Option<usize> {
        self.view.or((self.nodes >= 3000).then_some(300)).filter(|view| *view < self.nodes)
    }

    /// How the mesh differs from a real one, for people; empty if it does not.
    fn how(&self) -> String {
        let view = self.view().map_or("everybody is known to all".to_owned(), |view| {
            format!("partial view: each knows {view} random others, its neighbours and 32 with their watchers, whose ends are measured")
        });
        if self.scenario == Scenario::Full {
            String::new()
        } else {
            format!("{view}; replicas small (one node's records)")
        }
    }
}

/// What was measured: all kills and registrations, and what a node sends at rest, the mean of all seeds.
#[derive(Default)]
struct Scaled {
    detection: Times,
    dissemination: Times,
    wire_bytes: f64,
}

fn scale(args: &Args) -> Scaled {
    let mut all = Scaled::default();
    let mut rows = vec![
        ["seed", "nodes", "crash: p50", "p99", "registration: p50", "p99", "B/s per node", "dials/s"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for seed in args.seed..args.seed + args.seeds {
        let mut world = match args.scenario {
            Scenario::Full => scenarios::mesh(args.nodes, 1, seed, Settings::default()),
            Scenario::Scale | Scenario::Lives | Scenario::Crowd => {
                World::preloaded(args.nodes, args.view(), seed, Settings::default())
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
        all.detection.add(kills);
        all.dissemination.add(news);
        all.wire_bytes += wire_bytes / args.seeds as f64;
        eprintln!("seed {seed}: {} events", world.steps);
    }
    print!("{}", stats::table(&rows));
    all
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

fn measure_figures(group: &str, packet_cost: Option<Duration>) -> ExitCode {
    let chosen: Vec<figures::Group> =
        figures::GROUPS.into_iter().filter(|(name, _)| group == "all" || *name == group).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = figures::GROUPS.iter().map(|(name, _)| *name).collect();
        eprintln!("no group of figures is named {group}; there are: all, {}", names.join(", "));
        return ExitCode::FAILURE;
    }
    let mut rows = vec![["figure", "must reach", "measured", ""].map(str::to_owned).to_vec()];
    for (_, measure) in chosen {
        measure(&Settings { packet_cost, ..Settings::default() }, &mut |figure| {
            // One line as soon as it is known; the table at the end.
            eprintln!("{}", figure.cells().join(" | "));
            rows.push(figure.cells());
        });
    }
    print!("{}", stats::table(&rows));
    ExitCode::SUCCESS
}
