//! Reads the CSV file row by row, and reports malformed rows with file, line and column.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use chrono::NaiveDateTime;
use csv::{ByteRecord, Position};
use rust_decimal::Decimal;

/// The columns, by their names in the header of the file, in any order.
const COLUMNS: [&str; 8] = [
    "InvoiceNo",
    "StockCode",
    "Description",
    "Quantity",
    "InvoiceDate",
    "UnitPrice",
    "CustomerID",
    "Country",
];

/// A row, parsed to text, numbers and dates, and not validated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) invoice: String,
    pub(crate) stock_code: String,
    pub(crate) description: String,
    pub(crate) quantity: i64,
    pub(crate) date: NaiveDateTime,
    pub(crate) unit_price: Decimal,
    pub(crate) customer: Option<String>,
    pub(crate) country: String,
}

/// Maximum size of a row in bytes, so that a file without line ends does not fill the memory.
const MOST: u64 = 1 << 20;

/// The cause of a missing row. Lines and columns count from 1, columns in characters.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RowError {
    #[error("{}: {error}", file.display())]
    Unreadable { file: PathBuf, error: csv::Error },
    #[error("{} is not a regular file; name a CSV file", .0.display())]
    NoFile(PathBuf),
    #[error("{}:{line}:{column}: {problem}", file.display())]
    Malformed { file: PathBuf, line: u64, column: usize, problem: Problem },
}

/// The error of a row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    #[error("the file has no column {0}")]
    NoSuchColumn(&'static str),
    #[error("the row has {found} columns instead of {expected}")]
    Columns { expected: usize, found: usize },
    #[error("{column} is empty")]
    Empty { column: &'static str },
    #[error("{column} {found:?} is not {expected}")]
    Unlike { column: &'static str, found: String, expected: &'static str },
}

/// A file that limits the size of a row.
struct Limited {
    source: File,
    /// Number of bytes read for the current row; the buffer of the CSV reader may hold its start.
    of_row: u64,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.of_row > MOST {
            return Err(std::io::Error::other(format!("a row has more than {MOST} bytes")));
        }
        let read = self.source.read(buffer)?;
        self.of_row += read as u64;
        Ok(read)
    }
}

/// The rows of a file: an iterator that ends with the first malformed row. Holds one row in memory.
pub(crate) struct Rows {
    file: PathBuf,
    reader: csv::Reader<Limited>,
    record: ByteRecord,
    /// Number of columns of the header.
    width: usize,
    /// Index of each of [`COLUMNS`] in a row.
    order: [usize; COLUMNS.len()],
    ended: bool,
}

impl Rows {
    /// Opens the file and reads its header.
    pub(crate) fn open(file: impl Into<PathBuf>) -> Result<Self, RowError> {
        let file = file.into();
        let unreadable = |error| RowError::Unreadable { file: file.clone(), error };
        // Before it is opened: opening a FIFO waits for a writer, and a device has no end.
        if !file.metadata().map_err(|error| unreadable(error.into()))?.is_file() {
            return Err(RowError::NoFile(file));
        }
        let source = File::open(&file).map_err(|error| unreadable(error.into()))?;
        let source = Limited { source, of_row: 0 };
        // Flexible, because this program reports a row of another length, with its place.
        let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(source);
        let header = reader.byte_headers().map_err(unreadable)?.clone();
        let mut order = [0; COLUMNS.len()];
        for (place, name) in order.iter_mut().zip(COLUMNS) {
            *place = header
                .iter()
                .position(|column| column == name.as_bytes())
                .ok_or_else(|| malformed(&file, &Position::new(), 0, Problem::NoSuchColumn(name)))?;
        }
        Ok(Self { file, reader, record: ByteRecord::new(), width: header.len(), order, ended: false })
    }

