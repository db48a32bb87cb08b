//! Real supervisors: this test binary runs again as one, see [`BECOME_SUPERVISOR`].

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use p2pit_protocol::bidder::LEASE_GRACE_MS;
use rustix::process::{Pid, Signal, geteuid, kill_process};

use super::*;

const IS_SUPERVISOR: &str = "P2PIT_TEST_IS_SUPERVISOR";
const IS_DAEMON: &str = "P2PIT_TEST_IS_DAEMON";
/// For what happens within milliseconds unless it never does.
const SOON: Duration = Duration::from_secs(20);

/// Turns this binary into a supervisor where the tests below ask for it, before `main` and
/// so before the test harness makes a thread, as the real program does.
// SAFETY: the loader calls what this section lists; the function takes nothing and the
// standard library's own entry there, which keeps the arguments, comes first.
#[used]
#[unsafe(link_section = ".init_array")]
static BECOME_SUPERVISOR: extern "C" fn() = become_supervisor;

extern "C" fn become_supervisor() {
    if std::env::var_os(IS_SUPERVISOR).is_some() {
        let run_dir = std::env::args_os().next_back().unwrap();
        std::process::exit(supervise_main(Path::new(&run_dir)));
    }
    if std::env::var_os(IS_DAEMON).is_some() {
        be_daemon(&std::env::args_os().collect::<Vec<_>>());
    }
}

/// Starts the process of `RUN_ROOT ID SPEC` and listens to it until it is gone.
fn be_daemon(args: &[OsString]) -> ! {
    let [_, run_root, id, spec] = args else { panic!("{args:?}") };
    let spec = serde_json::from_slice(&fs::read(spec).unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let executor = Executor::new(Path::new(run_root), test_supervisor()).unwrap();
        let id = id.to_str().unwrap().parse().unwrap();
        let mut running = executor.start(&id, spec).await.unwrap();
        while running.events.recv().await.is_some() {}
    });
    std::process::exit(0)
}

