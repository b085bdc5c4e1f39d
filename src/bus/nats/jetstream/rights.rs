//! Subjects of the requests about streams and consumers, for which a login needs permissions.

/// Subjects of the requests about a stream.
pub(in crate::bus::nats) fn stream_rights(stream: &str) -> [String; 3] {
    [
        format!("$JS.API.STREAM.*.{stream}"),
        format!("$JS.API.STREAM.MSG.GET.{stream}"),
        "$JS.API.STREAM.NAMES".to_owned(),
    ]
}

/// Subjects of the requests about a consumer.
pub(super) fn consumer_rights(stream: &str, consumer: &str) -> [String; 4] {
    [
        format!("$JS.API.CONSUMER.*.{stream}.{consumer}"),
        format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"),
        format!("$JS.API.CONSUMER.CREATE.{stream}.>"),
        format!("$JS.API.STREAM.INFO.{stream}"),
    ]
}
