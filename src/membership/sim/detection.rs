//! Failure detection: how fast a crash is seen, and that the living are left alone.

use super::*;

/// How much later than it may a sentence comes, at most, where timers are served at once.
const LATEST: Duration = Duration::from_millis(10);

/// Returns how long it takes until everybody sees a crash, for several seeds, in order.
fn crash_times(count: usize, seeds: std::ops::Range<u64>) -> Vec<Duration> {
    let mut times: Vec<Duration> = seeds
        .map(|seed| {
            let mut mesh = Mesh::joined(count, seed);
            let idle = Duration::from_millis(mesh.rng.random_range(1000..4000));
            mesh.pass(idle);
            mesh.log.clear();
            mesh.kill(1);
            let took = mesh.run(20 * SECOND, |mesh| mesh.all_see(1, Some(MemberStatus::Failed)));
            let others = mesh.failures().find(|(_, _, of, _)| *of != name(1)).cloned();
            assert_eq!(others, None, "seed {seed}");
            took.unwrap_or_else(|| panic!("seed {seed}: never seen"))
        })
        .collect();
    times.sort();
    times
}

#[test]
fn a_crash_is_seen_by_twenty_and_by_fifty_within_three_seconds() {
    let twenty = crash_times(20, 0..30);
    println!("N=20: median {:?}, worst of {} {:?}", twenty[15], twenty.len(), twenty.last());
    assert!(twenty.last().is_some_and(|worst| *worst < 3 * SECOND), "{twenty:?}");
    let fifty = crash_times(50, 0..3);
    println!("N=50: median {:?}, worst of {} {:?}", fifty[1], fifty.len(), fifty.last());
    assert!(fifty.last().is_some_and(|worst| *worst < 3 * SECOND), "{fifty:?}");
}

#[test]
#[ignore = "takes minutes without optimisation: cargo test --release --lib crash_of_hundreds -- --ignored --nocapture"]
fn a_crash_of_hundreds_is_seen_in_time() {
    for (count, runs, promised) in [(20, 1000, 3), (100, 200, 3), (1000, 5, 5)] {
        let times = crash_times(count, 0..runs);
        let p99 = times[times.len() * 99 / 100];
        println!("N={count}: median {:?}, p99 {p99:?}, worst {:?}", times[times.len() / 2], times.last());
        assert!(p99 < promised * SECOND);
    }
}

/// Returns how long it takes until everybody of 20 sees a refused port, by seed and in order. All others have just heard
/// the one that dies, and the last thing that its QUIC said is counted late.
fn refusal_times(seeds: std::ops::Range<u64>, is_generous: bool) -> Vec<Duration> {
    let mut times: Vec<Duration> = seeds
        .map(|seed| {
            let mut mesh = Mesh::joined(20, seed);
            let idle = Duration::from_millis(mesh.rng.random_range(1000..4000));
            mesh.pass(idle);
            let killed = mesh.now;
            mesh.kill_refused(1, is_generous);
            for late in [Duration::ZERO, Duration::from_millis(120)] {
                mesh.pass(late);
                let now = mesh.now;
                for core in mesh.nodes.values_mut() {
                    // Whoever met the refusal has closed its connection.
                    if core.member(&name(1)).is_some_and(|member| member.status == MemberStatus::Alive) {
                        core.evidence_alive(&name(1), now);
                    }
                }
                let others: Vec<NodeName> = mesh.nodes.keys().cloned().collect();
                for at in &others {
                    mesh.flush(at);
                }
            }
            let seen = mesh.run(40 * SECOND, |mesh| mesh.all_see(1, Some(MemberStatus::Failed)));
            assert!(seen.is_some(), "seed {seed}: never seen");
            let others = mesh.failures().find(|(_, _, of, _)| *of != name(1)).cloned();
            assert_eq!(others, None, "seed {seed}");
            mesh.now - killed
        })
        .collect();
    times.sort();
    times
}

#[test]
fn a_refused_port_is_seen_by_all_at_once_though_all_have_just_heard_it() {
    let times = refusal_times(0..30, true);
    println!("refused port, kill to last: median {:?}, worst {:?}", times[15], times.last());
    assert!(times.last().is_some_and(|worst| *worst < SECOND / 2), "{times:?}");
}

