//! `process …` and `timer list`, with and without running nodes.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;
use storied::command::{HandleError, Handler, HandlerContext};
use storied::process::{Input, InstanceState, Next, Process, ProcessContext, Routes};
use storied::{EventStore, NeverRejects, ProcessOptions, Runtime};

use crate::cli::program::{Run, databases, eventually};
use crate::support::fulfilment::{Fulfilment, Order, OrderEvent, Stock};

/// A text in payloads, which the tool never shows.
const SECRET: &str = "hunter2";

#[derive(Serialize, Deserialize)]
struct Charge {
    card: String,
}

/// Never answers.
struct Hanging;

impl Handler for Hanging {
    const NAME: &'static str = "charge";
    type Command = Charge;
    type Reply = ();
    type Error = NeverRejects;

    fn key(_: &Charge) -> Option<String> {
        Some("provider".to_owned())
    }

    async fn handle(&self, _: &Charge, _: &HandlerContext) -> Result<(), HandleError<NeverRejects>> {
        std::future::pending().await
    }
}

/// Charges a card for an order with the secret.
#[derive(Default)]
struct Charging;

impl Process for Charging {
    const NAME: &'static str = "charging";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts(["noted"], |event: &OrderEvent, recorded| {
            let secret = matches!(event, OrderEvent::Noted { text } if text == SECRET);
            secret.then(|| recorded.stream.id().to_owned())
        })
    }

    fn react(&self, input: Input<'_, OrderEvent>, _: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(_) => Next::new().execute_handler::<Hanging>("pay", Charge { card: SECRET.into() }),
            _ => Next::none(),
        }
    }
}

async fn node(store: &Arc<dyn EventStore>) -> Runtime {
    let options = || ProcessOptions::new().lease(Duration::from_secs(1));
    let builder = Runtime::builder().store(store.clone()).aggregate::<Order>().aggregate::<Stock>();
    let builder = builder.handler(Hanging).process_with::<Fulfilment>(options());
    builder.process_with::<Charging>(options()).start().await.unwrap()
}

async fn place(node: &Runtime, order: &str, lines: &[&str], notes: &[&str]) {
    let lines = lines.iter().map(|line| (*line).to_owned()).collect();
    node.execute::<Order>(order, OrderEvent::Placed { lines }).await.unwrap();
    for text in notes {
        node.execute::<Order>(order, OrderEvent::Noted { text: (*text).to_owned() }).await.unwrap();
    }
}

async fn until(node: &Runtime, id: &str, state: InstanceState) {
    let instance = node.process::<Fulfilment>(id);
    let reached = async || instance.status().await.unwrap().is_some_and(|status| status.state == state);
    eventually(&format!("{id} is {state}"), reached).await;
}

/// Places orders: 1 and 8 parked, 2 with a timer, 3 and 4 completed, 5 compensated, 6 charging.
async fn fill(node: &Runtime) {
    place(node, "1", &[], &["panic", &format!("not {SECRET}"), "soon"]).await;
    until(node, "1", InstanceState::Parked).await;
    place(node, "2", &[], &["later"]).await;
    for id in ["3", "4"] {
        place(node, id, &["tea"], &[]).await;
        until(node, id, InstanceState::Completed).await;
    }
    place(node, "5", &["milk", "tea"], &[]).await;
    until(node, "5", InstanceState::Compensated).await;
    place(node, "6", &[], &[SECRET]).await;
    place(node, "8", &[], &["panic"]).await;
    until(node, "8", InstanceState::Parked).await;
    let held = async || node.process::<Fulfilment>("1").status().await.unwrap().unwrap().held == 3;
    eventually("the inputs are held", held).await;
    let charging = node.process::<Charging>("6");
    let sent = async || charging.status().await.unwrap().is_some_and(|status| status.effects.len() == 1);
    eventually("the card is charged", sent).await;
    let timer = async || {
        node.store()
            .timers(Some("fulfilment"), None, 10)
            .await
            .unwrap()
            .iter()
            .any(|timer| timer.name == "soon")
    };
    eventually("the timer is stored", timer).await;
}

/// Expects that a run has shown no payload.
#[track_caller]
fn without_payloads(run: Run) -> Run {
    assert!(!run.out.contains(SECRET) && !run.err.contains(SECRET), "{}\n{}", run.out, run.err);
    run
}

