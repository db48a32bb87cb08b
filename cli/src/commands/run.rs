//! `p2pit run`: submit the current directory as a job.

use std::{cell::Cell, collections::BTreeMap, io::Read as _, path::Path};

use anyhow::Context as _;
use p2pit_node::{
    api::types::{NodeInfo, path},
    config::{ParseUnitError, Period},
};
use p2pit_protocol::{
    PeerId,
    job::{
        Command, Grace, KEEP_EVERY_MS, KEEP_EVERY_MS_MAX, KEEP_EVERY_MS_MIN, LOST_AFTER_MS,
        LOST_AFTER_MS_MAX, LOST_AFTER_MS_MIN, Policy, RETRIES_MAX,
    },
    request::{Request, TEXT_BYTES_MAX},
};

use super::Interrupts;
use crate::{
    args::Globals,
    follow::Reading,
    names::{Names, short_job},
    output::Output,
    problem::Problem,
    session::Session,
    status::Status,
    submission::{self, Prepared, Wish},
    view::{Plan, Submission},
};

/// Submit the current directory as a job
///
/// Submitted are all files that `.gitignore` and `.pitignore` do not name; only what the
/// pool does not have travels. The job runs `.compute`, in every one of its processes.
///
/// TITLE is for people. REQUEST says which processes, and what each needs on its node:
/// `2:[8:gtx1070]` is two processes with eight GPUs each, `[2:gpu,16:cpu,64:ram]` one with
/// any two GPUs, 16 cores and 64 GiB, `[4:gpu>=24g]` one with four GPUs of 24 GB or more,
/// `2:[],4:[v100]` two kinds of processes. `[]` is one process without a GPU.
#[derive(Debug, clap::Args)]
#[command(after_help = "The job's id is printed on standard output as soon as it is submitted; \
    from then on this machine may be switched off. With --log the log is printed instead, and the \
    exit code is the job's: 143 where it was stopped, 124 where it ran into its time limit, 125 \
    where it was lost. Ctrl-C then leaves the job running.\n\n\
    Examples:\n  p2pit run \"My task\" 2:[8:gtx1070]\n  \
    p2pit run \"My command\" [] -d 'hostname; env' -l\n  \
    p2pit run \"More epochs\" -c @last --time 12h --env EPOCHS=20\n  \
    p2pit run \"Sweep\" 4:[v100] --retries 3 --lost-after 2h")]
pub(crate) struct Args {
    #[arg(value_parser = parse_title)]
    title: String,
    /// What the job needs [default: the content of `.pitrequest.txt`, else `[]`]
    request: Option<String>,
    /// Run these commands through bash instead of `.compute`
    #[arg(long, short, value_name = "COMMANDS", allow_hyphen_values = true)]
    direct: Option<String>,
    /// Follow the log until the job is done
    #[arg(long, short)]
    log: bool,
    /// Show title and command to nobody but admins
    #[arg(long, short)]
    private: bool,
    /// Start with what this job has in `keep/`
    #[arg(long = "continue", short, value_name = "JOB")]
    continues: Option<String>,
    /// Keep this path of the work directory when a process ends; may be given several times
    #[arg(long, value_name = "PATH")]
    artifact: Vec<String>,
    /// Set an environment variable; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// End the job after this long, such as `2h`
    #[arg(long, value_name = "DURATION", value_parser = parse_time)]
    time: Option<Period>,
    /// Between SIGTERM and SIGKILL when the job is ended [default: 30s]
    #[arg(long, value_name = "DURATION")]
    grace: Option<Period>,
    /// Run the job again, up to N times, when a process of it fails or its node is lost: all of
    /// its processes begin anew, and the GPU time they had is spent [default: 0]
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        // So that `-1` is told to be out of range, and is not taken for an option.
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(..=i64::from(RETRIES_MAX))
    )]
    retries: u32,
    /// What becomes of a process that its pool has not seen for three minutes [default: restart
    /// with --retries, else continue]
    #[arg(long, value_name = "POLICY", value_enum)]
    on_partition: Option<OnPartition>,
    /// Take a process for lost once its node has been silent for this long, 10min to 30d: the
    /// shorter, the sooner a dead machine is given up, and one that is only cut off as well
    /// [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = parse_lost_after)]
    lost_after: Option<Period>,
    /// Copy what changed in keep/ to other nodes this often while a process runs, 1s to 30d, or
    /// `off`: a job that is run again begins with the newest copy [default: 60s]
    #[arg(long, value_name = "DURATION", value_parser = parse_keep_every)]
    keep_every: Option<KeepEvery>,
    /// Say what would be asked of whom, and submit nothing
    #[arg(long)]
    dry_run: bool,
    /// One JSON object instead of the id
    #[arg(long, conflicts_with = "log")]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum OnPartition {
    /// It is ended, so that it can run elsewhere: costs what it computed so far, although its
    /// machine may be well
    Restart,
    /// It runs on and keeps its GPUs, and its result counts when it is seen again: if its
    /// machine died, the job waits for that until `--lost-after`
    Continue,
}

