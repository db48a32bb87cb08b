//! What users ask of nodes: signed in the CLI, checked by the node that carries it out.
//!
//! A request is good for one minute, for the nodes it names, and once at each. The
//! guard's memory is not durable: a node that restarts within that minute may meet a
//! request again, so commands carry ids that make a repetition harmless.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Roster;
use crate::{
    identity::{Domain, KeyPair, PeerId, PoolId, SignedBytes, UserId},
    time::Now,
    wire::{self, DecodeError},
};

/// The most nodes one request is for.
pub const AUDIENCE_MAX: usize = 256;

/// How far ahead a request may expire, by its signer's clock.
pub const REQUEST_AHEAD_MS_MAX: u64 = 60_000;

/// How far two wall clocks of one pool may be apart.
pub const WALL_TOLERANCE_MS: u64 = 120_000;

/// The most requests remembered at a time; each for five minutes at most.
pub const NONCES_MAX: usize = 65_536;

/// The most requests of one user remembered at a time, so that none shuts out others.
pub const NONCES_PER_USER_MAX: usize = 8_192;

/// A user's command to some nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRequest {
    /// The pool in which the user has the right.
    pub pool: PoolId,
    /// The nodes that may carry it out.
    pub audience: BTreeSet<PeerId>,
    /// Random: two requests of one user never share it.
    pub nonce: [u8; 16],
    /// When it ends, by the user's wall clock; at most [`REQUEST_AHEAD_MS_MAX`] ahead.
    pub expires_wall_ms: u64,
    /// What to do, encoded.
    pub command: Vec<u8>,
}

/// A request that passed the guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Who asks: a member.
    pub user: UserId,
    /// What is asked.
    pub request: UserRequest,
}

/// Why a request is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestError {
    /// The signature does not verify.
    #[error("the request's signature does not verify: send it again with the right key")]
    Signature,
    /// Not the bytes of a request.
    #[error("the request does not decode: command and daemon may be of different versions")]
    Malformed(#[source] DecodeError),
    /// More nodes than [`AUDIENCE_MAX`].
    #[error("the request is for {0} nodes where at most {AUDIENCE_MAX} are allowed: split it")]
    Audience(usize),
    /// About another pool.
    #[error("the request is for another pool: choose the right home with `--home`")]
    OtherPool,
    /// This node is not in the audience.
    #[error("the request is not for this node: send it to a node that it names")]
    NotForMe,
    /// The signer is no member.
    #[error(
        "{0} is not a user of this pool: choose the right key with `--identity`, or join with a \
         ticket"
    )]
    NotAMember(UserId),
    /// Over by more than the tolerance.
    #[error(
        "the request ended {late_s} s ago by this node's clock: send it again, and if that \
         repeats set the clocks of both machines"
    )]
    Expired {
        /// Since when, in seconds.
        late_s: u64,
    },
    /// Ends too far in the future, beyond the tolerance.
    #[error(
        "the request's clock is at least {ahead_s} s ahead of this node's: set the clocks of both \
         machines and send it again"
    )]
    TooFarAhead {
        /// By how much the signer's clock is ahead at least, in seconds.
        ahead_s: u64,
    },
    /// It came before.
    #[error("the request was received before: sign a new one")]
    Replayed,
    /// No room to remember it, so it might be repeated unnoticed.
    #[error("too many requests in the last minutes: send it again in a minute")]
    Full,
}

impl UserRequest {
    /// Sign as `user`.
    #[must_use]
    pub fn sign(&self, user: &KeyPair) -> SignedBytes {
        SignedBytes::sign(user, Domain::UserRequest, wire::encode(self))
    }
}

/// Lets each good request through once.
#[derive(Debug, Clone, Default)]
pub struct RequestGuard {
    seen: BTreeSet<(UserId, [u8; 16])>,
    /// By the boot-clock time at which it may be forgotten.
    by_end: BTreeSet<(u64, UserId, [u8; 16])>,
    per_user: BTreeMap<UserId, usize>,
}

