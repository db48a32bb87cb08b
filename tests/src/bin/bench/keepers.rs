//! What it costs that several nodes keep a job: the same jobs, kept by three nodes, by the
//! first of these three alone, and by the only node of a pool of its own, in turns.
//!
//! With one keeper and with three the same daemon drives the jobs and the same nodes run
//! them: only the specs differ.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};
use p2pit_node::{
    api::types::{Journalled, Me, path},
    home::Home,
};
use p2pit_tests::{Node, Pool};

use crate::{
    Options,
    api::get,
    figures::{Times, cpu_seconds, load_average},
    submitter::Submitter,
    table::{Figures, Goal, Row, Unit},
};

/// Jobs one after the other before it is another's turn; one measures fsyncs by them.
const BLOCK: usize = 10;
const BLOCKS: usize = 30;
const BLOCKS_QUICK: usize = 10;
/// Jobs in flight at once, in each burst.
const JOBS: usize = 200;
const BURSTS: usize = 9;
const BURSTS_QUICK: usize = 3;
const WARM_UPS: usize = 1;
/// For what is done of a job after its submitter knows of its end, and is written then.
const SETTLE: Duration = Duration::from_millis(200);
const DONE_WITHIN: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// More than with one keeper, at the median.
const ADDED_GOAL_S: f64 = 0.025;
const PER_SECOND_GOAL: f64 = 100.0;

/// In bursts; each of the second kind has one simulated GPU and no core, so that nearly all
/// run at once where there are three nodes.
const REQUESTS: [(&str, &str); 2] = [
    ("[]", "200 jobs `[]` at once, three keepers"),
    ("[gpu]", "200 jobs `[gpu]` at once, three keepers"),
];

/// By whom jobs are kept.
struct Kept<'a> {
    name: &'static str,
    submitter: Submitter,
    /// Of the pool.
    daemons: &'a [Daemon],
    submitted_ms: Vec<f64>,
    done_ms: Vec<f64>,
    /// Of jobs one after the other, and of bursts.
    alone: Cost,
    bursts: Cost,
}

struct Daemon {
    home: Home,
    pid: u32,
}

/// What some jobs took of all daemons of the pool. Unlike times it hardly depends on what
/// else the machine does.
#[derive(Default)]
struct Cost {
    jobs: usize,
    journal: Journalled,
    cpu_s: f64,
}

/// What all daemons of a pool have done so far.
struct Done {
    journal: Journalled,
    cpu_s: f64,
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
pub(crate) fn run(options: &Options) -> Result<Vec<Row>> {
    let (blocks, bursts) =
        if options.quick { (BLOCKS_QUICK, BURSTS_QUICK) } else { (BLOCKS, BURSTS) };
    let load_before = load_average()?;
    let mut three = Pool::of(&["sim:64xv100"; 3]);
    let mut alone = Pool::of(&["sim:64xv100"]);
    let submitters: Result<Vec<Submitter>> =
        [&mut three, &mut alone].map(submitter).into_iter().collect();
    let [of_three, of_one] = <[Submitter; 2]>::try_from(submitters?)
        .map_err(|_| anyhow::anyhow!("two pools have two submitters"))?;
    let daemons: Result<Vec<Vec<Daemon>>> = [&three, &alone].map(daemons).into_iter().collect();
    let daemons = daemons?;
    let kept = |name, submitter, daemons| Kept {
        name,
        submitter,
        daemons,
        submitted_ms: Vec::new(),
        done_ms: Vec::new(),
        alone: Cost::default(),
        bursts: Cost::default(),
    };
    let mut all = [
        kept("three keepers", of_three.kept_by(3)?, &daemons[0]),
        kept("one of them", of_three.kept_by(1)?, &daemons[0]),
        kept("the only node of a pool", of_one, &daemons[1]),
    ];
    eprintln!("{} jobs one after the other, of each kind …", blocks * BLOCK);
    for block in 0..WARM_UPS + blocks {
        for n in order(block) {
            all[n].block(block >= WARM_UPS)?;
        }
    }
    let mut rows = Vec::new();
    let done = |kept: &Kept<'_>| {
        let mut figures = Figures::new(Unit::Seconds);
        kept.done_ms.iter().for_each(|ms| figures.add(ms / 1e3));
        figures
    };
    for other in &all[1..] {
        let row = Row::of("submit → done, three keepers", done(&all[0]));
        let row = row.beside(other.name, Ok(done(other)));
        rows.push(row.goal(Goal::Added(ADDED_GOAL_S)));
    }
    for (request, what) in REQUESTS {
        eprintln!("{bursts} bursts of {JOBS} jobs {request}, of each kind …");
        let mut rates = [(); 3].map(|()| Figures::new(Unit::JobsPerSecond));
        for burst in 0..WARM_UPS + bursts {
            for n in order(burst) {
                let rate = all[n].burst(request, burst >= WARM_UPS)?;
                if burst >= WARM_UPS {
                    rates[n].add(rate);
                }
            }
        }
        let [ours, others @ ..] = rates;
        for (other, rate) in all[1..].iter().zip(others) {
            let row = Row::of(what, ours.clone()).beside(other.name, Ok(rate));
            rows.push(row.goal(Goal::Figure(PER_SECOND_GOAL)));
        }
    }
    println!(
        "| kept by | submit → submitted: p50 | p95 | submit → done: p50 | p95 | fsyncs per job \
         of all nodes, entries per fsync, their processor time per job | in bursts |"
    );
    println!("|---|---|---|---|---|---|---|");
    for kept in all {
        println!("{}", kept.line()?);
    }
    println!("\nload of the machine: {load_before} before, {} after", load_average()?);
    Ok(rows)
}

