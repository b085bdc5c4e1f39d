//! The nesting limit of encoded values.
//!
//! No value overflows the stack, and no value is nested deeper than its decoders read.

use std::fmt::Display;

use serde::ser::{
    Error, Serialize, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
    SerializeTupleStruct, SerializeTupleVariant, Serializer,
};

/// Maximum number of arrays and maps around one value.
///
/// serde_json reads no deeper nesting. CBOR has the same limit, so that events do not depend on the
/// codec.
pub(crate) const MAX_DEPTH: u16 = 127;

/// Maximum number of nested `Some` and newtypes around one value. They take stack, but no bytes.
const MAX_WRAPPERS: u16 = 256;

/// A value that fails to serialize if it is nested too deeply.
pub(super) struct Bounded<'a, T: ?Sized>(&'a T, Depth);

impl<'a, T: ?Sized> Bounded<'a, T> {
    pub(super) fn new(value: &'a T) -> Self {
        Self(value, Depth { containers: 0, wrappers: 0 })
    }
}

/// The nesting of a value.
#[derive(Clone, Copy)]
struct Depth {
    containers: u16,
    wrappers: u16,
}

impl Depth {
    /// Enters `levels` more arrays or maps.
    #[inline]
    fn container<E: Error>(mut self, levels: u16) -> Result<Self, E> {
        self.containers += levels;
        if self.containers > MAX_DEPTH { Err(too_deep()) } else { Ok(self) }
    }

    #[inline]
    fn wrapper<E: Error>(mut self) -> Result<Self, E> {
        self.wrappers += 1;
        if self.wrappers > MAX_WRAPPERS { Err(too_deep()) } else { Ok(self) }
    }
}

#[cold]
fn too_deep<E: Error>() -> E {
    E::custom(format_args!("nested too deeply (limit {MAX_DEPTH} levels of lists and maps)"))
}

impl<T: Serialize + ?Sized> Serialize for Bounded<'_, T> {
    #[inline]
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(Limiter { inner: serializer, depth: self.1 })
    }
}

/// A serializer, or a part of one, that counts the nesting.
struct Limiter<S> {
    inner: S,
    depth: Depth,
}

macro_rules! forward {
    ($($method:ident($type:ty);)*) => {
        $(#[inline]
        fn $method(self, value: $type) -> Result<S::Ok, S::Error> {
            self.inner.$method(value)
        })*
    };
}

impl<S: Serializer> Serializer for Limiter<S> {
    type Ok = S::Ok;
    type Error = S::Error;
    type SerializeSeq = Limiter<S::SerializeSeq>;
    type SerializeTuple = Limiter<S::SerializeTuple>;
    type SerializeTupleStruct = Limiter<S::SerializeTupleStruct>;
    type SerializeTupleVariant = Limiter<S::SerializeTupleVariant>;
    type SerializeMap = Limiter<S::SerializeMap>;
    type SerializeStruct = Limiter<S::SerializeStruct>;
    type SerializeStructVariant = Limiter<S::SerializeStructVariant>;

    forward! {
        serialize_bool(bool);
        serialize_i8(i8);
        serialize_i16(i16);
        serialize_i32(i32);
        serialize_i64(i64);
        serialize_i128(i128);
        serialize_u8(u8);
        serialize_u16(u16);
        serialize_u32(u32);
        serialize_u64(u64);
        serialize_u128(u128);
        serialize_f32(f32);
        serialize_f64(f64);
        serialize_char(char);
        serialize_str(&str);
        serialize_bytes(&[u8]);
        serialize_unit_struct(&'static str);
    }

    #[inline]
    fn serialize_none(self) -> Result<S::Ok, S::Error> {
        self.inner.serialize_none()
    }

    #[inline]
    fn serialize_unit(self) -> Result<S::Ok, S::Error> {
        self.inner.serialize_unit()
    }

    #[inline]
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.inner.serialize_some(&Bounded(value, self.depth.wrapper()?))
    }

    #[inline]
    fn serialize_unit_variant(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
    ) -> Result<S::Ok, S::Error> {
        self.inner.serialize_unit_variant(name, index, variant)
    }