impl RequestGuard {
    /// A guard that remembers nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Let `signed` through at node `me`, once.
    ///
    /// # Errors
    /// [`RequestError`] where it must not be carried out here and now.
    pub fn check(
        &mut self,
        signed: &SignedBytes,
        roster: &Roster,
        me: PeerId,
        now: Now,
    ) -> Result<Admitted, RequestError> {
        let bytes = signed.verify(Domain::UserRequest).map_err(|_| RequestError::Signature)?;
        let request: UserRequest = wire::decode(bytes).map_err(RequestError::Malformed)?;
        let user = UserId(signed.signer);
        if request.audience.len() > AUDIENCE_MAX {
            return Err(RequestError::Audience(request.audience.len()));
        }
        if request.pool != roster.pool() {
            return Err(RequestError::OtherPool);
        }
        if !request.audience.contains(&me) {
            return Err(RequestError::NotForMe);
        }
        if !roster.state().is_member_user(user) {
            return Err(RequestError::NotAMember(user));
        }
        self.forget(now);
        let stays_ms = time_left_ms(request.expires_wall_ms, now)?;
        self.remember(user, request.nonce, now.after(stays_ms))?;
        Ok(Admitted { user, request })
    }

    fn remember(
        &mut self,
        user: UserId,
        nonce: [u8; 16],
        until_boot_ms: u64,
    ) -> Result<(), RequestError> {
        if self.seen.contains(&(user, nonce)) {
            return Err(RequestError::Replayed);
        }
        let own = self.per_user.get(&user).copied().unwrap_or(0);
        if self.seen.len() >= NONCES_MAX || own >= NONCES_PER_USER_MAX {
            return Err(RequestError::Full);
        }
        self.seen.insert((user, nonce));
        self.by_end.insert((until_boot_ms, user, nonce));
        self.per_user.insert(user, own + 1);
        Ok(())
    }

    fn forget(&mut self, now: Now) {
        while let Some(&(until_boot_ms, user, nonce)) = self.by_end.first() {
            if until_boot_ms > now.boot_ms {
                break;
            }
            self.by_end.pop_first();
            self.seen.remove(&(user, nonce));
            if let Some(own) = self.per_user.get_mut(&user) {
                *own -= 1;
                if *own == 0 {
                    self.per_user.remove(&user);
                }
            }
        }
    }
}

