//! Scenarios in the simulator, each over a fixed set of seeds.

use crate::sim::scenarios::{self, SECOND};
use crate::sim::script;
use crate::sim::world::Settings;

#[test]
fn random_lives() {
    let n: u64 = std::env::var("SEEDS").map_or(20, |t| t.parse().unwrap());
    let from: u64 = std::env::var("FROM").map_or(0, |t| t.parse().unwrap());
    let mut bad = 0;
    for seed in from..from + n {
        let begin = std::time::Instant::now();
        let r = std::panic::catch_unwind(|| script::live(12, 60 * SECOND, seed));
        if r.is_err() {
            bad += 1;
        }
        eprintln!("seed {seed}: {r:?} in {:?}", begin.elapsed());
    }
    eprintln!("{bad} bad");
}
