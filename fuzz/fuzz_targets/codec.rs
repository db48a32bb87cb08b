//! The same bytes in every format: none panics, none takes more memory than the codec says,
//! and what one reads it writes in a form that reads as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../protocol/tests/formats/counting.rs"]
mod counting;
#[path = "../../protocol/tests/formats/formats.rs"]
mod formats;

fuzz_target!(|bytes: &[u8]| {
    for format in formats::ALL {
        counting::check(format, bytes);
    }
});
