//! Decisions over several streams, on memory and SQLite.
//!
//! No decision is stored on a state that has changed, and each command takes effect once.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{FaultyStore, eventually_async};
use serde::{Deserialize, Serialize};
use storied::command::Receipt;
use storied::event::{DecodeErrorKind, InvalidTag, Tags};
use storied::projection::InMemoryIndex;
use storied::store::{Append, Query, StoreError};
use storied::testing::given_events;
use storied::{
    Aggregate, AnyEvent, Codec, CommandBus, Context, Decide, Decided, Decision, DecisionOf, EncodeError,
    Event, EventStore, ExecuteError, ExpectedVersion, MemoryStore, Metadata, NeverRejects, NewEvent,
    NotExecutedKind, Position, ReadLog, RecordedEvent, Runtime, SqliteStore, StreamId, Version, View,
};
use tempfile::TempDir;
use uuid::Uuid;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CourseEvent {
    Opened { course: String, seats: u32 },
    Resized { course: String, seats: u32 },
    Enrolled { course: String, student: String },
}

impl Event for CourseEvent {
    const CATEGORY: &'static str = "course";

    fn tags(&self) -> Tags {
        match self {
            Self::Opened { course, .. } | Self::Resized { course, .. } => Tags::new().tag("course", course),
            Self::Enrolled { course, student } => Tags::new().tag("course", course).tag("student", student),
        }
    }
}

/// An aggregate whose plain commands write tagged events.
#[derive(Default)]
struct Course {
    open: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum CourseCommand {
    Open { seats: u32 },
    Resize { seats: u32 },
}

impl Aggregate for Course {
    type Event = CourseEvent;
    type Command = CourseCommand;
    type Reply = ();
    type Error = NeverRejects;

    fn handle(&self, command: &CourseCommand, context: &Context<'_>) -> Decided<Self> {
        let course = context.id().to_owned();
        Ok(match *command {
            CourseCommand::Open { .. } if self.open => Decision::none(),
            CourseCommand::Open { seats } => CourseEvent::Opened { course, seats }.into(),
            CourseCommand::Resize { seats } => CourseEvent::Resized { course, seats }.into(),
        })
    }

    fn apply(&mut self, event: &CourseEvent) {
        self.open |= matches!(event, CourseEvent::Opened { .. });
    }
}

/// The seats of a course.
struct Seats {
    course: String,
    open: bool,
    seats: u32,
    taken: u32,
}

impl View for Seats {
    type Event = CourseEvent;

    fn query(&self) -> Query {
        Query::tagged("course", &self.course)
    }

    fn apply(&mut self, event: &CourseEvent) {
        match event {
            CourseEvent::Opened { seats, .. } => (self.open, self.seats) = (true, *seats),
            CourseEvent::Resized { seats, .. } => self.seats = *seats,
            CourseEvent::Enrolled { .. } => self.taken += 1,
        }
    }
}

/// The courses of a student.
struct Load {
    student: String,
    courses: u32,
}

impl View for Load {
    type Event = CourseEvent;

    fn query(&self) -> Query {
        Query::variants::<CourseEvent>(["enrolled"]).tag("student", &self.student)
    }

    fn apply(&mut self, _: &CourseEvent) {
        self.courses += 1;
    }
}

/// Enrols a student: a course has a number of seats, and a student at most 3 courses.
#[derive(Debug, Clone, Serialize)]
struct Enrol {
    course: String,
    student: String,
    /// Number of decisions.
    #[serde(skip)]
    attempts: Arc<AtomicU32>,
}

#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
enum EnrolError {
    #[error("there is no such course")]
    NoCourse,
    #[error("the course is full")]
    Full,
    #[error("the student has 3 courses")]
    Busy,
}

impl Decide for Enrol {
    const NAME: &'static str = "enrol";
    type View = (Seats, Load);
    type Event = CourseEvent;
    type Reply = u32; // the seats that are left
    type Error = EnrolError;

    fn view(&self) -> (Seats, Load) {
        let seats = Seats { course: self.course.clone(), open: false, seats: 0, taken: 0 };
        (seats, Load { student: self.student.clone(), courses: 0 })
    }

    fn stream(&self) -> String {
        self.course.clone()
    }