/// In milliseconds; 0 is never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KeepEvery(u64);

impl From<OnPartition> for Policy {
    fn from(chosen: OnPartition) -> Self {
        match chosen {
            OnPartition::Restart => Self::Restart,
            OnPartition::Continue => Self::Continue,
        }
    }
}

/// The default request of a directory.
const REQUEST_FILE: &str = ".pitrequest.txt";

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let dir = std::env::current_dir().context("the current directory is gone")?;
    let snapshot = submission::start_snapshot(globals, &dir);
    let (follows, json, dry_run) = (args.log, args.json, args.dry_run);
    let wish = wish(args, &dir)?;
    if let Some(note) = doubt(&wish) {
        out.warn(note);
    }
    let mut interrupts = Interrupts::new()?;
    let sent = Cell::new(None);
    let submitting = async {
        let session = Session::open(globals, out).await?;
        let prepared = submission::prepare(&session, &wish, snapshot).await?;
        for note in &prepared.snapshot.notes {
            out.warn(note);
        }
        if dry_run {
            let nodes: Vec<NodeInfo> = session.client.get(path::NODES).await?;
            out.data(out.format(json).plan(&plan(&wish, &prepared, &nodes)))?;
            return Ok(None);
        }
        let pool = prepared.planned.pool;
        let submission = submission::submit(&session, out, wish, prepared, &sent).await?;
        anyhow::Ok(Some((session, pool, submission)))
    };
    let submitted = tokio::select! {
        submitted = submitting => submitted?,
        status = interrupts.next() => {
            out.note(&match sent.get() {
                None => "interrupted: nothing was submitted".to_owned(),
                Some(job) => format!(
                    "interrupted: whether job {job} was submitted, `p2pit show job:{job}` tells",
                ),
            });
            return Ok(status);
        }
    };
    let Some((session, pool, submission)) = submitted else { return Ok(Status::DONE) };
    if !follows {
        out.data(out.format(json).submission(&submission))?;
        out.submission(&submission);
        out.note(&format!("follow it with `p2pit log {} -f`", short_job(submission.id)));
        return Ok(Status::DONE);
    }
    out.submission(&submission);
    out.note(&format!("Job:     {}", submission.id));
    let Submission { id: job, keepers, .. } = submission;
    let reading = Reading { session: &session, out, pool, job, keepers, worker: None };
    tokio::select! {
        outcome = reading.follow() => Ok(Status::of_outcome(&outcome?)),
        status = interrupts.next() => {
            let job = short_job(job);
            out.note(&format!("detached: job {job} goes on; `p2pit log {job} -f` follows it again"));
            Ok(status)
        }
    }
}

