//! The cost of payloads: an event is encoded, and decoded again before its append.

use std::hint::black_box;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use storied::{Codec, Event, Metadata, NewEvent};

use crate::args::Plan;
use crate::domain::text;
use crate::measure::{Comparison, Run};

/// Measures how fast an order of four lines is encoded for an append: written, read back, given an id.
///
/// The limit only writes, with the library that storied uses.
pub fn encode(plan: &Plan, codec: Codec) -> Comparison {
    let line = |n: u64| Line { sku: format!("sku-{n}"), quantity: 2, price: 1_299 + n };
    let event = OrderEvent::Placed {
        customer: "customer-17".into(),
        lines: (0..4).map(line).collect(),
        note: Some(text(plan.payload)),
    };
    let metadata = Metadata::default();
    let ours = time(plan, || {
        black_box(NewEvent::encode(black_box(&event), codec, &metadata).unwrap());
    });
    let limit = time(plan, || match codec {
        Codec::Json => drop(black_box(serde_json::to_vec(black_box(&event)).unwrap())),
        _ => {
            let mut bytes = Vec::with_capacity(128);
            ciborium::into_writer(black_box(&event), &mut bytes).unwrap();
            black_box(bytes);
        }
    });
    Comparison { ours, limit, note: "the limit only writes".into() }
}

fn time(plan: &Plan, encode: impl Fn()) -> Run {
    let start = Instant::now();
    (0..plan.events).for_each(|_| encode());
    Run::whole(plan.events, start.elapsed())
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OrderEvent {
    Placed { customer: String, lines: Vec<Line>, note: Option<String> },
}

#[derive(Serialize, Deserialize)]
struct Line {
    sku: String,
    quantity: u32,
    price: u64,
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "order";
}
