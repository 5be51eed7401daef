//! Standard output, where a closed pipe is no error, standard error, where nothing is, and tables.

use std::io::Write;

use super::Failure;

/// Writes `bytes` to standard output.
pub fn stdout(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Writes a line to standard error. Nobody may be reading it any more (`2>&1 | head`): work goes on all the same.
pub fn stderr(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Rows of cells, columns padded to their widest cell (of those of a sensible width); numbers (`right`) to the right.
pub fn table(rows: &[Vec<String>], right: &[bool]) -> String {
    crate::table::aligned(rows, 120, |c| right.get(c) == Some(&true))
}
