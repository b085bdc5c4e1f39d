//! Sizes of source files. Clippy checks those of functions (`too_many_lines`).

use std::fs;

use crate::docs::markdown::{files, root};

/// Maximum number of lines of a file in src.
const MOST: usize = 450;

#[test]
fn files_of_src_are_short() {
    let mut sources = Vec::new();
    files(&root().join("src"), true, &mut sources);
    assert!(sources.len() > 100, "only {} files were found", sources.len());
    let long = sources.iter().filter_map(|file| {
        let lines = fs::read_to_string(file).unwrap().lines().count();
        (lines > MOST).then(|| format!("{}: {lines} lines", file.display()))
    });
    let long: Vec<_> = long.collect();
    assert!(long.is_empty(), "more than {MOST} lines:\n{}\n", long.join("\n"));
}
