//! Enrolment for courses: a decision over the events of a course and of a student.
//!
//! ```sh
//! cargo run --example courses         # 200 students enrol at the same time
//! cargo run --example courses -- 999  # another number, up to 1000
//! ```
//!
//! A course has a number of seats, and a student has at most 3 courses. The program runs on SQLite in
//! a temporary directory. At its end it checks both rules.

use std::error::Error;
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::Duration;

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use storied::event::Tags;
use storied::store::Query;
use storied::{
    Aggregate, Context, Decide, Decided, DecisionOf, Event, NeverRejects, Runtime, SqliteStore, View,
};
use uuid::Uuid;

type Failure = Box<dyn Error + Send + Sync>;

const COURSES: usize = 20;
const SEATS: usize = 15;
const MOST_COURSES: usize = 3;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CourseEvent {
    Opened { course: String, seats: usize },
    Enrolled { course: String, student: String },
}

impl Event for CourseEvent {
    const CATEGORY: &'static str = "course";

    fn tags(&self) -> Tags {
        match self {
            Self::Opened { course, .. } => Tags::new().tag("course", course),
            Self::Enrolled { course, student } => Tags::new().tag("course", course).tag("student", student),
        }
    }
}

/// Opens a course. That concerns one stream, so an aggregate decides.
#[derive(Default)]
struct Course;

impl Aggregate for Course {
    type Event = CourseEvent;
    type Command = usize; // the number of seats
    type Reply = ();
    type Error = NeverRejects;

    fn handle(&self, seats: &usize, context: &Context<'_>) -> Decided<Self> {
        Ok(CourseEvent::Opened { course: context.id().to_owned(), seats: *seats }.into())
    }

    fn apply(&mut self, _: &CourseEvent) {}
}

/// The seats of a course that are left.
struct Seats {
    course: String,
    left: usize,
}

impl View for Seats {
    type Event = CourseEvent;

    fn query(&self) -> Query {
        Query::tagged("course", &self.course)
    }

    fn apply(&mut self, event: &CourseEvent) {
        match event {
            CourseEvent::Opened { seats, .. } => self.left = *seats,
            CourseEvent::Enrolled { .. } => self.left -= 1,
        }
    }
}

/// The number of courses of a student.
struct Load {
    student: String,
    courses: usize,
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

#[derive(Clone, Serialize)]
struct Enrol {
    course: String,
    student: String,
}

#[derive(Debug, thiserror::Error)]
enum EnrolError {
    #[error("the course has no seats")]
    Full,
    #[error("the student has 3 courses")]
    Busy,
}

impl Decide for Enrol {
    const NAME: &'static str = "enrol";
    type View = (Seats, Load);
    type Event = CourseEvent;
    type Reply = ();
    type Error = EnrolError;

    fn view(&self) -> (Seats, Load) {
        let seats = Seats { course: self.course.clone(), left: 0 };
        (seats, Load { student: self.student.clone(), courses: 0 })
    }

    fn stream(&self) -> String {
        self.course.clone() // the event goes to course/<id>
    }

    fn decide(&self, (seats, load): &Self::View, _: &Context<'_>) -> DecisionOf<Self> {
        let (course, student) = (self.course.clone(), self.student.clone());
        match (seats.left, load.courses) {
            (0, _) => Err(EnrolError::Full),
            (_, MOST_COURSES..) => Err(EnrolError::Busy),
            _ => Ok(CourseEvent::Enrolled { course, student }.into()),
        }
    }
}

/// Enrols a student for every fourth course, until one of the rules refuses it.
async fn enrol(runtime: &Runtime, number: usize) -> Result<(), Failure> {
    for course in (number % 4..COURSES).step_by(4) {
        let enrol = Enrol { course: course.to_string(), student: number.to_string() };
        let id = Uuid::now_v7(); // a retry sends the same id
        loop {
            match runtime.decide(enrol.clone()).command_id(id).await {
                Err(error) if error.is_transient() => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) if error.rejection().is_none() => return Err(error.into()),
                _ => break,
            }
        }
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: courses [STUDENTS], a number from 1 to 1000, by default 200";

async fn run() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let students = match arguments.as_slice() {
        [help] if help == "--help" => return Ok(writeln!(stdout(), "{USAGE}")?),
        [] => 200,
        [number] => number.parse::<usize>().ok().filter(|number| (1..=1000).contains(number)).ok_or(USAGE)?,
        _ => return Err(USAGE.into()),
    };
    let directory = tempfile::tempdir()?;
    let store = SqliteStore::open(directory.path().join("courses.db")).await?;
    let runtime = Runtime::builder().store(store).aggregate::<Course>().start().await?;
    for course in 0..COURSES {
        runtime.execute::<Course>(course, SEATS).await?;
    }
    try_join_all((0..students).map(|number| enrol(&runtime, number))).await?;
    for (key, values, most) in [("student", students, MOST_COURSES), ("course", COURSES, SEATS)] {
        let mut enrolments = 0;
        for value in 0..values {
            let query = Query::variants::<CourseEvent>(["enrolled"]).tag(key, value);
            let (events, _) = runtime.store().read(query).await?;
            assert!(events.len() <= most, "{key} {value} has {} of {most} enrolments", events.len());
            enrolments += events.len();
        }
        writeln!(stdout(), "{enrolments} enrolments, at most {most} of a {key}")?;
    }
    Ok(runtime.shutdown().await?)
}
