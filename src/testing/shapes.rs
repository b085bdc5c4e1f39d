//! The conformance list of serde shapes in events, with the result of storing each in each codec.
//!
//! Each shape is stored as the content of a newtype, a struct and a tuple variant. A store reads
//! the value that was written, reads the value that the list names (serde loses the rest), or
//! rejects the event. It never stores a value that cannot be read.

mod attributes;
mod standard;
mod tagged;

use std::fmt::Debug;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::roundtrip::{ReadBack, read_back};
use crate::codec::Codec;
use crate::event::Event;

/// Stores and reads all values of every shape in both codecs. Reports each shape by its Rust name.
///
/// An error names the value and the result. The function is generic, so that its many types are
/// compiled only where it is used.
///
/// ```ignore
/// storied::testing::shapes::check(|name, codec, result| {
///     result.unwrap_or_else(|error| panic!("{name} in {codec}: {error}"));
/// });
/// ```
pub fn check(report: impl FnMut(&'static str, Codec, Result<(), String>)) {
    let mut list = List(report);
    standard::add(&mut list);
    attributes::add(&mut list);
    tagged::add(&mut list);
}

/// An event that holds a value, in each form of a variant.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Held<T> {
    Newtype(T),
    Struct { value: T },
    Tuple(u8, T),
}

impl<T: Content> Event for Held<T> {
    const CATEGORY: &'static str = "shape";
}

trait Content: Debug + Serialize + DeserializeOwned + Send + Sync + 'static {}

impl<T: Debug + Serialize + DeserializeOwned + Send + Sync + 'static> Content for T {}

/// The expected result for the values of a shape.
enum Expected<T> {
    /// Each value is read as it was written.
    Same,
    /// These values are read instead, because serde loses the rest.
    As(fn() -> Vec<T>),
    /// No value is stored.
    Refused,
}

use Expected::{As, Refused, Same};

/// Receives the result of each shape.
trait Report: FnMut(&'static str, Codec, Result<(), String>) {}

impl<F: FnMut(&'static str, Codec, Result<(), String>)> Report for F {}

/// The receiver of the results.
struct List<R>(R);

impl<R: Report> List<R> {
    /// Expects a shape that both codecs read as it was written.
    fn same<T: Content>(&mut self, name: &'static str, values: fn() -> Vec<T>) {
        self.shape(name, values, Same, Same);
    }

    /// Expects a shape that no codec stores.
    fn refused<T: Content>(&mut self, name: &'static str, values: fn() -> Vec<T>) {
        self.shape(name, values, Refused, Refused);
    }

    /// Expects a shape that both codecs read as `read`.
    fn reads_as<T: Content>(&mut self, name: &'static str, values: fn() -> Vec<T>, read: fn() -> Vec<T>) {
        self.shape(name, values, As(read), As(read));
    }

    fn shape<T: Content>(
        &mut self,
        name: &'static str,
        values: fn() -> Vec<T>,
        cbor: Expected<T>,
        json: Expected<T>,
    ) {
        (self.0)(name, Codec::Cbor, check_shape(values, &cbor, Codec::Cbor));
        (self.0)(name, Codec::Json, check_shape(values, &json, Codec::Json));
    }
}

fn check_shape<T: Content>(
    values: fn() -> Vec<T>,
    expected: &Expected<T>,
    codec: Codec,
) -> Result<(), String> {
    let forms: [fn(T) -> Held<T>; 3] =
        [Held::Newtype, |value| Held::Struct { value }, |value| Held::Tuple(7, value)];
    for form in forms {
        // Makes new values for each form, because they need not be `Clone`.
        let wanted = match expected {
            As(read) => read(),
            Same | Refused => values(),
        };
        for (event, wanted) in values().into_iter().map(form).zip(wanted.into_iter().map(form)) {
            judge(&event, &wanted, codec, matches!(expected, Refused))?;
        }
    }
    Ok(())
}

/// Compares by `Debug`, because NaN is not equal to itself.
fn judge<E: Event + Debug>(event: &E, wanted: &E, codec: Codec, refused: bool) -> Result<(), String> {
    let brief = |text: String| text.chars().take(200).collect::<String>();
    let event_text = || brief(format!("{event:?}"));
    match read_back(event, codec) {
        ReadBack::Unreadable(reason) => {
            Err(format!("{} was stored and cannot be read: {}", event_text(), brief(reason)))
        }
        ReadBack::Refused(_) if refused => Ok(()),
        ReadBack::Refused(reason) => Err(format!("{} was rejected: {}", event_text(), brief(reason))),
        ReadBack::Event(read) if refused => {
            Err(format!("{} should be rejected and was read as {}", event_text(), brief(format!("{read:?}"))))
        }
        ReadBack::Event(read) => {
            let (read, wanted) = (format!("{read:?}"), format!("{wanted:?}"));
            if read == wanted { Ok(()) } else { Err(format!("{} was read as {}", event_text(), brief(read))) }
        }
    }
}
