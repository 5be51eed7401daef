//! `--list-types`, `--list-archs`.

use super::{Failure, print};
use crate::arch::ARCHITECTURES;
use crate::formats;
use crate::gguf::GgmlType;
use crate::plan::FileType;

/// File types and tensor types.
pub fn types() -> Result<(), Failure> {
    let mut text = String::from("File types (--type, --outtype):\n");
    let rows: Vec<Vec<String>> = FileType::ALL
        .iter()
        .map(|f| vec!["".into(), f.name().into(), (*f as u32).to_string(), f.about().into()])
        .chain([vec!["".into(), "COPY".into(), "".into(), "every tensor as it is stored".into()]])
        .collect();
    text += &print::table(&rows, &[false, false, true, false]);
    for (alias, f) in FileType::ALIASES {
        text += &format!("  {alias} is {}\n", f.name());
    }
    text += "\nTensor types (--tensor-type, --output-tensor-type, --token-embedding-type):\n";
    let rows: Vec<Vec<String>> = GgmlType::ALL
        .iter()
        .filter(|t| formats::format(**t).is_some())
        .map(|t| {
            let bits = t.block_bytes() as f64 * 8.0 / t.block_len() as f64;
            let note = if *t == GgmlType::NVFP4 { "read and copied only" } else { "" };
            vec![
                "".into(),
                t.name().into(),
                format!("{bits:.4} bpw"),
                format!("blocks of {}", t.block_len()),
                note.into(),
            ]
        })
        .collect();
    text += &print::table(&rows, &[false, false, true, false, false]);
    print::stdout(text.as_bytes())
}

/// Architectures.
pub fn archs() -> Result<(), Failure> {
    let rows: Vec<Vec<String>> = std::iter::once(vec!["architectures[0]".into(), "general.architecture".into()])
        .chain(ARCHITECTURES.iter().map(|a| vec![a.hf.into(), a.gguf.into()]))
        .collect();
    print::stdout(print::table(&rows, &[]).as_bytes())
}