fn wish(args: Args, dir: &Path) -> anyhow::Result<Wish> {
    let Args {
        title,
        request,
        direct,
        log: _,
        private,
        continues,
        artifact,
        env,
        time,
        grace,
        retries,
        on_partition,
        lost_after,
        keep_every,
        dry_run: _,
        json: _,
    } = args;
    let (text, from) = match request {
        Some(text) => (text, None),
        None => (read_request_file(dir)?, Some(dir.join(REQUEST_FILE))),
    };
    let milliseconds = |period: Period| u64::try_from(period.0.as_millis()).unwrap_or(u64::MAX);
    let request = parse_request(&text, from.as_deref());
    if request.is_err() && from.is_none() && Request::parse(&title).is_ok() {
        let message = format!("`{title}` is where the title belongs, and `{text}` is no request");
        return Err(Problem::request(message)
            .hint("the title comes first: `p2pit run \"My task\" '2:[v100]'`")
            .into());
    }
    Ok(Wish {
        title,
        request: request?,
        command: direct.map_or(Command::Script, Command::Direct),
        continues,
        artifacts: artifact,
        env: env.into_iter().collect::<BTreeMap<_, _>>(),
        private,
        time_limit_ms: time.map(milliseconds),
        grace: grace.map_or_else(Grace::default, |period| Grace(milliseconds(period))),
        retries,
        policy: on_partition.map_or_else(|| Policy::for_retries(retries), Policy::from),
        lost_after_ms: lost_after.map_or(LOST_AFTER_MS, milliseconds),
        keep_every_ms: keep_every.map_or(KEEP_EVERY_MS, |KeepEvery(every_ms)| every_ms),
    })
}

/// What can be asked for, and is hardly meant.
fn doubt(wish: &Wish) -> Option<&'static str> {
    let ended_for_nothing = wish.policy == Policy::Restart && wish.retries == 0;
    ended_for_nothing.then_some(
        "`--on-partition restart` without `--retries`: a process that is cut off is ended, and \
         the job with it, since it may not run again",
    )
}

/// Nothing where there is no such file.
fn read_request_file(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join(REQUEST_FILE);
    let mut bytes = Vec::new();
    let read = std::fs::File::open(&path).and_then(|file| {
        // One byte more than is read anyway, so that too long a file is noticed.
        file.take(TEXT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)
    });
    match read {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(e) => {
            let message = format!("cannot read {}: {e}", path.display());
            return Err(Problem::request(message)
                .hint("the request can be given on the command line instead")
                .into());
        }
    }
    String::from_utf8(bytes).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
        let message = format!("{}:{line}: expected a request, found no text", path.display());
        Problem::request(message).hint("`p2pit run --help` shows how requests are written").into()
    })
}

fn parse_request(text: &str, from: Option<&Path>) -> anyhow::Result<Request> {
    Request::parse(text).map_err(|error| {
        let from = from.map_or_else(
            || "the request".to_owned(),
            |path| {
                let (line, character) = error.place();
                format!("{}:{line}:{character}: the request", path.display())
            },
        );
        Problem::request(format!("{from} cannot be understood"))
            .excerpt(error.caret())
            .hint("`p2pit run --help` shows how requests are written")
            .into()
    })
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE, found no `=`")?;
    let begins_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let unfit = name.chars().find(|c| !c.is_ascii_alphanumeric() && *c != '_');
    match unfit {
        _ if name.is_empty() => Err("expected NAME=VALUE, found no name".to_owned()),
        Some(c) => Err(format!("`{name}` has {c:?}: a name is letters, digits and `_`")),
        None if !begins_well => Err(format!("`{name}` begins with a digit, no shell can read it")),
        None => Ok((name.to_owned(), value.to_owned())),
    }
}

fn parse_title(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("a title says what the job is; it cannot be empty".to_owned());
    }
    Ok(text.to_owned())
}

fn parse_time(text: &str) -> Result<Period, String> {
    let period: Period = text.parse().map_err(|e: ParseUnitError| e.to_string())?;
    if period.0.as_millis() == 0 {
        return Err("a job that is ended at once does nothing".to_owned());
    }
    Ok(period)
}

fn parse_lost_after(text: &str) -> Result<Period, String> {
    let period: Period = text.parse().map_err(|e: ParseUnitError| e.to_string())?;
    let bounds = u128::from(LOST_AFTER_MS_MIN)..=u128::from(LOST_AFTER_MS_MAX);
    if !bounds.contains(&period.0.as_millis()) {
        return Err(
            "a node may be silent for 10min to 30d before its processes count as lost".to_owned()
        );
    }
    Ok(period)
}

fn parse_keep_every(text: &str) -> Result<KeepEvery, String> {
    if text == "off" {
        return Ok(KeepEvery(0));
    }
    let period: Period = text.parse().map_err(|e: ParseUnitError| e.to_string())?;
    match u64::try_from(period.0.as_millis()) {
        Ok(every @ KEEP_EVERY_MS_MIN..=KEEP_EVERY_MS_MAX) => Ok(KeepEvery(every)),
        Ok(_) | Err(_) => Err("expected 1s to 30d, or `off`".to_owned()),
    }
}

