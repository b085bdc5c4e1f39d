use std::fmt;

use opentelemetry::metrics::{Meter, MeterProvider};
use opentelemetry::{InstrumentationScope, global};

/// The OpenTelemetry meter provider of the metrics. Default: the global provider.
///
/// [`Builder::telemetry`](crate::runtime::Builder::telemetry) sets it for the whole runtime:
/// aggregates, projections, publisher, event bus and command bus. A [`NatsBus`](crate::NatsBus)
/// without a runtime has `NatsOptions::telemetry`. Spans go through `tracing`; the subscriber of
/// the program selects their tracer provider.
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
    /// Sends metrics to this provider.
    #[must_use]
    pub fn of(provider: &dyn MeterProvider) -> Self {
        Self { meter: provider.meter_with_scope(scope()) }
    }

    /// Sends metrics to the current global provider, which must be set before. The default.
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