fn test_supervisor() -> SupervisorCommand {
    SupervisorCommand {
        env: vec![(IS_SUPERVISOR.into(), "1".into())],
        ..SupervisorCommand::of_this_program().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_process_holds_is_held_until_it_is_gone_and_no_longer() {
    use rustix::fs::{FlockOperation, flock};
    let host = Host::new().await;
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    let open = || std::fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
    let locked = open();
    flock(&locked, FlockOperation::NonBlockingLockExclusive).unwrap();
    let id = host.new_id();
    let mut running = host
        .executor
        .start_holding(&id, host.spec("echo up; sleep 600"), vec![locked.into()])
        .await
        .unwrap();
    loop {
        match running.events.recv().await.unwrap() {
            ProcessEvent::Started { .. } => break,
            event => assert!(matches!(event, ProcessEvent::LogGrew { .. }), "{event:?}"),
        }
    }
    let other = open();
    assert!(flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
    running.control.kill("enough").await;
    while running.events.recv().await.is_some() {}
    // The supervisor leaves right after its last word.
    let mut tries = 0;
    while flock(&other, FlockOperation::NonBlockingLockExclusive).is_err() {
        tries += 1;
        assert!(tries < 500, "still held");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn the_exit_code_of_a_command_is_passed_on() {
    let host = Host::new().await;
    for code in [0, 7, 255] {
        let ended = host.run(&format!("exit {code}")).await;
        assert_eq!(ended.ending, Ending::Exited { code });
        assert_eq!(ended.unsaved, None);
    }
}

#[tokio::test]
async fn a_process_ended_by_a_foreign_signal_says_which() {
    let host = Host::new().await;
    let ended = host.run("kill -SEGV $$").await;
    assert_eq!(ended.ending, Ending::Signaled { signal: libc::SIGSEGV });
}

#[tokio::test]
async fn output_and_errors_are_lines_of_the_log_in_their_order() {
    let host = Host::new().await;
    let ended = host.run("echo one; echo two >&2; echo three; printf 'no end'").await;
    let log = host.log();
    let lines: Vec<&str> = log.lines().map(|line| line.split_once("] ").unwrap().1).collect();
    let worker = "[worker 2] ";
    let expected = ["one", "two", "three", "no end"].map(|text| format!("{worker}{text}"));
    assert_eq!(lines, expected);
    assert!(log.starts_with("[2") && log.contains("Z] "), "{log}");
    assert_eq!(ended.log.bytes, log.len() as u64);
}

#[tokio::test]
async fn a_stopped_process_gets_sigterm_and_its_grace() {
    let host = Host::new().await;
    let mut running = host.start("trap 'echo saved; exit 3' TERM; echo up; sleep 600 & wait").await;
    host.log_has("up").await;
    running.control.stop(None, "by alice").await;
    let ended = ended(&mut running).await;
    let status = ExitStatus::Code(3);
    assert_eq!(ended.ending, Ending::Stopped { reason: "by alice".into(), status });
    assert!(host.log().contains("saved"));
}

#[tokio::test]
async fn a_process_that_ignores_sigterm_is_killed_after_the_grace() {
    let host = Host::new().await;
    let mut running = host.start("trap '' TERM; echo up; while :; do sleep 1; done").await;
    host.log_has("up").await;
    let begin = Instant::now();
    running.control.stop(Some(300), "enough").await;
    let ended = ended(&mut running).await;
    assert!(begin.elapsed() >= Duration::from_millis(299));
    let status = ExitStatus::Signal(libc::SIGKILL);
    assert_eq!(ended.ending, Ending::Stopped { reason: "enough".into(), status });
}

#[tokio::test]
async fn a_child_may_use_the_grace_though_the_main_process_is_gone() {
    let host = Host::new().await;
    let child = "bash -c 'trap \"sleep 0.3; echo checkpoint; exit\" TERM; echo up; \
                 while :; do sleep 0.05; done'";
    let mut running = host.start(&format!("{child} & wait")).await;
    host.log_has("up").await;
    running.control.stop(Some(10_000), "enough").await;
    let begin = Instant::now();
    let ended = ended(&mut running).await;
    assert!(matches!(ended.ending, Ending::Stopped { .. }), "{ended:?}");
    assert!(host.log().contains("checkpoint"));
    assert!(begin.elapsed() < Duration::from_secs(9), "waited for nobody");
}

#[tokio::test]
async fn nothing_of_a_tree_outlives_the_main_process() {
    for isolated in [true, false] {
        let Some(host) = Host::with(isolated).await else { continue };
        let mark = host.mark();
        // A child, one in a session of its own, and a daemon that forked twice.
        let tree = format!(
            "sleep {mark} & setsid sleep {mark} & (setsid sh -c 'sleep {mark} & sleep {mark}' &) \n\
             while [ $(pgrep -fxc 'sleep {mark}') -lt 4 ]; do sleep 0.01; done; echo up; "
        );
        let ended = host.run(&format!("{tree} exit 5")).await;
        assert_eq!(ended.ending, Ending::Exited { code: 5 }, "{}", host.log());
        assert_eq!(host.count_sleeps(&mark), 0);

        let mut running = host.start(&format!("trap '' TERM; {tree} echo again; wait")).await;
        host.log_has("again").await;
        assert_eq!(host.count_sleeps(&mark), 4);
        running.control.kill("away").await;
        gone(&mut running).await;
        assert_eq!(host.count_sleeps(&mark), 0);
    }
}

#[tokio::test]
async fn the_tree_is_told_to_end_wherever_its_members_went() {
    for isolated in [true, false] {
        let Some(host) = Host::with(isolated).await else { continue };
        let far = "setsid bash -c \"trap 'echo far away; exit' TERM; echo up; \
                   while :; do sleep 0.05; done\"";
        let mut running = host.start(&format!("({far} &); trap '' TERM; sleep 600; wait")).await;
        host.log_has("up").await;
        running.control.stop(Some(400), "enough").await;
        gone(&mut running).await;
        assert!(host.log().contains("far away"), "{}", host.log());
    }
}

#[tokio::test]
async fn a_new_daemon_adopts_a_running_process_and_hears_how_it_ends() {
    let host = Host::new().await;
    let running = host.start("echo up; while [ ! -e go ]; do sleep 0.01; done; exit 4").await;
    host.log_has("up").await;
    drop(running);
    let next = Executor::new(&host.executor.run_root, host.executor.supervisor.clone()).unwrap();
    let mut adopted = next.adopt().await.unwrap();
    let Some((id, Adopted::Running(mut running))) = adopted.pop() else { panic!("{adopted:?}") };
    assert_eq!(id, host.last_id());
    fs::write(host.work_dir().join("go"), "").unwrap();
    let events = events_until_gone(&mut running).await;
    assert!(matches!(events.first(), Some(ProcessEvent::Started { .. })), "{events:?}");
    assert_eq!(ending_in(&events).ending, Ending::Exited { code: 4 });
}

#[tokio::test]
async fn an_ending_that_nobody_heard_is_found_later() {
    let host = Host::new().await;
    let ended = host.run("exit 9").await;
    let Adopted::Ended(found) = host.adopt_only().await else { panic!("still running") };
    assert_eq!(found, ended);
    host.executor.forget(&host.last_id()).await.unwrap();
    assert!(host.executor.adopt().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_killed_supervisor_takes_the_tree_along_and_is_reported() {
    for isolated in [true, false] {
        let Some(host) = Host::with(isolated).await else { continue };
        let mark = host.mark();
        let text = format!("(setsid sleep {mark} &); echo up; sleep {mark}");
        let mut running = host.start(&text).await;
        host.log_has("up").await;
        host.kill_supervisor();
        let ended = ended(&mut running).await;
        assert_eq!(ended.ending, Ending::Lost { reason: "its supervisor died".into() });
        gone(&mut running).await;
        assert_eq!(host.count_sleeps(&mark), 0);
        let Adopted::Ended(found) = host.adopt_only().await else { panic!("still running") };
        assert_eq!(found.ending, ended.ending);
    }
}

#[tokio::test]
async fn a_killed_guard_takes_the_tree_along_and_is_reported() {
    for isolated in [true, false] {
        let Some(host) = Host::with(isolated).await else { continue };
        let mark = host.mark();
        let mut running =
            host.start(&format!("(setsid sleep {mark} &); echo up; sleep {mark}")).await;
        let Some(ProcessEvent::Started { pid, .. }) = running.events.recv().await else {
            panic!("not started")
        };
        host.log_has("up").await;
        kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
        let ended = ended(&mut running).await;
        assert!(matches!(ended.ending, Ending::Lost { .. }), "{ended:?}");
        gone(&mut running).await;
        assert_eq!(host.count_sleeps(&mark), 0);
    }
}

#[tokio::test]
async fn a_reboot_ends_every_process() {
    let host = Host::new().await;
    let id = ProcessId { job: "earlier".into(), attempt: 0, rank: 0 };
    let run_dir = host.executor.run_dir(&id);
    run_dir.create().unwrap();
    let (boot_id, run_root) = ("another".into(), host.executor.run_root.clone());
    let launch = Launch { id, boot_id, run_root, spec: host.spec("true") };
    run_dir.write_launch(&launch).unwrap();
    let Adopted::Ended(found) = host.adopt_only().await else { panic!("still running") };
    assert_eq!(found.ending, Ending::Lost { reason: "the machine was restarted".into() });
}

#[tokio::test]
async fn a_daemon_that_died_before_its_supervisor_leaves_a_start_that_failed() {
    let host = Host::new().await;
    let id = ProcessId { job: "early".into(), attempt: 0, rank: 0 };
    let run_dir = host.executor.run_dir(&id);
    run_dir.create().unwrap();
    let (boot_id, run_root) = (host.executor.boot_id.clone(), host.executor.run_root.clone());
    let launch = Launch { id, boot_id, run_root, spec: host.spec("true") };
    run_dir.write_launch(&launch).unwrap();
    let Adopted::Ended(found) = host.adopt_only().await else { panic!("still running") };
    assert!(matches!(found.ending, Ending::FailedToStart { .. }), "{found:?}");
}

#[tokio::test]
async fn the_time_limit_ends_a_process() {
    let host = Host::new().await;
    let mut spec = host.spec("sleep 600");
    spec.time_limit_ms = Some(200);
    let ended = host.run_spec(spec).await;
    let status = ExitStatus::Signal(libc::SIGTERM);
    assert_eq!(ended.ending, Ending::TimedOut { status });
}

/// Says `up`, then waits for the file `go` to end with code 4.
const WAITS_FOR_GO: &str = "echo up; while [ ! -e go ]; do sleep 0.01; done; exit 4";
const DEAF: &str = "trap '' TERM; echo up; while :; do sleep 0.05; done";

#[tokio::test]
async fn a_lease_that_ran_out_ends_the_whole_tree_though_no_daemon_is_there() {
    for isolated in [true, false] {
        let Some(host) = Host::with(isolated).await else { continue };
        let mark = host.mark();
        let tree = format!(
            "sleep {mark} & setsid sleep {mark} & (setsid sh -c 'sleep {mark} & sleep {mark}' &)\n\
             while [ $(pgrep -fxc 'sleep {mark}') -lt 4 ]; do sleep 0.01; done; echo up; wait"
        );
        let running = host.start(&tree).await;
        host.log_has("up").await;
        assert_eq!(host.count_sleeps(&mark), 4);
        running.control.set_deadline(in_ms(200));
        running.control.deadline_confirmed(SOON).await.unwrap();
        drop(running);
        let status = Some(ExitStatus::Signal(libc::SIGTERM));
        assert_eq!(host.ending_told_to_the_next_daemon().await, Ending::LeaseEnded { status });
        assert_eq!(host.count_sleeps(&mark), 0);
    }
}

#[tokio::test]
async fn a_tree_that_is_deaf_to_sigterm_is_killed_within_the_grace_of_its_lease() {
    for isolated in [true, false] {
        let Some(host) = Host::with(isolated).await else { continue };
        let mark = host.mark();
        let far = format!("setsid sh -c \"trap '' TERM; sleep {mark}\" &");
        let mut spec = host.spec(&format!("{far}\n{DEAF}"));
        spec.grace_ms = 300;
        let mut running = host.start_spec(spec).await;
        host.log_has("up").await;
        let Deadline(Some(at)) = in_ms(100) else { unreachable!() };
        running.control.set_deadline(Deadline(Some(at)));
        let ended = ended(&mut running).await;
        let status = Some(ExitStatus::Signal(libc::SIGKILL));
        assert_eq!(ended.ending, Ending::LeaseEnded { status });
        assert!((at + 300..at + LEASE_GRACE_MS).contains(&ended.boot_ms), "{at}: {ended:?}");
        gone(&mut running).await;
        assert_eq!(host.count_sleeps(&mark), 0);
    }
}

#[tokio::test]
async fn a_process_whose_supervisor_lives_is_adopted_whatever_its_files_say() {
    let host = Host::new().await;
    let running = host.start(WAITS_FOR_GO).await;
    host.log_has("up").await;
    drop(running);
    let tree = host.executor.run_dir(&host.last_id()).path().join("tree.json");
    let whole = fs::read(&tree).unwrap();
    fs::write(&tree, "{").unwrap();
    let Adopted::Running(mut running) = host.adopt_only().await else { panic!("taken for over") };
    fs::write(&tree, whole).unwrap();
    host.ends_by_itself(&mut running).await;
}

#[tokio::test]
async fn a_process_that_cannot_be_looked_for_is_not_taken_for_over() {
    let host = Host::new().await;
    let mut running = host.start(WAITS_FOR_GO).await;
    host.log_has("up").await;
    let run_dir = host.executor.run_dir(&host.last_id());
    kill_process(host.supervisor_pid(), Signal::KILL).unwrap();
    while run_dir.try_lock().unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    // A directory instead of the file: whether the tree is there cannot be read.
    let (spec, aside) = (run_dir.path().join("spec.json"), run_dir.path().join("aside"));
    fs::rename(&spec, &aside).unwrap();
    fs::create_dir(&spec).unwrap();
    let Adopted::Running(mut adopted) = host.adopt_only().await else { panic!("taken for over") };
    fs::remove_dir(&spec).unwrap();
    fs::rename(&aside, &spec).unwrap();
    for running in [&mut running, &mut adopted] {
        assert!(matches!(ended(running).await.ending, Ending::Lost { .. }));
        gone(running).await;
    }
}

#[tokio::test]
async fn a_lease_renewed_in_time_ends_nothing() {
    let (host, mut running, first) = in_time(async |lead_ms| {
        let host = Host::new().await;
        let running = host.start(WAITS_FOR_GO).await;
        host.log_has("up").await;
        let first = in_ms(lead_ms);
        running.control.set_deadline(first);
        running.control.deadline_confirmed(SOON).await.unwrap();
        running.control.set_deadline(in_ms(600_000));
        running.control.deadline_confirmed(SOON).await.unwrap();
        is_ahead(first).then_some((host, running, first))
    })
    .await;
    // One that was overtaken takes nothing back.
    running.control.set_deadline(first);
    host.past(first).await;
    host.ends_by_itself(&mut running).await;
}

#[tokio::test]
async fn a_lifted_deadline_stays_lifted_until_another_is_set() {
    let (host, mut running, first) = in_time(async |lead_ms| {
        let host = Host::new().await;
        let running = host.start(WAITS_FOR_GO).await;
        host.log_has("up").await;
        let first = in_ms(lead_ms);
        running.control.set_deadline(first);
        running.control.deadline_confirmed(SOON).await.unwrap();
        running.control.set_deadline(Deadline(None));
        running.control.deadline_confirmed(SOON).await.unwrap();
        is_ahead(first).then_some((host, running, first))
    })
    .await;
    host.past(first).await;
    assert_eq!(host.executor.run_dir(&host.last_id()).read_ended().unwrap(), None);
    running.control.set_deadline(in_ms(1));
    let ended = ended(&mut running).await;
    assert!(matches!(ended.ending, Ending::LeaseEnded { .. }), "{ended:?}");
}

#[tokio::test]
async fn a_process_whose_lease_ran_out_before_its_start_is_never_executed() {
    for isolated in [true, false] {
        let Some(host) = Host::with(isolated).await else { continue };
        let mut spec = host.spec("echo ran; touch ran");
        spec.deadline = Deadline(Some(clock::boot_ms() - 1));
        let mut running = host.start_spec(spec).await;
        let events = events_until_gone(&mut running).await;
        let started = |event: &ProcessEvent| matches!(event, ProcessEvent::Started { .. });
        assert!(!events.iter().any(started), "{events:?}");
        assert_eq!(ending_in(&events).ending, Ending::LeaseEnded { status: None });
        assert!(host.log().is_empty() && !host.work_dir().join("ran").exists());
        let Adopted::Ended(found) = host.adopt_only().await else { panic!("still running") };
        assert_eq!(found.ending, Ending::LeaseEnded { status: None });
    }
}

#[tokio::test]
async fn a_lease_cuts_the_grace_of_a_stop_short() {
    let host = Host::new().await;
    let mut spec = host.spec(DEAF);
    spec.grace_ms = 100;
    let mut running = host.start_spec(spec).await;
    host.log_has("up").await;
    running.control.stop(Some(600_000), "by alice").await;
    running.control.set_deadline(in_ms(1));
    let ended = ended(&mut running).await;
    let status = ExitStatus::Signal(libc::SIGKILL);
    assert_eq!(ended.ending, Ending::Stopped { reason: "by alice".into(), status });
}

#[tokio::test]
async fn a_deadline_outlives_its_daemon_and_the_next_one_moves_it() {
    let (host, mut running, first) = in_time(async |lead_ms| {
        let host = Host::new().await;
        let running = host.start(WAITS_FOR_GO).await;
        host.log_has("up").await;
        let first = in_ms(lead_ms);
        running.control.set_deadline(first);
        running.control.deadline_confirmed(SOON).await.unwrap();
        drop(running);
        let running = match host.adopt_only().await {
            Adopted::Running(running) => running,
            Adopted::Ended(ended) => {
                assert!(!is_ahead(first), "{ended:?}");
                return None;
            }
        };
        // Before there is a connection.
        running.control.set_deadline(in_ms(600_000));
        running.control.deadline_confirmed(SOON).await.unwrap();
        is_ahead(first).then_some((host, running, first))
    })
    .await;
    host.past(first).await;
    host.ends_by_itself(&mut running).await;
}

#[tokio::test]
async fn a_supervisor_that_does_not_answer_is_told_so_and_hears_the_next_renewal() {
    let host = Host::new().await;
    let mut running = host.start(WAITS_FOR_GO).await;
    host.log_has("up").await;
    let first = in_ms(600_000);
    running.control.set_deadline(first);
    running.control.deadline_confirmed(SOON).await.unwrap();
    let supervisor = host.supervisor_pid();
    kill_process(supervisor, Signal::STOP).unwrap();
    running.control.set_deadline(in_ms(700_000));
    let unconfirmed = running.control.deadline_confirmed(Duration::from_millis(100)).await;
    assert_eq!(unconfirmed, Err(Unconfirmed { held: Some(first) }));
    kill_process(supervisor, Signal::CONT).unwrap();
    running.control.set_deadline(in_ms(800_000));
    running.control.deadline_confirmed(SOON).await.unwrap();
    host.ends_by_itself(&mut running).await;
    // In vain, not wrong, once it is over.
    running.control.set_deadline(in_ms(900_000));
    assert_eq!(running.control.deadline_confirmed(SOON).await, Ok(()));
}

/// As when the machine was suspended: nothing of the grace is left to wait for.
#[tokio::test]
async fn a_supervisor_that_slept_over_deadline_and_grace_kills_at_once() {
    let host = Host::new().await;
    let grace_ms = 2_000;
    let mut spec = host.spec(DEAF);
    spec.grace_ms = grace_ms;
    let mut running = host.start_spec(spec).await;
    host.log_has("up").await;
    let deadline = in_ms(300);
    running.control.set_deadline(deadline);
    running.control.deadline_confirmed(SOON).await.unwrap();
    let supervisor = host.supervisor_pid();
    kill_process(supervisor, Signal::STOP).unwrap();
    host.past(Deadline(deadline.0.map(|at| at + grace_ms))).await;
    let woken_ms = clock::boot_ms();
    kill_process(supervisor, Signal::CONT).unwrap();
    let ended = ended(&mut running).await;
    let status = Some(ExitStatus::Signal(libc::SIGKILL));
    assert_eq!(ended.ending, Ending::LeaseEnded { status });
    assert!(ended.boot_ms < woken_ms + grace_ms, "{woken_ms}: {ended:?}");
}

#[tokio::test]
async fn a_daemon_that_is_stopped_does_not_stop_the_clock_of_a_lease() {
    let host = Host::new().await;
    let mut spec = host.spec(DEAF);
    spec.grace_ms = 100;
    spec.deadline = in_ms(5_000);
    let (id, spec_path) = (host.new_id(), host.dir.path().join("spec.json"));
    spec.log_path = host.log_path();
    fs::write(&spec_path, serde_json::to_vec(&spec).unwrap()).unwrap();
    let daemon = std::process::Command::new("/proc/self/exe")
        .args([host.executor.run_root.as_os_str(), id.to_string().as_ref(), spec_path.as_ref()])
        .env(IS_DAEMON, "1")
        .spawn()
        .unwrap();
    let daemon = KilledAtLast(daemon);
    host.log_has("up").await;
    kill_process(Pid::from_child(&daemon.0), Signal::STOP).unwrap();
    let ending = host.ending_told_to_the_next_daemon().await;
    let stopped = fs::read_to_string(format!("/proc/{}/stat", daemon.0.id())).unwrap();
    let status = Some(ExitStatus::Signal(libc::SIGKILL));
    assert_eq!(ending, Ending::LeaseEnded { status });
    assert!(stopped.rsplit_once(") ").unwrap().1.starts_with('T'), "{stopped}");
}

#[tokio::test]
async fn the_environment_is_what_was_asked_for_and_nothing_of_the_daemon() {
    let host = Host::new().await;
    let mut spec = host.spec("env");
    spec.env.insert("CUDA_VISIBLE_DEVICES".into(), "GPU-1,GPU-2".into());
    spec.env.insert("LINES".into(), "a\nb = c".into());
    host.run_spec(spec).await;
    let log = host.log();
    assert!(log.contains("CUDA_VISIBLE_DEVICES=GPU-1,GPU-2\n"), "{log}");
    assert!(log.contains("LINES=a\n") && log.contains("b = c\n"), "{log}");
    assert!(log.contains(&format!("HOME={}\n", host.tmp_dir().display())), "{log}");
    assert!(!log.contains("CARGO") && !log.contains("P2PIT_TEST"), "{log}");
}

#[tokio::test]
async fn a_script_runs_with_its_interpreter_whatever_its_mode() {
    let host = Host::new().await;
    let script = host.work_dir().join(".compute");
    let mut spec = host.spec("");
    spec.command = Command::Script { path: ".compute".into() };
    for (text, mode, expected) in [
        ("echo plain $0", 0o644, "plain"),
        ("#!/bin/sh\necho shebang $0", 0o644, "shebang"),
        ("#!/usr/bin/env -S cat -n\nlisted", 0o755, "2\tlisted"),
        ("echo executable $BASH_VERSION", 0o755, "executable"),
    ] {
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(mode)).unwrap();
        host.run_spec(spec.clone()).await;
        assert!(host.log().contains(expected), "{text}: {}", host.log());
    }
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let host = Host::new().await;
    let mut spec = host.spec("");
    spec.command = Command::Script { path: "missing".into() };
    let ended = host.run_spec(spec).await;
    let Ending::FailedToStart { reason } = ended.ending else { panic!("{ended:?}") };
    assert!(reason.contains("missing: No such file"), "{reason}");

    fs::write(host.work_dir().join(".compute"), "#!/no/such/interpreter\n").unwrap();
    let mut spec = host.spec("");
    spec.command = Command::Script { path: ".compute".into() };
    let ended = host.run_spec(spec).await;
    let Ending::FailedToStart { reason } = ended.ending else { panic!("{ended:?}") };
    assert!(reason.contains("cannot execute the command: No such file"), "{reason}");
}

#[tokio::test]
async fn a_process_is_started_only_once() {
    let host = Host::new().await;
    host.run("exit 1").await;
    let again = host.executor.start(&host.last_id(), host.spec("exit 0")).await;
    assert!(matches!(again, Err(StartError::AlreadyExists(_))), "{again:?}");
    let next = Executor::new(&host.executor.run_root, host.executor.supervisor.clone()).unwrap();
    let again = next.start(&host.last_id(), host.spec("exit 0")).await;
    assert!(matches!(again, Err(StartError::AlreadyExists(_))), "{again:?}");
}

#[tokio::test]
async fn a_spec_that_would_open_a_door_is_refused() {
    let host = Host::new().await;
    let cases: [fn(&mut ProcessSpec); 5] = [
        |spec| spec.command = Command::Script { path: "../x".into() },
        |spec| spec.log_path = spec.work_dir.join("log"),
        |spec| spec.writable.push("/".into()),
        |spec| spec.writable.push("relative".into()),
        |spec| drop(spec.env.insert("A=B".into(), String::new())),
    ];
    for case in cases {
        let mut spec = host.spec("true");
        case(&mut spec);
        let refused = host.executor.start(&host.new_id(), spec).await;
        assert!(matches!(refused, Err(StartError::Invalid { .. })), "{refused:?}");
    }
}

#[tokio::test]
async fn an_isolated_job_sees_its_own_and_nothing_of_the_owner_or_of_others() {
    let Some(host) = Host::with(true).await else { return };
    let home = host.dir.path().join("home-of-the-owner");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("id_ed25519"), "the owner's secret").unwrap();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).unwrap();
    let data = host.dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("set"), "data set").unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(host.job_dir().join("keep")).unwrap();
    prepare_ownership([host.job_dir()], RunAs::for_this_daemon()).unwrap();

    let mut spec = host.spec(
        "cat \"$OWNER/id_ed25519\" /etc/shadow \"$RUN_ROOT\"/*/spec.json; ls -A /home /root /run\n\
         echo users $(id -u) processes $(ls /proc | grep -c '^[0-9]')\n\
         cat \"$DATA/set\"; echo; echo x >\"$DATA/new\"; echo x >/usr/new; echo x >\"$OWNER/new\"\n\
         echo kept >\"$JOB/keep/file\" && echo x >here && echo x >/tmp/t && echo x >/dev/shm/s \\\n\
           && mktemp >/dev/null && echo x >/var/tmp/v && echo wrote\n\
         grep -E '^(Cap(Prm|Eff|Bnd|Amb)|NoNewPrivs)' /proc/self/status\n\
         unshare -Urm sh -c 'umount -l \"$OWNER\"; umount -l /home; cat \"$OWNER/id_ed25519\"'\n\
         kill -9 1; head -c 1 /dev/urandom | wc -c; test -c /dev/ptmx && echo ptmx\n\
         getent hosts localhost >/dev/null && echo resolves; exit 0",
    );
    spec.read_only.push(data.clone());
    spec.sandbox.hidden.push(home.clone());
    let text = |path: &Path| path.to_string_lossy().into_owned();
    spec.env.insert("OWNER".into(), text(&home));
    spec.env.insert("DATA".into(), text(&data));
    spec.env.insert("JOB".into(), text(&host.job_dir()));
    spec.env.insert("RUN_ROOT".into(), text(&host.executor.run_root));
    let ended = host.run_spec(spec).await;
    let log = host.log();
    assert_eq!(ended.ending, Ending::Exited { code: 0 }, "{log}");
    assert!(!log.contains("secret") && !log.contains(":99999:"), "{log}");
    assert!(!log.contains("work_dir"), "{log}");
    assert!(log.contains("data set") && log.contains("wrote"), "{log}");
    assert!(log.contains("ptmx") && log.contains("resolves"), "{log}");
    let uid = RunAs::for_this_daemon().map_or(geteuid().as_raw(), |ids| ids.uid);
    // The guard, the shell, `ls` and `grep`, and perhaps a subshell.
    let counted = log.lines().find_map(|line| line.split_once(&format!("users {uid} processes ")));
    let processes: u32 = counted.expect(&log).1.parse().unwrap();
    assert!((3..=6).contains(&processes), "{log}");
    assert_eq!(log.matches("0000000000000000\n").count(), 4, "{log}");
    assert!(log.contains("NoNewPrivs:\t1"), "{log}");
    assert_eq!(fs::read_to_string(host.job_dir().join("keep/file")).unwrap(), "kept\n");
    assert!(!data.join("new").exists() && !home.join("new").exists());
}

#[tokio::test]
async fn a_job_of_root_never_runs_as_root_even_without_namespaces() {
    let Some(ids) = RunAs::for_this_daemon() else {
        println!("skipped: this is not root, or has no other id");
        return;
    };
    let host = Host::with(false).await.unwrap();
    host.run("id -u; id -G; cat /etc/shadow; grep CapEff /proc/self/status").await;
    let log = host.log();
    assert_eq!(log.matches(&format!("] {}\n", ids.uid)).count(), 2, "{log}");
    assert!(!log.contains(":99999:") && log.contains("CapEff:\t0000000000000000"), "{log}");
    let mut spec = host.spec("true");
    spec.run_as = None;
    let refused = host.executor.start(&host.new_id(), spec).await;
    assert!(matches!(refused, Err(StartError::Invalid { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_disk_full_of_log_costs_neither_the_job_nor_its_exit_code() {
    let host = Host::new().await;
    let mut spec = host.spec("seq 200000; exit 6");
    spec.log_path = "/dev/full".into();
    let ended = host.run_spec(spec).await;
    assert_eq!(ended.ending, Ending::Exited { code: 6 });
    assert!(ended.log.trouble.unwrap().contains("No space left"));
    assert!(ended.log.bytes_lost > 1_000_000);
}

#[tokio::test]
async fn a_chatty_process_is_logged_completely_and_reports_its_growth() {
    let host = Host::new().await;
    let mut running = host.start("seq 100000; exit 0").await;
    let events = events_until_gone(&mut running).await;
    let log = host.log();
    assert_eq!(log.lines().count(), 100_000);
    let grew = events.iter().rev().find_map(|event| match event {
        ProcessEvent::LogGrew { bytes } => Some(*bytes),
        _ => None,
    });
    assert_eq!(grew, Some(log.len() as u64));
}

#[tokio::test]
async fn the_usage_counts_the_whole_tree() {
    let host = Host::new().await;
    let burn = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
    let ended = host.run(&format!("(bash -c '{burn}'; true); wait")).await;
    assert!(ended.usage.cpu_user_us > 20_000, "{ended:?}");
    assert!(ended.usage.rss_bytes_max > 1 << 20, "{ended:?}");
}

#[tokio::test]
async fn the_supervisor_told_to_end_stops_its_process_in_order() {
    let host = Host::new().await;
    let mut running = host.start("trap 'echo bye; exit 0' TERM; echo up; sleep 600 & wait").await;
    host.log_has("up").await;
    kill_process(host.supervisor_pid(), Signal::TERM).unwrap();
    let ended = ended(&mut running).await;
    assert!(matches!(ended.ending, Ending::Stopped { .. }), "{ended:?}");
    assert!(host.log().contains("bye"));
}

/// Stopped or not: whoever waits for the end of its output would wait for ever.
struct KilledAtLast(std::process::Child);

impl Drop for KilledAtLast {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).unwrap();
    }
}

/// A daemon's directories and its executor.
struct Host {
    dir: tempfile::TempDir,
    executor: Executor,
    isolation: Isolation,
    next: std::cell::Cell<u32>,
}

impl Host {
    /// As isolated as this machine allows.
    async fn new() -> Self {
        let mut host = Self::bare();
        host.isolation = host.executor.probe().await;
        host
    }

    /// `None`, with the reason printed, where it cannot be had and need not.
    async fn with(isolated: bool) -> Option<Self> {
        if !isolated {
            return Some(Self::bare());
        }
        let host = Self::new().await;
        if let Isolation::Shared { reason } = &host.isolation {
            println!("skipped: {reason}");
            let required = std::env::var("P2PIT_TEST_REQUIRE").unwrap_or_default();
            assert!(!required.contains("namespaces"), "namespaces are required: {reason}");
            return None;
        }
        Some(host)
    }

    fn bare() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Without namespaces, the job's user enters its directories on the usual way.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let run_root = dir.path().join("run");
        let executor = Executor::new(&run_root, test_supervisor()).unwrap();
        let isolation = Isolation::Shared { reason: "asked for by a test".into() };
        let host = Self { dir, executor, isolation, next: 0.into() };
        for path in [host.work_dir(), host.job_dir(), host.tmp_dir()] {
            fs::create_dir(&path).unwrap();
            prepare_ownership([path], RunAs::for_this_daemon()).unwrap();
        }
        host
    }

    fn work_dir(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    fn job_dir(&self) -> PathBuf {
        self.dir.path().join("job")
    }

    fn tmp_dir(&self) -> PathBuf {
        self.dir.path().join("tmp")
    }

    fn new_id(&self) -> ProcessId {
        self.next.set(self.next.get() + 1);
        self.last_id()
    }

    fn last_id(&self) -> ProcessId {
        ProcessId { job: "job".into(), attempt: self.next.get(), rank: 2 }
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join(format!("log-{}", self.next.get()))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn spec(&self, text: &str) -> ProcessSpec {
        ProcessSpec {
            command: Command::Direct { text: text.into() },
            work_dir: self.work_dir(),
            job_dir: self.job_dir(),
            tmp_dir: self.tmp_dir(),
            writable: Vec::new(),
            read_only: Vec::new(),
            env: BTreeMap::new(),
            log_path: self.log_path(),
            log_bytes_max: LOG_BYTES_MAX,
            time_limit_ms: None,
            deadline: Deadline(None),
            grace_ms: 5_000,
            run_as: RunAs::for_this_daemon(),
            isolation: self.isolation.clone(),
            sandbox: SandboxPlan::for_host([]),
        }
    }

    async fn start_spec(&self, mut spec: ProcessSpec) -> Running {
        let id = self.new_id();
        if spec.log_path.starts_with(self.dir.path()) {
            spec.log_path = self.log_path();
        }
        self.executor.start(&id, spec).await.unwrap()
    }

    async fn start(&self, text: &str) -> Running {
        self.start_spec(self.spec(text)).await
    }

    async fn run_spec(&self, spec: ProcessSpec) -> Ended {
        let mut running = self.start_spec(spec).await;
        ending_in(&events_until_gone(&mut running).await)
    }

    async fn run(&self, text: &str) -> Ended {
        self.run_spec(self.spec(text)).await
    }

    async fn until(&self, mut condition: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < SOON, "waited in vain; log: {}", self.log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn log_has(&self, text: &str) {
        self.until(|| self.log().contains(text)).await;
    }

    async fn past(&self, deadline: Deadline) {
        self.until(|| deadline.0.is_some_and(|at| clock::boot_ms() > at + 50)).await;
    }

    /// What runs [`WAITS_FOR_GO`] still does.
    async fn ends_by_itself(&self, running: &mut Running) {
        fs::write(self.work_dir().join("go"), "").unwrap();
        let ended = ended(running).await;
        assert_eq!(ended.ending, Ending::Exited { code: 4 });
        gone(running).await;
    }

    /// After a time in which no daemon asked.
    async fn ending_told_to_the_next_daemon(&self) -> Ending {
        self.until(|| self.executor.run_dir(&self.last_id()).read_ended().unwrap().is_some()).await;
        let ended = match self.adopt_only().await {
            Adopted::Ended(ended) => ended,
            Adopted::Running(mut running) => ending_in(&events_until_gone(&mut running).await),
        };
        ended.ending
    }

    async fn adopt_only(&self) -> Adopted {
        let mut found = self.executor.adopt().await.unwrap();
        let last = found.pop().expect("nothing to adopt").1;
        assert!(found.is_empty(), "{found:?}");
        last
    }

    fn tree(&self) -> run_dir::Tree {
        self.executor.run_dir(&self.last_id()).read_tree().unwrap().unwrap()
    }

    fn supervisor_pid(&self) -> Pid {
        let status = fs::read_to_string(format!("/proc/{}/status", self.tree().guard.pid)).unwrap();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
        Pid::from_raw(parent.trim().parse().unwrap()).unwrap()
    }

    fn kill_supervisor(&self) {
        kill_process(self.supervisor_pid(), Signal::KILL).unwrap();
    }

    /// A number of seconds that no other test sleeps.
    fn mark(&self) -> String {
        let unique = self.dir.path().metadata().map(|m| std::os::unix::fs::MetadataExt::ino(&m));
        format!("6{:09}", unique.unwrap() % 1_000_000_000)
    }

    fn count_sleeps(&self, mark: &str) -> usize {
        let is_ours = |entry: &fs::DirEntry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| line == format!("sleep\0{mark}\0").as_bytes())
        };
        fs::read_dir("/proc").unwrap().flatten().filter(is_ours).count()
    }
}

/// So many milliseconds from now.
fn in_ms(ms: u64) -> Deadline {
    Deadline(Some(clock::boot_ms() + ms))
}

fn is_ahead(deadline: Deadline) -> bool {
    deadline.0.is_some_and(|at| clock::boot_ms() < at)
}

/// What has to be done before a deadline that comes after the given time; where the machine
/// was too slow for it, which `None` says, it is done once more with twice of that.
async fn in_time<T>(attempt: impl AsyncFn(u64) -> Option<T>) -> T {
    let mut lead_ms = 500;
    loop {
        if let Some(done) = attempt(lead_ms).await {
            return done;
        }
        lead_ms *= 2;
        assert!(lead_ms < 100_000, "never in time");
    }
}

/// A test that failed leaves nothing running.
impl Drop for Host {
    fn drop(&mut self) {
        for attempt in 1..=self.next.get() {
            let id = ProcessId { attempt, ..self.last_id() };
            let tree = self.executor.run_dir(&id).read_tree();
            let Ok(Some(guard)) = tree.map(|tree| tree.and_then(|tree| tree.guard.open().ok()))
            else {
                continue;
            };
            if let Some(guard) = guard {
                // It may just have ended, which is as good.
                let _ = rustix::process::pidfd_send_signal(&guard, Signal::KILL);
            }
        }
    }
}

async fn next_event(running: &mut Running) -> Option<ProcessEvent> {
    tokio::time::timeout(SOON, running.events.recv()).await.expect("no event came")
}

async fn ended(running: &mut Running) -> Ended {
    loop {
        if let ProcessEvent::Ended(ended) = next_event(running).await.expect("no ending came") {
            return ended;
        }
    }
}

async fn gone(running: &mut Running) {
    while next_event(running).await.expect("the tree did not end") != ProcessEvent::Gone {}
}

async fn events_until_gone(running: &mut Running) -> Vec<ProcessEvent> {
    let mut events = Vec::new();
    while let Some(event) = next_event(running).await {
        events.push(event);
    }
    assert_eq!(events.last(), Some(&ProcessEvent::Gone), "{events:?}");
    events
}

fn ending_in(events: &[ProcessEvent]) -> Ended {
    let endings: Vec<&Ended> = events
        .iter()
        .filter_map(|event| match event {
            ProcessEvent::Ended(ended) => Some(ended),
            _ => None,
        })
        .collect();
    assert_eq!(endings.len(), 1, "{events:?}");
    endings[0].clone()
}