    fn decide(&self, (seats, load): &(Seats, Load), _: &Context<'_>) -> DecisionOf<Self> {
        self.attempts.fetch_add(1, Ordering::SeqCst);
        if !seats.open {
            return Err(EnrolError::NoCourse);
        }
        if seats.taken >= seats.seats {
            return Err(EnrolError::Full);
        }
        if load.courses >= 3 {
            return Err(EnrolError::Busy);
        }
        let (course, student) = (self.course.clone(), self.student.clone());
        let enrolled = CourseEvent::Enrolled { course, student };
        Ok(Decision::event(enrolled).reply(seats.seats - seats.taken - 1))
    }
}

fn enrol(course: impl Display, student: impl Display) -> Enrol {
    Enrol { course: course.to_string(), student: student.to_string(), attempts: Arc::default() }
}

fn opened(course: &str, seats: u32) -> CourseEvent {
    CourseEvent::Opened { course: course.into(), seats }
}

fn enrolled(course: &str, student: &str) -> CourseEvent {
    CourseEvent::Enrolled { course: course.into(), student: student.into() }
}

/// A decision that does as its fields say.
#[derive(Debug, Clone, Serialize)]
struct Probe {
    act: Act,
    topic: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
enum Act {
    Nothing,
    /// Writes an event with so many tags beside that of the topic.
    Note {
        tags: usize,
    },
    NoteWithLongTag,
    /// Writes an event that the view cannot fold.
    Poison,
    PanicInStream,
    PanicInView,
    PanicInDecide,
    QueryWithoutTag,
    QueryWithoutItem,
    QueryWithUnknownVariant,
    QueryWithManyItems,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ProbeEvent {
    Noted { topic: String, tags: Vec<String> },
    Poison { topic: String },
}

impl Event for ProbeEvent {
    const CATEGORY: &'static str = "probe";

    fn tags(&self) -> Tags {
        match self {
            Self::Noted { topic, tags } => {
                tags.iter().fold(Tags::new().tag("topic", topic), |all, tag| all.tag("more", tag))
            }
            Self::Poison { topic } => Tags::new().tag("topic", topic),
        }
    }
}

struct Notes {
    probe: Probe,
    count: u32,
}

impl View for Notes {
    type Event = ProbeEvent;

    fn query(&self) -> Query {
        let topic = Query::tagged("topic", &self.probe.topic);
        match self.probe.act {
            Act::QueryWithoutTag => Query::variants::<ProbeEvent>(["noted"]),
            Act::QueryWithoutItem => Query::any([]),
            Act::QueryWithUnknownVariant => Query::variants::<ProbeEvent>(["lost"]).tag("topic", "x"),
            Act::QueryWithManyItems => Query::any((0..17).map(|_| topic.clone())),
            _ => topic,
        }
    }

    fn apply(&mut self, event: &ProbeEvent) {
        match event {
            ProbeEvent::Noted { .. } => self.count += 1,
            ProbeEvent::Poison { .. } => panic!("cannot fold this"),
        }
    }
}

impl Decide for Probe {
    const NAME: &'static str = "probe";
    type View = Notes;
    type Event = ProbeEvent;
    type Reply = u32;
    type Error = NeverRejects;

    fn view(&self) -> Notes {
        assert!(self.act != Act::PanicInView, "no view");
        Notes { probe: self.clone(), count: 0 }
    }

    fn stream(&self) -> String {
        assert!(self.act != Act::PanicInStream, "no stream");
        self.topic.clone()
    }

