//! What the ranks of a job left, as one tree: `keep/` and `artifacts/`, each the union of
//! all ranks' with conflicting paths under `rank<i>/`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path},
};

use anyhow::Context as _;
use p2pit_node::{
    api::types::{Copied, Fetch, Files, JobFiles, Manifest, Pull, PullEvent, RankFiles, path},
    transfer::{
        BlobStore, Pace, Tree, TreePath,
        exchange::{self, ReceiveError, Wanted},
        tree::{Entry, Kind, Listed, ListedKind},
    },
};
use p2pit_protocol::{
    BlobId, JobId, PeerId, PoolId,
    job::Attempt,
    message::{Command, JobView},
};

use crate::{
    client::pipe,
    follow::nodes_of,
    names::Names,
    output::{Output, Progress},
    problem::Problem,
    session::Session,
    view::{File, FileKind},
};

/// Failures of a node until another is asked, or none: it says only when it is asked again
/// that what it was sending has gone bad.
const FAILURES_MAX: u32 = 2;

pub(crate) const KEEP: &str = "keep";
pub(crate) const ARTIFACTS: &str = "artifacts";

/// The files of a job and who has which.
#[derive(Debug)]
pub(crate) struct Left {
    pool: PoolId,
    job: JobId,
    pub(crate) tree: Tree,
    /// Those that have shown their files.
    holders: BTreeMap<BlobId, Vec<PeerId>>,
    /// Others that may have any: keepers have copies.
    others: BTreeSet<PeerId>,
    /// Of whom nothing could be had.
    pub(crate) missing: Vec<String>,
    /// What is not of now.
    pub(crate) notes: Vec<String>,
}

/// Of each rank what is known to be the newest, and who has it.
#[derive(Debug, Default)]
struct Gathered {
    ranks: BTreeMap<u32, (PeerId, RankFiles)>,
    continued: Option<Manifest>,
    others: BTreeSet<PeerId>,
}

impl Gathered {
    /// A node may have run a rank in an earlier attempt than that of `now`, which says nothing
    /// where another runs it now.
    fn add(&mut self, node: PeerId, files: JobFiles, now: Attempt) {
        self.continued = self.continued.take().or(files.continued);
        // What the rank's node says itself is before any copy.
        let age = |files: &RankFiles| {
            let own = (files.copy.is_none() && files.attempt == now.0, files.attempt);
            (own, files.copy.is_none(), files.copy)
        };
        for rank in files.ranks {
            match self.ranks.get(&rank.rank) {
                Some((_, known)) if age(known) >= age(&rank) => {}
                Some(_) | None => drop(self.ranks.insert(rank.rank, (node, rank))),
            }
        }
        self.others.insert(node);
    }
}

type Asked = (Vec<(PeerId, JobFiles)>, Vec<(PeerId, anyhow::Error)>);

/// Asks each of the nodes for the files of ranks that ran there, or for its copies; those that
/// say that they have none are in neither list.
async fn ask(
    session: &Session,
    pool: PoolId,
    job: JobId,
    nodes: &[PeerId],
    copies: bool,
) -> anyhow::Result<Asked> {
    if nodes.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let signed = session.sign(pool, nodes, &Command::Files(job))?;
    let asked = nodes.iter().map(|&node| {
        let files = Files { node, signed: signed.clone(), copies };
        async move { session.client.post::<JobFiles>(path::FILES, &files).await }
    });
    let (mut answers, mut silent) = (Vec::new(), Vec::new());
    for (node, answer) in nodes.iter().zip(futures::future::join_all(asked).await) {
        match answer {
            Ok(files) => answers.push((*node, files)),
            Err(reason) => silent.push((*node, reason)),
        }
    }
    Ok((answers, silent))
}

