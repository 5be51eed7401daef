//! Rows of cells as text in aligned columns.

/// Columns are padded to their widest cell among those of at most `most` characters; columns that are `right` stand to the
/// right.
pub fn aligned(rows: &[Vec<String>], most: usize, right: impl Fn(usize) -> bool) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |s: &str| s.chars().count();
    let widest = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| width(s)).filter(|&w| w <= most).max();
    let widths: Vec<usize> = (0..columns).map(|c| widest(c).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            if c > 0 {
                line.push_str("  ");
            }
            let blank = " ".repeat(widths[c].saturating_sub(width(cell)));
            let (before, after) = if right(c) { (&*blank, "") } else { ("", &*blank) };
            line += &format!("{before}{cell}{after}");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}
