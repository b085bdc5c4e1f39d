//! docs/nats-permissions.conf: each role works with exactly these permissions.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::{ConnectOptions, Event};
use storied::bus::{
    ConsumerOptions, HandleOptions, JetStreamOptions, NatsBus, NatsOptions, ProvisionPolicy, SubscribeOptions,
};
use storied::projection::{ApplyError, AtLeastOnce, Delivery, FollowMode};
use storied::testing::Node;
use storied::{AnyEvent, EventBus, Filter, Position, Projection, ProjectionOptions, RecordedEvent};

use crate::bus::fixtures::*;
use crate::bus::raw::{Press, listen, take};
use crate::support::{self, NatsServer};

const PASSWORD: &str = "change-me";

/// Starts the server of the document, with an operator in addition to its roles.
async fn server() -> NatsServer {
    let config = include_str!("../../../docs/nats-permissions.conf");
    let operator = "users: [\n{ user: operator, password: change-me }\n";
    let config = vec![config.replace("users: [", operator)];
    NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::jetstream() }).await
}

fn role(options: NatsOptions, server: &NatsServer, role: &str) -> NatsOptions {
    let options = options.url(server.url()).user_and_password(role, PASSWORD);
    quick(options).namespace("shop").inbox_prefix(format!("_INBOX_{role}"))
}

fn existing() -> JetStreamOptions {
    log_stream().policy(ProvisionPolicy::RequireExisting)
}

fn operator(server: &NatsServer) -> NatsBus {
    role(NatsOptions::jetstream(log_stream()), server, "operator").bus()
}

