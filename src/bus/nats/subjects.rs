//! The subjects of events.

mod pattern;

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU16;
use std::sync::Arc;

use self::pattern::InvalidPattern;
pub(super) use self::pattern::Pattern;
use crate::bus::BusError;
use crate::event::{EventName, StreamId};
use crate::partition::Partition;

/// The mapping from event names to subjects.
/// All publishers and subscribers of a system need the same.
///
/// Default: `{namespace}.events.{event name}`, for example `storied.events.order.placed`. After a
/// prefix, [`partitions`](Self::partitions) can add one token before the name.
///
/// ```
/// use storied::bus::{NatsOptions, Subjects};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let plain = Subjects::identity(["order.*", "shipment.*"])?;           // order.placed
/// let prefixed = Subjects::prefix("events.")?;                          // events.order.placed
/// let custom = Subjects::custom(["shop.>"], |name| format!("shop.{name}.v1"))?;
/// let bus = NatsOptions::core().subjects(plain).bus();
/// # let _ = (bus, prefixed, custom);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct Subjects {
    /// Prefix of every subject; the namespace's prefix if `None`.
    prefix: Option<String>,
    map: Option<Arc<NameMap>>,
    /// Patterns that cover all mapped names.
    covering: Vec<Pattern>,
    partitions: Option<NonZeroU16>,
}

type NameMap = dyn Fn(&str) -> String + Send + Sync;

impl Subjects {
    /// Creates the default mapping, `{namespace}.events.{event name}`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a mapping to the event name alone: `order.placed`.
    ///
    /// `covering` are patterns that match all events (`order.*`). The feed subscribes to them and
    /// the stream keeps them, in an account that may have other subjects, too.
    ///
    /// # Errors
    /// If there is no pattern, or an invalid one.
    pub fn identity<P: AsRef<str>>(covering: impl IntoIterator<Item = P>) -> Result<Self, BusError> {
        Ok(Self { prefix: Some(String::new()), covering: patterns(covering)?, ..Self::default() })
    }

    /// Creates a mapping to a prefix of one or more tokens and the event name.
    ///
    /// `events.` (or `events`) gives `events.order.placed`.
    ///
    /// # Errors
    /// If the prefix is not made of dotted tokens of printable ASCII.
    pub fn prefix(prefix: &str) -> Result<Self, BusError> {
        let tokens = prefix.strip_suffix('.').unwrap_or(prefix);
        if Pattern::new(tokens)?.is_wild() {
            return Err(InvalidPattern::new(prefix, "a prefix must not contain '*' or '>'").into());
        }
        Ok(Self { prefix: Some(format!("{tokens}.")), ..Self::default() })
    }

    /// Creates a mapping by the function `map` of the event name.
    ///
    /// `covering` are patterns that match every result of `map`. An event with another subject is
    /// not published, and the publisher reports an error. `map` must be deterministic, and give
    /// distinct results for distinct names.
    ///
    /// # Errors
    /// If there is no pattern, or an invalid one.
    pub fn custom<P: AsRef<str>>(
        covering: impl IntoIterator<Item = P>,
        map: impl Fn(&str) -> String + Send + Sync + 'static,
    ) -> Result<Self, BusError> {
        let covering = patterns(covering)?;
        Ok(Self { prefix: Some(String::new()), map: Some(Arc::new(map)), covering, partitions: None })
    }

    /// Adds the partition number before the event name: `storied.events.3.order.placed`.
    ///
    /// For subscribers that share the log by aggregate. The number starts at 0 and is the same for
    /// all events of a stream, see [`Partition`](crate::Partition). Default: no partitions. Must
    /// not change while a log stream is in use.
    ///
    /// The bus refuses partitions with [`identity`](Self::identity) and [`custom`](Self::custom):
    /// without a prefix, the server could not distinguish such subjects from its own.
    #[must_use]
    pub fn partitions(mut self, partitions: NonZeroU16) -> Self {
        self.partitions = Some(partitions);
        self
    }

    /// Refuses partitions without a prefix.
    pub(super) fn check(&self) -> Result<(), BusError> {
        if self.partitions.is_none() || self.covering.is_empty() {
            return Ok(());
        }
        let reason = "invalid option Subjects::partitions: partitions need a prefix; use Subjects::new or \
                      Subjects::prefix";
        Err(BusError::Incompatible { reason: reason.into() })
    }

