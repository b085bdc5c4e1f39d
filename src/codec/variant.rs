//! Variants of a serde enum: splitting into name and payload, joining, and listing the names.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::marker::PhantomData;

use bytes::Bytes;
use serde::de::{self, DeserializeOwned, DeserializeSeed, EnumAccess, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;
use serde::{Deserialize, Serialize};

use super::Codec;
use super::cbor::{SerializeError, deserialize, read_cbor, serialize, to_cbor};
use super::depth::Bounded;

/// The payload of a variant without fields, in the map form of stored variants.
const CBOR_NULL: u8 = 0xf6;
/// A map of one entry: the externally tagged form of serde in CBOR.
const CBOR_MAP_OF_ONE: u8 = 0xa1;

/// Returns the name and the payload of a variant; `None` if the value does not serialize as one.
pub(crate) fn encode_variant<E: Serialize>(
    event: &E,
    codec: Codec,
) -> Result<Option<(Variant, Bytes)>, SerializeError> {
    Ok(match codec {
        Codec::Cbor => split_cbor(to_cbor(event)?),
        Codec::Json => split_json(serialize::<E, _, _>(
            || serde_json::to_vec(&Bounded::new(event)),
            |error| error.to_string(),
        )?),
    })
}

/// The name of the variant inside an encoded event.
pub(crate) enum Variant {
    /// An inline copy of a name of at most 64 bytes, so that the common case does not allocate.
    Short([u8; 64], usize),
    Long(String),
}

impl Variant {
    fn new(name: &str) -> Self {
        let mut short = [0; 64];
        match short.get_mut(..name.len()) {
            Some(slot) => {
                slot.copy_from_slice(name.as_bytes());
                Variant::Short(short, name.len())
            }
            None => Variant::Long(name.to_owned()),
        }
    }
}

impl AsRef<str> for Variant {
    fn as_ref(&self) -> &str {
        match self {
            Variant::Short(bytes, length) => std::str::from_utf8(&bytes[..*length]).unwrap_or_default(),
            Variant::Long(name) => name,
        }
    }
}

/// Splits `{name: payload}` or `name`, as serde writes a variant.
fn split_cbor(bytes: Vec<u8>) -> Option<(Variant, Bytes)> {
    let (tagged, text) = match bytes.split_first()? {
        (&CBOR_MAP_OF_ONE, rest) => (true, rest),
        _ => (false, &bytes[..]),
    };
    // Text of up to 23 bytes has its length in the first byte, text of up to 255 bytes in the
    // second.
    let (start, length) = match *text.first()? {
        head @ 0x60..=0x77 => (1, usize::from(head - 0x60)),
        0x78 => (2, usize::from(*text.get(1)?)),
        _ => return None,
    };
    let name = Variant::new(std::str::from_utf8(text.get(start..start + length)?).ok()?);
    let payload_at = usize::from(tagged) + start + length;
    match (tagged, payload_at == bytes.len()) {
        (true, false) => Some((name, Bytes::from(bytes).slice(payload_at..))),
        (false, true) => Some((name, Bytes::from_static(&[CBOR_NULL]))),
        _ => None,
    }
}

fn split_json(bytes: Vec<u8>) -> Option<(Variant, Bytes)> {
    let text = std::str::from_utf8(&bytes).ok()?;
    // Names have no characters that JSON escapes. Text with an escape is no name, and the lookup
    // fails.
    if let Some(rest) = text.strip_prefix("{\"") {
        let (name, payload) = rest.split_once("\":")?;
        let name = Variant::new(name);
        let start = text.len() - payload.len();
        let end = text.len() - 1;
        Some((name, Bytes::from(bytes).slice(start..end)))
    } else {
        let name = Variant::new(text.strip_prefix('"')?.strip_suffix('"')?);
        Some((name, Bytes::from_static(b"null")))
    }
}

/// Joins name and payload in the form of serde, and decodes the result.
///
/// A variant may gain its first fields or lose its last. A missing payload then reads as no fields,
/// and empty fields read as a missing payload.
pub(crate) fn decode_variant<E: DeserializeOwned>(
    variant: &str,
    payload: &[u8],
    codec: Codec,
) -> Result<E, String> {
    let error = match read_whole(&join(variant, payload, codec)?, codec) {
        Ok(event) => return Ok(event),
        Err(error) => error,
    };
    match other_empty_form::<E>(variant, payload, codec) {
        Some(other) => read_whole(&join(variant, other, codec)?, codec),
        None => Err(error),
    }
}

/// Returns `{name: payload}`.
fn join(variant: &str, payload: &[u8], codec: Codec) -> Result<Vec<u8>, String> {
    let mut whole = Vec::with_capacity(variant.len() + payload.len() + 8);
    match codec {
        Codec::Cbor => {
            whole.push(CBOR_MAP_OF_ONE);
            match u8::try_from(variant.len()).map_err(|_| "the name is too long".to_owned())? {
                length @ 0..=23 => whole.push(0x60 + length),
                length => whole.extend([0x78, length]),
            }
            whole.extend(variant.as_bytes());
            whole.extend(payload);
        }
        Codec::Json => {
            whole.extend(b"{\"");
            whole.extend(variant.as_bytes());
            whole.extend(b"\":");
            whole.extend(payload);
            whole.push(b'}');
        }
    }
    Ok(whole)
}

fn read_whole<E: DeserializeOwned>(whole: &[u8], codec: Codec) -> Result<E, String> {
    match codec {
        Codec::Cbor => match read_cbor(whole)? {
            // The decoder does not read the null of a variant without fields.
            (event, [] | [CBOR_NULL]) => Ok(event),
            (_, rest) => Err(format!("{} trailing bytes", rest.len())),
        },
        Codec::Json => deserialize(|| serde_json::from_slice(whole).map_err(|error| error.to_string())),
    }
}

/// Returns the other form of a payload without content, as the current variant writes it.
#[cold]
fn other_empty_form<E: DeserializeOwned>(
    variant: &str,
    payload: &[u8],
    codec: Codec,
) -> Option<&'static [u8]> {
    const CBOR_NO_FIELDS: &[u8] = &[0xa0];
    let (null, no_fields): (&[u8], &[u8]) = match codec {
        Codec::Cbor => (&[CBOR_NULL], CBOR_NO_FIELDS),
        Codec::Json => (b"null", b"{}"),
    };
    if payload != null && payload != no_fields {
        return None;
    }
    match E::deserialize(Probe::Shape(variant)) {
        Err(Found::Shape(Shape::Unit)) if payload == no_fields => Some(null),
        Err(Found::Shape(Shape::Struct)) if payload == null => Some(no_fields),
        _ => None,
    }
}