impl Left {
    /// Asks every node of the job's ranks, and for those that do not answer the keepers, which
    /// have copies.
    pub(crate) async fn gather(
        session: &Session,
        pool: PoolId,
        view: &JobView,
    ) -> anyhow::Result<Self> {
        let nodes = nodes_of(view);
        let (answers, silent) = ask(session, pool, view.job, &nodes, false).await?;
        let attempt = view.attempt.number;
        let ranks_of = |node: PeerId| view.attempt.ranks.iter().filter(move |it| it.node == node);
        let mut gathered = Gathered::default();
        for (node, files) in answers {
            gathered.add(node, files, attempt);
        }
        let missing: Vec<u32> =
            silent.iter().flat_map(|(node, _)| ranks_of(*node)).map(|rank| rank.rank.0).collect();
        // Also before the next attempt has begun: what the last one kept.
        if !missing.is_empty() || nodes.is_empty() && attempt > Attempt(0) {
            let (answers, _) = ask(session, pool, view.job, &view.keepers, true).await?;
            for (node, files) in answers {
                gathered.add(node, files, attempt);
            }
        }
        let nothing = || missing.iter().all(|rank| !gathered.ranks.contains_key(rank));
        if gathered.ranks.is_empty() && !missing.is_empty() && nothing() {
            let reason = silent.into_iter().next().map(|(_, reason)| reason);
            let reason = reason.unwrap_or_else(|| anyhow::anyhow!("they do not answer"));
            return Err(reason.context("no node of the job can show its files"));
        }
        // Names are only for saying who is missing.
        let names =
            if silent.is_empty() { Names::default() } else { Names::load(&session.client).await? };
        let (mut missed, mut notes) = (Vec::new(), Vec::new());
        for (node, reason) in &silent {
            let name = names.node(*node);
            for rank in ranks_of(*node) {
                let rank = rank.rank.0;
                match gathered.ranks.get(&rank) {
                    None => missed.push(format!("node {name}: {reason:#}")),
                    Some((_, RankFiles { copy: Some(Copied::End) | None, .. })) => {}
                    Some((source, files)) => notes.push(format!(
                        "node {name} does not answer: keep/ of process {rank} is a copy that node \
                         {} has, taken while attempt {} ran",
                        names.node(*source),
                        files.attempt
                    )),
                }
            }
        }
        missed.dedup();
        let Gathered { ranks, continued, mut others } = gathered;
        others.extend(view.keepers.iter().copied());
        let (tree, holders) = unite(ranks.into_values().collect(), continued)?;
        Ok(Self { pool, job: view.job, tree, holders, others, missing: missed, notes })
    }

    pub(crate) fn job(&self) -> JobId {
        self.job
    }

    /// What is at `path`, or everything.
    pub(crate) fn at(&self, path: Option<&TreePath>) -> anyhow::Result<Tree> {
        let Some(path) = path else { return Ok(self.tree.clone()) };
        self.tree.subtree(path).ok_or_else(|| no_such_path(path).into())
    }

    /// What stands directly in `dir`, or at the top.
    pub(crate) fn list(&self, dir: Option<&TreePath>) -> anyhow::Result<Vec<File>> {
        let listed = self
            .tree
            .list(dir)
            .ok_or_else(|| no_such_path_at(dir.map(ToString::to_string).unwrap_or_default()))?;
        let is_file =
            |path: &TreePath| self.tree.get(path).is_some_and(|entry| entry.kind != Kind::Dir);
        let prefix = match dir {
            Some(dir) if is_file(dir) => {
                let (parent, _) = split_name(dir);
                parent
            }
            Some(dir) => format!("{dir}/"),
            None => String::new(),
        };
        Ok(listed.into_iter().map(|listed| file_of(&prefix, listed)).collect())
    }

