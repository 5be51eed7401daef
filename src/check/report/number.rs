//! Numbers and strings as a reader sees them.

/// `v` with `digits` significant digits; as a power of ten outside 0.0001 to 100000.
pub(super) fn significant(v: f64, digits: usize) -> String {
    if v == 0.0 {
        return "0".into();
    }
    if !v.is_finite() {
        return v.to_string();
    }
    let digits = digits.max(1);
    // as it will be rounded: 9.996 is 10.0
    let text = format!("{:.*e}", digits - 1, v);
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..=4).contains(&exponent) {
        format!("{v:.*}", (digits as i32 - 1 - exponent).max(0) as usize)
    } else {
        format!("{}·10{}", mantissa.replace('-', "−"), superscript(exponent))
    }
    .replace('-', "−")
}

/// Raised digits.
pub(super) fn superscript(n: i32) -> String {
    let digit = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        '0' | '4'..='9' => char::from_u32('⁰' as u32 + (c as u32 - '0' as u32)).unwrap_or(c),
        _ => c,
    };
    n.to_string().chars().map(digit).collect()
}

/// 10^n as a tick label.
pub(super) fn power_of_ten(n: i32) -> String {
    match n {
        -3..=3 => significant(10f64.powi(n), 1),
        _ => format!("10{}", superscript(n)),
    }
}

/// Value and error with the digits that the error leaves: two of the error's.
pub(super) fn with_error(value: f64, error: f64) -> String {
    if !(error > 0.0 && error.is_finite() && value.is_finite()) {
        return significant(value, 4);
    }
    let decimals = (1.0 - error.log10().floor()).clamp(0.0, 12.0) as usize;
    if value != 0.0 && value.abs() < 1e-4 && decimals > 6 {
        return format!("{} ± {}", significant(value, 3), significant(error, 2));
    }
    format!("{value:.decimals$} ± {error:.decimals$}").replace('-', "−")
}

/// Bytes, decimal.
pub(super) fn bytes(n: u64) -> String {
    let n = n as f64;
    match n {
        _ if n >= 1e9 => format!("{} GB", significant(n / 1e9, 3)),
        _ if n >= 1e6 => format!("{} MB", significant(n / 1e6, 3)),
        _ if n >= 1e3 => format!("{} kB", significant(n / 1e3, 3)),
        _ => format!("{n} B"),
    }
}

/// A whole number in groups of three.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(c);
    }
    out
}

/// As JSON has it.
pub(super) fn json(v: f64) -> String {
    serde_json::to_string(&v).unwrap_or_default()
}

/// For HTML text and attribute values. Control characters, which HTML does not have, become U+FFFD.
pub(super) fn escape(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(' '),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// At most `max` characters, the middle left out: names differ at both ends.
pub(super) fn shorten(s: &str, max: usize) -> String {
    let n = s.chars().count();
    if n <= max || max < 3 {
        return s.to_string();
    }
    let head = max / 2;
    let tail = max - head - 1;
    s.chars().take(head).chain(std::iter::once('…')).chain(s.chars().skip(n - tail)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_as_many_as_asked_for() {
        let cases = [
            (0.0, "0"),
            (0.0361042, "0.0361"),
            (9.996, "10.0"),
            (1234.5, "1234"),
            (0.00012345, "0.000123"),
            (0.0000123456, "1.23·10⁻⁵"),
            (1.5e7, "1.50·10⁷"),
            (-0.25, "−0.250"),
        ];
        for (v, want) in cases {
            assert_eq!(significant(v, 3), want);
        }
        assert_eq!(with_error(0.036104, 0.002935), "0.0361 ± 0.0029");
        assert_eq!(with_error(51.748692, 10.383294), "52 ± 10");
        assert_eq!(with_error(1.2e-6, 3.4e-8), "1.20·10⁻⁶ ± 3.4·10⁻⁸");
        assert_eq!(with_error(0.5, 0.0), "0.5000");
        assert_eq!((power_of_ten(-2), power_of_ten(-7), power_of_ten(0)), ("0.01".into(), "10⁻⁷".into(), "1".into()));
        assert_eq!(
            (bytes(999), bytes(19_227_328), bytes(4_700_000_000)),
            ("999 B".into(), "19.2 MB".into(), "4.70 GB".into())
        );
        assert_eq!((count(12), count(1234567)), ("12".into(), "1\u{202f}234\u{202f}567".into()));
    }

    #[test]
    fn strings_of_files_cannot_leave_their_place() {
        assert_eq!(escape("<b a=\"'&\">\u{1b}[0m\n"), "&lt;b a=&quot;&#39;&amp;&quot;&gt;\u{fffd}[0m ");
        assert_eq!(shorten("abcdefghij", 6), "abc…ij");
        assert_eq!(shorten("äöü", 3), "äöü");
    }
}
