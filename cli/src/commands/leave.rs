//! `p2pit leave`: this node out of its pool.

use std::{collections::BTreeSet, fs, io, path::Path, time::Duration};

use anyhow::Context as _;
use p2pit_node::{
    api::types::{HandedOver, Me, NodeInfo, OnlyHere, Parting, path},
    home::Home,
};
use p2pit_protocol::{
    JobId, PeerId,
    job::RankState,
    job::State,
    message::JobFilter,
    record::quorum_of,
    roster::{Kind, Leave},
};

use crate::{
    args::Globals,
    daemon_process,
    jobs::{self, Gathered},
    names::short_job,
    output::Output,
    problem::Problem,
    processes,
    session::Session,
    status::Status,
    tickets,
    view::{Job, Rank},
};

/// Take this node out of its pool, and end its daemon
///
/// What only this node has of jobs, logs and files, also what those need that are not over, is
/// copied to others first.
///
/// The home stays yours: its key, settings and blobs remain, and `p2pit join` can use it
/// for another pool.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit leave\n  p2pit leave --force    also while jobs run \
    here: they are lost")]
pub(crate) struct Args {
    /// Leave at once, although jobs are lost by it: those that run here, those that too few
    /// others keep, and what only this node has of finished ones
    #[arg(long, visible_alias = "now")]
    force: bool,
}

/// Finished jobs that are looked through.
const DONE_MAX: u32 = 1_000;
/// Jobs named in a message.
const LISTED_MAX: usize = 10;
/// How long the others may take to hear of it.
const HEARD_WITHIN: Duration = Duration::from_secs(3);
const HEARD_POLL: Duration = Duration::from_millis(50);
/// Between two looks at what others have copied.
const COPIED_POLL: Duration = Duration::from_millis(500);
/// For processes of jobs that are lost by leaving.
const END_WITHIN: Duration = Duration::from_secs(5);

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let session = Session::open(globals, out).await?;
    let me = session.me().await?;
    let nodes: Vec<NodeInfo> = session.client.get(path::NODES).await?;
    if !args.force {
        refuse_with_jobs(&session, &me, &nodes).await?;
    }
    wait_for_copies(&session, out, args.force).await?;
    let others: Vec<&NodeInfo> = nodes.iter().filter(|node| node.node != me.node).collect();
    let is_alone = !others.iter().any(|node| node.reach == "online");
    if is_alone && !others.is_empty() && !args.force {
        return Err(Problem::request("no other node of the pool is online to hear of it")
            .hint("`p2pit leave --force` leaves; the others go on expecting this node")
            .into());
    }
    // Which claims end is for the daemon to fill in; what it drafts is checked.
    if !is_alone {
        // As a member: the others do not listen to who has left.
        let HandedOver { handed, left } = session.client.post(path::HAND_OVER, &()).await?;
        if handed > 0 {
            out.note(&format!("other nodes drive {handed} of the pool's jobs now"));
        }
        if left > 0 {
            out.warn(&format!("{left} jobs driven here stand still until others notice"));
        }
    }
    let leave = Leave { node: me.node, claims: Vec::new() };
    tickets::state(&session.client, &session.identity, Kind::Leave(leave)).await?;
    if !is_alone {
        wait_until_heard(&session).await?;
    }
    daemon_process::end(&session.client, me.pid).await?;
    let home = session.home.clone();
    tokio::task::spawn_blocking(move || forget_pool(&home)).await??;
    out.note(&format!("node {} has left {}", me.name, pool_name(&me)));
    Ok(Status::DONE)
}

fn pool_name(me: &Me) -> &str {
    me.pool.as_ref().map_or("its pool", |pool| &pool.name)
}

async fn refuse_with_jobs(session: &Session, me: &Me, nodes: &[NodeInfo]) -> anyhow::Result<()> {
    let filter = JobFilter { owner: None, done_max: DONE_MAX };
    let Gathered { jobs, names, silent, .. } = jobs::gather(session, filter).await?;
    // Whether or not anybody who keeps them answers: what runs here, this node knows.
    let is_live = |job: &JobId| {
        let known = jobs.jobs.iter().find(|known| known.id == *job);
        known.is_none_or(|known| known.state != State::Done)
    };
    let working_for: Vec<String> =
        me.working_for.iter().filter(|job| is_live(job)).map(|job| names.job(*job)).collect();
    refuse_unseen(&working_for, &silent)?;
    let me = me.node;
    let name = names.node(me);
    let online: BTreeSet<&str> =
        nodes.iter().filter(|it| it.reach == "online").map(|it| it.name.as_str()).collect();
    let lost = jobs.jobs.iter().filter(|job| is_lost(job, me, &name, &online));
    let (done, live): (Vec<&Job>, Vec<&Job>) = lost.partition(|job| job.state == State::Done);
    if !live.is_empty() {
        let message = format!("jobs run here, or are kept by too few others: {}", list(&live));
        return Err(Problem::request(message)
            .hint("wait for them or `p2pit stop` them; `p2pit leave --force` loses them")
            .into());
    }
    if done.is_empty() {
        return Ok(());
    }
    Err(only_here(&list(&done)).into())
}