fn plan(wish: &Wish, prepared: &Prepared, nodes: &[NodeInfo]) -> Plan {
    let names = Names::of(nodes, &[]);
    let offline_s = |id: &PeerId| {
        let node = nodes.iter().find(|node| node.node == *id && node.reach == "offline")?;
        Some(node.advert_age_s.unwrap_or(0))
    };
    let Prepared { planned, snapshot, missing } = prepared;
    Plan {
        title: wish.title.clone(),
        request: wish.request.to_string(),
        processes: wish.request.process_count(),
        command: wish.command.clone(),
        source: submission::source_of(snapshot),
        files: snapshot.tree.file_count(),
        bytes: snapshot.tree.total_bytes(),
        missing_blobs: missing.len() as u64,
        missing_bytes: missing.iter().map(|(_, size)| size).sum(),
        keepers: planned.keepers.iter().map(|(keeper, _)| names.node(*keeper)).collect(),
        candidates: planned
            .candidates
            .iter()
            .map(|(node, processes)| (names.node(*node), *processes, offline_s(node)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::problem::explain;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &[&str]) -> Args {
        Line::try_parse_from([&["run"], line].concat()).unwrap().args
    }

    #[test]
    fn everything_on_the_command_line_becomes_part_of_the_job() {
        let line = [
            "My task",
            "2:[v100]",
            "-d",
            "-x; true",
            "-p",
            "-c",
            "@last",
            "--env",
            "A=1=2",
            "--env",
            "B=",
            "--time",
            "2h",
            "--grace",
            "5s",
            "--artifact",
            "out",
            "--artifact",
            "x.txt",
        ];
        let wish = wish(args(&line), Path::new("/nonexistent")).unwrap();
        assert_eq!(wish.title, "My task");
        assert_eq!(wish.request.to_string(), "2:[v100]");
        assert_eq!(wish.command, Command::Direct("-x; true".to_owned()));
        assert_eq!(wish.continues.as_deref(), Some("@last"));
        assert_eq!(wish.artifacts, ["out", "x.txt"]);
        let env = [("A".to_owned(), "1=2".to_owned()), ("B".to_owned(), String::new())];
        assert_eq!(wish.env, env.into());
        assert_eq!(
            (wish.private, wish.time_limit_ms, wish.grace),
            (true, Some(7_200_000), Grace(5_000))
        );
    }

    #[test]
    fn a_job_that_may_run_again_is_ended_where_it_is_cut_off_unless_it_says_otherwise() {
        let chosen = |line: &[&str]| {
            let wish = wish(args(&[&["t"], line].concat()), Path::new("/nonexistent")).unwrap();
            (wish.retries, wish.policy, wish.lost_after_ms, doubt(&wish).is_some())
        };
        let day = LOST_AFTER_MS;
        assert_eq!(chosen(&[]), (0, Policy::Continue, day, false));
        assert_eq!(chosen(&["--retries", "3"]), (3, Policy::Restart, day, false));
        let waits = ["--retries", "1", "--on-partition", "continue", "--lost-after", "2h"];
        assert_eq!(chosen(&waits), (1, Policy::Continue, 7_200_000, false));
        assert_eq!(chosen(&["--on-partition", "restart"]), (0, Policy::Restart, day, true));
    }

    #[test]
    fn keep_is_copied_every_minute_unless_the_owner_says_otherwise() {
        let chosen = |line: &[&str]| {
            let line = [&["t"], line].concat();
            wish(args(&line), Path::new("/nonexistent")).unwrap().keep_every_ms
        };
        assert_eq!(chosen(&[]), 60_000);
        assert_eq!(chosen(&["--keep-every", "5min"]), 300_000);
        assert_eq!(chosen(&["--keep-every", "off"]), 0);
        for (text, is_good) in [("1s", true), ("999ms", false), ("30d", true), ("31d", false)] {
            assert_eq!(parse_keep_every(text).is_ok(), is_good, "{text}");
        }
    }

    #[test]
    fn what_help_says_of_bounds_is_what_is_checked() {
        assert_eq!(LOST_AFTER_MS_MIN, 10 * 60_000);
        assert_eq!(LOST_AFTER_MS_MAX, 30 * 86_400_000);
        for (text, is_good) in
            [("10min", true), ("599s", false), ("30d", true), ("30d 1s", false), ("2", false)]
        {
            assert_eq!(parse_lost_after(text).is_ok(), is_good, "{text}");
        }
        let refused = |line: &[&str]| {
            let parsed = Line::try_parse_from([&["run", "t"], line].concat());
            parsed.unwrap_err().to_string()
        };
        let said = refused(&["--retries", "-1"]);
        assert!(said.contains("-1 is not in 0..=100"), "{said}");
        let said = refused(&["--retries", "101"]);
        assert!(said.contains("101 is not in 0..=100"), "{said}");
        let said = refused(&["--on-partition", "stop"]);
        assert!(said.contains("[possible values: restart, continue]"), "{said}");
        let said = refused(&["--lost-after", "5s"]);
        assert!(said.contains("10min to 30d"), "{said}");
    }

    #[test]
    fn the_request_comes_from_the_argument_else_the_file_else_is_one_process() {
        let dir = tempfile::tempdir().unwrap();
        let request = |line: &[&str]| wish(args(line), dir.path()).unwrap().request.to_string();
        assert_eq!(request(&["t"]), "[]");
        std::fs::write(dir.path().join(REQUEST_FILE), " 2:[gpu]\n").unwrap();
        assert_eq!(request(&["t"]), "2:[gpu]");
        assert_eq!(request(&["t", "[v100]"]), "[v100]");
    }

    #[test]
    fn a_request_that_is_none_is_shown_with_a_caret() {
        let dir = tempfile::tempdir().unwrap();
        let error = wish(args(&["t", "2:[v100"]), dir.path()).unwrap_err();
        let (status, explanation) = explain(&error);
        let explanation = explanation.unwrap();
        assert_eq!(status, Status::FAILED);
        assert_eq!(explanation.message, "the request cannot be understood");
        let excerpt = explanation.excerpt.unwrap();
        assert!(excerpt.starts_with("2:[v100\n       ^ expected"), "{excerpt}");
        std::fs::write(dir.path().join(REQUEST_FILE), "nonsense").unwrap();
        let error = wish(args(&["t"]), dir.path()).unwrap_err();
        let place = format!("{}/.pitrequest.txt:1:1: ", dir.path().display());
        assert!(error.to_string().starts_with(&place), "{error}");
        std::fs::write(dir.path().join(REQUEST_FILE), b"2:[]\n\xff").unwrap();
        let error = wish(args(&["t"]), dir.path()).unwrap_err();
        assert!(error.to_string().contains(".pitrequest.txt:2: expected"), "{error}");
        std::fs::write(dir.path().join(REQUEST_FILE), " ".repeat(TEXT_BYTES_MAX + 100)).unwrap();
        assert!(wish(args(&["t"]), dir.path()).is_err());
    }

    #[test]
    fn a_value_that_is_none_is_bad_usage() {
        for line in [
            ["t", "--env", "A"],
            ["t", "--env", "=1"],
            ["t", "--env", "A B=1"],
            ["t", "--env", "1A=1"],
            ["t", "--time", "0s"],
            ["t", "--time", "5"],
            [" ", "--time", "5s"],
        ] {
            let parsed = Line::try_parse_from([&["run"], &line[..]].concat());
            assert!(parsed.is_err(), "{line:?}");
        }
    }

    #[test]
    fn an_artifact_takes_one_path_and_leaves_title_and_request_alone() {
        let args = args(&["--artifact", "out", "My task", "[v100]"]);
        assert_eq!((args.title.as_str(), args.request.as_deref()), ("My task", Some("[v100]")));
        assert_eq!(args.artifact, ["out"]);
    }

    #[test]
    fn a_title_and_a_request_in_each_others_place_are_told_apart() {
        let swapped = wish(args(&["2:[v100]", "my title"]), Path::new("/nonexistent"));
        let (_, explanation) = explain(&swapped.unwrap_err());
        assert!(explanation.unwrap().hint.unwrap().starts_with("the title comes first"));
        assert!(wish(args(&["2:[v100]", "[v100]"]), Path::new("/nonexistent")).is_ok());
    }
}
