//! Queue groups over several names: one group per name, or none for some.

use std::collections::BTreeMap;

use storied::bus::SubscribeOptions;

use super::common::*;
use super::*;
use crate::support::NatsServer;

/// Several subscribers that count their events by name.
/// Each has its own connection, like the instances of a service.
async fn counted(
    way: Way,
    server: &NatsServer,
    press: &mut Press,
    names: &[&str],
    group: impl Fn(SubscribeOptions) -> SubscribeOptions,
) -> Vec<BTreeMap<String, usize>> {
    let mut subscribers = Vec::new();
    for _ in 0..3 {
        let bus = options(way.kind(), server).bus();
        // The capacity is limited, so that one subscriber does not take everything before the
        // others request.
        subscribers.push(listen(&bus, names, group(way.options("all")).capacity(1_000)).await);
    }
    let events: Vec<_> = (0..120)
        .map(|n| if n % 2 == 0 { Note::Torn } else { Note::Written { n, text: "x".into() } })
        .collect();
    press.events(7, &events).await;
    let mut counts = vec![BTreeMap::new(); subscribers.len()];
    for (subscriber, counts) in subscribers.iter_mut().zip(&mut counts) {
        while let Ok(Some(next)) = timeout(Duration::from_millis(700), subscriber.next()).await {
            let Received::Event(delivery) = next else { panic!("{next:?}") };
            delivery.ack().await.unwrap();
            *counts.entry(delivery.event().name.to_string()).or_insert(0) += 1;
        }
    }
    counts
}

fn total(counts: &[BTreeMap<String, usize>], name: &str) -> usize {
    counts.iter().filter_map(|counts| counts.get(name)).sum()
}

const NAMES: [&str; 2] = ["note.written", "note.torn"];

/// The load balancer makes one group per name: `service:note.written` and `service:note.torn`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_name_has_its_own_group() {
    for way in [Way::Core, Way::Ephemeral, Way::Durable, Way::Push] {
        let (bus, server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let counts =
            counted(way, &server, &mut press, &NAMES, |options| options.load_balancer("service")).await;
        for name in NAMES {
            assert_eq!(total(&counts, name), 60, "{way:?} {name}: each event reached one: {counts:?}");
        }
    }
}

/// All subscribers get every event of a name without a group, or with an empty one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_without_a_group_goes_to_all_subscribers() {
    for way in [Way::Core, Way::Ephemeral] {
        for none in [None, Some(String::new())] {
            let (bus, server) = way.start().await;
            let mut press = Press::new(&bus).await;
            let none = &none;
            let counts = counted(way, &server, &mut press, &NAMES, |options| {
                let none = none.clone();
                options.queue_groups(move |name| match name {
                    "note.torn" => Some("torn".into()),
                    _ => none.clone(),
                })
            })
            .await;
            assert_eq!(total(&counts, "note.torn"), 60, "{way:?} {none:?} {counts:?}");
            for counts in &counts {
                assert_eq!(counts.get("note.written"), Some(&60), "{way:?} {none:?} {counts:?}");
            }
        }
    }
}
