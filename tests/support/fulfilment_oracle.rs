//! What a log of fulfilments must look like, read without the code of processes.

use std::collections::{BTreeMap, BTreeSet};

use storied::store::ReadLog;
use storied::{EventStore, Filter, Position, RecordedEvent};

async fn log(store: &dyn EventStore) -> Vec<RecordedEvent> {
    let (mut events, mut after) = (Vec::new(), Position::START);
    loop {
        let read = ReadLog::after(after).filter(Filter::all()).limit(1_000);
        let Ok(page) = store.read_log(read).await else { return Vec::new() };
        if page.scanned_to == after {
            return events;
        }
        after = page.scanned_to;
        events.extend(page.events);
    }
}

fn json(event: &RecordedEvent) -> serde_json::Value {
    serde_json::to_value(event).unwrap()["payload"].clone()
}

/// Returns the number of instances that have ended.
pub async fn ended(store: &dyn EventStore) -> usize {
    let log = log(store).await;
    let ended = log.iter().filter(|event| event.name == "fulfilment.ended");
    ended.map(|event| event.stream.clone()).collect::<BTreeSet<_>>().len()
}

/// Checks every effect against the streams of its targets.
pub async fn check(store: &dyn EventStore) {
    let log = log(store).await;
    // Command ids of the targets' events, as often as they occur.
    let mut applied: BTreeMap<String, usize> = BTreeMap::new();
    let mut triggers: BTreeMap<String, usize> = BTreeMap::new();
    let (mut effects, mut settled) = (BTreeMap::new(), BTreeMap::new());
    let mut ended: BTreeMap<String, usize> = BTreeMap::new();
    let mut reserved: BTreeMap<String, i64> = BTreeMap::new();
    for event in &log {
        let payload = json(event);
        match event.name.as_str() {
            "stock.reserved" | "stock.released" => {
                *applied.entry(event.command_id.to_string()).or_default() += 1;
                let change = if event.name == "stock.reserved" { 1 } else { -1 };
                *reserved.entry(event.stream.to_string()).or_default() += change;
            }
            "fulfilment.effect" => {
                let id = uuid_of(&payload["id"]);
                assert!(effects.insert(id.clone(), event.stream.clone()).is_none(), "effect {id} twice");
            }
            "fulfilment.input" => {
                let source = &payload["source"];
                let id = uuid_of(&payload["id"]);
                if source.get("event").is_some() {
                    *triggers.entry(format!("{} {id}", event.stream)).or_default() += 1;
                } else {
                    let done = source.get("done").is_some();
                    assert!(settled.insert(id.clone(), done).is_none(), "effect {id} settled twice");
                }
            }
            "fulfilment.ended" => *ended.entry(event.stream.to_string()).or_default() += 1,
            name => assert!(!name.ends_with("parked"), "{} is parked: {payload}", event.stream),
        }
    }
    assert!(triggers.values().all(|count| *count == 1), "an input was consumed twice");
    assert!(ended.values().all(|count| *count == 1), "an instance has ended twice");
    assert!(applied.keys().all(|id| effects.contains_key(id)), "a command without an effect");
    for (id, stream) in &effects {
        let done = settled.get(id).unwrap_or_else(|| panic!("effect {id} of {stream} is open"));
        let expected = usize::from(*done);
        assert_eq!(applied.get(id).copied().unwrap_or(0), expected, "effect {id} of {stream}");
    }
    assert!(reserved.values().all(|reserved| (0..=2).contains(reserved)), "{reserved:?}");
    let refused = settled.values().filter(|done| !**done).count();
    assert!(refused > 0 && refused < effects.len(), "{refused} of {} refused", effects.len());
}

/// UUIDs are bytes in CBOR.
fn uuid_of(value: &serde_json::Value) -> String {
    let hex = value["$bytes"].as_str().unwrap();
    uuid::Uuid::parse_str(hex).unwrap().to_string()
}
