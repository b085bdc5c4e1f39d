//! What an invoice is and what it decides. Everything odd about the real data is judged here, and nowhere else.

use std::collections::HashMap;

use chrono::NaiveDateTime;
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use storied::{Aggregate, Context, Decision, Event};

/// Beyond these a line is a typing error, not a sale. They also keep every amount far away from overflow.
const MOST_UNITS: u64 = 1_000_000;
const HIGHEST_PRICE: Decimal = Decimal::from_parts(1_000_000, 0, 0, false, 0);
/// How many decimals a price may have. The read models count in units of the last one.
pub(crate) const PRICE_DECIMALS: u32 = 4;

/// The head of an invoice: who is billed, where, when. Each of its lines repeats it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Header {
    /// Nobody known for guests.
    pub(crate) customer: Option<String>,
    pub(crate) country: String,
    pub(crate) date: NaiveDateTime,
}

/// One line, signed as it is on paper: what comes back has a negative quantity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// 1, 2, 3 … on its invoice.
    pub(crate) number: u32,
    pub(crate) stock_code: String,
    pub(crate) description: String,
    pub(crate) quantity: i64,
    /// serde writes decimals as text, so the log has them exactly.
    pub(crate) unit_price: Decimal,
}

impl Line {
    pub(crate) fn amount(&self) -> Decimal {
        Decimal::from(self.quantity) * self.unit_price
    }
}

/// What can be asked of an invoice.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum InvoiceCommand {
    Open { header: Header },
    AddLine { header: Header, line: Line },
}

/// What happens to an invoice. A variant's serde name is the event's name in the log: `invoice.line_sold`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum InvoiceEvent {
    /// A customer is going to be billed.
    Opened { header: Header },
    /// Somebody without an account is going to be billed, or nobody at all: stock is corrected by invoice, too.
    OpenedForGuest { header: Header },
    /// Goods are going to be taken back. The note does not say which invoice sold them, and often that invoice is older
    /// than the file: so it stands for itself, and its effect is that of its own lines.
    CreditNoteOpened { header: Header },
    /// Goods leave for money.
    LineSold { line: Line },
    /// Goods leave for nothing.
    LineGivenAway { line: Line },
    /// Goods come back on a sales invoice, deducted from it.
    LineReturned { line: Line },
    /// Goods come back on a credit note.
    LineCredited { line: Line },
    /// Goods are lost, damaged or were never there: taken out of the books, without money.
    LineWrittenOff { line: Line },
}

impl Event for InvoiceEvent {
    const CATEGORY: &'static str = "invoice";
}

impl InvoiceEvent {
    /// The variants that are about a line.
    pub(crate) const LINES: [&str; 5] =
        ["line_sold", "line_given_away", "line_returned", "line_credited", "line_written_off"];

    /// The head of the invoice, if the event opens it.
    pub(crate) fn header(&self) -> Option<&Header> {
        match self {
            Self::Opened { header } | Self::OpenedForGuest { header } | Self::CreditNoteOpened { header } => {
                Some(header)
            }
            _ => None,
        }
    }

    /// The line, if the event is about one. Revenue and units follow from it, whatever kind of line it is.
    pub(crate) fn line(&self) -> Option<&Line> {
        match self {
            Self::LineSold { line }
            | Self::LineGivenAway { line }
            | Self::LineReturned { line }
            | Self::LineCredited { line }
            | Self::LineWrittenOff { line } => Some(line),
            _ => None,
        }
    }
}

/// Why an invoice refuses: what makes no sense in any reading.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum InvoiceError {
    #[error("it was opened before, for {} in {}", customer(&.before.customer), .before.country)]
    OpenedBefore { before: Header },
    #[error("line {line} is for an invoice that was not opened")]
    NotOpened { line: u32 },
    #[error("line {line} is for {}, but the invoice is for {}", customer(.found), customer(.expected))]
    OtherCustomer { line: u32, found: Option<String>, expected: Option<String> },
    #[error("line {line} is for {found}, but the invoice is for {expected}")]
    OtherCountry { line: u32, found: String, expected: String },
    #[error("line {line} is of {found}, but the invoice is of {expected}")]
    OtherDay { line: u32, found: NaiveDateTime, expected: NaiveDateTime },
    #[error("line {} is on the invoice already, and is {} × {} at {}", .before.number, .before.quantity, .before.stock_code, .before.unit_price)]
    OtherLine { before: Line },
    #[error("line {line} has nothing on it: its quantity is 0")]
    NoQuantity { line: u32 },
    #[error("line {line} of a credit note takes nothing back: its quantity is {quantity}")]
    NothingCredited { line: u32, quantity: i64 },
    #[error(
        "line {line} has the price {price}; a price is 0 to {HIGHEST_PRICE} with at most {PRICE_DECIMALS} decimals"
    )]
    OddPrice { line: u32, price: Decimal },
    #[error("line {line} has the quantity {quantity}; {MOST_UNITS} is the most")]
    OddQuantity { line: u32, quantity: i64 },
}

