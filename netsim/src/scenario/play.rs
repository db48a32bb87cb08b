//! Playing a story: its steps one after the other, and then the end of every fault and of
//! every job.

use std::collections::BTreeMap;

use p2pit_protocol::{JobId, job::Policy};

use super::{
    condition::Cast,
    format::{Condition, Cut, Deed, Lose, Moment, Side, Span, Step},
    hand::{Filter, Hand, Loss, Wanted},
    read::{Variant, deeds},
};
use crate::{
    check::Violation,
    machine::{Disk, Still},
    options::Options,
    run::{Ending, Report, caught, finish},
    workload::{Behaviour, WARM_UP_MS},
    world::{Down, World},
};

/// How long a `when` may take to come true, where it does not say.
pub const WHEN_MS: u64 = 600_000;

/// The rule that is broken where an expectation is not met.
pub const RULE: &str = "story";

impl Variant {
    /// The options of a world for this story.
    #[must_use]
    pub fn options(&self, seed: u64) -> Options {
        let inventory: Vec<&str> = self.file.pool.nodes.iter().map(String::as_str).collect();
        let calm = Options::calm(seed, &inventory);
        let network = &self.file.network;
        Options {
            clients: self.file.pool.clients,
            users: self.file.pool.users,
            latency_ms_min: network.latency.map_or(calm.latency_ms_min, |span| span.0),
            latency_ms_spread: network.spread.map_or(calm.latency_ms_spread, |span| span.0),
            jitter_ms_max: network.jitter.map_or(calm.jitter_ms_max, |span| span.0),
            loss_permille: network.loss_permille,
            duplicate_permille: network.duplicate_permille,
            gossip_loss_permille: network.gossip_loss_permille,
            ..calm
        }
    }
}

/// Play a story in a world of `options`, which are its own ([`Variant::options`]) but for
/// what the caller changed.
///
/// # Errors
/// The world cannot be made: a mistake of the simulator.
pub fn play(variant: &Variant, options: Options, keep_lines: bool) -> anyhow::Result<Report> {
    let mut world = World::new(options, keep_lines)?;
    let hand = Hand::default();
    hand.lay_on(&mut world);
    let stores = world.machines.iter().map(|machine| machine.member.store).collect();
    let cast = Cast { variant, tasks: BTreeMap::new(), hand, stores };
    let mut play = Play { cast, world, start_ms: 0, backups: BTreeMap::new() };
    let ending = caught(|| match play.whole() {
        Ok(stuck) if stuck.is_empty() => Ending::Fine,
        Ok(stuck) => Ending::Stuck(stuck),
        Err(Unmet::Never(what)) => Ending::Stuck(vec![what]),
        Err(Unmet::Broken(violation)) => Ending::Violation(violation),
    });
    Ok(Report::of(ending, play.world))
}

/// A story under way.
struct Play<'v> {
    cast: Cast<'v>,
    world: World,
    start_ms: u64,
    /// What was put aside of disks, by machine.
    backups: BTreeMap<usize, Disk>,
}

/// Why a story does not go on.
enum Unmet {
    /// What it waits for does not come.
    Never(String),
    /// A rule is broken, or what it expects is not so.
    Broken(Violation),
}

impl From<Violation> for Unmet {
    fn from(violation: Violation) -> Self {
        Self::Broken(violation)
    }
}

impl<'v> Play<'v> {
    /// What is left at the end, in words.
    fn whole(&mut self) -> Result<Vec<String>, Unmet> {
        self.pass(WARM_UP_MS)?;
        self.start_ms = self.world.now_ms();
        let variant = self.cast.variant;
        for (index, step) in variant.file.steps.iter().enumerate() {
            self.step(index, step)?;
        }
        self.world.heal();
        Ok(finish(&mut self.world)?)
    }

    fn step(&mut self, index: usize, step: &'v Step) -> Result<(), Unmet> {
        if let Some(at) = step.at {
            let due_ms = self.start_ms + at.0;
            if due_ms < self.world.now_ms() {
                let late_ms = self.world.now_ms() - due_ms;
                return Err(Unmet::Never(
                    self.at(index, &format!("it is {late_ms} ms too late for `at: {at}`")),
                ));
            }
            self.pass(due_ms - self.world.now_ms())?;
        }
        if let Some(when) = &step.when {
            self.wait(index, when)?;
        }
        if let Some(after) = step.after {
            self.pass(after.0)?;
        }
        self.act(index, step)
    }

    // ---- waiting ----------------------------------------------------------------------