/// Maximum length of the path in an error, in characters.
const MAX_PATH: usize = 100;

/// Returns the path at which a decoder stops, as far as serde reports it.
#[cold]
pub(crate) fn failing_field<E: DeserializeOwned>(variant: &str, payload: &[u8], codec: Codec) -> String {
    let whole = join(variant, payload, codec).unwrap_or_default();
    let stop = deserialize::<Option<Stop<E>>>(|| {
        Ok(match codec {
            Codec::Cbor => ciborium::from_reader(whole.as_slice()).ok(),
            Codec::Json => Stop::deserialize(&mut serde_json::Deserializer::from_slice(&whole)).ok(),
        })
    });
    let stop = stop.ok().flatten();
    let path = stop.and_then(|stop| stop.path);
    let path = path.as_deref().and_then(|path| path.strip_prefix(variant)).unwrap_or_default();
    match path.trim_start_matches('.') {
        "" | "?" => "its content".into(),
        // Deep nesting has a long path.
        path => path.chars().take(MAX_PATH).collect(),
    }
}

/// Reads an `E` to find where decoding stops, and drops the value.
struct Stop<E> {
    path: Option<String>,
    event: PhantomData<E>,
}

impl<'de, E: Deserialize<'de>> Deserialize<'de> for Stop<E> {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut track = serde_path_to_error::Track::new();
        let read = E::deserialize(serde_path_to_error::Deserializer::new(deserializer, &mut track));
        let path = read.err().map(|_| track.path().to_string());
        Ok(Self { path, event: PhantomData })
    }
}

