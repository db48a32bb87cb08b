//! Reading a scenario file: its size, its fields, and whether what it names exists.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use p2pit_protocol::{inventory::gpu::parse_simulated, job::KEEPERS_MAX};
use serde::Deserialize;

use super::{
    format::{Condition, Deed, File, Job, Moment, SEAL, Side, Step},
    locate::Field,
};

/// The largest file taken.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most machines of a pool.
pub const MACHINES_MAX: usize = 64;
/// Most steps.
pub const STEPS_MAX: usize = 256;
/// Most ways to play one file.
pub const VARIANTS_MAX: usize = 256;

/// A file that was read and makes sense.
#[derive(Debug, Clone)]
pub struct Story {
    /// The file, as it was named.
    pub file: PathBuf,
    /// The ways to play it: one, unless it has a sweep.
    pub variants: Vec<Variant>,
}

/// One way to play a file.
#[derive(Debug, Clone)]
pub struct Variant {
    /// The file, as it was named.
    pub path: PathBuf,
    /// The values swept over, by name.
    pub with: BTreeMap<String, String>,
    /// What the file says with them.
    pub file: File,
    /// The line each step stands on.
    pub lines: Vec<usize>,
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {text}", file.display())]
pub struct Error {
    /// The file.
    pub file: PathBuf,
    /// The line; 1 where it is about the whole file.
    pub line: usize,
    /// The field and what is wrong with it.
    pub text: String,
}

/// Read a file.
///
/// # Errors
/// It cannot be read, is larger than [`FILE_BYTES_MAX`], or does not make sense.
pub fn load(path: &Path) -> Result<Story, Error> {
    let failed = |text: String| Error { file: path.to_owned(), line: 1, text };
    let file = fs::File::open(path).map_err(|e| failed(format!("cannot be opened: {e}")))?;
    let mut text = String::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|e| failed(format!("cannot be read: {e}")))?;
    parse(path, &text)
}

/// Read a text that stands in `path`.
///
/// # Errors
/// It is larger than [`FILE_BYTES_MAX`], or does not make sense.
pub fn parse(path: &Path, text: &str) -> Result<Story, Error> {
    let reader = Reader { path, text };
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(reader.error(1, format!("a scenario has at most {FILE_BYTES_MAX} bytes")));
    }
    let sweep = Reader { path, text: &sweep_of(text) }.typed::<Option<SweepOnly>>()?;
    let sweep = sweep.unwrap_or_default().sweep;
    reader.check_sweep(&sweep)?;
    let mut variants = Vec::new();
    for with in combinations(&sweep) {
        let filled = fill(text, &with);
        let reader = Reader { path, text: &filled };
        let file: File = reader.typed()?;
        Checker::check(&reader, &file)?;
        let steps = Field::default().key("steps");
        let lines = (0..file.steps.len()).map(|index| steps.index(index).line(&filled)).collect();
        variants.push(Variant { path: path.to_owned(), with, file, lines });
    }
    Ok(Story { file: path.to_owned(), variants })
}

impl Variant {
    /// The values swept over, in a line; empty where there are none.
    #[must_use]
    pub fn label(&self) -> String {
        let values = self.with.iter().map(|(name, value)| format!("{name} {value}"));
        values.collect::<Vec<_>>().join(", ")
    }

    /// The number of a machine: `n0` is 0, clients come after nodes.
    #[must_use]
    pub fn machine(&self, name: &str) -> Option<usize> {
        machine(&self.file, name)
    }
}

/// The part of a file that is read before the rest can be.
#[derive(Debug, Default, Deserialize)]
struct SweepOnly {
    #[serde(default)]
    sweep: BTreeMap<String, Vec<String>>,
}

/// Only the sweep of a file, on the lines it stands on: the rest need not be YAML before its
/// values are in.
fn sweep_of(text: &str) -> String {
    let mut inside = false;
    let mut only = String::new();
    for line in text.lines() {
        if line.starts_with(|first: char| !first.is_whitespace() && first != '#') {
            inside = line.starts_with("sweep:");
        }
        if inside {
            only += line;
        }
        only.push('\n');
    }
    only
}

/// Every choice of one value for each name.
fn combinations(sweep: &BTreeMap<String, Vec<String>>) -> Vec<BTreeMap<String, String>> {
    let mut all = vec![BTreeMap::new()];
    for (name, values) in sweep {
        let longer = |with: &BTreeMap<String, String>| {
            let with = with.clone();
            values.iter().map(move |value| {
                let mut with = with.clone();
                with.insert(name.clone(), value.clone());
                with
            })
        };
        all = all.iter().flat_map(longer).collect();
    }
    all
}

