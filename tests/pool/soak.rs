//! Many jobs on five nodes whose daemons are killed, one every five seconds, for as long as
//! `P2PIT_SOAK_SECONDS` says (60), with two jobs for every three seconds.
//!
//! What is promised, and how it is watched:
//!
//! - **Nothing is lost.** Every job that was said to be submitted ends, with the outcome that its
//!   processes had. These say themselves what they do, into a FIFO of the test, past p2pit.
//! - **Nothing runs twice at once.** Each process takes an exclusive lock on a file of the test
//!   that only its job and rank have; one that finds it taken reports that and fails.
//! - **Nothing is unreadable.** At the end `show` names two nodes or more that have what each
//!   process left. Each node's daemon is killed in turn, and what jobs left there is read at another
//!   one: the node that ran them is not asked. Then each log and each artifact is fetched with all
//!   nodes there, and compared.
//! - **Somebody drives on.** Now and then a daemon stays dead while the other keepers of a job
//!   that it drove are spared: another acts within 45 s.
//! - **Nothing grows**, neither a daemon that lives for long nor what the next one begins with.
//!   For a while after the last kill jobs are submitted as before, until each daemon is 40 s old.
//!   Each process that came to that age is judged by itself: one that grows in every part of its
//!   life leaks. Processes of the last third of the kills are compared with those of the first,
//!   since most do not live that long.
//!
//! `P2PIT_SOAK_SEED` decides who is killed when and which jobs there are; it is printed. By hand:
//!
//! ```sh
//! P2PIT_SOAK_SECONDS=300 cargo test -p p2pit-tests --test pool -- --nocapture soak::
//! ```
//!
//! With `P2PIT_SOAK_ALL_FAULTS=1` daemons are also stopped and cut off for a while, two times in three.

#![expect(clippy::print_stdout, reason = "a soak is worth its figures")]

mod growth;
mod held;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use self::growth::{Growth, JUDGED_FROM, Reading, median};
use p2pit_tests::{Node, Process, SOON, World, lines_of, mentioning, wait_until};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::Signal,
};
use serde_json::Value;

const NODES: usize = 5;
/// Between two kills.
const KILL_EVERY: Duration = Duration::from_secs(5);
/// Between two jobs.
const JOB_EVERY: Duration = Duration::from_millis(1500);
/// For so much of the time that kills take jobs are submitted when nobody is killed any more, and
/// for so long at the least.
const CALM_PART: u32 = 5;
const CALM_AT_LEAST: Duration = Duration::from_secs(20);
/// Commands that submit at the same time.
const SUBMITTERS: usize = 4;
/// Another keeper acts by then.
const DRIVEN_WITHIN: Duration = Duration::from_secs(45);
/// For how long one that stays dead is looked for a successor.
const LOOKED_FOR: Duration = Duration::from_secs(60);
/// When nobody is killed any more all jobs end by then.
const SETTLED: Duration = Duration::from_secs(240);
const SAMPLE_EVERY: Duration = Duration::from_secs(2);
/// A daemon that has just started has less than it will.
const GROWN_UP: Duration = Duration::from_secs(5);
/// Jobs of each node that are read while it is dead.
const READ_PER_NODE: usize = 3;
/// A tag that no job has which was drawn.
const WITNESSES: usize = 1_000_000;

/// What each process of a job does. A lock needs no right to write.
const SCRIPT: &str = r#"
exec 9< "/mnt/locks/$TAG.$RANK" || exit 97
if ! flock -n 9; then echo "twice $TAG $RANK" > /mnt/report; exit 98; fi
echo "begin $TAG $RANK" > /mnt/report
for n in $(seq 1 "$LINES_SAID"); do echo "line $n of $TAG"; done
seq -f "$TAG $RANK %g" 1 "$LINES_LEFT" > "$JOB_DIR/artifacts/out.$RANK"
sleep "$NAP"
code=0
if [ "$RANK" = 0 ] && [ ! -e "/mnt/again/$TAG" ]; then code=$CODE; fi
echo "end $TAG $RANK $code" > /mnt/report
exit "$code"
"#;

