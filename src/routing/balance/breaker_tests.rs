//! What holds of ejections whatever happens.

use proptest::prelude::*;
use serde_json::json;

use super::super::seat::Outcome;
use super::tests::{Bench, many};
use super::*;

#[test]
fn every_interval_that_passed_shortens_the_next_ejection_with_and_without_success_rates() {
    for enabled in [true, false] {
        let guard =
            json!({"PassiveHealthCheck": {"MaxFailures": 1, "Interval": "10s", "SuccessRate": {"Enabled": enabled}}});
        let mut bench = Bench::with(1, &json!({"LoadBalancer": {"Policy": "round_robin"}}), &guard, many(3));
        let ejected = |bench: &mut Bench| {
            // It fails at each call, its trials among them.
            loop {
                let picked = bench.pick();
                let is_sick = picked.instance.node.info.name.as_str() == "n0001";
                let outcome = if is_sick { Outcome::GatewayFailure } else { Outcome::Success };
                picked.load.observer().observe(outcome, Duration::from_millis(1), bench.now);
                if is_sick {
                    break;
                }
            }
            let until = bench.balancer.take_notices().pop().and_then(|notice| notice.until).unwrap();
            let took = until - bench.now;
            bench.now = until;
            took.as_secs()
        };
        assert_eq!([(); 4].map(|()| ejected(&mut bench)), [30, 60, 90, 120], "{enabled}");
        // Its trial succeeds, and 25 s are quiet: two intervals and a half.
        bench.pick().load.observer().observe(Outcome::Success, Duration::from_millis(1), bench.now);
        assert_eq!(bench.balancer.take_notices().pop().map(|notice| notice.until), Some(None));
        bench.now += Duration::from_secs(25);
        assert_eq!(ejected(&mut bench), 90, "{enabled}");
        bench.pick().load.observer().observe(Outcome::Success, Duration::from_millis(1), bench.now);
        bench.balancer.take_notices();
        // An hour forgives all.
        bench.now += Duration::from_secs(3_600);
        assert_eq!(ejected(&mut bench), 30, "{enabled}");
    }
}

const OUTCOMES: [Outcome; 4] = [Outcome::Success, Outcome::ServerError, Outcome::GatewayFailure, Outcome::Rejected];

proptest! {
    #[test]
    fn an_ejected_instance_is_tried_by_one_request_once_its_time_is_over_and_never_are_more_out_than_may_be(
        count in 1_usize..13,
        percent in prop::sample::select(vec![0_usize, 10, 50, 100]),
        // Milliseconds that pass, what comes of the call, whether it goes on for a while.
        steps in prop::collection::vec((0_u64..40_000, 0_usize..4, any::<bool>()), 1..300),
        fails in prop::collection::vec(any::<bool>(), 13),
        seed in any::<u64>(),
    ) {
        let guard = json!({"PassiveHealthCheck": {"MaxFailures": 2, "MaxEjectionPercent": percent}});
        let mut bench = Bench::with(seed, &json!({"LoadBalancer": {"Policy": "random"}}), &guard, many(count));
        let most = if percent == 0 { 0 } else { (count * percent / 100).max(1) };
        let mut held = Vec::new();
        for (millis, outcome, goes_on) in steps {
            bench.now += Duration::from_millis(millis);
            let before = bench.view();
            let picked = bench.pick();
            let at = before.seats.iter().position(|seat| seat.node == picked.instance.node.info.name).unwrap();
            match before.seats[at].standing {
                _ if before.panics => {}
                Standing::Closed => {}
                Standing::Open { until } => prop_assert!(until <= bench.now, "picked {:?} early", until - bench.now),
                Standing::HalfOpen { .. } => prop_assert!(false, "a second request tries it"),
            }
            // Some instances fail for good, others now and then.
            let outcome = if fails[at] { Outcome::GatewayFailure } else { OUTCOMES[outcome] };
            if goes_on {
                held.push((picked, outcome));
            } else {
                picked.load.observer().observe(outcome, Duration::from_millis(1), bench.now);
            }
            if held.len() > 4 {
                let (picked, outcome) = held.remove(0);
                picked.load.observer().observe(outcome, Duration::from_millis(1), bench.now);
            }
            let out = bench.view().seats.iter().filter(|seat| seat.standing != Standing::Closed).count();
            prop_assert!(out <= most, "{out} of {count} are out, and {most} may be");
            for notice in bench.balancer.take_notices() {
                // 30 s, as often as it was out before, 5 minutes at most.
                let Some(until) = notice.until else { continue };
                let (time, step) = (until - bench.now, Duration::from_secs(30));
                let times = (1..=10).any(|times| time == step * times);
                prop_assert!(times, "out for {time:?}");
            }
        }
    }
}