/// Each is first as often as last.
fn order(turn: usize) -> [usize; 3] {
    if turn.is_multiple_of(2) { [0, 1, 2] } else { [2, 1, 0] }
}

/// Of a pool whose nodes know the code of its jobs.
fn submitter(pool: &mut Pool) -> Result<Submitter> {
    let client = pool.add_client("client");
    client.p2pit(&["run", "first", "[]", "-d", "true", "-l"]).ended(0);
    Submitter::new(&client, &pool.path().join("empty"), "[]")
}

fn daemons(pool: &Pool) -> Result<Vec<Daemon>> {
    let daemon = |node: &Node| {
        let home = Home::existing(node.home())?;
        let home = home.with_context(|| format!("{} has no home", node.name()))?;
        Ok(Daemon { home, pid: node.daemon().pid() })
    };
    pool.nodes().iter().map(daemon).collect()
}

impl Kept<'_> {
    fn done_so_far(&self) -> Result<Done> {
        thread::sleep(SETTLE);
        let mut all = Done { journal: Journalled::default(), cpu_s: 0.0 };
        for Daemon { home, pid } in self.daemons {
            let Journalled { entries, fsyncs } = get::<Me>(home, path::ME)?.journal;
            all.journal.entries += entries;
            all.journal.fsyncs += fsyncs;
            all.cpu_s += cpu_seconds(*pid)?;
        }
        Ok(all)
    }

    fn block(&mut self, counts: bool) -> Result<()> {
        let before = self.done_so_far()?;
        for _ in 0..BLOCK {
            let (submitted_ms, done_ms) = self.submitter.run_one("[]", "true")?;
            if counts {
                self.submitted_ms.push(submitted_ms);
                self.done_ms.push(done_ms);
            }
        }
        let after = self.done_so_far()?;
        if counts {
            self.alone.add(BLOCK, &before, &after);
        }
        Ok(())
    }

    /// Jobs in a second, from the first submission until the last is done.
    fn burst(&mut self, request: &str, counts: bool) -> Result<f64> {
        let before = self.done_so_far()?;
        let burst = self.submitter.submit(JOBS, JOBS, request, "true")?;
        let done_wall_ms = self.submitter.wait(&burst, DONE_WITHIN, LOOK_EVERY)?;
        let after = self.done_so_far()?;
        if counts {
            self.bursts.add(JOBS, &before, &after);
        }
        let took_ms = done_wall_ms.saturating_sub(burst.started_wall_ms);
        Ok(JOBS as f64 / (took_ms as f64 / 1e3))
    }

    fn line(self) -> Result<String> {
        let Self { name, submitted_ms, done_ms, alone, bursts, .. } = self;
        let mut line = format!("| {name} ");
        for times in [submitted_ms, done_ms] {
            let times = Times::of(times)?;
            let [p50, p95] = [50, 95].map(|p| times.percentile(p));
            line.push_str(&format!("| {p50:.1} ms | {p95:.1} ms "));
        }
        Ok(format!("{line}| {} | {} |", alone.cell(), bursts.cell()))
    }
}

impl Cost {
    fn add(&mut self, jobs: usize, before: &Done, after: &Done) {
        self.jobs += jobs;
        self.journal.entries += after.journal.entries - before.journal.entries;
        self.journal.fsyncs += after.journal.fsyncs - before.journal.fsyncs;
        self.cpu_s += after.cpu_s - before.cpu_s;
    }

    fn cell(&self) -> String {
        let Self { jobs, journal: Journalled { entries, fsyncs }, cpu_s } = self;
        let jobs = *jobs as f64;
        let (per_job, per_fsync) = (*fsyncs as f64 / jobs, *entries as f64 / *fsyncs as f64);
        format!("{per_job:.1}, {per_fsync:.1}, {:.1} ms", cpu_s * 1e3 / jobs)
    }
}
