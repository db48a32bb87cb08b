//! Which variants of which enums values contain, however deep inside.
//!
//! A deserialiser around the codec's own that writes down every choice it sees made: serde
//! tells it all variants of an enum, the bytes tell which one was chosen.

use core::{cell::RefCell, fmt, marker::PhantomData};
use std::collections::{BTreeMap, BTreeSet};

use p2pit_protocol::{
    bidder::{Hold, Work},
    door::{Hello, Reply as DoorReply},
    identity::SignedBytes,
    job::JobSpec,
    message::{Advert, Command, Head, Message, Reply, Soft},
    peer::Slot,
    record::{Certificate, ForceRecover, Keeper, ReceiptBody, Replica, Value},
    roster::{JoinClaim, SignedClaim, Statement, UserRequest},
};
use serde::{
    Deserialize,
    de::{
        DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess,
        Visitor,
    },
};

use crate::{formats::Unreported, specimens::Specimen};

/// The variants of an enum, and those that occurred, by index.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) all: &'static [&'static str],
    pub(crate) met: BTreeSet<usize>,
}

type Log = RefCell<BTreeMap<String, Seen>>;

/// By the name of the enum; two of one name are told apart by their variants.
pub(crate) fn of_all(specimens: &[Specimen]) -> BTreeMap<String, Seen> {
    let log = Log::default();
    for specimen in specimens {
        let (bytes, log) = (&specimen.bytes[..], &log);
        match specimen.format {
            "message" => walk::<Message>(bytes, log),
            "soft" => walk::<Soft>(bytes, log),
            "hello" => walk::<Hello>(bytes, log),
            "door-reply" => walk::<DoorReply>(bytes, log),
            "command" => walk::<Command>(bytes, log),
            "reply" => walk::<Reply>(bytes, log),
            "signed" => walk::<SignedBytes>(bytes, log),
            "signed-claim" => walk::<SignedClaim>(bytes, log),
            "statement" => walk::<Statement>(bytes, log),
            "claim" => walk::<JoinClaim>(bytes, log),
            "advert" => walk::<Advert>(bytes, log),
            "head" => walk::<Head>(bytes, log),
            "job-spec" => walk::<JobSpec>(bytes, log),
            "user-request" => walk::<UserRequest>(bytes, log),
            "receipt" => walk::<ReceiptBody>(bytes, log),
            "force-recover" => walk::<ForceRecover>(bytes, log),
            "value" => walk::<Value>(bytes, log),
            "keepers" => walk::<Vec<Keeper>>(bytes, log),
            "certificate" => walk::<Certificate>(bytes, log),
            "slot" => walk::<Slot>(bytes, log),
            "replica" => walk::<Replica>(bytes, log),
            "hold" => walk::<Hold>(bytes, log),
            "work" => walk::<Work>(bytes, log),
            "end" => walk::<Unreported>(bytes, log),
            // Without enums, or not in the codec's encoding.
            "invite-proof" | "tombstone" | "term" | "refused" | "genesis" | "ticket"
            | "request" => {}
            other => panic!("{other} is not walked: add it here"),
        }
    }
    log.into_inner()
}

fn walk<T: for<'de> Deserialize<'de>>(bytes: &[u8], log: &Log) {
    let seed = Logged { inner: PhantomData::<T>, log, choice: None };
    bincode::serde::seed_decode_from_slice(seed, bytes, bincode::config::standard()).unwrap();
}

#[derive(Clone, Copy)]
struct Choice {
    name: &'static str,
    variants: &'static [&'static str],
}

struct Logged<'a, T> {
    inner: T,
    log: &'a Log,
    /// The enum whose variant comes next.
    choice: Option<Choice>,
}