#[test]
fn nothing_is_lost_twice_or_unreadable_while_daemons_are_killed() {
    let seconds = number("P2PIT_SOAK_SECONDS").unwrap_or(60);
    let seed = number("P2PIT_SOAK_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
        now.as_secs()
    });
    println!("P2PIT_SOAK_SEED={seed} P2PIT_SOAK_SECONDS={seconds}");
    let Some(mut world) = World::of(&["sim:2xv100"; NODES]) else { return };
    world.add("watcher", &["--client"]);
    world.wait_until_assembled();
    let soak = Soak::new(&world, seed, Duration::from_secs(seconds));
    thread::scope(|scope| {
        scope.spawn(|| soak.hear());
        let submitting: Vec<_> =
            (0..SUBMITTERS).map(|_| scope.spawn(|| soak.submit_all())).collect();
        scope.spawn(|| soak.sample());
        // Whatever fails: the listener must end, or the scope would wait for it.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            soak.kill_all_the_time(scope);
            soak.submit_until(soak.calm());
            for it in submitting {
                it.join().expect("the submitters submit");
            }
            soak.settle();
        }));
        soak.submit_until(Duration::ZERO);
        soak.is_over.store(true, Ordering::Relaxed);
        soak.stop_listening();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    soak.judge();
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// One job that was wanted.
#[derive(Debug, Clone)]
struct Wanted {
    tag: usize,
    ranks: u32,
    /// What its first process ends with, until the test has heard of that.
    code: i32,
    retries: u32,
    lines: usize,
    left: usize,
    nap_ms: u64,
}

impl Wanted {
    fn drawn(tag: usize, random: &mut Random) -> Self {
        let kind = random.below(100);
        let ranks = match kind {
            0..55 | 92.. => 1,
            55..70 => 2,
            70..80 => 3,
            80..92 => 1 + random.below(2) as u32,
        };
        let (code, retries) = match kind {
            0..80 => (0, 0),
            80..92 => (3, 2),
            _ => (3, 0),
        };
        let (lines, left) = (1 + random.below(50) as usize, 1 + random.below(5000) as usize);
        Self { tag, ranks, code, retries, lines, left, nap_ms: 100 + random.below(6000) }
    }
}

/// What the processes of one rank said.
#[derive(Debug, Clone, Default)]
struct Told {
    begun: u32,
    codes: Vec<i32>,
}

#[derive(Debug, Default)]
struct Heard {
    /// By tag and rank.
    told: BTreeMap<(usize, u32), Told>,
    twice: Vec<String>,
}

/// Whether a node's daemon is there, and since when.
#[derive(Debug, Clone, Copy)]
enum Life {
    Up(Instant),
    Down,
}

#[derive(Debug)]
struct Sample {
    at: Duration,
    node: usize,
    /// Of the process.
    pid: u32,
    /// Of the process, since it was seen first.
    reading: Reading,
}

/// What came of the jobs.
#[derive(Debug, Default)]
struct Verdict {
    wrong: Vec<String>,
    by_outcome: BTreeMap<String, usize>,
    attempts: u32,
}

struct Soak<'a> {
    world: &'a World,
    nodes: &'a [Node],
    watcher: Node,
    lasts: Duration,
    /// By hand: daemons are stopped and cut off as well.
    all_faults: bool,
    began: Instant,
    seed: u64,
    /// Of the kills.
    random: Mutex<Random>,
    next: AtomicUsize,
    /// Since the beginning; `None` while daemons are killed.
    submits_until: Mutex<Option<Duration>>,
    /// By tag: the job and its id.
    submitted: Mutex<BTreeMap<usize, (Wanted, String)>>,
    /// By tag: what a command said that did not say it is submitted.
    unsubmitted: Mutex<BTreeMap<usize, String>>,
    heard: Mutex<Heard>,
    lives: Mutex<Vec<Life>>,
    kills: AtomicUsize,
    /// Daemons that are stopped or cut off.
    troubled: AtomicUsize,
    samples: Mutex<Vec<Sample>>,
    /// Seconds from a kill until another node drove a job.
    driven_after: Mutex<Vec<f64>>,
    is_over: AtomicBool,
    report: PathBuf,
}

impl<'a> Soak<'a> {
    fn new(world: &'a World, seed: u64, lasts: Duration) -> Self {
        let shared = world.shared();
        for name in ["locks", "again"] {
            let path = shared.join(name);
            fs::create_dir(&path).expect("the pool's directory can be used");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                .expect("the pool's directory can be used");
        }
        let report = shared.join("report");
        mknodat(CWD, &report, FileType::Fifo, Mode::RUSR, 0)
            .expect("the pool's directory can be used");
        // Jobs are other users, and see the directory read-only; a FIFO is written all the same.
        fs::set_permissions(&report, fs::Permissions::from_mode(0o666))
            .expect("the pool's directory can be used");
        Self {
            world,
            nodes: &world.nodes()[..NODES],
            watcher: world.named("watcher").clone(),
            lasts,
            all_faults: number("P2PIT_SOAK_ALL_FAULTS").is_some(),
            began: Instant::now(),
            seed,
            random: Mutex::new(Random(seed)),
            next: AtomicUsize::new(0),
            submits_until: Mutex::new(None),
            submitted: Mutex::default(),
            unsubmitted: Mutex::default(),
            heard: Mutex::default(),
            lives: Mutex::new(vec![Life::Up(Instant::now()); NODES]),
            kills: AtomicUsize::new(0),
            troubled: AtomicUsize::new(0),
            samples: Mutex::default(),
            driven_after: Mutex::default(),
            is_over: AtomicBool::new(false),
            report,
        }
    }

