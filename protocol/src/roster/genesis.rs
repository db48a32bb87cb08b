//! The beginning of a pool. It never changes; its hash is the pool's id.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Name, statement::is_plain_text};
use crate::{
    identity::{PoolId, UserId},
    wire::{self, DecodeError},
};

/// The most founders a pool may have.
pub const FOUNDERS_MAX: usize = 16;

/// The longest encoding of a genesis, in bytes.
pub const GENESIS_BYTES_MAX: usize = 8 << 10;

/// Precedes the encoded value, so that no other bytes hash to a pool's id.
const TAG: &[u8] = b"p2pit/genesis/1\0";

/// Who founds a pool, and what it is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Genesis {
    /// What people call the pool.
    pub name: Name,
    /// Its first users, all of them admins.
    pub founders: Vec<Founder>,
    /// How many admins must sign together what an admin may do. Always 1 so far.
    pub threshold: u16,
    /// When it was founded, by the founder's wall clock. For people to read.
    pub created_wall_ms: u64,
    /// Random, so that two pools of one founder and name differ.
    pub nonce: [u8; 16],
}

/// A founding admin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Founder {
    /// The person's key.
    pub user: UserId,
    /// The name in the pool.
    pub username: Name,
    /// The name in full.
    pub full_name: Option<String>,
}

/// Why bytes or values are not a genesis.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GenesisError {
    /// Bytes of something else.
    #[error("not the genesis of a pool")]
    Tag,
    /// Bytes that begin like one.
    #[error("genesis does not decode")]
    Malformed(#[source] DecodeError),
    /// None, too many, or one twice.
    #[error("a pool has 1 to {FOUNDERS_MAX} founders, each once")]
    Founders,
    /// More than one signature asked for.
    #[error("genesis asks for {0} admins to sign together; this version knows only 1")]
    Threshold(u16),
    /// A full name that is too long or contains control characters.
    #[error("full name of founder `{0}` is too long or not plain text")]
    FullName(Name),
}

impl Genesis {
    /// The bytes that found the pool. Keep them: they are never made a second time.
    ///
    /// # Errors
    /// [`GenesisError`] where a bound is not kept.
    pub fn to_bytes(&self) -> Result<Vec<u8>, GenesisError> {
        self.check()?;
        Ok([TAG, &wire::encode(self)].concat())
    }

    /// The genesis in `bytes`, whose hash is the id of the pool.
    ///
    /// # Errors
    /// [`GenesisError`] where they are not one.
    pub fn from_bytes(bytes: &[u8]) -> Result<(PoolId, Self), GenesisError> {
        let body = bytes.strip_prefix(TAG).ok_or(GenesisError::Tag)?;
        let genesis: Self =
            wire::decode_limited::<_, GENESIS_BYTES_MAX>(body).map_err(GenesisError::Malformed)?;
        genesis.check()?;
        Ok((PoolId::of(bytes), genesis))
    }

    fn check(&self) -> Result<(), GenesisError> {
        let founders = &self.founders;
        let twice = |i: usize| founders[..i].iter().any(|f| f.user == founders[i].user);
        if founders.is_empty() || founders.len() > FOUNDERS_MAX || (0..founders.len()).any(twice) {
            return Err(GenesisError::Founders);
        }
        if self.threshold != 1 {
            return Err(GenesisError::Threshold(self.threshold));
        }
        for founder in founders {
            if founder.full_name.as_deref().is_some_and(|name| !is_plain_text(name)) {
                return Err(GenesisError::FullName(founder.username.clone()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::KeyPair;

    fn genesis() -> Genesis {
        Genesis {
            name: Name::new("lab").unwrap(),
            founders: vec![Founder {
                user: UserId(KeyPair::from_seed(&[1; 32]).public()),
                username: Name::new("ann").unwrap(),
                full_name: None,
            }],
            threshold: 1,
            created_wall_ms: 1_700_000_000_000,
            nonce: [5; 16],
        }
    }

    #[test]
    fn a_genesis_comes_back_from_its_bytes_and_its_hash_is_the_pool() {
        let bytes = genesis().to_bytes().unwrap();
        assert_eq!(Genesis::from_bytes(&bytes), Ok((PoolId::of(&bytes), genesis())));
        // Pinned: another value here means that every existing pool gets another id.
        assert_eq!(&PoolId::of(&bytes).to_string()[..16], "uykif36tjqj2qvai");
    }

    #[test]
    fn a_genesis_that_breaks_a_rule_is_refused() {
        let mut nobody = genesis();
        nobody.founders.clear();
        assert_eq!(nobody.to_bytes(), Err(GenesisError::Founders));
        let mut twice = genesis();
        twice.founders.push(twice.founders[0].clone());
        assert_eq!(twice.to_bytes(), Err(GenesisError::Founders));
        let two = Genesis { threshold: 2, ..genesis() };
        assert_eq!(two.to_bytes(), Err(GenesisError::Threshold(2)));
        let mut rude = genesis();
        rude.founders[0].full_name = Some("\u{1b}[2J".to_owned());
        assert!(matches!(rude.to_bytes(), Err(GenesisError::FullName(_))));
        assert_eq!(Genesis::from_bytes(b"hello"), Err(GenesisError::Tag));
        let mut cut = genesis().to_bytes().unwrap();
        cut.pop();
        assert!(matches!(Genesis::from_bytes(&cut), Err(GenesisError::Malformed(_))));
    }
}
