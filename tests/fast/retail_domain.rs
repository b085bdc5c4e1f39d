//! The decisions of the invoices of examples/retail, and the places of malformed rows. No runtime.

#[path = "../../examples/retail/domain.rs"]
#[allow(dead_code, reason = "some items are for the projections only")]
mod domain;
#[path = "../../examples/retail/rows.rs"]
mod rows;

use chrono::NaiveDateTime;
use domain::InvoiceCommand::{AddLine, Open};
use domain::InvoiceEvent::{
    CreditNoteOpened, LineCredited, LineGivenAway, LineReturned, LineSold, LineWrittenOff, Opened,
    OpenedForGuest,
};
use domain::{Header, Invoice, InvoiceError, InvoiceEvent, Line};
use rows::{Row, RowError, Rows};
use rust_decimal::Decimal;
use storied::testing::{Given, given};

fn date(text: &str) -> NaiveDateTime {
    text.parse().unwrap()
}

fn decimal(text: &str) -> Decimal {
    text.parse().unwrap()
}

fn header() -> Header {
    Header {
        customer: Some("17850".into()),
        country: "United Kingdom".into(),
        date: date("2010-12-01T08:26:00"),
    }
}

fn guest() -> Header {
    Header { customer: None, ..header() }
}

fn line(quantity: i64, price: &str) -> Line {
    Line {
        number: 1,
        stock_code: "85123A".into(),
        description: "WHITE HANGING HEART T-LIGHT HOLDER".into(),
        quantity,
        unit_price: decimal(price),
    }
}

fn invoice(events: impl IntoIterator<Item = InvoiceEvent>) -> Given<Invoice> {
    given(events).id("536365")
}

fn credit_note(events: impl IntoIterator<Item = InvoiceEvent>) -> Given<Invoice> {
    given(events).id("C536379")
}

#[test]
fn an_invoice_is_opened_for_a_customer_or_a_guest() {
    invoice([]).when(Open { header: header() }).then([Opened { header: header() }]);
    invoice([]).when(Open { header: guest() }).then([OpenedForGuest { header: guest() }]);
}

#[test]
fn a_credit_note_needs_no_invoice_that_it_is_for() {
    credit_note([]).when(Open { header: header() }).then([CreditNoteOpened { header: header() }]);
    credit_note([]).when(Open { header: guest() }).then([CreditNoteOpened { header: guest() }]);
}

#[test]
fn opening_is_idempotent_and_another_customer_is_refused() {
    let opened = [Opened { header: header() }];
    invoice(opened.clone()).when(Open { header: header() }).then_nothing();
    invoice(opened)
        .when(Open { header: guest() })
        .then_error(InvoiceError::OpenedBefore { before: header() });
}

#[test]
fn each_kind_of_line_is_an_event_of_its_own() {
    for (line, event) in [
        (line(6, "2.55"), LineSold { line: line(6, "2.55") }),
        (line(56, "0.0"), LineGivenAway { line: line(56, "0.0") }),
        (line(-2, "2.55"), LineReturned { line: line(-2, "2.55") }),
        (line(-10, "0"), LineWrittenOff { line: line(-10, "0") }),
    ] {
        let opened = [Opened { header: header() }];
        invoice(opened).when(AddLine { header: header(), line }).then([event]);
    }
    for price in ["27.5", "0"] {
        let opened = [CreditNoteOpened { header: header() }];
        let back = line(-1, price);
        credit_note(opened)
            .when(AddLine { header: header(), line: back.clone() })
            .then([LineCredited { line: back }]);
    }
}

#[test]
fn a_line_is_taken_once_and_not_changed() {
    let sold = || invoice([Opened { header: header() }, LineSold { line: line(6, "2.55") }]);
    sold().when(AddLine { header: header(), line: line(6, "2.550") }).then_nothing();
    sold()
        .when(AddLine { header: header(), line: line(7, "2.55") })
        .then_error(InvoiceError::OtherLine { before: line(6, "2.55") });
    // The same article again is another line.
    let second = Line { number: 2, ..line(6, "2.55") };
    sold().when(AddLine { header: header(), line: second.clone() }).then([LineSold { line: second }]);
}

