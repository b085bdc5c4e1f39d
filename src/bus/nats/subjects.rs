//! What the subjects of events are called.

mod pattern;

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU16;
use std::sync::Arc;

pub use self::pattern::InvalidPattern;
pub(super) use self::pattern::Pattern;
use crate::bus::BusError;
use crate::event::{EventName, StreamId};
use crate::partition::Partition;

/// How the names of events become subjects. Publishers and subscribers of one system must say the same.
///
/// By default `{namespace}.events.{event name}`, for example `storied.events.order.placed`. Behind a prefix,
/// [`partitions`](Self::partitions) can put one token more in front of the name.
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
    /// In front of everything; the namespace's if there is none.
    prefix: Option<String>,
    map: Option<Arc<NameMap>>,
    /// What all mapped names are found under.
    covering: Vec<Pattern>,
    partitions: Option<NonZeroU16>,
}

type NameMap = dyn Fn(&str) -> String + Send + Sync;

impl Subjects {
    /// `{namespace}.events.{event name}`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The event's name alone: `order.placed`. `covering` are patterns under which all events are found (`order.*`): what
    /// the feed subscribes to and the stream keeps, in an account in which others have subjects, too.
    ///
    /// # Errors
    /// When there is no pattern, or one is not a pattern.
    pub fn identity<P: AsRef<str>>(covering: impl IntoIterator<Item = P>) -> Result<Self, InvalidPattern> {
        Ok(Self { prefix: Some(String::new()), covering: patterns(covering)?, ..Self::default() })
    }

    /// The event's name behind a prefix of one or more tokens: `events.` (or `events`) makes `events.order.placed`.
    ///
    /// # Errors
    /// When it is more than dotted tokens of printable ASCII.
    pub fn prefix(prefix: &str) -> Result<Self, InvalidPattern> {
        let tokens = prefix.strip_suffix('.').unwrap_or(prefix);
        if Pattern::new(tokens)?.is_wild() {
            return Err(InvalidPattern::new(prefix, "a prefix has no '*' and no '>'"));
        }
        Ok(Self { prefix: Some(format!("{tokens}.")), ..Self::default() })
    }

    /// Whatever `map` makes of the event's name. `covering` are patterns under which all that it makes are found; an event
    /// that lands elsewhere is not published, and the publisher says so. `map` must always say the same of a name, and
    /// something else of each.
    ///
    /// # Errors
    /// When there is no pattern, or one is not a pattern.
    pub fn custom<P: AsRef<str>>(
        covering: impl IntoIterator<Item = P>,
        map: impl Fn(&str) -> String + Send + Sync + 'static,
    ) -> Result<Self, InvalidPattern> {
        let covering = patterns(covering)?;
        Ok(Self { prefix: Some(String::new()), map: Some(Arc::new(map)), covering, partitions: None })
    }

    /// Puts the number of the event's partition in front of its name (behind the prefix): `storied.events.3.order.placed`.
    /// For subscribers that share the log out by aggregate: the number is the same for all events of a stream, from 0,
    /// see [`Partition`](crate::Partition). None by default. Must not change as long as a mirror is in use.
    ///
    /// # Errors
    /// Of [`identity`](Self::identity) and [`custom`](Self::custom): without a prefix, the server could not tell such
    /// subjects from its own.
    pub fn partitions(mut self, partitions: NonZeroU16) -> Result<Self, InvalidPattern> {
        if !self.covering.is_empty() {
            let pattern = format!("*.{}", self.covering[0]);
            return Err(InvalidPattern::new(&pattern, "partitions need a prefix in front of them"));
        }
        self.partitions = Some(partitions);
        Ok(self)
    }

    /// With everything that depends on the namespace.
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

/// Checked patterns without those that others cover.
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
            return Err(InvalidPattern::new(
                pattern.as_str(),
                "it shares a part of its names with another one of the patterns",
            ));
        }
        patterns.push(pattern);
    }
    if patterns.is_empty() {
        return Err(InvalidPattern::new("", "there is none"));
    }
    patterns.sort_unstable();
    Ok(patterns)
}