/// For how long from now a request with this expiry would still be let through.
fn time_left_ms(expires_wall_ms: u64, now: Now) -> Result<u64, RequestError> {
    let last_wall_ms = expires_wall_ms.saturating_add(WALL_TOLERANCE_MS);
    if last_wall_ms <= now.wall_ms {
        return Err(RequestError::Expired { late_s: (now.wall_ms - expires_wall_ms) / 1000 });
    }
    let signed_at_most_ms = expires_wall_ms.saturating_sub(REQUEST_AHEAD_MS_MAX);
    let ahead_ms = signed_at_most_ms.saturating_sub(now.wall_ms);
    if ahead_ms > WALL_TOLERANCE_MS {
        return Err(RequestError::TooFarAhead { ahead_s: ahead_ms / 1000 });
    }
    Ok(last_wall_ms - now.wall_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roster::testing::{Replica, WALL_MS, user_key};

    fn now(wall_ms: u64) -> Now {
        Now { boot_ms: 1_000_000 + wall_ms - (WALL_MS - 500_000), wall_ms }
    }

    fn request(replica: &Replica) -> UserRequest {
        UserRequest {
            pool: replica.roster.pool(),
            audience: [replica.peer()].into(),
            nonce: [1; 16],
            expires_wall_ms: WALL_MS + 60_000,
            command: b"stop".to_vec(),
        }
    }

    /// What a fresh guard of the founder's node says at `WALL_MS`.
    fn check(replica: &Replica, signed: &SignedBytes) -> Result<Admitted, RequestError> {
        RequestGuard::new().check(signed, &replica.roster, replica.peer(), now(WALL_MS))
    }

    #[test]
    fn a_good_request_passes_once() {
        let me = Replica::founder();
        let signed = request(&me).sign(&me.user);
        let mut guard = RequestGuard::new();
        let mut ask = |signed, wall_ms| guard.check(signed, &me.roster, me.peer(), now(wall_ms));
        let admitted = Admitted { user: me.user_id(), request: request(&me) };
        assert_eq!(ask(&signed, WALL_MS), Ok(admitted));
        for later_ms in [0, 60_000, 179_999] {
            assert_eq!(ask(&signed, WALL_MS + later_ms), Err(RequestError::Replayed));
        }
        assert_eq!(
            ask(&signed, WALL_MS + 180_000),
            Err(RequestError::Expired { late_s: 120 }),
            "forgotten only when it would no longer pass"
        );
        let other = UserRequest { nonce: [2; 16], ..request(&me) }.sign(&me.user);
        assert!(ask(&other, WALL_MS).is_ok());
    }

    #[test]
    fn a_request_for_others_or_by_strangers_is_refused() {
        let me = Replica::founder();
        let good = request(&me);
        let stranger = user_key(9);
        let refused = |request: UserRequest| check(&me, &request.sign(&me.user)).unwrap_err();
        assert_eq!(
            refused(UserRequest { pool: PoolId([0; 32]), ..good.clone() }),
            RequestError::OtherPool
        );
        assert_eq!(
            refused(UserRequest { audience: BTreeSet::new(), ..good.clone() }),
            RequestError::NotForMe
        );
        let crowd = (0..=AUDIENCE_MAX).map(|n| {
            let mut seed = [0; 32];
            seed[..8].copy_from_slice(&n.to_le_bytes());
            PeerId(crate::identity::PublicKey(seed))
        });
        assert_eq!(
            refused(UserRequest { audience: crowd.collect(), ..good.clone() }),
            RequestError::Audience(AUDIENCE_MAX + 1)
        );
        assert_eq!(
            check(&me, &good.sign(&stranger)),
            Err(RequestError::NotAMember(UserId(stranger.public())))
        );
        let mut changed = good.sign(&me.user);
        changed.bytes.push(0);
        assert_eq!(check(&me, &changed), Err(RequestError::Signature));
        let as_spec = SignedBytes::sign(&me.user, Domain::JobSpec, wire::encode(&good));
        assert_eq!(check(&me, &as_spec), Err(RequestError::Signature));
        let nonsense = SignedBytes::sign(&me.user, Domain::UserRequest, vec![1, 2, 3]);
        assert!(matches!(check(&me, &nonsense), Err(RequestError::Malformed(_))));
    }

    #[test]
    fn clocks_may_differ_by_two_minutes_and_no_more() {
        let me = Replica::founder();
        let at = |expires_wall_ms| {
            check(&me, &UserRequest { expires_wall_ms, ..request(&me) }.sign(&me.user)).map(|_| ())
        };
        assert_eq!(at(WALL_MS - 119_999), Ok(()));
        assert_eq!(at(WALL_MS - 120_000), Err(RequestError::Expired { late_s: 120 }));
        assert_eq!(at(WALL_MS + 180_000), Ok(()));
        assert_eq!(at(WALL_MS + 181_000), Err(RequestError::TooFarAhead { ahead_s: 121 }));
        let error = at(u64::MAX).unwrap_err();
        assert!(error.to_string().contains("set the clocks"), "{error}");
    }

    #[test]
    fn a_full_memory_refuses_rather_than_forgets() {
        let mut guard = RequestGuard::new();
        let nonce = |n: usize| {
            let mut nonce = [0; 16];
            nonce[..8].copy_from_slice(&n.to_le_bytes());
            nonce
        };
        let users = NONCES_MAX / NONCES_PER_USER_MAX;
        for u in 0..users {
            let user = UserId(user_key(u8::try_from(u).unwrap()).public());
            for n in 0..NONCES_PER_USER_MAX {
                assert_eq!(guard.remember(user, nonce(n), 100), Ok(()));
            }
            assert_eq!(guard.remember(user, nonce(usize::MAX), 100), Err(RequestError::Full));
        }
        let late_comer = UserId(user_key(99).public());
        assert_eq!(guard.remember(late_comer, nonce(0), 100), Err(RequestError::Full));
        guard.forget(Now { boot_ms: 100, wall_ms: 0 });
        assert_eq!(guard.remember(late_comer, nonce(0), 200), Ok(()));
        assert_eq!(guard.per_user.len(), 1);
    }
}
