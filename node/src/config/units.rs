//! Sizes and durations as people write them.

use std::{fmt, str::FromStr, time::Duration};

use thiserror::Error;

/// Bytes, written with a unit: `512m`, `64g`, `1t`; units are powers of 1024, and `ib`
/// or `b` may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(pub u64);

/// A duration, written with units: `30s`, `2h`, `1h 30min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(pub Duration);

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseUnitError {
    #[error("`{0}` has no unit; write `512m`, `64g` or `1t`")]
    NoUnit(String),
    #[error("`{0}` is not a size like `512m`, `64g` or `1t`")]
    Size(String),
    #[error("`{0}` is not a duration like `30s`, `10min` or `2h`")]
    Duration(String),
}

impl MemorySize {
    pub fn mib(self) -> u64 {
        self.0 >> 20
    }
}

impl FromStr for MemorySize {
    type Err = ParseUnitError;

    fn from_str(text: &str) -> Result<Self, ParseUnitError> {
        let text = text.trim();
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shown = || super::shortened(text);
        let number: u64 = number.parse().map_err(|_| ParseUnitError::Size(shown()))?;
        let unit = unit.trim().to_ascii_lowercase();
        let unit = unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit);
        let shift = match unit {
            "" => return Err(ParseUnitError::NoUnit(shown())),
            _ => UNITS.iter().find(|(name, _)| *name == unit).map(|(_, shift)| *shift),
        };
        shift
            .and_then(|shift| number.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| ParseUnitError::Size(shown()))
    }
}

impl fmt::Display for MemorySize {
    /// In the largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |shift: u32| self.0 != 0 && self.0.trailing_zeros() >= shift;
        match UNITS.iter().rev().find(|(_, shift)| whole(*shift)) {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}b", self.0),
        }
    }
}

const UNITS: [(&str, u32); 4] = [("k", 10), ("m", 20), ("g", 30), ("t", 40)];

impl FromStr for Period {
    type Err = ParseUnitError;

    fn from_str(text: &str) -> Result<Self, ParseUnitError> {
        humantime::parse_duration(text.trim())
            .map(Self)
            .map_err(|_| ParseUnitError::Duration(super::shortened(text)))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_any_usual_unit_and_shown_in_the_shortest() {
        for (text, bytes, shown) in [
            ("512m", 512 << 20, "512m"),
            ("64G", 64 << 30, "64g"),
            ("64 GiB", 64 << 30, "64g"),
            ("2048mb", 2 << 30, "2g"),
            ("1t", 1 << 40, "1t"),
            ("1500k", 1500 << 10, "1500k"),
        ] {
            let size: MemorySize = text.parse().unwrap();
            assert_eq!((size.0, size.to_string().as_str()), (bytes, shown), "{text}");
            assert_eq!(shown.parse(), Ok(size));
        }
        assert_eq!("64".parse::<MemorySize>(), Err(ParseUnitError::NoUnit("64".to_owned())));
        for bad in ["", "g", "-1g", "1.5g", "1p", "99999999999t", "1gg", "64 x"] {
            assert!(bad.parse::<MemorySize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_read_and_shown_with_their_units() {
        let period: Period = "1h 30min".parse().unwrap();
        assert_eq!(period.0, Duration::from_secs(5400));
        assert_eq!(period.to_string(), "1h 30m");
        for bad in ["", "30", "fast", "-1s"] {
            assert!(bad.parse::<Period>().is_err(), "{bad}");
        }
    }
}
