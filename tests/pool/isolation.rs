//! What a job must not see.

use p2pit_tests::{Pool, has_namespaces, lines_of};

#[test]
fn a_job_reads_neither_its_hosts_secrets_nor_another_job_nor_sees_its_processes() {
    let pool = Pool::of(&["sim:2xv100"]);
    let node = pool.node(1);
    if !has_namespaces(node) {
        return;
    }
    let victim_script = "echo at $JOB_DIR; echo secret > $JOB_DIR/keep/secret; echo up; sleep 600";
    let mut victim = node.start(&["run", "Victim", "[v100]", "-l", "-d", victim_script]);
    victim.wait_for("[worker 0] up");
    let log = victim.stdout();
    let victim_dir = lines_of(&log, 0)[0].strip_prefix("at ").unwrap().to_owned();
    let home = node.home().display().to_string();
    let key = node.identity().display().to_string();

    let script = format!(
        r#"
        try() {{ name=$1; shift; if "$@" >/dev/null 2>&1; then echo "CAN $name"; else echo "cannot $name"; fi; }}
        try read-own-key cat {home}/node.key
        try read-identity cat {key}
        try list-journal ls {home}/journal/.
        try reach-socket test -S {home}/api.sock
        try read-other-job cat {victim_dir}/keep/secret
        try list-other-job ls {victim_dir}/keep
        try write-other-job touch {victim_dir}/keep/planted
        try read-shadow cat /etc/shadow
        try write-system touch /usr/planted /etc/planted
        try list-root-home sh -c 'ls /root/.[a-z]*'
        try see-other-processes sh -c "cat /proc/[0-9]*/cmdline | tr '\0' ' ' | grep -q 'echo u[p]'"
        try be-root sh -c 'test $(id -u) = 0 && touch /planted'
        try reach-docker test -S /run/docker.sock
        try write-src touch $SRC_DIR/own
        try write-keep touch $JOB_DIR/keep/own
        try write-tmp touch $TMPDIR/own /tmp/own
        "#
    );
    let ended = node.p2pit(&["run", "Curious", "[v100]", "-l", "-d", &script]);
    let log = ended.ok();
    let said = lines_of(&log, 0);
    let (can, cannot): (Vec<&str>, Vec<&str>) =
        said.iter().partition(|line| line.starts_with("CAN "));
    assert_eq!(can, ["CAN write-src", "CAN write-keep", "CAN write-tmp"], "{log}");
    assert_eq!(cannot.len(), 13, "{log}");
    assert!(!std::path::Path::new("/planted").exists());
    node.p2pit(&["stop", "@last"]).ended(0);
    let victims = node.json(&["show", "jobs", "title=Victim"]);
    node.p2pit(&["stop", victims[0]["id"].as_str().unwrap()]).ended(0);
    victim.end().ended(143);
}

#[test]
fn a_job_of_root_does_not_run_as_root_unless_only_the_owner_runs_jobs() {
    let pool = Pool::of(&["sim:1xv100"]);
    let node = pool.node(1);
    let log = node.p2pit(&["run", "Id", "[v100]", "-l", "-d", "id -u"]).ok();
    let is_root = lines_of(&log, 0) == ["0"];
    assert!(!is_root || !node.me()["owner_only"].is_null(), "{log}");
}
