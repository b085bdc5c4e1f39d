//! `schedule …` and `command …`.

use std::sync::Arc;
use std::time::Duration;

use chrono::Datelike;
use serde_json::json;
use storied::store::{ScheduledState, StoredSchedule};
use storied::{EventStore, Recurrence, Runtime};

use crate::cli::program::{databases, eventually};
use crate::support::reminders::{Close, Closing, Invoice, InvoiceEvent, reminder, reminders};

const HOUR: Duration = Duration::from_secs(60 * 60);

async fn node(store: &Arc<dyn EventStore>, closing: &Closing) -> Runtime {
    let builder = Runtime::builder().store(store.clone()).aggregate::<Invoice>();
    builder.handler(closing.clone()).start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schedules_are_listed_and_operated() {
    for fixture in databases().await {
        let run = async |args: &[&str]| fixture.run(args).await;
        let store = fixture.open().await;
        let closing = Closing::default();
        let node = node(&store, &closing).await;
        run(&["schedule", "list"]).await.code(0).shows(&["no schedules"]);
        let nightly = Recurrence::cron("30 2 * * *", "Europe/Berlin").unwrap();
        node.execute::<Invoice>("7", reminder("hunter2")).repeat("nightly", nightly).await.unwrap();
        // Never within the next days.
        let month = (chrono::Utc::now().month0() + 6) % 12 + 1;
        let yearly = Recurrence::cron(format!("0 0 15 {month} *"), "UTC").unwrap();
        node.execute::<Invoice>("8", reminder("hunter2")).repeat("yearly", yearly).await.unwrap();
        run(&["schedule", "list"]).await.code(0).shows(&[
            "SCHEDULE  TIMING                    TARGET     NEXT",
            "nightly   30 2 * * * Europe/Berlin  invoice/7  2",
            "CREATED  SKIPPED  MISSED",
        ]);
        let json = run(&["schedule", "list", "--upcoming", "2d", "--json"]).await.code(0).json();
        let expected = node.schedule("nightly").status().await.unwrap();
        assert_eq!(json, json!({ "schedules": [expected], "undecodable": [] }));

        run(&["schedule", "pause", "nightly"]).await.code(0).shows(&["paused nightly"]);
        run(&["schedule", "list"]).await.code(0).shows(&["paused"]);
        run(&["schedule", "resume", "nightly"])
            .await
            .code(0)
            .shows(&["resumed nightly; the next tick is at 2"]);
        let json = run(&["schedule", "trigger", "nightly", "--json"]).await.code(0).json();
        assert_eq!(json["schedule"], "nightly");
        let ran = async |times: usize| reminders(&*store).await.len() == times;
        eventually("it has run", async || ran(1).await).await;
        let from = ["--from", "2026-03-28T00:00:00Z", "--to", "2026-03-30T00:00:00Z"];
        let args = [&["schedule", "backfill", "nightly"][..], &from].concat();
        run(&args).await.code(0).shows(&["2 ticks of nightly due now"]);
        eventually("both ticks have run", async || ran(3).await).await;
        let long = ["schedule", "backfill", "nightly", "--from", "1990-01-01T00:00:00Z", "--to", from[3]];
        let reversed = ["schedule", "backfill", "nightly", "--from", from[3], "--to", from[1]];
        run(&reversed).await.code(2).complains(&["--from is after --to"]);
        run(&long).await.code(4).complains(&["more than 1000 ticks"]);
        run(&["schedule", "remove", "nightly"]).await.code(0).shows(&["removed nightly"]);
        for verb in ["pause", "resume", "trigger", "remove"] {
            run(&["schedule", verb, "nightly"]).await.code(4).complains(&["unknown schedule \"nightly\""]);
        }
        run(&["schedule", "list", "--upcoming", "2y"]).await.code(2).complains(&["90s, 15m, 2h or 3d"]);

        // One that a newer version wrote hides no other.
        let newer =
            StoredSchedule { name: "newer".into(), definition: vec![0xa0], revision: 1, next_at: None };
        assert!(store.write_schedule(newer, Vec::new()).await.unwrap());
        run(&["schedule", "list"]).await.code(0).shows(&["decoding schedule \"newer\" failed", "yearly"]);
        node.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scheduled_commands_are_listed_cancelled_and_retried() {
    for fixture in databases().await {
        let run = async |args: &[&str]| fixture.run(args).await;
        let store = fixture.open().await;
        let closing = Closing::default();
        let node = node(&store, &closing).await;
        run(&["command", "list"]).await.code(0).shows(&["no scheduled commands"]);
        node.execute::<Invoice>("paid", InvoiceEvent::Paid {}).await.unwrap();
        let parked =
            node.execute::<Invoice>("paid", reminder("hunter2")).after(Duration::ZERO).await.unwrap();
        let later = node.execute::<Invoice>("7", reminder("hunter2")).after(2 * HOUR).await.unwrap();
        let is_parked = async || {
            let status = node.scheduled_command(parked.id).status().await.unwrap();
            status.is_some_and(|status| status.state == ScheduledState::Parked)
        };
        eventually("the command is parked", is_parked).await;
        let (parked_id, later_id) = (parked.id.to_string(), later.id.to_string());
        let list = run(&["command", "list"]).await.code(0);
        list.shows(&[
            "TARGET        STATE    SCHEDULE  COMMAND",
            "the invoice is paid",
            " min  invoice/7     waiting",
        ]);
        let json = run(&["command", "list", "--state", "parked", "--json"]).await.code(0).json();
        let expected = node.scheduled_command(parked.id).status().await.unwrap();
        assert_eq!(json, json!({ "commands": [expected], "more": false }));
        let json = run(&["command", "list", "--limit", "1", "--json"]).await.code(0).json();
        assert_eq!(json["more"], true);
        run(&["command", "list", "--limit", "10000"]).await.code(0).shows(&["invoice/7"]);
        run(&["command", "list", "--schedule", "nightly"]).await.code(0).shows(&["no scheduled commands"]);

        run(&["command", "retry", &later_id])
            .await
            .code(1)
            .complains(&["it is waiting; only a parked command"]);
        run(&["command", "retry", &parked_id]).await.code(0).shows(&["is due now"]);
        eventually("the command is parked again", is_parked).await;
        run(&["command", "cancel", &parked_id]).await.code(0).shows(&["cancelled command"]);
        let json = run(&["command", "cancel", &later_id, "--json"]).await.code(0).json();
        assert_eq!(json, json!({ "command": later.id, "cancelled": true }));

        closing.hold();
        let started =
            node.execute_handler::<Closing>(Close).after(Duration::ZERO).await.unwrap().id.to_string();
        eventually("the command runs", async || closing.calls() == 1).await;
        run(&["command", "list", "--state", "started"]).await.code(0).shows(&["closing", &started]);
        run(&["command", "cancel", &started]).await.code(1).complains(&["it has started; wait for its end"]);
        closing.release();
        for verb in ["cancel", "retry"] {
            run(&["command", verb, &later_id]).await.code(4).complains(&["unknown scheduled command"]);
            run(&["command", verb, "7"]).await.code(2).complains(&["invalid value '7'"]);
        }
        assert!(reminders(&*store).await.is_empty());
        node.shutdown().await.unwrap();
    }
}
