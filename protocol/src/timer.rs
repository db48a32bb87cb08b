//! One table of deadlines per machine, ordered by time and then by key.

use std::collections::{BTreeMap, BTreeSet};

/// Deadlines on the boot clock, at most one for each key.
#[derive(Debug, Clone)]
pub struct Timers<K> {
    by_time: BTreeSet<(u64, K)>,
    by_key: BTreeMap<K, u64>,
}

impl<K> Default for Timers<K> {
    fn default() -> Self {
        Self { by_time: BTreeSet::new(), by_key: BTreeMap::new() }
    }
}

impl<K: Ord + Clone> Timers<K> {
    /// Fire `key` at `at_ms`, and no more at any time set before.
    pub fn set(&mut self, key: K, at_ms: u64) {
        self.cancel(&key);
        self.by_time.insert((at_ms, key.clone()));
        self.by_key.insert(key, at_ms);
    }

    /// Do not fire `key`.
    pub fn cancel(&mut self, key: &K) {
        if let Some(at_ms) = self.by_key.remove(key) {
            self.by_time.remove(&(at_ms, key.clone()));
        }
    }

    /// When `key` fires, if it is set.
    #[must_use]
    pub fn due(&self, key: &K) -> Option<u64> {
        self.by_key.get(key).copied()
    }

    /// The earliest deadline.
    #[must_use]
    pub fn next(&self) -> Option<(u64, &K)> {
        self.by_time.first().map(|(at_ms, key)| (*at_ms, key))
    }

    /// Take the earliest key that is due.
    pub fn pop_due(&mut self, boot_ms: u64) -> Option<K> {
        if self.next()?.0 > boot_ms {
            return None;
        }
        let (_, key) = self.by_time.pop_first()?;
        self.by_key.remove(&key);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_due_key_comes_first_and_only_once() {
        let mut timers = Timers::default();
        timers.set("b", 20);
        timers.set("a", 20);
        timers.set("c", 5);
        timers.set("c", 30);
        assert_eq!(timers.next(), Some((20, &"a")));
        assert_eq!(timers.pop_due(19), None);
        assert_eq!(timers.pop_due(25), Some("a"));
        assert_eq!(timers.pop_due(25), Some("b"));
        assert_eq!(timers.pop_due(25), None);
        timers.cancel(&"c");
        assert_eq!(timers.next(), None);
    }
}
