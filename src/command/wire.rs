//! The wire format of commands and replies: CBOR maps, described in `docs/wire-format.md`.
//!
//! The record of a handler's command has the same form.

mod failure;
mod frame;
mod outcome;
mod reply;

pub(crate) use self::failure::{About, Code, Failure, lost_reply};
#[cfg(feature = "nats")]
pub(crate) use self::frame::Sent;
pub(crate) use self::frame::{CommandFrame, Expected, Kind};
#[cfg(feature = "nats")]
pub(crate) use self::outcome::Answered;
pub(crate) use self::outcome::{Done, Outcome, read_reply};
#[cfg(feature = "nats")]
pub(crate) use self::reply::{Reply, ReplyKind};

/// Version number of this format.
pub(super) const FORMAT: u32 = 1;

#[cfg(test)]
mod tests {
    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use uuid::Uuid;

    use super::FORMAT;
    use super::failure::{Code, Failure};
    use super::frame::{CommandFrame, Expected, Kind, Sent};
    use super::outcome::{Answered, Done, Omitted, Outcome};
    use super::reply::{Reply, ReplyKind};
    use crate::codec::{from_cbor, to_cbor};

    fn round_trip<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> String {
        match from_cbor::<T>(bytes) {
            Ok(value) => {
                assert!(from_cbor::<T>(&to_cbor(&value).unwrap()).is_ok());
                "one".into()
            }
            Err(error) => error,
        }
    }

    #[test]
    fn no_frame_makes_the_reader_panic() {
        let failure = Failure { details: vec![1], number: 7, ..Failure::new(Code::Rejected, "no") };
        let frame = |key, left, expected| CommandFrame {
            format: FORMAT,
            id: Uuid::now_v7(),
            kind: Kind::Aggregate,
            name: "order".into(),
            key,
            payload: vec![0xa0],
            metadata: vec![0xa0],
            expected,
            left,
            sent: left.map(|clock| Sent { node: Uuid::now_v7(), clock }),
            attempt: 2,
            prompt: true,
        };
        let frames =
            [frame(Some("é".into()), Some(u64::MAX), Expected::Exact(3)), frame(None, None, Expected::Any)];
        let omitted = Some(Omitted { size: 9, limit: 8 });
        let done = Done { reply: vec![0xf6], duplicate: true, version: 1, position: 2, events: 3, omitted };
        let says = [
            ReplyKind::Accepted,
            ReplyKind::Alive,
            ReplyKind::Refused(failure.clone()),
            ReplyKind::Executed(Answered { runtime: 5, outcome: Outcome::Done(done) }),
            ReplyKind::Executed(Answered { runtime: 5, outcome: Outcome::Error(failure) }),
        ];
        let replies = says.map(|says| Reply { format: FORMAT, incarnation: Uuid::now_v7(), says });
        let frames = frames.iter().map(to_cbor);
        let seeds = frames.chain(replies.iter().map(to_cbor)).map(Result::unwrap).collect();
        crate::fuzz::fuzz("a command's frames", seeds, |bytes| {
            [round_trip::<CommandFrame>(bytes), round_trip::<Reply>(bytes), round_trip::<Outcome>(bytes)]
                .join("; ")
        });
    }
}
