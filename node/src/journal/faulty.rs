//! A disk in memory that fails on request and loses what a crash may lose.
//!
//! Content is durable once its file was synced, names once the directory was. Until then a
//! crash keeps any of the later changes: of names in any combination, of content down to
//! single bytes. A sync that fails drops what it should have written and shows it all the
//! same, as Linux does.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

use super::{
    Journal, Limits,
    disk::{Disk, LogFile},
};

#[derive(Debug, Clone)]
pub(crate) struct FaultyDisk {
    model: Arc<Mutex<Model>>,
    /// Whether syncs wait.
    stalled: Arc<(Mutex<bool>, Condvar)>,
}

/// The next operation of that kind fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// So many bytes get through, then the disk is full.
    ShortWrite(usize),
    SetLen,
    Sync,
    Create,
    Rename,
    SyncDir,
}

/// What is wrong from a certain operation on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// No room: writes get so many bytes through, new names and longer files none.
    Full { through: usize },
    /// That one operation fails, whatever it is; of a write, half gets through.
    Broken,
    /// Nothing can be changed any more.
    ReadOnly,
}

/// A state of the disk at one moment.
#[derive(Debug, Default, Clone)]
pub(super) struct Model {
    random: u64,
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Since the directory was synced.
    later_names: Vec<NameChange>,
    faults: Vec<Fault>,
    trouble: Option<(usize, Trouble)>,
    operations: usize,
    syncs: usize,
    /// The states after each operation, where they are kept.
    trail: Option<Vec<Model>>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Link(String, usize),
    Rename(String, String),
    Unlink(String),
}

#[derive(Debug, Default, Clone)]
struct Inode {
    content: Vec<u8>,
    durable: Vec<u8>,
    /// Since the file was synced.
    later: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
}

/// How much of a change a crash keeps.
#[derive(Debug, Clone, Copy)]
enum Kept {
    None,
    All,
    /// Of a write: its first bytes, with the file as long as these make it.
    First(usize),
    /// Of a write: its first bytes, with the file as long as the whole write makes it.
    FirstAndLength(usize),
    /// Of a write: all but this block.
    Without(usize),
    /// Of a write: only this block.
    Only(usize),
}

#[derive(Debug)]
struct FaultyFile {
    disk: FaultyDisk,
    inode: usize,
}

impl FaultyDisk {
    pub(crate) fn new(seed: u64) -> Self {
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self::at(Model { random, ..Model::default() })
    }

    fn at(model: Model) -> Self {
        Self { model: Arc::new(Mutex::new(model)), stalled: Arc::default() }
    }

    pub(super) fn boxed(&self) -> Box<dyn Disk> {
        Box::new(self.clone())
    }

    /// A journal on it, for tests of those who write one.
    pub(crate) fn journal(&self) -> Journal {
        Journal::open_on(self.boxed(), Limits::default()).unwrap().0
    }

    pub(super) fn fail_next(&self, fault: Fault) {
        self.model().faults.push(fault);
    }

    /// `None` ends it.
    pub(crate) fn trouble_at(&self, trouble: Option<(usize, Trouble)>) {
        self.model().trouble = trouble;
    }

    pub(crate) fn operations(&self) -> usize {
        self.model().operations
    }

    pub(super) fn syncs(&self) -> usize {
        self.model().syncs
    }

    /// Whether every sync waits from now on.
    pub(super) fn stall(&self, stalled: bool) {
        *self.stalled.0.lock().unwrap() = stalled;
        self.stalled.1.notify_all();
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.model().names.keys().cloned().collect()
    }

    pub(super) fn content(&self, name: &str) -> Vec<u8> {
        let model = self.model();
        model.inodes[model.inode(name).unwrap()].content.clone()
    }

    /// Puts `bytes` on the disk, durable.
    pub(super) fn replace(&self, name: &str, bytes: &[u8]) {
        let mut model = self.model();
        let inode = model.inodes.len();
        let (content, durable) = (bytes.to_vec(), bytes.to_vec());
        model.inodes.push(Inode { content, durable, later: Vec::new() });
        model.names.insert(name.to_owned(), inode);
        model.durable_names.insert(name.to_owned(), inode);
    }

    /// From now on keeps the state after each operation.
    pub(super) fn keep_trail(&self) {
        self.model().trail = Some(Vec::new());
    }

    pub(super) fn trail(&self) -> Vec<Model> {
        self.model().trail.clone().unwrap_or_default()
    }

    /// What is on the disk after losing power now, by chance.
    pub(super) fn crashed(&self, seed: u64) -> Box<dyn Disk> {
        let mut before = self.model().clone();
        before.random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        before.lost_by_chance().boxed()
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }
}

impl Model {
    pub(super) fn operations(&self) -> usize {
        self.operations
    }

