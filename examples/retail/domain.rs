//! Invoices and their decisions. All oddities of the real data are handled here, and only here.

use std::collections::HashMap;

use chrono::NaiveDateTime;
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use storied::{Aggregate, Context, Decided, Decision, Event};

/// Above this a line is a typing error. The limit also keeps every amount far from an overflow.
const MOST_UNITS: u64 = 1_000_000;
const HIGHEST_PRICE: Decimal = Decimal::from_parts(1_000_000, 0, 0, false, 0);
/// Maximum number of decimals of a price. The read models count in units of the last decimal.
pub(crate) const PRICE_DECIMALS: u32 = 4;

/// The head of an invoice: customer, country and date. Each of its lines repeats it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Header {
    /// None for guests.
    pub(crate) customer: Option<String>,
    pub(crate) country: String,
    pub(crate) date: NaiveDateTime,
}

/// One line, with the sign of the paper: returned goods have a negative quantity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// 1, 2, 3 … within its invoice.
    pub(crate) number: u32,
    pub(crate) stock_code: String,
    pub(crate) description: String,
    pub(crate) quantity: i64,
    /// serde writes decimals as text, so the log has the exact values.
    pub(crate) unit_price: Decimal,
}

impl Line {
    pub(crate) fn amount(&self) -> Decimal {
        Decimal::from(self.quantity) * self.unit_price
    }
}

/// The commands of an invoice.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum InvoiceCommand {
    Open { header: Header },
    AddLine { header: Header, line: Line },
}

/// The events of an invoice.
///
/// The serde name of a variant is its name in the log: `invoice.line_sold`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum InvoiceEvent {
    /// The invoice bills a customer.
    Opened { header: Header },
    /// The invoice bills a guest without an account, or corrects the stock.
    OpenedForGuest { header: Header },
    /// The credit note takes goods back.
    ///
    /// It does not name the invoice that sold them, which is often older than the file. So it
    /// stands for itself, and its effect is that of its own lines.
    CreditNoteOpened { header: Header },
    /// Goods leave for money.
    LineSold { line: Line },
    /// Goods leave without payment.
    LineGivenAway { line: Line },
    /// Goods come back on a sales invoice, and are deducted from it.
    LineReturned { line: Line },
    /// Goods come back on a credit note.
    LineCredited { line: Line },
    /// Goods are lost, damaged or never existed: removed from the books, without money.
    LineWrittenOff { line: Line },
}

impl Event for InvoiceEvent {
    const CATEGORY: &'static str = "invoice";
}

impl InvoiceEvent {
    /// The variants about a line.
    pub(crate) const LINES: [&str; 5] =
        ["line_sold", "line_given_away", "line_returned", "line_credited", "line_written_off"];

    /// Returns the head of the invoice, if the event opens it.
    pub(crate) fn header(&self) -> Option<&Header> {
        match self {
            Self::Opened { header } | Self::OpenedForGuest { header } | Self::CreditNoteOpened { header } => {
                Some(header)
            }
            _ => None,
        }
    }

    /// Returns the line, if the event is about one. Revenue and units follow from any kind of line.
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

/// A rejection of an invoice: the command makes no sense in any reading.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum InvoiceError {
    #[error("the invoice is already open, for {} in {}", customer(&.before.customer), .before.country)]
    OpenedBefore { before: Header },
    #[error("line {line} is for an invoice that is not open")]
    NotOpened { line: u32 },
    #[error("line {line} is for {}, but the invoice is for {}", customer(.found), customer(.expected))]
    OtherCustomer { line: u32, found: Option<String>, expected: Option<String> },
    #[error("line {line} is for {found}, but the invoice is for {expected}")]
    OtherCountry { line: u32, found: String, expected: String },
    #[error("line {line} is of {found}, but the invoice is of {expected}")]
    OtherDay { line: u32, found: NaiveDateTime, expected: NaiveDateTime },
    #[error("line {} is on the invoice already, as {} × {} at {}", .before.number, .before.quantity, .before.stock_code, .before.unit_price)]
    OtherLine { before: Line },
    #[error("line {line} has the quantity 0")]
    NoQuantity { line: u32 },
    #[error("line {line} of a credit note must have a negative quantity, not {quantity}")]
    NothingCredited { line: u32, quantity: i64 },
    #[error(
        "line {line} has the price {price}; a price is 0 to {HIGHEST_PRICE} with at most {PRICE_DECIMALS} decimals"
    )]
    OddPrice { line: u32, price: Decimal },
    #[error("line {line} has the quantity {quantity} (limit {MOST_UNITS})")]
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

    fn handle(&self, command: &InvoiceCommand, context: &Context<'_>) -> Decided<Self> {
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
    fn open(&self, header: &Header, credit_note: bool) -> Decided<Self> {
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

    fn add_line(&self, header: &Header, line: &Line, credit_note: bool) -> Decided<Self> {
        self.belongs(header, line.number)?;
        match self.lines.get(&line.number) {
            // storied recognizes a repeated command within its window; the state of an invoice has
            // no limit.
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

    /// Checks that a line with this header belongs to this invoice.
    ///
    /// The minute may differ: long invoices take some.
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
