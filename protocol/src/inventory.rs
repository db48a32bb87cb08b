//! What machines have: GPUs, cores and memory.

pub mod gpu;

pub use gpu::{Capacity, Gpu, GpuUuid};
