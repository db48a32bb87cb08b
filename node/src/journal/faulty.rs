//! A disk in memory that fails on request and loses what a crash may lose.
//!
//! Content is durable once its file was synced, names once the directory was. A
//! crash keeps any prefix of the later renames and any blocks of the later writes.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

use super::disk::{Disk, LogFile};

#[derive(Debug, Clone)]
pub(super) struct FaultyDisk {
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

#[derive(Debug, Default)]
struct Model {
    random: u64,
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// The states of `names` since the directory was synced.
    later_names: Vec<BTreeMap<String, usize>>,
    faults: Vec<Fault>,
    operations: usize,
    /// From this operation on nothing has any effect.
    dies_at: Option<usize>,
    syncs: usize,
}

#[derive(Debug, Default, Clone)]
struct Inode {
    content: Vec<u8>,
    durable: Vec<u8>,
}

#[derive(Debug)]
struct FaultyFile {
    disk: FaultyDisk,
    inode: usize,
}

impl FaultyDisk {
    pub(super) fn new(seed: u64) -> Self {
        let model =
            Model { random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, ..Model::default() };
        Self { model: Arc::new(Mutex::new(model)), stalled: Arc::default() }
    }

    pub(super) fn boxed(&self) -> Box<dyn Disk> {
        Box::new(self.clone())
    }

    pub(super) fn fail_next(&self, fault: Fault) {
        self.model().faults.push(fault);
    }

    /// Lets `operations` more have an effect.
    pub(super) fn die_after(&self, operations: usize) {
        let mut model = self.model();
        model.dies_at = Some(model.operations + operations);
    }

    pub(super) fn operations(&self) -> usize {
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

    /// What is on the disk after losing power now.
    pub(super) fn crashed(&self, seed: u64) -> Box<dyn Disk> {
        let after = Self::new(seed);
        {
            let mut new = after.model();
            let old = self.model();
            let kept = new.below(old.later_names.len() + 1);
            let names = if kept == 0 { &old.durable_names } else { &old.later_names[kept - 1] };
            new.names = names.clone();
            new.durable_names = names.clone();
            for inode in &old.inodes {
                let durable = new.lose(inode);
                new.inodes.push(Inode { content: durable.clone(), durable });
            }
        }
        after.boxed()
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }
}

impl Model {
    fn below(&mut self, end: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 8) as usize % end
    }

    fn operation(&mut self) -> io::Result<()> {
        self.operations += 1;
        match self.dies_at {
            Some(at) if self.operations > at => Err(io::Error::other("the machine is off")),
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

    fn renamed(&mut self) {
        self.later_names.push(self.names.clone());
    }

    fn lose(&mut self, inode: &Inode) -> Vec<u8> {
        let Inode { content, durable } = inode;
        if content == durable || self.below(4) == 0 {
            return durable.clone();
        }
        let same = content.iter().zip(durable).take_while(|(a, b)| a == b).count();
        let mut kept = content[..same + self.below(content.len() - same + 1)].to_vec();
        for block in kept[same..].chunks_mut(BLOCK_BYTES) {
            if self.below(4) == 0 {
                block.fill(0);
            }
        }
        kept
    }
}

/// Small, so that a frame spans several.
const BLOCK_BYTES: usize = 16;

impl Disk for FaultyDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let model = self.model();
        Ok(model.inodes[model.inode(name)?].content.clone())
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn LogFile>> {
        let mut model = self.model();
        model.operation()?;
        model.fault(Fault::Create)?;
        let inode = model.inodes.len();
        model.inodes.push(Inode::default());
        model.names.insert(name.to_owned(), inode);
        model.renamed();
        Ok(Box::new(FaultyFile { disk: self.clone(), inode }))
    }

    fn open(&mut self, name: &str) -> io::Result<Box<dyn LogFile>> {
        let inode = self.model().inode(name)?;
        Ok(Box::new(FaultyFile { disk: self.clone(), inode }))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut model = self.model();
        model.operation()?;
        model.fault(Fault::Rename)?;
        let inode = model.inode(from)?;
        model.names.remove(from);
        model.names.insert(to.to_owned(), inode);
        model.renamed();
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut model = self.model();
        model.operation()?;
        model.inode(name)?;
        model.names.remove(name);
        model.renamed();
        Ok(())
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        let mut model = self.model();
        model.operation()?;
        model.fault(Fault::SyncDir)?;
        model.durable_names = model.names.clone();
        model.later_names.clear();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
}

impl LogFile for FaultyFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut model = self.disk.model();
        let alive = model.operation();
        let short = model.faults.iter().position(|f| matches!(f, Fault::ShortWrite(_)));
        let through = match short.map(|at| model.faults.remove(at)) {
            Some(Fault::ShortWrite(through)) => through.min(bytes.len()),
            _ if alive.is_err() => model.below(bytes.len() + 1),
            _ => bytes.len(),
        };
        // The first write after death is the one that was under way.
        if model.dies_at.is_none_or(|at| model.operations <= at + 1) {
            let content = &mut model.inodes[self.inode].content;
            let offset = usize::try_from(offset).unwrap();
            content.resize(content.len().max(offset + through), 0);
            content[offset..offset + through].copy_from_slice(&bytes[..through]);
        }
        alive?;
        if through < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        let mut model = self.disk.model();
        model.operation()?;
        model.fault(Fault::SetLen)?;
        model.inodes[self.inode].content.resize(usize::try_from(bytes).unwrap(), 0);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let (stalled, changed) = &*self.disk.stalled;
        drop(changed.wait_while(stalled.lock().unwrap(), |stalled| *stalled).unwrap());
        let mut model = self.disk.model();
        model.operation()?;
        model.fault(Fault::Sync)?;
        model.syncs += 1;
        let inode = &mut model.inodes[self.inode];
        inode.durable = inode.content.clone();
        Ok(())
    }
}
