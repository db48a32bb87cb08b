//! Every format by name, with what reads it and writes it again.

use p2pit_protocol::{
    PeerId,
    bidder::{Hold, Work},
    door::{Hello, Reply as DoorReply},
    identity::SignedBytes,
    job::{JobSpec, RankEnd},
    message::{Advert, Command, Head, Message, Reply, Soft},
    peer::Slot,
    record::{Certificate, ForceRecover, Keeper, ReceiptBody, Replica, Value},
    request::Request,
    roster::{Genesis, JoinClaim, SignedClaim, Statement, Ticket, UserRequest},
    wire,
};
use serde::{Serialize, de::DeserializeOwned};

/// An ending that waits for its steward: who that is, its term, the keepers, and the ending.
pub(crate) type Unreported = (PeerId, u64, Vec<PeerId>, RankEnd);

/// One format.
pub(crate) struct Format {
    pub(crate) name: &'static str,
    /// The bytes that the value in these bytes is written as.
    pub(crate) recode: fn(&[u8]) -> Result<Vec<u8>, String>,
}

fn by_codec<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<Vec<u8>, String> {
    wire::decode::<T>(bytes).map(|value| wire::encode(&value)).map_err(|e| e.to_string())
}

fn genesis(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let (_, genesis) = Genesis::from_bytes(bytes).map_err(|e| e.to_string())?;
    genesis.to_bytes().map_err(|e| e.to_string())
}

fn statement(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let statement = Statement::from_bytes(bytes).map_err(|e| e.to_string())?;
    Ok(wire::encode(&statement))
}

fn claim(bytes: &[u8]) -> Result<Vec<u8>, String> {
    JoinClaim::from_bytes(bytes).map(|claim| claim.to_bytes()).map_err(|e| e.to_string())
}

fn ticket(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let text = core::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let ticket: Ticket = text.parse().map_err(|e| format!("{e}"))?;
    Ok(ticket.to_word().as_bytes().to_vec())
}

fn request(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let text = core::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let request: Request = text.parse().map_err(|e| format!("{e}"))?;
    Ok(request.to_string().into_bytes())
}

/// All of them.
pub(crate) const ALL: &[Format] = &[
    // On the wire.
    Format { name: "message", recode: by_codec::<Message> },
    Format { name: "soft", recode: by_codec::<Soft> },
    Format { name: "hello", recode: by_codec::<Hello> },
    Format { name: "door-reply", recode: by_codec::<DoorReply> },
    Format { name: "command", recode: by_codec::<Command> },
    Format { name: "reply", recode: by_codec::<Reply> },
    // Signed or hashed.
    Format { name: "signed", recode: by_codec::<SignedBytes> },
    Format { name: "signed-claim", recode: by_codec::<SignedClaim> },
    Format { name: "genesis", recode: genesis },
    Format { name: "statement", recode: statement },
    Format { name: "claim", recode: claim },
    Format { name: "invite-proof", recode: by_codec::<[[u8; 32]; 3]> },
    Format { name: "advert", recode: by_codec::<Advert> },
    Format { name: "head", recode: by_codec::<Head> },
    Format { name: "job-spec", recode: by_codec::<JobSpec> },
    Format { name: "user-request", recode: by_codec::<UserRequest> },
    Format { name: "receipt", recode: by_codec::<ReceiptBody> },
    Format { name: "force-recover", recode: by_codec::<ForceRecover> },
    Format { name: "value", recode: by_codec::<Value> },
    Format { name: "keepers", recode: by_codec::<Vec<Keeper>> },
    Format { name: "certificate", recode: by_codec::<Certificate> },
    // In the journal. The types of the last four are private or none: what they are made of.
    Format { name: "slot", recode: by_codec::<Slot> },
    Format { name: "replica", recode: by_codec::<Replica> },
    Format { name: "hold", recode: by_codec::<Hold> },
    Format { name: "work", recode: by_codec::<Work> },
    Format { name: "tombstone", recode: by_codec::<u64> },
    Format { name: "end", recode: by_codec::<Unreported> },
    Format { name: "term", recode: by_codec::<(u64, u64)> },
    Format { name: "refused", recode: by_codec::<(u64, String)> },
    // Typed by people.
    Format { name: "ticket", recode: ticket },
    Format { name: "request", recode: request },
];

/// Whatever `bytes` are, this format does not panic on them, and what it reads it writes in a
/// form that reads as the same; whether it read anything. `measure` may count what that takes.
pub(crate) fn check(
    format: &Format,
    bytes: &[u8],
    measure: impl FnOnce(&dyn Fn() -> Result<Vec<u8>, String>) -> Result<Vec<u8>, String>,
) -> bool {
    let Ok(once) = measure(&|| (format.recode)(bytes)) else { return false };
    let twice = (format.recode)(&once);
    assert_eq!(twice.as_ref(), Ok(&once), "{}: {bytes:02x?}", format.name);
    true
}
