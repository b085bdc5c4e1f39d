//! Names and variants of an event enum. Several names may share a variant.

use std::any::{TypeId, type_name};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use bytes::Bytes;

use super::Event;
use super::error::{DecodeError, DecodeErrorKind, EncodeError};
use super::name::{Category, EventName};
use super::recorded::RecordedEvent;
use crate::codec::{
    Codec, Upcasters, decode_value, decode_variant, encode_value, encode_variant, failing_field, variants_of,
};

/// The remedy if serde writes a value that it does not read.
const REMEDY: &str = "change the type (no flatten over maps with foreign keys, default beside skip_serializing_if, a string for large numbers), or reject such values in handle";

/// The properties of one event enum; constant while the program runs.
pub(crate) struct EventTypes {
    category: Category,
    /// Full name of each variant, alias and upcast old name; saves building a string per event.
    names: HashMap<String, EventName>,
    /// The stored names of each variant.
    groups: Vec<BTreeSet<EventName>>,
    upcasters: Upcasters,
}

/// Cache of the derived types, with one entry per event enum.
///
/// Never evicted, because types never change.
static TYPES: LazyLock<RwLock<HashMap<TypeId, Arc<EventTypes>>>> = LazyLock::new(RwLock::default);

impl EventTypes {
    /// Returns the properties of `E` from the cache, or derives them.
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
        let variants = variants_of::<E>()
            .map_err(|reason| EncodeError::NoEnum { type_name: type_name::<E>(), reason })?;
        let upcasters = E::upcasters();
        let is_read = |name: &str| variants.iter().any(|(variant, _)| variant == name);
        if let Some(reason) = upcasters.problem(is_read) {
            return Err(EncodeError::Upcasters { category: E::CATEGORY, reason });
        }
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
            // A chain that ends in no variant is an old event without a reader; decoding it reports
            // that.
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

    /// Returns all stored names of `variant`: its name, its aliases and the names upcast to it.
    pub(crate) fn stored_names(&self, variant: &str) -> Option<&BTreeSet<EventName>> {
        let name = self.names.get(variant)?;
        self.groups.iter().find(|group| group.contains(name))
    }

    /// Returns all names of variants that the enum reads: names, aliases and upcast old names.
    pub(crate) fn known_names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Returns the name and payload of an event, and the event as readers decode it.
    ///
    /// Only reading the payload back finds all values that serde writes and does not read. Some
    /// depend on the value and not on the type: a key of a flattened map that equals a field name,
    /// or a float that is not a number.
    pub(crate) fn encode<E: Event>(
        &self,
        event: &E,
        codec: Codec,
    ) -> Result<(EventName, Bytes, E), EncodeError> {
        let no_enum = |reason| EncodeError::NoEnum { type_name: type_name::<E>(), reason };
        let (variant, payload) = encode_variant(event, codec)?
            .ok_or_else(|| no_enum("the value does not serialize to a variant".into()))?;
        // A name that is only written (`rename(serialize = …)`) cannot be read back.
        let variant: &str = variant.as_ref();
        let name = self.names.get(variant);
        let name =
            name.ok_or_else(|| no_enum(format!("the type writes variant {variant:?} but does not read it")))?;
        let read = decode_variant(variant, &payload, codec).map_err(|reason| EncodeError::NotReadable {
            what: name.to_string(),
            field: failing_field::<E>(variant, &payload, codec),
            reason,
            remedy: REMEDY,
        })?;
        Ok((name.clone(), payload, read))
    }

    /// Decodes the event as `E`, after upcasting.
    pub(crate) fn decode<E: Event>(&self, event: &RecordedEvent) -> Result<E, DecodeError> {
        let Some(variant) = event
            .name
            .as_str()
            .strip_prefix(self.category.as_str())
            .and_then(|rest| rest.strip_prefix('.'))
            .filter(|_| event.stream.category() == self.category.as_str())
        else {
            return Err(DecodeError::new(
                event,
                DecodeErrorKind::OtherCategory { expected: vec![E::CATEGORY] },
            ));
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
        let value = decode_value(&event.payload, event.codec)
            .map_err(|reason| DecodeError::payload(event, reason))?;
        let (variant, value) = self
            .upcasters
            .apply(variant, value)
            .map_err(|reason| DecodeError::new(event, DecodeErrorKind::Upcast(reason)))?;
        if !self.names.contains_key(variant) {
            return Err(DecodeError::new(event, DecodeErrorKind::UnknownName));
        }
        let payload =
            encode_value(&value, event.codec).map_err(|reason| DecodeError::payload(event, reason))?;
        decode_variant(variant, &payload, event.codec).map_err(|reason| DecodeError::payload(event, reason))
    }
}

impl fmt::Debug for EventTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventTypes").field("category", &self.category).field("groups", &self.groups).finish()
    }
}
