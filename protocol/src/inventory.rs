//! What machines have: GPUs, cores and memory, and what the pool knows of it.

pub mod board;
pub mod gpu;

pub use board::{Board, Posted};
pub use gpu::{Capacity, Gpu, GpuUuid};
