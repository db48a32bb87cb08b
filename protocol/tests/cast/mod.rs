//! The people and machines of tests, by small numbers: who they are and what they sign.

use std::collections::BTreeMap;

use p2pit_protocol::{
    BlobId, PeerId, PoolId, StoreId, UserId,
    identity::{Domain, KeyPair, SignedBytes},
    job::{Command, Grace, JobSpec, Policy, Source},
    record::Keeper,
    roster::{DeviceId, JoinClaim, Name, SignedClaim},
};

/// The wall clock of tests.
pub(crate) const WALL_MS: u64 = 1_700_000_000_000;

pub(crate) fn user_key(n: u8) -> KeyPair {
    KeyPair::from_seed(&[n; 32])
}

pub(crate) fn node_key(n: u8) -> KeyPair {
    KeyPair::from_seed(&[n | 0x80; 32])
}

pub(crate) fn user(n: u8) -> UserId {
    UserId(user_key(n).public())
}

pub(crate) fn node(n: u8) -> PeerId {
    PeerId(node_key(n).public())
}

pub(crate) fn store(n: u8) -> StoreId {
    StoreId([n; 16])
}

pub(crate) fn keeper(n: u8) -> Keeper {
    (node(n), store(n))
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub(crate) fn device(n: u8) -> DeviceId {
    DeviceId([n; 16])
}

/// A claim of person `n` with machine `n`, as both sign it.
pub(crate) fn signed_claim(n: u8, claim: &JoinClaim) -> SignedClaim {
    let by_user = JoinClaim::sign(claim.to_bytes(), &user_key(n)).unwrap();
    SignedClaim::countersign(by_user, &node_key(n)).unwrap()
}

/// The least that a job of person 1 can be.
pub(crate) fn small_job_spec(pool: PoolId, keepers: Vec<Keeper>) -> JobSpec {
    JobSpec {
        pool,
        owner: user(1),
        title: String::new(),
        request: "[]".parse().unwrap(),
        command: Command::Script,
        code: BlobId([0xc0; 32]),
        code_bytes: 123_456,
        source: Source::default(),
        continues: None,
        artifacts: Vec::new(),
        env: BTreeMap::new(),
        private: false,
        time_limit_ms: None,
        grace: Grace::default(),
        retries: 0,
        policy: Policy::Continue,
        lost_after_ms: 3_600_000,
        keep_every_ms: 0,
        nonce: [5; 16],
        submitted_at_ms: WALL_MS,
        keepers,
    }
}

/// The job as person 1 signs it.
pub(crate) fn sign_job(spec: &JobSpec) -> SignedBytes {
    SignedBytes::sign(&user_key(1), Domain::JobSpec, spec.to_bytes())
}
