//! `p2pit job`: what is done to a job's record, seldom and with care.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, IsTerminal as _, Write as _},
};

use p2pit_node::api::types::{Audience, NodeInfo, Recover, Survey, Surveyed, path};
use p2pit_protocol::{
    PeerId,
    identity::{Domain, SignedBytes},
    message::Command as Question,
    record::{ForceRecover, quorum_of},
    wire,
};

use crate::{
    args::Globals,
    identity::wall_ms,
    jobs::Found,
    names::Names,
    output::Output,
    problem::Problem,
    session::Session,
    status::Status,
    view::{Lost, Recovery},
};

/// Recover a job whose keepers are lost for good
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  p2pit job recover k3qz")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Recover(RecoverArgs),
}

/// Go on with a job although the majority of its keepers is lost for good
///
/// A job is kept by several nodes, and every change needs a majority of them. Where that will
/// never be there again, this goes on from what one of those that are left knows. What only the
/// lost ones knew is forgotten, and the job says from then on that it was recovered. Nodes that
/// are only off are better started again. For the job's owner and admins.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit job recover k3qz\n  p2pit job recover @last --yes")]
struct RecoverArgs {
    /// A unique prefix of its id, or `@last` for your newest job
    #[arg(value_name = "JOB")]
    job: String,
    /// Do not ask first
    #[arg(long, short)]
    yes: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let What::Recover(args) = args.what;
    let session = Session::open(globals, out).await?;
    let found = Found::by_text(&session, &args.job).await?;
    let nodes = session.client.get::<Vec<NodeInfo>>(path::NODES).await?;
    let names = Names::of(&nodes, &[]);
    let (survivor, surveyed) = survey(&session, &found, &names).await?;
    let short = &found.resolved.short;
    if surveyed.present.len() >= quorum_of(surveyed.keepers.len()) {
        let present: Vec<String> = surveyed.present.iter().map(|node| names.node(*node)).collect();
        let message = format!(
            "a majority of the keepers of job {short} is there: {}; nothing has to be recovered",
            present.join(", ")
        );
        return Err(Problem::request(message)
            .hint(format!("`p2pit show job:{short}` says how it stands"))
            .into());
    }
    let recovery = describe(&found, survivor, &surveyed, &nodes, &names);
    if surveyed.wait_s > 0 {
        let lost: Vec<&str> = recovery.lost.iter().map(|lost| lost.node.as_str()).collect();
        let message = format!(
            "job {short} cannot be recovered yet: of {}, too many have been missed for less than \
             a minute, and may come back",
            lost.join(", ")
        );
        let hint = format!("start them again, or try again in {} s", surveyed.wait_s);
        return Err(Problem::request(message).hint(hint).into());
    }
    out.warn(&recovery.text());
    if !args.yes && !confirm().await? {
        return Err(Problem::request("nothing was done")
            .hint(format!("`p2pit job recover {short} --yes` does it without asking"))
            .into());
    }
    let forced = ForceRecover {
        pool: found.pool,
        job: found.job(),
        by: session.user(),
        epoch: surveyed.epoch,
        next: surveyed.next,
        value_hash: surveyed.value_hash,
        at_ms: wall_ms(),
    };
    let key = session.identity.key();
    let signed = SignedBytes::sign(key, Domain::ForceRecover, wire::encode(&forced));
    let recover = Recover { node: survivor, signed };
    session.client.post::<BTreeMap<(), ()>>(path::RECOVER, &recover).await?;
    if args.json {
        out.data(out.format(true).recovery(&recovery))?;
    }
    out.note(&format!(
        "job {short} is recovered; it is driven again within a minute: `p2pit show job:{short}` \
         tells"
    ));
    Ok(Status::DONE)
}

/// Of these answers the one of whoever has everything that was chosen, as far as they know: the
/// latest epoch's highest ballot, whatever the sequence number. Present is then also who
/// answered, connected to that one or not.
fn newest_survivor(answers: Vec<(PeerId, Surveyed)>) -> Option<(PeerId, Surveyed)> {
    let at = |surveyed: &Surveyed| (surveyed.epoch, surveyed.accepted);
    let newest = answers.iter().max_by_key(|(_, surveyed)| at(surveyed))?;
    let (survivor, mut surveyed) = newest.clone();
    for (node, other) in answers {
        let is_keeper = other.epoch == surveyed.epoch && surveyed.keepers.contains(&node);
        if is_keeper && !surveyed.present.contains(&node) {
            surveyed.present.push(node);
        }
    }
    Some((survivor, surveyed))
}

