//! Removing one rule at a time, so that a simulator can prove its checkers.
//!
//! Without the test-only feature `sabotage` every rule always holds.

/// A rule whose absence some checker must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// What is pinned, committed or running is not free. (G1)
    TakenIsNotFree,
    /// A bidder commits only to what a chosen record value names. (G3)
    CommitNeedsCertificate,
    /// A hold ends at its expiry. (G4)
    HoldsExpire,
    /// Only holds are wounded, never pins. (Q2)
    PinsAreNotWounded,
    /// A rank is started only when the steward says so. (X2)
    StartOnlyWhenTold,
    /// No rank starts before every rank is prepared, and none stays when one cannot. (X4)
    GangStartsWhole,
    /// Nothing depends on anything but inputs and seed. (W3)
    OnlySeededRandomness,
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::TakenIsNotFree,
        Self::CommitNeedsCertificate,
        Self::HoldsExpire,
        Self::PinsAreNotWounded,
        Self::StartOnlyWhenTold,
        Self::GangStartsWhole,
        Self::OnlySeededRandomness,
    ];
}

/// Which rule is removed, if any.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sabotage {
    #[cfg(feature = "sabotage")]
    removed: Option<Rule>,
}

impl Sabotage {
    /// Remove `rule`.
    #[cfg(feature = "sabotage")]
    #[must_use]
    pub const fn remove(rule: Rule) -> Self {
        Self { removed: Some(rule) }
    }

    /// Whether `rule` holds.
    #[cfg_attr(not(feature = "sabotage"), expect(clippy::unused_self, reason = "see the feature"))]
    #[must_use]
    pub(crate) fn holds(self, rule: Rule) -> bool {
        #[cfg(feature = "sabotage")]
        return self.removed != Some(rule);
        #[cfg(not(feature = "sabotage"))]
        {
            let _ = rule;
            true
        }
    }
}
