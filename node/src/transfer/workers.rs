//! A few threads over a list of file work.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// Threads at most: beyond a few, the disk is what limits.
const THREADS_MAX: usize = 4;
/// Less work than this is done before a second thread has started.
const ITEMS_MIN: usize = 64;
const BYTES_MIN: u64 = 16 << 20;
/// Items taken at a time. Few enough that threads end together, many enough that what
/// a part prepares (open directories) serves several.
const PART_ITEMS_MAX: usize = 64;

/// Runs `work` on contiguous parts of `0..count` in several threads, and gives the
/// results in order, or an error; after one, no further part is begun. Each thread sets
/// `begin` up once for its parts. `bytes` is what the items come to.
pub(super) fn in_parts<S, T: Send, E: Send>(
    count: usize,
    bytes: u64,
    begin: impl Fn() -> Result<S, E> + Sync,
    work: impl Fn(&mut S, Range<usize>) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let worth_it = count >= ITEMS_MIN || bytes >= BYTES_MIN;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = if worth_it { cores.min(THREADS_MAX).min(count).max(1) } else { 1 };
    if threads == 1 {
        return work(&mut begin()?, 0..count).map(|result| vec![result]);
    }
    let part_items = (count / (threads * 8)).clamp(1, PART_ITEMS_MAX);
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        let mut state = match begin() {
            Ok(state) => state,
            Err(error) => {
                next.store(count, Ordering::Relaxed);
                return Err(error);
            }
        };
        loop {
            let start = next.fetch_add(part_items, Ordering::Relaxed);
            if start >= count {
                return Ok(done);
            }
            match work(&mut state, start..count.min(start + part_items)) {
                Ok(result) => done.push((start, result)),
                Err(error) => {
                    next.store(count, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let mut parts = thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let mut parts = Vec::new();
        for handle in handles {
            match handle.join() {
                Ok(result) => parts.extend(result?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(parts)
    })?;
    parts.sort_unstable_by_key(|(start, _)| *start);
    Ok(parts.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_cover_everything_once() {
        for (count, bytes) in [(0, 0), (1, 0), (63, 0), (64, 0), (1000, 0), (3, u64::MAX)] {
            let work = |(): &mut (), range: Range<usize>| Ok(range.collect::<Vec<_>>());
            let parts = in_parts(count, bytes, || Ok::<_, ()>(()), work);
            assert_eq!(parts.unwrap().concat(), (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_in_any_part_is_the_result() {
        let work = |(): &mut (), range: Range<usize>| match range.contains(&777) {
            true => Err("bad"),
            false => Ok(()),
        };
        assert_eq!(in_parts(1000, 0, || Ok(()), work), Err("bad"));
        let none = |_: &mut (), _| Ok(());
        assert_eq!(in_parts(1000, 0, || Err("no start"), none), Err("no start"));
    }
}