fn fill(text: &str, with: &BTreeMap<String, String>) -> String {
    let fill_one =
        |text: String, (name, value): (&String, &String)| text.replace(&placeholder(name), value);
    with.iter().fold(text.to_owned(), fill_one)
}

fn placeholder(name: &str) -> String {
    format!("<{name}>")
}

fn machine(file: &File, name: &str) -> Option<usize> {
    let index: usize = name.get(1..)?.parse().ok()?;
    let nodes = file.pool.nodes.len();
    match name.as_bytes()[0] {
        b'n' if index < nodes => Some(index),
        b'c' if (nodes..nodes + file.pool.clients).contains(&index) => Some(index),
        _ => None,
    }
}

/// A text and where it stands, to say what is wrong with it.
struct Reader<'t> {
    path: &'t Path,
    text: &'t str,
}

impl Reader<'_> {
    fn typed<T: for<'de> Deserialize<'de>>(&self) -> Result<T, Error> {
        serde_yaml::from_str(self.text).map_err(|error| {
            let line = error.location().map_or(1, |location| location.line());
            let text = error.to_string();
            // The line stands in front already.
            let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
            self.error(line, text.to_owned())
        })
    }

    fn error(&self, line: usize, text: String) -> Error {
        Error { file: self.path.to_owned(), line, text }
    }

    fn wrong(&self, field: &Field, what: impl core::fmt::Display) -> Error {
        self.error(field.line(self.text), format!("{field}: {what}"))
    }

    fn wrong_sweep(&self, field: &Field, what: impl core::fmt::Display) -> Error {
        self.error(field.line(&sweep_of(self.text)), format!("{field}: {what}"))
    }

    fn check_sweep(&self, sweep: &BTreeMap<String, Vec<String>>) -> Result<(), Error> {
        let root = Field::default().key("sweep");
        for (name, values) in sweep {
            if values.is_empty() || values.iter().any(|value| value.contains('\n')) {
                let text = "a list of values is needed, each on one line";
                return Err(self.wrong_sweep(&root.key(name), text));
            }
            let mark = placeholder(name);
            if !self.text.contains(&mark) {
                let unused = format!("nothing in the file says `{mark}`");
                return Err(self.wrong_sweep(&root.key(name), unused));
            }
        }
        let count = sweep.values().map(Vec::len).try_fold(1_usize, usize::checked_mul);
        if count.is_none_or(|count| count > VARIANTS_MAX) {
            return Err(
                self.wrong_sweep(&root, format!("more than {VARIANTS_MAX} ways to play it"))
            );
        }
        Ok(())
    }
}

/// Looks at one variant from the first line to the last.
struct Checker<'t> {
    reader: &'t Reader<'t>,
    file: &'t File,
    submitted: BTreeSet<&'t str>,
    healed: bool,
}

impl<'t> Checker<'t> {
    fn check(reader: &'t Reader<'t>, file: &'t File) -> Result<(), Error> {
        let mut checker = Self { reader, file, submitted: BTreeSet::new(), healed: false };
        checker.pool()?;
        for (name, job) in &file.jobs {
            checker.job(&Field::default().key("jobs").key(name), job)?;
        }
        let steps = Field::default().key("steps");
        if file.steps.is_empty() || file.steps.len() > STEPS_MAX {
            return Err(reader.wrong(&steps, format!("1 to {STEPS_MAX} are possible")));
        }
        for (index, step) in file.steps.iter().enumerate() {
            checker.step(&steps.index(index), step)?;
        }
        let unused = file.jobs.keys().find(|name| !checker.submitted.contains(name.as_str()));
        match unused {
            Some(name) => {
                let field = Field::default().key("jobs").key(name);
                Err(reader.wrong(&field, "no step submits it"))
            }
            None => Ok(()),
        }
    }

    fn pool(&self) -> Result<(), Error> {
        let field = Field::default().key("pool");
        let pool = &self.file.pool;
        let machines = pool.nodes.len().saturating_add(pool.clients);
        if pool.nodes.is_empty() || machines > MACHINES_MAX {
            let text = format!("1 node to {MACHINES_MAX} machines are possible");
            return Err(self.reader.wrong(&field.key("nodes"), text));
        }
        if !(1..=machines).contains(&pool.users) {
            let text = "at least one, and at most one for each machine";
            return Err(self.reader.wrong(&field.key("users"), text));
        }
        for (index, inventory) in pool.nodes.iter().enumerate() {
            parse_simulated(inventory, "0")
                .map_err(|e| self.reader.wrong(&field.key("nodes").index(index), e))?;
        }
        Ok(())
    }

