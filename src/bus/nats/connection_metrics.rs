//! The destination of the metrics of a connection.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use crate::telemetry::Metrics;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;

/// The metrics of a bus.
///
/// The options decide first, then the first runtime with the bus. Before a runtime exists, the
/// global provider is used: a bus may connect long before a runtime starts.
#[derive(Debug, Clone)]
pub(super) struct Recorder(Arc<Choice>);

#[derive(Debug, Default)]
struct Choice {
    configured: OnceLock<Metrics>,
    usual: OnceLock<Metrics>,
}

impl Recorder {
    pub(super) fn new(configured: Option<Metrics>) -> Self {
        Self(Arc::new(Choice {
            configured: configured.map(OnceLock::from).unwrap_or_default(),
            usual: OnceLock::new(),
        }))
    }

    /// Sets the destination to that of a runtime, unless it is set already.
    #[cfg(feature = "otel")]
    pub(super) fn configure(&self, telemetry: &Telemetry) {
        self.0.configured.get_or_init(|| Metrics::of(telemetry));
    }
}

impl Deref for Recorder {
    type Target = Metrics;

    fn deref(&self) -> &Metrics {
        #[cfg(feature = "otel")]
        let usual = || Metrics::of(&Telemetry::global());
        #[cfg(not(feature = "otel"))]
        let usual = Metrics::default;
        let Choice { configured, usual: chosen } = &*self.0;
        configured.get().unwrap_or_else(|| chosen.get_or_init(usual))
    }
}

/// The metrics of a connection, and its role in them.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    pub(super) role: &'static str,
    pub(super) metrics: Recorder,
}