    /// Brings the blobs of `tree` that `store` lacks, verified, into it. What one node cannot
    /// give is asked of the next that has it; what came stays there in any case.
    pub(crate) async fn fetch(
        &self,
        session: &Session,
        tree: &Tree,
        store: &BlobStore,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let blobs: Vec<(BlobId, u64)> = tree.blobs().into_iter().collect();
        let mut failed: BTreeMap<PeerId, (u32, anyhow::Error)> = BTreeMap::new();
        loop {
            let missing = lacking(store, &blobs).await?;
            let left: u64 = missing.iter().map(Wanted::bytes).sum();
            progress.skip(tree.total_bytes().saturating_sub(left));
            if missing.is_empty() {
                return Ok(());
            }
            let mut asked = BTreeMap::<PeerId, Vec<Wanted>>::new();
            for wanted in missing {
                let id = wanted.ask.id;
                let holders = self.sources_of(&id);
                let failures =
                    |node: &PeerId| failed.get(node).map_or(0, |(failures, _)| *failures);
                match holders.iter().find(|node| failures(node) < FAILURES_MAX) {
                    Some(node) => asked.entry(*node).or_default().push(wanted),
                    None => {
                        let failure = holders.iter().find_map(|it| Some((*it, failed.remove(it)?)));
                        return Err(match failure {
                            Some((node, (_, reason))) => {
                                let names = Names::load(&session.client).await?;
                                reason.context(format!("node {}", names.node(node)))
                            }
                            None => Problem::broken(format!("nobody has blob {id}")).into(),
                        });
                    }
                }
            }
            for (node, wanted) in asked {
                if let Err(reason) = self.fetch_from(session, node, &wanted, store, progress).await
                {
                    if reason.downcast_ref().is_some_and(ReceiveError::is_local) {
                        return Err(reason);
                    }
                    let failures = failed.get(&node).map_or(0, |(failures, _)| *failures);
                    failed.insert(node, (failures + 1, reason));
                }
            }
        }
    }

    async fn fetch_from(
        &self,
        session: &Session,
        node: PeerId,
        wanted: &[Wanted],
        store: &BlobStore,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let asks = wanted.iter().map(|wanted| wanted.ask.clone()).collect();
        let signed = session.sign(self.pool, &[node], &Command::Files(self.job))?;
        let fetch = Fetch { node, signed, asks };
        let stream = session.client.post_bytes(path::FETCH, &fetch).await?;
        let (writer, mut reader) = pipe();
        let bar = progress.clone();
        let (pace, on_bytes) = (Pace::unlimited(), move |n| bar.add(n));
        let receiving = exchange::receive_blobs(store, wanted, node, &mut reader, &pace, on_bytes);
        let mut receiving = std::pin::pin!(receiving);
        let (pumped, received) = tokio::select! {
            // Whatever else the node sends is of no use then.
            received = &mut receiving => (Ok(()), received),
            pumped = stream.pump(writer) => (pumped, receiving.await),
        };
        // What cut the stream short says more than that it was.
        if matches!(received, Err(ReceiveError::Truncated { .. })) {
            pumped?;
        }
        match received?.absent.first() {
            None => Ok(()),
            Some(blob) => Err(Problem::broken(format!("blob {blob} is not there any more")).into()),
        }
    }

    /// Who has shown a blob, and then who may have it.
    fn sources_of(&self, blob: &BlobId) -> Vec<PeerId> {
        let holders = self.holders.get(blob).map(Vec::as_slice).unwrap_or_default();
        let others = self.others.iter().filter(|node| !holders.contains(node));
        holders.iter().chain(others).copied().collect()
    }

    /// Has the daemon bring the blobs of `tree` into its own store.
    pub(crate) async fn pull(
        &self,
        session: &Session,
        out: &Output,
        tree: &Tree,
    ) -> anyhow::Result<()> {
        let blobs: Vec<(BlobId, u64)> = tree.blobs().into_iter().collect();
        let holders = blobs.iter().filter_map(|(id, _)| self.holders.get(id)).flatten();
        let holders = holders.copied().collect::<BTreeSet<PeerId>>();
        let nodes: Vec<PeerId> = holders.union(&self.others).copied().collect();
        let signed = session.sign(self.pool, &nodes, &Command::Files(self.job))?;
        let progress = out.progress("fetching", tree.total_bytes());
        let pull = Pull { nodes, signed, blobs };
        let mut events = session.client.post_lines(path::PULL, &pull).await?;
        while let Some(event) = events.next().await? {
            match event {
                PullEvent::Transferring { bytes_done } => {
                    progress.set(bytes_done, tree.total_bytes());
                }
                PullEvent::Pulled { .. } => {
                    progress.finish();
                    return Ok(());
                }
                PullEvent::Failed { error } => return Err(Problem::from(error).into()),
            }
        }
        Err(Problem::broken("the daemon ended before everything was fetched").into())
    }
}

