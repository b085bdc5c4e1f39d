use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// The longest category or event name, in bytes. NATS subjects and PostgreSQL indexes both live well with it.
const MAX_NAME: usize = 200;

/// A name that cannot be a category or an event name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} is not a valid {what}: {reason}; use 1 to 200 ASCII letters, digits, '_' or '-', in tokens separated by single dots"
)]
pub struct InvalidName {
    what: &'static str,
    name: String,
    reason: &'static str,
}

/// Whether `name` is dotted tokens of ASCII letters, digits, `_` and `-`; `what` it would be is said in the error.
pub(crate) fn check(what: &'static str, name: &str) -> Result<(), InvalidName> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME {
        "it is too long"
    } else if name.split('.').any(str::is_empty) {
        "it has an empty token"
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.')) {
        "it has other characters"
    } else {
        return Ok(());
    };
    // A hostile name may be megabytes long; the error need not be.
    Err(InvalidName { what, name: name.chars().take(80).collect(), reason })
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Checks and wraps a name.
            ///
            /// # Errors
            /// When it is empty, longer than 200 bytes, or has other characters than dotted tokens of ASCII letters,
            /// digits, `_` and `-`.
            pub fn new(name: impl AsRef<str>) -> Result<Self, InvalidName> {
                check($what, name.as_ref())?;
                Ok(Self(name.as_ref().into()))
            }

            /// The name as text.
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
    /// The kind of a stream (`order`); cheap to clone.
    Category, "category"
}
impl Category {
    /// One that no user's is, nor can be: it has a character that [`new`](Self::new) refuses.
    pub(super) fn reserved(name: &'static str) -> Self {
        debug_assert!(check("category", name).is_err(), "{name} may be a user's");
        Self(name.into())
    }
}

name! {
    /// The full name of an event, `category.variant` (`order.placed`); cheap to clone.
    EventName, "event name"
}