#[test]
fn a_port_that_refuses_its_watchers_alone_is_seen_no_later_than_a_silent_one() {
    let times = refusal_times(0..30, false);
    println!("refused to two watchers alone, kill to last: median {:?}, worst {:?}", times[15], times.last());
    // The last sign of life counts for a second.
    assert!(times.last().is_some_and(|worst| *worst < 3 * SECOND / 2), "{times:?}");
}

#[test]
fn scenario_02_a_slow_node_doubts_itself_and_accuses_nobody() {
    seeds(5, |seed| {
        let mut mesh = Mesh::joined(12, seed);
        mesh.pass(2 * SECOND);
        mesh.log.clear();
        // It gets the processor now and then only, and its timers run before it reads.
        for round in 0..40 {
            mesh.pause(3);
            let pause = Duration::from_millis(mesh.rng.random_range(400..1500));
            mesh.pass(pause);
            mesh.resume(3, round % 2 == 0);
            let run = Duration::from_millis(mesh.rng.random_range(10..100));
            mesh.pass(run);
        }
        let stats = mesh.at(3).stats();
        assert!(stats.local_health >= 4, "{stats:?}");
        assert!(stats.late_wakeups >= 20, "{stats:?}");
        let now = mesh.now;
        assert!(mesh.at(3).stretch(SECOND, now) >= 5 * SECOND, "its timeouts stretch");
        let wronged = mesh.failures().find(|(_, _, of, _)| *of != name(3)).cloned();
        assert_eq!(wronged, None);
        // With time to itself again it recovers.
        mesh.pass(60 * SECOND);
        assert_eq!(mesh.at(3).stats().local_health, 0);
        assert!(mesh.all_alive());
    });
}

#[test]
fn a_late_wake_up_postpones_sentences_by_the_lateness() {
    let mut mesh = Mesh::joined(3, 5);
    mesh.pass(2 * SECOND);
    // Node 0 has checks under way when it stops; nobody answers until it is back.
    mesh.split = [name(1), name(2)].into();
    mesh.pass(Duration::from_millis(700));
    mesh.log.clear();
    mesh.pause(0);
    mesh.pass(8 * SECOND);
    mesh.split.clear();
    mesh.resume(0, false);
    assert_eq!(mesh.at(0).alive_count(), 2, "nobody is sentenced at the moment of waking");
    mesh.pass(5 * SECOND);
    let own = mesh.failures().filter(|(_, at, _, _)| *at == name(0)).count();
    assert_eq!(own, 0);
}

#[test]
fn a_check_that_was_under_way_when_its_node_stopped_accuses_nobody_at_the_moment_of_waking() {
    let mut mesh = Mesh::joined(3, 5);
    mesh.pass(2 * SECOND);
    let (begun, core) = (mesh.now, mesh.at(0));
    assert!(core.suspicions.is_empty());
    core.check(&name(1), begun);
    core.handle_timeout(begun + 9 * SECOND);
    assert!(core.suspicions.is_empty(), "the answer may lie in its socket");
    assert!(core.checks.targets().any(|target| *target == name(1)), "it goes on with the time that it had left");
    // Who says nothing in that time either is accused.
    let due = begun + 14 * SECOND;
    while core.suspicions.is_empty() && core.poll_timeout() <= due {
        core.handle_timeout(core.poll_timeout());
        while core.poll_output().is_some() {}
    }
    assert!(core.suspicions.contains_key(&name(1)));
}

/// Two members accuse node 2, which has the cases against all looked at.
fn accuse_another(core: &mut Core, now: Instant) {
    for by in [3, 4] {
        let accused = core.member(&name(2)).unwrap();
        let (life, incarnation, accuser) = (accused.id.life, accused.incarnation, name(by));
        let certainty = Certainty::Silent;
        let word = Accusation { accused: name(2), life, incarnation, certainty, accuser, signature: Vec::new() };
        core.handle_verified(signed(&name(by), Statement::Accuse(word)), Verdict::Holds, now);
    }
}

