//! Directories of jobs that were given up, until their time is over.
//!
//! ```text
//! <home>/trash/jobs/JOB.removed      what jobs/JOB was
//! <home>/trash/copies/JOB.expired    what copies/JOB was
//! ```
//!
//! A directory is here or in its place, by one rename. All calls block.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, FileTimes},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use p2pit_protocol::JobId;

use super::{
    roots::{Dropped, jobs_in, names_in},
    usage,
};
use crate::{home::Home, workspace::remove_tree};

/// What was put here from further in the future was put here under a clock that was wrong.
const FUTURE_MAX: Duration = Duration::from_secs(300);

/// The two directories that have one for each job.
pub(super) const KINDS: [&str; 2] = ["jobs", "copies"];

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Bin {
    home: Home,
}

fn ending(why: Dropped) -> &'static str {
    match why {
        Dropped::Removed => "removed",
        Dropped::Expired => "expired",
    }
}

impl Bin {
    pub(super) fn of(home: &Home) -> Self {
        Self { home: home.clone() }
    }

    fn place(&self, kind: &str, job: JobId) -> PathBuf {
        self.home.path().join(kind).join(job.to_string())
    }

    fn dir(&self, kind: &str) -> PathBuf {
        self.home.trash().join(kind)
    }

    /// The jobs that have anything in its place.
    pub(super) fn jobs(&self) -> io::Result<Vec<JobId>> {
        let mut jobs = Vec::new();
        for kind in KINDS {
            jobs.extend(jobs_in(&self.home.path().join(kind))?);
        }
        jobs.sort_unstable();
        jobs.dedup();
        Ok(jobs)
    }

    /// The jobs that were removed and can be had back.
    pub(super) fn removed(&self) -> io::Result<Vec<JobId>> {
        let mut jobs: Vec<JobId> =
            self.away(Dropped::Removed)?.into_iter().map(|(job, _)| job).collect();
        jobs.sort_unstable();
        jobs.dedup();
        Ok(jobs)
    }

    /// The jobs that were too old and can be had back, and whether they were put here at a time
    /// that is still to come: then the clock was wrong, and so may be how old they seemed.
    pub(super) fn expired(&self) -> io::Result<BTreeMap<JobId, bool>> {
        let mut jobs = BTreeMap::new();
        for (job, path) in self.away(Dropped::Expired)? {
            let soon = SystemTime::now() + FUTURE_MAX;
            let is_early = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata.modified()? > soon,
                // Purged meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            *jobs.entry(job).or_default() |= is_early;
        }
        Ok(jobs)
    }

    fn away(&self, why: Dropped) -> io::Result<Vec<(JobId, PathBuf)>> {
        let mut away = Vec::new();
        for kind in KINDS {
            let dir = self.dir(kind);
            for name in names_in(&dir)? {
                let Some((job, end)) = name.rsplit_once('.') else { continue };
                if end == ending(why) {
                    away.extend(job.parse().ok().map(|job| (job, dir.join(&name))));
                }
            }
        }
        Ok(away)
    }

    /// Moves what there is of a job here; whether that was anything.
    pub(super) fn put(&self, job: JobId, why: Dropped) -> io::Result<bool> {
        let mut moved = false;
        for kind in KINDS {
            let (from, dir) = (self.place(kind, job), self.dir(kind));
            if !from.is_dir() {
                continue;
            }
            DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
            let to = dir.join(format!("{job}.{}", ending(why)));
            // What was brought back and given up again: the older one has had its time.
            remove_tree(&to).map_err(|residue| residue.source)?;
            let now = SystemTime::now();
            File::open(&from)?.set_times(FileTimes::new().set_modified(now))?;
            fs::rename(&from, &to)?;
            moved = true;
        }
        Ok(moved)
    }

    /// Puts what is here of a job back into its place; whether that was anything.
    pub(super) fn take_back(&self, job: JobId) -> io::Result<bool> {
        let mut moved = false;
        // What was removed last is the newer one.
        let all = [Dropped::Removed, Dropped::Expired];
        for (kind, why) in KINDS.iter().flat_map(|kind| all.map(|why| (kind, why))) {
            let from = self.dir(kind).join(format!("{job}.{}", ending(why)));
            let to = self.place(kind, job);
            if !to.exists() {
                moved |= rename(&from, &to)?;
                continue;
            }
            // What was begun anew meanwhile stays what it is; the rest comes back beside it.
            for name in names_in(&from)? {
                let to = to.join(&name);
                moved |= !to.exists() && rename(&from.join(&name), &to)?;
            }
        }
        Ok(moved)
    }

    /// Deletes what has been here for so long, and what was removed only where `removed_too`;
    /// what cannot be deleted is named.
    pub(super) fn purge(&self, kept: Duration, removed_too: bool) -> io::Result<Vec<String>> {
        let old = self.all(removed_too)?.into_iter().filter(|(at, _)| {
            let age = at.elapsed().unwrap_or_default();
            age >= kept
        });
        Ok(delete(old.map(|(_, path)| path)))
    }

    /// What takes room here, the oldest first: bytes of disk, each. As [`Self::purge`] otherwise.
    pub(super) fn sizes(&self, removed_too: bool) -> io::Result<Vec<(u64, PathBuf)>> {
        let mut all = self.all(removed_too)?;
        all.sort();
        let paths: Vec<PathBuf> = all.into_iter().map(|(_, path)| path).collect();
        Ok(usage::of(&paths)?.into_iter().zip(paths).collect())
    }

