//! Texts that are hard to split, and a vocabulary that shows where they were split.

use std::collections::BTreeSet;
use std::path::Path;

use ostq_convert::gguf::{Array, Metadata, Value, value};

use crate::common::program::fixture;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// What pre-tokenizers tell apart: contractions, case, numbers of several scripts, marks, spaces of several kinds, CJK,
/// symbols, code points that are not assigned, special tokens.
#[rustfmt::skip]
const PARTS: &[&str] = &[
    " ", "  ", "   ", "      ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "\u{a0}", "\u{3000}", "\u{2003}", "\u{85}", "\u{b}", "\u{1c}",
    "a", "b", "Ab", "ABc", "abC", "the", " The", "camelCase", "x", "Z", "'s", "'S", "'t", "'Re", "'ve", "'m", "'LL", "'d", "'", "\u{2019}s",
    "1", "12", "123", "1234", "12345678", "\u{661}\u{662}", "\u{bd}", "\u{2167}", "7a", "1.5", "1,000",
    "\u{e9}", "e\u{301}", "\u{301}", "\u{df}", "\u{130}", "\u{416}", "\u{436}", "\u{3a9}", "\u{1c5}", "\u{17f}", "\u{212a}", "\u{2b0}",
    "\u{4e2d}", "\u{6587}", "\u{3400}", "\u{20000}", "\u{f900}", "\u{8c48}", "\u{304b}\u{30ab}", "\u{ff76}", "\u{ac00}", "\u{3131}", "\u{3105}",
    "\u{e01}\u{e34}", "\u{915}\u{93f}", "\u{1780}", "\u{1000}\u{103c}", "\u{5d0}\u{5b0}", "\u{627}\u{64e}",
    "!", "?", "...", "--", "/", "//", "#", "$", "+", "<", "=", ">", "^", "~", "|", "`", "_", "(", ")", "[", "]", "{", "}", "\\", "\"", "@", "%", "&", "*", ";", ":",
    "\u{ff01}", "\u{3002}", "\u{3001}", "\u{ff0c}", "\u{2026}", "\u{201c}", "\u{2014}", "\u{964}", "\u{6d4}", "\u{60c}", "\u{ff5e}", "\u{fe30}",
    "\u{1f600}", "\u{1f468}\u{200d}\u{1f469}", "\u{20ac}", "\u{2202}", "\u{378}", "\u{e000}", "\u{10ffff}", "\u{feff}", "\u{200b}", "\u{fffd}", "\u{2581}",
    "<s>", "</s>", "<|im_end|>", "<|end|>", "<unk>", "<mask>", "<tool>", "<0x0A>", "<sentinel:12>", "IMGIMGABZ",
];

pub fn nasty(seed: u64, parts: usize) -> String {
    let mut random = Random(seed);
    let mut text = String::new();
    for _ in 0..parts {
        let part = random.pick(PARTS);
        let times = if random.below(20) == 0 { 1 + random.below(12) } else { 1 };
        text.push_str(&part.repeat(times));
    }
    text
}

pub fn set(metadata: &mut Metadata, key: &str, value: Value) {
    value::set(metadata, &format!("tokenizer.ggml.{key}"), value);
}

