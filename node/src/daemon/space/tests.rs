use std::thread;

use super::*;

#[test]
fn who_needs_room_waits_for_a_sweep_and_is_not_kept_where_the_last_found_none() {
    let space = Arc::new(Space::default());
    let waiting = Arc::clone(&space);
    let waits = thread::spawn(move || waiting.relieve(7));
    while lock(&space.need).wanted.is_empty() {
        thread::yield_now();
    }
    let wanted = std::mem::take(&mut lock(&space.need).wanted);
    assert_eq!(wanted, [7].into());
    assert!(!waits.is_finished());
    space.relief_is_over(Some(7));
    waits.join().unwrap();
    // Nobody is there to sweep, and nobody is asked.
    space.relieve(9);
    assert!(lock(&space.need).wanted.is_empty());
    // What is less may fit.
    let asking = Arc::clone(&space);
    let asks = thread::spawn(move || asking.relieve(6));
    while lock(&space.need).wanted.is_empty() {
        thread::yield_now();
    }
    space.relief_is_over(None);
    asks.join().unwrap();
}

#[test]
fn what_keeps_sweeps_from_being_made_is_told_with_the_next_step() {
    let job = JobId([1; 32]);
    let said = unknown("the list is damaged", &next_step(roots::Kind::Input(job)));
    let next = format!("`p2pit rm {}`", short(job));
    assert!(said.contains("no unused file is deleted") && said.contains(&next), "{said}");
    // What others have whole is not given up for this one.
    for kind in [roots::Kind::Copy(job), roots::Kind::Left(job), roots::Kind::Result(job)] {
        let said = unknown("the list is damaged", &next_step(kind));
        assert!(said.contains("it is brought again") && said.contains("only if"), "{said}");
    }
    assert!(!unknown("x", &next_step(roots::Kind::Pushed)).contains("p2pit rm"));
}

#[test]
fn directories_go_by_what_the_record_says_and_come_back_by_it() {
    use p2pit_protocol::job::Removed;
    let hour_ms = SURELY_OVER_MS;
    let fate = |state, removed: bool, chosen, wall_ms| {
        let mut kept = roots::tests::kept(state);
        let by = kept.spec.spec.owner;
        kept.value.body.removed = removed.then_some(Removed { by, at_ms: 0 });
        kept.chosen = chosen;
        fate_of(&kept, 5_000, wall_ms)
    };
    for chosen in [true, false] {
        assert_eq!(fate(State::Running, true, chosen, 99 * hour_ms), Fate::Stay);
        assert_eq!(fate(State::Done, false, chosen, 14_000), Fate::Stay);
        assert_eq!(fate(State::Done, true, chosen, 14_000), Fate::Go(Dropped::Removed));
        let late = fate(State::Done, false, chosen, 15_000 + hour_ms);
        assert_eq!(late, Fate::Go(Dropped::Expired));
    }
    assert_eq!(fate(State::Done, false, true, 15_000), Fate::Go(Dropped::Expired));
    // How long they are kept is not known as long as the clock is not trusted.
    let kept = roots::tests::kept(State::Done);
    assert_eq!(fate_of(&kept, millis(Duration::MAX), u64::MAX - 1), Fate::Stay);
    // An end that came to nothing must not cost what is left.
    assert_eq!(fate(State::Done, false, false, 15_000), Fate::Unsure);
}
