//! Text on a terminal: escapes, and standard error.

use std::borrow::Cow;
use std::io::{IsTerminal, Write, stderr};

/// Escapes every character that could control a terminal or is invisible.
///
/// These are controls, bidirectional overrides, line and paragraph separators, invisible and
/// unassigned characters.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_hidden) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if is_hidden(c) {
            shown.extend(c.escape_default())
        } else {
            shown.push(c)
        }
        shown
    }))
}

/// Returns whether a character is invisible by itself, by the tables of the standard library.
fn is_hidden(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    // Follows another character, so that a combining mark does not count as standing alone.
    let mut text = String::from("x");
    text.push(c);
    text.escape_debug().count() > 2
}

/// Writes to standard error. A failure cannot be reported.
pub(crate) fn print_error(text: &str) {
    let _ = stderr().write_all(text.as_bytes());
}

/// Returns whether standard error is a terminal.
pub(crate) fn watched() -> bool {
    stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::clean;

    #[test]
    fn text_cannot_steer_a_terminal() {
        for hidden in [
            '\u{1b}',
            '\r',
            '\u{9b}',
            '\u{200b}',
            '\u{200f}',
            '\u{2028}',
            '\u{202e}',
            '\u{2066}',
            '\u{feff}',
            '\u{e0041}',
        ] {
            let shown = clean(&format!("a{hidden}b")).into_owned();
            assert!(!shown.contains(hidden) && shown.starts_with("a\\"), "{shown}");
        }
        for visible in ["Zoë", "e\u{301}", "\"quoted\" 'and' C:\\path", "日本語", "😀", ""] {
            assert_eq!(clean(visible), visible);
        }
    }
}