/// Returns the names that `E` reads, each with an identity that names of the same variant share.
///
/// serde passes the names to a deserializer, aliases included. It converts each name to a value of
/// a private enum with one value per variant. The discriminant of that value shows which names
/// belong together, so that no derive macro is needed.
pub(crate) fn variants_of<E: DeserializeOwned>() -> Result<Vec<(String, u64)>, String> {
    if let Err(Found::Identity(_)) = E::deserialize(Probe::Identity("no variant has this name")) {
        return Err("a variant with #[serde(other)] would replace unknown events; \
            remove that variant, and let projections ignore unknown names with UnknownNames"
            .into());
    }
    let names = match E::deserialize(Probe::Names) {
        Err(Found::Names(names)) => names,
        Err(found) => return Err(found.to_string()),
        Ok(_) => return Err("the type deserializes from nothing".into()),
    };
    names
        .iter()
        .map(|&name| match E::deserialize(Probe::Identity(name)) {
            Err(Found::Identity(identity)) => Ok((name.to_owned(), identity)),
            Err(found) => Err(found.to_string()),
            Ok(_) => Err("the type deserializes from nothing".into()),
        })
        .collect()
}

/// A deserializer that records the request of the type, and returns it as its error.
enum Probe<'n> {
    Names,
    Identity(&'n str),
    Shape(&'n str),
}

#[derive(Debug)]
enum Found {
    Names(&'static [&'static str]),
    Identity(u64),
    Shape(Shape),
    Other(String),
}

/// The declared form of a variant.
#[derive(Debug)]
enum Shape {
    Unit,
    Newtype,
    Tuple,
    Struct,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Other(what) => f.write_str(what),
            Found::Names(_) | Found::Identity(_) | Found::Shape(_) => {
                f.write_str("the type asks for an enum within an enum")
            }
        }
    }
}

impl std::error::Error for Found {}

impl de::Error for Found {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Found::Other(message.to_string())
    }
}

impl<'de> de::Deserializer<'de> for Probe<'_> {
    type Error = Found;

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Found> {
        match self {
            Probe::Names => Err(Found::Names(variants)),
            Probe::Identity(_) | Probe::Shape(_) => visitor.visit_enum(self),
        }
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Found> {
        Err(Found::Other("the type is not deserialized as an enum".into()))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> EnumAccess<'de> for Probe<'_> {
    type Error = Found;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Found> {
        let name = match self {
            Probe::Identity(name) | Probe::Shape(name) => name,
            Probe::Names => return Err(Found::Other("the type is not deserialized as an enum".into())),
        };
        let variant = seed.deserialize(IntoDeserializer::<Found>::into_deserializer(name))?;
        if let Probe::Shape(_) = self {
            return Ok((variant, self));
        }
        let mut hasher = DefaultHasher::new();
        std::mem::discriminant(&variant).hash(&mut hasher);
        Err(Found::Identity(hasher.finish()))
    }
}

impl<'de> de::VariantAccess<'de> for Probe<'_> {
    type Error = Found;

    fn unit_variant(self) -> Result<(), Found> {
        Err(Found::Shape(Shape::Unit))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _seed: T) -> Result<T::Value, Found> {
        Err(Found::Shape(Shape::Newtype))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, Found> {
        Err(Found::Shape(Shape::Tuple))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Found> {
        Err(Found::Shape(Shape::Struct))
    }
}
