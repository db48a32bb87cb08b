//! Reads the GPUs every few seconds on a thread of its own.

use std::{collections::BTreeSet, io, sync::Arc, sync::mpsc as sync_mpsc, thread, time::Duration};

use p2pit_protocol::inventory::GpuUuid;
use tokio::sync::mpsc;

use super::{GpuReading, GpuSource};

/// Faster would keep an idle GPU's driver awake for nothing.
pub const READ_EVERY_MIN: Duration = Duration::from_secs(1);
/// The owner is promised the GPU back within 10 s: slower would not notice in time.
pub const READ_EVERY_MAX: Duration = Duration::from_secs(8);

/// Asks for readings; the thread ends when this or the receiver is dropped. A driver
/// call that hangs delays readings and nothing else.
#[derive(Debug)]
pub struct GpuMonitor {
    orders: sync_mpsc::Sender<BTreeSet<GpuUuid>>,
}

impl GpuMonitor {
    /// The first reading comes at once. Without GPUs there are no readings.
    pub fn spawn(
        source: Arc<GpuSource>,
        every: Duration,
    ) -> io::Result<(Self, mpsc::Receiver<Vec<GpuReading>>)> {
        let every = every.clamp(READ_EVERY_MIN, READ_EVERY_MAX);
        let (orders, order_receiver) = sync_mpsc::channel();
        let (readings, receiver) = mpsc::channel(1);
        if !source.inventory().is_empty() {
            thread::Builder::new()
                .name("gpu-monitor".to_owned())
                .spawn(move || run(&source, every, &order_receiver, &readings))?;
        }
        Ok((Self { orders }, receiver))
    }

    /// Says which GPUs jobs hold now, and asks for a reading at once.
    pub fn read_now(&self, held: BTreeSet<GpuUuid>) {
        // Without GPUs there is no thread that could hear it.
        let _ = self.orders.send(held);
    }
}

fn run(
    source: &GpuSource,
    every: Duration,
    orders: &sync_mpsc::Receiver<BTreeSet<GpuUuid>>,
    readings: &mpsc::Sender<Vec<GpuReading>>,
) {
    let mut held = BTreeSet::new();
    while readings.blocking_send(source.read(&held)).is_ok() {
        match orders.recv_timeout(every) {
            Ok(newer) => held = orders.try_iter().last().unwrap_or(newer),
            Err(sync_mpsc::RecvTimeoutError::Timeout) => {}
            Err(sync_mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_of_what_is_held_is_read_at_once() {
        let source = Arc::new(GpuSource::probe(&"sim:1xv100".parse().unwrap(), "node"));
        let uuid = source.inventory()[0].uuid.clone();
        let (monitor, mut readings) = GpuMonitor::spawn(source, READ_EVERY_MAX).unwrap();
        assert_eq!(readings.recv().await.unwrap()[0].utilisation_percent, Some(0));
        monitor.read_now(BTreeSet::from([uuid]));
        assert_eq!(readings.recv().await.unwrap()[0].utilisation_percent, Some(100));
        drop(monitor);
        assert_eq!(readings.recv().await, None);
    }

    #[tokio::test]
    async fn without_gpus_there_is_nothing_to_read() {
        let (monitor, mut readings) =
            GpuMonitor::spawn(Arc::new(GpuSource::None), READ_EVERY_MIN).unwrap();
        monitor.read_now(BTreeSet::new());
        assert_eq!(readings.recv().await, None);
    }
}