async fn lacking(store: &BlobStore, blobs: &[(BlobId, u64)]) -> anyhow::Result<Vec<Wanted>> {
    let (store, blobs) = (store.clone(), blobs.to_vec());
    let missing = tokio::task::spawn_blocking(move || {
        let missing = blobs.iter().map(|(id, size)| Wanted::missing(&store, *id, *size));
        missing.filter_map(Result::transpose).collect::<Result<Vec<_>, _>>()
    });
    Ok(missing.await??)
}

/// A path inside a job's files as a person writes it; `None` is the top.
pub(crate) fn parse_path(path: &Path) -> anyhow::Result<Option<TreePath>> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    if relative.components().all(|component| component == Component::CurDir) {
        return Ok(None);
    }
    let path = TreePath::from_path(relative);
    Ok(Some(path.map_err(|e| Problem::request(e.to_string()))?))
}

fn no_such_path(path: &TreePath) -> Problem {
    no_such_path_at(path.to_string())
}

fn no_such_path_at(path: String) -> Problem {
    Problem::request(format!("the job has no file `{path}`"))
        .hint("`p2pit ls JOB` lists what it has")
}

fn split_name(path: &TreePath) -> (String, String) {
    let text = path.to_string();
    match text.rsplit_once('/') {
        Some((parent, name)) => (format!("{parent}/"), name.to_owned()),
        None => (String::new(), text),
    }
}

fn file_of(prefix: &str, Listed { name, kind }: Listed) -> File {
    let path = format!("{prefix}{}", String::from_utf8_lossy(&name));
    let kind = match kind {
        ListedKind::Dir { files, bytes } => FileKind::Dir { files, bytes },
        ListedKind::File { size, executable, .. } => FileKind::File { bytes: size, executable },
        ListedKind::Symlink { target } => {
            FileKind::Link { target: String::from_utf8_lossy(target.as_bytes()).into_owned() }
        }
    };
    File { path, kind }
}

type United = (Tree, BTreeMap<BlobId, Vec<PeerId>>);