impl<'a, T> Logged<'a, T> {
    fn wrap<U>(&self, inner: U) -> Logged<'a, U> {
        Logged { inner, log: self.log, choice: self.choice }
    }

    fn plain<U>(&self, inner: U) -> Logged<'a, U> {
        Logged { inner, log: self.log, choice: None }
    }

    fn met(&self, index: usize) {
        let Some(Choice { name, variants }) = self.choice else { return };
        let mut log = self.log.borrow_mut();
        let other = log.get(name).is_some_and(|seen| seen.all != variants);
        let name = if other { format!("{name} {variants:?}") } else { name.to_owned() };
        let seen = log.entry(name).or_default();
        seen.all = variants;
        seen.met.insert(index);
    }
}

macro_rules! forward {
    ($($method:ident($($arg:ident: $type:ty),*))*) => {$(
        fn $method<V: Visitor<'de>>(self, $($arg: $type,)* visitor: V) -> Result<V::Value, D::Error> {
            let visitor = self.wrap(visitor);
            self.inner.$method($($arg,)* visitor)
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Logged<'_, D> {
    type Error = D::Error;

    forward! {
        deserialize_any() deserialize_bool()
        deserialize_i8() deserialize_i16() deserialize_i32() deserialize_i64()
        deserialize_u8() deserialize_u16() deserialize_u32() deserialize_u64()
        deserialize_f32() deserialize_f64() deserialize_char()
        deserialize_str() deserialize_string() deserialize_bytes() deserialize_byte_buf()
        deserialize_option() deserialize_unit()
        deserialize_unit_struct(name: &'static str)
        deserialize_newtype_struct(name: &'static str)
        deserialize_seq() deserialize_tuple(len: usize)
        deserialize_tuple_struct(name: &'static str, len: usize)
        deserialize_map()
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
        deserialize_identifier() deserialize_ignored_any()
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let choice = Some(Choice { name, variants });
        let visitor = Logged { inner: visitor, log: self.log, choice };
        self.inner.deserialize_enum(name, variants, visitor)
    }

    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

macro_rules! visit {
    ($($method:ident: $type:ty)*) => {$(
        fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
            self.inner.$method(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Logged<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    visit! {
        visit_bool: bool
        visit_i8: i8 visit_i16: i16 visit_i32: i32 visit_i64: i64
        visit_u8: u8 visit_u16: u16 visit_u64: u64
        visit_f32: f32 visit_f64: f64 visit_char: char
        visit_str: &str visit_borrowed_str: &'de str visit_string: String
        visit_bytes: &[u8] visit_borrowed_bytes: &'de [u8] visit_byte_buf: Vec<u8>
    }

    /// The index of a variant, where one was expected.
    fn visit_u32<E: Error>(self, value: u32) -> Result<V::Value, E> {
        self.met(value as usize);
        self.inner.visit_u32(value)
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, some: D) -> Result<V::Value, D::Error> {
        let some = self.plain(some);
        self.inner.visit_some(some)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        let inner = self.plain(inner);
        self.inner.visit_newtype_struct(inner)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let access = self.plain(access);
        self.inner.visit_seq(access)
    }

    fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let access = self.plain(access);
        self.inner.visit_map(access)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let access = self.wrap(access);
        self.inner.visit_enum(access)
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Logged<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        let deserializer = self.wrap(deserializer);
        self.inner.deserialize(deserializer)
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Logged<'_, A> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, A::Error> {
        let seed = self.plain(seed);
        self.inner.next_element_seed(seed)
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Logged<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        let seed = self.plain(seed);
        self.inner.next_key_seed(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        let seed = self.plain(seed);
        self.inner.next_value_seed(seed)
    }
}

impl<'a, 'de, A: EnumAccess<'de>> EnumAccess<'de> for Logged<'a, A> {
    type Error = A::Error;
    type Variant = Logged<'a, A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        let Self { inner, log, choice } = self;
        let (value, variant) = inner.variant_seed(Logged { inner: seed, log, choice })?;
        Ok((value, Logged { inner: variant, log, choice: None }))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Logged<'_, A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.inner.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        let seed = self.plain(seed);
        self.inner.newtype_variant_seed(seed)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        let visitor = self.plain(visitor);
        self.inner.tuple_variant(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = self.plain(visitor);
        self.inner.struct_variant(fields, visitor)
    }
}
