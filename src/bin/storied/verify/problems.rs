//! The problems that a verification finds.

/// Maximum number of printed problems; the others are counted.
const SAID: usize = 100;

/// The problems found.
#[derive(Debug, Default)]
pub(super) struct Problems {
    pub(super) said: Vec<String>,
    pub(super) count: usize,
}

impl Problems {
    pub(super) fn add(&mut self, problem: String) {
        self.count += 1;
        if self.said.len() < SAID {
            self.said.push(problem);
        }
    }
}