/// Asks all nodes that can be asked what they know of the record.
async fn survey(
    session: &Session,
    found: &Found,
    names: &Names,
) -> anyhow::Result<(PeerId, Surveyed)> {
    let audience = session.client.get::<Audience>(path::KEEPERS).await?;
    let mut nodes = found.resolved.keepers.clone();
    nodes.extend(audience.nodes.into_iter().filter(|node| !found.resolved.keepers.contains(node)));
    let surveys = nodes.into_iter().map(async |node| {
        let signed = session.sign(found.pool, &[node], &Question::Job(found.job()))?;
        let survey = Survey { node, signed };
        anyhow::Ok((node, session.client.post::<Surveyed>(path::SURVEY, &survey).await))
    });
    let surveys = futures::future::try_join_all(surveys).await?;
    let (mut answers, mut reasons) = (Vec::new(), Vec::new());
    for (node, surveyed) in surveys {
        match surveyed {
            Ok(surveyed) => answers.push((node, surveyed)),
            Err(reason) => reasons.push(format!("{}: {reason:#}", names.node(node))),
        }
    }
    newest_survivor(answers).ok_or_else(|| {
        let short = &found.resolved.short;
        Problem::request(format!("job {short} cannot be recovered: {}", reasons.join("; ")))
            .hint("start a node that kept it, if there is one left: `p2pit show nodes`")
            .into()
    })
}

fn describe(
    found: &Found,
    survivor: PeerId,
    surveyed: &Surveyed,
    nodes: &[NodeInfo],
    names: &Names,
) -> Recovery {
    let lost = surveyed.keepers.iter().filter(|keeper| !surveyed.present.contains(keeper));
    let lost = lost.map(|keeper| {
        let node = nodes.iter().find(|node| node.node == *keeper);
        Lost { node: names.node(*keeper), heard_s: node.and_then(|node| node.advert_age_s) }
    });
    Recovery {
        id: found.job(),
        short: found.resolved.short.clone(),
        keepers: surveyed.keepers.len(),
        lost: lost.collect(),
        from: names.node(survivor),
        epoch: surveyed.epoch,
        seq: surveyed.seq,
        next: surveyed.next.iter().map(|(node, _)| names.node(*node)).collect(),
    }
}

/// What somebody at a terminal says; nobody elsewhere says yes.
pub(super) async fn confirm() -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Ok(false);
    }
    let answer = tokio::task::spawn_blocking(|| {
        let mut stderr = std::io::stderr().lock();
        stderr.write_all(b"Go on? [y/N] ").and_then(|()| stderr.flush())?;
        drop(stderr);
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer).map(|_| answer)
    });
    Ok(matches!(answer.await??.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::{StoreId, record::Ballot};

    use super::*;
    use crate::view::samples::peer;

    fn surveyed(n: u8, epoch: u32, counter: u64, seq: u64) -> (PeerId, Surveyed) {
        let store = StoreId([n; 16]);
        let surveyed = Surveyed {
            epoch,
            accepted: Ballot { counter, store },
            seq,
            value_hash: [n; 32],
            keepers: vec![peer(1), peer(2), peer(3)],
            present: vec![peer(n)],
            wait_s: 0,
            next: vec![(peer(n), store)],
        };
        (peer(n), surveyed)
    }

    #[test]
    fn a_record_is_recovered_from_the_highest_ballot_of_the_latest_epoch() {
        // What the first accepted in ballot 2 was never chosen: ballot 5 found something else.
        let answers = vec![surveyed(1, 1, 2, 9), surveyed(2, 1, 5, 8)];
        let (survivor, newest) = newest_survivor(answers).unwrap();
        assert_eq!((survivor, newest.seq), (peer(2), 8));
        let answers = vec![surveyed(1, 1, 9, 9), surveyed(2, 2, 0, 8)];
        assert_eq!(newest_survivor(answers).unwrap().0, peer(2));
        assert_eq!(newest_survivor(Vec::new()), None);
    }

    #[test]
    fn who_answers_for_the_epoch_is_there_although_the_others_do_not_see_it() {
        let answers = vec![surveyed(1, 1, 2, 9), surveyed(2, 1, 2, 9), surveyed(4, 1, 2, 9)];
        let (_, newest) = newest_survivor(answers).unwrap();
        let keepers = newest.present.iter().filter(|node| newest.keepers.contains(node));
        assert_eq!(keepers.count(), 2);
        let answers = vec![surveyed(1, 1, 2, 9), surveyed(2, 0, 2, 7)];
        assert_eq!(newest_survivor(answers).unwrap().1.present, [peer(1)], "one is behind");
    }
}