    fn job(&self, field: &Field, job: &Job) -> Result<(), Error> {
        self.machine(&field.key("from"), &job.from)?;
        if job.user >= self.file.pool.users {
            let text = format!("the pool has {} users, counted from 0", self.file.pool.users);
            return Err(self.reader.wrong(&field.key("user"), text));
        }
        if let Some(keepers) = &job.keepers {
            let field = field.key("keepers");
            for (index, keeper) in keepers.iter().enumerate() {
                self.machine(&field.index(index), keeper)?;
            }
            if keepers.is_empty() || keepers.len() > KEEPERS_MAX {
                return Err(self.reader.wrong(&field, format!("1 to {KEEPERS_MAX} are possible")));
            }
        }
        Ok(())
    }

    fn step(&mut self, field: &Field, step: &'t Step) -> Result<(), Error> {
        if step.at.is_some() && (step.after.is_some() || step.when.is_some()) {
            return Err(self.reader.wrong(field, "`at` goes with neither `after` nor `when`"));
        }
        if let Some(when) = &step.when {
            self.condition(&field.key("when"), when, true)?;
        }
        self.one_action(field, step)?;
        let harmless = [&step.submit, &step.stop, &step.remove, &step.restore];
        if self.healed && harmless.iter().all(|it| it.is_none()) && step.expect.is_none() {
            return Err(self.reader.wrong(field, "after `heal` nothing goes wrong any more"));
        }
        self.healed |= step.heal.is_some();
        for (name, deed) in deeds(step) {
            self.deed(&field.key(name), name, deed)?;
        }
        if let Some(name) = &step.submit {
            self.known_job(&field.key("submit"), name)?;
            if !self.submitted.insert(name) {
                return Err(self.reader.wrong(&field.key("submit"), "it is submitted already"));
            }
        }
        for (key, name) in
            [("stop", &step.stop), ("remove", &step.remove), ("restore", &step.restore)]
        {
            if let Some(name) = name {
                self.submitted_job(&field.key(key), name)?;
            }
        }
        if let Some(cut) = &step.cut {
            self.sides(&field.key("cut").key("from"), &cut.from)?;
            self.sides(&field.key("cut").key("to"), cut.to.as_deref().unwrap_or_default())?;
        }
        if let Some(lose) = &step.lose {
            let field = field.key("lose");
            if let Some(job) = &lose.job {
                self.submitted_job(&field.key("job"), job)?;
            }
            self.sides(&field.key("to"), lose.to.as_deref().unwrap_or_default())?;
        }
        if let Some(expect) = &step.expect {
            self.condition(&field.key("expect"), expect, false)?;
        }
        Ok(())
    }

    fn one_action(&self, field: &Field, step: &Step) -> Result<(), Error> {
        let others = [
            step.submit.is_some(),
            step.stop.is_some(),
            step.remove.is_some(),
            step.restore.is_some(),
            step.cut.is_some(),
            step.lose.is_some(),
            step.heal.is_some(),
            step.expect.is_some(),
        ];
        let actions = others.into_iter().filter(|is| *is).count() + deeds(step).count();
        if actions == 1 {
            return Ok(());
        }
        let text = format!("a step does exactly one thing; this one does {actions}");
        Err(self.reader.wrong(field, text))
    }

    fn deed(&self, field: &Field, name: &str, deed: &Deed) -> Result<(), Error> {
        self.whom(field, deed)?;
        let fits = |given: bool, key: &str, of: &[&str]| match given && !of.contains(&name) {
            true => Err(self.reader.wrong(&field.key(key), format!("`{name}` has no such field"))),
            false => Ok(()),
        };
        let comes_back = [
            "crash",
            "reboot",
            "leave",
            "empty-disk",
            "restored-disk",
            "cloned-disk",
            "suspend",
            "pause",
            "no-room",
        ];
        fits(deed.lasts.is_some(), "for", &comes_back)?;
        fits(deed.of.is_some(), "of", &["cloned-disk"])?;
        for (given, key) in of_clock(deed) {
            fits(given, key, &["clock"])?;
        }
        let needs = |given: bool, key: &str| match given {
            true => Ok(()),
            false => Err(self.reader.wrong(field, format!("`{key}` is missing"))),
        };
        match name {
            "cloned-disk" => {
                needs(deed.of.is_some(), "of")?;
                needs(deed.lasts.is_some(), "for")?;
                self.machine(&field.key("of"), deed.of.as_deref().unwrap_or_default())
            }
            "suspend" | "pause" | "no-room" => needs(deed.lasts.is_some(), "for"),
            "clock" => needs(of_clock(deed).iter().any(|(given, _)| *given), "rate-ppm"),
            "empty-disk" | "restored-disk" => needs(deed.lasts.is_some(), "for"),
            _ => Ok(()),
        }
    }