fn unite(ranks: Vec<(PeerId, RankFiles)>, continued: Option<Manifest>) -> anyhow::Result<United> {
    let mut holders = BTreeMap::<BlobId, Vec<PeerId>>::new();
    let (mut keeps, mut artifacts) = (Vec::new(), Vec::new());
    for (node, RankFiles { rank, attempt: _, copy: _, keep, artifacts: left }) in ranks {
        for (manifest, trees) in [(keep, &mut keeps), (left, &mut artifacts)] {
            let Some(manifest) = manifest else { continue };
            let tree = Tree::decode(&manifest.0)
                .with_context(|| format!("the files of rank {rank} on node {node} are damaged"))?;
            for blob in tree.blobs().into_keys() {
                let nodes = holders.entry(blob).or_default();
                if !nodes.contains(&node) {
                    nodes.push(node);
                }
            }
            trees.push((rank, tree));
        }
    }
    let continued = continued.map(|manifest| Tree::decode(&manifest.0)).transpose();
    let continued = continued.context("what the job continued is damaged")?.unwrap_or_default();
    let mut entries = Vec::new();
    for (name, base, trees) in [(KEEP, continued, keeps), (ARTIFACTS, Tree::default(), artifacts)] {
        if trees.is_empty() {
            continue;
        }
        let dir = TreePath::from_bytes(name)?;
        let trees: Vec<(u32, &Tree)> = trees.iter().map(|(rank, tree)| (*rank, tree)).collect();
        let union =
            Tree::union_since(&base, &trees).context("the files of the ranks cannot be united")?;
        for Entry { path, kind } in union.entries() {
            entries.push(Entry { path: path.under(&dir)?, kind: kind.clone() });
        }
        // Gives way where there is something in it.
        entries.push(Entry { path: dir, kind: Kind::Dir });
    }
    Ok((Tree::new(entries)?, holders))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::samples::peer;

    fn tree(files: &[(&str, &str)]) -> Option<Manifest> {
        let entry = |(path, content): &(&str, &str)| Entry {
            path: TreePath::from_bytes(*path).unwrap(),
            kind: Kind::File {
                blob: BlobId::of(content.as_bytes()),
                size: content.len() as u64,
                executable: false,
            },
        };
        let tree = Tree::new(files.iter().map(entry).collect()).unwrap();
        Some(Manifest(tree.encode().unwrap()))
    }

    fn left() -> Left {
        let rank =
            |rank, keep, artifacts| RankFiles { rank, attempt: 1, copy: None, keep, artifacts };
        let (tree, holders) = unite(
            vec![
                (peer(1), rank(0, tree(&[("log", "a"), ("same", "s"), ("d/x", "xyz")]), tree(&[]))),
                (peer(2), rank(1, tree(&[("log", "b"), ("same", "s")]), None)),
            ],
            None,
        )
        .unwrap();
        let (pool, job) = (PoolId([0; 32]), JobId([0; 32]));
        let others = [peer(2), peer(3)].into();
        let (missing, notes) = (Vec::new(), Vec::new());
        Left { pool, job, tree, holders, others, missing, notes }
    }

    #[test]
    fn who_shown_a_blob_is_asked_before_who_may_have_it() {
        let left = left();
        let a = BlobId::of(b"a");
        assert_eq!(left.sources_of(&a), [peer(1), peer(2), peer(3)]);
        assert_eq!(left.sources_of(&BlobId::of(b"s")), [peer(1), peer(2), peer(3)]);
        assert_eq!(left.sources_of(&BlobId::of(b"?")), [peer(2), peer(3)]);
    }

    #[test]
    fn of_several_copies_the_newest_counts_and_what_a_node_says_of_its_own_most() {
        let files = |attempt, copy| JobFiles {
            node: peer(1),
            ranks: vec![RankFiles { rank: 0, attempt, copy, keep: None, artifacts: None }],
            continued: None,
        };
        let order = [
            files(1, Some(Copied::Save(9))),
            files(1, Some(Copied::End)),
            files(1, None),
            files(2, Some(Copied::Save(1))),
            files(2, Some(Copied::Save(2))),
            files(2, Some(Copied::End)),
            files(2, None),
        ];
        for (index, older) in order.iter().enumerate() {
            for newer in &order[index..] {
                for both in [[older, newer], [newer, older]] {
                    let mut gathered = Gathered::default();
                    for (n, files) in both.iter().enumerate() {
                        gathered.add(peer(n as u8), (*files).clone(), Attempt(2));
                    }
                    let (_, found) = &gathered.ranks[&0];
                    let of = |files: &RankFiles| (files.attempt, files.copy);
                    assert_eq!(of(found), of(&newer.ranks[0]));
                }
            }
        }
    }

    #[test]
    fn conflicting_files_stand_apart_and_the_rest_is_one() {
        let left = left();
        let paths: Vec<String> =
            left.tree.entries().iter().map(|entry| entry.path.to_string()).collect();
        let expected = ["artifacts", "keep/d/x", "keep/rank0/log", "keep/rank1/log", "keep/same"];
        assert_eq!(paths, expected);
    }

    #[test]
    fn a_listing_names_whole_paths() {
        let left = left();
        let paths = |dir: &str| -> Vec<String> {
            let dir = parse_path(Path::new(dir)).unwrap();
            left.list(dir.as_ref()).unwrap().into_iter().map(|file| file.path).collect()
        };
        assert_eq!(paths(""), ["artifacts", "keep"]);
        assert_eq!(paths("/keep/"), ["keep/d", "keep/rank0", "keep/rank1", "keep/same"]);
        assert_eq!(paths("./keep/d/x"), ["keep/d/x"]);
        let missing = left.list(parse_path(Path::new("nope")).unwrap().as_ref()).unwrap_err();
        assert_eq!(missing.to_string(), "the job has no file `nope`");
        assert!(parse_path(Path::new("../secret")).is_err());
    }

    #[test]
    fn every_node_that_has_a_blob_is_known_for_it() {
        let left = left();
        assert_eq!(left.holders[&BlobId::of(b"a")], [peer(1)]);
        assert_eq!(left.holders[&BlobId::of(b"b")], [peer(2)]);
        assert_eq!(left.holders[&BlobId::of(b"s")], [peer(1), peer(2)]);
    }
}
