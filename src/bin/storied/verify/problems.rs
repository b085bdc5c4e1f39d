//! The problems that a verification finds.

/// Maximum number of printed problems; the others are counted.
const MAX_SHOWN: usize = 100;

/// The problems found.
#[derive(Debug, Default)]
pub(super) struct Problems {
    pub(super) shown: Vec<String>,
    pub(super) count: usize,
}

impl Problems {
    pub(super) fn add(&mut self, problem: String) {
        self.count += 1;
        if self.shown.len() < MAX_SHOWN {
            self.shown.push(problem);
        }
    }
}
