use std::collections::BTreeSet;
use std::fmt;

use uuid::Uuid;

/// Maximum size in bytes of a tag, key and separator included.
const MAX_TAG: usize = 200;

/// A tag of an event: a key and a value, such as `course:c1`.
///
/// A [query](crate::store::Query) finds events by their tags, whatever their streams are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(String);

/// A text cannot be a tag, or an event has too many.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidTag {
    /// The key is empty, or has other characters than ASCII letters, digits, `_`, `-` and `.`.
    #[error("invalid key of a tag {key:?}; use ASCII letters, digits, '_', '-' and '.'")]
    Key {
        /// The key, shortened.
        key: String,
    },
    /// The value is empty or has a control character.
    #[error("invalid value of a tag with key {key:?}; use text without control characters")]
    Value {
        /// The key.
        key: String,
    },
    /// The tag is too long. Its value is not shown, as it may be sensitive.
    #[error("tag with key {key:?} too long: {bytes} bytes (limit {limit}); use a shorter value")]
    TooLong {
        /// The key, shortened.
        key: String,
        /// Size in bytes, key and separator included.
        bytes: usize,
        /// Limit in bytes.
        limit: usize,
    },
    /// The event has too many tags.
    #[error("too many tags: {count} (limit {limit}); tag what decisions query")]
    TooMany {
        /// Number of tags.
        count: usize,
        /// Limit.
        limit: usize,
    },
}

impl Tag {
    /// Creates a tag.
    ///
    /// # Errors
    /// If the key is empty or has other characters than ASCII letters, digits, `_`, `-` and `.`,
    /// the value is empty or has a control character, or key and value together exceed 199 bytes.
    pub fn new(key: &str, value: impl fmt::Display) -> Result<Self, InvalidTag> {
        let short = || key.chars().take(80).collect();
        let is_of_key = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if key.is_empty() || !key.chars().all(is_of_key) {
            return Err(InvalidTag::Key { key: short() });
        }
        let tag = format!("{key}:{value}");
        if tag.len() == key.len() + 1 || tag.chars().any(char::is_control) {
            return Err(InvalidTag::Value { key: short() });
        }
        if tag.len() > MAX_TAG {
            return Err(InvalidTag::TooLong { key: short(), bytes: tag.len(), limit: MAX_TAG });
        }
        Ok(Self(tag))
    }

    /// Returns the tag by which the events of a decision are found; [`new`](Self::new) refuses it.
    pub(crate) fn of_command(id: Uuid) -> Self {
        Self(format!("$command:{id}"))
    }

    /// Returns whether no user can create the tag.
    pub(crate) fn is_reserved(&self) -> bool {
        self.0.starts_with('$')
    }

    /// Returns the tag as text: `key:value`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The tags of an event, each once.
///
/// An invalid tag keeps its error; the event is then refused.
///
/// ```
/// use storied::event::Tags;
///
/// let student: Option<&str> = None;
/// let tags = Tags::new().tag("course", "c1").tag_opt("student", student);
/// assert_eq!(tags.iter().map(|tag| tag.as_str()).collect::<Vec<_>>(), ["course:c1"]);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tags {
    tags: BTreeSet<Tag>,
    error: Option<InvalidTag>,
}

impl Tags {
    /// Maximum number of tags of an event.
    pub const MAX: usize = 16;

    /// Returns no tags.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tag.
    ///
    /// [Invalid](Self::check) under the conditions of [`Tag::new`].
    #[must_use]
    pub fn tag(mut self, key: &str, value: impl fmt::Display) -> Self {
        match Tag::new(key, value) {
            Ok(tag) => _ = self.tags.insert(tag),
            Err(error) => _ = self.error.get_or_insert(error),
        }
        self
    }

    /// Adds a tag, if there is a value.
    #[must_use]
    pub fn tag_opt(self, key: &str, value: Option<impl fmt::Display>) -> Self {
        match value {
            Some(value) => self.tag(key, value),
            None => self,
        }
    }

    /// Adds the tag of the command that causes the event. It does not count as one of the user's.
    #[must_use]
    pub(crate) fn of_command(mut self, id: Uuid) -> Self {
        self.tags.insert(Tag::of_command(id));
        self
    }

    /// Checks that the tags can be stored.
    ///
    /// # Errors
    /// The first invalid tag, or `TooMany` for more than [`MAX`](Self::MAX).
    pub fn check(&self) -> Result<(), InvalidTag> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let count = self.tags.iter().filter(|tag| !tag.is_reserved()).count();
        if count > Self::MAX {
            return Err(InvalidTag::TooMany { count, limit: Self::MAX });
        }
        Ok(())
    }

    /// Returns whether there is no tag.
    pub fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }

    /// Returns whether all of these tags are among them.
    pub fn contains_all<'a>(&self, mut tags: impl Iterator<Item = &'a Tag>) -> bool {
        tags.all(|tag| self.tags.contains(tag))
    }

    /// Returns the tags in their order.
    pub fn iter(&self) -> impl Iterator<Item = &Tag> {
        self.tags.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_have_keys_values_and_a_limit() {
        let tags = Tags::new().tag("course", "c1").tag("course", "c1").tag("b.c-d_e", 5);
        assert_eq!(tags.iter().map(Tag::as_str).collect::<Vec<_>>(), ["b.c-d_e:5", "course:c1"]);
        assert_eq!(tags.check(), Ok(()));
        for (key, value) in [("", "x"), ("a b", "x"), ("$command", "x"), ("a:b", "x"), ("é", "x")] {
            let error = Tags::new().tag(key, value).check();
            assert!(matches!(error, Err(InvalidTag::Key { .. })), "{key:?} {error:?}");
        }
        for value in ["", "a\nb", "\0"] {
            let error = Tags::new().tag("a", value).check();
            assert!(matches!(error, Err(InvalidTag::Value { .. })), "{value:?} {error:?}");
        }
        assert_eq!(Tags::new().tag("a", "x".repeat(198)).check(), Ok(()));
        let error = Tags::new().tag("a", "x".repeat(199)).check();
        assert!(matches!(error, Err(InvalidTag::TooLong { bytes: 201, limit: 200, .. })), "{error:?}");
    }

    #[test]
    fn the_tag_of_a_command_is_beside_those_of_the_user() {
        let full = (0..Tags::MAX).fold(Tags::new(), |tags, n| tags.tag("n", n));
        let of_command = full.clone().of_command(Uuid::nil());
        assert_eq!(of_command.check(), Ok(()));
        assert_eq!(of_command.iter().count(), Tags::MAX + 1);
        let error = full.tag("one", "more").check();
        assert_eq!(error, Err(InvalidTag::TooMany { count: 17, limit: 16 }));
    }
}
