//! Fuzzing of the decoders of foreign bytes, as unit tests of each decoder.
//!
//! Inputs are mutated at random. An input that leads to a new answer of the decoder joins the
//! corpus. It needs no instrumentation, so any toolchain can run it.
//!
//! Runs 1 s for each decoder, or `STORIED_FUZZ_SECONDS`. `STORIED_FUZZ_SEED` repeats a run.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Maximum number of inputs in the corpus.
const CORPUS: usize = 4_096;
/// Maximum length of an input in bytes; longer inputs are cut off.
const LONGEST: usize = 4_096;

/// Bytes that are special in CBOR, JSON or text.
///
/// Heads of indefinite, huge and nested items, breaks, tags, quotes, signs.
const SPECIAL: [&[u8]; 24] = [
    b"\x00",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\x9f",
    b"\xbf",
    b"\x5f",
    b"\x1b\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x3b\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x5b\x00\x00\x00\xff\xff\xff\xff\xff",
    b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"\xbb\x00\x00\x00\x01\x00\x00\x00\x00",
    b"\x7a\xff\xff\xff\xff",
    b"\xc2\x49",
    b"\xd9\xff\xff",
    b"\xf9\x7e\x00",
    b"\x81\x81\x81\x81\x81\x81\x81\x81\x81\x81\x81\x81\x81\x81\x81\x81",
    b"[[[[[[[[[[[[[[[[",
    b"{\"\":",
    b"\\u0000",
    b"1e999",
    b"-",
    b"%",
    b"\xed\xa0\x80",
];

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(number).unwrap() % sides.max(1)
    }
}

/// Runs `read` on mutations of `seeds`.
///
/// `read` describes its result in a few words.
///
/// # Panics
/// If `read` panics, or gives the same answer to every input.
pub(crate) fn fuzz(name: &str, seeds: Vec<Vec<u8>>, read: impl Fn(&[u8]) -> String) {
    let number = |key: &str| std::env::var(key).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("STORIED_FUZZ_SEED").unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    let until = Instant::now() + Duration::from_secs(number("STORIED_FUZZ_SECONDS").unwrap_or(1));
    let mut dice = Dice(seed | 1);
    let mut answers = HashSet::new();
    let mut corpus = seeds;
    let mut runs = 0_u64;
    let mut next = 0;
    while next < corpus.len() || Instant::now() < until {
        // The seeds run first, unchanged.
        let input = match corpus.get(next) {
            Some(seed) => seed.clone(),
            None => change(&corpus, &mut dice),
        };
        next += 1;
        let answer = catch_unwind(AssertUnwindSafe(|| read(&input)));
        let answer =
            answer.unwrap_or_else(|_| panic!("{name} panicked; STORIED_FUZZ_SEED={seed}; {input:02x?}"));
        runs += 1;
        // Digits do not make an answer new.
        let answer: String = answer.chars().filter(|c| !c.is_ascii_digit()).take(80).collect();
        if corpus.len() < CORPUS && answers.insert(answer) && next > corpus.len() {
            corpus.push(input);
            next = corpus.len();
        }
    }
    println!("{name}: {runs} inputs, {} different answers", answers.len());
    assert!(answers.len() > 1, "{name} gives the same answer to every input");
}

fn change(corpus: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let mut input = corpus.get(dice.roll(corpus.len())).cloned().unwrap_or_default();
    for _ in 0..=dice.roll(4) {
        let at = dice.roll(input.len() + 1);
        let end = (at + dice.roll(9)).min(input.len());
        match dice.roll(7) {
            0 if at < input.len() => input[at] ^= 1 << dice.roll(8),
            1 if at < input.len() => input[at] = u8::try_from(dice.roll(256)).unwrap(),
            2 => drop(input.drain(at..end)),
            3 => drop(input.splice(at..end, SPECIAL[dice.roll(SPECIAL.len())].iter().copied())),
            4 => drop(input.splice(at..at, input[at..end].repeat(1 + dice.roll(20)))),
            5 => input.truncate(at),
            _ => {
                let other = &corpus[dice.roll(corpus.len())];
                let from = dice.roll(other.len() + 1);
                drop(input.splice(at.., other[from..].iter().copied()));
            }
        }
    }
    input.truncate(LONGEST);
    input
}
