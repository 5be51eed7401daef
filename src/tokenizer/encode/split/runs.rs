//! The small expressions: runs of characters of a kind, and those that are none.
//!
//! In: a piece. Out: matches (see [`super::words`]) or ends of pieces. Sources: the expressions of `llm_tokenizer_bpe` in
//! `src/llama-vocab.cpp`; `unicode_regex_split_custom_afmoe` of `src/unicode.cpp`.

use super::Piece;
use super::unicode::Class;

/// Appends the ends of the pieces into which a piece is cut.
pub type Cutter = fn(&Piece, &mut Vec<usize>);

/// Alternatives, tried in order.
#[derive(Debug)]
pub struct Runs(pub &'static [Run]);

/// `lead? kind{min,max}`.
#[derive(Debug)]
pub struct Run {
    pub lead: Lead,
    pub kind: fn(&Piece, usize) -> bool,
    pub min: usize,
    pub max: usize,
}

/// What may stand before a run, once.
#[derive(Debug, PartialEq)]
pub enum Lead {
    Nothing,
    /// ` ?`.
    Space,
    /// `\s?`.
    White,
}

impl Run {
    /// `kind+`.
    pub const fn of(kind: fn(&Piece, usize) -> bool) -> Run {
        Run { lead: Lead::Nothing, kind, min: 1, max: usize::MAX }
    }

    /// `kind{min,max}`.
    pub const fn times(kind: fn(&Piece, usize) -> bool, min: usize, max: usize) -> Run {
        Run { lead: Lead::Nothing, kind, min, max }
    }

    /// `lead?kind+`.
    pub const fn after(lead: Lead, kind: fn(&Piece, usize) -> bool) -> Run {
        Run { lead, kind, min: 1, max: usize::MAX }
    }

    fn find(&self, p: &Piece, i: usize) -> usize {
        let leads = match self.lead {
            Lead::Nothing => false,
            Lead::Space => p.at(i) == Some(' '),
            Lead::White => p.white(i),
        };
        // with the lead first, then without
        for start in [leads.then_some(i + 1), Some(i)].into_iter().flatten() {
            let limit = start.saturating_add(self.max);
            let end = p.run(start, |k| k < limit && (self.kind)(p, k));
            if end >= start + self.min {
                return end;
            }
        }
        i
    }
}

impl Runs {
    pub(super) fn find(&self, p: &Piece, i: usize) -> usize {
        self.0.iter().map(|run| run.find(p, i)).find(|&end| end > i).unwrap_or(i)
    }
}

fn within(p: &Piece, i: usize, ranges: &[(u32, u32)]) -> bool {
    p.wide(i).is_some_and(|c| ranges.iter().any(|&(from, to)| from <= c && c <= to))
}

/// `\p{N}`.
pub fn number(p: &Piece, i: usize) -> bool {
    p.number(i)
}

/// `\p{L}`.
pub fn letter(p: &Piece, i: usize) -> bool {
    p.letter(i)
}

/// `\p{P}`.
pub fn punctuation(p: &Piece, i: usize) -> bool {
    p.is(i, |c| c.category() == Class::PUNCTUATION)
}

/// `[0-9]`.
pub fn digit(p: &Piece, i: usize) -> bool {
    p.at(i).is_some_and(|c| c.is_ascii_digit())
}

/// `[\r\n]`.
pub fn line_break(p: &Piece, i: usize) -> bool {
    p.newline(i)
}

/// `\n`.
pub fn line_feed(p: &Piece, i: usize) -> bool {
    p.at(i) == Some('\n')
}

/// `[^\n]`.
pub fn not_line_feed(p: &Piece, i: usize) -> bool {
    p.at(i) != Some('\n')
}

/// `\S`.
pub fn not_white(p: &Piece, i: usize) -> bool {
    !p.white(i)
}

/// ``[\p{P}\$\+<=>\^~\|`]``: Falcon.
pub fn falcon(p: &Piece, i: usize) -> bool {
    punctuation(p, i) || p.at(i).is_some_and(|c| "$+<=>^~|`".contains(c))
}

/// `[\p{P}\$\+<=>\^~\|]`: where no pre-tokenizer is named.
pub fn unnamed(p: &Piece, i: usize) -> bool {
    falcon(p, i) && p.at(i) != Some('`')
}

/// ``[\p{P}!-/:-@\[-`{-~]``: Chameleon.
pub fn chameleon(p: &Piece, i: usize) -> bool {
    punctuation(p, i) || p.at(i).is_some_and(|c| c.is_ascii_punctuation())
}

/// `[^(\s|.,!?…。，、।۔،)]`: Bloom and its kin.
pub fn bloom(p: &Piece, i: usize) -> bool {
    const NOT: &str = "(|.,!?)\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c}";
    !p.white(i) && p.at(i).is_some_and(|c| !NOT.contains(c))
}

/// `[一-龥぀-ゟ゠-ヿ]`: Han characters and kana.
pub fn han_and_kana(p: &Piece, i: usize) -> bool {
    within(p, i, &[(0x4E00, 0x9FA5), (0x3040, 0x309F), (0x30A0, 0x30FF)])
}

/// `[一-龥ࠀ-一가-퟿]`: as the older DeepSeek models have it.
pub fn deepseek_cjk(p: &Piece, i: usize) -> bool {
    within(p, i, &[(0x4E00, 0x9FA5), (0x0800, 0x4E00), (0xAC00, 0xD7FF)])
}

/// `[!-/:-~！-／：-～‘-‟　-。]`: DeepSeek LLM.
pub fn deepseek_symbol(p: &Piece, i: usize) -> bool {
    let ranges = [(0x21, 0x2F), (0x3A, 0x7E), (0xFF01, 0xFF0F), (0xFF1A, 0xFF5E), (0x2018, 0x201F), (0x3000, 0x3002)];
    within(p, i, &ranges)
}

/// The letters that the expression of DeepSeek LLM lists one by one.
pub fn deepseek_letter(p: &Piece, i: usize) -> bool {
    let Some(c) = p.wide(i) else { return false };
    let next = DEEPSEEK_LETTERS.partition_point(|&(from, _)| from <= c);
    next > 0 && c <= DEEPSEEK_LETTERS[next - 1].1
}

/// `[가-힣ㄱ-ㆎ]`: Youtu, as the next two.
pub fn hangul(p: &Piece, i: usize) -> bool {
    within(p, i, &[(0xAC00, 0xD7A3), (0x3131, 0x318E)])
}

/// `[！…“”‘’—：；，、-〿︰-﹏]`.
pub fn cjk_punctuation(p: &Piece, i: usize) -> bool {
    within(p, i, &[(0x3001, 0x303F), (0xFE30, 0xFE4F)])
        || p.at(i).is_some_and(|c| {
            "\u{ff01}\u{2026}\u{201c}\u{201d}\u{2018}\u{2019}\u{2014}\u{ff1a}\u{ff1b}\u{ff0c}".contains(c)
        })
}

/// `[ㄅ-ㄯ]`.
pub fn bopomofo(p: &Piece, i: usize) -> bool {
    within(p, i, &[(0x3105, 0x312F)])
}

/// The Asian scripts of AFMoE. Its `豈` is U+8C48, not the compatibility character U+F900 that was meant.
#[rustfmt::skip]
pub fn afmoe(p: &Piece, i: usize) -> bool {
    within(p, i, &[
        (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x8C48, 0xFAFF), (0x3040, 0x309F), (0x30A0, 0x30FF), (0xFF65, 0xFF9F),
        (0x2F00, 0x2FDF), (0x0E40, 0x0E7F), (0x0E80, 0x0EFF), (0x1780, 0x17FF), (0x1000, 0x109F), (0xAA60, 0xAA7F),
        (0xA9E0, 0xA9FF), (0xAC00, 0xD7AF), (0x1100, 0x11FF),
    ])
}

/// `\s+$`: the white space at the end.
pub fn trailing_white(p: &Piece, ends: &mut Vec<usize>) {
    let start = (0..p.len()).rev().take_while(|&i| p.white(i)).last();
    ends.extend(start.filter(|&i| i > 0));
    ends.push(p.len());
}

/// `(?=(\d{3})+(?!\d))`: before each group of three digits, counted from the end of a run.
pub fn thousands(p: &Piece, ends: &mut Vec<usize>) {
    let mut i = 0;
    while i < p.len() {
        let end = p.run(i, |k| digit(p, k));
        ends.extend((i..end).filter(|&k| k > 0 && (end - k).is_multiple_of(3)));
        i = end.max(i + 1);
    }
    ends.push(p.len());
}

/// Numbers in groups of three, counted from their end, the first group with one to three. What stands before a number
/// stays with its first group (`unicode_regex_split_custom_afmoe`, which also serves for `\d{1,3}(?=(?:\d{3})*\b)`).
pub fn number_groups(p: &Piece, ends: &mut Vec<usize>) {
    let mut done = 0;
    let mut i = 0;
    while i < p.len() {
        let end = p.run(i, |k| p.number(k));
        let groups = (i + 1..=end).filter(|&k| (end - k).is_multiple_of(3));
        for group in groups {
            ends.push(group);
            done = group;
        }
        i = end.max(i + 1);
    }
    if done < p.len() {
        ends.push(p.len());
    }
}

/// `<sentinel:[0-9]+>`: Chameleon, as the next two.
pub fn sentinels(p: &Piece, ends: &mut Vec<usize>) {
    each(p, ends, |i| {
        let start = literal(p, i, "<sentinel:")?;
        let end = p.run(start, |k| digit(p, k));
        (end > start && p.at(end) == Some('>')).then_some(end + 1)
    });
}

/// `(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z`.
pub fn images(p: &Piece, ends: &mut Vec<usize>) {
    each(p, ends, |i| {
        let start = literal(p, i, "IMGIMG")?;
        let end = p.run(start, |k| k < start + 4 && matches!(p.at(k), Some('A'..='I')));
        (end > start && p.at(end) == Some('Z')).then_some(end + 1)
    });
}

/// `([\t\n]|    |  )`.
pub fn indents(p: &Piece, ends: &mut Vec<usize>) {
    each(p, ends, |i| match p.at(i) {
        Some('\t' | '\n') => Some(i + 1),
        _ => literal(p, i, "    ").or_else(|| literal(p, i, "  ")),
    });
}

fn literal(p: &Piece, i: usize, text: &str) -> Option<usize> {
    let mut k = i;
    for c in text.chars() {
        if p.at(k) != Some(c) {
            return None;
        }
        k += 1;
    }
    Some(k)
}

fn each(p: &Piece, ends: &mut Vec<usize>, find: impl Fn(usize) -> Option<usize>) {
    super::matches(p, ends, |i, _| find(i).unwrap_or(i));
}

/// Sorted.
#[rustfmt::skip]
const DEEPSEEK_LETTERS: &[(u32, u32)] = &[
    (0x41, 0x5A), (0x61, 0x7A), (0xB5, 0xB5), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x1BA), (0x1BC, 0x1BF),
    (0x1C4, 0x293), (0x295, 0x2AF), (0x370, 0x373), (0x376, 0x376), (0x377, 0x377), (0x37B, 0x37D), (0x37F, 0x37F),
    (0x386, 0x386), (0x388, 0x38A), (0x38C, 0x38C), (0x38E, 0x3A1), (0x3A3, 0x3F5), (0x3F7, 0x481), (0x48A, 0x52F),
    (0x531, 0x556), (0x10A0, 0x10C5), (0x13A0, 0x13F5), (0x13F8, 0x13FD), (0x1C90, 0x1CBA), (0x1CBD, 0x1CBF),
    (0x1D00, 0x1D2B), (0x1D6B, 0x1D77), (0x1D79, 0x1D9A), (0x1E00, 0x1F15), (0x1F18, 0x1F1D), (0x1F20, 0x1F45),
    (0x1F48, 0x1F4D), (0x1F50, 0x1F57), (0x1F59, 0x1F59), (0x1F5B, 0x1F5B), (0x1F5D, 0x1F5D), (0x1F5F, 0x1F7D),
    (0x1F80, 0x1FB4), (0x1FB6, 0x1FBC), (0x1FBE, 0x1FBE), (0x1FC2, 0x1FC4), (0x1FC6, 0x1FCC), (0x1FD0, 0x1FD3),
    (0x1FD6, 0x1FDB), (0x1FE0, 0x1FEC), (0x1FF2, 0x1FF4), (0x1FF6, 0x1FFC), (0x2102, 0x2102), (0x2107, 0x2107),
    (0x210A, 0x2113), (0x2115, 0x2115), (0x2119, 0x211D), (0x2124, 0x2124), (0x2126, 0x2126), (0x2128, 0x2128),
    (0x212A, 0x212D), (0x212F, 0x2134), (0x2139, 0x2139), (0x213C, 0x213F), (0x2145, 0x2149), (0x214E, 0x214E),
    (0x2183, 0x2183), (0x2184, 0x2184), (0x2C00, 0x2C7B), (0x2C7E, 0x2CE4), (0x2CEB, 0x2CEE), (0x2CF2, 0x2CF2),
    (0x2CF3, 0x2CF3), (0xA640, 0xA66D), (0xA680, 0xA69B), (0xA722, 0xA76F), (0xA771, 0xA787), (0xA78B, 0xA78E),
    (0xAB70, 0xABBF), (0xFB00, 0xFB06), (0xFB13, 0xFB17), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A), (0x10400, 0x1044F),
    (0x104B0, 0x104D3), (0x104D8, 0x104FB), (0x10C80, 0x10CB2), (0x10CC0, 0x10CF2), (0x118A0, 0x118DF),
    (0x1E900, 0x1E943),
];