/// Everything that has a name in one namespace.
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

    /// Where the end of the log is announced.
    pub(super) fn head(&self) -> String {
        format!("{}.head", self.namespace)
    }

    /// Where nodes say that they have committed something.
    pub(super) fn hints(&self) -> String {
        format!("{}.hint", self.namespace)
    }

    /// Refuses subjects of events that are those of something else, too: in the stream, a heartbeat would count as an event.
    pub(super) fn check(&self) -> Result<(), BusError> {
        let own = [self.head(), self.hints(), format!("{}.dead.x", self.namespace)];
        for (subject, own) in self.mapping.all().iter().flat_map(|all| own.iter().map(move |own| (all, own)))
        {
            if Pattern::new(subject).is_ok_and(|pattern| pattern.matches(own)) {
                return Err(BusError::Incompatible {
                    reason: format!(
                        "the subjects of events, {subject:?}, contain {own:?}, which is for something else; choose another \
                         namespace, or narrower Subjects"
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
    /// What stands for any partition.
    any: &'static str,
    all: Vec<String>,
}

impl Mapping {
    /// What all events are found under.
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

    /// Nothing that is published may land where nobody looks for it.
    fn check(&self, name: &str, mapped: &str) -> Result<(), BusError> {
        let covering = &self.subjects.covering;
        let plain = Pattern::new(mapped).is_ok_and(|pattern| !pattern.is_wild());
        if plain && covering.iter().any(|pattern| pattern.matches(mapped)) {
            return Ok(());
        }
        let covering: Vec<_> = covering.iter().map(Pattern::as_str).collect();
        Err(BusError::Incompatible {
            reason: format!(
                "the event {name} would have the subject {mapped:?}, which none of {covering:?} covers; add a pattern for it \
                 to the Subjects of the bus"
            ),
        })
    }

    /// What to ask the server for, so that events with such names come. The second says whether others may come as well.
    pub(super) fn filters(&self, names: &[Pattern]) -> (Vec<String>, bool) {
        if names.iter().any(Pattern::is_everything) {
            return (self.all.clone(), false);
        }
        let Some(map) = &self.subjects.map else {
            let filter = |name: &Pattern| format!("{}{}{name}", self.prefix, self.any);
            return (names.iter().map(filter).collect(), false);
        };
        // Nobody knows what becomes of names that are not known.
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
    fn each_mapping_and_what_is_found_under_it() {
        let name = EventName::new("shop.order.placed").unwrap();
        let stream = StreamId::new("shop.order", "foobar").unwrap();
        let sixteen = NonZeroU16::new(16).unwrap();
        let custom = || Subjects::custom(["v1.>"], |name| format!("v1.{name}")).unwrap();
        for (subjects, subject, all, some) in [
            (Subjects::new(), "ns.events.shop.order.placed", "ns.events.>", "ns.events.shop.*.placed"),
            (
                Subjects::new().partitions(sixteen).unwrap(),
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
                Subjects::prefix("a.").unwrap().partitions(sixteen).unwrap(),
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
    fn what_lands_elsewhere_is_refused() {
        let name = EventName::new("order.placed").unwrap();
        let stream = StreamId::new("order", "1").unwrap();
        for mapped in ["v2.x", "v1", "", "v1.*", "v1.a b", "v1..x"] {
            let subjects = Subjects::custom(["v1.>"], |_| mapped.to_owned()).unwrap();
            let error = subjects.resolve("ns").subject(&name, &stream).unwrap_err();
            assert!(error.to_string().contains("order.placed"), "{error}");
        }
        assert!(Subjects::identity(["a.>"]).unwrap().partitions(NonZeroU16::MIN).is_err());
        assert!(Subjects::identity([] as [&str; 0]).is_err());
        assert!(Subjects::prefix("a.*").is_err() && Subjects::prefix("").is_err());
        assert!(patterns(["a.*.c", "a.b.*"]).is_err());
        assert_eq!(patterns(["a.b", "b.c", "a.*"]).unwrap().len(), 2);
    }
}
