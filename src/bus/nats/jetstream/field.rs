//! A compared field of a configuration.

use std::fmt;

/// A field of a configuration: actual and expected value.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Field {
    /// Name of the field.
    pub name: &'static str,
    /// Actual value on the server.
    pub is: String,
    /// Value that this program expects.
    pub should_be: String,
    /// Whether the values are equal.
    pub same: bool,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: is {}, should be {}", self.name, self.is, self.should_be)
    }
}
