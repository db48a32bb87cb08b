//! The cluster request: what a job asks for. Placeholder of the shape; grammar follows.

use serde::{Deserialize, Serialize};

/// Process groups, in the order written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// At least one.
    pub groups: Vec<Group>,
}

/// `count` processes that each need `process`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// At least one.
    pub count: u32,
    /// What each needs.
    pub process: Process,
}

/// What one process needs on one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// GPUs by model.
    pub gpus: Vec<GpuNeed>,
    /// CPU cores asked for; `None` where not said.
    pub cpu_cores: Option<u32>,
    /// Main memory asked for in GiB; `None` where not said.
    pub ram_gib: Option<u32>,
}

/// `count` GPUs of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuNeed {
    /// At least one.
    pub count: u32,
    /// A short model name; `None` is any model (`gpu`).
    pub model: Option<String>,
    /// Memory each must have at least, in bytes.
    pub memory_bytes_min: Option<u64>,
}