    fn decide(&self, notes: &Notes, context: &Context<'_>) -> DecisionOf<Self> {
        assert!(context.new_id() != context.new_id());
        assert_eq!((context.id(), context.version()), (self.topic.as_str(), Version::NONE));
        let topic = self.topic.clone();
        let decision = match self.act {
            Act::Note { tags } => {
                let tags = (0..tags).map(|tag| tag.to_string()).collect();
                Decision::event(ProbeEvent::Noted { topic, tags })
            }
            Act::NoteWithLongTag => Decision::event(ProbeEvent::Noted { topic, tags: vec!["x".repeat(200)] }),
            Act::Poison => Decision::event(ProbeEvent::Poison { topic }),
            Act::PanicInDecide => panic!("no decision"),
            _ => Decision::none(),
        };
        Ok(decision.reply(notes.count))
    }
}

fn probe(act: Act, topic: &str) -> Probe {
    Probe { act, topic: topic.into() }
}

/// Two handles to one store, as two nodes have them: in memory, and on one SQLite file.
async fn pairs() -> (TempDir, Vec<[Arc<dyn EventStore>; 2]>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.db");
    let memory = MemoryStore::new();
    let memory: [Arc<dyn EventStore>; 2] = [Arc::new(memory.clone()), Arc::new(memory)];
    let open = async || SqliteStore::open(&path).await.unwrap();
    let sqlite: [Arc<dyn EventStore>; 2] = [Arc::new(open().await), Arc::new(open().await)];
    (directory, vec![memory, sqlite])
}

async fn node(store: &Arc<dyn EventStore>) -> Runtime {
    Runtime::builder().store(store.clone()).aggregate::<Course>().start().await.unwrap()
}

async fn faulty() -> (FaultyStore, Runtime) {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = Runtime::builder().store(store.clone()).aggregate::<Course>().start().await.unwrap();
    (store, runtime)
}

async fn open(runtime: &Runtime, course: impl Display, seats: u32) {
    runtime.execute::<Course>(course, CourseCommand::Open { seats }).await.unwrap();
}

/// Repeats a decision with its id until the answer is final.
async fn settled(runtime: &Runtime, decision: Enrol) -> Result<Receipt<u32>, ExecuteError<EnrolError>> {
    let id = Uuid::now_v7();
    loop {
        match runtime.decide(decision.clone()).command_id(id).await {
            Err(error) if error.is_transient() => tokio::time::sleep(Duration::from_millis(5)).await,
            answer => return answer,
        }
    }
}

/// Returns whether two receipts are of one command.
fn is_of(one: &Receipt<u32>, other: &Receipt<u32>) -> bool {
    let mut other = other.clone();
    other.duplicate = one.duplicate;
    *one == other
}

fn encoded(event: &impl Event) -> NewEvent {
    NewEvent::encode(event, Codec::Cbor, &Metadata::default()).unwrap()
}

/// Appends events of another writer, without the runtime.
async fn foreign(store: &dyn EventStore, stream: StreamId, events: Vec<NewEvent>) {
    store.append(vec![Append::one(stream, ExpectedVersion::Any, events)]).await.remove(0).unwrap();
}

async fn log(store: &dyn EventStore) -> Vec<RecordedEvent> {
    store.read_log(ReadLog::after(Position::START).limit(usize::MAX)).await.unwrap().events
}

/// Returns the number of enrolments in the log.
async fn enrolments(store: &dyn EventStore) -> usize {
    log(store).await.iter().filter(|event| event.name == "course.enrolled").count()
}

#[test]
fn decisions_are_tested_without_a_runtime() {
    given_events::<CourseEvent>([]).when(enrol("a", "ada")).then_error(EnrolError::NoCourse);
    let then = given_events([opened("a", 2), opened("b", 9), enrolled("b", "bob")])
        .when(enrol("a", "ada"))
        .then([enrolled("a", "ada")]);
    let then = then.past.when(enrol("a", "bob")).then([enrolled("a", "bob")]);
    then.past.when(enrol("a", "eve")).then_error(EnrolError::Full);
    assert_eq!(then.reply, 0);
    // Each view folds the events of its own query: other courses of Ada, other students of the course.
    let busy = given_events([opened("a", 9)]).and(["b", "c", "d"].map(|course| enrolled(course, "ada")));
    busy.clone().when(enrol("a", "ada")).then_error(EnrolError::Busy);
    assert_eq!(busy.when(enrol("a", "bob")).then([enrolled("a", "bob")]).reply, 8);
    let note = ProbeEvent::Noted { topic: "a".into(), tags: Vec::new() };
    let noted = given_events([opened("a", 9)]).and([note.clone(), note]);
    assert_eq!(noted.when(probe(Act::Nothing, "a")).then_nothing().reply, 2);
}

/// A tuple can contain tuples; a view over any event folds all that the decision reads.
#[test]
fn views_are_composed() {
    struct Everything {
        course: String,
        count: u32,
    }

    impl View for Everything {
        type Event = AnyEvent;

        fn query(&self) -> Query {
            Query::tagged("course", &self.course)
        }

        fn apply(&mut self, _: &AnyEvent) {
            self.count += 1;
        }
    }

    #[derive(Serialize)]
    struct Audit;

    impl Decide for Audit {
        const NAME: &'static str = "audit";
        type View = (Seats, (Load, Everything), Notes);
        type Event = CourseEvent;
        type Reply = (u32, u32, u32, u32);
        type Error = NeverRejects;

        fn view(&self) -> Self::View {
            let (seats, load) = enrol("a", "ada").view();
            let notes = probe(Act::Nothing, "a").view();
            (seats, (load, Everything { course: "a".into(), count: 0 }), notes)
        }

        fn stream(&self) -> String {
            "a".into()
        }

        fn decide(
            &self,
            (seats, (load, everything), notes): &Self::View,
            _: &Context<'_>,
        ) -> DecisionOf<Self> {
            Ok(Decision::none().reply((seats.taken, load.courses, everything.count, notes.count)))
        }
    }

    let note = ProbeEvent::Noted { topic: "a".into(), tags: Vec::new() };
    let then = given_events([opened("a", 9), enrolled("a", "bob"), enrolled("b", "ada"), opened("b", 1)])
        .and([note])
        .when(Audit)
        .then_nothing();
    assert_eq!(then.reply, (1, 1, 4, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_last_seats_are_given_once() {
    let (_directory, pairs) = pairs().await;
    for stores in pairs {
        let nodes = [node(&stores[0]).await, node(&stores[1]).await];
        open(&nodes[0], "c", 10).await;
        let callers: Vec<_> = (0..64)
            .map(|student| {
                let node = nodes[student % 2].clone();
                tokio::spawn(async move { settled(&node, enrol("c", student)).await })
            })
            .collect();
        let mut left = Vec::new();
        for caller in callers {
            match caller.await.unwrap() {
                Ok(receipt) => left.push(receipt.reply),
                Err(error) => assert_eq!(error.rejection(), Some(&EnrolError::Full), "{error}"),
            }
        }
        left.sort_unstable();
        assert_eq!(left, (0..10).collect::<Vec<u32>>(), "each seat once");
        assert_eq!(enrolments(&*stores[0]).await, 10);
        for node in nodes {
            node.shutdown().await.unwrap();
        }
    }
}

/// Students race for courses: neither a course nor a student has too many.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn decisions_over_two_streams_respect_both() {
    let (_directory, pairs) = pairs().await;
    for stores in pairs {
        let nodes = [node(&stores[0]).await, node(&stores[1]).await];
        for course in 0..6 {
            open(&nodes[0], course, 5).await;
        }
        let callers: Vec<_> = (0..72)
            .map(|caller| {
                let node = nodes[caller % 2].clone();
                let decision = enrol(caller % 6, format!("s{}", caller / 6 % 9));
                tokio::spawn(async move { settled(&node, decision).await })
            })
            .collect();
        for caller in callers {
            if let Err(error) = caller.await.unwrap() {
                assert!(matches!(error.rejection(), Some(EnrolError::Full | EnrolError::Busy)), "{error}");
            }
        }
        let mut courses = BTreeMap::<String, u32>::new();
        let mut students = courses.clone();
        for event in log(&*stores[0]).await {
            if let CourseEvent::Enrolled { course, student } = event.decode().unwrap() {
                *courses.entry(course).or_default() += 1;
                *students.entry(student).or_default() += 1;
            }
        }
        assert!(courses.values().all(|taken| *taken <= 5), "{courses:?}");
        assert!(students.values().all(|courses| *courses <= 3), "{students:?}");
        // 9 students want 3 of 30 seats each.
        assert!(students.values().sum::<u32>() >= 15, "{students:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn decisions_over_other_events_do_not_conflict() {
    let (_directory, pairs) = pairs().await;
    for stores in pairs {
        let nodes = [node(&stores[0]).await, node(&stores[1]).await];
        let callers: Vec<_> = (0..16)
            .map(|course| {
                let node = nodes[course % 2].clone();
                tokio::spawn(async move {
                    open(&node, course, 5).await;
                    let mut attempts = 0;
                    for student in 0..5 {
                        let decision = enrol(course, format!("{course} {student}"));
                        node.decide(decision.clone()).await.unwrap();
                        attempts += decision.attempts.load(Ordering::SeqCst);
                    }
                    attempts
                })
            })
            .collect();
        for caller in callers {
            assert_eq!(caller.await.unwrap(), 5, "no decision was repeated");
        }
    }
}

#[tokio::test]
async fn a_repeated_id_gets_the_first_receipt() {
    let (_directory, pairs) = pairs().await;
    for stores in pairs {
        let nodes = [node(&stores[0]).await, node(&stores[1]).await];
        open(&nodes[0], "c", 5).await;
        let id = Uuid::now_v7();
        let first = nodes[0].decide(enrol("c", "ada")).command_id(id).metadata("by", "me").await.unwrap();
        assert_eq!((first.version, first.events, first.reply), (Version::new(2), 1, 4));
        assert_eq!((first.stream.to_string().as_str(), first.duplicate), ("course/c", false));
        nodes[0].decide(enrol("c", "bob")).await.unwrap();
        for node in &nodes {
            let again = node.decide(enrol("c", "ada")).command_id(id).await.unwrap();
            assert!(again.duplicate && is_of(&again, &first), "{again:?} {first:?}");
            let other = node.decide(enrol("c", "eve")).command_id(id).await.unwrap_err();
            let reused = NotExecutedKind::CommandIdReused { command_id: id };
            assert_eq!(other.to_string(), ExecuteError::<EnrolError>::from(reused).to_string());
            // Another decision, although it writes to another stream.
            let other = node.decide(probe(Act::Note { tags: 0 }, "c")).command_id(id).await.unwrap_err();
            assert_eq!(other.kind(), "command_id_reused");
        }
        let events = log(&*stores[0]).await;
        assert_eq!(events.len(), 3);
        assert_eq!((events[1].position, events[1].command_id), (first.position, id));
        assert_eq!(events[1].decode_metadata().unwrap().user["by"], "me");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_repetitions_take_effect_once() {
    let (_directory, pairs) = pairs().await;
    for stores in pairs {
        let nodes = [node(&stores[0]).await, node(&stores[1]).await];
        open(&nodes[0], "c", 1_000).await;
        for round in 0..200 {
            let id = Uuid::now_v7();
            let both = nodes.each_ref().map(|node| {
                let node = node.clone();
                tokio::spawn(async move { node.decide(enrol("c", round)).command_id(id).await.unwrap() })
            });
            let [one, other] = both;
            let (one, other) = (one.await.unwrap(), other.await.unwrap());
            assert!(one.duplicate != other.duplicate && is_of(&one, &other), "{one:?} {other:?}");
        }
        assert_eq!(enrolments(&*stores[1]).await, 200);
    }
}

/// An aggregate appends after the decision, and before its append.
#[tokio::test]
async fn appends_of_aggregates_are_respected() {
    let (store, runtime) = faulty().await;
    let other = Runtime::builder().store(store.inner.clone()).aggregate::<Course>().start().await.unwrap();
    open(&other, "c", 1).await;
    store.hold();
    let decision = enrol("c", "ada");
    let caller = tokio::spawn(runtime.decide(decision.clone()).into_future());
    store.held(1).await;
    other.execute::<Course>("c", CourseCommand::Resize { seats: 0 }).await.unwrap();
    store.release();
    let error = caller.await.unwrap().unwrap_err();
    assert_eq!(error.rejection(), Some(&EnrolError::Full));
    assert_eq!(decision.attempts.load(Ordering::SeqCst), 2);
    // The aggregate takes notice of the decision's events, too.
    other.execute::<Course>("c", CourseCommand::Resize { seats: 2 }).await.unwrap();
    let receipt = runtime.decide(enrol("c", "ada")).await.unwrap();
    let resized = other.execute::<Course>("c", CourseCommand::Resize { seats: 3 }).await.unwrap();
    assert_eq!((receipt.version, resized.version), (Version::new(4), Version::new(5)));
}

/// An id that an aggregate has used belongs to another command.
#[tokio::test]
async fn the_id_of_a_command_to_an_aggregate_is_no_repetition() {
    let (store, runtime) = faulty().await;
    open(&runtime, "a", 5).await;
    let id = Uuid::now_v7();
    let resize = CourseCommand::Resize { seats: 7 };
    runtime.execute::<Course>("a", resize).command_id(id).await.unwrap();
    let receipt = runtime.decide(enrol("a", "ada")).command_id(id).await.unwrap();
    assert_eq!((receipt.duplicate, receipt.reply), (false, 6));
    assert_eq!(enrolments(&store.inner).await, 1);
}

#[tokio::test]
async fn a_panic_fails_only_its_decision() {
    let (store, runtime) = faulty().await;
    for (act, text) in [
        (Act::PanicInView, "no view"),
        (Act::PanicInDecide, "no decision"),
        // Stored, it would fail every later decision on the topic.
        (Act::Poison, "cannot fold this"),
    ] {
        let error = runtime.decide(probe(act, "a")).await.unwrap_err();
        assert!(
            matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Panicked { message, stream }, retryable: false } if message == text && stream.id() == "a"),
            "{error}"
        );
    }
    let error = runtime.decide(probe(Act::PanicInStream, "a")).await.unwrap_err();
    assert_eq!(error.kind(), "not_accepted");
    assert!(error.to_string().contains("no stream"), "{error}");
    assert_eq!(log(&store.inner).await.len(), 0);
    foreign(
        &store.inner,
        StreamId::new("probe", "b").unwrap(),
        vec![encoded(&ProbeEvent::Poison { topic: "b".into() })],
    )
    .await;
    let error = runtime.decide(probe(Act::Nothing, "b")).await.unwrap_err();
    assert_eq!(error.kind(), "panicked");
    assert_eq!(runtime.decide(probe(Act::Note { tags: 0 }, "a")).await.unwrap().events, 1);
}

#[tokio::test]
async fn a_decision_without_events_appends_nothing() {
    let (store, runtime) = faulty().await;
    let nothing = runtime.decide(probe(Act::Nothing, "a")).await.unwrap();
    assert_eq!((nothing.version, nothing.position, nothing.events), (Version::NONE, Position::START, 0));
    let note = runtime.decide(probe(Act::Note { tags: 0 }, "a")).await.unwrap();
    runtime.decide(probe(Act::Note { tags: 0 }, "b")).await.unwrap();
    let appends = store.appends_held();
    let nothing = runtime.decide(probe(Act::Nothing, "a")).await.unwrap();
    assert_eq!((nothing.version, nothing.position, nothing.reply), (Version::NONE, note.position, 1));
    let error = runtime.decide(enrol("x", "ada")).await.unwrap_err();
    assert_eq!(error.rejection(), Some(&EnrolError::NoCourse));
    assert!(!error.is_transient());
    assert_eq!(store.appends_held(), appends);
}

#[tokio::test]
async fn limits_are_typed_errors() {
    let (store, runtime) = faulty().await;
    let note = encoded(&ProbeEvent::Noted { topic: "a".into(), tags: Vec::new() });
    let notes = |count: usize| -> Vec<NewEvent> {
        (0..count).map(|_| NewEvent { id: Uuid::now_v7(), ..note.clone() }).collect()
    };
    let id = Uuid::now_v7();
    let first = runtime.decide(probe(Act::Note { tags: 0 }, "a")).command_id(id).await.unwrap();
    for stream in 0..10 {
        let count = if stream == 0 { 9_999 } else { 10_000 };
        foreign(&store.inner, StreamId::new("probe", stream).unwrap(), notes(count)).await;
    }
    let full = runtime.decide(probe(Act::Nothing, "a")).timeout(Duration::ZERO).await.unwrap();
    assert_eq!(full.reply, 100_000);
    foreign(&store.inner, StreamId::new("probe", "more").unwrap(), notes(1)).await;
    let error = runtime.decide(probe(Act::Nothing, "a")).timeout(Duration::ZERO).await.unwrap_err();
    assert!(
        matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Store(StoreError::Invalid { reason }), retryable: false } if reason.contains("limit 100000") && reason.contains("smaller boundary")),
        "{error}"
    );
    // A command that is stored gets its receipt all the same.
    let repeated = runtime.decide(probe(Act::Note { tags: 0 }, "a")).command_id(id);
    let repeated = repeated.timeout(Duration::ZERO).await.unwrap();
    assert_eq!((repeated.duplicate, repeated.position), (true, first.position));
    // 15 tags, that of the topic, and the one that storied adds.
    runtime.decide(probe(Act::Note { tags: 15 }, "b")).await.unwrap();
    for (act, limit) in [
        (Act::Note { tags: 16 }, InvalidTag::TooMany { count: 17, limit: 16 }),
        (Act::NoteWithLongTag, InvalidTag::TooLong { key: "more".into(), bytes: 205, limit: 200 }),
    ] {
        let error = runtime.decide(probe(act, "b")).await.unwrap_err();
        assert!(
            matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Encode(EncodeError::Tag(tag)), .. } if *tag == limit),
            "{error}"
        );
    }
    let metadata = "x".repeat(Metadata::MAX_BYTES);
    let error =
        runtime.decide(probe(Act::Note { tags: 0 }, "b")).metadata("much", metadata).await.unwrap_err();
    assert_eq!(error.kind(), "encode");
    let error = runtime.decide(probe(Act::Note { tags: 0 }, "")).await.unwrap_err();
    assert_eq!(error.kind(), "invalid_id");
    assert_eq!(runtime.decide(probe(Act::Nothing, "b")).await.unwrap().reply, 1);
}

#[tokio::test]
async fn an_invalid_query_is_refused() {
    let (store, runtime) = faulty().await;
    for (act, text) in [
        (Act::QueryWithoutTag, "has no tag"),
        (Act::QueryWithoutItem, "has no tag"),
        (Act::QueryWithUnknownVariant, "no variant \"lost\""),
        (Act::QueryWithManyItems, "too many items in a query: 17 (limit 16)"),
    ] {
        let error = runtime.decide(probe(act, "a")).await.unwrap_err();
        assert!(
            matches!(
                &error,
                ExecuteError::NotExecuted { kind: NotExecutedKind::Store(StoreError::Invalid { .. }), .. }
            ),
            "{error}"
        );
        assert!(error.to_string().contains("invalid query") && error.to_string().contains(text), "{error}");
    }
    assert_eq!(log(&store.inner).await.len(), 0);
}

/// The type of an event has other tags now than were stored.
#[tokio::test]
async fn an_event_with_other_tags_is_reported() {
    let (store, runtime) = faulty().await;
    open(&runtime, "c", 5).await;
    let tags = Tags::new().tag("student", "ada");
    let renamed = NewEvent { tags, ..encoded(&enrolled("b", "Ada")) };
    foreign(&store.inner, StreamId::new("course", "b").unwrap(), vec![renamed]).await;
    let error = runtime.decide(enrol("c", "ada")).await.unwrap_err();
    assert!(
        matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Decode(error), .. } if error.kind == DecodeErrorKind::OtherTags),
        "{error}"
    );
    runtime.decide(enrol("c", "bob")).await.unwrap();
}

#[tokio::test]
async fn contention_without_end_gives_up() {
    let (store, runtime) = faulty().await;
    open(&runtime, "c", 50).await;
    store.always_first(StreamId::new("course", "c").unwrap(), || encoded(&enrolled("c", "rival")));
    let decision = enrol("c", "ada");
    let error = runtime.decide(decision.clone()).await.unwrap_err();
    assert!(
        matches!(
            error,
            ExecuteError::NotExecuted {
                kind: NotExecutedKind::RetriesExhausted { attempts: 10, .. },
                retryable: true
            }
        ),
        "{error}"
    );
    assert_eq!(decision.attempts.load(Ordering::SeqCst), 10);
    store.heal();
    assert_eq!(runtime.decide(decision).await.unwrap().reply, 50 - 10 - 1);
}

#[tokio::test]
async fn failures_of_the_store_are_reported_and_end() {
    let (store, runtime) = faulty().await;
    open(&runtime, "c", 5).await;
    store.fail_appends(StoreError::Unavailable { reason: "unplugged".into(), source: None });
    let error = runtime.decide(enrol("c", "ada")).await.unwrap_err();
    assert_eq!((error.kind(), error.is_transient()), ("unavailable", true));
    // Stored, but without an answer.
    store.append_and_forget();
    let id = Uuid::now_v7();
    let error = runtime.decide(enrol("c", "ada")).command_id(id).await.unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { command_id, .. } if command_id == id), "{error}");
    store.heal();
    let receipt = runtime.decide(enrol("c", "ada")).command_id(id).await.unwrap();
    assert_eq!((receipt.duplicate, receipt.reply), (true, 4));
    assert_eq!(enrolments(&store.inner).await, 1);
}