#[test]
fn a_line_must_be_the_invoices_own() {
    let opened = || invoice([Opened { header: header() }]);
    let line = line(6, "2.55");
    let add = |header| AddLine { header, line: line.clone() };
    invoice([]).when(add(header())).then_error(InvoiceError::NotOpened { line: 1 });
    opened().when(add(Header { country: "France".into(), ..header() })).then_error(
        InvoiceError::OtherCountry { line: 1, found: "France".into(), expected: "United Kingdom".into() },
    );
    opened().when(add(guest())).then_error(InvoiceError::OtherCustomer {
        line: 1,
        found: None,
        expected: header().customer,
    });
    let next_day = date("2010-12-02T08:26:00");
    opened().when(add(Header { date: next_day, ..header() })).then_error(InvoiceError::OtherDay {
        line: 1,
        found: next_day,
        expected: header().date,
    });
    // Invoice 536591 of the file took from 16:57 to 16:58 to write.
    let minute_later = Header { date: date("2010-12-01T08:27:00"), ..header() };
    opened().when(add(minute_later)).then([LineSold { line: line.clone() }]);
}

#[test]
fn invalid_values_are_refused() {
    let add = |line| AddLine { header: header(), line };
    let opened = || invoice([Opened { header: header() }]);
    opened().when(add(line(0, "2.55"))).then_error(InvoiceError::NoQuantity { line: 1 });
    credit_note([CreditNoteOpened { header: header() }])
        .when(add(line(3, "2.55")))
        .then_error(InvoiceError::NothingCredited { line: 1, quantity: 3 });
    for price in ["-1", "1000000.01", "0.00001"] {
        let refusal = InvoiceError::OddPrice { line: 1, price: decimal(price) };
        opened().when(add(line(6, price))).then_error(refusal);
    }
    for quantity in [1_000_001, -1_000_001, i64::MIN, i64::MAX] {
        opened().when(add(line(quantity, "1"))).then_error(InvoiceError::OddQuantity { line: 1, quantity });
    }
    let most = line(1_000_000, "1000000.0000");
    assert_eq!(most.amount(), decimal("1000000000000"));
    opened().when(add(most.clone())).then([LineSold { line: most }]);
}

#[test]
fn events_keep_their_names() {
    let names = InvoiceEvent::LINES;
    let filter = storied::Filter::variants::<InvoiceEvent>(names);
    filter.check().unwrap();
    assert_eq!(filter.names().unwrap().len(), names.len());
}

const HEAD: &str = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country";
const GOOD: &str = "536365,71053,WHITE METAL LANTERN,6,2010-12-01 08:26:00,3.39,17850.0,United Kingdom";

/// Returns the rows before the first malformed one, and its error without the file name.
fn read(content: impl AsRef<[u8]>) -> (Vec<Row>, Option<String>) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("rows.csv");
    std::fs::write(&file, content).unwrap();
    let said = |error: RowError| error.to_string().replace(&*file.to_string_lossy(), "");
    let rows = match Rows::open(&file) {
        Ok(rows) => rows,
        Err(error) => return (Vec::new(), Some(said(error))),
    };
    let mut good = Vec::new();
    for row in rows {
        match row {
            Ok(row) => good.push(row),
            Err(error) => return (good, Some(said(error))),
        }
    }
    (good, None)
}

