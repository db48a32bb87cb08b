//! Who comes in, and who may do what.

use p2pit_tests::{Node, Pool, SOON, wait_until};
use serde_json::Value;

#[test]
fn a_word_that_is_no_ticket_is_refused_before_anything_is_made() {
    let pool = Pool::of(&["none"]);
    let ticket = pool.node(1).invite();
    let newcomer = pool.home("newcomer");
    newcomer.join(Some("hello"), &[]).refused(1, &["not a ticket"]);
    let cut = &ticket[..ticket.len() - 3];
    newcomer.join(Some(cut), &[]).refused(1, &["damaged"]);
    let middle = ticket.len() / 2;
    let other = if ticket.as_bytes()[middle] == b'a' { "b" } else { "a" };
    let wrong = format!("{}{other}{}", &ticket[..middle], &ticket[middle + 1..]);
    newcomer.join(Some(&wrong), &[]).refused(1, &["damaged"]);
    assert!(!newcomer.home().exists());
}

#[test]
fn a_ticket_that_has_expired_lets_nobody_in() {
    let pool = Pool::of(&["none"]);
    let ticket = pool.node(1).p2pit(&["invite", "--expires", "1ms"]).ok();
    let newcomer = pool.home("newcomer").used_with(&pool.path().join("bob"));
    newcomer.join(Some(ticket.trim()), &["--user-name", "bob"]).refused(1, &["expired"]);
    assert_eq!(pool.node(1).nodes().len(), 1);
}

#[test]
fn a_ticket_for_one_user_lets_in_one_with_several_machines() {
    let pool = Pool::of(&["none"]);
    let ticket = pool.node(1).p2pit(&["invite", "--uses", "1"]).ok();
    let ticket = Some(ticket.trim());
    let by = |name: &str, user: &str| {
        let newcomer = pool.home(name).used_with(&pool.path().join(user));
        newcomer.join(ticket, &["--user-name", user])
    };
    by("bobs-first", "bob").ended(0);
    by("carols", "carol").refused(1, &["used as often as it may"]);
    by("bobs-second", "bob").ended(0);
    let names: Vec<String> = pool.node(1).nodes().into_keys().collect();
    assert_eq!(names, ["bobs-first", "bobs-second", "n1"]);
}

#[test]
fn a_ticket_opens_no_other_pool() {
    let ours = Pool::of(&["none"]);
    let theirs = Pool::of(&["none"]);
    let ticket = theirs.node(1).invite();
    ours.node(1).join(Some(&ticket), &[]).refused(1, &["in the pool", "hint: ", "leave"]);

    let door = ours.node(1).me()["data"][0].as_str().unwrap().to_owned();
    theirs.node(1).shut_down();
    let newcomer = ours.home("newcomer");
    let ended = newcomer.join(Some(&ticket), &["--peer", &door]);
    assert_ne!(ended.code, 0);
    ended.refused(ended.code, &[]);
    assert_eq!(ours.node(1).nodes().len(), 1);
    // What went wrong leaves the way to the right pool open.
    newcomer.join(Some(&ours.node(1).invite()), &[]).ended(0);
    assert_eq!(ours.node(1).nodes().len(), 2);
}

#[test]
fn the_job_of_another_user_is_seen_but_not_read_nor_stopped() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let bobs = pool.add_stranger("bob", &["--client"]);
    let anna = pool.node(1);
    let script = "echo said; echo kept > $JOB_DIR/keep/file; sleep 600";
    let id = anna.submit(&["Experiment", "[v100]", "-d", script]);
    anna.wait_for_state(&id, "RUNNING");

    // At his own node as at hers: it is the key that counts.
    for bob in [bobs.clone(), anna.used_with(bobs.identity())] {
        let status = bob.json(&["status"]);
        let seen = &status[0];
        assert_eq!(
            (&seen["id"], &seen["title"], &seen["user"], &seen["state"]),
            (&Value::from(&*id), &"Experiment".into(), &"anna".into(), &"RUNNING".into())
        );
        for command in [
            &["log", &id][..],
            &["log", &id, "-f"],
            &["ls", &id],
            &["cp", &id, "keep/file", "-"],
            &["download", &id, "-o", "-"],
            &["stop", &id],
            &["run", "On", "-c", &id, "-d", "cat $JOB_DIR/keep/file", "-l"],
        ] {
            bob.p2pit(command).refused(1, &["only the owner"]);
        }
    }
    assert_eq!(anna.job(&id)["state"], "RUNNING");
    anna.p2pit(&["stop", &id]).ended(0);
    anna.wait_for_outcome(&id, "stopped");
    bobs.p2pit(&["log", &id]).refused(1, &["only the owner"]);
}

