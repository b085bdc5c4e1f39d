use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};

use super::name::{Category, InvalidName};

/// Maximum length of a stream id in bytes.
const MAX_ID: usize = 400;

/// The stream of one aggregate: its category and its id. Cheap to clone.
///
/// Serializes as its text, `category/id`; deserializing checks it. A category has no slash, so the
/// first slash ends it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct StreamId {
    category: Category,
    id: Arc<str>,
}

/// An invalid id or category of a stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidStream {
    /// The category is no valid name.
    #[error(transparent)]
    Category(#[from] InvalidName),
    /// The text of a stream has no slash.
    #[error("invalid stream {text:?}: no '/' after the category; use a form like order/17")]
    NoSlash {
        /// The first 80 characters of the text.
        text: String,
    },
    /// The id is empty.
    #[error("empty aggregate id; use 1 to 400 bytes of text")]
    EmptyId,
    /// The id is too long.
    #[error("aggregate id too long: {length} bytes (limit 400); use a shorter id")]
    LongId {
        /// Length of the id in bytes.
        length: usize,
    },
    /// The id has a control character: PostgreSQL cannot store NUL, and the others are unreadable.
    #[error("invalid aggregate id: control character at byte {at}; use printable text")]
    ControlCharacter {
        /// Offset in bytes.
        at: usize,
    },
}

impl StreamId {
    /// Checks and joins a category and an id.
    ///
    /// # Errors
    /// If the category is no valid name, or the id is empty, longer than 400 bytes or has control
    /// characters.
    pub fn new(category: impl AsRef<str>, id: impl fmt::Display) -> Result<Self, InvalidStream> {
        Self::of(&Category::new(category)?, id)
    }

    /// As [`new`](Self::new), with a category that is already checked.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of(category: &Category, id: impl fmt::Display) -> Result<Self, InvalidStream> {
        let id = id.to_string();
        if id.is_empty() {
            return Err(InvalidStream::EmptyId);
        }
        if id.len() > MAX_ID {
            return Err(InvalidStream::LongId { length: id.len() });
        }
        if let Some((at, _)) = id.char_indices().find(|(_, c)| c.is_control()) {
            return Err(InvalidStream::ControlCharacter { at });
        }
        Ok(Self { category: category.clone(), id: id.into() })
    }

    /// Returns a stream for data of the runtime, in a category that no user can have.
    pub(crate) fn reserved(category: &'static str, id: &str) -> Result<Self, InvalidStream> {
        Self::of(&Category::reserved(category), id)
    }

    /// Rebuilds a stored id that [`new`](Self::new) has checked before.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn stored(category: Category, id: Arc<str>) -> Self {
        Self { category, id }
    }

    /// Returns the category.
    pub fn category(&self) -> &str {
        self.category.as_str()
    }

    /// Returns the id within the category.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.category, self.id)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for StreamId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl TryFrom<String> for StreamId {
    type Error = InvalidStream;

    fn try_from(text: String) -> Result<Self, InvalidStream> {
        let Some((category, id)) = text.split_once('/') else {
            return Err(InvalidStream::NoSlash { text: text.chars().take(80).collect() });
        };
        Self::new(category, id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_text_in_json_and_checked() {
        for (category, id) in [("order", "17"), ("shop.order", "a/b//c/"), ("order", " é\"/")] {
            let stream = StreamId::new(category, id).unwrap();
            let json = serde_json::to_string(&stream).unwrap();
            assert_eq!(json, serde_json::to_string(&format!("{category}/{id}")).unwrap());
            assert_eq!(serde_json::from_str::<StreamId>(&json).unwrap(), stream);
        }
        for json in
            ["\"\"", "\"order\"", "\"order/\"", "\"/17\"", "\"a b/17\"", "\"order/\\u0000\"", "17", "null"]
        {
            assert!(serde_json::from_str::<StreamId>(json).is_err(), "{json}");
        }
        let long = StreamId::try_from(format!("order/{}", "x".repeat(401)));
        assert_eq!(long, Err(InvalidStream::LongId { length: 401 }));
    }
}