fn no_violation(server: &NatsServer) {
    assert!(!server.log().contains("Violation"), "{}", server.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_work_with_their_rights() {
    for (login, options) in [
        ("core_node", NatsOptions::core()),
        ("jetstream_node", NatsOptions::jetstream(existing())),
        ("jetstream_owner", NatsOptions::jetstream(log_stream())),
    ] {
        let server = server().await;
        if login == "jetstream_node" {
            let made = listen(&operator(&server), &["*"], SubscribeOptions::new()).await;
            made.close(PATIENCE).await.unwrap();
        }
        let bus = || role(options.clone(), &server, login).bus();
        let store = store();
        write(&store, 0, 50).await;
        let one = Recording::start(&store, bus(), blind()).await;
        let two = Recording::start(&store, bus(), blind()).await;
        write(&store, 0, 50).await;
        one.reaches("one", &store).await;
        two.reaches("two", &store).await;
        assert_eq!(one.node.publisher().last_error, None, "{login}");
        one.node.stop(PATIENCE).await.unwrap();
        two.node.stop(PATIENCE).await.unwrap();
        no_violation(&server);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_work_with_their_rights() {
    let server = server().await;
    let consumer =
        |policy| SubscribeOptions::new().consumer(ConsumerOptions::durable_as("shipping").policy(policy));
    for (login, made) in [("consumer_reader", true), ("consumer_owner", false)] {
        let operator = operator(&server);
        let policy = if made { ProvisionPolicy::RequireExisting } else { ProvisionPolicy::CreateOrVerify };
        if made {
            let subscription = listen(&operator, &["*"], consumer(ProvisionPolicy::CreateOrVerify)).await;
            subscription.close(PATIENCE).await.unwrap();
        }
        let mut press = Press::new(&operator).await;
        let printed = press.written(20).await;
        let reader = role(NatsOptions::jetstream(existing()), &server, login).bus();
        let mut subscription = listen(&reader, &["*"], consumer(policy)).await;
        same(&take(&mut subscription, 10).await, &printed[..10]);
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let handling = subscription.for_each(HandleOptions::new(), move |delivery| {
            tell.send(delivery.event().position).unwrap();
            std::future::ready(Ok(()))
        });
        let mut last = Position::START;
        while last < printed[19].position {
            last = told.recv().await.unwrap();
        }
        handling.unwrap().stop(Duration::from_secs(10)).await.unwrap();
        // The next role has its own stream and consumer.
        let jetstream = async_nats::jetstream::new(operator.client().await.unwrap());
        jetstream.get_stream("SHOP_EVENTS").await.unwrap().delete_consumer("shipping").await.unwrap();
        jetstream.get_stream("SHOP_EVENTS").await.unwrap().purge().await.unwrap();
        jetstream.delete_stream("SHOP_EVENTS").await.unwrap();
        listen(&operator, &["*"], SubscribeOptions::new()).await.close(PATIENCE).await.unwrap();
    }
    let publisher = role(NatsOptions::core(), &server, "core_node").bus();
    let core = role(NatsOptions::core(), &server, "core_reader").bus();
    let mut subscription = listen(&core, &["note.written"], SubscribeOptions::new()).await;
    let mut press = Press::new(&publisher).await;
    let printed = press.written(5).await;
    same(&take(&mut subscription, 5).await, &printed);
    no_violation(&server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn durable_projections_work_with_their_rights() {
    for filter in
        [Filter::all(), Filter::variants::<Note>(["torn"]), Filter::variants::<Note>(["torn", "written"])]
    {
        let server = server().await;
        let made = listen(&operator(&server), &["*"], SubscribeOptions::new()).await;
        made.close(PATIENCE).await.unwrap();
        let store = store();
        write(&store, 0, 5).await;
        let bus = role(NatsOptions::jetstream(existing()), &server, "durable_node").bus();
        let node = Node::start(store.clone(), Some(Arc::new(bus)), blind(), publishing()).await;
        let options = ProjectionOptions::new().follow(FollowMode::Durable);
        let handle = node.projection(Shipments(filter), AtLeastOnce::new(), options).await;
        handle.wait_until_caught_up(PATIENCE).await.unwrap();
        let context = async_nats::jetstream::new(operator(&server).client().await.unwrap());
        tokio::time::timeout(PATIENCE, async {
            let stream = context.get_stream("SHOP_EVENTS").await.unwrap();
            loop {
                match stream.consumer_info("projection=2Fshipments").await {
                    Ok(found) if found.num_pending == 0 && found.num_ack_pending == 0 => break,
                    _ => pause(20).await,
                }
            }
        })
        .await
        .expect("the consumer has nothing left");
        let position = Position::new(10);
        write(&store, 0, 5).await;
        handle.caught_up_to_within(position, PATIENCE).await.unwrap();
        node.stop(PATIENCE).await.unwrap();
        no_violation(&server);
    }
}

/// A projection that does nothing.
struct Shipments(Filter);

impl Projection for Shipments {
    const NAME: &'static str = "shipments";
    type Event = AnyEvent;
    type Transaction = Delivery;

    fn filter(&self) -> Filter {
        self.0.clone()
    }

    async fn apply(&mut self, _: AnyEvent, _: &RecordedEvent, _: &mut Delivery) -> Result<(), ApplyError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tool_works_with_its_rights() {
    let server = server().await;
    let store = store();
    write(&store, 0, 10).await;
    let node = Recording::start(&store, operator(&server), blind()).await;
    node.reaches("the log stream", &store).await;
    node.node.stop(PATIENCE).await.unwrap();
    let tool = role(NatsOptions::jetstream(log_stream()), &server, "tool").bus();
    let report = tool.inspect(store.info().id).await.unwrap();
    assert!(report.streams.iter().any(|stream| stream.found.is_some()), "{report:?}");
    let mut reader = tool.read_log_stream(store.info().id).await.unwrap();
    let mut messages = 0;
    while reader.next().await.unwrap().is_some() {
        messages += 1;
    }
    assert_eq!(messages, 10);
    no_violation(&server);
}

/// Attempts of an attacker with the login of a role, beyond the needs of the role.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_has_no_other_rights() {
    let server = server().await;
    let made = listen(&operator(&server), &["*"], SubscribeOptions::new()).await;
    made.close(PATIENCE).await.unwrap();
    let everything = [
        "shop.events.order.placed",
        "shop.head",
        "shop.hint",
        "shop.commands.presence",
        "shop.commands.node.0190a000-0000-7000-8000-000000000000",
        "shop.dead.order.placed",
        "other.events.order.placed",
        "$JS.API.INFO",
        "$JS.API.STREAM.NAMES",
        "$JS.API.STREAM.LIST",
        "$JS.API.STREAM.INFO.OTHER",
        "$JS.API.STREAM.CREATE.OTHER",
        "$JS.API.STREAM.CREATE.SHOP_EVENTS",
        "$JS.API.STREAM.UPDATE.SHOP_EVENTS",
        "$JS.API.STREAM.DELETE.SHOP_EVENTS",
        "$JS.API.STREAM.PURGE.SHOP_EVENTS",
        "$JS.API.STREAM.MSG.GET.SHOP_EVENTS",
        "$JS.API.STREAM.MSG.DELETE.SHOP_EVENTS",
        "$JS.API.STREAM.SNAPSHOT.SHOP_EVENTS",
        "$JS.API.DIRECT.GET.SHOP_EVENTS",
        "$JS.API.CONSUMER.LIST.SHOP_EVENTS",
        "$JS.API.CONSUMER.CREATE.SHOP_EVENTS",
        "$JS.API.CONSUMER.CREATE.SHOP_EVENTS.other",
        "$JS.API.CONSUMER.CREATE.SHOP_EVENTS.shipping.shop.events.>",
        "$JS.API.CONSUMER.DURABLE.CREATE.SHOP_EVENTS.shipping",
        "$JS.API.CONSUMER.DELETE.SHOP_EVENTS.shipping",
        "$JS.API.CONSUMER.MSG.NEXT.SHOP_EVENTS.other",
        "$JS.ACK.SHOP_EVENTS.other.1.1.1.1.0",
        "_INBOX.x.y",
        "_INBOX_operator.x.y",
        "$SYS.REQ.SERVER.PING",
    ];
    let nodes = ["shop.events.order.placed", "shop.head", "shop.hint"];
    let commands = ["shop.commands.presence", "shop.commands.node.0190a000-0000-7000-8000-000000000000"];
    // Subjects of the above that the role may publish and subscribe to.
    type Subjects<'a> = &'a [&'a [&'a str]];
    let roles: [(&str, Subjects<'_>, Subjects<'_>); 9] = [
        ("core_node", &[&nodes], &[&nodes]),
        ("jetstream_node", &[&nodes, &["$JS.API.STREAM.MSG.GET.SHOP_EVENTS"]], &[&nodes]),
        ("durable_node", &[&nodes, &["$JS.API.STREAM.MSG.GET.SHOP_EVENTS"]], &[&nodes]),
        (
            "jetstream_owner",
            &[
                &nodes,
                &[
                    "$JS.API.STREAM.NAMES",
                    "$JS.API.STREAM.MSG.GET.SHOP_EVENTS",
                    "$JS.API.STREAM.CREATE.SHOP_EVENTS",
                    "$JS.API.STREAM.UPDATE.SHOP_EVENTS",
                ],
            ],
            &[&nodes],
        ),
        ("command_node", &[&commands], &[&commands]),
        ("core_reader", &[], &[&["shop.events.order.placed"]]),
        ("consumer_reader", &[], &[]),
        ("consumer_owner", &[], &[]),
        ("tool", &[&["$JS.API.STREAM.MSG.GET.SHOP_EVENTS", "$JS.API.CONSUMER.LIST.SHOP_EVENTS"]], &[]),
    ];
    for (login, publishes, subscribes) in roles {
        let violations: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = violations.clone();
        let client = ConnectOptions::with_user_and_password(login.into(), PASSWORD.into())
            .custom_inbox_prefix(format!("_INBOX_{login}"))
            .event_callback(move |event| {
                if let Event::ServerError(error) = event {
                    heard.lock().unwrap().push(error.to_string());
                }
                std::future::ready(())
            })
            .connect(server.url())
            .await
            .unwrap();
        let mut forbidden = Vec::new();
        let mut subscriptions = Vec::new();
        for subject in everything {
            if !publishes.iter().any(|allowed| allowed.contains(&subject)) {
                client.publish(subject, "".into()).await.unwrap();
                forbidden.push(format!("Publish to \"{subject}\""));
            }
            if !subscribes.iter().any(|allowed| allowed.contains(&subject)) {
                subscriptions.push(client.subscribe(subject).await.unwrap());
                forbidden.push(format!("Subscription to \"{subject}\""));
            }
        }
        for subject in ["_INBOX.>", ">", "shop.>", "*.commands.>", "$JS.>"] {
            subscriptions.push(client.subscribe(subject).await.unwrap());
            forbidden.push(format!("Subscription to \"{subject}\""));
        }
        let all = || {
            let heard = violations.lock().unwrap();
            forbidden.iter().all(|violation| heard.iter().any(|error| error.contains(violation)))
        };
        eventually(&format!("every attempt of {login} is refused"), all).await;
        assert_eq!(violations.lock().unwrap().len(), forbidden.len(), "{login}: {violations:?}");
    }
}

/// With a common prefix, every login can read the inboxes of the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inboxes_have_the_prefix_that_was_chosen() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let spy = async_nats::connect(server.url()).await.unwrap();
    let mut answers = spy.subscribe("_INBOX.>").await.unwrap();
    spy.flush().await.unwrap();
    for kind in NATS {
        let bus = options(kind, &server).inbox_prefix("_INBOX_shop.7").bus();
        let mut press = Press::new(&bus).await;
        let mut subscription = listen(&bus, &["*"], SubscribeOptions::new()).await;
        press.written(3).await;
        take(&mut subscription, 3).await;
        subscription.close(PATIENCE).await.unwrap();
        assert!(bus.hint(press.store.info().id).await.is_ok());
    }
    spy.flush().await.unwrap();
    let heard = tokio::time::timeout(Duration::from_millis(100), futures_util::StreamExt::next(&mut answers));
    assert!(heard.await.is_err(), "an answer went to the common inbox");
    for wrong in ["", ".", "a b", "a.>", "*", "a..b", "ü"] {
        let error = NatsOptions::core().inbox_prefix(wrong).bus().check().unwrap_err().to_string();
        assert!(error.contains("NatsOptions::inbox_prefix"), "{wrong}: {error}");
    }
}
