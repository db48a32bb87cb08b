//! GPUs through the driver's management library, loaded when asked for.
//!
//! The calls to NVML only fill plain structs; what they mean is decided by pure
//! functions below, which tests drive without hardware.

use nvml_wrapper::{
    Device, Nvml, enum_wrappers::device::TemperatureSensor, enums::device::UsedGpuMemory,
    error::NvmlError, struct_wrappers::device::ProcessInfo,
};
use p2pit_protocol::inventory::{
    Gpu, GpuUuid,
    gpu::{mig_name, short_name},
};

use super::reading::{ComputeProcess, GpuReading};

/// The GPUs of this machine as NVML knows them.
#[derive(Debug)]
pub struct NvmlGpus {
    nvml: Nvml,
    gpus: Vec<Gpu>,
    driver_version: Option<String>,
}

impl NvmlGpus {
    /// `None` where there is no driver or it does not answer.
    pub(super) fn probe() -> Option<Self> {
        let nvml = match Nvml::init() {
            Ok(nvml) => nvml,
            Err(NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound) => {
                tracing::info!("no NVIDIA driver on this machine: it offers no GPU");
                return None;
            }
            Err(error) => {
                tracing::warn!(%error, "the NVIDIA driver does not answer: no GPU is offered");
                return None;
            }
        };
        let gpus = offered(&devices(&nvml));
        let driver_version = nvml.sys_driver_version().ok();
        Some(Self { nvml, gpus, driver_version })
    }

    pub(super) fn inventory(&self) -> &[Gpu] {
        &self.gpus
    }

    pub(super) fn driver_version(&self) -> Option<&str> {
        self.driver_version.as_deref()
    }

    pub(super) fn read(&self) -> Vec<GpuReading> {
        self.gpus
            .iter()
            .map(|gpu| match self.nvml.device_by_uuid(gpu.uuid.0.as_str()) {
                Ok(device) => reading(gpu.uuid.clone(), &measure(&device)),
                Err(error) => unfound(gpu.uuid.clone(), &error),
            })
            .collect()
    }
}

/// What NVML says about one device, before anything is made of it.
#[derive(Debug)]
struct RawDevice {
    uuid: String,
    name: String,
    memory_bytes: Option<u64>,
    /// The instances, where the device is divided.
    instances: Option<Vec<RawDevice>>,
}

fn devices(nvml: &Nvml) -> Vec<RawDevice> {
    let count = nvml.device_count().unwrap_or_else(|error| {
        tracing::warn!(%error, "the NVIDIA driver does not say how many GPUs there are");
        0
    });
    (0..count)
        .filter_map(|index| match nvml.device_by_index(index).and_then(|d| describe(&d, true)) {
            Ok(device) => Some(device),
            Err(error) => {
                tracing::warn!(index, %error, "a GPU does not answer and is not offered");
                None
            }
        })
        .collect()
}

fn describe(device: &Device<'_>, divisible: bool) -> Result<RawDevice, NvmlError> {
    Ok(RawDevice {
        uuid: device.uuid()?,
        name: device.name()?,
        memory_bytes: device.memory_info().ok().map(|memory| memory.total),
        instances: (divisible && is_divided(device)).then(|| instances(device)),
    })
}

fn is_divided(device: &Device<'_>) -> bool {
    // Most models cannot be divided and say so with an error.
    device.mig_mode().is_ok_and(|mode| mode.current != 0)
}

fn instances(device: &Device<'_>) -> Vec<RawDevice> {
    let places = device.mig_device_count().unwrap_or_else(|error| {
        tracing::warn!(%error, "a GPU is divided by MIG but does not list its instances");
        0
    });
    (0..places)
        .filter_map(|index| {
            match device.mig_device_by_index(index).and_then(|mig| describe(&mig, false)) {
                Ok(instance) => Some(instance),
                // The count is of places; most are empty.
                Err(NvmlError::NotFound | NvmlError::InvalidArg) => None,
                Err(error) => {
                    tracing::warn!(index, %error, "a MIG instance is not offered");
                    None
                }
            }
        })
        .collect()
}

