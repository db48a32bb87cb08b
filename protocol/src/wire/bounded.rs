//! A deserialiser that allocates in proportion to what it reads.
//!
//! Of itself serde reserves up to a MiB for a list that only claims to be long, bincode as
//! much as a text claims, and a list of empty texts takes 24 bytes for each of its bytes.
//! Here a list grows as its elements arrive, each step paid for from an allowance that the
//! length of the input sets; a text is copied only once all of it is there.

use core::{cell::Cell, fmt};

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor,
};

/// Bytes that lists may still take.
pub(super) struct Allowance(Cell<usize>);

impl Allowance {
    pub(super) fn new(bytes: usize) -> Self {
        Self(Cell::new(bytes))
    }

    fn take<E: Error>(&self, bytes: usize) -> Result<(), E> {
        let left = self.0.get().checked_sub(bytes);
        self.0.set(left.ok_or_else(|| E::custom("takes far more memory than bytes"))?);
        Ok(())
    }

    fn give_back(&self, bytes: usize) {
        self.0.set(self.0.get() + bytes);
    }
}

/// Anything of serde's, with the allowance for what is inside.
pub(super) struct Bounded<'a, T> {
    inner: T,
    allowance: &'a Allowance,
}

impl<'a, T> Bounded<'a, T> {
    pub(super) fn new(inner: T, allowance: &'a Allowance) -> Self {
        Self { inner, allowance }
    }

    fn wrap<U>(&self, inner: U) -> Bounded<'a, U> {
        Bounded::new(inner, self.allowance)
    }
}

macro_rules! forward {
    ($($method:ident($($arg:ident: $type:ty),*))*) => {$(
        fn $method<V: Visitor<'de>>(self, $($arg: $type,)* visitor: V) -> Result<V::Value, D::Error> {
            let visitor = self.wrap(Inside { visitor, is_list: false });
            self.inner.$method($($arg,)* visitor)
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Bounded<'_, D> {
    type Error = D::Error;

    forward! {
        deserialize_any() deserialize_bool()
        deserialize_i8() deserialize_i16() deserialize_i32() deserialize_i64()
        deserialize_i128()
        deserialize_u8() deserialize_u16() deserialize_u32() deserialize_u64()
        deserialize_u128()
        deserialize_f32() deserialize_f64() deserialize_char()
        deserialize_str() deserialize_bytes()
        deserialize_option() deserialize_unit()
        deserialize_unit_struct(name: &'static str)
        deserialize_newtype_struct(name: &'static str)
        deserialize_tuple(len: usize)
        deserialize_tuple_struct(name: &'static str, len: usize)
        deserialize_map()
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
        deserialize_enum(name: &'static str, variants: &'static [&'static str])
        deserialize_identifier() deserialize_ignored_any()
    }

    /// Borrowed first: the reader knows whether it has that many bytes.
    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.wrap(Inside { visitor, is_list: true });
        self.inner.deserialize_seq(visitor)
    }

    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

/// A visitor, and whether what it visits is a list whose elements take memory of their own.
struct Inside<V> {
    visitor: V,
    is_list: bool,
}

macro_rules! visit {
    ($($method:ident: $type:ty)*) => {$(
        fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
            self.inner.visitor.$method(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Bounded<'_, Inside<V>> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.visitor.expecting(f)
    }

    visit! {
        visit_bool: bool
        visit_i8: i8 visit_i16: i16 visit_i32: i32 visit_i64: i64 visit_i128: i128
        visit_u8: u8 visit_u16: u16 visit_u32: u32 visit_u64: u64 visit_u128: u128
        visit_f32: f32 visit_f64: f64 visit_char: char
        visit_str: &str visit_borrowed_str: &'de str visit_string: String
        visit_bytes: &[u8] visit_borrowed_bytes: &'de [u8] visit_byte_buf: Vec<u8>
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visitor.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visitor.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, some: D) -> Result<V::Value, D::Error> {
        let some = self.wrap(some);
        self.inner.visitor.visit_some(some)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        let inner = self.wrap(inner);
        self.inner.visitor.visit_newtype_struct(inner)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let Inside { is_list, .. } = self.inner;
        let elements = self.wrap(Elements { access, is_list, room: 0, taken: 0 });
        self.inner.visitor.visit_seq(elements)
    }

    fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let entries = self.wrap(Entries { access, is_first: true });
        self.inner.visitor.visit_map(entries)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let access = self.wrap(access);
        self.inner.visitor.visit_enum(access)
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Bounded<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        let deserializer = self.wrap(deserializer);
        self.inner.deserialize(deserializer)
    }
}

/// The elements of a list, or the fields of a struct.
struct Elements<A> {
    access: A,
    is_list: bool,
    /// Elements the list has room for, if it grows as a `Vec` does, and those it has.
    room: usize,
    taken: usize,
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Bounded<'_, Elements<A>> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, A::Error> {
        let elements = &mut self.inner;
        // A field of one byte holds nothing that could take memory; ids and keys are made of them.
        if !elements.is_list && size_of::<T::Value>() <= 1 {
            return elements.access.next_element_seed(seed);
        }
        if elements.is_list && elements.access.size_hint() != Some(0) {
            if elements.taken == elements.room {
                let size = size_of::<T::Value>();
                let least = if size == 1 { 8 } else { 4 };
                let room = (2 * elements.room).max(least);
                // Both are there while the elements move.
                self.allowance.take(room.saturating_mul(size))?;
                self.allowance.give_back(elements.room * size);
                elements.room = room;
            }
            elements.taken += 1;
        }
        let seed = Bounded::new(seed, self.allowance);
        self.inner.access.next_element_seed(seed)
    }

    /// What a list claims is not to be believed.
    fn size_hint(&self) -> Option<usize> {
        None
    }
}

/// The entries of a map.
struct Entries<A> {
    access: A,
    is_first: bool,
}

impl<A> Bounded<'_, Entries<A>> {
    /// A `BTreeMap` has room for 11 entries from the first on, and is half full on average.
    fn pay<E: Error>(&self, size: usize) -> Result<(), E> {
        let places = if self.inner.is_first { 12 } else { 3 };
        self.allowance.take(places * (size + 8))
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Bounded<'_, Entries<A>> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        if self.inner.access.size_hint() != Some(0) {
            self.pay(size_of::<K::Value>())?;
        }
        let seed = Bounded::new(seed, self.allowance);
        self.inner.access.next_key_seed(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.pay(size_of::<S::Value>())?;
        self.inner.is_first = false;
        let seed = Bounded::new(seed, self.allowance);
        self.inner.access.next_value_seed(seed)
    }

    fn size_hint(&self) -> Option<usize> {
        None
    }
}

impl<'a, 'de, A: EnumAccess<'de>> EnumAccess<'de> for Bounded<'a, A> {
    type Error = A::Error;
    type Variant = Bounded<'a, A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        let Self { inner, allowance } = self;
        let (value, variant) = inner.variant_seed(Bounded::new(seed, allowance))?;
        Ok((value, Bounded::new(variant, allowance)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Bounded<'_, A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.inner.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        let seed = self.wrap(seed);
        self.inner.newtype_variant_seed(seed)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        let visitor = self.wrap(Inside { visitor, is_list: false });
        self.inner.tuple_variant(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = self.wrap(Inside { visitor, is_list: false });
        self.inner.struct_variant(fields, visitor)
    }
}