    /// Exactly one way to say who is meant.
    fn whom(&self, field: &Field, deed: &Deed) -> Result<(), Error> {
        let roles = [
            ("steward-of", &deed.steward_of),
            ("keeper-of", &deed.keeper_of),
            ("submitter-of", &deed.submitter_of),
            ("worker-of", &deed.worker_of),
        ];
        let given = roles.iter().filter(|(_, job)| job.is_some()).count()
            + usize::from(deed.node.is_some())
            + usize::from(deed.nodes.is_some());
        if given != 1 {
            let text = "say who is meant, by one of `node`, `nodes`, `steward-of`, `keeper-of`, \
                        `submitter-of` and `worker-of`";
            return Err(self.reader.wrong(field, text));
        }
        if deed.nth > 0 && deed.keeper_of.is_none() && deed.worker_of.is_none() {
            let text = "only of `keeper-of` and `worker-of`";
            return Err(self.reader.wrong(&field.key("nth"), text));
        }
        if let Some(name) = &deed.node {
            self.machine(&field.key("node"), name)?;
        }
        for (key, job) in roles {
            if let Some(job) = job {
                self.submitted_job(&field.key(key), job)?;
            }
        }
        self.sides(&field.key("nodes"), deed.nodes.as_deref().unwrap_or_default())
    }

    fn sides(&self, field: &Field, sides: &[Side]) -> Result<(), Error> {
        for (index, side) in sides.iter().enumerate() {
            self.side(&field.index(index), side)?;
        }
        Ok(())
    }

    fn side(&self, field: &Field, side: &Side) -> Result<(), Error> {
        let deed = &side.0;
        if deed.nodes.is_some() {
            return Err(self.reader.wrong(&field.key("nodes"), "one machine is meant here"));
        }
        let more = deed.lasts.is_some()
            || deed.of.is_some()
            || of_clock(deed).iter().any(|(given, _)| *given);
        if more {
            return Err(self.reader.wrong(field, "only who is meant can be said here"));
        }
        self.whom(field, deed)
    }

    fn condition(&self, field: &Field, c: &Condition, is_when: bool) -> Result<(), Error> {
        let wrong = |key: &str, what: &str| Err(self.reader.wrong(&field.key(key), what));
        if !is_when && c.message.is_some() {
            return wrong("message", "a message passes at one moment: it can only be waited for");
        }
        if is_when && c.stays.is_some() {
            return wrong("for", "only `expect` has it");
        }
        let is_delivered = c.moment.is_some_and(|moment| moment.0 == Moment::Delivered);
        if is_delivered && c.message.is_some_and(|name| name.0.0 == SEAL) {
            return wrong("moment", "of a `seal` only `before` and `sent` can be told");
        }
        if let Some(key) = c.of_message().first().filter(|_| c.message.is_none()) {
            return wrong(key, "it is of a `message`, which is missing");
        }
        if c.message.is_some() && !c.of_state().is_empty() {
            return wrong("message", "a message and a state cannot be waited for together");
        }
        let of_job = c.of_job();
        match &c.job {
            Some(job) => self.submitted_job(&field.key("job"), job)?,
            None if c.message.is_some() => return wrong("message", "of which `job`?"),
            None if !of_job.is_empty() => return wrong(of_job[0], "of which `job`?"),
            None => {}
        }
        if c.job.is_some() && c.message.is_none() && of_job.is_empty() {
            return wrong("job", "what of it?");
        }
        let of_node = c.of_node();
        match (&c.node, of_node.first()) {
            (None, Some(key)) => return wrong(key, "of which `node`?"),
            (Some(_), None) => return wrong("node", "what of it?"),
            _ => {}
        }
        if c.message.is_none() && of_job.is_empty() && of_node.is_empty() {
            return Err(self.reader.wrong(field, "it says nothing"));
        }
        let sides = [
            ("node", &c.node),
            ("from", &c.from),
            ("to", &c.to),
            ("steward", &c.steward),
            ("steward-not", &c.steward_not),
            ("keeper-not", &c.keeper_not),
        ];
        for (key, side) in sides {
            if let Some(side) = side {
                self.side(&field.key(key), side)?;
            }
        }
        Ok(())
    }