fn customer(id: &Option<String>) -> String {
    id.as_ref().map_or_else(|| "a guest".into(), |id| format!("customer {id}"))
}

/// An invoice or credit note; its id is its number.
#[derive(Debug, Default)]
pub(crate) struct Invoice {
    header: Option<Header>,
    lines: HashMap<u32, Line>,
}

impl Aggregate for Invoice {
    type Event = InvoiceEvent;
    type Command = InvoiceCommand;
    type Reply = ();
    type Error = InvoiceError;

    fn handle(
        &self,
        command: &InvoiceCommand,
        context: &Context<'_>,
    ) -> Result<Decision<InvoiceEvent>, InvoiceError> {
        // The shop numbers its credit notes C….
        let credit_note = context.id().starts_with('C');
        match command {
            InvoiceCommand::Open { header } => self.open(header, credit_note),
            InvoiceCommand::AddLine { header, line } => self.add_line(header, line, credit_note),
        }
    }

    fn apply(&mut self, event: &InvoiceEvent) {
        if let Some(header) = event.header() {
            self.header = Some(header.clone());
        }
        if let Some(line) = event.line() {
            self.lines.insert(line.number, line.clone());
        }
    }
}

impl Invoice {
    fn open(&self, header: &Header, credit_note: bool) -> Result<Decision<InvoiceEvent>, InvoiceError> {
        let header = match &self.header {
            None => header.clone(),
            Some(before) if before == header => return Ok(Decision::none()),
            Some(before) => return Err(InvoiceError::OpenedBefore { before: before.clone() }),
        };
        Ok(Decision::event(if credit_note {
            InvoiceEvent::CreditNoteOpened { header }
        } else if header.customer.is_none() {
            InvoiceEvent::OpenedForGuest { header }
        } else {
            InvoiceEvent::Opened { header }
        }))
    }

    fn add_line(
        &self,
        header: &Header,
        line: &Line,
        credit_note: bool,
    ) -> Result<Decision<InvoiceEvent>, InvoiceError> {
        self.belongs(header, line.number)?;
        match self.lines.get(&line.number) {
            // storied recognises a repeated command by its id, as far back as its window goes; an invoice knows for ever.
            Some(before) if before == line => return Ok(Decision::none()),
            Some(before) => return Err(InvoiceError::OtherLine { before: before.clone() }),
            None => {}
        }
        let &Line { number, quantity, unit_price: price, .. } = line;
        if price < Decimal::ZERO || price > HIGHEST_PRICE || price.normalize().scale() > PRICE_DECIMALS {
            return Err(InvoiceError::OddPrice { line: number, price });
        }
        if quantity.unsigned_abs() > MOST_UNITS {
            return Err(InvoiceError::OddQuantity { line: number, quantity });
        }
        let line = line.clone();
        Ok(Decision::event(match quantity {
            0 => return Err(InvoiceError::NoQuantity { line: number }),
            ..0 if credit_note => InvoiceEvent::LineCredited { line },
            _ if credit_note => return Err(InvoiceError::NothingCredited { line: number, quantity }),
            ..0 if price.is_zero() => InvoiceEvent::LineWrittenOff { line },
            ..0 => InvoiceEvent::LineReturned { line },
            _ if price.is_zero() => InvoiceEvent::LineGivenAway { line },
            _ => InvoiceEvent::LineSold { line },
        }))
    }

    /// Whether a line with this header is one of this invoice's. Not to the minute: a long invoice takes some to write.
    fn belongs(&self, found: &Header, line: u32) -> Result<(), InvoiceError> {
        let Some(expected) = &self.header else { return Err(InvoiceError::NotOpened { line }) };
        if found.country != expected.country {
            let (found, expected) = (found.country.clone(), expected.country.clone());
            return Err(InvoiceError::OtherCountry { line, found, expected });
        }
        if found.customer != expected.customer {
            let (found, expected) = (found.customer.clone(), expected.customer.clone());
            return Err(InvoiceError::OtherCustomer { line, found, expected });
        }
        if found.date.date() != expected.date.date() {
            return Err(InvoiceError::OtherDay { line, found: found.date, expected: expected.date });
        }
        Ok(())
    }
}
