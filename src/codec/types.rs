//! What storied knows about a user's event enum: which names it reads, which of them mean the same variant.

use std::any::{TypeId, type_name};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use bytes::Bytes;
use serde::de::{self, DeserializeSeed, EnumAccess, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use super::upcast::Upcasters;
use super::{Codec, DecodeError, DecodeErrorKind, EncodeError};
use crate::event::{Category, Event, EventName, RecordedEvent};

/// A variant without fields, in the map form that every variant is stored in.
const CBOR_NULL: u8 = 0xf6;
/// A map of one entry: serde's externally tagged form in CBOR.
const CBOR_MAP_OF_ONE: u8 = 0xa1;

/// Everything about one event enum that does not change while the program runs.
pub(crate) struct EventTypes {
    category: Category,
    /// Variant (or alias, or upcast old name) as serde says it → full name. Saves building a string per event.
    names: HashMap<String, EventName>,
    /// The names under which one variant's events may be stored, per variant.
    groups: Vec<BTreeSet<EventName>>,
    upcasters: Upcasters,
}

/// Types never change, so what was derived from one is kept for good; there are as many entries as event enums.
static TYPES: LazyLock<RwLock<HashMap<TypeId, Arc<EventTypes>>>> = LazyLock::new(RwLock::default);

impl EventTypes {
    /// What is known of `E`, looked up or derived.
    pub(crate) fn of<E: Event>() -> Result<Arc<Self>, EncodeError> {
        if let Some(types) = TYPES.read().unwrap_or_else(PoisonError::into_inner).get(&TypeId::of::<E>()) {
            return Ok(types.clone());
        }
        let types = Arc::new(Self::derive::<E>()?);
        TYPES.write().unwrap_or_else(PoisonError::into_inner).insert(TypeId::of::<E>(), types.clone());
        Ok(types)
    }

    fn derive<E: Event>() -> Result<Self, EncodeError> {
        let category = Category::new(E::CATEGORY)?;
        let variants = variants_of::<E>()?;
        let upcasters = E::upcasters();
        let mut names = HashMap::new();
        let full = |variant: &str| EventName::new(format!("{category}.{variant}"));
        let mut groups: Vec<(u64, BTreeSet<EventName>)> = Vec::new();
        for (variant, identity) in &variants {
            let name = full(variant)?;
            names.insert(variant.clone(), name.clone());
            match groups.iter_mut().find(|(other, _)| other == identity) {
                Some((_, group)) => _ = group.insert(name),
                None => groups.push((*identity, BTreeSet::from([name]))),
            }
        }
        let mut groups: Vec<_> = groups.into_iter().map(|(_, group)| group).collect();
        for old in upcasters.old_names() {
            // A chain that ends in no variant is an old event that nobody reads; decoding it says so.
            let today = upcasters.today(old);
            if let Some(group) = names
                .get(today)
                .cloned()
                .and_then(|today| groups.iter_mut().find(|group| group.contains(&today)))
            {
                let old_name = full(old)?;
                group.insert(old_name.clone());
                names.insert(old.to_owned(), old_name);
            }
        }
        Ok(Self { category, names, groups, upcasters })
    }

    pub(crate) fn category(&self) -> &Category {
        &self.category
    }

    /// All the names under which `variant`'s events may be stored: its own, its aliases, what is upcast to it.
    pub(crate) fn stored_names(&self, variant: &str) -> Option<&BTreeSet<EventName>> {
        let name = self.names.get(variant)?;
        self.groups.iter().find(|group| group.contains(name))
    }

    /// The name and payload of an event.
    pub(crate) fn encode<E: Event>(
        &self,
        event: &E,
        codec: Codec,
    ) -> Result<(EventName, Bytes), EncodeError> {
        let (variant, payload) = match codec {
            Codec::Cbor => split_cbor(super::to_cbor(event)?),
            Codec::Json => split_json(serde_json::to_vec(event).map_err(|error| EncodeError::Serialize {
                type_name: type_name::<E>(),
                reason: error.to_string(),
            })?),
        }
        .ok_or_else(|| EncodeError::NoEnum {
            type_name: type_name::<E>(),
            reason: "it serializes to something else than a variant".into(),
        })?;
        let name = match self.names.get(variant.as_ref() as &str) {
            Some(name) => name.clone(),
            // A variant that is only written (`rename(serialize = …)`) is no name that could be read back.
            None => {
                return Err(EncodeError::NoEnum {
                    type_name: type_name::<E>(),
                    reason: format!(
                        "it writes a variant {:?} that it does not read",
                        variant.as_ref() as &str
                    ),
                });
            }
        };
        Ok((name, payload))
    }

    /// The event as `E`, after upcasting.
    pub(crate) fn decode<E: Event>(&self, event: &RecordedEvent) -> Result<E, DecodeError> {
        let Some(variant) = event
            .name
            .as_str()
            .strip_prefix(self.category.as_str())
            .and_then(|rest| rest.strip_prefix('.'))
            .filter(|_| event.stream.category() == self.category.as_str())
        else {
            return Err(DecodeError::new(event, DecodeErrorKind::OtherCategory { expected: E::CATEGORY }));
        };
        if self.upcasters.concern(variant) {
            return self.decode_upcast(event, variant);
        }
        if !self.names.contains_key(variant) {
            return Err(DecodeError::new(event, DecodeErrorKind::UnknownName));
        }
        decode_variant(variant, &event.payload, event.codec)
            .map_err(|reason| DecodeError::payload(event, reason))
    }

    #[cold]
    fn decode_upcast<E: Event>(&self, event: &RecordedEvent, variant: &str) -> Result<E, DecodeError> {
        let value: ciborium::Value = match event.codec {
            Codec::Cbor => super::from_cbor(&event.payload),
            Codec::Json => serde_json::from_slice(&event.payload).map_err(|error| error.to_string()),
        }
        .map_err(|reason| DecodeError::payload(event, reason))?;
        let (variant, value) = self
            .upcasters
            .apply(variant, value)
            .map_err(|reason| DecodeError::new(event, DecodeErrorKind::Upcast(reason)))?;
        if !self.names.contains_key(variant) {
            return Err(DecodeError::new(event, DecodeErrorKind::UnknownName));
        }
        let payload =
            super::to_cbor(&value).map_err(|error| DecodeError::payload(event, error.to_string()))?;
        decode_variant(variant, &payload, Codec::Cbor).map_err(|reason| DecodeError::payload(event, reason))
    }
}

impl fmt::Debug for EventTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventTypes").field("category", &self.category).field("groups", &self.groups).finish()
    }
}

