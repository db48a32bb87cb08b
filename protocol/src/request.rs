//! The cluster request: what a job asks for, written `2:[],4:[gtx1070,2:gtx1060]`.
//!
//! ```text
//! request = [ group { "," group } ]                     nothing at all is `[]`
//! group   = [ count ":" ] "[" [ need { "," need } ] "]" count processes, 1 where not said
//! need    = [ count ":" ] name [ ">=" size ]            a size may follow a GPU only
//! name    = "gpu" | "cpu" | "ram" | model               any GPU; cores; GiB of memory
//! model   = ( letter | digit ) { letter | digit | "-" | "." }
//! size    = digits ( "g" | "m" | "k" | "b" )            GiB, MiB, KiB, bytes
//! ```
//!
//! Blanks may stand between any two of these and case does not matter. A number
//! right before `:` is a count; elsewhere digits begin a name, so `2:3090` is two of
//! the model `3090`. Every process runs on one node; processes may share nodes.

mod deal;
mod display;
mod feasible;
mod fit;
mod nearest;
mod parse;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use feasible::{Reason, Shortage, Unsatisfiable, satisfiable};
pub use fit::{Grant, fit, fit_many};
pub use parse::{ParseError, Problem};

use crate::inventory::Gpu;

/// The longest request that is read, in bytes: above what any request within the
/// other bounds needs for its canonical text.
pub const TEXT_BYTES_MAX: usize = 32 << 10;

/// Groups of one request.
pub const GROUPS_MAX: usize = 32;

/// Processes of one request, all groups together: bounds records, which name each.
pub const PROCESSES_MAX: u32 = 1024;

/// GPU needs written in one process, such as the two of `[v100,2:gtx1060]`.
pub const NEEDS_MAX: usize = 8;

/// GPUs of one process, all of its needs together: no machine has more.
pub const GPUS_PER_PROCESS_MAX: u32 = 64;

/// Cores of one process.
pub const CPU_CORES_MAX: u32 = 1 << 16;

/// Main memory of one process, in GiB.
pub const RAM_GIB_MAX: u32 = 1 << 20;

/// The memory that a GPU may be asked to have, in bytes (1 PiB).
pub const MEMORY_BYTES_MAX: u64 = 1 << 50;

/// Characters of a model name.
pub const MODEL_CHARS_MAX: usize = 40;

/// How much of the memory asked for a GPU must report, in per cent.
///
/// Drivers and ECC keep a part back: a GPU sold with 24 GB reports between 22.2 and
/// 24 GiB, and `gpu>=24g` means that GPU. The gap to the next smaller size on the
/// market is wider (11 of 12 GiB are 91.7 %).
pub const MEMORY_REPORTED_PERCENT_MIN: u64 = 92;

/// Names that are no model.
const RESERVED_NAMES: [&str; 3] = ["gpu", "cpu", "ram"];

/// Process groups, in the order written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Request {
    /// At least one.
    pub groups: Vec<Group>,
}

/// `count` processes that each need `process`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Group {
    /// At least one.
    pub count: u32,
    /// What each needs.
    pub process: Process,
}

/// What one process needs on one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Process {
    /// GPUs by model.
    pub gpus: Vec<GpuNeed>,
    /// CPU cores asked for; `None` where not said.
    pub cpu_cores: Option<u32>,
    /// Main memory asked for in GiB; `None` where not said.
    pub ram_gib: Option<u32>,
}

/// `count` GPUs of a model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpuNeed {
    /// At least one.
    pub count: u32,
    /// A short model name; `None` is any model (`gpu`).
    pub model: Option<String>,
    /// Memory each must have at least, in bytes.
    pub memory_bytes_min: Option<u64>,
}

/// A request that is not written in the grammar, but came decoded from a peer, breaks
/// a rule that the parser keeps.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum CheckError {
    /// A request without groups.
    #[error("no process group")]
    NoGroups,
    /// A count of nothing; leave it out instead.
    #[error("a count of 0 {what}")]
    Zero {
        /// What is counted.
        what: String,
    },
    /// More than a bound of this module allows.
    #[error("more than {max} {what}")]
    TooMany {
        /// What is counted.
        what: String,
        /// The bound.
        max: u64,
    },
    /// Not a name in the grammar, or not in lower case.
    #[error("{name:?} is not a GPU model name")]
    Model {
        /// The name, cut to a line.
        name: String,
    },
}

/// Whether `name` can stand for a GPU model in a request, in its canonical lower case.
#[must_use]
pub fn is_model_name(name: &str) -> bool {
    name.len() <= MODEL_CHARS_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.bytes().all(|b| is_name_byte(b) && !b.is_ascii_uppercase())
        && !RESERVED_NAMES.contains(&name)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.'
}

