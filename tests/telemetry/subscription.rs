//! The metrics of raw subscriptions.

use std::time::Duration;

use storied::bus::{
    ConsumerOptions, HandleError, HandleOptions, NatsBus, Received, RetryPolicy, SubscribeOptions,
    Subscription,
};
use storied::{MemoryStore, Runtime};

use crate::meters::*;
use crate::support::{self, NatsServer};

async fn received(subscription: &mut Subscription) -> storied::bus::Delivery {
    match tokio::time::timeout(PATIENCE, subscription.next()).await {
        Ok(Some(Received::Event(delivery))) => delivery,
        other => panic!("no event but {other:?}"),
    }
}

async fn subscribe(bus: &NatsBus, name: &str) -> Subscription {
    let consumer = ConsumerOptions::durable_as(name).ack_wait(Duration::from_secs(30));
    bus.subscribe(["*"], SubscribeOptions::new().consumer(consumer)).await.unwrap()
}

pub async fn scenario(meters: &Meters) {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = log_stream(&server).telemetry(&meters.telemetry()).bus();
    let builder = Runtime::builder().store(MemoryStore::new()).bus(log_stream(&server).bus());
    let node = builder.aggregate::<Counter>().start().await.unwrap();
    for n in 1..=4 {
        node.execute::<Counter>("a", Add(n)).await.unwrap();
    }
    let stream = [("messaging.system", "nats"), ("messaging.destination.name", "STORIED_EVENTS")];
    let with = |name: &'static str| [stream[0], stream[1], ("messaging.operation.name", name)];

    let mut reader = subscribe(&bus, "reader").await;
    let first = received(&mut reader).await;
    first.ack().await.unwrap();
    let second = received(&mut reader).await;
    second.nak().await.unwrap();
    received(&mut reader).await.term().await.unwrap();
    let fourth = received(&mut reader).await;
    let again = received(&mut reader).await;
    assert_eq!((again.event().id, again.attempt()), (second.event().id, 2));
    assert_eq!(meters.sum("messaging.client.consumed.messages", &with("receive")), 5.0);
    assert_eq!(meters.sum("storied.consumer.redeliveries", &stream), 1.0);
    for how in ["ack", "nak", "term"] {
        assert_eq!(meters.sum("storied.consumer.settled", &with(how)), 1.0, "{how}");
        assert_eq!(meters.count("messaging.client.operation.duration", &with(how)), 1, "{how}");
    }
    // The counts of the server: nothing to deliver, two without an acknowledgement.
    let group = [stream[0], stream[1], ("messaging.consumer.group.name", "reader")];
    meters.until("storied.consumer.unsettled", &group, |unsettled| unsettled == 2.0).await;
    assert_eq!(meters.sum("storied.consumer.pending", &group), 0.0);
    let jetstream = async_nats::jetstream::new(bus.client().await.unwrap());
    let consumer: async_nats::jetstream::consumer::PullConsumer =
        jetstream.get_consumer_from_stream("reader", "STORIED_EVENTS").await.unwrap();
    let info = consumer.cached_info();
    assert_eq!((info.num_ack_pending, info.num_pending), (2, 0));
    drop((fourth, again));

    let handled = subscribe(&bus, "handled").await;
    let options = HandleOptions::new().retry(RetryPolicy::never()).dead_letters();
    let handling = handled
        .for_each(options, |delivery| async move {
            let event: CounterEvent = delivery.decode().map_err(HandleError::reject)?;
            if event == (CounterEvent::Added { n: 3 }) {
                Err(HandleError::reject("3 is not for this handler"))
            } else {
                Ok(())
            }
        })
        .unwrap();
    meters.until("storied.consumer.dead_letters", &stream, |dead| dead == 1.0).await;
    meters.until("storied.consumer.settled", &with("ack"), |acks| acks == 4.0).await;
    assert_eq!(meters.count("messaging.process.duration", &with("process")), 4);
    assert_eq!(meters.count("messaging.process.duration", &[("error.type", "give_up")]), 1);
    handling.stop(PATIENCE).await.unwrap();
    reader.close(PATIENCE).await.unwrap();
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_deliveries_and_their_outcomes() {
    let _turn = TURN.read().await;
    scenario(&Meters::new()).await;
}
