//! Telemetry: spans through `tracing`, metrics and trace context through OpenTelemetry.
//!
//! The latter two need the feature `otel`.
//!
//! `docs/observability.md` lists all of it.
//!
//! This module is the lowest layer: it depends on events only. Without the feature, metrics and
//! trace context are empty functions. Without an interested subscriber, a span costs one atomic
//! load.

#[cfg(feature = "otel")]
mod context;
#[cfg(feature = "otel")]
mod metrics;
#[cfg(not(feature = "otel"))]
#[path = "telemetry/noop.rs"]
mod metrics;
#[cfg(not(feature = "otel"))]
use self::metrics as context;
#[cfg(feature = "otel")]
mod provider;
pub(crate) mod trace;

pub(crate) use self::metrics::{Metrics, Timer};
#[cfg(feature = "otel")]
pub use self::provider::Telemetry;