    /// What is on the disk after every crash that is possible now: each combination of
    /// names; of the newest log each byte as the last that was kept, each block lost alone
    /// or kept alone; of other files all or nothing.
    pub(super) fn crashes(&self) -> Vec<FaultyDisk> {
        let mut seen = BTreeSet::new();
        let mut disks = Vec::new();
        for names in self.names_after_crash() {
            let generation = |name: &str| name.strip_prefix("log.")?.parse::<u64>().ok();
            let newest = names
                .iter()
                .filter_map(|(name, inode)| Some((generation(name)?, *inode)))
                .max()
                .map(|(_, inode)| inode);
            let mut states: Vec<BTreeMap<usize, Vec<u8>>> = vec![BTreeMap::new()];
            for inode in names.values() {
                let contents = self.inodes[*inode].after_crash(Some(*inode) == newest);
                states = states
                    .iter()
                    .flat_map(|state| {
                        contents.iter().map(|content| {
                            let mut state = state.clone();
                            state.insert(*inode, content.clone());
                            state
                        })
                    })
                    .collect();
            }
            for state in states {
                let files: Vec<(String, Vec<u8>)> = names
                    .iter()
                    .map(|(name, inode)| (name.clone(), state[inode].clone()))
                    .collect();
                if seen.insert(files.clone()) {
                    let disk = FaultyDisk::new(seen.len() as u64);
                    files.iter().for_each(|(name, bytes)| disk.replace(name, bytes));
                    disks.push(disk);
                }
            }
        }
        disks
    }

    fn names_after_crash(&self) -> BTreeSet<BTreeMap<String, usize>> {
        assert!(self.later_names.len() < 16, "{:?}", self.later_names);
        (0_u32..1 << self.later_names.len())
            .map(|kept| {
                let mut names = self.durable_names.clone();
                for (n, change) in self.later_names.iter().enumerate() {
                    if kept & (1 << n) != 0 {
                        change.apply(&mut names);
                    }
                }
                names
            })
            .collect()
    }

    fn lost_by_chance(mut self) -> FaultyDisk {
        let all: Vec<_> = self.names_after_crash().into_iter().collect();
        let names = all[self.below(all.len())].clone();
        let disk = FaultyDisk::new(self.random);
        for (name, inode) in names {
            let inode = self.inodes[inode].clone();
            let mut content = inode.durable;
            for change in &inode.later {
                let kept = match (self.below(4), change.bytes()) {
                    (0, _) => Kept::None,
                    (1, _) => Kept::All,
                    (_, 0) => Kept::All,
                    (2, bytes) => Kept::First(self.below(bytes + 1)),
                    (_, bytes) => Kept::Without(self.below(bytes.div_ceil(BLOCK_BYTES))),
                };
                change.apply(&mut content, kept);
            }
            disk.replace(&name, &content);
        }
        disk
    }

