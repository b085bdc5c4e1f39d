//! An aggregate that records its reminders, and a handler that tests can hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use storied::command::{HandleError, Handler, HandlerContext};
use storied::{Aggregate, Context, Decided, Event, EventStore, Filter, NeverRejects, Position, ReadLog};
use tokio::sync::watch;

/// Number of panics of invoices in this process.
pub static PANICS: AtomicU64 = AtomicU64::new(0);

#[derive(Default)]
pub struct Invoice {
    pub paid: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InvoiceEvent {
    Reminded { text: String },
    Paid {},
}

impl Event for InvoiceEvent {
    const CATEGORY: &'static str = "invoice";
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("the invoice is paid")]
pub struct IsPaid;

impl Aggregate for Invoice {
    type Event = InvoiceEvent;
    type Command = InvoiceEvent;
    type Reply = ();
    type Error = IsPaid;

    fn handle(&self, command: &InvoiceEvent, _: &Context<'_>) -> Decided<Self> {
        match command {
            InvoiceEvent::Reminded { .. } if self.paid => Err(IsPaid),
            InvoiceEvent::Reminded { text } if text == "panic" => {
                PANICS.fetch_add(1, Ordering::AcqRel);
                panic!("as commanded")
            }
            event => Ok(event.clone().into()),
        }
    }

    fn apply(&mut self, event: &InvoiceEvent) {
        self.paid |= matches!(event, InvoiceEvent::Paid {});
    }
}

pub fn reminder(text: &str) -> InvoiceEvent {
    InvoiceEvent::Reminded { text: text.into() }
}

/// Returns the reminders of the log: the id of the invoice, and the text.
pub async fn reminders(store: &dyn EventStore) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(ReadLog::after(after).filter(Filter::of::<InvoiceEvent>())).await.unwrap();
        for event in &page.events {
            if let InvoiceEvent::Reminded { text } = event.decode::<InvoiceEvent>().unwrap() {
                found.push((event.stream.id().to_owned(), text));
            }
        }
        after = page.scanned_to;
        if !page.has_more() {
            return found;
        }
    }
}

/// A handler that tests can hold.
#[derive(Clone, Default)]
pub struct Closing {
    held: watch::Sender<bool>,
    calls: Arc<AtomicU64>,
}

impl Closing {
    pub fn hold(&self) {
        self.held.send_replace(true);
    }

    pub fn release(&self) {
        self.held.send_replace(false);
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Acquire)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Close;

impl Handler for Closing {
    const NAME: &'static str = "closing";
    type Command = Close;
    type Reply = ();
    type Error = NeverRejects;

    async fn handle(&self, _: &Close, _: &HandlerContext) -> Result<(), HandleError<NeverRejects>> {
        self.calls.fetch_add(1, Ordering::AcqRel);
        self.held.subscribe().wait_for(|held| !held).await.unwrap();
        Ok(())
    }
}
