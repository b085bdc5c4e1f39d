//! The value of the header `Storied-Stream`: the category and the escaped id of a stream.

use std::fmt::Write;

use crate::event::StreamId;

/// Encodes `category/id`.
/// A byte that a header cannot carry or would not preserve becomes `%` and two hexadecimal digits.
pub(super) fn stream_header(stream: &StreamId) -> String {
    let mut text = String::with_capacity(stream.category().len() + 1 + stream.id().len());
    text.push_str(stream.category());
    text.push('/');
    for byte in stream.id().bytes() {
        if matches!(byte, b'!'..=b'~') && byte != b'%' {
            text.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

pub(super) fn read_stream(header: &str) -> Option<StreamId> {
    let (category, id) = header.split_once('/')?;
    StreamId::new(category, percent_decoded(id)?).ok()
}

/// Decodes `%` and two hexadecimal digits to a byte.
pub(in crate::bus::nats) fn percent_decoded(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        if byte == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &rest[2..];
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}
