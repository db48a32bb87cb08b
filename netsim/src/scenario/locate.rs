//! Where in a YAML text something stands: serde keeps no lines, but its errors do.

use core::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

/// A step on the way to a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment {
    /// Of a map.
    Key(String),
    /// Of a list.
    Index(usize),
}

/// A field, from the outside in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Field(Vec<Segment>);

impl Field {
    /// The field `key` of this one.
    pub(super) fn key(&self, key: &str) -> Self {
        self.and(Segment::Key(key.to_owned()))
    }

    /// The entry `index` of this one.
    pub(super) fn index(&self, index: usize) -> Self {
        self.and(Segment::Index(index))
    }

    /// The line it stands on, or the nearest around it that there is.
    pub(super) fn line(&self, text: &str) -> usize {
        (0..=self.0.len()).rev().find_map(|depth| line_of(text, &self.0[..depth])).unwrap_or(1)
    }

    fn and(&self, segment: Segment) -> Self {
        let mut segments = self.0.clone();
        segments.push(segment);
        Self(segments)
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Key(key) if index == 0 => f.write_str(key)?,
                Segment::Key(key) => write!(f, ".{key}")?,
                Segment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// What the probe says where it meets its goal.
const FOUND: &str = "found";

fn line_of(text: &str, path: &[Segment]) -> Option<usize> {
    let probed = Probe(path).deserialize(serde_yaml::Deserializer::from_str(text));
    let met = probed.err().filter(|error| error.to_string().contains(FOUND))?;
    met.location().map(|location| location.line())
}

/// Reads a text up to a field, and fails there on purpose: the error bears the line.
struct Probe<'p>(&'p [Segment]);

impl Probe<'_> {
    fn met<E: serde::de::Error>(&self) -> Result<(), E> {
        if self.0.is_empty() { Err(E::custom(FOUND)) } else { Ok(()) }
    }
}

impl<'de> DeserializeSeed<'de> for Probe<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Probe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.met()
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.met()
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.met()
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.met()
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        self.met()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.met()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.met()?;
        let Some((Segment::Index(wanted), rest)) = self.0.split_first() else {
            return Err(A::Error::custom("no such field"));
        };
        for _ in 0..*wanted {
            entries.next_element::<IgnoredAny>()?;
        }
        entries.next_element_seed(Probe(rest)).map(|_| ())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.met()?;
        let Some((Segment::Key(wanted), rest)) = self.0.split_first() else {
            return Err(A::Error::custom("no such field"));
        };
        while let Some(key) = entries.next_key::<String>()? {
            if key == *wanted {
                return entries.next_value_seed(Probe(rest));
            }
            entries.next_value::<IgnoredAny>()?;
        }
        Err(A::Error::custom("no such field"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_on_its_line_in_either_way_of_writing() {
        let text = "a: 1\nlist:\n  - x: {deep: [1,\n      2]}\n  - y: z\n  - last\n";
        let root = Field::default();
        let list = root.key("list");
        assert_eq!(root.key("a").line(text), 1);
        assert_eq!(list.index(0).key("x").key("deep").index(1).line(text), 4);
        assert_eq!(list.index(1).key("y").line(text), 5);
        assert_eq!(list.index(2).line(text), 6);
        assert_eq!(list.index(0).key("x").to_string(), "list[0].x");
    }

    #[test]
    fn what_is_not_there_is_said_of_what_is_around_it() {
        let text = "a: 1\nlist:\n  - x: 1\n";
        assert_eq!(Field::default().key("list").index(0).key("missing").line(text), 3);
    }
}
