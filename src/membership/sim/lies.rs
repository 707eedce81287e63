//! Scenario 17 and its kin: what one certified liar can do.

use proptest::prelude::*;

use super::packet::{Call, CallPacket, Envelope, append, wrap};
use super::*;

/// The liar: a member in good standing whose packets TLS verifies.
const LIAR: usize = 0;
const HONEST: usize = 5;

/// One lie.
#[derive(Debug, Clone)]
enum Lie {
    /// Signs with its own key, in whosever name it speaks.
    Said(Statement),
    Suspected(u16),
    Call(Call),
    Turned,
    Entries(Vec<MemberEntry>),
    Farewell(Leave),
}

fn liar_signs(statement: Statement) -> Statement {
    signed(&name(LIAR), statement)
}

/// A packet of the liar to `to` that carries `broadcasts`: an empty gossip of foca's.
fn gossip(from: &MeshId, to: &MeshId, message: foca::Message<MeshId>, suspected: Option<u16>) -> Vec<u8> {
    use foca::Codec as _;
    let header = foca::Header { src: from.clone(), src_incarnation: 0, dst: to.clone(), message };
    let mut swim = Vec::new();
    WireCodec.encode_header(&header, &mut swim).unwrap();
    wrap(&Envelope { suspected, ..Envelope::default() }, &swim).unwrap()
}

fn tell(mesh: &mut Mesh, victim: usize, lie: Lie) {
    let now = mesh.now;
    let from = mesh.at(LIAR).id().clone();
    let to = mesh.at(victim).id().clone();
    let packet = match lie {
        Lie::Said(statement) => {
            let mut packet = gossip(&from, &to, foca::Message::Gossip, None);
            packet.extend_from_slice(&[0, 0]);
            assert!(append(&mut packet, &Broadcast::Said(liar_signs(statement))));
            packet
        }
        Lie::Suspected(incarnation) => gossip(&from, &to, foca::Message::Ping(1), Some(incarnation)),
        Lie::Turned => gossip(&from, &to, foca::Message::TurnUndead, None),
        Lie::Call(call) => {
            let call = CallPacket { src: from, src_incarnation: 0, dst: to.life, call };
            wrap(&Envelope { call: Some(call), ..Envelope::default() }, &[]).unwrap()
        }
        Lie::Entries(entries) => {
            mesh.at(victim).learn(entries, now);
            mesh.flush(&name(victim));
            return;
        }
        Lie::Farewell(leave) => {
            let Statement::Leave(leave) = liar_signs(Statement::Leave(leave)) else { unreachable!() };
            mesh.at(victim).learn_farewells(vec![leave], now);
            mesh.flush(&name(victim));
            return;
        }
    };
    let _refused = mesh.at(victim).handle_packet(&name(LIAR), &packet, now);
    mesh.flush(&name(victim));
}

fn any_life() -> impl Strategy<Value = Life> {
    let number = prop_oneof![Just(1u64), 0u64..5, Just(u64::MAX), any::<u64>()];
    let renewals = prop_oneof![0u32..4, any::<u32>()];
    (number, 0u64..3, renewals)
        .prop_map(|(number, nonce, renewals)| Life { generation: Generation { number, nonce }, renewals })
}

fn any_id() -> impl Strategy<Value = MeshId> {
    // Honest members, and some that do not exist.
    (1usize..HONEST + 4, any_life(), 1u16..9000).prop_map(|(number, life, port)| {
        MeshId::with_life(name(number), std::net::SocketAddr::from(([10, 9, 9, 9], port)), life)
    })
}