/// The variant's name inside an encoded event.
enum Variant {
    /// At most this many bytes stay where they are: the common case allocates nothing.
    Short([u8; 64], usize),
    Long(String),
}

impl Variant {
    fn new(name: &str) -> Self {
        let mut short = [0; 64];
        match short.get_mut(..name.len()) {
            Some(place) => {
                place.copy_from_slice(name.as_bytes());
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

/// `{name: payload}` or `name`, as serde writes a variant, into its two parts.
fn split_cbor(bytes: Vec<u8>) -> Option<(Variant, Bytes)> {
    let (tagged, text) = match bytes.split_first()? {
        (&CBOR_MAP_OF_ONE, rest) => (true, rest),
        _ => (false, &bytes[..]),
    };
    // Text of up to 23 bytes has its length in the first byte, of up to 255 in the second.
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
    // Names have no characters that JSON escapes; whatever has is no name and fails the look-up.
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

/// Puts name and payload together again, in serde's own form, and reads that.
fn decode_variant<E: Event>(variant: &str, payload: &[u8], codec: Codec) -> Result<E, String> {
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
            ciborium::from_reader(&whole[..]).map_err(|error| error.to_string())
        }
        Codec::Json => {
            whole.extend(b"{\"");
            whole.extend(variant.as_bytes());
            whole.extend(b"\":");
            whole.extend(payload);
            whole.push(b'}');
            serde_json::from_slice(&whole).map_err(|error| error.to_string())
        }
    }
}

/// The names that `E` reads, each with something that is equal for names of the same variant.
///
/// serde tells a deserializer the names (aliases included), and turns each into a value of a private enum, one for each
/// variant. Its discriminant is all that is needed to see which names belong together: no derive macro of ours.
fn variants_of<E: Event>() -> Result<Vec<(String, u64)>, EncodeError> {
    let no_enum = |reason| EncodeError::NoEnum { type_name: type_name::<E>(), reason };
    let names = match E::deserialize(Probe::Names) {
        Err(Found::Names(names)) => names,
        Err(found) => return Err(no_enum(found.to_string())),
        Ok(_) => return Err(no_enum("it deserializes from nothing".into())),
    };
    names
        .iter()
        .map(|&name| match E::deserialize(Probe::Identity(name)) {
            Err(Found::Identity(identity)) => Ok((name.to_owned(), identity)),
            Err(found) => Err(no_enum(found.to_string())),
            Ok(_) => Err(no_enum("it deserializes from nothing".into())),
        })
        .collect()
}

/// A deserializer that only finds out what it is asked for; it answers through its error.
enum Probe {
    Names,
    Identity(&'static str),
}

#[derive(Debug)]
enum Found {
    Names(&'static [&'static str]),
    Identity(u64),
    Other(String),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Other(what) => f.write_str(what),
            Found::Names(_) | Found::Identity(_) => f.write_str("it asks for an enum within an enum"),
        }
    }
}

impl std::error::Error for Found {}

impl de::Error for Found {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Found::Other(message.to_string())
    }
}

impl<'de> de::Deserializer<'de> for Probe {
    type Error = Found;

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Found> {
        match self {
            Probe::Names => Err(Found::Names(variants)),
            Probe::Identity(_) => visitor.visit_enum(self),
        }
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Found> {
        Err(Found::Other("it is not read as an enum".into()))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> EnumAccess<'de> for Probe {
    type Error = Found;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Found> {
        let Probe::Identity(name) = self else {
            return Err(Found::Other("it is not read as an enum".into()));
        };
        let variant = seed.deserialize(IntoDeserializer::<Found>::into_deserializer(name))?;
        let mut hasher = DefaultHasher::new();
        std::mem::discriminant(&variant).hash(&mut hasher);
        Err(Found::Identity(hasher.finish()))
    }
}

impl<'de> de::VariantAccess<'de> for Probe {
    type Error = Found;

    fn unit_variant(self) -> Result<(), Found> {
        Err(Found::Other("it has content without a name".into()))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _seed: T) -> Result<T::Value, Found> {
        Err(Found::Other("it has content without a name".into()))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, Found> {
        Err(Found::Other("it has content without a name".into()))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Found> {
        Err(Found::Other("it has content without a name".into()))
    }
}
