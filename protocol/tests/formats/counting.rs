//! An allocator that counts what each thread has of it.

use core::cell::Cell;
use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, with what the current thread has of it.
struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

fn grow(bytes: usize) {
    let live = LIVE.get().wrapping_add(bytes);
    LIVE.set(live);
    // Wrapped where this thread freed more than it took: other threads' memory.
    if (live as isize) > (PEAK.get() as isize) {
        PEAK.set(live);
    }
}

fn shrink(bytes: usize) {
    LIVE.set(LIVE.get().wrapping_sub(bytes));
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        shrink(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Counted as if both were there for a moment, which they may be.
        grow(size);
        shrink(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What `act` made, and the most that was allocated at a time meanwhile.
pub(crate) fn measured<T>(act: impl FnOnce() -> T) -> (T, usize) {
    LIVE.set(0);
    PEAK.set(0);
    let made = act();
    (made, PEAK.get())
}

/// What recoding `bytes` may take: what was read is written again, a request's text is made
/// of it first.
pub(crate) fn allowed_for_recoding(bytes: &[u8]) -> usize {
    let (per_byte, beside) = p2pit_protocol::wire::ALLOCATED_BYTES_MAX;
    (per_byte + 3) * bytes.len() + beside
}

/// [`crate::formats::check`] with the memory it takes held against what it may.
pub(crate) fn check(format: &crate::formats::Format, bytes: &[u8]) -> bool {
    crate::formats::check(format, bytes, |recode| {
        let (recoded, peak) = measured(recode);
        let (name, given) = (format.name, bytes.len());
        assert!(peak <= allowed_for_recoding(bytes), "{name}: {peak} bytes for {given}");
        recoded
    })
}