fn ids(list: &serde_json::Value) -> Vec<String> {
    let of = |instance: &serde_json::Value| {
        format!("{}/{}", instance["process"].as_str().unwrap(), instance["id"].as_str().unwrap())
    };
    list["instances"].as_array().unwrap().iter().map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_listed_and_shown() {
    for fixture in databases().await {
        let store = fixture.open().await;
        fixture.run(&["process", "list"]).await.code(0).shows(&["no node has run a process"]);
        fixture.run(&["timer", "list"]).await.code(0).shows(&["no timers"]);
        fixture
            .run(&["process", "list", "fulfilment"])
            .await
            .code(4)
            .complains(&["unknown process \"fulfilment\"; the store has none, since no node has run one"]);
        let node = node(&store).await;
        fill(&node).await;
        let run = async |args: &[&str]| without_payloads(fixture.run(args).await);

        run(&["process", "list"]).await.code(0).shows(&[
            "PROCESS     ID  STATE        VERSION  EFFECTS  TIMERS  HELD  REASON",
            "charging    6   running      2        1        0       0",
            "fulfilment  1   parked       5        0        0       3     the process panicked: as noted",
            "fulfilment  2   running      3        0        1       0",
            "fulfilment  5   compensated",
        ]);
        let list = run(&["process", "list", "--json"]).await.code(0).json();
        let all = ["1", "2", "3", "4", "5", "6", "8"].map(|id| format!("fulfilment/{id}"));
        assert_eq!(ids(&list), [&["charging/6".to_owned()][..], &all[..]].concat());
        let process = &list["processes"][1];
        assert_eq!((&process["name"], &process["paused"]), (&json!("fulfilment"), &json!(false)));
        assert!(process["owner"].is_string() && process["next"].is_null(), "{process}");
        let parked = &list["instances"][1];
        assert_eq!(parked["parked"], "the process panicked: as noted");
        assert_eq!(parked["held"], 3);

        for (state, found) in [
            ("running", &["2", "6"][..]),
            ("parked", &["1", "8"]),
            ("compensating", &[]),
            ("completed", &["3", "4"]),
            ("compensated", &["5"]),
            ("cancelled", &[]),
        ] {
            let list = ["process", "list", "fulfilment", "--state", state];
            let listed = run(&[&list[..], &["--json"]].concat()).await.code(0).json();
            let found: Vec<_> = found.iter().map(|id| format!("fulfilment/{id}")).collect();
            assert_eq!(ids(&listed), found, "{state}");
            if found.is_empty() {
                run(&list).await.code(0).shows(&[&format!("no {state} instances of fulfilment")]);
            }
            // The same, one at a time.
            let (mut paged, mut from) = (Vec::new(), 1);
            loop {
                let from_text = from.to_string();
                let page = [&list[..], &["--limit", "1", "--json", "--from", &from_text]].concat();
                let page = run(&page).await.code(0).json();
                paged.extend(ids(&page));
                let Some(next) = page["processes"][0]["next"].as_u64() else { break };
                assert!(next > from, "{page}");
                from = next;
            }
            assert_eq!(paged, found, "{state}");
        }
        run(&["process", "list", "fulfilment", "--limit", "2"]).await.code(0).shows(&[
            "… the limit of 2 instances of fulfilment; the log continues: process list fulfilment --from ",
        ]);

        run(&["process", "show", "fulfilment", "1"]).await.code(0).shows(&[
            "process   fulfilment, owned by node ",
            "instance  1 v5",
            "state     parked",
            "reason    the process panicked: as noted",
            "held      3 inputs without a reaction",
            "effects   none without an answer",
            "timers    none",
        ]);
        let charging = node.process::<Charging>("6").status().await.unwrap().unwrap();
        let command = charging.effects[0].command_id.to_string();
        run(&["process", "show", "charging", "6"])
            .await
            .code(0)
            .shows(&["EFFECT  COMMAND", &format!("pay     {command}  charge/provider")]);
        let json = run(&["process", "show", "charging", "6", "--json"]).await.code(0).json();
        let effect =
            json!({ "key": "pay", "command_id": command, "target": "charge", "target_id": "provider" });
        assert_eq!(json["effects"], json!([effect]));

        let timers = store.timers(Some("fulfilment"), None, 10).await.unwrap();
        let due = timers.iter().find(|timer| timer.name == "soon").unwrap().due_at;
        run(&["process", "show", "fulfilment", "2"])
            .await
            .code(0)
            .shows(&["TIMER  VERSION  DUE", &due.format("soon   v3       %Y-%m-%d %H:%M:%SZ").to_string()]);
        let json = run(&["process", "show", "fulfilment", "2", "--json"]).await.code(0).json();
        assert_eq!(json["timers"], json!([{ "name": "soon", "version": 3, "due_at": due }]));
        drop(node);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timers_are_listed_by_due_time() {
    for fixture in databases().await {
        let store = fixture.open().await;
        let node = node(&store).await;
        for id in ["1", "2", "3"] {
            place(&node, id, &[], &["later"]).await;
        }
        let stored = async || store.timers(None, None, 10).await.unwrap().len() == 3;
        eventually("the timers are stored, and no resumption is left", stored).await;
        fixture.run(&["timer", "list"]).await.code(0).shows(&[
            "IN      PROCESS     INSTANCE  VERSION  TIMER",
            "59 min  fulfilment  1         v3       soon",
        ]);
        let json = fixture.run(&["timer", "list", "--within", "2h", "--json"]).await.code(0).json();
        let expected = store.timers(None, None, 10).await.unwrap();
        assert_eq!(json, json!({ "timers": expected, "more": false }));
        let json = fixture.run(&["timer", "list", "--limit", "2", "--json"]).await.code(0).json();
        assert_eq!(json, json!({ "timers": expected[..2], "more": true }));
        fixture.run(&["timer", "list", "--limit", "2"]).await.code(0).shows(&["… the limit of 2 timers"]);
        fixture
            .run(&["timer", "list", "--within", "30m"])
            .await
            .code(0)
            .shows(&["no timers are due in this time"]);
        let json = fixture.run(&["timer", "list", "--process", "charging", "--json"]).await.code(0).json();
        assert_eq!(json, json!({ "timers": [], "more": false }));
        fixture
            .run(&["timer", "list", "--process", "order"])
            .await
            .code(4)
            .complains(&["unknown process \"order\"; the store has charging, fulfilment"]);
        for wrong in ["2", "2y", "h", "400000d"] {
            fixture
                .run(&["timer", "list", "--within", wrong])
                .await
                .code(2)
                .complains(&["90s, 15m, 2h or 3d"]);
        }
        drop(node);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_retried_cancelled_and_compensated() {
    for fixture in databases().await {
        let store = fixture.open().await;
        let node = node(&store).await;
        fill(&node).await;

        let version = async || node.process::<Fulfilment>("1").status().await.unwrap().unwrap().version;
        let before = version().await;
        fixture.run(&["process", "retry", "fulfilment", "1"]).await.code(0).shows(&[
            "requested to retry instance 1 of fulfilment; node ",
            ", the owner of the process, acts on it",
        ]);
        // The request, the resumption, and the panic.
        eventually("it is parked again", async || version().await.get() >= before.get() + 3).await;
        fixture
            .run(&["process", "list", "fulfilment", "--state", "parked"])
            .await
            .code(0)
            .shows(&["fulfilment  8   parked", "fulfilment  1   parked"]);
        let json = fixture.run(&["process", "cancel", "fulfilment", "1", "--json"]).await.code(0).json();
        assert!(json["owner"].is_string(), "{json}");
        assert_eq!(
            (&json["process"], &json["id"], &json["request"], &json["requested"]),
            (&json!("fulfilment"), &json!("1"), &json!("cancel"), &json!(true))
        );
        until(&node, "1", InstanceState::Cancelled).await;
        fixture
            .run(&["process", "compensate", "fulfilment", "2"])
            .await
            .code(0)
            .shows(&["requested to compensate"]);
        until(&node, "2", InstanceState::Compensated).await;

        // A paused process, and no node at all.
        fixture.run(&["projection", "pause", "process fulfilment"]).await.code(0);
        fixture.run(&["process", "cancel", "fulfilment", "6"]).await.code(0).shows(&[
            "the process is paused, and acts on it after `storied projection resume \"process fulfilment\"`",
        ]);
        fixture.run(&["projection", "resume", "process fulfilment"]).await.code(0);
        until(&node, "6", InstanceState::Cancelled).await;
        drop(node);
        let free = async || store.leases().await.unwrap().iter().all(|lease| !lease.live);
        eventually("no node is live", free).await;
        fixture
            .run(&["process", "compensate", "fulfilment", "8"])
            .await
            .code(0)
            .shows(&["no live node runs the process, and the next one that starts acts on it"]);
        let node = self::node(&store).await;
        until(&node, "8", InstanceState::Compensated).await;
        drop(node);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_names_and_states_are_refused() {
    for fixture in databases().await {
        let store = fixture.open().await;
        let node = node(&store).await;
        place(&node, "1", &[], &["soon"]).await;
        until(&node, "1", InstanceState::Completed).await;
        let before = store.high_water_mark().await.unwrap();
        for command in ["show", "retry", "cancel", "compensate"] {
            // An aggregate is no process.
            fixture
                .run(&["process", command, "order", "1"])
                .await
                .code(4)
                .complains(&["unknown process \"order\"; the store has charging, fulfilment"]);
            fixture
                .run(&["process", command, "fulfilment", "99"])
                .await
                .code(4)
                .complains(&["process fulfilment has no instance \"99\"; check the id"]);
            for id in ["", "a\nb", &"x".repeat(401)] {
                fixture
                    .run(&["process", command, "fulfilment", id])
                    .await
                    .code(2)
                    .complains(&["instance id"]);
            }
            fixture.run(&["process", command, "a b", "1"]).await.code(2).complains(&["invalid process name"]);
        }
        fixture
            .run(&["process", "retry", "fulfilment", "1"])
            .await
            .code(4)
            .complains(&["is not parked; only a parked instance can retry"]);
        for command in ["cancel", "compensate"] {
            let run = fixture.run(&["process", command, "fulfilment", "1", "--json"]).await.code(4);
            let error: serde_json::Value = serde_json::from_str(&run.err).unwrap();
            assert_eq!(error["error"]["kind"], "refused");
            assert!(error["error"]["message"].as_str().unwrap().contains("has ended; no request applies"));
        }
        for wrong in [&["--state", "lost"][..], &["--from", "1"], &["--limit", "0"]] {
            fixture.run(&[&["process", "list"], wrong].concat()).await.code(2);
        }
        assert_eq!(store.high_water_mark().await.unwrap(), before, "nothing was written");
        node.shutdown().await.unwrap();
    }
}
