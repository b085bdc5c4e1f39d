//! The metrics of processes and of the scheduler.

use std::time::Duration;

use storied::process::{Input, Next, Process, ProcessContext, Routes};
use storied::{MemoryStore, Recurrence, Runtime};

use crate::meters::*;

/// Adds to a second counter what is added to a first one. Panics at 13.
#[derive(Default)]
struct Mirror;

impl Process for Mirror {
    const NAME: &'static str = "mirror";
    type Event = CounterEvent;

    fn routes() -> Routes<CounterEvent> {
        Routes::new().starts(["added"], |_: &CounterEvent, recorded| {
            let id = recorded.stream.id();
            (!id.starts_with("copy")).then(|| id.to_owned())
        })
    }

    fn react(&self, input: Input<'_, CounterEvent>, context: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(CounterEvent::Added { n: 13 }) => panic!("13 is not for this process"),
            Input::Event(CounterEvent::Added { n }) => {
                Next::new().execute::<Counter>("copy", format!("copy-{}", context.id()), Add(*n))
            }
            _ => Next::new().complete(),
        }
    }
}

/// Runs through the metrics of processes and of the scheduler.
pub async fn scenario(meters: &Meters) {
    let builder = Runtime::builder().store(MemoryStore::new()).aggregate::<Counter>();
    let node = builder.process::<Mirror>().telemetry(meters.telemetry()).start().await.unwrap();

    let inputs = async |outcome, expected: f64| {
        let of = [("storied.process", "mirror"), ("storied.outcome", outcome)];
        meters.until("storied.process.inputs", &of, |count| count >= expected).await;
        assert_eq!(meters.sum("storied.process.inputs", &of), expected, "{outcome}");
    };
    node.execute::<Counter>("a", Add(1)).await.unwrap();
    // The event, and the answer to the command.
    inputs("reacted", 2.0).await;
    node.execute::<Counter>("a", Add(2)).await.unwrap();
    inputs("ignored", 1.0).await;
    node.execute::<Counter>("b", Add(13)).await.unwrap();
    inputs("parked", 1.0).await;
    inputs("held", 0.0).await;
    meters.until("storied.process.active", &[("storied.process", "mirror")], |active| active == 0.0).await;

    let commands = async |outcome, expected: f64| {
        let of = [("storied.outcome", outcome)];
        meters.until("storied.scheduler.commands", &of, |count| count >= expected).await;
        assert_eq!(meters.sum("storied.scheduler.commands", &of), expected, "{outcome}");
    };
    node.execute::<Counter>("copy-c", Add(1)).after(Duration::ZERO).await.unwrap();
    commands("executed", 1.0).await;
    node.execute::<Counter>("copy-c", AddUpTo { add: 1, limit: 0 }).after(Duration::ZERO).await.unwrap();
    commands("parked", 1.0).await;
    commands("postponed", 0.0).await;
    let daily = Recurrence::every(Duration::from_secs(86_400)).unwrap();
    node.execute::<Counter>("copy-c", Add(1)).repeat("daily", daily).await.unwrap();
    assert_eq!(meters.value("storied.scheduler.ticks", &[]), Some((0.0, 0)));
    let often = Recurrence::every(Duration::from_secs(1)).unwrap();
    node.execute::<Counter>("copy-c", Add(1)).repeat("often", often).await.unwrap();
    meters.until("storied.scheduler.ticks", &[], |ticks| ticks >= 1.0).await;
    meters.until("storied.scheduler.active", &[], |active| active == 0.0).await;
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_reactions_and_scheduled_commands() {
    let _turn = TURN.read().await;
    scenario(&Meters::new()).await;
}
