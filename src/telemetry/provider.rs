use std::fmt;

use opentelemetry::metrics::{Meter, MeterProvider};
use opentelemetry::{InstrumentationScope, global};

/// Where metrics go: into a meter provider of OpenTelemetry. The global one by default.
///
/// Given to [`Builder::telemetry`](crate::runtime::Builder::telemetry) it is that of the whole runtime: aggregates,
/// projections, publisher, the event bus and the command bus. A [`NatsBus`](crate::NatsBus) without a runtime has
/// `NatsOptions::telemetry`. Spans go through `tracing`: which tracer provider they end in is said where the program sets
/// up its subscriber.
///
/// ```
/// use storied::{MemoryStore, Runtime, Telemetry};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let provider = opentelemetry::metrics::noop::NoopMeterProvider::new();
/// let runtime = Runtime::builder()
///     .store(MemoryStore::new())
///     .telemetry(Telemetry::of(&provider))
///     .start()
///     .await?;
/// # runtime.shutdown().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Telemetry {
    meter: Meter,
}

impl Telemetry {
    /// Metrics go to this provider.
    #[must_use]
    pub fn of(provider: &dyn MeterProvider) -> Self {
        Self { meter: provider.meter_with_scope(scope()) }
    }

    /// Metrics go to the provider that is the global one now; set it before. The default.
    #[must_use]
    pub fn global() -> Self {
        Self { meter: global::meter_with_scope(scope()) }
    }

    pub(crate) fn meter(&self) -> &Meter {
        &self.meter
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::global()
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

fn scope() -> InstrumentationScope {
    InstrumentationScope::builder(env!("CARGO_PKG_NAME")).with_version(env!("CARGO_PKG_VERSION")).build()
}
