//! Numbers, times and foreign texts as people read them.

/// ISO 8601 in UTC, to the millisecond.
pub(crate) fn iso8601(wall_ms: u64) -> String {
    let time =
        i64::try_from(wall_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.unwrap_or(jiff::Timestamp::UNIX_EPOCH).strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// A duration in its two largest units, such as `2h 5m`.
pub(crate) fn duration_s(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let first = units.iter().position(|(unit, _)| seconds >= *unit).unwrap_or(units.len() - 1);
    let mut rest = seconds;
    let mut parts = Vec::new();
    for (unit, name) in units.iter().skip(first).take(2) {
        let count = rest / unit;
        rest %= unit;
        if count > 0 || parts.is_empty() {
            parts.push(format!("{count}{name}"));
        }
    }
    parts.join(" ")
}

/// Bytes with a unit, such as `1.5 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

/// A text from somewhere else, without what would act on a terminal.
pub(crate) fn plain(text: &str) -> String {
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if acts(c) && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// One line of at most `chars_max`.
pub(super) fn line(text: &str, chars_max: usize) -> String {
    let text = plain(text).replace('\n', " ");
    if text.chars().count() <= chars_max {
        return text;
    }
    let kept: String = text.chars().take(chars_max.saturating_sub(1)).collect();
    format!("{kept}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_iso_8601_and_durations_two_units() {
        assert_eq!(iso8601(1_750_000_000_123), "2025-06-15T15:06:40.123Z");
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (125, "2m 5s"),
            (7_205, "2h"),
            (7_500, "2h 5m"),
            (90_000, "1d 1h"),
        ] {
            assert_eq!(duration_s(seconds), text);
        }
    }

    #[test]
    fn a_title_cannot_draw_on_the_terminal() {
        assert_eq!(plain("\x1b[2Jboo\u{202e}"), "\u{fffd}[2Jboo\u{fffd}");
        assert_eq!(line("two\nlines", 20), "two lines");
        assert_eq!(line("abcdef", 4), "abc…");
    }
}
