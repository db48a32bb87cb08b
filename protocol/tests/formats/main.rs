//! Formats: golden vectors of everything that crosses the wire, is signed or hashed, or lands
//! in the journal; and what the codec makes of bytes that are none of it.
#![allow(clippy::unwrap_used, reason = "a test helper that cannot go on fails its test")]

#[path = "../cast/mod.rs"]
mod cast;
mod counting;
mod formats;
mod hostile;
mod specimens;
mod variants;
mod vectors;
