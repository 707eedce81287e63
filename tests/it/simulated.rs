//! Scenarios in the simulator, each over a fixed set of seeds.

use crate::sim::scenarios::{self, SECOND};
use crate::sim::world::Settings;

#[test]
fn smoke() {
    let begin = std::time::Instant::now();
    let mut world = scenarios::mesh(20, 2, 1, Settings::default());
    eprintln!("joined at {:?} after {:?} {} steps", world.now, begin.elapsed(), world.steps);
    let times = scenarios::kill(&mut world);
    eprintln!("{:?} {:?}", times.percentile(50.0), times.max());
    let times = scenarios::register(&mut world);
    eprintln!("{:?} {:?}", times.percentile(50.0), times.max());
    world.run(60 * SECOND);
    eprintln!("joined at {:?} after {:?} {} steps", world.now, begin.elapsed(), world.steps);
    world.assert_settled();
}