    fn wait(&mut self, index: usize, when: &Condition) -> Result<(), Unmet> {
        let within_ms = when.within.map_or(WHEN_MS, |within| within.0);
        let cast = &self.cast;
        let came = if let Some(name) = &when.message {
            let wanted = Wanted {
                name: name.0.0,
                moment: when.moment.map_or(Moment::Sent, |moment| moment.0),
                nth: when.nth.unwrap_or(1),
                filter: None,
                seen: 0,
            };
            cast.hand.want(Some(wanted));
            let came = self.world.run_until(within_ms, |world| {
                cast.hand.aim(filter(cast, when, world));
                cast.hand.came(world.delivered.as_ref())
            });
            cast.hand.want(None);
            came?
        } else {
            self.world.run_until(within_ms, |world| when.holds(cast, world).is_ok())?
        };
        if came {
            return Ok(());
        }
        let lacks = match (&when.message, when.holds(cast, &self.world)) {
            (Some(name), _) => format!("no message `{}` came that is meant", name.0.0),
            (None, Err(what)) => what,
            (None, Ok(())) => "it came true too late".to_owned(),
        };
        Err(Unmet::Never(self.at(index, &lacks)))
    }

    fn expect(&mut self, index: usize, expected: &Condition) -> Result<(), Unmet> {
        let cast = &self.cast;
        if let Some(within) = expected.within {
            self.world.run_until(within.0, |world| expected.holds(cast, world).is_ok())?;
        }
        self.must_hold(index, expected)?;
        let Some(stays) = expected.stays else { return Ok(()) };
        let cast = &self.cast;
        self.world.run_until(stays.0, |world| expected.holds(cast, world).is_err())?;
        self.must_hold(index, expected)
    }

    fn must_hold(&self, index: usize, expected: &Condition) -> Result<(), Unmet> {
        expected.holds(&self.cast, &self.world).map_err(|what| {
            Unmet::Broken(Violation {
                rule: RULE,
                at_ms: self.world.now_ms(),
                job: expected.job.as_ref().and_then(|name| self.cast.job(name, &self.world)),
                text: self.at(index, &what),
            })
        })
    }

    fn pass(&mut self, ms: u64) -> Result<(), Violation> {
        self.world.run_until(ms, |_| false).map(|_| ())
    }

    // ---- acting -----------------------------------------------------------------------

    fn act(&mut self, index: usize, step: &'v Step) -> Result<(), Unmet> {
        if let Some(name) = &step.submit {
            self.submit(name);
        }
        if let Some(name) = &step.stop {
            self.world.stop(self.cast.tasks[name.as_str()]);
        }
        for (name, undo) in [(&step.remove, false), (&step.restore, true)] {
            if let Some(name) = name {
                self.world.remove(self.cast.tasks[name.as_str()], undo);
            }
        }
        if let Some(cut) = &step.cut {
            self.cut(cut).map_err(|what| self.nobody(index, &what))?;
        }
        if let Some(lose) = &step.lose {
            self.lose(lose).map_err(|what| self.nobody(index, &what))?;
        }
        if step.heal.is_some() {
            self.world.heal();
        }
        for (name, deed) in deeds(step) {
            let whom = self.cast.all(deed, &self.world);
            for at in whom.map_err(|what| self.nobody(index, &what))? {
                self.deed(name, deed, at).map_err(|what| self.nobody(index, &what))?;
            }
        }
        match &step.expect {
            Some(expected) => self.expect(index, expected),
            None => Ok(()),
        }
    }

    fn submit(&mut self, name: &'v str) {
        let variant = self.cast.variant;
        let job = &variant.file.jobs[name];
        let origin = variant.machine(&job.from).unwrap_or_default();
        let plain = match job.run {
            Some(run) => Behaviour { run_ms_min: run.0, ..Behaviour::plain(run.0) },
            None => Behaviour::endless(),
        };
        let behaviour = Behaviour {
            deaf_percent: if job.deaf { 100 } else { 0 },
            prepare_ms_max: job.prepare.map_or(plain.prepare_ms_max, |span| span.0),
            retries: job.retries,
            policy: job.policy.map_or(Policy::for_retries(job.retries), |policy| policy.0.0),
            lost_after_ms: job.lost_after.map_or(plain.lost_after_ms, |span| span.0),
            keep_every_ms: job.keep_every.map_or(plain.keep_every_ms, |span| span.0),
            grace_ms: job.grace.map_or(plain.grace_ms, |span| span.0),
            ..plain
        };
        let task = self.world.submit(origin, job.request.0.clone(), behaviour);
        let wanted = &mut self.world.workload.tasks[task];
        wanted.user = job.user;
        let keepers = job.keepers.iter().flatten();
        wanted.keepers = keepers.filter_map(|name| variant.machine(name)).collect();
        self.cast.tasks.insert(name, task);
    }

