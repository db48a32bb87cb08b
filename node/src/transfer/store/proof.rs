//! Blobs with what proves ranges of them, see [`super::super::verified`].

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use p2pit_protocol::BlobId;
use tracing::warn;

use super::{BlobStore, Error, OUTBOARD};
use crate::transfer::verified::{self, EncodeError, Ranges};

/// A blob longer than one group, whose ranges can be proved.
#[derive(Debug)]
pub struct Verifiable {
    pub id: BlobId,
    pub size: u64,
    data: File,
    outboard: File,
}

impl BlobStore {
    /// Writes `ranges` of a blob with what proves them. A blob that turns out to be
    /// corrupt is removed, and is missing from then on.
    pub fn encode(
        &self,
        blob: &Verifiable,
        ranges: &Ranges,
        writer: impl Write,
    ) -> Result<(), Error> {
        let Verifiable { id, size, data, outboard } = blob;
        match verified::encode(id, *size, data, outboard, ranges, writer) {
            Ok(()) => Ok(()),
            Err(EncodeError::Io(e)) => Err(Error::io("read", &self.path_of(id))(e)),
            Err(EncodeError::Corrupt) => {
                self.check(id)?;
                // The blob is as it should be, so its outboard was not: the next to ask
                // gets a new one.
                Err(Error::Corrupt(*id))
            }
        }
    }

    /// A blob longer than one group, opened for [`Self::encode`].
    pub fn open_verifiable(&self, id: &BlobId) -> Result<Verifiable, Error> {
        let data = self.open_blob(id)?;
        let path = self.path_of(id);
        let size = data.metadata().map_err(Error::io("read", &path))?.len();
        let beside = path.with_extension(OUTBOARD);
        let outboard = match File::open(&beside) {
            Ok(outboard) => outboard,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.check(id)?;
                File::open(&beside).map_err(Error::io("open", &beside))?
            }
            Err(e) => return Err(Error::io("open", &beside)(e)),
        };
        Ok(Verifiable { id: *id, size, data, outboard })
    }

    /// Reads a blob to its end. It gets a new outboard if it is what it should be, and is
    /// removed if it is not.
    pub fn check(&self, id: &BlobId) -> Result<(), Error> {
        let file = self.open_blob(id)?;
        let path = self.path_of(id);
        let size = file.metadata().map_err(Error::io("read", &path))?.len();
        let (found, outboard) = verified::hash(&file, size).map_err(Error::io("read", &path))?;
        if found != *id {
            warn!(blob = %id, path = %path.display(), "a corrupt blob is removed");
            self.remove(id)?;
            return Err(Error::Corrupt(*id));
        }
        self.write_outboard(&path, &outboard)
    }

    pub(super) fn write_outboard(&self, blob: &Path, outboard: &[u8]) -> Result<(), Error> {
        if outboard.is_empty() {
            return Ok(());
        }
        let mut temp = self.temp()?;
        temp.write_all(outboard).map_err(Error::io("write", temp.path()))?;
        self.settle(temp, &blob.with_extension(OUTBOARD))
    }
}