    /// Applies the namespace.
    pub(super) fn resolve(&self, namespace: &str) -> Mapping {
        let prefix = self.prefix.clone().unwrap_or_else(|| format!("{namespace}.events."));
        let any = if self.partitions.is_some() { "*." } else { "" };
        let all = match &*self.covering {
            [] if self.partitions.is_some() => vec![format!("{prefix}*.>")],
            [] => vec![format!("{prefix}>")],
            covering => covering.iter().map(Pattern::to_string).collect(),
        };
        Mapping { subjects: self.clone(), prefix, any, all }
    }
}

impl fmt::Debug for Subjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subjects")
            .field("prefix", &self.prefix)
            .field("covering", &self.covering)
            .field("partitions", &self.partitions)
            .finish_non_exhaustive()
    }
}

/// Checks patterns, and removes those that others cover.
pub(super) fn patterns<P: AsRef<str>>(
    given: impl IntoIterator<Item = P>,
) -> Result<Vec<Pattern>, InvalidPattern> {
    let mut patterns: Vec<Pattern> = Vec::new();
    for pattern in given {
        let pattern = Pattern::new(pattern.as_ref())?;
        if patterns.iter().any(|other| other.covers(pattern.as_str())) {
            continue;
        }
        patterns.retain(|other| !pattern.covers(other.as_str()));
        if patterns.iter().any(|other| other.overlaps(&pattern)) {
            return Err(InvalidPattern::new(pattern.as_str(), "overlaps with another pattern"));
        }
        patterns.push(pattern);
    }
    if patterns.is_empty() {
        return Err(InvalidPattern::new("", "no pattern given"));
    }
    patterns.sort_unstable();
    Ok(patterns)
}

/// The subject names of one namespace.
#[derive(Debug, Clone)]
pub(super) struct Names {
    namespace: String,
    pub(super) mapping: Mapping,
}

impl Names {
    pub(super) fn new(namespace: &str, subjects: &Subjects) -> Self {
        Self { namespace: namespace.to_owned(), mapping: subjects.resolve(namespace) }
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Subject of heartbeats, which carry the end of the log.
    pub(super) fn head(&self) -> String {
        format!("{}.head", self.namespace)
    }

    /// Subject of hints about commits.
    pub(super) fn hints(&self) -> String {
        format!("{}.hint", self.namespace)
    }

    /// Refuses event subjects that contain other subjects.
    /// In the stream, a heartbeat would count as an event.
    pub(super) fn check(&self) -> Result<(), BusError> {
        let own = [self.head(), self.hints(), format!("{}.dead.x", self.namespace)];
        for (subject, own) in self.mapping.all().iter().flat_map(|all| own.iter().map(move |own| (all, own)))
        {
            if Pattern::new(subject).is_ok_and(|pattern| pattern.matches(own)) {
                return Err(BusError::Incompatible {
                    reason: format!(
                        "the event subjects {subject:?} contain {own:?}, which is reserved; choose \
                         another namespace, or narrower Subjects"
                    ),
                });
            }
        }
        Ok(())
    }
}

/// The subjects of events.
#[derive(Debug, Clone)]
pub(super) struct Mapping {
    subjects: Subjects,
    prefix: String,
    /// Wildcard token for any partition.
    any: &'static str,
    all: Vec<String>,
}

impl Mapping {
    /// The subjects that match all events.
    pub(super) fn all(&self) -> &[String] {
        &self.all
    }

    /// The subject of an event.
    pub(super) fn subject(&self, name: &EventName, stream: &StreamId) -> Result<String, BusError> {
        let name = name.as_str();
        let mapped = match &self.subjects.map {
            Some(map) => Cow::Owned(map(name)),
            None => Cow::Borrowed(name),
        };
        let mut subject = String::with_capacity(self.prefix.len() + 6 + mapped.len());
        subject.push_str(&self.prefix);
        if let Some(partitions) = self.subjects.partitions {
            subject.push_str(&Partition::of(stream, partitions.get()).index().to_string());
            subject.push('.');
        }
        subject.push_str(&mapped);
        if !self.subjects.covering.is_empty() {
            self.check(name, &mapped)?;
        }
        Ok(subject)
    }

