//! Hostile, damaged and wrong inputs: refused with exit code 3 and a message that names the file and the tensor or key;
//! no panic, nothing written.

#[path = "../common/mod.rs"]
mod common;

mod folders;
mod gguf_files;
mod safetensors_files;

use std::path::Path;

use common::program::{Checkpoint, convert, names};

/// Converts `input`, which must be refused with every one of `words`; what is wrong with that.
fn try_refused(input: &Path, args: &str, words: &[&str]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let before = input.is_dir().then(|| names(input));
    let ran = convert(input, &dir.path().join("out.gguf"), &format!("{args} --quiet"));
    let said = &ran.stderr;
    if ran.code != 3 || !said.starts_with("error: ") || said.contains("panicked") {
        return Err(format!("exit code {}: {said}", ran.code));
    }
    if let Some(word) = words.iter().find(|w| !said.contains(**w)) {
        return Err(format!("`{word}` is not in: {said}"));
    }
    if !names(dir.path()).is_empty() || input.is_dir().then(|| names(input)) != before {
        return Err("it left something".into());
    }
    Ok(())
}

#[track_caller]
fn refused(case: &str, input: &Path, args: &str, words: &[&str]) {
    try_refused(input, args, words).unwrap_or_else(|e| panic!("{case}: {e}"));
}

/// Converts `input`, which must be accepted.
fn accepted(case: &str, input: &Path, args: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let ran = convert(input, &dir.path().join("out.gguf"), args);
    assert_eq!(ran.code, 0, "{case}: exit code {}: {}", ran.code, ran.stderr);
    assert_eq!(names(dir.path()), ["out.gguf"], "{case}");
    ran.stderr
}

/// What is done to a good checkpoint.
type Damage = fn(&Checkpoint);

/// A case: its name, the damage, words of the message.
type Case = (&'static str, Damage, &'static [&'static str]);

fn all_refused(cases: &[Case]) {
    let mut wrong = String::new();
    for (case, damage, words) in cases {
        let c = Checkpoint::new();
        damage(&c);
        if let Err(e) = try_refused(c.path(), "", words) {
            wrong += &format!("{case}: {e}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