#[cfg(test)]
mod tests {
    use super::super::{Stage, split};
    use super::*;

    #[test]
    fn groups_of_three() {
        let groups = [Stage::Cut(number_groups)];
        assert_eq!(split("1234567", &groups), ["1", "234", "567"]);
        assert_eq!(split("ab1234 123x", &groups), ["ab1", "234", " 123", "x"]);
        assert_eq!(split("123", &groups), ["123"]);
        let thousands = [Stage::Cut(thousands)];
        assert_eq!(split("1234567", &thousands), ["1", "234", "567"]);
        assert_eq!(split("ab12 123456", &thousands), ["ab12 ", "123", "456"]);
        assert_eq!(split("12", &thousands), ["12"]);
    }

    #[test]
    fn white_space_at_the_end() {
        let stage = [Stage::Cut(trailing_white)];
        assert_eq!(split(" a  b \n ", &stage), [" a  b", " \n "]);
        assert_eq!(split("  ", &stage), ["  "]);
        assert_eq!(split("a", &stage), ["a"]);
    }

    #[test]
    fn the_lead_is_given_back() {
        static RUN: [Run; 1] = [Run::after(Lead::White, not_line_feed)];
        // where the kind does not follow, the lead is none
        assert_eq!(split("\n a\n\nb\n", &[Stage::Runs(Runs(&RUN))]), ["\n a", "\n", "\nb", "\n"]);
    }

    #[test]
    fn chameleon_knows_its_images() {
        let stages = [Stage::Cut(sentinels), Stage::Cut(images), Stage::Cut(indents)];
        assert_eq!(
            split("x<sentinel:12>IMGIMGABZ IMGIMGABCDEZ<sentinel:>     \t", &stages),
            ["x", "<sentinel:12>", "IMGIMGABZ", " IMGIMGABCDEZ<sentinel:>", "    ", " ", "\t"]
        );
    }
}
