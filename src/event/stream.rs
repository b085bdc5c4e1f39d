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

impl StreamId {
    /// Checks and joins a category and an id.
    ///
    /// # Errors
    /// If the category is no valid name, or the id is empty, longer than 400 bytes or has control
    /// characters.
    pub fn new(category: impl AsRef<str>, id: impl fmt::Display) -> Result<Self, InvalidName> {
        Self::of(&Category::new(category)?, id)
    }

    /// As [`new`](Self::new), with a category that is already checked.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of(category: &Category, id: impl fmt::Display) -> Result<Self, InvalidName> {
        let id = id.to_string();
        if let Some(problem) = id_problem("aggregate id", &id) {
            return Err(InvalidName(problem));
        }
        Ok(Self { category: category.clone(), id: id.into() })
    }

    /// Returns a stream for data of the runtime, in a category that no user can have.
    pub(crate) fn reserved(category: &'static str, id: &str) -> Result<Self, InvalidName> {
        Self::of(&Category::reserved(category), id)
    }

    /// Rebuilds a stored id that [`new`](Self::new) has checked before.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn stored(category: Category, id: Arc<str>) -> Self {
        Self { category, id }
    }

    #[cfg(feature = "postgres")]
    pub(crate) fn category_name(&self) -> &Category {
        &self.category
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

/// Returns the reason why a text cannot be the id of a stream; `what` names it in the reason.
pub(crate) fn id_problem(what: &str, id: &str) -> Option<String> {
    text_problem(what, id, MAX_ID)
}

/// Returns the reason why a text is empty, longer than `limit` bytes, or has a control character.
///
/// `what` names the text in the reason.
pub(crate) fn text_problem(what: &str, text: &str, limit: usize) -> Option<String> {
    if text.is_empty() {
        return Some(format!("empty {what}; use 1 to {limit} bytes of text"));
    }
    if text.len() > limit {
        let length = text.len();
        return Some(format!("{what} too long: {length} bytes (limit {limit}); use a shorter id"));
    }
    // PostgreSQL cannot store NUL, and the others are unreadable.
    let (at, _) = text.char_indices().find(|(_, c)| c.is_control())?;
    Some(format!("invalid {what}: control character at byte {at}; use printable text"))
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
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        let Some((category, id)) = text.split_once('/') else {
            let text: String = text.chars().take(80).collect();
            let advice = "no '/' after the category; use a form like order/17";
            return Err(InvalidName(format!("invalid stream {text:?}: {advice}")));
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
        assert!(long.unwrap_err().to_string().contains("401 bytes (limit 400)"));
    }
}