fn any_lie() -> impl Strategy<Value = Lie> {
    let incarnation = prop_oneof![0u16..4, any::<u16>()];
    let certainty = prop_oneof![Just(Certainty::Silent), Just(Certainty::Crashed)];
    let life = (any_id(), incarnation.clone())
        .prop_map(|(id, incarnation)| Lie::Said(Statement::Life(LifeClaim { id, incarnation, signature: Vec::new() })));
    let leave = (any_id(), any::<bool>(), any::<bool>()).prop_map(|(id, prune, is_own)| {
        let by = if is_own { name(LIAR) } else { id.name.clone() };
        Leave { node: id.name, life: id.life, prune, by, signature: Vec::new() }
    });
    let leave = leave.boxed();
    let accuser = 0usize..HONEST + 4;
    let accusation =
        (any_id(), incarnation.clone(), certainty, accuser).prop_map(|(id, incarnation, certainty, by)| {
            let (accused, accuser) = (id.name, name(by));
            let word = Accusation { accused, life: id.life, incarnation, certainty, accuser, signature: Vec::new() };
            Lie::Said(Statement::Accuse(word))
        });
    let call = prop_oneof![
        Just(Call::Gone),
        proptest::array::uniform32(any::<u32>()).prop_map(Call::Lives),
        any::<u32>().prop_map(Call::Answer),
        (0u32..50).prop_map(Call::Reached),
        (0u32..50).prop_map(Call::Missed),
        (1usize..HONEST + 4, 0u32..50, any::<u16>()).prop_map(|(of, number, patience_ms)| Call::CheckFor {
            target: name(of),
            number,
            patience_ms
        }),
    ];
    let standing = prop_oneof![Just(Standing::Alive), Just(Standing::Suspect), Just(Standing::Down)];
    let entry = (any_id(), any::<u16>(), standing).prop_map(|(id, incarnation, standing)| MemberEntry {
        id,
        incarnation,
        standing,
    });
    prop_oneof![
        life,
        leave.clone().prop_map(|leave| Lie::Said(Statement::Leave(leave))),
        leave.prop_map(Lie::Farewell),
        accusation,
        incarnation.prop_map(Lie::Suspected),
        call.prop_map(Lie::Call),
        Just(Lie::Turned),
        proptest::collection::vec(entry, 0..4).prop_map(Lie::Entries),
    ]
}