fn only_here(jobs: &str) -> Problem {
    Problem::request(format!("finished jobs, their logs and files are kept only here: {jobs}"))
        .hint("`p2pit download JOB` saves what one left; `p2pit leave --force` loses them")
}

/// Returns once others have what only this node had; refuses where nobody could.
async fn wait_for_copies(session: &Session, out: &Output, force: bool) -> anyhow::Result<()> {
    let mut known = None;
    loop {
        let Parting { only_here, has_heirs } = session.client.post(path::PARTING, &()).await?;
        if only_here.is_empty() {
            return Ok(());
        }
        let jobs: Vec<String> = only_here.iter().map(|only| short_job(only.job)).collect();
        let jobs = list_texts(&jobs);
        if force {
            out.warn(&lost(&only_here));
            return Ok(());
        }
        if !has_heirs {
            return Err(self::only_here(&jobs).into());
        }
        if known.as_ref() != Some(&jobs) {
            out.note(&format!(
                "others are copying what only this node has of jobs {jobs}; `p2pit leave --now` \
                 does not wait for that, and loses it"
            ));
            let silent = only_here.iter().flat_map(|only| only.silent.iter().cloned());
            let silent: Vec<String> = silent.collect::<BTreeSet<_>>().into_iter().collect();
            if !silent.is_empty() {
                out.note(&format!(
                    "{} may know that others have it, but cannot be asked now: this waits for them",
                    list_texts(&silent)
                ));
            }
            known = Some(jobs);
        }
        tokio::time::sleep(COPIED_POLL).await;
    }
}

/// What is lost with this node.
fn lost(only_here: &[OnlyHere]) -> String {
    let texts = |is_it: fn(&OnlyHere) -> bool| {
        let those = only_here.iter().filter(|only| is_it(only));
        let texts: Vec<String> = those.map(|only| short_job(only.job)).collect();
        (!texts.is_empty()).then(|| list_texts(&texts))
    };
    let left = texts(|only| only.processes > 0)
        .map(|jobs| format!("what only this node has of jobs is lost: {jobs}"));
    let needed = texts(|only| only.needed > 0).map(|jobs| {
        format!(
            "jobs that are not over lose inputs, or what they kept and would go on with: {jobs}"
        )
    });
    left.into_iter().chain(needed).collect::<Vec<_>>().join("; ")
}

/// Refuses for jobs that this node works for, and for those that nobody tells of.
fn refuse_unseen(working_for: &[String], silent: &[String]) -> Result<(), Problem> {
    if !working_for.is_empty() {
        let message = format!("jobs run here: {}", list_texts(working_for));
        return Err(Problem::request(message)
            .hint("wait for them or `p2pit stop` them; `p2pit leave --force` loses them"));
    }
    if !silent.is_empty() {
        let message = format!(
            "jobs kept by {} are not known here, since these do not answer: this node may be \
             needed for them, or have what they left",
            list_texts(silent)
        );
        return Err(Problem::request(message).hint(
            "`p2pit show nodes` says which nodes are online; `p2pit leave --force` leaves all \
             the same",
        ));
    }
    Ok(())
}

/// Short ids, the first few of many.
fn list(jobs: &[&Job]) -> String {
    let texts: Vec<String> = jobs.iter().map(|job| job.short.clone()).collect();
    list_texts(&texts)
}

fn list_texts(texts: &[String]) -> String {
    let shown = texts.get(..LISTED_MAX).unwrap_or(texts);
    match texts.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Whether a process of the job is lost with this node, or its record: of a live job where too
/// few of the other keepers are `online` to record anything, of one that is over where none is.
fn is_lost(job: &Job, me: PeerId, name: &str, online: &BTreeSet<&str>) -> bool {
    let runs_here = |rank: &Rank| rank.node_id == me && rank.state != RankState::Ended;
    let others = job.keepers.iter().filter(|keeper| online.contains(keeper.as_str())).count();
    let needed = if job.state == State::Done { 1 } else { quorum_of(job.keepers.len()) };
    let is_kept_here = job.keepers.iter().any(|keeper| keeper == name);
    job.ranks.iter().any(runs_here) || (is_kept_here && others < needed)
}

/// Returns once every node that was connected has let go of this one, which they do when
/// they hear that it left; or when they had time enough.
async fn wait_until_heard(session: &Session) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + HEARD_WITHIN;
    while tokio::time::Instant::now() < deadline && session.me().await?.connected > 0 {
        tokio::time::sleep(HEARD_POLL).await;
    }
    Ok(())
}

