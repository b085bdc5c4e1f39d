//! The port to the event bus, implemented over NATS.

use std::borrow::Cow;

use uuid::Uuid;

use super::core_nats::CorePublisher;
use super::durable_consumer::NatsFollower;
use super::jetstream::LogPublisher;
use super::live_subscription::NatsSubscription;
use super::nats_bus::NatsBus;
use super::options::Driver;
use super::wakeup;
use super::wire::Wire;
use crate::bus::{BusError, BusPublisher, BusState, BusSubscription, DurableSubscription, EventBus, Follow};
use crate::future::BoxFuture;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;

impl EventBus for NatsBus {
    fn name(&self) -> &'static str {
        match self.inner.options.driver {
            Driver::Core => "nats-core",
            Driver::JetStream(_) => "nats-jetstream",
        }
    }

    fn check(&self) -> Result<(), BusError> {
        self.inner.check()
    }

    fn destination(&self) -> Cow<'static, str> {
        self.destination_name().to_owned().into()
    }

    #[cfg(feature = "otel")]
    fn observe(&self, telemetry: &Telemetry) {
        self.inner.metrics.configure(telemetry);
    }

    fn state(&self) -> BusState {
        self.inner.state.borrow().clone()
    }

    fn publisher(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>> {
        Box::pin(async move {
            let connection = self.connection().await?;
            let names = &self.inner.names;
            Ok(match &self.inner.options.driver {
                Driver::Core => Box::new(CorePublisher::new(connection, names, store).await?) as _,
                Driver::JetStream(options) => {
                    Box::new(LogPublisher::new(connection, names, store, options.clone())) as _
                }
            })
        })
    }

    fn hint(&self, store: Uuid) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async move {
            let connection = self.connection().await?;
            connection.check()?;
            wakeup::hint(&connection.client, &Wire::new(self.names(), store)).await
        })
    }

    fn subscribe(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>> {
        Box::pin(async move {
            let connection = self.connection().await?;
            let names = &self.inner.names;
            Ok(Box::new(NatsSubscription::new(connection, names, store).await?) as _)
        })
    }

    fn is_durable(&self) -> bool {
        matches!(self.inner.options.driver, Driver::JetStream(_))
    }

    fn follow(&self, follow: Follow) -> Result<Box<dyn DurableSubscription>, BusError> {
        self.stream_of()?;
        Ok(Box::new(NatsFollower::start(self.clone(), follow)?))
    }
}
