//! Command ids (idempotency keys): generation, derivation, and the time in a UUIDv7.

use chrono::{DateTime, TimeDelta, Utc};
use uuid::{NoContext, Timestamp, Uuid, Variant};

/// Maximum lead of the time in an id over the clock of the node that executes the command.
const MAX_AHEAD: TimeDelta = TimeDelta::minutes(1);

/// An id whose time is more than [`MAX_AHEAD`] ahead of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IdAhead {
    pub(crate) claimed: DateTime<Utc>,
    pub(crate) now: DateTime<Utc>,
}

/// Generates an id that is greater than all ids generated before.
///
/// After the clock was set back, the id has the time of the clock instead.
pub(crate) fn new() -> Uuid {
    let id = Uuid::now_v7();
    if time(id).is_some_and(|time| time - Utc::now() > TimeDelta::seconds(1)) {
        return Uuid::new_v7(Timestamp::now(NoContext));
    }
    id
}

/// Derives an id that is a function of the parent and the name.
///
/// The id has the time of its parent, if the parent has a time. A deduplication window therefore
/// treats both alike.
pub(crate) fn derived(parent: Uuid, name: &str) -> Uuid {
    let hash = Uuid::new_v5(&parent, name.as_bytes());
    if time(parent).is_none() {
        return hash;
    }
    let mut bytes = hash.into_bytes();
    bytes[..6].copy_from_slice(&parent.as_bytes()[..6]);
    // UUIDv5 and UUIDv7 have the same variant bits.
    bytes[6] = 0x70 | bytes[6] & 0x0f;
    Uuid::from_bytes(bytes)
}

/// Returns the time in a UUIDv7, or `None` for other ids.
pub(crate) fn time(id: Uuid) -> Option<DateTime<Utc>> {
    if id.get_version_num() != 7 || id.get_variant() != Variant::RFC4122 {
        return None;
    }
    let millis = id.as_bytes()[..6].iter().fold(0_i64, |millis, byte| millis << 8 | i64::from(*byte));
    DateTime::from_timestamp_millis(millis)
}

/// Rejects an id whose time is more than [`MAX_AHEAD`] ahead of this machine's clock.
///
/// Such an id would look newer than every later command.
pub(crate) fn check(id: Uuid) -> Result<(), IdAhead> {
    let Some(claimed) = time(id) else { return Ok(()) };
    let now = Utc::now();
    // If the clock was set back, `Uuid::now_v7` in this process continues from the old time.
    if claimed - now <= MAX_AHEAD || time(Uuid::now_v7()).is_some_and(|own| claimed - own <= MAX_AHEAD) {
        return Ok(());
    }
    Err(IdAhead { claimed, now })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    /// Returns a UUIDv7 whose time is `seconds` from now.
    fn v7(seconds: i64) -> Uuid {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        Uuid::new_v7(Timestamp::from_unix(NoContext, since.saturating_add_signed(seconds), 0))
    }

    #[test]
    fn only_an_id_from_the_future_is_refused() {
        for id in [
            new(),
            Uuid::now_v7(),
            v7(-1),
            v7(50),
            v7(-1_000_000_000),
            Uuid::new_v4(),
            Uuid::nil(),
            Uuid::max(),
        ] {
            assert_eq!(check(id), Ok(()), "{id}");
        }
        // The smallest and the greatest UUIDv7.
        assert_eq!(check(Uuid::from_u128(0x7000_8000_0000_0000_0000)), Ok(()));
        let last = Uuid::from_u128(0xffff_ffff_ffff_7fff_bfff_ffff_ffff_ffff);
        for id in [v7(70), v7(1_000_000_000), last] {
            let error = check(id).unwrap_err();
            assert_eq!(Some(error.claimed), time(id));
            assert!(Utc::now() - error.now < TimeDelta::seconds(10));
        }
    }

    #[test]
    fn a_derived_id_is_as_old_as_its_parent() {
        for parent in [new(), Uuid::now_v7(), v7(-1_000_000)] {
            let (one, other) = (derived(parent, "1 a"), derived(parent, "2 a"));
            assert_eq!(one, derived(parent, "1 a"));
            assert!(one != other && one != parent);
            assert_eq!((time(one), one.get_version_num()), (time(parent), 7));
        }
        for parent in [Uuid::new_v4(), Uuid::new_v5(&Uuid::nil(), b"x"), Uuid::nil(), Uuid::max()] {
            assert_eq!(derived(parent, "1 a"), Uuid::new_v5(&parent, b"1 a"));
        }
    }

    #[test]
    fn an_id_has_the_time_of_its_making() {
        let (before, id) = (Utc::now(), new());
        let time = time(id).unwrap();
        assert!(before - time < TimeDelta::from_std(Duration::from_millis(1)).unwrap() && time <= Utc::now());
    }
}