#[test]
fn a_stopped_node_doubts_itself_before_it_sentences_whatever_it_is_given_first() {
    let firsts: [fn(&mut Core, Instant); 3] =
        [accuse_another, |core, now| core.evidence_crashed(&name(2), now), Core::handle_timeout];
    for (number, first) in firsts.into_iter().enumerate() {
        let mut mesh = Mesh::joined(6, 5);
        mesh.pass(2 * SECOND);
        // It finds node 1 silent, and is stopped for 9 s before node 1 can refute that.
        let (begun, core) = (mesh.now, mesh.at(0));
        let incarnation = core.living(&name(1)).unwrap();
        core.accuse(&name(1), incarnation, Certainty::Silent, begun);
        let before = core.stats();
        let now = begun + 9 * SECOND;
        first(core, now);
        assert_eq!(core.stats().late_wakeups, before.late_wakeups + 1, "{number}");
        let status = |core: &Core| core.member(&name(1)).map(|member| member.status);
        assert_eq!(status(core), Some(MemberStatus::Alive), "{number}: its refutation is the next packet");
        // What it slept counts once.
        let health = core.stats().local_health;
        core.handle_timeout(now);
        assert_eq!(core.stats().late_wakeups, before.late_wakeups + 1, "{number}");
        assert_eq!((status(core), core.stats().local_health), (Some(MemberStatus::Alive), health), "{number}");
        // Who stays silent is sentenced after the time that it has in any case.
        let due = now + Profile::default().bounds(6).max + LATEST;
        while core.poll_timeout() <= due {
            core.handle_timeout(core.poll_timeout());
            while core.poll_output().is_some() {}
        }
        assert_eq!(status(core), Some(MemberStatus::Failed), "{number}");
    }
}

#[test]
fn scenario_06_a_node_stopped_for_ten_seconds_is_out_in_three_and_back_in_one() {
    seeds(10, |seed| {
        let mut mesh = Mesh::joined(20, seed);
        mesh.pass(2 * SECOND);
        mesh.log.clear();
        mesh.pause(4);
        let out = mesh.run(10 * SECOND, |mesh| mesh.all_see(4, Some(MemberStatus::Failed)));
        assert!(out.is_some_and(|out| out < 3 * SECOND), "{out:?}");
        mesh.pass((10 * SECOND).saturating_sub(out.unwrap()));
        mesh.resume(4, seed % 2 == 0);
        let back = mesh.run(10 * SECOND, |mesh| mesh.all_see(4, Some(MemberStatus::Alive)));
        assert!(back.is_some_and(|back| back < SECOND), "{back:?}");
        mesh.pass(20 * SECOND);
        let flap = mesh.failures().find(|(_, at, of, _)| *of != name(4) || *at == name(4)).cloned();
        assert_eq!(flap, None);
        assert!(mesh.all_alive());
    });
}

#[test]
fn scenario_11_one_way_loss_at_one_node_leaves_the_others_alone() {
    seeds(1, |seed| {
        let mut mesh = Mesh::joined(40, seed);
        mesh.pass(2 * SECOND);
        mesh.log.clear();
        mesh.deaf.insert(name(9), 0.8);
        mesh.pass(40 * SECOND);
        let wronged = mesh.failures().find(|(_, at, of, _)| *at != name(9) && *of != name(9)).cloned();
        assert_eq!(wronged, None);
        let healthy = mesh.nodes.iter().filter(|(at, _)| **at != name(9));
        assert!(healthy.clone().count() == 39 && healthy.clone().all(|(_, core)| core.alive_count() >= 38));
    });
}