    fn below(&mut self, end: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 8) as usize % end
    }

    /// Counts an operation; an error where it is in trouble.
    fn operation(&mut self, needs_room: bool) -> io::Result<()> {
        self.operations += 1;
        match self.trouble {
            Some((at, Trouble::Full { .. })) if self.operations >= at && needs_room => {
                Err(io::ErrorKind::StorageFull.into())
            }
            Some((at, Trouble::ReadOnly)) if self.operations >= at => {
                Err(io::ErrorKind::ReadOnlyFilesystem.into())
            }
            Some((at, Trouble::Broken)) if self.operations == at => {
                Err(io::Error::other("injected"))
            }
            _ => Ok(()),
        }
    }

    fn fault(&mut self, fault: Fault) -> io::Result<()> {
        match self.faults.iter().position(|f| *f == fault) {
            Some(at) => {
                self.faults.remove(at);
                Err(io::Error::other(format!("injected: {fault:?}")))
            }
            None => Ok(()),
        }
    }

    fn inode(&self, name: &str) -> io::Result<usize> {
        self.names.get(name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn rename(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.later_names.push(change);
    }

    fn change(&mut self, inode: usize, change: Change) {
        change.apply(&mut self.inodes[inode].content, Kept::All);
        self.inodes[inode].later.push(change);
    }

    fn remember(&mut self) {
        if let Some(mut trail) = self.trail.take() {
            trail.push(self.clone());
            self.trail = Some(trail);
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Link(name, inode) => {
                names.insert(name.clone(), *inode);
            }
            Self::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
            Self::Unlink(name) => {
                names.remove(name);
            }
        }
    }
}

impl Inode {
    fn after_crash(&self, every: bool) -> BTreeSet<Vec<u8>> {
        let with = |kept: &dyn Fn(usize) -> Kept| {
            let mut content = self.durable.clone();
            for (n, change) in self.later.iter().enumerate() {
                change.apply(&mut content, kept(n));
            }
            content
        };
        let mut contents = BTreeSet::from([with(&|_| Kept::None), with(&|_| Kept::All)]);
        if !every {
            return contents;
        }
        for (n, change) in self.later.iter().enumerate() {
            let blocks = change.bytes().div_ceil(BLOCK_BYTES);
            let parts = (0..=change.bytes())
                .flat_map(|bytes| [Kept::First(bytes), Kept::FirstAndLength(bytes)])
                .chain((0..blocks).flat_map(|block| [Kept::Without(block), Kept::Only(block)]));
            for part in parts {
                for others in [[Kept::All, Kept::None], [Kept::All; 2], [Kept::None, Kept::All]] {
                    contents.insert(with(&|it| match it.cmp(&n) {
                        std::cmp::Ordering::Less => others[0],
                        std::cmp::Ordering::Equal => part,
                        std::cmp::Ordering::Greater => others[1],
                    }));
                }
            }
        }
        contents
    }
}

impl Change {
    fn bytes(&self) -> usize {
        match self {
            Self::Write { bytes, .. } => bytes.len(),
            Self::SetLen(_) => 0,
        }
    }

    fn apply(&self, content: &mut Vec<u8>, kept: Kept) {
        let Self::Write { offset, bytes } = self else {
            let Self::SetLen(length) = self else { unreachable!() };
            if !matches!(kept, Kept::None) {
                content.resize(*length, 0);
            }
            return;
        };
        let block = |n: usize| n * BLOCK_BYTES..bytes.len().min((n + 1) * BLOCK_BYTES);
        let none = 0..0;
        let (length, ranges) = match kept {
            Kept::None => return,
            Kept::All => (bytes.len(), [0..bytes.len(), none]),
            Kept::First(count) => (count, [0..count, none]),
            Kept::FirstAndLength(count) => (bytes.len(), [0..count, none]),
            Kept::Without(n) => (bytes.len(), [0..block(n).start, block(n).end..bytes.len()]),
            Kept::Only(n) => (bytes.len(), [block(n), none]),
        };
        content.resize(content.len().max(offset + length), 0);
        for range in ranges {
            content[offset + range.start..offset + range.end].copy_from_slice(&bytes[range]);
        }
    }
}

/// Small, so that a frame spans several.
const BLOCK_BYTES: usize = 16;

impl Disk for FaultyDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn LogFile>> {
        let mut model = self.model();
        model.operation(true)?;
        model.fault(Fault::Create)?;
        let inode = model.inodes.len();
        model.inodes.push(Inode::default());
        model.rename(NameChange::Link(name.to_owned(), inode));
        model.remember();
        Ok(Box::new(FaultyFile { disk: self.clone(), inode }))
    }

    fn open(&mut self, name: &str) -> io::Result<Box<dyn LogFile>> {
        let inode = self.model().inode(name)?;
        Ok(Box::new(FaultyFile { disk: self.clone(), inode }))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut model = self.model();
        model.operation(true)?;
        model.fault(Fault::Rename)?;
        model.inode(from)?;
        model.rename(NameChange::Rename(from.to_owned(), to.to_owned()));
        model.remember();
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut model = self.model();
        model.operation(false)?;
        model.inode(name)?;
        model.rename(NameChange::Unlink(name.to_owned()));
        model.remember();
        Ok(())
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        let mut model = self.model();
        model.operation(false)?;
        model.fault(Fault::SyncDir)?;
        model.durable_names = model.names.clone();
        model.later_names.clear();
        model.remember();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
}

impl LogFile for FaultyFile {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.disk.model().inodes[self.inode].content.len() as u64)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let model = self.disk.model();
        let offset = usize::try_from(offset).unwrap();
        let content = &model.inodes[self.inode].content;
        let range = content.get(offset..offset + into.len());
        into.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut model = self.disk.model();
        let offset = usize::try_from(offset).unwrap();
        let needs_room = offset + bytes.len() > model.inodes[self.inode].content.len();
        let troubled = model.operation(needs_room);
        let short = model.faults.iter().position(|f| matches!(f, Fault::ShortWrite(_)));
        let through = match (short.map(|at| model.faults.remove(at)), &troubled) {
            (Some(Fault::ShortWrite(through)), _) => through.min(bytes.len()),
            (_, Ok(())) => bytes.len(),
            (_, Err(_)) => match model.trouble {
                Some((_, Trouble::Full { through })) => through.min(bytes.len()),
                Some((_, Trouble::Broken)) => bytes.len() / 2,
                _ => 0,
            },
        };
        if through > 0 {
            let bytes = bytes[..through].to_vec();
            model.change(self.inode, Change::Write { offset, bytes });
        }
        model.remember();
        troubled?;
        if through < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        let mut model = self.disk.model();
        model.operation(false)?;
        model.fault(Fault::SetLen)?;
        model.change(self.inode, Change::SetLen(usize::try_from(bytes).unwrap()));
        model.remember();
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let (stalled, changed) = &*self.disk.stalled;
        drop(changed.wait_while(stalled.lock().unwrap(), |stalled| *stalled).unwrap());
        let mut model = self.disk.model();
        let failed = model.operation(false).and_then(|()| model.fault(Fault::Sync));
        let inode = &mut model.inodes[self.inode];
        let later = std::mem::take(&mut inode.later);
        if failed.is_ok() {
            for change in later {
                change.apply(&mut inode.durable, Kept::All);
            }
            model.syncs += 1;
        }
        model.remember();
        failed
    }
}

/// Bytes as a file.
#[derive(Debug)]
pub(super) struct Held(pub(super) Vec<u8>);

impl LogFile for Held {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).unwrap();
        let range = self.0.get(offset..offset + into.len());
        into.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn set_len(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}
