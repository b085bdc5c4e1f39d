use std::fmt;
use std::sync::Arc;

use super::name::{Category, InvalidName};

/// The longest id of a stream, in bytes.
const MAX_ID: usize = 400;

/// The stream of one aggregate instance: its category and its id. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId {
    category: Category,
    id: Arc<str>,
}

/// An id or a category that no stream can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidStream {
    /// The category is no valid name.
    #[error(transparent)]
    Category(#[from] InvalidName),
    /// The id is empty.
    #[error("the id of an aggregate is empty; give it 1 to 400 bytes of text")]
    EmptyId,
    /// The id is too long.
    #[error("the id of an aggregate has {length} bytes; at most 400 fit an index on every store")]
    LongId {
        /// How long it was, in bytes.
        length: usize,
    },
    /// The id has a control character; PostgreSQL cannot store NUL and no person can read the others.
    #[error("the id of an aggregate has a control character at byte {at}; use printable text")]
    ControlCharacter {
        /// Where, in bytes.
        at: usize,
    },
}

impl StreamId {
    /// Checks and joins a category and an id.
    ///
    /// # Errors
    /// When the category is no name, or the id is empty, longer than 400 bytes or has control characters.
    pub fn new(category: impl AsRef<str>, id: impl fmt::Display) -> Result<Self, InvalidStream> {
        Self::of(&Category::new(category)?, id)
    }

    /// As [`new`](Self::new), with a category that was checked before.
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

    /// Where the runtime keeps something that is no stream's, in a category that no user's stream has.
    pub(crate) fn reserved(category: &'static str, id: &str) -> Result<Self, InvalidStream> {
        Self::of(&Category::reserved(category), id)
    }

    /// Rebuilds what a store wrote after [`new`](Self::new) had checked it.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn stored(category: Category, id: Arc<str>) -> Self {
        Self { category, id }
    }

    /// The kind of aggregate.
    pub fn category(&self) -> &str {
        self.category.as_str()
    }

    /// Which aggregate of its kind.
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
