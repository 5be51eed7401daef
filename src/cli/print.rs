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
    const MAX: usize = 120;
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |s: &str| s.chars().count();
    let widest = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| width(s)).filter(|&w| w <= MAX).max();
    let widths: Vec<usize> = (0..columns).map(|c| widest(c).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            if c > 0 {
                line.push_str("  ");
            }
            let blank = " ".repeat(widths[c].saturating_sub(width(cell)));
            let (before, after) = if right.get(c) == Some(&true) { (&*blank, "") } else { ("", &*blank) };
            line += &format!("{before}{cell}{after}");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}
