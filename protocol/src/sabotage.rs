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
    /// A keeper accepts a proposal only if it has promised nothing higher. (R1, R2)
    AcceptNeedsPromise,
    /// A promise survives a restart of its keeper. (R5)
    PromiseIsKept,
    /// After a value that seals its epoch nothing is accepted in it. (R3)
    SealEndsEpoch,
    /// An epoch begins with exactly what the one before was sealed with. (R4)
    EpochStartsFromSeal,
    /// A keeper takes over only once its predecessor has been silent for long enough. (S1)
    TakeoverWaits,
    /// A steward that no quorum confirmed for its lease falls silent. (S1)
    StewardFences,
    /// A stewardship has a number that no other of its job has. (S2)
    TermCounts,
    /// What is told to a bidder is chosen before, and a process is in the record before it
    /// is started. (X2)
    RecordBeforeAct,
    /// A process runs no longer than a steward granted. (X6)
    LeaseBinds,
    /// A rank whose end nobody saw is not run again before its lease has run out. (X1)
    RerunWaitsForLease,
    /// A result counts only from the node and for the attempt that the record names. (X5)
    ResultNamesAttempt,
    /// A job is called submitted only once two nodes that are no clients have its inputs. (D1)
    InputsOnTwoNodes,
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::TakenIsNotFree,
        Self::CommitNeedsCertificate,
        Self::HoldsExpire,
        Self::PinsAreNotWounded,
        Self::StartOnlyWhenTold,
        Self::GangStartsWhole,
        Self::OnlySeededRandomness,
        Self::AcceptNeedsPromise,
        Self::PromiseIsKept,
        Self::SealEndsEpoch,
        Self::EpochStartsFromSeal,
        Self::TakeoverWaits,
        Self::StewardFences,
        Self::TermCounts,
        Self::RecordBeforeAct,
        Self::LeaseBinds,
        Self::RerunWaitsForLease,
        Self::ResultNamesAttempt,
        Self::InputsOnTwoNodes,
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