    /// Refuses a subject that no subscriber or stream receives.
    fn check(&self, name: &str, mapped: &str) -> Result<(), BusError> {
        let covering = &self.subjects.covering;
        let plain = Pattern::new(mapped).is_ok_and(|pattern| !pattern.is_wild());
        if plain && covering.iter().any(|pattern| pattern.matches(mapped)) {
            return Ok(());
        }
        let covering: Vec<_> = covering.iter().map(Pattern::as_str).collect();
        Err(BusError::Incompatible {
            reason: format!(
                "no pattern of {covering:?} covers {mapped:?}, the subject of the event {name}; \
                 add a pattern to the Subjects of the bus"
            ),
        })
    }

    /// The filter subjects for events with such names.
    /// The flag says whether other events match, too.
    pub(super) fn filters(&self, names: &[Pattern]) -> (Vec<String>, bool) {
        if names.iter().any(Pattern::is_everything) {
            return (self.all.clone(), false);
        }
        let Some(map) = &self.subjects.map else {
            let filter = |name: &Pattern| format!("{}{}{name}", self.prefix, self.any);
            return (names.iter().map(filter).collect(), false);
        };
        // A custom mapping of unknown names is unknown.
        if names.iter().any(Pattern::is_wild) {
            return (self.all.clone(), true);
        }
        let mut filters: Vec<_> = names.iter().map(|name| map(name.as_str())).collect();
        filters.sort_unstable();
        filters.dedup();
        (filters, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mapping_gives_its_subjects_and_filters() {
        let name = EventName::new("shop.order.placed").unwrap();
        let stream = StreamId::new("shop.order", "foobar").unwrap();
        let sixteen = NonZeroU16::new(16).unwrap();
        let custom = || Subjects::custom(["v1.>"], |name| format!("v1.{name}")).unwrap();
        for (subjects, subject, all, some) in [
            (Subjects::new(), "ns.events.shop.order.placed", "ns.events.>", "ns.events.shop.*.placed"),
            (
                Subjects::new().partitions(sixteen),
                "ns.events.8.shop.order.placed",
                "ns.events.*.>",
                "ns.events.*.shop.*.placed",
            ),
            (Subjects::identity(["shop.>"]).unwrap(), "shop.order.placed", "shop.>", "shop.*.placed"),
            (
                Subjects::prefix("events.").unwrap(),
                "events.shop.order.placed",
                "events.>",
                "events.shop.*.placed",
            ),
            (Subjects::prefix("a.b").unwrap(), "a.b.shop.order.placed", "a.b.>", "a.b.shop.*.placed"),
            (custom(), "v1.shop.order.placed", "v1.>", "v1.>"),
            (
                Subjects::prefix("a.").unwrap().partitions(sixteen),
                "a.8.shop.order.placed",
                "a.*.>",
                "a.*.shop.*.placed",
            ),
        ] {
            let mapping = subjects.resolve("ns");
            assert_eq!(mapping.subject(&name, &stream).unwrap(), subject);
            assert_eq!(mapping.all(), [all]);
            assert_eq!(mapping.filters(&patterns(["shop.*.placed"]).unwrap()).0, [some]);
            assert_eq!(mapping.filters(&patterns(["*"]).unwrap()), (vec![all.to_owned()], false));
        }
    }

    #[test]
    fn uncovered_subjects_are_refused() {
        let name = EventName::new("order.placed").unwrap();
        let stream = StreamId::new("order", "1").unwrap();
        for mapped in ["v2.x", "v1", "", "v1.*", "v1.a b", "v1..x"] {
            let subjects = Subjects::custom(["v1.>"], |_| mapped.to_owned()).unwrap();
            let error = subjects.resolve("ns").subject(&name, &stream).unwrap_err();
            assert!(error.to_string().contains("order.placed"), "{error}");
        }
        assert!(Subjects::identity(["a.>"]).unwrap().partitions(NonZeroU16::MIN).check().is_err());
        assert!(Subjects::identity([] as [&str; 0]).is_err());
        assert!(Subjects::prefix("a.*").is_err() && Subjects::prefix("").is_err());
        assert!(patterns(["a.*.c", "a.b.*"]).is_err());
        assert_eq!(patterns(["a.b", "b.c", "a.*"]).unwrap().len(), 2);
    }
}
