//! What is printed: text for people, JSON for programs.

use std::borrow::Cow;
use std::io::{BufWriter, IsTerminal, Stdout, Write, stderr, stdout};

use serde::Serialize;

use crate::failure::Failure;

/// Standard output.
pub(crate) struct Output {
    /// Whether programs read it.
    pub(crate) json: bool,
    writer: BufWriter<Stdout>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, writer: BufWriter::new(stdout()) }
    }

    /// Text of our own.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), Failure> {
        self.writer.write_all(text.as_bytes())?;
        self.flush()
    }

    /// A line for people. What it has from elsewhere cannot move their cursor.
    pub(crate) fn line(&mut self, line: impl AsRef<str>) -> Result<(), Failure> {
        Ok(writeln!(self.writer, "{}", clean(line.as_ref()))?)
    }

    /// A line for programs.
    pub(crate) fn value(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        serde_json::to_writer(&mut self.writer, value).map_err(std::io::Error::from)?;
        Ok(self.writer.write_all(b"\n")?)
    }

    /// Rows under a header, in columns. The last one is not padded.
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

/// Without control characters: what others wrote must not steer a terminal.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if !text.chars().any(char::is_control) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if c.is_control() {
            shown.extend(c.escape_default())
        } else {
            shown.push(c)
        }
        shown
    }))
}

/// Prints to standard error. There is nobody to tell when that fails.
pub(crate) fn complain(text: &str) {
    let _ = stderr().write_all(text.as_bytes());
}

/// Whether somebody watches standard error.
pub(crate) fn watched() -> bool {
    stderr().is_terminal()
}
