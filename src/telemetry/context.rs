//! W3C trace context: from the current span to the metadata of commands and events, and back.

use std::str::FromStr;

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry::{Context, ContextGuard};
use tracing::Span;

use crate::event::Metadata;

/// Returns the context in the metadata, if it is valid.
pub(super) fn of(metadata: &Metadata) -> Option<SpanContext> {
    let mut parts = metadata.traceparent.as_deref()?.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    // Version 00 has four parts, ff is forbidden, later versions may have more parts.
    let whole = version.len() == 2 && version != "ff" && (version != "00" || parts.next().is_none());
    let sized = trace.len() == 32 && span.len() == 16 && flags.len() == 2;
    let hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !whole || !sized || ![version, trace, span, flags].into_iter().all(hex) {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let state = metadata.tracestate.as_deref().and_then(|state| TraceState::from_str(state).ok());
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    Some(SpanContext::new(trace, span, flags, true, state.unwrap_or_default())).filter(SpanContext::is_valid)
}

/// Makes the context of a command the parent of the spans that begin now.
///
/// Does nothing if the current span belongs to the same trace, because it is the nearer parent.
pub(super) fn enter(metadata: &Metadata) -> Option<ContextGuard> {
    let came = of(metadata)?;
    let near = current().is_some_and(|current| current.trace_id() == came.trace_id());
    (!near).then(|| Context::new().with_remote_span_context(came).attach())
}

/// Writes `span` into the metadata, in place of its parent.
///
/// Without a tracer for `span`, it writes the current context.
pub(super) fn inject(span: &Span, metadata: &mut Metadata) {
    let Some(context) = span.in_scope(current) else { return };
    // A valid context of another trace stays. An invalid one belongs to no trace and is replaced.
    if of(metadata).is_some_and(|came| came.trace_id() != context.trace_id()) {
        return;
    }
    let flags = context.trace_flags() & TraceFlags::SAMPLED;
    metadata.traceparent =
        Some(format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), flags.to_u8()));
    let state = context.trace_state().header();
    metadata.tracestate = (!state.is_empty()).then_some(state);
}

/// Returns the current context, if there is a trace.
fn current() -> Option<SpanContext> {
    Context::map_current(|context| context.has_active_span().then(|| context.span().span_context().clone()))
        .filter(SpanContext::is_valid)
}

/// Links `span` to the spans that caused it and are not its parents.
///
/// Does nothing if no layer passes `span` to OpenTelemetry; the current span would be linked
/// instead.
pub(super) fn link<'a>(span: &Span, causes: impl Iterator<Item = &'a Metadata>) {
    let mut last = None;
    let surrounding = current();
    span.in_scope(|| {
        if current() == surrounding {
            return;
        }
        let context = Context::current();
        let span = context.span();
        for cause in causes.filter_map(of) {
            // All events of one command have the same context.
            if last.as_ref() != Some(&cause) {
                span.add_link(cause.clone(), Vec::new());
                last = Some(cause);
            }
        }
    });
}

/// Returns whether the trace of the metadata is sampled.
pub(super) fn is_sampled(metadata: &Metadata) -> bool {
    of(metadata).is_some_and(|context| context.is_sampled())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
    use tracing_subscriber::Layer;
    use tracing_subscriber::filter::filter_fn;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    fn with(traceparent: &str) -> Metadata {
        Metadata { traceparent: Some(traceparent.to_owned()), ..Metadata::default() }
    }

    #[test]
    fn only_the_given_span_is_linked() {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let exported =
            filter_fn(|span| span.name() != "seen by other layers only" && span.name() != "seen by no layer");
        let others = filter_fn(|span| span.name() != "seen by no layer");
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test")).with_filter(exported);
        let text = tracing_subscriber::fmt::layer().with_writer(std::io::sink).with_filter(others);
        let cause = with("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer).with(text), || {
            tracing::info_span!("foreign").in_scope(|| {
                for span in [
                    tracing::info_span!(parent: None, "exported"),
                    tracing::info_span!(parent: None, "seen by other layers only"),
                    tracing::info_span!(parent: None, "seen by no layer"),
                ] {
                    link(&span, [&cause, &cause].into_iter());
                }
            });
        });
        let spans = exporter.get_finished_spans().unwrap();
        let mut links: Vec<_> = spans.iter().map(|span| (&*span.name, span.links.iter().count())).collect();
        links.sort_unstable();
        assert_eq!(links, [("exported", 1), ("foreign", 0)]);
    }

    #[test]
    fn reads_only_valid_trace_context() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = of(&with(good)).unwrap();
        assert_eq!(context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(context.span_id().to_string(), "b7ad6b7169203331");
        assert!(context.is_sampled() && context.is_remote());
        assert!(!is_sampled(&with("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")));
        assert!(
            of(&with("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-the-future-brings"))
                .is_some()
        );
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "FF-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "zz-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-+1",
            "00-0AF7651916CD43DD8448EB211C80319C-B7AD6B7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319z-b7ad6b7169203331-01",
            "00-é7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0é",
        ] {
            assert!(of(&with(bad)).is_none(), "{bad}");
        }
    }
}
