//! The same bytes in every format: none panics, none takes more memory than the codec says,
//! and what one reads it writes in a form that reads as the same.
#![no_main]


use libfuzzer_sys::fuzz_target;
use p2pit_protocol::wire::ALLOCATED_BYTES_MAX;

#[path = "../../protocol/tests/formats/formats.rs"]
mod formats;

#[path = "../../protocol/tests/formats/counting.rs"]
mod counting;

fuzz_target!(|bytes: &[u8]| {
    formats::check_any(bytes);
    let (per_byte, beside) = ALLOCATED_BYTES_MAX;
    // What was read is written again, and a request's text is made of it twice.
    let allowed = (per_byte + 3) * bytes.len() + beside;
    for format in formats::ALL {
        let (_, peak) = counting::measured(|| (format.recode)(bytes));
        assert!(peak <= allowed, "{}: {peak} bytes for {}", format.name, bytes.len());
    }
});
