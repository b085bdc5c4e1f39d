//! Output: text for people, JSON for programs.

use std::io::{BufWriter, Stdout, Write, stdout};

use serde::Serialize;

use crate::failure::Failure;
use crate::terminal::clean;

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
