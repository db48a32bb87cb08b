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
    /// A call stands only for its time. (W2)
    CallsExpire,
    /// Only holds are wounded, never pins. (Q2)
    PinsAreNotWounded,
    /// A rank is started only when the steward says so. (X2)
    StartOnlyWhenTold,
    /// No rank starts before every rank is prepared, and none stays when one cannot. (X4)
    GangStartsWhole,
    /// Nothing depends on anything but inputs and seed. (W3)
    OnlySeededRandomness,
    /// No two proposers have a ballot in common. (R1)
    BallotsDiffer,
    /// A proposer goes on from what was accepted last. (R2)
    LastAcceptedWins,
    /// An acceptor accepts nothing below what it promised. (R5)
    AcceptNeedsPromise,
    /// A promise never falls. (R5)
    PromiseIsKept,
    /// Nothing is chosen in an epoch after its seal. (R3)
    SealEndsEpoch,
    /// A new epoch begins with exactly the sealed body. (R4)
    EpochStartsFromSeal,
    /// A keeper takes over only after the steward's lease has surely run out. (S1)
    TakeoverWaits,
    /// A steward acts only while its lease lasts. (S1)
    StewardFences,
    /// A take-over begins a new term. (S2)
    TermCounts,
    /// A process ends when its lease does. (X6)
    LeaseBinds,
    /// A rank is run again only when the last run has surely ended. (X1)
    RerunWaitsForLease,
    /// That a rank is started is durable before it is. (X3)
    StartIsWritten,
    /// A result is taken only from the node and attempt that the record names. (X5)
    ResultNamesAttempt,
    /// A job counts as submitted once its inputs are on two nodes. (D1)
    InputsOnTwoNodes,
    /// A job is done once what it left is on as many nodes as it should be. (D2)
    DoneWaitsForCopies,
    /// An attempt begins with the newest copy of what the one before wrote. (D3)
    RetryTakesNewestSave,
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 24] = [
        Self::TakenIsNotFree,
        Self::CommitNeedsCertificate,
        Self::HoldsExpire,
        Self::CallsExpire,
        Self::PinsAreNotWounded,
        Self::StartOnlyWhenTold,
        Self::GangStartsWhole,
        Self::OnlySeededRandomness,
        Self::BallotsDiffer,
        Self::LastAcceptedWins,
        Self::AcceptNeedsPromise,
        Self::PromiseIsKept,
        Self::SealEndsEpoch,
        Self::EpochStartsFromSeal,
        Self::TakeoverWaits,
        Self::StewardFences,
        Self::TermCounts,
        Self::LeaseBinds,
        Self::RerunWaitsForLease,
        Self::StartIsWritten,
        Self::ResultNamesAttempt,
        Self::InputsOnTwoNodes,
        Self::DoneWaitsForCopies,
        Self::RetryTakesNewestSave,
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