#[tokio::test]
async fn a_decision_outlives_its_caller_but_begins_no_attempt_after_its_deadline() {
    let (store, runtime) = faulty().await;
    open(&runtime, "c", 5).await;
    open(&runtime, "d", 5).await;
    let (id, timeout) = (Uuid::now_v7(), Duration::from_millis(30));
    store.hold();
    let error = runtime.decide(enrol("c", "ada")).command_id(id).timeout(timeout).await.unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{error}");
    let dropped = tokio::spawn(runtime.decide(enrol("d", "bob")).into_future());
    store.held(2).await;
    dropped.abort();
    store.release();
    eventually_async("both are stored", async || enrolments(&store.inner).await == 2).await;
    assert!(runtime.decide(enrol("c", "ada")).command_id(id).await.unwrap().duplicate);
    // Its events cannot be read before the deadline.
    store.hold_reads();
    let late = enrol("c", "eve");
    let error = runtime.decide(late.clone()).timeout(timeout).await.unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{error}");
    store.heal();
    runtime.shutdown().await.unwrap();
    assert_eq!(late.attempts.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_caller_can_wait_for_a_projection() {
    let count = InMemoryIndex::new("count", |count: &mut u64, _: AnyEvent, _: &RecordedEvent| {
        *count += 1;
        Ok(())
    });
    let builder = Runtime::builder().store(MemoryStore::new()).aggregate::<Course>().in_memory_index(&count);
    let runtime = builder.start().await.unwrap();
    open(&runtime, "c", 500).await;
    for student in 0..100 {
        let applied = runtime.decide(enrol("c", student)).wait_for("count").await.unwrap();
        assert_eq!(applied.applied, Ok(()));
        assert!(count.read(|count| *count) >= applied.receipt.position.get());
    }
    let decision = enrol("c", "ada");
    let error = runtime.decide(decision.clone()).wait_for("counts").await.unwrap_err();
    assert_eq!(error.kind(), "unknown_projection");
    assert_eq!(decision.attempts.load(Ordering::SeqCst), 0);
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn hooks_run_around_decisions() {
    let ends = Arc::new(Mutex::new(Vec::new()));
    let seen = ends.clone();
    let bus = CommandBus::local()
        .before("enrol", |info| match info.metadata.user.get("role") {
            Some(role) if role == "clerk" => Ok(()),
            _ => Err("only for clerks".into()),
        })
        .filter(|info| info.key != Some("closed"))
        .after("enrol", move |info, end| {
            seen.lock().unwrap().push((info.key.map(str::to_owned), end.error.clone()));
        });
    let builder = Runtime::builder().store(MemoryStore::new()).aggregate::<Course>().commands(bus);
    let runtime = builder.start().await.unwrap();
    open(&runtime, "c", 1).await;
    let error = runtime.decide(enrol("c", "ada")).await.unwrap_err();
    assert!(error.to_string().contains("only for clerks"), "{error}");
    runtime.decide(enrol("c", "ada")).metadata("role", "clerk").await.unwrap();
    runtime.decide(enrol("c", "bob")).metadata("role", "clerk").await.unwrap_err();
    let error = runtime.decide(enrol("closed", "ada")).metadata("role", "clerk").await.unwrap_err();
    assert_eq!(error.kind(), "not_accepted");
    let (c, full) = (Some("c".to_owned()), Some(EnrolError::Full.to_string()));
    assert_eq!(*ends.lock().unwrap(), [(c.clone(), None), (c, full)]);
}

#[tokio::test]
async fn shutdown_answers_decisions_in_flight_and_refuses_new_ones() {
    let (store, runtime) = faulty().await;
    open(&runtime, "c", 5).await;
    store.hold();
    let in_flight = tokio::spawn(runtime.decide(enrol("c", "ada")).into_future());
    store.held(1).await;
    let late = runtime.clone();
    let shutdown = tokio::spawn(runtime.shutdown());
    eventually_async("new decisions are refused", async || {
        let refused = late.decide(probe(Act::Nothing, "a")).await;
        matches!(refused, Err(ExecuteError::NotExecuted { kind: NotExecutedKind::ShuttingDown, .. }))
    })
    .await;
    assert!(!shutdown.is_finished());
    store.release();
    assert_eq!(in_flight.await.unwrap().unwrap().reply, 4);
    shutdown.await.unwrap().unwrap();
}

#[tokio::test]
async fn shutdown_ends_unanswered_decisions() {
    let (store, runtime) = faulty().await;
    open(&runtime, "c", 5).await;
    store.hold();
    let in_flight = tokio::spawn(runtime.decide(enrol("c", "ada")).into_future());
    store.held(1).await;
    let error = runtime.shutdown_within(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.unfinished, ["1 commands without an answer"]);
    let error = in_flight.await.unwrap().unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{error}");
    store.release();
    assert_eq!(enrolments(&store.inner).await, 0);
}

/// The recipe of the guide: an e-mail address belongs to one user.
mod unique_address {
    use storied::store::AppendError;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum UserEvent {
        Registered { email: String },
        Left { email: String },
    }

    impl Event for UserEvent {
        const CATEGORY: &'static str = "user";

        fn tags(&self) -> Tags {
            let (Self::Registered { email } | Self::Left { email }) = self;
            Tags::new().tag("email", email.to_lowercase())
        }
    }

    /// Whether a user has the address.
    struct Address {
        email: String,
        in_use: bool,
    }

    impl View for Address {
        type Event = UserEvent;

        fn query(&self) -> Query {
            Query::tagged("email", self.email.to_lowercase())
        }

        fn apply(&mut self, event: &UserEvent) {
            self.in_use = matches!(event, UserEvent::Registered { .. });
        }
    }

    #[derive(Debug, Clone, Serialize)]
    struct Register {
        user: String,
        email: String,
    }

    #[derive(Debug, PartialEq, thiserror::Error)]
    #[error("another user has this address")]
    struct InUse;

    impl Decide for Register {
        const NAME: &'static str = "register";
        type View = Address;
        type Event = UserEvent;
        type Reply = ();
        type Error = InUse;

        fn view(&self) -> Address {
            Address { email: self.email.clone(), in_use: false }
        }

        fn stream(&self) -> String {
            self.user.clone()
        }

        fn decide(&self, address: &Address, _: &Context<'_>) -> DecisionOf<Self> {
            if address.in_use {
                return Err(InUse);
            }
            Ok(UserEvent::Registered { email: self.email.clone() }.into())
        }
    }

    #[test]
    fn an_address_is_free_after_its_user_has_left() {
        let email = || "Ada@example.org".to_owned();
        let register = Register { user: "ada".into(), email: "ada@example.org".into() };
        let registered = UserEvent::Registered { email: register.email.clone() };
        let past = given_events([UserEvent::Registered { email: email() }]);
        past.clone().when(register.clone()).then_error(InUse);
        past.and([UserEvent::Left { email: email() }]).when(register).then([registered]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn an_address_is_registered_once() {
        let (_directory, pairs) = pairs().await;
        for stores in pairs {
            let nodes = [node(&stores[0]).await, node(&stores[1]).await];
            let callers: Vec<_> = (0..32)
                .map(|user| {
                    let node = nodes[user % 2].clone();
                    let register = Register { user: user.to_string(), email: "ada@example.org".into() };
                    tokio::spawn(async move { node.decide(register).await })
                })
                .collect();
            let mut registered = 0;
            for caller in callers {
                match caller.await.unwrap() {
                    Ok(_) => registered += 1,
                    Err(error) => assert_eq!(error.rejection(), Some(&InUse), "{error}"),
                }
            }
            assert_eq!(registered, 1);
            assert_eq!(log(&*stores[0]).await.len(), 1);
        }
    }

    /// Without a read, for a program that appends events itself.
    #[tokio::test]
    async fn an_append_makes_an_address_unique() {
        let (_directory, pairs) = pairs().await;
        for [store, _] in pairs {
            for (user, is_new) in [("ada", true), ("eve", false)] {
                let registered = UserEvent::Registered { email: "ada@example.org".into() };
                let event = NewEvent::encode(&registered, store.info().codec, &Metadata::default()).unwrap();
                let stream = StreamId::new(UserEvent::CATEGORY, user).unwrap();

                let exists = Query::tagged("email", "ada@example.org").exists();
                let append = Append::one(stream, ExpectedVersion::NoStream, vec![event]).unless(exists);
                match store.append(vec![append]).await.remove(0) {
                    Ok(_) => assert!(is_new),
                    Err(AppendError::Exists { .. }) => assert!(!is_new),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
}