    fn cut(&mut self, cut: &Cut) -> Result<(), String> {
        let one = self.sides(&cut.from)?;
        let other = match &cut.to {
            Some(sides) => self.sides(sides)?,
            None => (0..self.world.machines.len()).filter(|at| !one.contains(at)).collect(),
        };
        let mut directions = Vec::new();
        for from in &one {
            for to in other.iter().filter(|to| *to != from) {
                directions.push((*from, *to));
                if !cut.one_way {
                    directions.push((*to, *from));
                }
            }
        }
        self.world.cut(directions, cut.lasts.0);
        Ok(())
    }

    fn lose(&mut self, lose: &Lose) -> Result<(), String> {
        let to = lose.to.as_ref().map(|sides| self.sides(sides)).transpose()?;
        let job: Option<JobId> = match &lose.job {
            Some(name) => {
                let job = self.cast.job(name, &self.world);
                Some(job.ok_or(format!("job {name} is not signed yet"))?)
            }
            None => None,
        };
        let names = lose.messages.iter().map(|name| name.0.0).collect();
        let until_ms = self.world.now_ms() + lose.lasts.0;
        self.cast.hand.lose(Loss { names, job, to, until_ms });
        Ok(())
    }

    fn sides(&self, sides: &[Side]) -> Result<Vec<usize>, String> {
        sides.iter().map(|side| self.cast.one(&side.0, &self.world)).collect()
    }

    fn deed(&mut self, name: &str, deed: &Deed, at: usize) -> Result<(), String> {
        let lasts_ms = deed.lasts.map(|span| span.0);
        // What must say how long it lasts does, or would not have been read.
        let for_ms = lasts_ms.unwrap_or_default();
        let world = &mut self.world;
        match name {
            "crash" => world.crash(at, Down::Daemon, lasts_ms),
            "reboot" => world.crash(at, Down::Machine, lasts_ms),
            "leave" => world.leave(at, lasts_ms),
            "start" => world.start(at),
            "empty-disk" => world.crash_and_wipe(at, for_ms),
            "backup" => {
                self.backups.insert(at, world.disk(at));
            }
            "restored-disk" => {
                let none = || format!("nothing of {} was put aside", world.machines[at].name());
                let disk = self.backups.get(&at).cloned().ok_or_else(none)?;
                world.crash_and_restore(at, disk, for_ms);
            }
            "cloned-disk" => {
                let of = deed.of.as_deref().and_then(|name| self.cast.variant.machine(name));
                let disk = world.disk(of.unwrap_or_default());
                world.crash_and_restore(at, disk, for_ms);
            }
            "no-room" => world.take_room(at, for_ms),
            "lose-copies" => world.lose_copies(at),
            "suspend" => world.stand_still(at, Still::Machine, for_ms),
            "pause" => world.stand_still(at, Still::Daemon, for_ms),
            "clock" => self.clock(deed, at)?,
            _ => unreachable!("every deed is done here: {name}"),
        }
        Ok(())
    }

    fn clock(&mut self, deed: &Deed, at: usize) -> Result<(), String> {
        let world = &mut self.world;
        if let Some(rate_ppm) = deed.rate_ppm {
            world.set_boot_drift(at, rate_ppm);
        }
        let ms = |span: Span| i64::try_from(span.0).map_err(|_| format!("{span} is too long"));
        if let Some(span) = deed.forward {
            world.step_wall_clock(at, ms(span)?);
        }
        if let Some(span) = deed.back {
            world.step_wall_clock(at, -ms(span)?);
        }
        if let Some(span) = deed.boot_forward {
            world.step_boot_clock(at, ms(span)?);
        }
        if let Some(span) = deed.boot_back {
            world.step_boot_clock(at, -ms(span)?);
        }
        Ok(())
    }

    // ---- saying where -----------------------------------------------------------------

    /// What is so at a step, with its line.
    fn at(&self, index: usize, what: &str) -> String {
        let variant = self.cast.variant;
        let line = variant.lines.get(index).copied().unwrap_or_default();
        let label = variant.label();
        let with = if label.is_empty() { label } else { format!(" ({label})") };
        format!("{}:{line}: steps[{index}]{with}: {what}", variant.path.display())
    }

    fn nobody(&self, index: usize, what: &str) -> Unmet {
        Unmet::Never(self.at(index, what))
    }
}

/// What a message must be to be the one waited for, as far as that is known now.
fn filter(cast: &Cast<'_>, when: &Condition, world: &World) -> Option<Filter> {
    let side = |side: &Option<Side>| match side {
        Some(side) => cast.one(&side.0, world).ok().map(Some),
        None => Some(None),
    };
    let job = cast.job(when.job.as_ref()?, world)?;
    Some(Filter { job, from: side(&when.from)?, to: side(&when.to)? })
}