/// What is offered of these devices: whole GPUs, and of divided ones the instances.
fn offered(devices: &[RawDevice]) -> Vec<Gpu> {
    let mut gpus: Vec<Gpu> = devices
        .iter()
        .flat_map(|device| {
            let model = short_name(&device.name);
            match &device.instances {
                None => vec![gpu(device, model)],
                Some(instances) => instances
                    .iter()
                    .map(|instance| gpu(instance, mig_name(&model, &profile(instance))))
                    .collect(),
            }
        })
        .collect();
    gpus.sort_by(|a, b| a.uuid.cmp(&b.uuid));
    gpus
}

fn gpu(device: &RawDevice, model: String) -> Gpu {
    Gpu {
        uuid: GpuUuid(device.uuid.clone()),
        model,
        full_name: device.name.clone(),
        // Parts that share the machine's memory have none of their own to report.
        memory_bytes: device.memory_bytes.unwrap_or(0),
        simulated: false,
    }
}

/// The profile of a MIG instance, from a name like `NVIDIA A100-SXM4-40GB MIG 1g.5gb`.
fn profile(instance: &RawDevice) -> String {
    match instance.name.rsplit_once(" MIG ") {
        Some((_, profile)) => profile.trim().to_owned(),
        None => format!("mig.{}gb", instance.memory_bytes.unwrap_or(0).div_ceil(1 << 30)),
    }
}

/// One round of measuring; each value may fail for itself.
#[derive(Debug)]
struct Measured {
    utilisation_percent: Result<u32, NvmlError>,
    memory_used_bytes: Result<u64, NvmlError>,
    temperature_celsius: Result<u32, NvmlError>,
    power_milliwatts: Result<u32, NvmlError>,
    compute_processes: Result<Vec<ProcessInfo>, NvmlError>,
}

fn measure(device: &Device<'_>) -> Measured {
    // Heat and power are of the whole board, so an instance asks its parent.
    let parent = device.mig_parent_device();
    let board = parent.as_ref().unwrap_or(device);
    Measured {
        utilisation_percent: device.utilization_rates().map(|rates| rates.gpu),
        memory_used_bytes: device.memory_info().map(|memory| memory.used),
        temperature_celsius: board.temperature(TemperatureSensor::Gpu),
        power_milliwatts: board.power_usage(),
        compute_processes: device.running_compute_processes(),
    }
}

fn reading(uuid: GpuUuid, measured: &Measured) -> GpuReading {
    if let Some(error) = measured.errors().into_iter().flatten().find(|error| is_loss(error)) {
        return GpuReading::gone(uuid, error.to_string());
    }
    GpuReading {
        utilisation_percent: measured.utilisation_percent.as_ref().ok().copied(),
        memory_used_bytes: measured.memory_used_bytes.as_ref().ok().copied(),
        temperature_celsius: measured.temperature_celsius.as_ref().ok().copied(),
        power_milliwatts: measured.power_milliwatts.as_ref().ok().copied(),
        compute_processes: measured
            .compute_processes
            .as_ref()
            .ok()
            .map(|processes| processes.iter().map(compute_process).collect()),
        ..GpuReading::unknown(uuid)
    }
}

impl Measured {
    fn errors(&self) -> [Option<&NvmlError>; 5] {
        [
            self.utilisation_percent.as_ref().err(),
            self.memory_used_bytes.as_ref().err(),
            self.temperature_celsius.as_ref().err(),
            self.power_milliwatts.as_ref().err(),
            self.compute_processes.as_ref().err(),
        ]
    }
}

fn compute_process(process: &ProcessInfo) -> ComputeProcess {
    let memory_used_bytes = match process.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(bytes),
        UsedGpuMemory::Unavailable => None,
    };
    ComputeProcess { pid: process.pid, memory_used_bytes }
}

fn unfound(uuid: GpuUuid, error: &NvmlError) -> GpuReading {
    let destroyed = matches!(error, NvmlError::NotFound | NvmlError::InvalidArg);
    if destroyed || is_loss(error) {
        GpuReading::gone(uuid, error.to_string())
    } else {
        tracing::debug!(gpu = %uuid, %error, "a GPU could not be read this time");
        GpuReading::unknown(uuid)
    }
}