    fn read(&mut self) -> Result<Option<Row>, RowError> {
        let before = self.reader.position().clone();
        self.reader.get_mut().of_row = 0;
        match self.reader.read_byte_record(&mut self.record) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(error) => return Err(RowError::Unreadable { file: self.file.clone(), error }),
        }
        let found = self.record.len();
        if found != self.width {
            let problem = Problem::Columns { expected: self.width, found };
            return Err(malformed(&self.file, &before, self.width.min(found), problem));
        }
        self.row().map(Some).map_err(|(column, problem)| malformed(&self.file, &before, column, problem))
    }

    /// Parses the record, or returns the column and its error.
    fn row(&self) -> Result<Row, (usize, Problem)> {
        let customer = self.text(6)?;
        Ok(Row {
            invoice: self.filled(0)?.to_owned(),
            stock_code: self.filled(1)?.to_owned(),
            description: self.text(2)?.to_owned(),
            quantity: self.parsed(3, "a whole number", |text| text.parse().ok())?,
            date: self.parsed(4, "a date like 2010-12-01 08:26:00", |text| {
                NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S").ok()
            })?,
            unit_price: self.parsed(5, "a decimal number", |text| Decimal::from_str_exact(text).ok())?,
            // The tool that made the file wrote the numbers of customers as floats.
            customer: Some(customer.trim_end_matches(".0").to_owned()).filter(|id| !id.is_empty()),
            country: self.filled(7)?.to_owned(),
        })
    }

    fn text(&self, column: usize) -> Result<&str, (usize, Problem)> {
        let place = self.order[column];
        let bytes = &self.record[place];
        std::str::from_utf8(bytes).map_err(|_| {
            let found = String::from_utf8_lossy(bytes).into_owned();
            (place, Problem::Unlike { column: COLUMNS[column], found, expected: "UTF-8" })
        })
    }

    fn filled(&self, column: usize) -> Result<&str, (usize, Problem)> {
        match self.text(column)? {
            "" => Err((self.order[column], Problem::Empty { column: COLUMNS[column] })),
            text => Ok(text),
        }
    }

    fn parsed<T>(
        &self,
        column: usize,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, (usize, Problem)> {
        let text = self.filled(column)?;
        parse(text).ok_or_else(|| {
            let problem = Problem::Unlike { column: COLUMNS[column], found: text.to_owned(), expected };
            (self.order[column], problem)
        })
    }
}

impl Iterator for Rows {
    type Item = Result<Row, RowError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let row = self.read().transpose();
        self.ended = !matches!(row, Some(Ok(_)));
        row
    }
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").field("file", &self.file).finish_non_exhaustive()
    }
}

/// Returns an error with its place.
///
/// The CSV reader knows the start of a record, but not those of its fields. So this searches the
/// file, which has a cost only for an error.
fn malformed(file: &Path, record: &Position, field: usize, problem: Problem) -> RowError {
    let (lines, column) = locate(file, record.byte(), field).unwrap_or((0, 1));
    RowError::Malformed { file: file.to_owned(), line: record.line() + lines, column, problem }
}

/// Finds a field of the record at `start`.
///
/// Returns the number of lines after `start`, and the column in its line.
///
/// With `field` one past the last, finds the end of the record.
fn locate(file: &Path, start: u64, field: usize) -> std::io::Result<(u64, usize)> {
    let mut file = BufReader::new(File::open(file)?);
    file.seek(SeekFrom::Start(start))?;
    // Limits the search to 1 MiB; the error of a longer record names its start.
    let mut file = file.take(1 << 20);
    let (mut lines, mut fields, mut quoted, mut begun) = (0, 0, false, None);
    let mut line = Vec::new();
    while file.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\r', '\n']);
        // The CSV reader skips empty lines between records too.
        if !text.is_empty() {
            begun.get_or_insert(lines);
        }
        for (column, character) in (1..).zip(text.chars()) {
            if fields == field {
                return Ok((lines, column));
            }
            match character {
                '"' => quoted = !quoted,
                ',' if !quoted => fields += 1,
                _ => {}
            }
        }
        if begun.is_some() && !quoted {
            return Ok((lines, text.chars().count() + 1));
        }
        lines += 1;
        line.clear();
    }
    Ok((begun.unwrap_or(0), 1))
}
