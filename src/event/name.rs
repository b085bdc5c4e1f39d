use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};

/// Maximum length of a category or event name in bytes; fits NATS subjects and PostgreSQL indexes.
const MAX_NAME: usize = 200;

/// A text that is no valid category, event name or stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidName(pub(super) String);

/// Checks that `name` is dotted tokens of ASCII letters, digits, `_` and `-`.
///
/// The error calls it a `what`.
pub(crate) fn check(what: &'static str, name: &str) -> Result<(), InvalidName> {
    let reason = if name.is_empty() {
        "empty name"
    } else if name.len() > MAX_NAME {
        "too long"
    } else if name.split('.').any(str::is_empty) {
        "empty token"
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.')) {
        "invalid character"
    } else {
        return Ok(());
    };
    // The error quotes 80 characters only, because a hostile name may have megabytes.
    let name: String = name.chars().take(80).collect();
    Err(InvalidName(format!(
        "invalid {what} {name:?}: {reason}; use 1 to 200 ASCII letters, digits, '_' or '-', in tokens separated by single dots"
    )))
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks and wraps a name.
            ///
            /// # Errors
            /// If the name is empty, longer than 200 bytes, or not dotted tokens of ASCII letters,
            /// digits, `_` and `-`.
            pub fn new(name: impl AsRef<str>) -> Result<Self, InvalidName> {
                check($what, name.as_ref())?;
                Ok(Self(name.as_ref().into()))
            }

            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidName;

            fn try_from(name: String) -> Result<Self, InvalidName> {
                Self::new(name)
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl PartialEq<str> for $type {
            fn eq(&self, other: &str) -> bool {
                &*self.0 == other
            }
        }

        impl PartialEq<&str> for $type {
            fn eq(&self, other: &&str) -> bool {
                &*self.0 == *other
            }
        }
    };
}

name! {
    /// The kind of a stream (`order`). Cheap to clone.
    ///
    /// Serializes as text; deserializing checks it.
    Category, "category"
}
impl Category {
    /// Returns a category that [`new`](Self::new) rejects, so that no user can have it.
    pub(super) fn reserved(name: &'static str) -> Self {
        debug_assert!(check("category", name).is_err(), "{name} may be a user's");
        Self(name.into())
    }
}

name! {
    /// The full name of an event, `category.variant` (`order.placed`). Cheap to clone.
    ///
    /// Serializes as text; deserializing checks it.
    EventName, "event name"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_text_in_json_and_checked() {
        let name = EventName::new("shop.order.placed").unwrap();
        let json = serde_json::to_string(&name).unwrap();
        assert_eq!(json, "\"shop.order.placed\"");
        assert_eq!(serde_json::from_str::<EventName>(&json).unwrap(), name);
        assert_eq!(serde_json::from_str::<Category>("\"order\"").unwrap(), Category::new("order").unwrap());
        for json in ["\"\"", "\"a..b\"", "\"a b\"", "7", "null"] {
            assert!(serde_json::from_str::<EventName>(json).is_err(), "{json}");
            assert!(serde_json::from_str::<Category>(json).is_err(), "{json}");
        }
        let reserved = serde_json::to_string(&Category::reserved("$reserved")).unwrap();
        let error = serde_json::from_str::<Category>(&reserved).unwrap_err().to_string();
        assert!(error.starts_with("invalid category \"$reserved\": invalid character"), "{error}");
    }
}
