//! Stores each value of a shape and compares what is read.

use std::fmt::Debug;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use storied::{Codec, Event, Metadata, NewEvent};

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

pub(super) trait Content: Debug + Serialize + DeserializeOwned + Send + Sync + 'static {}

impl<T: Debug + Serialize + DeserializeOwned + Send + Sync + 'static> Content for T {}

/// The expected result for the values of a shape.
pub(super) enum Expected<T> {
    /// Each value is read as it was written.
    Same,
    /// These values are read instead, because serde loses the rest.
    As(fn() -> Vec<T>),
    /// No value is stored.
    Refused,
}

pub(super) use Expected::{As, Refused, Same};

/// Receives the result of each shape.
pub(super) trait Report: FnMut(&'static str, Codec, Result<(), String>) {}

impl<F: FnMut(&'static str, Codec, Result<(), String>)> Report for F {}

/// The receiver of the results.
pub(super) struct List<R>(pub(super) R);

impl<R: Report> List<R> {
    /// Expects a shape that both codecs read as it was written.
    pub(super) fn same<T: Content>(&mut self, name: &'static str, values: fn() -> Vec<T>) {
        self.shape(name, values, Same, Same);
    }

    /// Expects a shape that no codec stores.
    pub(super) fn refused<T: Content>(&mut self, name: &'static str, values: fn() -> Vec<T>) {
        self.shape(name, values, Refused, Refused);
    }

    /// Expects a shape that both codecs read as `read`.
    pub(super) fn reads_as<T: Content>(
        &mut self,
        name: &'static str,
        values: fn() -> Vec<T>,
        read: fn() -> Vec<T>,
    ) {
        self.shape(name, values, As(read), As(read));
    }

    pub(super) fn shape<T: Content>(
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
    let new = match NewEvent::encode(event, codec, &Metadata::default()) {
        Ok(_) if refused => return Err(format!("{} should be rejected", event_text())),
        Ok(new) => new,
        Err(_) if refused => return Ok(()),
        Err(error) => return Err(format!("{} was rejected: {}", event_text(), brief(error.to_string()))),
    };
    match crate::codec::recorded(E::CATEGORY, new, codec).decode::<E>() {
        Err(error) => {
            Err(format!("{} was stored and cannot be read: {}", event_text(), brief(error.to_string())))
        }
        Ok(read) => {
            let (read, wanted) = (format!("{read:?}"), format!("{wanted:?}"));
            if read == wanted { Ok(()) } else { Err(format!("{} was read as {}", event_text(), brief(read))) }
        }
    }
}
