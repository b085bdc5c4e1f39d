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

/// Maximum number of lines of the example of `Aggregate`: events, commands, error, state and code.
const FIRST_AGGREGATE: usize = 36;

/// Maximum number of lines of the quick start.
const QUICK_START: usize = 47;

/// Both examples are compiled; blank lines do not count, nor the imports of the first.
#[test]
fn the_first_examples_are_short() {
    let source = fs::read_to_string(root().join("src/aggregate.rs")).unwrap();
    let example = source.lines().skip_while(|line| *line != "/// ```").skip(1);
    let example = example.take_while(|line| *line != "/// ```").map(|line| line.trim_start_matches("///"));
    let example: Vec<_> =
        example.filter(|line| !line.trim().is_empty() && !line.starts_with(" use ")).collect();
    assert!(example.len() > 20, "only {} lines were found", example.len());
    assert!(example.len() <= FIRST_AGGREGATE, "{} lines:\n{}", example.len(), example.join("\n"));

    let quick_start = fs::read_to_string(root().join("examples/quick_start.rs")).unwrap();
    let lines = quick_start.lines().filter(|line| !line.trim().is_empty()).count();
    assert!(lines <= QUICK_START, "examples/quick_start.rs has {lines} lines");
}
