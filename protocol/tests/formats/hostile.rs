//! Bytes that nobody honest sent: they are refused, never with a panic, and never for more
//! memory than `wire::ALLOCATED_BYTES_MAX` says. The fuzz targets in `fuzz/` go on from here.

use std::{fs, path::Path};

use p2pit_protocol::{
    job::{RankState, State},
    message::{Message, Reply, Soft},
    wire::{self, ALLOCATED_BYTES_MAX},
};
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use serde::de::DeserializeOwned;

use crate::{
    counting::{check, measured},
    formats, specimens, vectors,
};

fn allowed(input: &[u8]) -> usize {
    let (per_byte, beside) = ALLOCATED_BYTES_MAX;
    per_byte * input.len() + beside
}

fn decodes_within<T: DeserializeOwned>(bytes: &[u8]) -> bool {
    let (decoded, peak) = measured(|| wire::decode::<T>(bytes).is_ok());
    assert!(peak <= allowed(bytes), "{peak} bytes for {}", bytes.len());
    decoded
}

#[test]
fn a_claim_to_be_long_reserves_nothing() {
    let gigabyte = [0xfc, 0, 0, 0, 0x40];
    let (refused, peak) = measured(|| wire::decode::<Vec<u64>>(&gigabyte).is_err());
    assert!(refused && peak < 1_000, "{peak}");
    // As far as the limit lets the claim through.
    let most = [0xfc, 0, 0, 0x0f, 0];
    let (refused, peak) = measured(|| wire::decode::<String>(&most).is_err());
    assert!(refused && peak < 1_000, "{peak}");
    let nested: Vec<u8> = most.repeat(1_000);
    let (refused, peak) = measured(|| wire::decode::<Vec<Vec<Vec<String>>>>(&nested).is_err());
    assert!(refused && peak < 1_000, "{peak}");
}

#[test]
fn a_megabyte_of_empty_texts_is_refused_before_it_takes_many() {
    let hostile = [&[0xfc, 0, 0, 0x0f, 0][..], &vec![0; 1_000_000]].concat();
    assert!(!decodes_within::<Vec<String>>(&hostile));
}

/// The widest that honest peers send, in memory for each byte: processes without GPUs.
#[test]
fn what_is_honest_and_wide_is_read() {
    for processes in [1_u32, 33, 257, 513, 600, 1_000, 1_024] {
        let bytes = wire::encode(&specimens::wide_reply(processes));
        assert!(decodes_within::<Reply>(&bytes), "{processes} processes as shown");
        let bytes = wire::encode(&specimens::wide_value(processes));
        assert!(decodes_within::<p2pit_protocol::record::Value>(&bytes), "{processes} in a record");
    }
    for message in specimens::wide_messages() {
        let bytes = wire::encode(&message);
        assert!(bytes.len() <= wire::MESSAGE_BYTES_MAX);
        assert!(decodes_within::<Message>(&bytes), "{}", message.name());
    }
}

#[test]
fn the_seeds_of_the_fuzz_targets_and_what_they_found_are_harmless() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut read = 0;
    let mut folders = vec![vectors::folder().to_owned(), root.join("../fuzz/found")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let bytes = fs::read(&path).unwrap();
                formats::ALL.iter().for_each(|format| _ = check(format, &bytes));
                read += 1;
            }
        }
    }
    assert!(read > 100, "{read} files");
}

/// Bytes at random, and vectors with a few of theirs changed, cut, doubled or put together.
#[test]
fn two_hundred_thousand_inputs_from_a_fixed_seed_are_harmless() {
    const INPUTS: u32 = 200_000;
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let mut below = move |bound: usize| (random.next_u64() % bound.max(1) as u64) as usize;
    let seeds: Vec<(&str, Vec<u8>)> =
        specimens::all().into_iter().map(|seed| (seed.format, seed.bytes)).collect();
    let mut accepted = 0;
    for input in 0..INPUTS {
        let (format, mut bytes) = seeds[below(seeds.len())].clone();
        if input % 8 == 0 {
            bytes = (0..below(300)).map(|_| below(256) as u8).collect();
        } else {
            for _ in 0..=below(4) {
                mutate(&mut bytes, &seeds[below(seeds.len())].1, &mut below);
            }
        }
        // All formats would take minutes without optimisation: mostly its own.
        let own = formats::ALL.iter().position(|f| f.name == format).unwrap();
        let any = below(formats::ALL.len());
        let format = &formats::ALL[if input % 4 == 0 { any } else { own }];
        accepted += u32::from(check(format, &bytes));
    }
    // Else the mutations are so wild that nothing behind the first field is tried.
    assert!(accepted > INPUTS / 20, "only {accepted} inputs were read as anything");
}

fn mutate(bytes: &mut Vec<u8>, other: &[u8], below: &mut impl FnMut(usize) -> usize) {
    let at = below(bytes.len());
    match below(7) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << below(8),
        1 if !bytes.is_empty() => bytes[at] = below(256) as u8,
        // Lengths and numbers of the largest sorts.
        2 if !bytes.is_empty() => bytes[at] = [0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff][below(6)],
        3 => bytes.truncate(at),
        4 => bytes.insert(at, below(256) as u8),
        5 => {
            let copied = bytes[at..].to_vec();
            bytes.extend(copied);
        }
        _ => {
            bytes.truncate(at);
            bytes.extend_from_slice(&other[below(other.len())..]);
        }
    }
}

#[test]
fn states_are_told_apart_by_their_bytes() {
    // The order of variants is the format: a new one goes to the end.
    assert_eq!(wire::encode(&State::Done), [7]);
    assert_eq!(wire::encode(&RankState::Ended), [3]);
    assert!(wire::decode::<State>(&[8]).is_err());
    assert!(wire::decode::<Soft>(&[3]).is_err());
}
