//! Pseudo-random numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Random enough for faults, and repeatable by the seed.
#[derive(Debug)]
pub struct Dice(AtomicU64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// Creates other numbers in every run.
    pub fn random() -> Self {
        Self::new(uuid::Uuid::new_v4().as_u64_pair().0)
    }

    /// Returns a number below `sides`.
    pub fn roll(&self, sides: u64) -> u64 {
        // https://prng.di.unimi.it/splitmix64.c
        let mut z =
            self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    /// Sleeps for less than `most`.
    pub async fn pause(&self, most: Duration) {
        let micros = self.roll(u64::try_from(most.as_micros()).expect("a short pause"));
        tokio::time::sleep(Duration::from_micros(micros)).await;
    }
}
