use futures_util::StreamExt;
use storied::NatsBus;
use storied::bus::JetStreamOptions;
use storied::command::{CommandBus, NatsCommandOptions};

use crate::args::BusKind;
use crate::support::{NatsOptions, NatsServer};

/// Namespace on a server that may be shared.
const NAMESPACE: &str = "storied_bench";

/// The log stream in JetStream.
pub const STREAM: &str = "STORIED_BENCH_EVENTS";

/// All subjects of events.
pub const EVENTS: &str = "storied_bench.events.>";

/// The server of the environment, or a private one that ends with this value.
pub struct Nats {
    url: String,
    _private: Option<NatsServer>,
}

impl Nats {
    /// Connects, and deletes the log stream of an earlier run.
    pub async fn start(bus: BusKind) -> Self {
        let nats = match std::env::var("NATS_URL") {
            Ok(url) if !url.is_empty() => Self { url, _private: None },
            _ => {
                let options = match bus {
                    BusKind::JetStream => NatsOptions::jetstream(),
                    BusKind::Local | BusKind::Core => NatsOptions::core(),
                };
                let server = NatsServer::start(options).await;
                Self { url: server.url(), _private: Some(server) }
            }
        };
        if bus == BusKind::JetStream {
            nats.drop_log_stream().await;
        }
        nats
    }

    pub async fn connect(&self) -> async_nats::Client {
        async_nats::connect(&self.url).await.unwrap()
    }

    pub fn events(&self, bus: BusKind) -> NatsBus {
        match bus {
            BusKind::JetStream => self.log_stream(JetStreamOptions::new()),
            BusKind::Local | BusKind::Core => self.bus(storied::NatsOptions::core()),
        }
    }

    pub fn log_stream(&self, options: JetStreamOptions) -> NatsBus {
        self.bus(storied::NatsOptions::jetstream(options.stream(STREAM)))
    }

    fn bus(&self, options: storied::NatsOptions) -> NatsBus {
        options.url(&self.url).namespace(NAMESPACE).bus()
    }

    pub fn commands(&self) -> CommandBus {
        let options = storied::NatsOptions::core().url(&self.url).namespace(NAMESPACE);
        CommandBus::nats(NatsCommandOptions::new(options))
    }

    /// Deletes the log stream, so that nothing stays on a shared server.
    pub async fn drop_log_stream(&self) {
        let context = async_nats::jetstream::new(self.connect().await);
        // The stream may not exist.
        drop(context.delete_stream(STREAM).await);
    }
}

/// Returns an active subscription.
///
/// `flush` awaits no answer, so messages that another connection publishes at once would be missed.
pub async fn subscribe(client: &async_nats::Client, subject: async_nats::Subject) -> async_nats::Subscriber {
    let messages = client.subscribe(subject).await.unwrap();
    let inbox = client.new_inbox();
    let mut echo = client.subscribe(inbox.clone()).await.unwrap();
    client.publish(inbox, "".into()).await.unwrap();
    // The server processes the messages of one connection in order.
    echo.next().await.unwrap();
    messages
}