/// A vocabulary that shows where words end: every two characters of the text merge, in an order that has nothing to do with
/// their places, so what merges at the end of a word depends on what is beyond.
pub fn pairs_vocab(pre: &str) -> Metadata {
    let mut random = Random(7);
    let mut metadata = tiny_metadata("tiny");
    let mut tokens: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut types = Vec::new();
    let mut add = |token: String, kind: i32| {
        if seen.insert(token.clone()) {
            tokens.push(token);
            types.push(kind);
        }
    };
    for (token, kind) in
        [("<s>", 3), ("</s>", 3), ("<unk>", 2), ("<mask>", 3), ("<tool>", 4), ("<|im_end|>", 1), ("<|end|>", 1)]
    {
        add(token.into(), kind);
    }
    (0..256).for_each(|b| add(format!("<0x{b:02X}>"), 6));
    let (bytes, alphabet) = alphabet();
    alphabet.iter().for_each(|c| add(c.to_string(), 1));
    let text = PARTS.concat();
    let chars: BTreeSet<char> = text.chars().map(|c| if c == ' ' { '\u{2581}' } else { c }).collect();
    chars.iter().for_each(|c| add(c.to_string(), 1));
    ["\n\n", "\n\n\n"].iter().for_each(|t| add(t.to_string(), 1));
    // two for the byte alphabet, two for characters, and some threes that no merge leads to
    let used: BTreeSet<char> = text.bytes().map(|b| bytes[usize::from(b)]).collect();
    let mut merges = BTreeSet::new();
    for set in [&used, &chars] {
        for (a, b) in
            set.iter().flat_map(|a| set.iter().map(move |b| (a, b))).filter(|(a, b)| (**a, **b) != ('\n', '\n'))
        {
            merges.insert((random.next(), *a, *b));
        }
    }
    for (_, a, b) in &merges {
        add(format!("{a}{b}"), 1);
    }
    ["the", "\u{120}The", "123", "'LL", "Abc", "...", "\u{10a}\u{10a}\u{10a}"]
        .iter()
        .for_each(|t| add(t.to_string(), 1));
    let merges: Vec<String> = merges.iter().map(|(_, a, b)| format!("{a} {b}")).collect();
    metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
    set(&mut metadata, "model", "gpt2".into());
    set(&mut metadata, "pre", pre.into());
    set(&mut metadata, "tokens", Value::strs(&tokens));
    set(&mut metadata, "token_type", Value::Array(Array::I32(types)));
    set(&mut metadata, "merges", Value::strs(&merges));
    set(&mut metadata, "bos_token_id", Value::U32(0));
    set(&mut metadata, "eos_token_id", Value::U32(1));
    metadata
}

/// GPT-2's byte alphabet, written down a second time.
fn alphabet() -> (Vec<char>, Vec<char>) {
    let plain = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut hidden = 256..;
    let of = |b: u32| char::from_u32(if plain(b) { b } else { hidden.next().unwrap() }).unwrap();
    let bytes: Vec<char> = (0..256).map(of).collect();
    let mut sorted = bytes.clone();
    sorted.sort();
    (bytes, sorted)
}

/// Any code points, in runs of one range.
pub fn random_unicode(seed: u64, n: usize) -> String {
    let mut random = Random(seed);
    let mut text = String::new();
    while text.len() < n {
        let from = [0, 0x80, 0x400, 0x900, 0x2000, 0x3000, 0xA000, 0x1_0000, 0x1_F000, 0xE_0000][random.below(10)];
        let wide = [0x40, 0x100, 0x1000][random.below(3)];
        let chars = (0..1 + random.below(20)).filter_map(|_| char::from_u32(from + random.below(wide) as u32));
        text.extend(chars.filter(|&c| c != '\0'));
        text.push_str(random.pick(&["", " ", "\n", "a"]));
    }
    text
}

/// The keys that we make for a folder of `fixtures`.
pub fn tiny_metadata(name: &str) -> Metadata {
    folder_metadata(&fixture(name)).expect("the fixture is a checkpoint")
}

pub fn folder_metadata(folder: &Path) -> Result<Metadata, String> {
    use ostq_convert::arch::metadata::{MetadataOptions, build};
    let config = ostq_convert::checkpoint::Config::load(folder).map_err(|e| e.to_string())?;
    let arch = config.architecture().map_err(|e| e.to_string())?;
    let hp = config.hparams(arch).map_err(|e| e.to_string())?;
    let built = build(folder, &config, &hp, arch, &MetadataOptions::default()).map_err(|e| e.to_string())?;
    Ok(built.metadata)
}
