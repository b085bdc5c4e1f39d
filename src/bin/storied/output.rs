//! Output: text for people, JSON for programs.

use std::borrow::Cow;
use std::io::{BufWriter, IsTerminal, Stdout, Write, stderr, stdout};

use serde::Serialize;

use crate::failure::Failure;

/// Standard output.
pub(crate) struct Output {
    /// Selects JSON.
    pub(crate) json: bool,
    writer: BufWriter<Stdout>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, writer: BufWriter::new(stdout()) }
    }

    /// Writes text of this program.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), Failure> {
        self.writer.write_all(text.as_bytes())?;
        self.flush()
    }

    /// Writes a line of text; escapes foreign text, which could control the terminal.
    pub(crate) fn line(&mut self, line: impl AsRef<str>) -> Result<(), Failure> {
        Ok(writeln!(self.writer, "{}", clean(line.as_ref()))?)
    }

    /// Writes a line of JSON.
    pub(crate) fn value(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        serde_json::to_writer(&mut self.writer, value).map_err(std::io::Error::from)?;
        Ok(self.writer.write_all(b"\n")?)
    }

    /// Writes rows under a header, in columns. The last column is not padded.
    pub(crate) fn table<const N: usize>(
        &mut self,
        header: [&str; N],
        rows: &[[String; N]],
    ) -> Result<(), Failure> {
        let mut widths = header.map(|title| title.chars().count());
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(clean(cell).chars().count());
            }
        }
        let mut print = |cells: [&str; N]| {
            let mut line = String::new();
            for (n, (cell, width)) in cells.iter().zip(widths).enumerate() {
                let (cell, width) = (clean(cell), if n + 1 < N { width + 2 } else { 0 });
                line.push_str(&format!("{cell:width$}"));
            }
            writeln!(self.writer, "{}", line.trim_end())
        };
        print(header)?;
        for row in rows {
            print(row.each_ref().map(String::as_str))?;
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        Ok(self.writer.flush()?)
    }
}

/// Formats a count with its noun.
pub(crate) fn counted(count: usize, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

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