/// What must hold at every honest node about every honest node, and of strangers.
fn check_honest(mesh: &Mesh) -> Result<(), TestCaseError> {
    for (at, core) in mesh.nodes.iter().filter(|(at, _)| **at != name(LIAR)) {
        for number in (1..=HONEST).filter(|number| name(*number) != *at) {
            let status = core.member(&name(number)).map(|member| member.status);
            prop_assert_eq!(status, Some(MemberStatus::Alive), "{} about n{}", at, number);
            let (seen, real) = (&core.member(&name(number)).unwrap().id, mesh.nodes[&name(number)].id());
            prop_assert_eq!(seen.addr, real.addr);
            prop_assert!(seen.life <= real.life, "{} believes in a life that n{} never had", at, number);
        }
        for number in HONEST + 1..HONEST + 5 {
            let status = core.member(&name(number)).map(|member| member.status);
            prop_assert!(status.is_none_or(|status| status != MemberStatus::Alive), "{} believes in n{}", at, number);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn scenario_17_the_lies_of_one_insider_change_nothing_about_the_honest(
        seed in any::<u64>(),
        lies in proptest::collection::vec((1usize..=HONEST, any_lie(), 0u64..400), 1..60),
    ) {
        let mut mesh = Mesh::joined(HONEST + 1, seed);
        let begin = mesh.now;
        for (victim, lie, pause) in lies {
            tell(&mut mesh, victim, lie);
            check_honest(&mesh)?;
            mesh.pass(Duration::from_millis(pause));
            check_honest(&mesh)?;
        }
        mesh.pass(5 * SECOND);
        check_honest(&mesh)?;
        // The bound on what a lie costs: a return under a new life every second.
        let seconds = u32::try_from((mesh.now - begin).as_secs()).unwrap();
        for number in 1..=HONEST {
            let renewals = mesh.at(number).id().life.renewals;
            prop_assert!(renewals <= seconds + 1, "{} returns in {} s", renewals, seconds);
        }
        prop_assert!(mesh.run(10 * SECOND, Mesh::all_alive).is_some(), "and everybody agrees in the end");
    }
}

fn accusation(of: &MeshId, incarnation: u16, by: usize) -> Accusation {
    let (accused, accuser, certainty) = (of.name.clone(), name(by), Certainty::Silent);
    Accusation { accused, life: of.life, incarnation, certainty, accuser, signature: Vec::new() }
}

#[test]
fn scenario_17_a_liar_that_never_stops_neither_unseats_nor_slows_anybody() {
    let mut mesh = Mesh::joined(8, 4);
    mesh.pass(5 * SECOND);
    mesh.log.clear();
    for _ in 0..600 {
        let (accused, victim) = (mesh.rng.random_range(1..8), mesh.rng.random_range(1..8));
        let id = mesh.at(accused).id().clone();
        let incarnation = mesh.at(accused).incarnation;
        let word = accusation(&id, incarnation, LIAR);
        tell(&mut mesh, victim, Lie::Said(Statement::Accuse(word)));
        tell(&mut mesh, victim, Lie::Turned);
        mesh.pass(Duration::from_millis(50));
    }
    assert_eq!(mesh.failures().count(), 0);
    for number in 1..8 {
        let stats = mesh.at(number).stats();
        assert!(stats.local_health <= 1, "{stats:?}");
        assert!(mesh.at(number).id().life.renewals <= 31, "one return in a second at most");
    }
    mesh.pass(15 * SECOND);
    assert!((1..8).all(|number| mesh.at(number).suspicions.is_empty()), "advice ends");
}

#[test]
fn two_distinct_accusers_are_heard_and_the_accused_refutes() {
    let mut mesh = Mesh::joined(6, 2);
    mesh.pass(2 * SECOND);
    let (now, accused) = (mesh.now, mesh.at(1).id().clone());
    let word = |by: usize| Statement::Accuse(accusation(&accused, 0, by));
    let core = mesh.at(2);
    core.handle_verified(signed(&name(3), word(3)), Verdict::Holds, now);
    core.handle_verified(signed(&name(3), word(3)), Verdict::Holds, now);
    assert_eq!(core.stats().suspected, 0, "one is advice, however often");
    core.handle_verified(signed(&name(4), word(4)), Verdict::Holds, now);
    assert_eq!(core.stats().suspected, 1);
    mesh.flush(&name(2));
    mesh.log.clear();
    mesh.pass(5 * SECOND);
    assert_eq!(mesh.at(2).stats().suspected, 0);
    assert!(mesh.at(1).stats().refutations >= 1);
    assert_eq!(mesh.failures().count(), 0);
}

/// Delivers what `from` has to send to `to`, and nothing to anybody else.
fn carry(from: &mut Core, to: &mut Core, now: Instant) {
    let (source, target) = (from.id().name.clone(), to.id().name.clone());
    while let Some(output) = from.poll_output() {
        match output {
            Output::Send { to: whom, packet } if whom.name == target => {
                to.handle_packet(&source, &packet, now).unwrap();
            }
            Output::Sign(statement) => from.handle_signed(&signed(&source, statement), now),
            Output::Verify(statement) => {
                let verdict = verdict(&statement);
                from.handle_verified(statement, verdict, now);
            }
            _ => {}
        }
    }
}

#[test]
fn a_goodbye_that_is_repeated_prunes_nobody() {
    let mut mesh = Mesh::joined(4, 9);
    mesh.kill(3);
    assert!(mesh.run(10 * SECOND, |mesh| mesh.all_see(3, Some(MemberStatus::Failed))).is_some());
    let (now, life) = (mesh.now, mesh.at(1).member(&name(3)).unwrap().id.life);
    for (prune, want) in [(true, MemberStatus::Failed), (false, MemberStatus::Left)] {
        let leave = Leave { node: name(3), life, prune, by: name(2), signature: Vec::new() };
        let Statement::Leave(leave) = signed(&name(2), Statement::Leave(leave)) else { unreachable!() };
        mesh.at(1).learn_farewells(vec![leave], now);
        mesh.flush(&name(1));
        assert_eq!(mesh.at(1).member(&name(3)).map(|member| member.status), Some(want), "prune: {prune}");
    }
}

#[test]
fn the_gone_accuse_nobody_and_nobody_accuses_itself() {
    let mut mesh = Mesh::joined(6, 2);
    mesh.pass(2 * SECOND);
    let (now, accused) = (mesh.now, mesh.at(1).id().clone());
    let core = mesh.at(2);
    core.expel(&name(3), now);
    for by in [1, 3] {
        let word = Statement::Accuse(accusation(&accused, 0, by));
        core.handle_verified(signed(&name(by), word), Verdict::Holds, now);
        assert!(core.suspicions.is_empty(), "the word of n{by}");
    }
    // Of one who may, it is heard.
    let word = Statement::Accuse(accusation(&accused, 0, 4));
    core.handle_verified(signed(&name(4), word), Verdict::Holds, now);
    assert_eq!(core.suspicions.len(), 1);
}

#[test]
fn scenario_03_a_suspect_refutes_from_the_probe_alone() {
    let now = crate::clock::now();
    let mut prober = Core::new(id(0, 1), Profile::default(), 1, now);
    let mut suspect = Core::new(id(1, 1), Profile::default(), 2, now);
    prober.meet(&id(1, 1), now);
    suspect.meet(&id(0, 1), now);
    // Whatever the prober sends is lost until it suspects.
    while prober.stats().suspected == 0 {
        let at = prober.poll_timeout();
        prober.handle_timeout(at);
        while prober.poll_output().is_some() {}
        assert!(at < now + 5 * SECOND);
    }
    // The next question comes through and says what it is about; its answer carries the greater incarnation.
    let mut at = now;
    while suspect.incarnation == 0 && prober.stats().suspected == 1 {
        at = prober.poll_timeout();
        prober.handle_timeout(at);
        carry(&mut prober, &mut suspect, at);
    }
    assert_eq!(suspect.incarnation, 1, "the probe told it");
    carry(&mut suspect, &mut prober, at);
    assert_eq!(prober.stats().suspected, 0);
    assert_eq!(prober.roster.find(&name(1)).unwrap().incarnation, 1);
    assert_eq!(prober.member(&name(1)).unwrap().status, MemberStatus::Alive);
}

#[test]
fn scenario_03_a_stale_dead_is_ignored_and_an_old_alive_does_not_resurrect() {
    let mut mesh = Mesh::joined(5, 6);
    mesh.pass(SECOND);
    mesh.kill(3);
    mesh.boot(3, 2);
    mesh.run(10 * SECOND, Mesh::all_alive).expect("a restart is seen");
    // Words about the life before it, by two and signed.
    for by in [0, 2] {
        let word = signed(&name(by), Statement::Accuse(accusation(&id(3, 1), 0, by)));
        let now = mesh.now;
        mesh.at(1).handle_verified(word, Verdict::Holds, now);
    }
    assert_eq!(mesh.at(1).stats().suspected, 0);

    mesh.kill(3);
    mesh.run(10 * SECOND, |mesh| mesh.all_see(3, Some(MemberStatus::Failed))).expect("a crash is seen");
    for (generation, incarnation) in [(1, 0), (1, 9), (2, 0), (2, 9)] {
        let claim = LifeClaim { id: id(3, generation), incarnation, signature: Vec::new() };
        let now = mesh.now;
        mesh.at(1).handle_verified(signed(&name(3), Statement::Life(claim)), Verdict::Holds, now);
        mesh.at(1).attest(&id(3, generation), now);
        assert_eq!(mesh.at(1).member(&name(3)).unwrap().status, MemberStatus::Failed, "{generation} {incarnation}");
    }
    // The next life is alive at once.
    let now = mesh.now;
    mesh.at(1).attest(&id(3, 3), now);
    assert_eq!(mesh.at(1).member(&name(3)).unwrap().status, MemberStatus::Alive);
}

#[test]
fn a_life_or_a_goodbye_counts_only_under_the_members_own_signature() {
    let mut mesh = Mesh::joined(4, 7);
    mesh.pass(2 * SECOND);
    let now = mesh.now;
    let later = LifeClaim { id: id(2, 2), incarnation: 0, signature: Vec::new() };
    tell(&mut mesh, 1, Lie::Said(Statement::Life(later.clone())));
    assert_eq!(mesh.at(1).member(&name(2)).unwrap().id, id(2, 1));
    assert!(mesh.at(1).stats().forged_lives >= 1);
    let far = LifeClaim { id: id(2, 2 + GENERATION_JUMP_MAX), ..later.clone() };
    mesh.at(1).handle_verified(signed(&name(2), Statement::Life(far)), Verdict::Holds, now);
    assert_eq!(mesh.at(1).member(&name(2)).unwrap().id, id(2, 1), "a jump is refused though it is signed");
    mesh.at(1).handle_verified(signed(&name(2), Statement::Life(later)), Verdict::Holds, now);
    assert_eq!(mesh.at(1).member(&name(2)).unwrap().id, id(2, 2));

    let life = mesh.at(3).id().life;
    let leave = |by: usize| Leave { node: name(3), life, prune: false, by: name(by), signature: Vec::new() };
    for by in [LIAR, 3] {
        tell(&mut mesh, 1, Lie::Said(Statement::Leave(leave(by))));
        tell(&mut mesh, 1, Lie::Farewell(leave(by)));
    }
    assert_eq!(mesh.at(1).member(&name(3)).unwrap().status, MemberStatus::Alive);
    mesh.at(1).handle_verified(signed(&name(3), Statement::Leave(leave(3))), Verdict::Holds, now);
    assert_eq!(mesh.at(1).member(&name(3)).unwrap().status, MemberStatus::Left);
}

#[test]
fn anothers_goodbye_for_a_failed_member_counts_for_the_very_life_that_failed() {
    let mut mesh = Mesh::joined(4, 9);
    mesh.kill(3);
    assert!(mesh.run(10 * SECOND, |mesh| mesh.all_see(3, Some(MemberStatus::Failed))).is_some());
    let now = mesh.now;
    let failed = mesh.at(1).member(&name(3)).unwrap().id.life;
    let status = |mesh: &mut Mesh| mesh.at(1).member(&name(3)).unwrap().status;
    let said = |life: Life| {
        let leave = Leave { node: name(3), life, prune: false, by: name(2), signature: Vec::new() };
        signed(&name(2), Statement::Leave(leave))
    };
    for life in [Life { renewals: failed.renewals + 1, ..failed }, id(3, 5).life, id(3, u64::MAX).life] {
        mesh.at(1).handle_verified(said(life), Verdict::Holds, now);
        assert_eq!(status(&mut mesh), MemberStatus::Failed, "{life:?}");
    }
    // It comes back as somebody who is there to stay.
    mesh.boot(3, 2);
    assert!(mesh.run(10 * SECOND, Mesh::all_alive).is_some());
    mesh.kill(3);
    assert!(mesh.run(10 * SECOND, |mesh| mesh.all_see(3, Some(MemberStatus::Failed))).is_some());
    let (now, life) = (mesh.now, mesh.at(1).member(&name(3)).unwrap().id.life);
    mesh.at(1).handle_verified(said(life), Verdict::Holds, now);
    assert_eq!(status(&mut mesh), MemberStatus::Left, "an operator's word about the life that failed");
}

#[test]
fn strangers_are_believed_with_a_proof_only() {
    let now = crate::clock::now();
    let mut core = Core::new(id(0, 1), Profile::default(), 1, now);
    let entry = MemberEntry { id: id(5, 1), incarnation: 3, standing: Standing::Alive };
    core.learn(vec![entry], now);
    assert!(core.member(&name(5)).is_none());
    core.attest(&id(5, 1), now);
    assert_eq!(core.member(&name(5)).unwrap().status, MemberStatus::Alive);
    let claim = LifeClaim { id: id(6, 1), incarnation: 0, signature: Vec::new() };
    core.handle_verified(Statement::Life(claim.clone()), Verdict::Broken, now);
    core.handle_verified(Statement::Life(claim.clone()), Verdict::Unknown, now);
    assert!(core.member(&name(6)).is_none());
    core.handle_verified(signed(&name(6), Statement::Life(claim)), Verdict::Holds, now);
    assert_eq!(core.member(&name(6)).unwrap().status, MemberStatus::Alive);
}

#[test]
fn invented_members_are_bounded_and_a_flood_of_forgeries_costs_a_bounded_number_of_checks() {
    let mut mesh = Mesh::joined(3, 1);
    let now = mesh.now;
    let gone = |number| MemberEntry { id: id(number, 1), incarnation: 0, standing: Standing::Down };
    mesh.at(1).learn((100..10_100).map(gone).collect(), now);
    assert_eq!(mesh.at(1).members().count(), 2 + STRANGERS_MAX);

    mesh.pass(2 * SECOND);
    let (from, to, now) = (mesh.at(LIAR).id().clone(), mesh.at(2).id().clone(), mesh.now);
    let (mut checks, mut packets) = (0, 0);
    for number in 0..600 {
        let mut packet = gossip(&from, &to, foca::Message::Gossip, None);
        packet.extend_from_slice(&[0, 0]);
        let claim = LifeClaim { id: id(20_000 + number, 1), incarnation: 0, signature: Vec::new() };
        assert!(append(&mut packet, &Broadcast::Said(liar_signs(Statement::Life(claim)))));
        mesh.at(2).handle_packet(&name(LIAR), &packet, now).unwrap();
        packets += 1;
        let outputs = std::iter::from_fn(|| mesh.at(2).poll_output());
        checks += outputs.filter(|output| matches!(output, Output::Verify(_))).count();
    }
    assert_eq!(packets, 600);
    assert!((1..=105).contains(&checks), "{checks} signatures checked for one sender in one second");
    assert!(mesh.at(2).stats().statements_dropped >= 495);
}

#[test]
fn evidence_of_life_vetoes_and_evidence_of_a_crash_convicts_at_once() {
    let now = crate::clock::now();
    let mut core = Core::new(id(0, 1), Profile::default(), 1, now);
    for number in 1..5 {
        core.meet(&id(number, 1), now);
    }
    // Three accuse n1, and this node cannot reach it by probes; its data plane can.
    for by in 2..5 {
        let word = Statement::Accuse(accusation(&id(1, 1), 0, by));
        core.handle_verified(signed(&name(by), word), Verdict::Holds, now);
    }
    let mut at = now;
    while at < now + 3 * SECOND {
        at = core.poll_timeout();
        core.evidence_alive(&name(1), at);
        core.handle_timeout(at);
        while core.poll_output().is_some() {}
    }
    assert_eq!(core.member(&name(1)).unwrap().status, MemberStatus::Alive);
    assert!(core.stats().vetoes >= 1);
    // A refused port outweighs what was heard a moment before.
    core.evidence_alive(&name(1), at);
    core.evidence_crashed(&name(1), at);
    assert_eq!(core.member(&name(1)).unwrap().status, MemberStatus::Failed);
    let outputs: Vec<Output> = std::iter::from_fn(|| core.poll_output()).collect();
    let tells = |output: &Output| matches!(output, Output::Sign(Statement::Accuse(word)) if word.certainty == Certainty::Crashed);
    assert!(outputs.iter().any(tells), "the others are told");
}

#[test]
fn a_flapping_member_is_held_back_and_shown_in_the_end() {
    let mut mesh = Mesh::joined(4, 11);
    mesh.pass(SECOND);
    for generation in 2..5 {
        mesh.kill(2);
        mesh.run(10 * SECOND, |mesh| mesh.all_see(2, Some(MemberStatus::Failed))).expect("a crash is seen");
        mesh.boot(2, generation);
        mesh.run(3 * SECOND, Mesh::all_alive);
    }
    assert_eq!(mesh.at(1).stats().held, 1);
    assert_eq!(mesh.at(1).member(&name(2)).unwrap().status, MemberStatus::Failed);
    let took = mesh.run(20 * SECOND, |mesh| mesh.all_see(2, Some(MemberStatus::Alive)));
    assert!(took.is_some_and(|took| took > SECOND && took < 6 * SECOND), "{took:?}");
}