impl Request {
    /// Reads the grammar at the head of this module.
    ///
    /// # Errors
    /// [`ParseError`] names the character and what was expected there.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        parse::parse(text)
    }

    /// How many processes it is, all groups together.
    #[must_use]
    pub fn process_count(&self) -> u32 {
        self.groups.iter().fold(0, |sum, group| sum.saturating_add(group.count))
    }

    /// Its processes by rank: the group's index, the index in the group, the needs.
    pub fn processes(&self) -> impl Iterator<Item = (u32, u32, &Process)> {
        (0..)
            .zip(&self.groups)
            .flat_map(|(g, group)| (0..group.count).map(move |p| (g, p, &group.process)))
    }

    /// Whether it keeps every rule of the grammar, as one from a peer may not.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn check(&self) -> Result<(), CheckError> {
        if self.groups.is_empty() {
            return Err(CheckError::NoGroups);
        }
        at_most(self.groups.len() as u64, GROUPS_MAX as u64, "process groups")?;
        for group in &self.groups {
            not_zero(group.count.into(), "processes")?;
            group.process.check()?;
        }
        let processes = self.groups.iter().map(|group| u64::from(group.count)).sum();
        at_most(processes, PROCESSES_MAX.into(), "processes")
    }
}

impl Default for Request {
    /// One process without a GPU, as `[]` and no request at all.
    fn default() -> Self {
        Self { groups: vec![Group { count: 1, process: Process::default() }] }
    }
}

impl Process {
    /// GPUs of all its needs.
    #[must_use]
    pub fn gpu_count(&self) -> u32 {
        self.gpus.iter().fold(0, |sum, need| sum.saturating_add(need.count))
    }

    /// Cores that it takes from its node: those named; else one where it has no GPU,
    /// and none where it has, since its GPUs bound how many such processes there are.
    #[must_use]
    pub fn cpu_cores_counted(&self) -> u32 {
        let without_gpu = u32::from(self.gpu_count() == 0);
        self.cpu_cores.unwrap_or(0).max(without_gpu)
    }

    /// Main memory that it takes from its node, in MiB: nothing where not named.
    #[must_use]
    pub fn ram_mib_counted(&self) -> u64 {
        u64::from(self.ram_gib.unwrap_or(0)) << 10
    }

    /// Whether it keeps every rule of the grammar, as one from a peer may not.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn check(&self) -> Result<(), CheckError> {
        at_most(self.gpus.len() as u64, NEEDS_MAX as u64, "GPU needs in a process")?;
        self.gpus.iter().try_for_each(GpuNeed::check)?;
        at_most(self.gpu_count().into(), GPUS_PER_PROCESS_MAX.into(), "GPUs in a process")?;
        if let Some(cores) = self.cpu_cores {
            not_zero(cores.into(), "cores")?;
            at_most(cores.into(), CPU_CORES_MAX.into(), "cores in a process")?;
        }
        if let Some(gib) = self.ram_gib {
            not_zero(gib.into(), "GiB of memory")?;
            at_most(gib.into(), RAM_GIB_MAX.into(), "GiB of memory in a process")?;
        }
        Ok(())
    }
}

impl GpuNeed {
    /// Whether `gpu` is one of these: of exactly this model where one is named, and
    /// with the memory asked for, less what [`MEMORY_REPORTED_PERCENT_MIN`] concedes.
    #[must_use]
    pub fn accepts(&self, gpu: &Gpu) -> bool {
        self.model.as_ref().is_none_or(|model| *model == gpu.model)
            && self.memory_bytes_min.is_none_or(|min| {
                let asked = u128::from(min) * u128::from(MEMORY_REPORTED_PERCENT_MIN);
                u128::from(gpu.memory_bytes) * 100 >= asked
            })
    }

    fn check(&self) -> Result<(), CheckError> {
        not_zero(self.count.into(), "GPUs")?;
        if let Some(name) = self.model.as_ref().filter(|name| !is_model_name(name)) {
            let name = name.chars().take(MODEL_CHARS_MAX).collect();
            return Err(CheckError::Model { name });
        }
        if let Some(bytes) = self.memory_bytes_min {
            not_zero(bytes, "bytes of GPU memory")?;
            at_most(bytes, MEMORY_BYTES_MAX, "bytes of GPU memory")?;
        }
        Ok(())
    }
}

fn not_zero(count: u64, what: &str) -> Result<(), CheckError> {
    if count == 0 { Err(CheckError::Zero { what: what.to_owned() }) } else { Ok(()) }
}

