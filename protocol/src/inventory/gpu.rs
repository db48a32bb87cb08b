//! GPUs as the pool sees them.

use core::fmt;

use serde::{Deserialize, Serialize};

/// The driver's UUID of a GPU or MIG instance (`GPU-…`, `MIG-…`; simulated ones `SIM-…`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpuUuid(pub String);

impl fmt::Display for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One GPU or MIG instance that can be given to one process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Gpu {
    /// The driver's id.
    pub uuid: GpuUuid,
    /// Short name used in requests, such as `v100`.
    pub model: String,
    /// The driver's name, such as `Tesla V100-SXM2-32GB`.
    pub full_name: String,
    /// Total memory.
    pub memory_bytes: u64,
    /// Not a real device: nothing computes on it.
    pub simulated: bool,
}

/// What a machine has, or has left: the same shape for both.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// GPUs, by UUID order.
    pub gpus: Vec<Gpu>,
    /// CPU cores.
    pub cpu_cores: u32,
    /// Main memory in MiB.
    pub ram_mib: u64,
}