/// Errors after which no job can use the GPU until somebody acts.
fn is_loss(error: &NvmlError) -> bool {
    matches!(
        error,
        NvmlError::GpuLost
            | NvmlError::ResetRequired
            | NvmlError::InsufficientPower
            | NvmlError::LibRmVersionMismatch
            | NvmlError::DriverNotLoaded
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::reading::Health;

    fn whole(uuid: &str, name: &str, gib: u64) -> RawDevice {
        RawDevice {
            uuid: uuid.to_owned(),
            name: name.to_owned(),
            memory_bytes: Some(gib << 30),
            instances: None,
        }
    }

    #[test]
    fn two_models_in_one_host_are_offered_by_their_short_names_in_uuid_order() {
        let gpus = offered(&[
            whole("GPU-2", "Tesla V100-SXM2-32GB", 32),
            whole("GPU-1", "NVIDIA GeForce RTX 4090", 24),
        ]);
        let shown: Vec<_> = gpus.iter().map(|g| (g.uuid.0.as_str(), g.model.as_str())).collect();
        assert_eq!(shown, [("GPU-1", "rtx4090"), ("GPU-2", "v100")]);
        assert_eq!(gpus[1].full_name, "Tesla V100-SXM2-32GB");
        assert_eq!(gpus[1].memory_bytes, 32 << 30);
        assert!(gpus.iter().all(|gpu| !gpu.simulated));
    }

    #[test]
    fn of_a_divided_gpu_only_its_instances_are_offered() {
        let name = "NVIDIA A100-SXM4-40GB";
        let divided = RawDevice {
            instances: Some(vec![
                whole("MIG-a", &format!("{name} MIG 1g.5gb"), 5),
                whole("MIG-b", name, 20),
            ]),
            ..whole("GPU-1", name, 40)
        };
        let parent = short_name(name);
        let gpus = offered(&[divided]);
        let shown: Vec<_> =
            gpus.iter().map(|gpu| (gpu.uuid.0.as_str(), gpu.model.clone())).collect();
        let expected =
            [("MIG-a", mig_name(&parent, "1g.5gb")), ("MIG-b", mig_name(&parent, "mig.20gb"))];
        assert_eq!(shown, expected);
        let undivided_yet = RawDevice { instances: Some(vec![]), ..whole("GPU-1", name, 40) };
        assert_eq!(offered(&[undivided_yet]), []);
    }

    fn measured() -> Measured {
        Measured {
            utilisation_percent: Ok(37),
            memory_used_bytes: Ok(1 << 30),
            temperature_celsius: Ok(61),
            power_milliwatts: Ok(250_500),
            compute_processes: Ok(vec![
                process(10, UsedGpuMemory::Used(1 << 29)),
                process(11, UsedGpuMemory::Unavailable),
            ]),
        }
    }

    fn process(pid: u32, used_gpu_memory: UsedGpuMemory) -> ProcessInfo {
        ProcessInfo { pid, used_gpu_memory, gpu_instance_id: None, compute_instance_id: None }
    }

    fn uuid() -> GpuUuid {
        GpuUuid("GPU-1".to_owned())
    }

    #[test]
    fn a_reading_has_what_the_gpu_can_say_and_none_for_the_rest() {
        let full = reading(uuid(), &measured());
        assert_eq!(full.utilisation_percent, Some(37));
        assert_eq!(full.power_milliwatts, Some(250_500));
        assert_eq!(
            full.compute_processes,
            Some(vec![
                ComputeProcess { pid: 10, memory_used_bytes: Some(1 << 29) },
                ComputeProcess { pid: 11, memory_used_bytes: None },
            ])
        );
        let partial = reading(
            uuid(),
            &Measured {
                utilisation_percent: Err(NvmlError::NotSupported),
                compute_processes: Err(NvmlError::NoPermission),
                ..measured()
            },
        );
        assert_eq!(partial.health, Health::Present);
        assert_eq!(partial.utilisation_percent, None);
        assert_eq!(partial.compute_processes, None);
        assert_eq!(partial.temperature_celsius, Some(61));
    }

    #[test]
    fn a_gpu_lost_from_the_bus_is_gone_and_a_hiccup_is_not() {
        let lost =
            reading(uuid(), &Measured { power_milliwatts: Err(NvmlError::GpuLost), ..measured() });
        assert!(matches!(&lost.health, Health::Gone(why) if why.contains("fell off the bus")));
        assert_eq!(lost.memory_used_bytes, None);
        assert!(matches!(unfound(uuid(), &NvmlError::GpuLost).health, Health::Gone(_)));
        assert!(matches!(unfound(uuid(), &NvmlError::NotFound).health, Health::Gone(_)));
        assert_eq!(unfound(uuid(), &NvmlError::Unknown).health, Health::Present);
    }
}