fn at_most(count: u64, max: u64, what: &str) -> Result<(), CheckError> {
    if count > max { Err(CheckError::TooMany { what: what.to_owned(), max }) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod generated {
    //! Requests for property tests.

    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    /// Any request that keeps the bounds.
    pub(crate) fn request() -> impl Strategy<Value = Request> {
        vec(group(), 1..5).prop_map(|groups| Request { groups })
    }

    fn group() -> impl Strategy<Value = Group> {
        let process = (vec(need(), 0..5), option::of(1..200_u32), option::of(1..5000_u32))
            .prop_map(|(gpus, cpu_cores, ram_gib)| Process {
                gpus,
                cpu_cores: cpu_cores.map(|n| n.min(CPU_CORES_MAX)),
                ram_gib,
            });
        (1..200_u32, process).prop_map(|(count, process)| Group { count, process })
    }

    fn need() -> impl Strategy<Value = GpuNeed> {
        let bytes = prop_oneof![
            (1..1000_u64).prop_map(|g| g << 30),
            (1..100_000_u64).prop_map(|m| m << 20),
            1..=MEMORY_BYTES_MAX,
        ];
        let model = "[a-z0-9][a-z0-9.-]{0,20}".prop_filter("reserved", |name| is_model_name(name));
        (1..16_u32, option::of(model), option::of(bytes))
            .prop_map(|(count, model, memory_bytes_min)| GpuNeed { count, model, memory_bytes_min })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_gpu_counts_one_core_and_one_with_gpus_counts_none() {
        let counted = |text: &str| {
            let process = &Request::parse(text).unwrap().groups[0].process;
            (process.cpu_cores_counted(), process.ram_mib_counted())
        };
        assert_eq!(counted("[]"), (1, 0));
        assert_eq!(counted("[2:v100]"), (0, 0));
        assert_eq!(counted("[2:v100,16:cpu,64:ram]"), (16, 64 << 10));
        assert_eq!(counted("[3:ram]"), (1, 3 << 10));
        assert_eq!(counted("[4:cpu]"), (4, 0));
    }

    #[test]
    fn ranks_run_through_the_groups_in_order() {
        let request = Request::parse("2:[],[v100]").unwrap();
        let ranks: Vec<_> = request.processes().map(|(g, p, _)| (g, p)).collect();
        assert_eq!(ranks, [(0, 0), (0, 1), (1, 0)]);
        assert_eq!(request.process_count(), 3);
    }

    #[test]
    fn a_decoded_request_that_no_text_could_make_is_refused() {
        let valid = Request::parse("2:[v100>=16g,4:cpu,8:ram]").unwrap();
        assert_eq!(valid.check(), Ok(()));
        let broken = |change: &dyn Fn(&mut Request)| {
            let mut request = valid.clone();
            change(&mut request);
            request.check().unwrap_err().to_string()
        };
        assert_eq!(broken(&|r| r.groups.clear()), "no process group");
        assert_eq!(broken(&|r| r.groups[0].count = 0), "a count of 0 processes");
        assert_eq!(broken(&|r| r.groups[0].count = u32::MAX), "more than 1024 processes");
        assert_eq!(broken(&|r| r.groups[0].process.cpu_cores = Some(0)), "a count of 0 cores");
        assert_eq!(
            broken(&|r| r.groups[0].process.gpus[0].model = Some("gpu".to_owned())),
            "\"gpu\" is not a GPU model name"
        );
        assert_eq!(
            broken(&|r| r.groups[0].process.gpus[0].count = u32::MAX),
            "more than 64 GPUs in a process"
        );
        assert_eq!(
            broken(&|r| r.groups = vec![r.groups[0].clone(); 33]),
            "more than 32 process groups"
        );
    }

    #[test]
    fn a_gpu_sold_with_the_asked_memory_has_it_though_the_driver_reports_less() {
        let need = |text: &str| Request::parse(text).unwrap().groups[0].process.gpus[0].clone();
        let gpu = |mib: u64| Gpu {
            uuid: crate::inventory::GpuUuid("GPU-1".to_owned()),
            model: "x".to_owned(),
            full_name: "X".to_owned(),
            memory_bytes: mib << 20,
            simulated: false,
        };
        let (rtx4090, a10g, rtx2080ti) = (24_564, 22_731, 11_264);
        assert!(need("[gpu>=24g]").accepts(&gpu(rtx4090)));
        assert!(need("[gpu>=24g]").accepts(&gpu(a10g)));
        assert!(!need("[gpu>=12g]").accepts(&gpu(rtx2080ti)));
        assert!(!need("[gpu>=24g]").accepts(&gpu(16 << 10)));
    }
}