    fn all(&self, removed_too: bool) -> io::Result<Vec<(SystemTime, PathBuf)>> {
        let mut all = Vec::new();
        for kind in KINDS {
            let dir = self.dir(kind);
            for name in names_in(&dir)? {
                let path = dir.join(&name);
                match fs::symlink_metadata(&path) {
                    Ok(metadata) if removed_too || !name.ends_with(".removed") => {
                        all.push((metadata.modified()?, path));
                    }
                    Ok(_) => {}
                    // Taken back meanwhile.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(all)
    }
}

/// Deletes these for good; what cannot be deleted is named.
pub(super) fn delete(paths: impl IntoIterator<Item = PathBuf>) -> Vec<String> {
    let mut residues = Vec::new();
    for path in paths {
        // By another name: nobody takes back what is half gone.
        let going = path.with_extension("going");
        match rename(&path, &going) {
            Ok(_) => {}
            Err(e) => {
                residues.push(format!("{}: {e}", path.display()));
                continue;
            }
        }
        if let Err(residue) = remove_tree(&going) {
            residues.push(format!("{residue}: {}", residue.source));
        }
    }
    residues
}

/// Whether there was anything to be moved.
fn rename(from: &Path, to: &Path) -> io::Result<bool> {
    match fs::rename(from, to) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_there_can_be_had_back_until_it_is_purged() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&dir.path().join("home")).unwrap();
        let bin = Bin::of(&home);
        let [one, two] = [1, 2].map(|n| JobId([n; 32]));
        for job in [one, two] {
            for kind in KINDS {
                let rank = bin.place(kind, job).join("1-0");
                fs::create_dir_all(&rank).unwrap();
                fs::write(rank.join("log"), "said").unwrap();
            }
        }
        assert_eq!(bin.jobs().unwrap(), [one, two]);
        assert!(bin.put(one, Dropped::Removed).unwrap());
        assert!(bin.put(two, Dropped::Expired).unwrap());
        assert!(!bin.put(one, Dropped::Removed).unwrap());
        assert_eq!((bin.jobs().unwrap(), bin.removed().unwrap()), (vec![], vec![one]));
        assert!(bin.take_back(one).unwrap() && !bin.take_back(one).unwrap());
        assert_eq!(bin.expired().unwrap(), [(two, false)].into());
        assert_eq!(fs::read_to_string(bin.place("copies", one).join("1-0/log")).unwrap(), "said");
        // Removed again: its time begins again, too.
        bin.put(one, Dropped::Removed).unwrap();
        assert!(bin.purge(Duration::from_secs(60), true).unwrap().is_empty());
        assert_eq!(bin.removed().unwrap(), [one]);
        assert!(bin.purge(Duration::ZERO, false).unwrap().is_empty());
        let left: Vec<PathBuf> =
            bin.sizes(true).unwrap().into_iter().map(|(_, path)| path).collect();
        assert_eq!(left.len(), 2, "what expired is gone: {left:?}");
        assert!(bin.purge(Duration::ZERO, true).unwrap().is_empty());
        assert!(bin.removed().unwrap().is_empty() && !bin.take_back(one).unwrap());
    }

    #[test]
    fn what_expired_comes_back_and_is_known_as_put_here_by_a_wrong_clock() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&dir.path().join("home")).unwrap();
        let bin = Bin::of(&home);
        let job = JobId([1; 32]);
        for kind in KINDS {
            fs::create_dir_all(bin.place(kind, job).join("1-0")).unwrap();
        }
        assert!(bin.put(job, Dropped::Expired).unwrap());
        assert_eq!(bin.expired().unwrap(), [(job, false)].into());
        let put = File::open(bin.dir("jobs").join(format!("{job}.expired"))).unwrap();
        let later = SystemTime::now() + 2 * FUTURE_MAX;
        put.set_times(FileTimes::new().set_modified(later)).unwrap();
        assert_eq!(bin.expired().unwrap(), [(job, true)].into());
        assert!(bin.take_back(job).unwrap());
        assert!(KINDS.iter().all(|kind| bin.place(kind, job).join("1-0").is_dir()));
        assert!(bin.expired().unwrap().is_empty() && !bin.take_back(job).unwrap());
    }

    #[test]
    fn what_was_begun_anew_keeps_no_other_rank_in_the_trash() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&dir.path().join("home")).unwrap();
        let bin = Bin::of(&home);
        let job = JobId([1; 32]);
        let write = |rank: &str, text: &str| {
            let rank = bin.place("copies", job).join(rank);
            fs::create_dir_all(&rank).unwrap();
            fs::write(rank.join("log"), text).unwrap();
        };
        write("1-0", "old");
        write("1-1", "old");
        assert!(bin.put(job, Dropped::Removed).unwrap());
        write("1-0", "new");
        assert!(bin.take_back(job).unwrap());
        let log = |rank: &str| {
            fs::read_to_string(bin.place("copies", job).join(rank).join("log")).unwrap()
        };
        assert_eq!((log("1-0").as_str(), log("1-1").as_str()), ("new", "old"));
        assert!(!bin.take_back(job).unwrap());
    }
}
