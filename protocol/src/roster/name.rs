//! Names of users, nodes and pools.

use core::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most characters a name may have.
pub const NAME_CHARS_MAX: usize = 32;

/// A case-folded, path-safe name: `[a-z0-9][a-z0-9._-]{0,31}` without `..`.
///
/// A name is a label for people and may change; decisions go by the key behind it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NameError {
    /// No character at all.
    #[error("a name needs at least one character")]
    Empty,
    /// More than [`NAME_CHARS_MAX`] characters.
    #[error("`{0}` has more than {NAME_CHARS_MAX} characters")]
    TooLong(String),
    /// The first character is neither letter nor digit.
    #[error("`{0}` must begin with a letter a-z or a digit")]
    Start(String),
    /// A character outside letters, digits, `.`, `_` and `-`.
    #[error("`{text}` contains {found:?}; allowed are a-z, 0-9, `.`, `_` and `-`")]
    Character {
        /// The text, shortened.
        text: String,
        /// The first character that is not allowed.
        found: char,
    },
    /// Two dots in a row.
    #[error("`{0}` contains `..`")]
    Dots(String),
}

impl Name {
    /// The name `text`, with upper-case ASCII letters folded to lower case.
    ///
    /// # Errors
    /// [`NameError`] where `text` is not of the form that names have.
    pub fn new(text: &str) -> Result<Self, NameError> {
        let shown = || text.chars().take(2 * NAME_CHARS_MAX).collect::<String>();
        let first = text.chars().next().ok_or(NameError::Empty)?;
        if let Some(found) = text.chars().find(|&c| !is_allowed(c.to_ascii_lowercase())) {
            return Err(NameError::Character { text: shown(), found });
        }
        if !first.is_ascii_alphanumeric() {
            return Err(NameError::Start(shown()));
        }
        if text.len() > NAME_CHARS_MAX {
            return Err(NameError::TooLong(shown()));
        }
        if text.contains("..") {
            return Err(NameError::Dots(shown()));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }

    /// A name as close as possible to a host name or login: what is not allowed
    /// becomes `-`; `unnamed` where nothing is left.
    #[must_use]
    pub fn from_any(text: &str) -> Self {
        let mut name = String::new();
        for c in text.chars().map(|c| c.to_ascii_lowercase()) {
            if name.len() == NAME_CHARS_MAX {
                break;
            }
            let c = if is_allowed(c) { c } else { '-' };
            let starts_badly = name.is_empty() && !c.is_ascii_alphanumeric();
            let repeats = !c.is_ascii_alphanumeric() && name.ends_with(c);
            if !starts_badly && !repeats {
                name.push(c);
            }
        }
        name.truncate(name.trim_end_matches(['.', '_', '-']).len());
        Self(if name.is_empty() { "unnamed".to_owned() } else { name })
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// This name with `-n` behind it, shortened where it would become too long.
    #[must_use]
    pub fn variant(&self, n: u32) -> Self {
        let suffix = format!("-{n}");
        let kept = self.0.len().min(NAME_CHARS_MAX - suffix.len());
        Self(format!("{}{suffix}", &self.0[..kept]))
    }

    /// Whether this is `wished`, or `wished` with a number behind it.
    #[must_use]
    pub fn is_variant_of(&self, wished: &Self) -> bool {
        self == wished
            || self
                .0
                .rsplit_once('-')
                .and_then(|(_, n)| n.parse().ok())
                .is_some_and(|n| n >= 2 && wished.variant(n) == *self)
    }

    /// The first of `self`, `self-2`, `self-3`, … that is not taken.
    #[must_use]
    pub fn first_free(&self, taken: impl Fn(&Self) -> bool) -> Self {
        if !taken(self) {
            return self.clone();
        }
        let mut n = 2;
        loop {
            let candidate = self.variant(n);
            // A roster holds far fewer than 2^32 names, so the loop ends.
            if !taken(&candidate) {
                return candidate;
            }
            n = n.saturating_add(1);
        }
    }
}

fn is_allowed(c: char) -> bool {
    matches!(c, 'a'..='z' | '0'..='9' | '.' | '_' | '-')
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_folded_to_lower_case_and_safe_as_a_path_component() {
        assert_eq!(Name::new("Alice").unwrap().as_str(), "alice");
        assert_eq!(Name::new("3090-box.lab_1").unwrap().as_str(), "3090-box.lab_1");
        assert_eq!(Name::new(""), Err(NameError::Empty));
        assert!(matches!(Name::new(".ssh"), Err(NameError::Start(_))));
        assert!(matches!(Name::new("a..b"), Err(NameError::Dots(_))));
        assert!(matches!(Name::new("a/b"), Err(NameError::Character { found: '/', .. })));
        assert!(matches!(Name::new(&"x".repeat(33)), Err(NameError::TooLong(_))));
        assert!(Name::new(&"x".repeat(32)).is_ok());
    }

    #[test]
    fn a_host_name_or_login_becomes_the_nearest_name() {
        let near = |text| Name::from_any(text).as_str().to_owned();
        assert_eq!(near("Lab-GPU3.ethz.ch"), "lab-gpu3.ethz.ch");
        assert_eq!(near("..//Jo Doe!"), "jo-doe");
        assert_eq!(near("???"), "unnamed");
        assert_eq!(near(&"long".repeat(20)).len(), NAME_CHARS_MAX);
    }

    #[test]
    fn a_variant_is_recognised_as_one_of_its_name_only() {
        let lab = Name::new("lab").unwrap();
        assert_eq!(lab.first_free(|n| n.as_str() != "lab-4").as_str(), "lab-4");
        assert!(lab.variant(2).is_variant_of(&lab));
        assert!(!Name::new("lap-2").unwrap().is_variant_of(&lab));
        assert!(!Name::new("lab-1").unwrap().is_variant_of(&lab));
        let long = Name::new(&"y".repeat(32)).unwrap();
        assert!(long.variant(17).is_variant_of(&long));
    }

    proptest! {
        #[test]
        fn whatever_comes_in_a_name_parses_as_itself(text in "\\PC*", n in 2_u32..) {
            let name = Name::from_any(&text);
            prop_assert_eq!(Name::new(name.as_str()), Ok(name.clone()));
            let variant = name.variant(n);
            prop_assert_eq!(Name::new(variant.as_str()), Ok(variant.clone()));
        }
    }
}
