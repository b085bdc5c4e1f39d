//! What is told to whoever watches: spans through `tracing`, metrics and trace context through OpenTelemetry (feature
//! `otel`). All of it is listed in `docs/observability.md`.
//!
//! At the bottom of the house: it knows events and nothing above. Without the feature, metrics and trace context are empty
//! functions; without a subscriber that wants them, spans are a look at an atomic number each.

#[cfg(feature = "otel")]
mod context;
#[cfg(feature = "otel")]
mod metrics;
#[cfg(not(feature = "otel"))]
#[path = "telemetry/off.rs"]
mod metrics;
#[cfg(not(feature = "otel"))]
use self::metrics as context;
#[cfg(feature = "otel")]
mod provider;
pub(crate) mod trace;

pub(crate) use self::metrics::{Metrics, Timer};
#[cfg(feature = "otel")]
pub use self::provider::Telemetry;