#[test]
fn rows_are_read_as_they_are() {
    let (rows, error) =
        read(format!("{HEAD}\r\n{GOOD}\r\n\r\nC1,D,\"a \"\"b\"\", c\nd\",-1,2010-12-01 09:41:00,0.0,,EIRE"));
    assert_eq!((rows.len(), error), (2, None));
    assert_eq!((&*rows[0].invoice, rows[0].customer.as_deref()), ("536365", Some("17850")));
    let row = Row {
        invoice: "C1".into(),
        stock_code: "D".into(),
        description: "a \"b\", c\nd".into(),
        quantity: -1,
        date: date("2010-12-01T09:41:00"),
        unit_price: decimal("0"),
        customer: None,
        country: "EIRE".into(),
    };
    assert_eq!(rows[1], row);
    let (rows, error) = read(format!("{},{HEAD}\n1,{GOOD}\n", "More"));
    assert_eq!((rows.len(), &*rows[0].stock_code, error), (1, "71053", None));
    assert_eq!(read(HEAD), (vec![], None));
}

#[test]
fn a_malformed_row_is_reported_with_its_place() {
    let quoted = r#"536365,1,"RED, ""BIG"" SPOT é",six,2010-12-01 08:26:00,3.39,17850.0,EIRE"#;
    let two_lines = "536365,1,\"RED\nSPOT\",6,2010-12-01 08:26:00,3.39,17850.0,";
    for (bad, place, what) in [
        (GOOD.replace(",6,", ",six,").as_str(), "0:34", "Quantity \"six\" is not a whole number"),
        (GOOD.replace(",6,", ",6.5,").as_str(), "0:34", "Quantity \"6.5\" is not a whole number"),
        (GOOD.replace(",6,", ",99999999999999999999,").as_str(), "0:34", "is not a whole number"),
        (GOOD.replace(",6,", ",,").as_str(), "0:34", "Quantity is empty"),
        (quoted, "0:32", "Quantity \"six\""),
        (
            GOOD.replace("2010-12-01 08:26:00", "2010-12-32 08:26:00").as_str(),
            "0:36",
            "InvoiceDate \"2010-12-32 08:26:00\" is not a date",
        ),
        (GOOD.replace("3.39", "3.39 GBP").as_str(), "0:56", "UnitPrice \"3.39 GBP\" is not a decimal number"),
        (GOOD.replace("3.39", "0.12345678901234567890123456789").as_str(), "0:56", "is not a decimal number"),
        (GOOD.replace("536365", "").as_str(), "0:1", "InvoiceNo is empty"),
        (two_lines, "1:42", "Country is empty"),
        (GOOD.replace(",United Kingdom", "").as_str(), "0:68", "the row has 7 columns instead of 8"),
        (format!("{GOOD},more").as_str(), "0:84", "the row has 9 columns instead of 8"),
        (GOOD.replace("WHITE", "\"WHITE").as_str(), "0:", "columns instead of 8"),
    ] {
        for (end, blank) in [("\n", 0), ("\r\n", 0), ("\n\n", 1), ("\r\n\r\n\r\n", 2)] {
            let (good, error) = read(format!("{HEAD}{end}{GOOD}{end}{bad}{end}{GOOD}{end}"));
            let (lines, column) = place.split_once(':').unwrap();
            let line = 3 + 2 * blank + lines.parse::<usize>().unwrap();
            let error = error.unwrap();
            assert_eq!(good.len(), 1, "{bad}");
            assert!(
                error.starts_with(&format!(":{line}:{column}")) && error.contains(what),
                "{bad:?} {end:?}: {error}"
            );
        }
    }
    let (_, error) = read([HEAD.as_bytes(), b"\n536365,71053,WHITE \xa3,6"].concat());
    assert!(error.unwrap().starts_with(":2:"), "not enough columns");
    let latin = GOOD.replace("METAL", "£");
    let latin: Vec<u8> = latin.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
    let (_, error) = read([HEAD.as_bytes(), b"\n", &latin].concat());
    assert!(
        error.as_deref().unwrap().contains(":2:14: Description") && error.unwrap().contains("is not UTF-8")
    );
    let (_, error) = read(HEAD.replace("UnitPrice", "Price"));
    assert_eq!(error.unwrap(), ":1:1: the file has no column UnitPrice");
    let (_, error) = read("");
    assert_eq!(error.unwrap(), ":1:1: the file has no column InvoiceNo");
}
