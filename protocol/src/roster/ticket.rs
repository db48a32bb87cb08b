//! Tickets: an invite's secret and where the doors are, as one word.

use core::{fmt, net::SocketAddr, str::FromStr};

use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{ClaimId, Name, prove_invite};
use crate::{
    identity::{KeyPair, PeerId, PoolId, SignedBytes, StatementId},
    wire,
};

/// The most doors a ticket names.
pub const DOORS_MAX: usize = 8;

/// What every ticket begins with; the digit is the version of what follows.
const PREFIX: &str = "pit";
const VERSION: char = '1';

/// The longest word that may be a ticket, in characters.
const WORD_CHARS_MAX: usize = 2048;

const CHECKSUM_BYTES: usize = 4;
const CHECKSUM_TAG: &[u8] = b"p2pit/ticket/1\0";

/// What it takes to come to a pool's door: a secret, to be passed on like a key.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The pool.
    pub pool: PoolId,
    /// What people call it.
    pub pool_name: Name,
    /// The invite that lets the holder in.
    pub invite: StatementId,
    /// The secret of the invite's key; wiped when dropped.
    pub invite_seed: Zeroizing<[u8; 32]>,
    /// Member nodes to ask; at most [`DOORS_MAX`].
    pub doors: Vec<Door>,
    /// When the invite ends, by the wall clock of whoever is asked.
    pub expires_wall_ms: u64,
}

/// A member node and where it listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Door {
    /// The node that must answer there.
    pub peer: PeerId,
    /// Its data plane's address.
    pub addr: SocketAddr,
}

/// Why a word is not a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TicketError {
    /// Something else altogether.
    #[error("not a ticket: a ticket is one word that begins with `pit1`")]
    NotATicket,
    /// Characters are missing or wrong.
    #[error("the ticket is damaged: copy the whole word again, from `pit1` to its end")]
    Damaged,
    /// Made by a later version.
    #[error("the ticket is of version {0}, made by a newer p2pit: update this one")]
    Newer(u32),
}

/// How a ticket is encoded; apart, so that the public type can wipe its secret.
#[derive(Serialize, Deserialize)]
struct Encoded {
    pool: PoolId,
    pool_name: Name,
    invite: StatementId,
    invite_seed: [u8; 32],
    doors: Vec<Door>,
    expires_wall_ms: u64,
}

impl Ticket {
    /// The ticket as one word. Doors beyond [`DOORS_MAX`] are left out.
    #[must_use]
    pub fn to_word(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(wire::encode(&Encoded {
            pool: self.pool,
            pool_name: self.pool_name.clone(),
            invite: self.invite,
            invite_seed: *self.invite_seed,
            doors: self.doors.iter().copied().take(DOORS_MAX).collect(),
            expires_wall_ms: self.expires_wall_ms,
        }));
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        let text = Zeroizing::new(BASE32_NOPAD.encode(&bytes));
        Zeroizing::new(format!("{PREFIX}{VERSION}{}", text.to_ascii_lowercase()))
    }

