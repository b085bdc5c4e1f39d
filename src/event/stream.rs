use std::fmt;
use std::sync::Arc;

use super::name::{Category, InvalidName};

/// Maximum length of a stream id in bytes.
const MAX_ID: usize = 400;

/// The stream of one aggregate: its category and its id. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
