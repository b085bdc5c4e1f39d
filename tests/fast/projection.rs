//! Projections over decoded events: sets, filters, decode errors and registration.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sqlx::{SqliteConnection, SqlitePool};
use storied::event::{Category, DecodeErrorKind};
use storied::projection::{
    ApplyError, FailurePolicy, InMemory, InMemoryIndex, PerTarget, ProjectionState, UnknownNames,
};
use storied::runtime::StartError;
use storied::store::{Append, FilterError};
use storied::{
    AnyEvent, EncodeError, Event, EventDecoder, EventName, EventSet, EventStore, ExpectedVersion, Filter,
    MemoryStore, Metadata, NewEvent, Position, Projection, ProjectionOptions, ReadLog, RecordedEvent,
    Runtime, SqliteReadModel, StreamId,
};

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OrderEvent {
    Placed { pence: i64 },
    Settled,
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "order";
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PaymentEvent {
    #[serde(alias = "received")]
    Paid {
        pence: i64,
    },
    Settled,
}

impl Event for PaymentEvent {
    const CATEGORY: &'static str = "payment";
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StockEvent {
    Counted,
}

impl Event for StockEvent {
    const CATEGORY: &'static str = "stock";
}

// docs/guide.md has this enum and its set.
#[derive(Debug, PartialEq)]
enum Input {
    Order(OrderEvent),
    Payment(PaymentEvent),
}

impl EventSet for Input {
    fn decoder() -> EventDecoder<Self> {
        EventDecoder::new().with(Input::Order).with(Input::Payment)
    }
}

/// Two types of one category: which of them decodes an event is unclear.
struct Twice;

impl EventSet for Twice {
    fn decoder() -> EventDecoder<Self> {
        EventDecoder::new().with(|_: OrderEvent| Self).with(|_: OrderEvent| Self)
    }
}

/// An event type that has no variants.
#[derive(Serialize, Deserialize)]
struct NoEnum {
    a: u32,
}

impl Event for NoEnum {
    const CATEGORY: &'static str = "no_enum";
}

type Seen<E> = Arc<Mutex<Vec<(Position, E)>>>;

/// Records the decoded events.
struct Recorder<E> {
    seen: Seen<E>,
    filter: Filter,
}

impl<E: EventSet> Projection for Recorder<E> {
    const NAME: &'static str = "recorder";
    type Event = E;
    type Transaction = ();

    fn filter(&self) -> Filter {
        self.filter.clone()
    }

    async fn apply(&mut self, event: E, recorded: &RecordedEvent, (): &mut ()) -> Result<(), ApplyError> {
        self.seen.lock().unwrap().push((recorded.position, event));
        Ok(())
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        self.seen.lock().unwrap().clear();
        Ok(())
    }
}

fn encoded(event: &impl Event) -> NewEvent {
    NewEvent::encode(event, storied::Codec::Cbor, &Metadata::default()).unwrap()
}

async fn append(store: &MemoryStore, category: &str, event: NewEvent) -> Position {
    let stream = StreamId::new(category, 1).unwrap();
    let append = Append::one(stream, ExpectedVersion::Any, vec![event]);
    store.append(vec![append]).await.remove(0).unwrap().positions[0]
}

/// A log with events of the two types of [`Input`], and one of another type.
async fn mixed() -> MemoryStore {
    let store = MemoryStore::new();
    append(&store, "order", encoded(&OrderEvent::Placed { pence: 5 })).await;
    append(&store, "stock", encoded(&StockEvent::Counted)).await;
    append(&store, "payment", encoded(&PaymentEvent::Paid { pence: 5 })).await;
    let old = EventName::new("payment.received").unwrap();
    append(&store, "payment", NewEvent { name: old, ..encoded(&PaymentEvent::Paid { pence: 7 }) }).await;
    append(&store, "order", encoded(&OrderEvent::Settled)).await;
    append(&store, "payment", encoded(&PaymentEvent::Settled)).await;
    store
}

/// Returns what a projection with this filter receives.
async fn received<E: EventSet>(store: &MemoryStore, filter: Filter) -> Vec<(Position, E)> {
    let seen = Seen::default();
    let recorder = Recorder { seen: seen.clone(), filter };
    let runtime =
        Runtime::builder().store(store.clone()).projection(recorder, InMemory::new()).start().await.unwrap();
    runtime.projection("recorder").unwrap().wait_until_caught_up(PATIENCE).await.unwrap();
    runtime.shutdown().await.unwrap();
    std::mem::take(&mut *seen.lock().unwrap())
}

fn placed(pence: i64) -> Input {
    Input::Order(OrderEvent::Placed { pence })
}

fn paid(pence: i64) -> Input {
    Input::Payment(PaymentEvent::Paid { pence })
}

#[tokio::test]
async fn events_of_several_types_arrive_decoded() {
    let (store, at) = (mixed().await, Position::new);
    let [order, payment] = [Input::Order(OrderEvent::Settled), Input::Payment(PaymentEvent::Settled)];
    let all = [(at(1), placed(5)), (at(3), paid(5)), (at(4), paid(7)), (at(5), order), (at(6), payment)];
    assert_eq!(received::<Input>(&store, Filter::of::<Input>()).await, all);
    // The filter narrows the set, which has no stock.
    assert_eq!(received::<Input>(&store, Filter::all()).await, all);

    let variants = Filter::variants::<Input>(["placed", "payment.settled"]);
    let [order, payment] = [(at(1), placed(5)), (at(6), Input::Payment(PaymentEvent::Settled))];
    assert_eq!(received::<Input>(&store, variants).await, [order, payment]);
    // The name without its category means the variants of both types.
    let settled = received::<Input>(&store, Filter::variants::<Input>(["settled"])).await;
    assert_eq!(settled.iter().map(|(position, _)| position.get()).collect::<Vec<_>>(), [5, 6]);
    let orders = received::<Input>(&store, Filter::of::<OrderEvent>()).await;
    assert_eq!(orders.iter().map(|(position, _)| position.get()).collect::<Vec<_>>(), [1, 5]);
    let names: Vec<String> = vec!["paid".into()];
    let payments = received::<Input>(&store, Filter::variants::<PaymentEvent>(&names)).await;
    assert_eq!(payments, [(at(3), paid(5)), (at(4), paid(7))]);
}

#[tokio::test]
async fn any_event_stands_for_every_event() {
    let store = mixed().await;
    assert_eq!(Filter::of::<AnyEvent>(), Filter::all());
    let all = received::<AnyEvent>(&store, Filter::of::<AnyEvent>()).await;
    assert_eq!(all.iter().map(|(position, _)| position.get()).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    let stock = received::<AnyEvent>(&store, Filter::of::<StockEvent>()).await;
    assert_eq!(stock.len(), 1);
}

#[tokio::test]
async fn recorded_events_decode_as_a_set() {
    let page = mixed().await.read_log(ReadLog::after(Position::START)).await.unwrap();
    assert_eq!(page.events[0].decode::<Input>().unwrap(), placed(5));
    let error = page.events[1].decode::<Input>().unwrap_err();
    assert_eq!(error.kind, DecodeErrorKind::OtherCategory { expected: vec!["order", "payment"] });
    assert!(error.to_string().ends_with(r#"the requested types have the categories ["order", "payment"]"#));
    let error = page.events[1].decode::<OrderEvent>().unwrap_err();
    assert!(error.to_string().ends_with(r#"the requested type has category "order""#), "{error}");
}

/// Starts a projection with this filter; returns its error.
async fn refused<E: EventSet>(filter: Filter) -> FilterError {
    let seen = Seen::default();
    let builder = Runtime::builder().store(MemoryStore::new());
    let started = builder.projection(Recorder::<E> { seen, filter }, InMemory::new()).start().await;
    let error = started.unwrap_err();
    let StartError::Filter { name, error: found } = &error else { panic!("{error}") };
    assert_eq!(name, "recorder");
    assert_eq!(error.to_string(), format!("invalid filter of projection \"recorder\": {found}"));
    found.clone()
}

/// Every constructor keeps its error, and `start` reports it with the name of the projection.
#[tokio::test]
async fn an_invalid_filter_is_reported_at_the_start() {
    let error = refused::<AnyEvent>(Filter::of::<NoEnum>()).await;
    assert!(matches!(error, FilterError::Events(EncodeError::NoEnum { .. })), "{error:?}");
    assert!(error.to_string().starts_with("fast::projection::NoEnum cannot be an event: "), "{error}");
    assert_eq!(refused::<NoEnum>(Filter::all()).await, error);
    assert_eq!(refused::<AnyEvent>(Filter::variants::<NoEnum>(["a"])).await, error);

    let error = refused::<OrderEvent>(Filter::variants::<OrderEvent>(["placed", "payed"])).await;
    assert_eq!(
        error.to_string(),
        "fast::projection::OrderEvent has no variant \"payed\"; it has placed, settled"
    );
    let error = refused::<Input>(Filter::variants::<Input>(["stock.counted"])).await;
    let known = "Input has no variant \"stock.counted\"; it has paid, placed, received, settled";
    assert!(error.to_string().ends_with(known), "{error}");
    let error = refused::<AnyEvent>(Filter::variants::<AnyEvent>(["placed"])).await;
    assert!(error.to_string().ends_with("AnyEvent has no variant \"placed\"; it has none"), "{error}");

    let error = refused::<AnyEvent>(Filter::all().category("or der")).await;
    assert!(matches!(error, FilterError::Name(_)), "{error:?}");
    assert!(error.to_string().starts_with("invalid category \"or der\": invalid character; use "), "{error}");

    let error = refused::<Twice>(Filter::of::<Twice>()).await;
    assert_eq!(
        error.to_string(),
        "two event types of fast::projection::Twice have category \"order\"; list one type per category"
    );

    let stream = StreamId::new("stock", 7).unwrap();
    for (filter, condition) in [
        (Filter::of::<StockEvent>(), "category stock"),
        (Filter::variants::<StockEvent>(["counted"]), "stock.counted"),
        // The category of another type that begins with that of the set.
        (Filter::all().with_names([EventName::new("order.item.added").unwrap()]), "order.item.added"),
        (Filter::all().with_streams([stream]), "stream stock/7"),
        (
            Filter::all().with_categories(["order", "stock"].map(|it| Category::new(it).unwrap())),
            "category stock",
        ),
    ] {
        let text = format!(
            "{condition} does not belong to fast::projection::Input; add its event type to the set, or remove it from the filter"
        );
        assert_eq!(refused::<Input>(filter).await.to_string(), text);
    }
}

#[tokio::test]
async fn an_invalid_filter_of_an_index_is_reported_at_the_start() {
    for (filter, text) in [
        (Filter::variants::<OrderEvent>(["payed"]), "has no variant \"payed\""),
        (Filter::of::<StockEvent>(), "category stock does not belong to"),
    ] {
        let index = InMemoryIndex::new("orders", |count: &mut u64, _: OrderEvent, _| {
            *count += 1;
            Ok(())
        });
        let builder = Runtime::builder().store(MemoryStore::new()).in_memory_index(&index.filter(filter));
        let error = builder.start().await.unwrap_err();
        assert!(matches!(&error, StartError::Filter { name, .. } if name == "orders"), "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[tokio::test]
async fn an_index_receives_the_decoded_events_of_its_filter() {
    let pence = |sums: &mut Vec<i64>, event, recorded: &RecordedEvent| {
        let (Input::Order(OrderEvent::Placed { pence }) | Input::Payment(PaymentEvent::Paid { pence })) =
            event
        else {
            return Err("no amount".into());
        };
        assert!(recorded.position > Position::START);
        sums.push(pence);
        Ok(())
    };
    let all = InMemoryIndex::new("amounts", pence).filter(Filter::variants::<Input>(["placed", "paid"]));
    let runtime = Runtime::builder().store(mixed().await).in_memory_index(&all).start().await.unwrap();
    all.ready(PATIENCE).await.unwrap();
    assert_eq!(all.read(Clone::clone), [5, 5, 7]);
    runtime.shutdown().await.unwrap();
}

/// An invalid filter matches nothing, instead of everything.
#[tokio::test]
async fn an_invalid_filter_matches_nothing() {
    let filter = Filter::all().category("or der");
    let page = mixed().await.read_log(ReadLog::after(Position::START)).await.unwrap();
    assert!(page.events.iter().all(|event| Filter::all().matches(event) && !filter.matches(event)));
}

#[tokio::test]
async fn an_event_that_does_not_decode_is_parked_with_its_reason() {
    let store = mixed().await;
    let garbage = NewEvent { payload: Bytes::from_static(&[0xff]), ..encoded(&OrderEvent::Settled) };
    let bad = append(&store, "order", garbage).await;
    let unknown = EventName::new("payment.unheard_of").unwrap();
    let strange =
        append(&store, "payment", NewEvent { name: unknown, ..encoded(&PaymentEvent::Settled) }).await;
    let last = append(&store, "order", encoded(&OrderEvent::Settled)).await;
    for (policy, expected, skipped) in
        [(UnknownNames::Fail, vec![bad, strange], 0), (UnknownNames::Skip, vec![bad], 1)]
    {
        let seen = Seen::default();
        let recorder = Recorder::<Input> { seen: seen.clone(), filter: Filter::of::<Input>() };
        let options = ProjectionOptions::new().on_failure(FailurePolicy::Park).unknown_names(policy);
        let builder = Runtime::builder().store(store.clone());
        let runtime = builder.projection_with(recorder, InMemory::new(), options).start().await.unwrap();
        let handle = runtime.projection("recorder").unwrap().clone();
        handle.caught_up_to_within(last, PATIENCE).await.unwrap();
        let parked = handle.parked(10).await.unwrap();
        assert_eq!(parked.iter().map(|event| event.position).collect::<Vec<_>>(), expected);
        // A retry cannot succeed, so there was none.
        assert!(parked.iter().all(|event| event.attempts == 1), "{parked:?}");
        let reason =
            "reading event order.settled (version 3 of order/1) failed: the payload does not decode: ";
        assert!(parked[0].error.starts_with(reason), "{}", parked[0].error);
        if let Some(strange) = parked.get(1) {
            let reason = "reading event payment.unheard_of (version 4 of payment/1) failed: the event type has no variant";
            assert!(strange.error.starts_with(reason), "{}", strange.error);
        }
        assert_eq!(handle.status().events_skipped, skipped);
        assert_eq!(seen.lock().unwrap().len(), 6);
        runtime.shutdown().await.unwrap();
    }
    // By default, the projection stops before the event.
    let recorder = Recorder::<Input> { seen: Seen::default(), filter: Filter::of::<Input>() };
    let builder = Runtime::builder().store(store.clone());
    let runtime = builder.projection(recorder, InMemory::new()).start().await.unwrap();
    let handle = runtime.projection("recorder").unwrap().clone();
    let error = handle.caught_up_to_within(last, PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains("the payload does not decode"), "{error}");
    assert_eq!(handle.status().state, ProjectionState::Failed);
    runtime.shutdown().await.unwrap();
}

/// Writes to one table, whatever its partition and version.
struct Rows;

impl Projection for Rows {
    const NAME: &'static str = "rows";
    type Event = Input;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        _: Input,
        recorded: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        let position = i64::try_from(recorded.position.get())?;
        sqlx::query("INSERT INTO rows VALUES (?)").bind(position).execute(tx).await?;
        Ok(())
    }
}

#[tokio::test]
async fn partitions_need_an_instance_for_each() {
    let dir = tempfile::TempDir::new().unwrap();
    let url = format!("sqlite:{}?mode=rwc", dir.path().join("read.db").display());
    let pool = SqlitePool::connect(&url).await.unwrap();
    sqlx::query("CREATE TABLE rows (position INTEGER)").execute(&pool).await.unwrap();
    let store = mixed().await;
    let builder = || Runtime::builder().store(store.clone());
    for count in [1, 4] {
        let options = ProjectionOptions::new().partitions(count);
        let error =
            builder().projection_with(Rows, SqliteReadModel::new(pool.clone()), options).start().await;
        let error = error.unwrap_err();
        assert!(matches!(error, StartError::Partitions { partitions, .. } if partitions == count), "{error}");
        assert_eq!(
            error.to_string(),
            format!(
                "projection \"rows\" cannot have {count} partitions: it has a single instance; register PerTarget::new(…), which creates an instance for each partition"
            )
        );
    }
    let options = ProjectionOptions::new().partitions(4);
    let rows = PerTarget::new(|_| Rows);
    let builder = builder().projection_with(rows, SqliteReadModel::new(pool.clone()), options);
    let runtime = builder.start().await.unwrap();
    runtime.projection("rows").unwrap().wait_until_caught_up(PATIENCE).await.unwrap();
    assert_eq!(runtime.projection("rows").unwrap().status().partitions.len(), 4);
    runtime.shutdown().await.unwrap();
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM rows").fetch_one(&pool).await.unwrap();
    assert_eq!(count, 5);
}