    // ---- what processes say ------------------------------------------------------------

    fn hear(&self) {
        // Both ways: it never ends for want of a writer.
        let report = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.report)
            .expect("the pool's directory can be used");
        for line in BufReader::new(report).lines() {
            let line = line.expect("the pool's directory can be used");
            let words: Vec<&str> = line.split(' ').collect();
            let mut heard = lock(&self.heard);
            let number = |n: usize| words.get(n).and_then(|word| word.parse::<u32>().ok());
            let told = number(1).zip(number(2)).map(|(tag, rank)| (tag as usize, rank));
            match (words[0], told) {
                ("stop", _) => return,
                ("begin", Some(it)) => heard.told.entry(it).or_default().begun += 1,
                ("end", Some(it)) => {
                    let code = number(3).expect("a code is told") as i32;
                    heard.told.entry(it).or_default().codes.push(code);
                    if code != 0 {
                        // The next attempt does better.
                        File::create(self.world.shared().join(format!("again/{}", it.0)))
                            .expect("the pool's directory can be used");
                    }
                }
                _ => heard.twice.push(line),
            }
        }
    }

    fn stop_listening(&self) {
        OpenOptions::new()
            .write(true)
            .open(&self.report)
            .expect("the pool's directory can be used")
            .write_all(b"stop\n")
            .expect("the pool's directory can be used");
    }

    // ---- submitting --------------------------------------------------------------------

    /// How long jobs are submitted without kills.
    fn calm(&self) -> Duration {
        (self.lasts / CALM_PART).max(CALM_AT_LEAST)
    }

    /// From now on jobs are submitted for so long.
    fn submit_until(&self, more: Duration) {
        *lock(&self.submits_until) = Some(self.began.elapsed() + more);
    }

    fn submit_all(&self) {
        loop {
            let tag = self.next.fetch_add(1, Ordering::Relaxed);
            let due = JOB_EVERY * u32::try_from(tag).expect("it is a small number");
            thread::sleep((self.began + due).saturating_duration_since(Instant::now()));
            if lock(&self.submits_until).is_some_and(|until| due >= until) {
                return;
            }
            // Of its own: the jobs do not depend on who came first.
            let mut random = Random(self.seed.rotate_left(32) ^ tag as u64);
            let wanted = Wanted::drawn(tag, &mut random);
            let at = random.below(NODES as u64 + 1);
            let at = usize::try_from(at).expect("it is a small number");
            let is_up = |at: usize| matches!(lock(&self.lives)[at], Life::Up(_));
            let node = self.nodes.get(at).filter(|_| is_up(at)).unwrap_or(&self.watcher);
            self.submit(node, wanted);
        }
    }

    /// Submits one job, at a node that may be killed meanwhile.
    fn submit(&self, node: &Node, wanted: Wanted) -> Option<String> {
        let Wanted { tag, ranks, code, retries, lines, left, nap_ms } = &wanted;
        for rank in 0..*ranks {
            let lock = self.world.shared().join(format!("locks/{tag}.{rank}"));
            File::create(&lock).expect("the pool's directory can be used");
            fs::set_permissions(&lock, fs::Permissions::from_mode(0o644))
                .expect("the pool's directory can be used");
        }
        let (title, request) = (format!("Job {tag}"), format!("{ranks}:[v100]"));
        let nap = format!("{}.{:03}", nap_ms / 1000, nap_ms % 1000);
        let mut args = vec!["run".to_owned(), title, request, "-d".into(), SCRIPT.into()];
        args.extend(["--retries".into(), retries.to_string()]);
        for (name, value) in [
            ("TAG", tag.to_string()),
            ("LINES_SAID", lines.to_string()),
            ("LINES_LEFT", left.to_string()),
            ("NAP", nap),
            ("CODE", code.to_string()),
        ] {
            args.extend(["--env".into(), format!("{name}={value}")]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let ended = node.p2pit(&args);
        if ended.code == 0 {
            let id = ended.stdout.trim_end().to_owned();
            lock(&self.submitted).insert(*tag, (wanted, id.clone()));
            return Some(id);
        }
        let said = format!("at {}, with {}: {}", node.name(), ended.code, ended.stderr.trim_end());
        lock(&self.unsubmitted).insert(*tag, said);
        None
    }

    // ---- killing -----------------------------------------------------------------------

    /// In turns: for a while all come back soon, then one stays dead.
    fn kill_all_the_time<'scope>(&'scope self, scope: &'scope thread::Scope<'scope, '_>) {
        let mut until = LOOKED_FOR.min(self.lasts / 4);
        loop {
            while self.began.elapsed() < until {
                self.kill_one(scope, &BTreeSet::new());
            }
            if until == self.lasts {
                break;
            }
            self.leave_one_dead(scope);
            until = (self.began.elapsed() + LOOKED_FOR).min(self.lasts);
        }
        self.wait_for_all();
    }

    fn wait_for_all(&self) {
        wait_until("every daemon is there", SOON, || {
            let are_up = lock(&self.lives).iter().all(|life| matches!(life, Life::Up(_)));
            (are_up && self.troubled.load(Ordering::Relaxed) == 0).then_some(())
        });
    }

    /// Kills the daemon of a node that drives jobs, and measures when others drive them. Those
    /// that keep them are spared, the other two nodes are not.
    fn leave_one_dead<'scope>(&'scope self, scope: &'scope thread::Scope<'scope, '_>) {
        self.wait_for_all();
        let victim =
            usize::try_from(lock(&self.random).below(NODES as u64)).expect("it is a small number");
        let node = &self.nodes[victim];
        let tag = WITNESSES + self.kills.load(Ordering::Relaxed);
        let nap_ms = u64::try_from(LOOKED_FOR.as_millis()).expect("it is a small number");
        let witness = Wanted { tag, ranks: 1, code: 0, retries: 0, lines: 3, left: 3, nap_ms };
        let witness = self.submit(node, witness).expect("nobody was killed");
        let keepers = |job: &Value| -> BTreeSet<String> {
            let keepers = job["keepers"].as_array().into_iter().flatten();
            keepers.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let kept_by = keepers(&node.job(&witness));
        let spared: BTreeSet<usize> = (0..NODES)
            .filter(|n| *n != victim && kept_by.contains(self.nodes[*n].name()))
            .collect();
        let asked = &self.nodes[*spared.first().expect("three nodes keep it")];
        let driven: BTreeSet<String> = jobs(asked)
            .iter()
            .filter(|job| job["state"] != "DONE" && job["steward"] == node.name())
            .filter(|job| keepers(job) == kept_by)
            .filter_map(|job| Some(job["id"].as_str()?.to_owned()))
            .collect();
        assert!(driven.contains(&witness), "{driven:?}");

        self.take_down(victim);
        let (killed, killed_at, mut left) = (Instant::now(), seconds_of_day(), driven);
        let mut next_kill = killed + KILL_EVERY;
        let also: BTreeSet<usize> = spared.iter().copied().chain([victim]).collect();
        while !left.is_empty() && killed.elapsed() < LOOKED_FOR {
            if Instant::now() >= next_kill && self.began.elapsed() < self.lasts {
                next_kill += KILL_EVERY;
                self.kill_drawn(scope, &also);
            }
            // To the millisecond, whatever a command takes.
            for (job, at) in spared.iter().flat_map(|n| takeovers(&self.nodes[*n])) {
                let after = (at - killed_at).rem_euclid(DAY_S);
                if after < LOOKED_FOR.as_secs_f64() && left.remove(&job) {
                    lock(&self.driven_after).push(after);
                }
            }
            thread::sleep(Duration::from_millis(250));
        }
        self.bring_up(victim);
        assert!(left.is_empty(), "nobody drives {left:?} since {} was killed", node.name());
    }

    /// One kill, and the time until the next.
    fn kill_one<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        spared: &BTreeSet<usize>,
    ) {
        let next = Instant::now() + KILL_EVERY;
        self.kill_drawn(scope, spared);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }

    /// Kills a daemon, which comes back after a while; nobody where the drawn one is down.
    fn kill_drawn<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        spared: &BTreeSet<usize>,
    ) {
        let (victim, away, how) = {
            let mut random = lock(&self.random);
            let others: Vec<usize> = (0..NODES).filter(|n| !spared.contains(n)).collect();
            let victim = others[random.below(others.len() as u64) as usize];
            // As long as a service manager takes, or somebody who has to notice first.
            let most = if random.below(4) == 0 { 15_000 } else { 2_000 };
            (victim, Duration::from_millis(random.below(most)), random.below(3))
        };
        let node = &self.nodes[victim];
        if self.all_faults && how > 0 {
            // Alive, but nobody hears of it; or it hears of nobody.
            let name = node.name();
            let stopped = (how == 1).then(|| node.daemon_process()).flatten();
            println!(
                "{:6.1} s: {name} is {}",
                self.seconds(),
                ["", "stopped", "cut off"][how as usize]
            );
            match &stopped {
                Some(daemon) => daemon.signal(Signal::STOP),
                None => self.world.isolate(name),
            }
            self.troubled.fetch_add(1, Ordering::Relaxed);
            scope.spawn(move || {
                thread::sleep(away);
                match stopped {
                    Some(daemon) => daemon.signal(Signal::CONT),
                    None => self.world.heal_one(name),
                }
                self.troubled.fetch_sub(1, Ordering::Relaxed);
            });
        } else if self.take_down(victim) {
            scope.spawn(move || {
                thread::sleep(away);
                self.bring_up(victim);
            });
        }
    }

    fn take_down(&self, victim: usize) -> bool {
        let node = &self.nodes[victim];
        let mut lives = lock(&self.lives);
        if matches!(lives[victim], Life::Down) {
            return false;
        }
        lives[victim] = Life::Down;
        drop(lives);
        self.kills.fetch_add(1, Ordering::Relaxed);
        let daemon = node.daemon_process();
        println!("{:6.1} s: kill -9 of {}", self.seconds(), node.name());
        daemon.unwrap_or_else(|| panic!("the daemon of {} is gone by itself", node.name())).kill();
        true
    }

    fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    fn bring_up(&self, victim: usize) {
        self.nodes[victim].restart();
        lock(&self.lives)[victim] = Life::Up(Instant::now());
    }

    // ---- measuring ---------------------------------------------------------------------

    fn sample(&self) {
        let mut first_seen = BTreeMap::new();
        while !self.is_over.load(Ordering::Relaxed) {
            for node in 0..=NODES {
                let daemon = self.nodes.get(node).unwrap_or(&self.watcher).daemon_process();
                let Some(daemon) = daemon else { continue };
                let (at, pid) = (self.began.elapsed(), daemon.pid());
                let age = at - *first_seen.entry((node, pid)).or_insert(at);
                // It may just be gone.
                let Some((rss_kib, fds)) = daemon.rss_kib().zip(daemon.descriptors()) else {
                    continue;
                };
                let fds = fds as u64;
                let reading = Reading { age, rss_kib, fds };
                lock(&self.samples).push(Sample { at, node, pid, reading });
            }
            thread::sleep(SAMPLE_EVERY);
        }
    }

    // ---- judging -----------------------------------------------------------------------

    fn settle(&self) {
        self.world.wait_until_assembled_within(SETTLED);
        let since = Instant::now();
        let mut open = Vec::new();
        while since.elapsed() < SETTLED {
            open = jobs(&self.nodes[0]);
            open.retain(|job| job["state"] != "DONE");
            if open.is_empty() {
                println!(
                    "all jobs were over {:.1} s after the last was submitted",
                    since.elapsed().as_secs_f64()
                );
                // A sample comes after that age.
                let grown_old = JUDGED_FROM + 2 * SAMPLE_EVERY;
                wait_until("every daemon is as old as it is judged", SETTLED, || {
                    let old = |life: &Life| matches!(life, Life::Up(since) if since.elapsed() > grown_old);
                    lock(&self.lives).iter().all(old).then_some(())
                });
                let supervises = |it: &Process| it.command_line().contains(&"supervise".into());
                wait_until("nothing of the jobs is left", SOON, || {
                    (!mentioning(self.world.path()).iter().any(supervises)).then_some(())
                });
                return;
            }
            thread::sleep(Duration::from_millis(500));
        }
        for job in &open {
            let id = job["id"].as_str().unwrap_or_default();
            println!("not over: {job:#}\n{}", self.nodes[0].p2pit(&["why", id]).stdout);
        }
        panic!("{} jobs do not end", open.len());
    }

    fn judge(&self) {
        let submitted = lock(&self.submitted).clone();
        let unsubmitted = lock(&self.unsubmitted).clone();
        let (shown, until) = (Mutex::new(BTreeMap::new()), Instant::now() + SOON);
        of_each(&submitted.values().collect::<Vec<_>>(), |(wanted, id)| {
            let job = self.shown(wanted, id, until);
            lock(&shown).insert(wanted.tag, job);
        });
        let shown = shown.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Before anybody has read anything: no node has what it has from that.
        let unreadable = self.read_without_runners(&submitted, &shown);
        let verdict = Mutex::new(Verdict { wrong: unreadable, ..Verdict::default() });
        of_each(&submitted.values().collect::<Vec<_>>(), |(wanted, id)| {
            match &shown[&wanted.tag] {
                Ok(job) => self.judge_one(wanted, id, job, &verdict),
                Err(lost) => lock(&verdict).wrong.push(lost.clone()),
            }
        });
        let Verdict { mut wrong, by_outcome, attempts } =
            verdict.into_inner().unwrap_or_else(PoisonError::into_inner);
        let heard = lock(&self.heard);
        wrong.extend(heard.twice.iter().cloned());
        // Of the others nothing was promised; what began all the same is over.
        for (tag, said) in &unsubmitted {
            let began = heard.told.contains_key(&(*tag, 0));
            println!("job {tag} was not said to be submitted (ran: {began}) {said}");
        }
        let samples = lock(&self.samples);
        wrong.extend(self.growth(&samples));
        let mut driven = lock(&self.driven_after).clone();
        driven.sort_by(f64::total_cmp);
        println!("driven by another node after a kill, in s: {driven:.1?}");
        if let Some(last) = driven.last().filter(|last| **last > DRIVEN_WITHIN.as_secs_f64()) {
            wrong.push(format!("a job was driven by nobody for {last:.1} s"));
        }
        assert!(!driven.is_empty(), "no take-over was seen: nothing was tried");
        let taken_over: usize = self.nodes.iter().map(|node| takeovers(node).len()).sum();
        println!(
            "{} kills, {} jobs submitted, {} not; {attempts} attempts, {} processes begun, {} \
             take-overs; outcomes {by_outcome:?}",
            self.kills.load(Ordering::Relaxed),
            submitted.len(),
            unsubmitted.len(),
            heard.told.values().map(|told| told.begun).sum::<u32>(),
            taken_over,
        );
        assert!(wrong.is_empty(), "{} things are wrong:\n{}", wrong.len(), wrong.join("\n"));
    }

    /// A job as a node shows it, if possible once it names enough nodes that have what it left:
    /// one that came back last may still copy it.
    fn shown(&self, wanted: &Wanted, id: &str, until: Instant) -> Result<Value, String> {
        let node = &self.nodes[wanted.tag % NODES];
        loop {
            let ended = node.p2pit(&["show", &format!("job:{id}"), "--json"]);
            let job = serde_json::from_str::<Value>(&ended.stdout)
                .map_err(|_| format!("lost: job {}, {id}: {}", wanted.tag, ended.stderr))?;
            if held::held_by_few(&job).is_empty() || Instant::now() > until {
                return Ok(job);
            }
            thread::sleep(Duration::from_secs(1));
        }
    }

    /// Kills one daemon after the other, and reads what jobs left there at the node whose daemon
    /// was killed before; what could not be read. That one is started only then: with a connection
    /// to the dead one from before, each command would wait until that is given up.
    fn read_without_runners(
        &self,
        submitted: &BTreeMap<usize, (Wanted, String)>,
        shown: &BTreeMap<usize, Result<Value, String>>,
    ) -> Vec<String> {
        let wrong = Mutex::new(Vec::new());
        let (began, mut read) = (Instant::now(), 0);
        let mut reader = &self.nodes[NODES - 1];
        reader.crash();
        for node in self.nodes {
            node.daemon_process().iter().for_each(Process::kill);
            reader.restart();
            wait_until(&format!("{} sees the others", reader.name()), SOON, || {
                let seen = reader.nodes();
                let mut others = self.nodes.iter().filter(|it| it.name() != node.name());
                let here = ["self", "online"];
                others
                    .all(|it| here.iter().any(|here| seen[it.name()]["reach"] == *here))
                    .then_some(())
            });
            let is_there = |tag: &usize| {
                shown[tag].as_ref().is_ok_and(|job| {
                    job["state"] == "DONE"
                        && held::has_left_at(job, node.name())
                        && held::held_by_few(job).is_empty()
                })
            };
            let mut there: Vec<usize> = shown.keys().copied().filter(is_there).collect();
            let mut chosen = Vec::new();
            while chosen.len() < READ_PER_NODE && !there.is_empty() {
                let drawn = lock(&self.random).below(there.len() as u64) as usize;
                chosen.push(there.swap_remove(drawn));
            }
            if chosen.is_empty() {
                lock(&wrong).push(format!("no job left anything on {}: not tried", node.name()));
            }
            read += chosen.len();
            of_each(&chosen, |tag| {
                let (wanted, id) = &submitted[&tag];
                let unread = self.unreadable(reader, wanted, id, self.is_well(wanted));
                let dead = node.name();
                lock(&wrong).extend(unread.iter().map(|it| format!("with {dead} dead: {it}")));
            });
            assert!(node.daemon_process().is_none(), "{} is back by itself", node.name());
            reader = node;
        }
        reader.restart();
        self.world.wait_until_assembled();
        println!(
            "{read} jobs were read while the daemon of a node that ran them was dead, in {:.1} s",
            began.elapsed().as_secs_f64()
        );
        wrong.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self, tag: usize, rank: u32) -> Told {
        lock(&self.heard).told.get(&(tag, rank)).cloned().unwrap_or_default()
    }

    /// Whether all processes of a job did what they were to do.
    fn is_well(&self, wanted: &Wanted) -> bool {
        (0..wanted.ranks).all(|rank| self.told(wanted.tag, rank).codes.last() == Some(&0))
    }

    fn judge_one(&self, wanted: &Wanted, id: &str, job: &Value, verdict: &Mutex<Verdict>) {
        let tag = wanted.tag;
        let node = &self.nodes[tag % NODES];
        let outcome = job["outcome"].as_str().unwrap_or_default().to_owned();
        let attempt = u32::try_from(job["attempt"].as_u64().unwrap_or_default())
            .expect("it is a small number");
        let told = |rank| self.told(tag, rank);
        let first = told(0).codes.last().copied();
        let all_well = self.is_well(wanted);
        let fits = match outcome.as_str() {
            "succeeded" => all_well,
            "failed(3)" => first == Some(3) && attempt > wanted.retries,
            _ => false,
        };
        let mut wrong = self.unreadable(node, wanted, id, all_well);
        if job["state"] != "DONE" || !fits {
            let told: Vec<Told> = (0..wanted.ranks).map(told).collect();
            wrong.push(format!("job {tag} does not fit what it did: {told:?}: {job:#}"));
        }
        if (0..wanted.ranks).any(|rank| told(rank).begun > attempt) {
            wrong.push(format!("job {tag} began more often than it was tried: {job:#}"));
        }
        let few = held::held_by_few(job);
        match held::excuse(job) {
            _ if few.is_empty() => {}
            Some(reason) => println!("job {tag} is on {few:?} alone: {reason}"),
            None => wrong.push(format!("job {tag} is on {few:?} alone: {job:#}")),
        }
        let mut verdict = lock(verdict);
        verdict.attempts += attempt;
        *verdict.by_outcome.entry(outcome).or_default() += 1;
        verdict.wrong.extend(wrong);
    }

    /// What of a job's log and artifacts is not there as it was written.
    fn unreadable(&self, node: &Node, wanted: &Wanted, id: &str, all_well: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        let log = node.p2pit(&["log", id]);
        let tag = wanted.tag;
        let expected: Vec<String> =
            (1..=wanted.lines).map(|n| format!("line {n} of {tag}")).collect();
        for rank in 0..wanted.ranks {
            let said = lines_of(&log.stdout, rank);
            // One of a gang that failed may have been ended before it said all.
            let is_there =
                said.len() >= expected.len() && said[said.len() - expected.len()..] == expected[..];
            if log.code != 0 || (!is_there && (all_well || rank == 0)) {
                wrong.push(format!(
                    "unreadable: the log of job {tag}, process {rank}, at {}: {said:?} {}",
                    node.name(),
                    log.stderr
                ));
            }
        }
        for rank in (0..wanted.ranks).filter(|rank| all_well || *rank == 0) {
            let copied = node.p2pit(&["cp", id, &format!("artifacts/out.{rank}"), "-"]);
            let lines: String = (1..=wanted.left).map(|n| format!("{tag} {rank} {n}\n")).collect();
            if copied.code != 0 || copied.stdout != lines {
                wrong.push(format!(
                    "unreadable: what process {rank} of job {tag} left, at {}: {} of {} bytes, {}",
                    node.name(),
                    copied.stdout.len(),
                    lines.len(),
                    copied.stderr
                ));
            }
        }
        wrong
    }

    /// Memory and descriptors by node, and where they grew.
    fn growth(&self, samples: &[Sample]) -> Vec<String> {
        let mut wrong = Vec::new();
        let more = |parts: &[u64]| parts[parts.len() - 1] as i64 - parts[0] as i64;
        for node in 0..=NODES {
            let name = self.nodes.get(node).unwrap_or(&self.watcher).name();
            let of: Vec<&Sample> = samples.iter().filter(|it| it.node == node).collect();
            let mut processes: BTreeMap<u32, Vec<Reading>> = BTreeMap::new();
            for sample in &of {
                processes.entry(sample.pid).or_default().push(sample.reading);
            }
            let old: Vec<(Growth, &[Reading])> = processes
                .values()
                .filter_map(|readings| Some((Growth::of(readings)?, &readings[..])))
                .collect();
            for (it, readings) in &old {
                println!(
                    "{name}, a process that lived {} s: {:+.1} MiB, {:+} descriptors; MiB of each \
                     ten seconds: {}",
                    it.lived.as_secs(),
                    more(&it.rss_kib) as f64 / 1024.0,
                    more(&it.fds),
                    growth::course(readings)
                );
                wrong.extend(it.complaint().map(|grew| format!("a process of {name} {grew}")));
            }
            if old.is_empty() {
                wrong.push(format!("no process of {name} was watched for long: not tried"));
            }
            let grown: Vec<&Sample> =
                of.into_iter().filter(|it| it.reading.age > GROWN_UP).collect();
            let series: Vec<String> = grown
                .chunks(grown.len().div_ceil(12).max(1))
                .map(|part| format!("{:.0}/{}", rss_of(part) as f64 / 1024.0, fds_of(part)))
                .collect();
            println!("{name}, MiB/descriptors: {}", series.join(" "));
            let [first, _, last] = [0, 1, 2].map(|third| {
                let (from, to) = (self.lasts * third / 3, self.lasts * (third + 1) / 3);
                let within = grown.iter().filter(|it| it.at >= from && it.at < to);
                within.copied().collect::<Vec<_>>()
            });
            if first.is_empty() || last.is_empty() {
                continue;
            }
            let (rss, rss_then) = (rss_of(&first), rss_of(&last));
            // Records of finished jobs stay; a leak would not stop at these.
            if rss_then > rss * 3 / 2 + (16 << 10) {
                wrong.push(format!("{name} grew from {rss} to {rss_then} KiB"));
            }
            let (fds, fds_then) = (fds_of(&first), fds_of(&last));
            if fds_then > fds + 16 {
                wrong.push(format!("{name} had {fds} descriptors, then {fds_then}"));
            }
        }
        wrong
    }
}