/// Removes what makes the home a member's, once no daemon uses it.
fn forget_pool(home: &Home) -> anyhow::Result<()> {
    processes::end_below(&home.run(), END_WITHIN)?;
    for dir in [home.journal(), home.index(), home.run()] {
        remove(&dir, fs::remove_dir_all)?;
    }
    remove(&home.path().join("ports.json"), fs::remove_file)?;
    remove(&tickets::file_of(home), fs::remove_file)
}

fn remove<P: AsRef<Path>>(path: P, remove: impl FnOnce(P) -> io::Result<()>) -> anyhow::Result<()> {
    let shown = path.as_ref().display().to_string();
    match remove(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {shown}"))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::samples::{self, peer};

    #[test]
    fn a_job_is_lost_with_the_node_that_runs_it() {
        let mut job = samples::job(State::Running, None);
        let keepers: Vec<String> = job.keepers.clone();
        let online: BTreeSet<&str> = keepers.iter().map(String::as_str).collect();
        assert!(is_lost(&job, peer(1), "n1", &online), "it runs here");
        assert!(!is_lost(&job, peer(2), "n2", &online));
        job.ranks[0].state = RankState::Ended;
        assert!(!is_lost(&job, peer(1), "n1", &online));
        let done = samples::job(State::Done, None);
        assert!(!is_lost(&done, peer(2), "n2", &online));
    }

    #[test]
    fn a_node_is_not_left_while_it_works_or_who_keeps_jobs_is_silent() {
        let texts = |texts: &[&str]| texts.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        assert_eq!(refuse_unseen(&[], &[]), Ok(()));
        let works = refuse_unseen(&texts(&["abcd"]), &texts(&["n2"])).unwrap_err();
        assert!(works.is_request() && works.to_string() == "jobs run here: abcd", "{works}");
        let silent = refuse_unseen(&[], &texts(&["n2", "n3"])).unwrap_err();
        assert!(silent.to_string().contains("kept by n2, n3"), "{silent}");
        let many = vec!["x".to_owned(); LISTED_MAX + 2];
        assert!(refuse_unseen(&many, &[]).unwrap_err().to_string().ends_with("x and 2 more"));
    }

    #[test]
    fn what_is_lost_at_once_is_said_of_jobs_that_are_over_and_of_those_that_are_not() {
        let only = |n, processes, needed| OnlyHere {
            job: JobId([n; 32]),
            processes,
            needed,
            silent: Vec::new(),
        };
        let [one, two] = [1, 2].map(|n| short_job(JobId([n; 32])));
        let said = lost(&[only(1, 1, 0), only(2, 0, 2)]);
        let (left, needed) = said.split_once("; ").unwrap();
        assert!(left.contains(&one) && !left.contains(&two), "{said}");
        assert!(needed.contains(&two) && !needed.contains(&one), "{said}");
        assert!(needed.contains("not over"), "{said}");
        assert!(!lost(&[only(1, 1, 0)]).contains("not over"));
    }

    #[test]
    fn a_job_is_lost_where_too_few_others_keep_it() {
        let job = |state, outcome| {
            let mut job = samples::job(state, outcome);
            job.keepers = ["n7", "n8", "n9"].map(str::to_owned).to_vec();
            job
        };
        let is_lost = |job: &Job, online: &[&str]| {
            is_lost(job, peer(7), "n7", &online.iter().copied().collect())
        };
        let waiting = job(State::Waiting, None);
        assert!(!is_lost(&waiting, &["n8", "n9"]), "two of three go on");
        assert!(is_lost(&waiting, &["n8", "n5"]), "one of three cannot");
        let done = job(State::Done, None);
        assert!(!is_lost(&done, &["n9"]), "one can be asked");
        assert!(is_lost(&done, &["n5"]));
    }

    #[test]
    fn what_made_a_home_a_members_is_removed_and_the_rest_stays() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&directory.path().join("home")).unwrap();
        for name in ["journal/1", "ports.json", "ticket", "config.yaml", "node.key"] {
            fs::write(home.path().join(name), "x").unwrap();
        }
        forget_pool(&home).unwrap();
        for gone in ["journal", "index", "ports.json", "ticket"] {
            assert!(!home.path().join(gone).exists(), "{gone}");
        }
        for kept in ["config.yaml", "node.key", "blobs", "p2pit-home"] {
            assert!(home.path().join(kept).exists(), "{kept}");
        }
        forget_pool(&home).unwrap();
    }
}
