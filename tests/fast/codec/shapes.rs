//! The conformance list of serde shapes in events, with the result of storing each in each codec.
//!
//! Each shape is stored as the content of a newtype, a struct and a tuple variant. A store reads
//! the value that was written, reads the value that the list names (serde loses the rest), or
//! rejects the event. It never stores a value that cannot be read.

mod attributes;
mod list;
mod standard;
mod tagged;

use storied::Codec;

use self::list::List;

/// Stores and reads all values of every shape in both codecs. Reports each shape by its Rust name.
///
/// An error names the value and the result.
pub(crate) fn check(report: impl FnMut(&'static str, Codec, Result<(), String>)) {
    let mut list = List(report);
    standard::add(&mut list);
    attributes::add(&mut list);
    tagged::add(&mut list);
}
