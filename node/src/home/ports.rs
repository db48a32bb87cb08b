//! The ports of the last run.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

/// The UDP and TCP port of the control plane and the UDP port of the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ports {
    pub control: u16,
    pub data: u16,
}

impl Ports {
    pub(super) fn load(path: &Path) -> Option<Self> {
        let bytes = std::fs::read(path).ok()?;
        match serde_json::from_slice(&bytes) {
            Ok(ports) => Some(ports),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "remembered ports are unreadable");
                None
            }
        }
    }

    pub(super) fn save(self, path: &Path) -> io::Result<()> {
        super::write_atomic(path, &serde_json::to_vec(&self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_remembered_and_nonsense_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ports.json");
        assert_eq!(Ports::load(&path), None);
        let ports = Ports { control: 4001, data: 4002 };
        ports.save(&path).unwrap();
        ports.save(&path).unwrap();
        assert_eq!(Ports::load(&path), Some(ports));
        std::fs::write(&path, "4001").unwrap();
        assert_eq!(Ports::load(&path), None);
    }
}
