//! Readings of GPUs that do not exist: round numbers, so that nobody takes them for
//! measurements.

use p2pit_protocol::inventory::Gpu;

use super::reading::GpuReading;

pub(super) fn reading(gpu: &Gpu, held: bool) -> GpuReading {
    GpuReading {
        utilisation_percent: Some(if held { 100 } else { 0 }),
        memory_used_bytes: Some(if held { gpu.memory_bytes / 2 } else { 0 }),
        temperature_celsius: Some(if held { 60 } else { 30 }),
        power_milliwatts: Some(if held { 200_000 } else { 20_000 }),
        compute_processes: Some(Vec::new()),
        ..GpuReading::unknown(gpu.uuid.clone())
    }
}
