//! The example that reads the wire format without storied.

use ciborium::Value;
use storied::bus::NatsBus;

use crate::bus::fixtures::*;
use crate::bus::raw::Press;
use crate::support::{self, NatsServer};

#[path = "../../../examples/foreign_subscriber.rs"]
#[allow(dead_code, clippy::expect_used, reason = "its main is not for here")]
mod foreign_subscriber;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_foreign_reader_reads_events_and_detects_gaps() {
    let server = NatsServer::start(support::NatsOptions::core()).await;
    let bus: NatsBus = options(Kind::Core, &server).bus();
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let url = server.url();
    let following = tokio::spawn(async move {
        foreign_subscriber::follow(&url, "storied", |seen| {
            let enough = seen.version == 6;
            tell.send(seen).unwrap();
            !enough
        })
        .await
    });
    let mut press = Press::new(&bus).await;
    // The example does not report that it is subscribed. Requests do: without a subscription they
    // fail with NoResponders. The example ignores the requests, because they are no events.
    let client = bus.client().await.unwrap();
    let asked = || async_nats::Request::new().timeout(Some(std::time::Duration::from_millis(50)));
    while matches!(
        client.send_request("storied.events.note.torn", asked()).await,
        Err(error) if error.kind() == async_nats::RequestErrorKind::NoResponders
    ) {}
    press.events(1, &[Note::Torn, Note::Written { n: 7, text: "für alle".into() }, Note::Torn]).await;
    // An event that is not published.
    let lost = append(&press.store, 1, vec![note(&press.store, 1, 3)]).await;
    press.skip(lost);
    press.events(1, &[Note::Torn, Note::Torn]).await;
    let mut seen = Vec::new();
    while let Some(event) = told.recv().await {
        seen.push(event);
    }
    following.await.unwrap().unwrap();
    let brief: Vec<_> =
        seen.iter().map(|seen| (seen.version, seen.name.as_str(), seen.stream.as_str(), seen.hole)).collect();
    let torn = "note.torn";
    assert_eq!(
        brief,
        [
            (1, torn, "note/1", false),
            (2, "note.written", "note/1", false),
            (3, torn, "note/1", false),
            (5, torn, "note/1", true),
            (6, torn, "note/1", false),
        ]
    );
    let Some(Value::Map(written)) = &seen[1].payload else { panic!("{:?}", seen[1]) };
    assert_eq!(written[1], (Value::Text("text".into()), Value::Text("für alle".into())));
}
