//! Sizes and durations as people write them.

use std::{fmt, str::FromStr, time::Duration};

use thiserror::Error;

/// Bytes, written with a unit: `512m`, `64g`, `1t`; units are powers of 1024, and `ib`
/// or `b` may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(pub u64);

/// Bytes per second, written as a size or a number of bits per second: `20MiB/s`,
/// `100Mbit/s`. Units of bytes are powers of 1024, units of bits powers of 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(pub u64);

/// A duration, written with units: `30s`, `2h`, `1h 30min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(pub Duration);

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseUnitError {
    #[error("`{0}` has no unit; write `512m`, `64g` or `1t`")]
    NoUnit(String),
    #[error("`{0}` is not a size like `512m`, `64g` or `1t`")]
    Size(String),
    #[error("`{0}` is not a rate like `20MiB/s` or `100Mbit/s`")]
    Rate(String),
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

impl FromStr for Rate {
    type Err = ParseUnitError;

    fn from_str(text: &str) -> Result<Self, ParseUnitError> {
        let wrong = || ParseUnitError::Rate(super::shortened(text));
        let amount = text.trim().strip_suffix("/s").ok_or_else(wrong)?.trim();
        let lower = amount.to_ascii_lowercase();
        let Some(bits) = lower.strip_suffix("bit") else {
            return amount.parse().map(|size: MemorySize| Self(size.0)).map_err(|_| wrong());
        };
        let digits = bits.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = bits.split_at(digits);
        let factor: u64 = match unit.trim() {
            "k" => 1_000,
            "m" => 1_000_000,
            "g" => 1_000_000_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).map(|bits| Self(bits / 8)).ok_or_else(wrong)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", MemorySize(self.0))
    }
}

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
    fn rates_are_read_in_bytes_and_bits() {
        for (text, bytes, shown) in [
            ("20MiB/s", 20 << 20, "20m/s"),
            ("512k/s", 512 << 10, "512k/s"),
            (" 100 Mbit/s ", 12_500_000, "12500000b/s"),
            ("1gbit/s", 125_000_000, "125000000b/s"),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate.0, rate.to_string().as_str()), (bytes, shown), "{text}");
        }
        for bad in ["", "20m", "20/s", "fast/s", "mbit/s", "1tbit/s", "99999999999999999999kbit/s"]
        {
            assert!(matches!(bad.parse::<Rate>(), Err(ParseUnitError::Rate(_))), "{bad}");
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