fn rss_of(samples: &[&Sample]) -> u64 {
    median(samples.iter().map(|it| it.reading.rss_kib).collect())
}

fn fds_of(samples: &[&Sample]) -> u64 {
    median(samples.iter().map(|it| it.reading.fds).collect())
}

/// Some at a time.
fn of_each<T: Copy + Send + Sync>(all: &[T], what: impl Fn(T) + Sync) {
    let queue = Mutex::new(all.iter().copied());
    thread::scope(|scope| {
        for _ in 0..SUBMITTERS {
            scope.spawn(|| {
                loop {
                    // Let go of before it is carried out.
                    let next = lock(&queue).next();
                    let Some(next) = next else { return };
                    what(next);
                }
            });
        }
    });
}

/// The jobs that a node knows; none where it does not answer.
fn jobs(node: &Node) -> Vec<Value> {
    let ended = node.p2pit(&["show", "jobs", "--json"]);
    serde_json::from_str(&ended.stdout).unwrap_or_default()
}

/// The jobs that this node took over, and when, in seconds of the day: what its log says.
fn takeovers(node: &Node) -> Vec<(String, f64)> {
    let log = fs::read_to_string(node.home().join("daemon.log")).unwrap_or_default();
    let lines = log.lines().filter(|line| line.contains("took the job over"));
    let read = |line: &str| {
        let (_, time) = line.split_once('T')?;
        let mut parts = time.split_once('Z')?.0.split(':');
        let mut next = || parts.next()?.parse::<f64>().ok();
        let at = next()? * 3600.0 + next()? * 60.0 + next()?;
        let (_, job) = line.split_once("job=")?;
        Some((job.split(' ').next()?.to_owned(), at))
    };
    lines.filter_map(read).collect()
}

const DAY_S: f64 = 86_400.0;

fn seconds_of_day() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    now.as_secs_f64() % DAY_S
}

fn lock<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Splitmix64: the same for the same seed, on every machine.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
