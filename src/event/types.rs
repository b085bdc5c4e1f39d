//! What storied knows about a user's event enum: which names it reads, which of them mean the same variant.

use std::any::{TypeId, type_name};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use bytes::Bytes;

use super::{Category, DecodeError, DecodeErrorKind, EncodeError, Event, EventName, RecordedEvent};
use crate::codec::{
    Codec, Upcasters, decode_value, decode_variant, encode_value, encode_variant, failing_field, variants_of,
};

/// What helps where serde writes what it does not read.
const REMEDY: &str = "change the type (no flatten over maps with foreign keys, default beside skip_serializing_if, a string for large numbers), or refuse such values in handle";

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

    /// The name and payload of an event, and the event as readers will have it.
    ///
    /// Reading it back is the only test that cannot miss data that serde writes and does not read: whether a flattened map has a
    /// field's own name, or a float is not a number, depends on the value and not on the type.
    pub(crate) fn encode<E: Event>(
        &self,
        event: &E,
        codec: Codec,
    ) -> Result<(EventName, Bytes, E), EncodeError> {
        let no_enum = |reason| EncodeError::NoEnum { type_name: type_name::<E>(), reason };
        let (variant, payload) = encode_variant(event, codec)?
            .ok_or_else(|| no_enum("it serializes to something else than a variant".into()))?;
        // A variant that is only written (`rename(serialize = …)`) is no name that could be read back.
        let variant: &str = variant.as_ref();
        let name = self.names.get(variant);
        let name =
            name.ok_or_else(|| no_enum(format!("it writes a variant {variant:?} that it does not read")))?;
        let read = decode_variant(variant, &payload, codec).map_err(|reason| EncodeError::NotReadable {
            what: name.to_string(),
            field: failing_field::<E>(variant, &payload, codec),
            reason,
            remedy: REMEDY,
        })?;
        Ok((name.clone(), payload, read))
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
