//! How busy a GPU is, and whether by somebody else's work.

use std::collections::{BTreeMap, BTreeSet};

use p2pit_protocol::inventory::GpuUuid;

/// What a GPU said about itself at one moment; `None` where it cannot say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuReading {
    pub uuid: GpuUuid,
    pub health: Health,
    pub utilisation_percent: Option<u32>,
    pub memory_used_bytes: Option<u64>,
    pub temperature_celsius: Option<u32>,
    pub power_milliwatts: Option<u32>,
    /// Processes with a compute context; those that only draw are not among them.
    pub compute_processes: Option<Vec<ComputeProcess>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Present,
    /// It does not answer any more: fell off the bus, needs a reset, or its MIG
    /// instance was destroyed. With the driver's reason.
    Gone(String),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ComputeProcess {
    /// As the driver sees it: a pid of the machine's own pid namespace.
    pub pid: u32,
    pub memory_used_bytes: Option<u64>,
}

impl GpuReading {
    /// Nothing known yet.
    pub(super) fn unknown(uuid: GpuUuid) -> Self {
        Self {
            uuid,
            health: Health::Present,
            utilisation_percent: None,
            memory_used_bytes: None,
            temperature_celsius: None,
            power_milliwatts: None,
            compute_processes: None,
        }
    }

    pub(super) fn gone(uuid: GpuUuid, reason: String) -> Self {
        Self { health: Health::Gone(reason), ..Self::unknown(uuid) }
    }
}

/// The compute processes that are not ours, by GPU; a GPU without any has no entry.
///
/// `own_pids` are all processes of our job trees. A GPU that cannot name its
/// processes counts as unused: the alternative would be never to offer it.
pub fn foreign_use(
    readings: &[GpuReading],
    own_pids: &BTreeSet<u32>,
) -> BTreeMap<GpuUuid, Vec<ComputeProcess>> {
    readings
        .iter()
        .filter_map(|reading| {
            let foreign: Vec<ComputeProcess> = reading
                .compute_processes
                .iter()
                .flatten()
                .filter(|process| !own_pids.contains(&process.pid))
                .cloned()
                .collect();
            (!foreign.is_empty()).then(|| (reading.uuid.clone(), foreign))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(uuid: &str, pids: Option<&[u32]>) -> GpuReading {
        let processes = pids.map(|pids| pids.iter().map(|pid| process(*pid)).collect());
        GpuReading { compute_processes: processes, ..GpuReading::unknown(GpuUuid(uuid.to_owned())) }
    }

    fn process(pid: u32) -> ComputeProcess {
        ComputeProcess { pid, memory_used_bytes: Some(1 << 30) }
    }

    #[test]
    fn only_compute_processes_outside_our_job_trees_are_foreign() {
        let readings = [
            reading("GPU-idle", Some(&[])),
            reading("GPU-ours", Some(&[10, 11])),
            reading("GPU-shared", Some(&[11, 99])),
            reading("GPU-silent", None),
            GpuReading::gone(GpuUuid("GPU-gone".to_owned()), "lost".to_owned()),
        ];
        let foreign = foreign_use(&readings, &BTreeSet::from([10, 11]));
        assert_eq!(
            foreign,
            BTreeMap::from([(GpuUuid("GPU-shared".to_owned()), vec![process(99)])])
        );
    }
}