#[test]
fn a_private_job_shows_others_neither_title_nor_command() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let bob = pool.add_stranger("bob", &["--client"]);
    let anna = pool.node(1);
    let args = ["Unpublished", "[v100]", "-p", "-d", "echo hidden-command"];
    let id = anna.submit(&args);
    anna.wait_for_outcome(&id, "succeeded");
    assert_eq!(anna.job(&id)["title"], "Unpublished");
    for shown in [bob.json(&["show", "jobs"]), bob.json(&["status"]), bob.job(&id)] {
        let text = shown.to_string();
        assert!(text.contains(&id) && !text.contains("Unpublished"), "{text}");
        assert!(!text.contains("hidden-command"), "{text}");
    }
}

#[test]
fn a_user_of_the_pool_who_is_no_admin_may_run_jobs_but_not_invite() {
    let mut pool = Pool::of(&["sim:1xv100"]);
    let bob = pool.add_stranger("bob", &["--client"]);
    let me = bob.me();
    assert_eq!((&me["user"], &me["admin"]), (&"bob".into(), &false.into()));
    bob.p2pit(&["invite"]).refused(1, &["admin"]);
    if p2pit_tests::has_namespaces(pool.node(1)) {
        bob.p2pit(&["run", "Bob's", "[v100]", "-d", "true", "-l"]).ended(0);
        assert_eq!(pool.node(1).job(&only_job(&bob))["user"], "bob");
        // An admin of the pool may stop and read what is not hers.
        pool.node(1).p2pit(&["log", &only_job(&bob)]).ended(0);
    }
}

#[test]
fn somebody_who_is_not_of_the_pool_is_told_so() {
    let pool = Pool::of(&["sim:1xv100"]);
    let anna = pool.node(1);
    let id = anna.submit(&["Done", "[v100]", "-d", "true"]);
    anna.wait_for_outcome(&id, "succeeded");
    let elsewhere = pool.home("elsewhere").used_with(&pool.path().join("eve"));
    elsewhere.join(None, &["--user-name", "eve"]).ended(0);

    let eve = anna.used_with(elsewhere.identity());
    for command in [
        &["run", "Mine", "[v100]", "-d", "true"][..],
        &["log", &id],
        &["stop", &id],
        &["ls", &id],
        &["status"],
    ] {
        eve.p2pit(command).refused(1, &["pool"]);
    }
    eve.p2pit(&["invite"]).refused(1, &["only admins"]);
    let jobs = anna.json(&["show", "jobs"]);
    assert_eq!(jobs.as_array().unwrap().len(), 1, "{jobs:#}");
    // Without any key there is nobody to act for.
    let nobody = anna.used_with(&pool.path().join("missing"));
    nobody.p2pit(&["run", "Mine", "[v100]", "-d", "true"]).refused(1, &["missing"]);
}

#[test]
fn a_node_that_leaves_is_gone_from_the_pool() {
    let pool = Pool::of(&["sim:1xv100", "sim:1xgtx1070"]);
    pool.node(2).p2pit(&["leave"]).ended(0);
    wait_until("n2 is gone", SOON, || {
        let names: Vec<String> = pool.node(1).nodes().into_keys().collect();
        (names == ["n1"]).then_some(())
    });
    let gone = ["run", "Gone", "[gtx1070]", "-d", "true", "--dry-run"];
    pool.node(1).p2pit(&gone).refused(1, &["no `gtx1070` in the pool"]);
    pool.node(2).p2pit(&["status"]).refused(1, &["in no pool", "hint: ", "p2pit join"]);
    let ticket = pool.node(1).invite();
    pool.node(2).join(Some(&ticket), &[]).ended(0);
    pool.wait_until_assembled();
}

fn only_job(node: &Node) -> String {
    let jobs = node.json(&["show", "jobs"]);
    let id = jobs[0]["id"].as_str().filter(|_| jobs[1].is_null());
    id.unwrap_or_else(|| panic!("one job: {jobs:#}")).to_owned()
}
