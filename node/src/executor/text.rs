//! Bounds for texts.

/// At most `bytes_max` bytes of `text`, cut between two characters.
pub(crate) fn shortened(mut text: String, bytes_max: usize) -> String {
    let end = (0..=bytes_max.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    text.truncate(end.unwrap_or(0));
    text
}