/// Runs 20 nodes with loss and pauses and returns how often a running node was taken for failed by a running one.
fn false_positives(profile: &Profile, seed: u64, time: Duration) -> usize {
    let mut mesh = Mesh::joined_with(20, seed, profile.clone());
    mesh.loss = 0.1;
    let end = mesh.now + time;
    let mut wronged = 0;
    // A quarter of the nodes stops for up to two seconds again and again.
    while mesh.now < end {
        let number = mesh.rng.random_range(0..5);
        mesh.log.clear();
        mesh.pause(number);
        let pause = Duration::from_millis(mesh.rng.random_range(300..2000));
        mesh.pass(pause);
        mesh.resume(number, false);
        mesh.pass(Duration::from_millis(200));
        let is_steady = |node: &NodeName| (5..20).any(|number| *node == name(number));
        wronged += mesh.failures().filter(|(_, at, of, _)| is_steady(of) && is_steady(at)).count();
    }
    wronged
}

#[test]
fn checks_go_out_at_the_owner_s_beats_and_by_their_own_timer_where_there_are_none() {
    // No random probes: nobody answers them here.
    let mut mesh = Mesh::joined_with(3, 1, Profile { probe_period: Duration::from_hours(1), ..Profile::default() });
    let (begun, at) = (mesh.now, name(0));
    let checks = |core: &mut Core| {
        let outputs = std::iter::from_fn(|| core.poll_output());
        outputs.filter(|output| matches!(output, Output::Send { packet, .. } if class_of(packet).0 == "check")).count()
    };
    let core = mesh.nodes.get_mut(&at).unwrap();
    // One each beat and none between, though beats come by another clock; who is checked answers.
    let (mut at_beats, mut between, mut now) = (0, 0, begun);
    for beat in 0..26u32 {
        now = begun + WATCH_PERIOD * beat + Duration::from_millis(u64::from(beat % 3) * 40);
        while core.poll_timeout() <= now {
            core.handle_timeout(core.poll_timeout());
            between += checks(core);
        }
        core.beat(Duration::ZERO, now);
        at_beats += checks(core);
        (1..3).for_each(|number| core.evidence_alive(&name(number), now));
        if beat == 5 {
            // It has found the rhythm: the timer, whose checks are further apart, has fallen behind.
            (at_beats, between) = (0, 0);
        }
    }
    assert_eq!((at_beats, between), (20, 0));
    // No more of them.
    let end = now + 10 * SECOND;
    let mut alone = 0;
    while core.poll_timeout() <= end {
        let due = core.poll_timeout();
        core.handle_timeout(due);
        alone += checks(core);
        (1..3).for_each(|number| core.evidence_alive(&name(number), due));
    }
    assert!((16..=19).contains(&alone), "{alone}");
}

#[test]
fn lifeguard_wrongs_nobody_where_plain_swim_does() {
    let time = Duration::from_secs(240);
    let ours = false_positives(&Profile::default(), 1, time);
    let plain = false_positives(&Profile::plain(), 1, time);
    println!("false positives in {} node-minutes: {ours} with Lifeguard, {plain} without", 20 * 240 / 60);
    assert_eq!(ours, 0);
    assert!(plain >= 50, "{plain}: the comparison says nothing");
}

#[test]
#[ignore = "takes minutes: cargo test --release --lib wrongs_nobody_in_many -- --ignored --nocapture"]
fn lifeguard_wrongs_nobody_in_many_node_hours() {
    let mut ours = 0;
    let (runs, seconds) = (60, 3000);
    for seed in 100..100 + runs {
        let wronged = false_positives(&Profile::default(), seed, Duration::from_secs(seconds));
        if wronged > 0 {
            println!("seed {seed}: {wronged}");
        }
        ours += wronged;
    }
    println!("false positives in {} node-hours: {ours}", runs * seconds * 20 / 3600);
    assert_eq!(ours, 0);
}

#[test]
fn an_idle_mesh_sends_little_and_the_same_whatever_its_size() {
    #[track_caller]
    fn rate(count: usize) -> u64 {
        let mut mesh = Mesh::joined(count, 1);
        mesh.pass(10 * SECOND);
        mesh.bytes = 0;
        mesh.pass(20 * SECOND);
        mesh.bytes / 20 / count as u64
    }
    let (few, many) = (rate(10), rate(40));
    println!("idle: {few} B/s per node of 10, {many} B/s of 40, packets of the core alone");
    assert!(few < 500 && many < 500, "{few} {many}");
    assert!(many < few * 6 / 5, "{few} {many}");
}