    /// Proof, for a door, that the one who makes `claim` holds this ticket.
    #[must_use]
    pub fn prove(&self, claim: ClaimId) -> SignedBytes {
        prove_invite(&KeyPair::from_seed(&self.invite_seed), self.pool, self.invite, claim)
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(CHECKSUM_TAG);
    hasher.update(bytes);
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
    sum
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let word = Zeroizing::new(text.trim().to_ascii_lowercase());
        let rest = word.strip_prefix(PREFIX).ok_or(TicketError::NotATicket)?;
        let version = rest.chars().next().ok_or(TicketError::NotATicket)?;
        match version.to_digit(10) {
            Some(1) => {}
            Some(newer @ 2..) => return Err(TicketError::Newer(newer)),
            Some(0) | None => return Err(TicketError::NotATicket),
        }
        let payload = &rest[VERSION.len_utf8()..];
        if payload.is_empty() || payload.len() > WORD_CHARS_MAX {
            return Err(TicketError::Damaged);
        }
        let upper = Zeroizing::new(payload.to_ascii_uppercase());
        let bytes = BASE32_NOPAD.decode(upper.as_bytes()).map_err(|_| TicketError::Damaged)?;
        let bytes = Zeroizing::new(bytes);
        let split = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(TicketError::Damaged)?;
        let (bytes, sum) = bytes.split_at(split);
        if sum != checksum(bytes) {
            return Err(TicketError::Damaged);
        }
        let encoded: Encoded =
            wire::decode_limited::<_, WORD_CHARS_MAX>(bytes).map_err(|_| TicketError::Damaged)?;
        if encoded.doors.len() > DOORS_MAX {
            return Err(TicketError::Damaged);
        }
        Ok(Self {
            pool: encoded.pool,
            pool_name: encoded.pool_name,
            invite: encoded.invite,
            invite_seed: Zeroizing::new(encoded.invite_seed),
            doors: encoded.doors,
            expires_wall_ms: encoded.expires_wall_ms,
        })
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("pool", &self.pool)
            .field("pool_name", &self.pool_name)
            .field("invite", &self.invite)
            .field("doors", &self.doors)
            .field("expires_wall_ms", &self.expires_wall_ms)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket() -> Ticket {
        Ticket {
            pool: PoolId([1; 32]),
            pool_name: Name::new("lab").unwrap(),
            invite: StatementId([2; 32]),
            invite_seed: Zeroizing::new([0xab; 32]),
            doors: vec![Door {
                peer: PeerId(KeyPair::from_seed(&[3; 32]).public()),
                addr: "192.0.2.7:4433".parse().unwrap(),
            }],
            expires_wall_ms: 1_700_000_000_000,
        }
    }

    #[test]
    fn a_ticket_comes_back_from_its_word_however_it_was_pasted() {
        let word = ticket().to_word();
        assert!(word.starts_with("pit1") && word.chars().all(|c| c.is_ascii_alphanumeric()));
        assert_eq!(word.parse(), Ok(ticket()));
        // Pinned: tickets outlive the program that made them.
        assert_eq!(&blake3::hash(word.as_bytes()).to_hex()[..16], "febcb6de284ecf3e");
        assert_eq!(format!("  {}\n", word.to_uppercase()).parse(), Ok(ticket()));
    }

    #[test]
    fn a_word_that_is_no_ticket_says_which_way_it_is_wrong() {
        let word = ticket().to_word();
        let parse = |text: &str| text.parse::<Ticket>().unwrap_err();
        assert_eq!(parse("hello"), TicketError::NotATicket);
        assert_eq!(parse("pit"), TicketError::NotATicket);
        assert_eq!(parse("pitfall"), TicketError::NotATicket);
        assert_eq!(parse("pit1"), TicketError::Damaged);
        assert_eq!(parse(&word.replacen("pit1", "pit2", 1)), TicketError::Newer(2));
        assert_eq!(parse("pit1é"), TicketError::Damaged);
        assert_eq!(parse(&format!("pit1{}", "a".repeat(5000))), TicketError::Damaged);
    }

    #[test]
    fn the_secret_is_not_in_the_debug_text() {
        let text = format!("{:?}", ticket());
        assert!(!text.contains("171") && !text.to_lowercase().contains("abab"), "{text}");
    }

    proptest! {
        #[test]
        fn a_cut_or_mistyped_ticket_is_recognised(at in 4_usize..200, to in "[a-z2-7]") {
            let word = ticket().to_word();
            let at = at.min(word.len() - 1);
            prop_assert_eq!(word[..at].parse::<Ticket>(), Err(TicketError::Damaged));
            if word[at..=at] != to {
                let mut mistyped = word.to_string();
                mistyped.replace_range(at..=at, &to);
                prop_assert_eq!(mistyped.parse::<Ticket>(), Err(TicketError::Damaged));
            }
        }

        #[test]
        fn no_word_panics(word in "(pit1)?\\PC{0,80}") {
            let _ = word.parse::<Ticket>();
        }
    }
}