    fn machine(&self, field: &Field, name: &str) -> Result<(), Error> {
        if machine(self.file, name).is_some() {
            return Ok(());
        }
        let nodes = self.file.pool.nodes.len();
        let names = (0..nodes).map(|node| format!("n{node}"));
        let clients = (nodes..nodes + self.file.pool.clients).map(|client| format!("c{client}"));
        let names: Vec<_> = names.chain(clients).collect();
        let text = format!("no machine is called `{name}`; there are {}", names.join(", "));
        Err(self.reader.wrong(field, text))
    }

    fn known_job(&self, field: &Field, name: &str) -> Result<(), Error> {
        if self.file.jobs.contains_key(name) {
            return Ok(());
        }
        let names: Vec<_> = self.file.jobs.keys().map(String::as_str).collect();
        let text = format!("no job is called `{name}`; there are {}", names.join(", "));
        Err(self.reader.wrong(field, text))
    }

    fn submitted_job(&self, field: &Field, name: &str) -> Result<(), Error> {
        self.known_job(field, name)?;
        if self.submitted.contains(name) {
            return Ok(());
        }
        Err(self.reader.wrong(field, format!("job `{name}` is submitted by no step before this")))
    }
}

fn of_clock(deed: &Deed) -> [(bool, &'static str); 5] {
    [
        (deed.rate_ppm.is_some(), "rate-ppm"),
        (deed.forward.is_some(), "forward"),
        (deed.back.is_some(), "back"),
        (deed.boot_forward.is_some(), "boot-forward"),
        (deed.boot_back.is_some(), "boot-back"),
    ]
}

/// What a step does to machines, by the name of the field.
pub(super) fn deeds(step: &Step) -> impl Iterator<Item = (&'static str, &Deed)> {
    let all = [
        ("no-room", &step.no_room),
        ("lose-copies", &step.lose_copies),
        ("crash", &step.crash),
        ("reboot", &step.reboot),
        ("leave", &step.leave),
        ("start", &step.start),
        ("empty-disk", &step.empty_disk),
        ("backup", &step.backup),
        ("restored-disk", &step.restored_disk),
        ("cloned-disk", &step.cloned_disk),
        ("suspend", &step.suspend),
        ("pause", &step.pause),
        ("clock", &step.clock),
    ];
    all.into_iter().filter_map(|(name, deed)| deed.as_ref().map(|deed| (name, deed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "story: s\npool: {nodes: [1xv100, 1xv100]}\njobs:\n  a: {from: c2, request: '[v100]', run: 5s}\n";

    fn read(steps: &str) -> Result<Story, String> {
        let text = format!("{HEAD}steps:\n{steps}");
        parse(Path::new("s.yaml"), &text).map_err(|e| e.to_string())
    }

    fn refused(steps: &str) -> String {
        read(&format!("  - submit: a\n{steps}")).unwrap_err()
    }

    #[test]
    fn a_story_is_read_with_the_lines_of_its_steps() {
        let steps =
            "  - submit: a\n\n  # Later.\n  - at: 3s\n    crash: {steward-of: a, for: 2s}\n";
        let story = read(steps).unwrap();
        let [only] = &story.variants[..] else { panic!("{story:?}") };
        assert_eq!(only.lines, [6, 9]);
        assert_eq!(only.file.steps[1].at.map(|at| at.0), Some(3_000));
        assert_eq!((only.machine("n1"), only.machine("c2")), (Some(1), Some(2)));
        assert_eq!((only.machine("n2"), only.machine("x0"), only.machine("")), (None, None, None));
    }

    #[test]
    fn what_is_wrong_is_said_with_file_line_and_field() {
        for (step, line, what) in [
            ("  - crsh: {node: n0}", 7, "steps[1]: unknown field `crsh`"),
            ("  - crash: {nod: n0}", 7, "steps[1].crash: unknown field `nod`"),
            (
                "  -\n    crash:\n      node: n7",
                9,
                "steps[1].crash.node: no machine is called `n7`",
            ),
            ("  - crash: {node: n0, for: 5}", 7, "steps[1].crash.for: `5` is no time"),
            ("  - crash: {for: 5s}", 7, "steps[1].crash: say who is meant"),
            ("  - crash: {node: n0, steward-of: a}", 7, "steps[1].crash: say who is meant"),
            ("  - crash: {node: n0, rate-ppm: 5}", 7, "`crash` has no such field"),
            ("  - suspend: {node: n0}", 7, "steps[1].suspend: `for` is missing"),
            ("  - cloned-disk: {node: n0}", 7, "`of` is missing"),
            ("  - stop: b", 7, "steps[1].stop: no job is called `b`; there are a"),
            ("  - submit: a", 7, "steps[1].submit: it is submitted already"),
            ("  - stop: a\n    heal: all", 7, "exactly one thing; this one does 2"),
            ("  - at: 4s", 7, "exactly one thing; this one does 0"),
            ("  - stop: a\n    at: 1s\n    after: 2s", 7, "`at` goes with neither"),
            ("  - expect: {job: a, state: RUN}", 7, "no state is called `RUN`"),
            ("  - expect: {job: a, message: call}", 7, "it can only be waited for"),
            ("  - expect: {state: RUNNING}", 7, "steps[1].expect.state: of which `job`?"),
            ("  - expect: {job: a}", 7, "steps[1].expect.job: what of it?"),
            ("  - expect: {up: true}", 7, "steps[1].expect.up: of which `node`?"),
            ("  - expect: {within: 5s}", 7, "steps[1].expect: it says nothing"),
            ("  - stop: a\n    when: {job: a, nth: 2}", 8, "it is of a `message`"),
            ("  - stop: a\n    when: {job: a, message: cal}", 8, "no message is called `cal`"),
            ("  - cut: {from: [n0, n9], for: 5s}", 7, "steps[1].cut.from[1].node: no machine"),
            ("  - cut: {from: [{keeper-of: b}], for: 5s}", 7, "from[0].keeper-of: no job"),
            (
                "  - stop: a\n    when: {job: a, message: seal, moment: delivered}",
                8,
                "only `before` and",
            ),
            (
                "  - heal: all\n  - crash: {node: n0}",
                8,
                "steps[2]: after `heal` nothing goes wrong",
            ),
            ("  - lose: {messages: [inted], for: 5s}", 7, "no message is called `inted`"),
        ] {
            let text = refused(step);
            assert!(text.starts_with(&format!("s.yaml:{line}: ")), "{step}: {text}");
            assert!(text.contains(what), "{step}: {text}");
        }
    }

    #[test]
    fn a_job_must_be_submitted_before_it_is_spoken_of_and_at_all() {
        let early = read("  - stop: a\n  - submit: a\n").unwrap_err();
        assert!(
            early.contains("s.yaml:6: steps[0].stop: job `a` is submitted by no step"),
            "{early}"
        );
        let never = read("  - heal: all\n").unwrap_err();
        assert!(never.contains("s.yaml:4: jobs.a: no step submits it"), "{never}");
    }

    #[test]
    fn a_sweep_is_played_with_every_choice_of_its_values() {
        let text = format!(
            "{HEAD}sweep: {{message: [call, bid], moment: [before, sent]}}\nsteps:\n  - submit: a\n  \
             - when: {{job: a, message: <message>, moment: <moment>}}\n    stop: a\n"
        );
        let story = parse(Path::new("s.yaml"), &text).unwrap();
        let labels: Vec<_> = story.variants.iter().map(Variant::label).collect();
        let all =
            ["call, moment before", "call, moment sent", "bid, moment before", "bid, moment sent"];
        assert_eq!(labels, all.map(|label| format!("message {label}")));
        assert!(story.variants.iter().all(|variant| variant.lines == [7, 8]));
        let unused = format!("{HEAD}sweep: {{other: [x]}}\nsteps:\n  - submit: a\n");
        let text = parse(Path::new("s.yaml"), &unused).unwrap_err().to_string();
        assert!(
            text.contains("s.yaml:5: sweep.other: nothing in the file says `<other>`"),
            "{text}"
        );
    }

    #[test]
    fn a_file_has_a_size_at_most() {
        let large = "#".repeat(usize::try_from(FILE_BYTES_MAX).unwrap() + 1);
        let text = parse(Path::new("s.yaml"), &large).unwrap_err().to_string();
        assert_eq!(text, "s.yaml:1: a scenario has at most 1048576 bytes");
    }
}
