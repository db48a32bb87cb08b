//! The machine's GPUs: what they are, how busy they are, and who may offer them.
//!
//! Everything above this module treats real and simulated GPUs alike. Probing and
//! reading never fail the daemon: what the driver cannot say is `None`, and a GPU
//! that fell off the bus is reported as gone. The calls block (the driver may take
//! seconds to wake up), so they belong on a thread: [`GpuMonitor`] has one.

mod lock;
mod monitor;
mod nvml;
mod reading;
mod simulated;

use std::{collections::BTreeSet, fmt, str::FromStr};

use p2pit_protocol::inventory::{
    Gpu, GpuUuid,
    gpu::{ParseSimulatedError, parse_simulated},
};
use thiserror::Error;

pub use self::{
    lock::{Acquired, GpuLock, GpuLocks, Holder, LockError},
    monitor::{GpuMonitor, READ_EVERY_MAX, READ_EVERY_MIN},
    reading::{ComputeProcess, GpuReading, Health, foreign_use},
};

use self::nvml::NvmlGpus;

/// What `--gpus` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum GpuOption {
    /// Whatever NVML finds.
    #[default]
    Auto,
    /// The machine offers no GPU.
    None,
    /// The part behind `sim:`, such as `2xv100,1xgtx1070`; valid.
    Simulated(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GpuOptionError {
    #[error("`{0}` is none of `auto`, `none` and `sim:<count>x<model>,…` such as `sim:2xv100`")]
    Unknown(String),
    #[error("`sim:{text}` does not describe simulated GPUs")]
    Simulated {
        text: String,
        #[source]
        source: ParseSimulatedError,
    },
}

impl FromStr for GpuOption {
    type Err = GpuOptionError;

    fn from_str(text: &str) -> Result<Self, GpuOptionError> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            other => {
                let Some(models) = other.strip_prefix("sim:") else {
                    return Err(GpuOptionError::Unknown(other.chars().take(80).collect()));
                };
                let text = models.to_owned();
                match parse_simulated(models, "") {
                    Ok(_) => Ok(Self::Simulated(text)),
                    Err(source) => Err(GpuOptionError::Simulated { text, source }),
                }
            }
        }
    }
}

impl fmt::Display for GpuOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::Simulated(models) => write!(f, "sim:{models}"),
        }
    }
}

/// Where this machine's GPUs come from.
#[derive(Debug)]
pub enum GpuSource {
    Nvml(Box<NvmlGpus>),
    Simulated(Vec<Gpu>),
    None,
}

impl GpuSource {
    /// Finds the GPUs; may take seconds. `node_text` (the peer id) makes the UUIDs of
    /// simulated GPUs this node's own and the same after every restart.
    pub fn probe(option: &GpuOption, node_text: &str) -> Self {
        match option {
            GpuOption::None => Self::None,
            GpuOption::Simulated(models) => match parse_simulated(models, node_text) {
                Ok(mut gpus) => {
                    gpus.sort_by(|a, b| a.uuid.cmp(&b.uuid));
                    Self::Simulated(gpus)
                }
                Err(error) => {
                    tracing::warn!(%error, "no GPUs: the simulated ones are not understood");
                    Self::None
                }
            },
            GpuOption::Auto => {
                NvmlGpus::probe().map_or(Self::None, |gpus| Self::Nvml(Box::new(gpus)))
            }
        }
    }

    /// The GPUs found when probing, by UUID.
    pub fn inventory(&self) -> &[Gpu] {
        match self {
            Self::Nvml(nvml) => nvml.inventory(),
            Self::Simulated(gpus) => gpus,
            Self::None => &[],
        }
    }

    /// The version of the driver, where there is one.
    pub fn driver_version(&self) -> Option<&str> {
        match self {
            Self::Nvml(nvml) => nvml.driver_version(),
            Self::Simulated(_) | Self::None => None,
        }
    }

    /// One reading per GPU of the inventory, in its order. `held` are the GPUs that
    /// jobs hold now: simulated ones derive their readings from it.
    pub fn read(&self, held: &BTreeSet<GpuUuid>) -> Vec<GpuReading> {
        match self {
            Self::Nvml(nvml) => nvml.read(),
            Self::Simulated(gpus) => {
                gpus.iter().map(|gpu| simulated::reading(gpu, held.contains(&gpu.uuid))).collect()
            }
            Self::None => Vec::new(),
        }
    }

    /// Whether two daemons could offer the same of these GPUs. Simulated ones belong
    /// to their node alone.
    pub fn needs_locks(&self) -> bool {
        matches!(self, Self::Nvml(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gpus_option_reads_and_displays_its_three_forms() {
        for text in ["auto", "none", "sim:2xv100,1xgtx1070"] {
            let option: GpuOption = text.parse().unwrap();
            assert_eq!(option.to_string(), text);
        }
        assert_eq!(" auto ".parse(), Ok(GpuOption::Auto));
    }

    #[test]
    fn another_gpus_option_is_answered_with_the_forms_there_are() {
        let error = "2xv100".parse::<GpuOption>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`2xv100` is none of `auto`, `none` and `sim:<count>x<model>,…` such as `sim:2xv100`"
        );
        let error = "sim:0xv100".parse::<GpuOption>().unwrap_err();
        assert_eq!(error.to_string(), "`sim:0xv100` does not describe simulated GPUs");
        assert!(std::error::Error::source(&error).is_some());
    }

    #[test]
    fn two_simulated_models_in_one_host_are_normal_and_marked() {
        let option: GpuOption = "sim:2xv100,9xgtx1070".parse().unwrap();
        let source = GpuSource::probe(&option, "node-a");
        let gpus = source.inventory();
        assert_eq!(gpus.iter().filter(|gpu| gpu.model == "v100").count(), 2);
        assert_eq!(gpus.iter().filter(|gpu| gpu.model == "gtx1070").count(), 9);
        assert!(gpus.iter().all(|gpu| gpu.simulated));
        assert!(gpus.is_sorted_by_key(|gpu| &gpu.uuid));
        assert!(!source.needs_locks());
        let other = GpuSource::probe(&option, "node-b");
        assert!(other.inventory().iter().all(|gpu| !gpus.iter().any(|g| g.uuid == gpu.uuid)));
    }

    #[test]
    fn a_simulated_gpu_is_busy_exactly_while_a_job_holds_it() {
        let source = GpuSource::probe(&"sim:2xv100".parse().unwrap(), "node-a");
        let held = BTreeSet::from([source.inventory()[1].uuid.clone()]);
        let readings = source.read(&held);
        let utilisation: Vec<_> = readings.iter().map(|r| r.utilisation_percent).collect();
        assert_eq!(utilisation, [Some(0), Some(100)]);
        assert!(foreign_use(&readings, &BTreeSet::new()).is_empty());
    }

    #[test]
    fn probing_a_machine_never_panics_whatever_it_has() {
        let source = GpuSource::probe(&GpuOption::Auto, "node-a");
        assert_eq!(source.read(&BTreeSet::new()).len(), source.inventory().len());
        assert!(GpuSource::probe(&GpuOption::None, "node-a").inventory().is_empty());
    }
}