    #[inline]
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        self.inner.serialize_newtype_struct(name, &Bounded(value, self.depth.wrapper()?))
    }

    #[inline]
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        let value = Bounded(value, self.depth.container(1)?);
        self.inner.serialize_newtype_variant(name, index, variant, &value)
    }

    #[inline]
    fn serialize_seq(self, length: Option<usize>) -> Result<Self::SerializeSeq, S::Error> {
        let depth = self.depth.container(1)?;
        Ok(Limiter { inner: self.inner.serialize_seq(length)?, depth })
    }

    #[inline]
    fn serialize_tuple(self, length: usize) -> Result<Self::SerializeTuple, S::Error> {
        let depth = self.depth.container(1)?;
        Ok(Limiter { inner: self.inner.serialize_tuple(length)?, depth })
    }

    #[inline]
    fn serialize_tuple_struct(
        self,
        name: &'static str,
        length: usize,
    ) -> Result<Self::SerializeTupleStruct, S::Error> {
        let depth = self.depth.container(1)?;
        Ok(Limiter { inner: self.inner.serialize_tuple_struct(name, length)?, depth })
    }

    #[inline]
    fn serialize_tuple_variant(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        length: usize,
    ) -> Result<Self::SerializeTupleVariant, S::Error> {
        // Counts the map that names the variant, and the list in it.
        let depth = self.depth.container(2)?;
        Ok(Limiter { inner: self.inner.serialize_tuple_variant(name, index, variant, length)?, depth })
    }

    #[inline]
    fn serialize_map(self, length: Option<usize>) -> Result<Self::SerializeMap, S::Error> {
        let depth = self.depth.container(1)?;
        Ok(Limiter { inner: self.inner.serialize_map(length)?, depth })
    }

    #[inline]
    fn serialize_struct(self, name: &'static str, length: usize) -> Result<Self::SerializeStruct, S::Error> {
        let depth = self.depth.container(1)?;
        Ok(Limiter { inner: self.inner.serialize_struct(name, length)?, depth })
    }

    #[inline]
    fn serialize_struct_variant(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        length: usize,
    ) -> Result<Self::SerializeStructVariant, S::Error> {
        let depth = self.depth.container(2)?;
        Ok(Limiter { inner: self.inner.serialize_struct_variant(name, index, variant, length)?, depth })
    }

    #[inline]
    fn collect_str<T: Display + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.inner.collect_str(value)
    }

    #[inline]
    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

macro_rules! elements {
    ($($trait:ident::$method:ident;)*) => {
        $(impl<S: $trait> $trait for Limiter<S> {
            type Ok = S::Ok;
            type Error = S::Error;

            #[inline]
            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), S::Error> {
                self.inner.$method(&Bounded(value, self.depth))
            }

            #[inline]
            fn end(self) -> Result<S::Ok, S::Error> {
                self.inner.end()
            }
        })*
    };
}

macro_rules! fields {
    ($($trait:ident;)*) => {
        $(impl<S: $trait> $trait for Limiter<S> {
            type Ok = S::Ok;
            type Error = S::Error;

            #[inline]
            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                key: &'static str,
                value: &T,
            ) -> Result<(), S::Error> {
                self.inner.serialize_field(key, &Bounded(value, self.depth))
            }

            #[inline]
            fn skip_field(&mut self, key: &'static str) -> Result<(), S::Error> {
                self.inner.skip_field(key)
            }

            #[inline]
            fn end(self) -> Result<S::Ok, S::Error> {
                self.inner.end()
            }
        })*
    };
}

elements! {
    SerializeSeq::serialize_element;
    SerializeTuple::serialize_element;
    SerializeTupleStruct::serialize_field;
    SerializeTupleVariant::serialize_field;
}

fields! {
    SerializeStruct;
    SerializeStructVariant;
}

impl<S: SerializeMap> SerializeMap for Limiter<S> {
    type Ok = S::Ok;
    type Error = S::Error;

    #[inline]
    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), S::Error> {
        self.inner.serialize_key(&Bounded(key, self.depth))
    }

    #[inline]
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), S::Error> {
        self.inner.serialize_value(&Bounded(value, self.depth))
    }

    #[inline]
    fn serialize_entry<K: Serialize + ?Sized, V: Serialize + ?Sized>(
        &mut self,
        key: &K,
        value: &V,
    ) -> Result<(), S::Error> {
        self.inner.serialize_entry(&Bounded(key, self.depth), &Bounded(value, self.depth))
    }

    #[inline]
    fn end(self) -> Result<S::Ok, S::Error> {
        self.inner.end()
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use crate::codec::{fingerprint, to_cbor};

    #[derive(Serialize)]
    struct Node(Option<Box<Node>>);

    #[derive(Serialize)]
    struct Nested {
        next: Option<Box<Nested>>,
    }

    /// Covers commands, replies, snapshots and records as well as events.
    #[test]
    fn no_value_overflows_the_stack() {
        let node = |depth| (0..depth).fold(Node(None), |next, _| Node(Some(Box::new(next))));
        let nested =
            |depth| (1..depth).fold(Nested { next: None }, |next, _| Nested { next: Some(Box::new(next)) });
        assert!(to_cbor(&node(127)).is_ok() && fingerprint(&node(127)).is_ok());
        assert!(to_cbor(&node(5_000)).is_err() && fingerprint(&node(5_000)).is_err());
        assert!(to_cbor(&nested(127)).is_ok() && fingerprint(&nested(127)).is_ok());
        for depth in [128, 5_000] {
            let error = to_cbor(&nested(depth)).unwrap_err();
            assert_eq!(error.reason, "nested too deeply (limit 127 levels of lists and maps)");
            assert!(fingerprint(&nested(depth)).is_err());
        }
    }
}
