//! Names of consumers: readable, made from several parts, and distinct for distinct parts.

use std::fmt::Write;

use uuid::Uuid;

/// Names for every event, and for no queue group.
const EVERYTHING: &str = "$all";
const NO_QUEUE: &str = "$noqueue";

/// Maximum length of a name. The server allows 255 bytes.
const LONGEST: usize = 240;

/// Returns `prefix:queue:event`, with `,` between several events.
pub(super) fn durable(prefix: &str, queue: Option<&str>, events: &[&str]) -> String {
    let queue = queue.map_or_else(|| NO_QUEUE.to_owned(), sanitised);
    let events: Vec<_> = events.iter().map(|event| sanitised(event)).collect();
    shortened(format!("{}:{queue}:{}", sanitised(prefix), events.join(",")))
}

/// Encodes a name of the user.
pub(super) fn custom(name: &str) -> String {
    shortened(sanitised(name))
}

/// Whether a consumer is one that a projection or a partition of a projection follows.
///
/// Its name is the [`custom`] form of a checkpoint name. Names of subscriptions have colons, or are
/// chosen by the user.
pub(super) fn is_follower(name: &str) -> bool {
    ["projection", "partition"].iter().any(|kind| {
        let rest = name.strip_prefix(kind).unwrap_or_default();
        let version =
            rest.strip_prefix("=40").map(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit()));
        version.unwrap_or(rest).starts_with("=2F")
    })
}

/// Encodes a text as a consumer name. Distinct texts get distinct names.
///
/// Letters, digits and `-` stay, and a dot becomes `_`. Every other byte, including an underscore,
/// becomes `=` and two hexadecimal digits.
fn sanitised(text: &str) -> String {
    if text == ">" {
        return EVERYTHING.into();
    }
    let mut name = String::with_capacity(text.len() + 8);
    for byte in text.bytes() {
        match byte {
            b'.' => name.push('_'),
            byte if byte.is_ascii_alphanumeric() || byte == b'-' => name.push(char::from(byte)),
            // Writing to a String does not fail.
            byte => _ = write!(name, "={byte:02X}"),
        }
    }
    name
}

/// Shortens a long name, with a hash of the whole at the end.
fn shortened(mut name: String) -> String {
    if name.len() > LONGEST {
        let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()).simple().to_string();
        name.truncate(LONGEST - 1 - hash.len());
        name.push('~');
        name.push_str(&hash);
    }
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durable_names_are_readable() {
        for (queue, events, name) in [
            (
                Some("shipping:order.placed"),
                &["order.placed"][..],
                "shop:shipping=3Aorder_placed:order_placed",
            ),
            (None, &[">"], "shop:$noqueue:$all"),
            (None, &["order.*", "line.line_added"], "shop:$noqueue:order_=2A,line_line=5Fadded"),
            (Some(""), &["a/b c\\\u{7f}"], "shop::a=2Fb=20c=5C=7F"),
        ] {
            assert_eq!(durable("shop", queue, events), name);
        }
    }

    #[test]
    fn follower_names_differ_from_subscription_names() {
        for name in
            ["projection/revenue", "projection@2/revenue", "partition/0/revenue", "partition@10/3/a/b"]
        {
            assert!(is_follower(&custom(name)), "{name}");
        }
        for name in ["projections", "shipping", "projection", "partition-0"] {
            assert!(!is_follower(&custom(name)), "{name}");
        }
        assert!(!is_follower(&durable("projection", None, &["order.placed"])));
    }

    proptest! {
        #[test]
        fn distinct_parts_give_distinct_names(
            one in ("[a._:,$> -]{0,6}", proptest::option::of("[a._:,$-]{0,4}"), "[a._:,$>-]{1,6}"),
            other in ("[a._:,$> -]{0,6}", proptest::option::of("[a._:,$-]{0,4}"), "[a._:,$>-]{1,6}"),
        ) {
            let name = |(prefix, queue, event): &(String, Option<String>, String)| durable(prefix, queue.as_deref(), &[event]);
            prop_assert_eq!(name(&one) == name(&other), one == other);
        }

        #[test]
        fn names_fit_the_server(text in ".{0,400}") {
            let name = durable(&text, Some(&text), &[&text]);
            prop_assert!(name.len() <= 255 && name.bytes().all(|byte| byte.is_ascii_graphic() && !b".*>/\\".contains(&byte)));
        }
    }
}
