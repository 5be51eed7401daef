//! Text to token ids: equal to llama.cpp's.
//!
//! Always: `fixtures/token-ids.txt`, which holds what real llama.cpp gave for every pre-tokenizer and for the fixtures'
//! vocabularies. With the test bed (`OSTQ_SHARED`) and llama.cpp (`OSTQ_PEERS`): its own vocabularies and their goldens, the test
//! models, whole files of text and random text through real `llama-tokenize`. What is missing is skipped with a line on standard error
//! (a failure if `OSTQ_REQUIRE_PEERS=1`).

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::program::fixture;
use common::{digest, peer, shared, write_vocab};
use ostq_convert::gguf::{self, Array, Metadata, Value, value};
use ostq_convert::plan::{Input, Options};
use ostq_convert::tokenizer::encode::split::unicode::Class;
use ostq_convert::tokenizer::encode::{EncodeError, TextEncoder};
use ostq_convert::tokenizer::pre::names::NAMES;
use serde_json::Value as Json;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
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

fn nasty(seed: u64, parts: usize) -> String {
    let mut random = Random(seed);
    let mut text = String::new();
    for _ in 0..parts {
        let part = random.pick(PARTS);
        let times = if random.below(20) == 0 { 1 + random.below(12) } else { 1 };
        text.push_str(&part.repeat(times));
    }
    text
}

fn set(metadata: &mut Metadata, key: &str, value: Value) {
    value::set(metadata, &format!("tokenizer.ggml.{key}"), value);
}

/// A vocabulary that shows where words end: every two characters of the text merge, in an order that has nothing to do with
/// their places, so what merges at the end of a word depends on what is beyond.
fn pairs_vocab(pre: &str) -> Metadata {
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

/// The keys that we make for a folder of `fixtures`.
fn tiny_metadata(name: &str) -> Metadata {
    folder_metadata(&fixture(name)).expect("the fixture is a checkpoint")
}

fn folder_metadata(folder: &Path) -> Result<Metadata, String> {
    use ostq_convert::arch::metadata::{MetadataOptions, build};
    let config = ostq_convert::checkpoint::Config::load(folder).map_err(|e| e.to_string())?;
    let arch = config.architecture().map_err(|e| e.to_string())?;
    let hp = config.hparams(arch).map_err(|e| e.to_string())?;
    let built = build(folder, &config, &hp, arch, &MetadataOptions::default()).map_err(|e| e.to_string())?;
    Ok(built.metadata)
}

/// Real `llama-tokenize` and a vocabulary.
struct LlamaTokenize {
    tool: PathBuf,
    dir: tempfile::TempDir,
    vocab: PathBuf,
}

impl LlamaTokenize {
    fn new(metadata: &Metadata) -> Option<LlamaTokenize> {
        let dir = tempfile::tempdir().unwrap();
        let vocab = dir.path().join("vocab.gguf");
        write_vocab(&vocab, metadata);
        Some(LlamaTokenize { tool: peer("llama-tokenize")?, dir, vocab })
    }

    fn of(vocab: &Path) -> Option<LlamaTokenize> {
        Some(LlamaTokenize { tool: peer("llama-tokenize")?, dir: tempfile::tempdir().unwrap(), vocab: vocab.into() })
    }

    fn ids(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let file = self.dir.path().join("text");
        std::fs::write(&file, text).unwrap();
        let mut run = Command::new(&self.tool);
        run.arg("-m").arg(&self.vocab).arg("-f").arg(&file).args(["--ids", "--no-escape"]);
        run.args((!add_special).then_some("--no-bos")).args((!parse_special).then_some("--no-parse-special"));
        let output = run.output().unwrap();
        let shown = String::from_utf8_lossy(&output.stdout);
        let line = shown.lines().rev().find(|l| l.starts_with('['));
        let line = line.unwrap_or_else(|| panic!("{shown}{}", String::from_utf8_lossy(&output.stderr)));
        line.trim_matches(['[', ']']).split(", ").filter(|s| !s.is_empty()).map(|s| s.parse().unwrap()).collect()
    }

    /// What `llama-tokenize` prints for its ids: `id -> 'piece'`.
    fn shown(&self, text: &str) -> Vec<u8> {
        let file = self.dir.path().join("text");
        std::fs::write(&file, text).unwrap();
        let mut run = Command::new(&self.tool);
        run.arg("-m").arg(&self.vocab).arg("-f").arg(&file).args(["--no-escape", "--no-bos"]);
        run.output().unwrap().stdout
    }

    /// Ours are the same, with special tokens in all four ways.
    fn agrees(&self, what: &str, encoder: &TextEncoder, text: &str) {
        for parse_special in [false, true] {
            for add_special in [false, true] {
                let what = format!("{what}, add_special {add_special}, parse_special {parse_special}");
                // llama-tokenize adds special tokens only where bos is one of them
                let ours = encoder.encode(text, add_special && encoder.add_bos(), parse_special);
                assert_same(&what, encoder, text, &ours, &self.ids(text, add_special, parse_special));
            }
        }
    }
}

/// Equal, or the place where they part.
#[track_caller]
fn assert_same(what: &str, encoder: &TextEncoder, text: &str, ours: &[u32], theirs: &[u32]) {
    if ours == theirs {
        return;
    }
    let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    let around = |ids: &[u32]| -> Vec<String> {
        let near = ids.iter().skip(same.saturating_sub(4)).take(12);
        near.map(|&id| format!("{id} {:?}", String::from_utf8_lossy(&encoder.piece(id)))).collect()
    };
    let start: String = text.chars().take(60).collect();
    panic!(
        "{what}: {start:?}...: id {same} of {} and {}\n  ours {:?}\ntheirs {:?}",
        ours.len(),
        theirs.len(),
        around(ours),
        around(theirs)
    );
}

fn hash(ids: &[u32]) -> String {
    digest(&ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>())
}

/// `whitespace` by itself is no pre-tokenizer of `gpt2`: llama.cpp aborts at two spaces.
fn text_for(pre: &str) -> String {
    let text = nasty(1, 6000);
    if pre == "whitespace" { text.replace(' ', "\t") } else { text }
}

const TINY: &[&str] = &["tiny", "tiny-llama2", "tiny-llama3", "tiny-qwen3"];

/// Name, number of ids, digest: of every pre-tokenizer on [`pairs_vocab`], of the fixtures' vocabularies on other text.
fn fixture_lines(mut ids: impl FnMut(&str, &Metadata, &str) -> Vec<u32>) -> String {
    let mut lines = String::from(
        "# Made with llama-tokenize of llama.cpp b11434 by tests/token_ids.rs (OSTQ_WRITE_TOKEN_IDS=1): vocabulary, number of ids, digest.\n",
    );
    let mut line = |name: &str, ids: Vec<u32>| lines += &format!("{name} {} {}\n", ids.len(), hash(&ids));
    for pre in NAMES {
        line(pre, ids(pre, &pairs_vocab(pre), &text_for(pre)));
    }
    for name in TINY {
        line(name, ids(name, &tiny_metadata(name), &nasty(2, 3000)));
    }
    lines
}

#[test]
fn every_pre_tokenizer_gives_the_ids_of_llama_cpp() {
    let file = fixture("token-ids.txt");
    if std::env::var_os("OSTQ_WRITE_TOKEN_IDS").is_some() {
        let theirs = fixture_lines(|_, metadata, text| {
            LlamaTokenize::new(metadata).expect("llama-tokenize is needed to write the fixture").ids(text, true, true)
        });
        std::fs::write(&file, theirs).unwrap();
    }
    let wanted = std::fs::read_to_string(&file).unwrap();
    let ours = fixture_lines(|_, metadata, text| {
        let encoder = TextEncoder::from_metadata(metadata).unwrap();
        encoder.encode(text, encoder.add_bos(), true)
    });
    let differ: Vec<_> = wanted.lines().zip(ours.lines()).filter(|(a, b)| a != b).collect();
    assert!(differ.is_empty() && wanted.lines().count() == ours.lines().count(), "{differ:#?}");
}

#[test]
fn every_pre_tokenizer_agrees_with_real_llama_cpp() {
    if peer("llama-tokenize").is_none() {
        return;
    }
    for (i, pre) in NAMES.iter().enumerate() {
        let metadata = pairs_vocab(pre);
        let encoder = TextEncoder::from_metadata(&metadata).unwrap();
        let Some(real) = LlamaTokenize::new(&metadata) else { return };
        let text = nasty(100 + i as u64, 1500);
        let text = if *pre == "whitespace" { text.replace(' ', "\t") } else { text };
        real.agrees(pre, &encoder, &text);
    }
}

#[test]
fn the_vocabularies_of_llama_cpp_and_their_goldens() {
    let Some(shared) = shared() else { return };
    let Some(tool) = peer("llama-tokenize") else { return };
    let models = tool.parent().unwrap().parent().unwrap().join("llama.cpp/models");
    let (mut vocabularies, mut cases) = (0, 0);
    for entry in std::fs::read_dir(shared.join("goldens/vocab")).unwrap().flatten() {
        let golden: Json = serde_json::from_slice(&std::fs::read(entry.path()).unwrap()).unwrap();
        let name = entry.path().file_stem().unwrap().to_string_lossy().into_owned();
        let file = models.join(format!("ggml-vocab-{name}.gguf"));
        let header = gguf::read(&std::fs::read(&file).unwrap()).unwrap();
        let encoder = TextEncoder::from_metadata(&header.metadata).unwrap_or_else(|e| panic!("{name}: {e}"));
        for case in golden["cases"].as_array().unwrap() {
            let text = case[0].as_str().unwrap();
            let theirs: Vec<u32> = case[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect();
            assert_same(&name, &encoder, text, &encoder.encode(text, false, false), &theirs);
            cases += 1;
        }
        let real = LlamaTokenize::of(&file).unwrap();
        let text = nasty(3, 2000);
        real.agrees(&name, &encoder, &text);
        let mut pieces = Vec::new();
        for id in encoder.encode(&text, false, true) {
            pieces.extend(format!("{id:6} -> '").as_bytes());
            // printf ends at a zero byte
            pieces.extend(encoder.piece(id).split(|&b| b == 0).next().unwrap());
            pieces.extend(b"'\n");
        }
        assert!(real.shown(&text).ends_with(&pieces), "{name}: pieces");
        vocabularies += 1;
    }
    eprintln!("{vocabularies} vocabularies, {cases} cases");
    assert!(vocabularies >= 13 && cases > 500, "{vocabularies} vocabularies, {cases} cases");
}

/// Metadata of a checkpoint: ours, or where the architecture has no table yet, that of the reference.
fn metadata_of(folder: &Path) -> Option<Metadata> {
    if let Ok(metadata) = folder_metadata(folder) {
        return Some(metadata);
    }
    let converter = peer("convert-peer")?;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("vocab.gguf");
    let run = Command::new(converter).arg(folder).args(["--vocab-only", "--outfile"]).arg(&out).output().unwrap();
    assert!(run.status.success(), "{}: {}", folder.display(), String::from_utf8_lossy(&run.stderr));
    Some(gguf::read(&std::fs::read(out).unwrap()).unwrap().metadata)
}

#[test]
fn the_texts_of_the_test_bed() {
    let Some(shared) = shared() else { return };
    let goldens: Json = serde_json::from_slice(&std::fs::read(shared.join("goldens/tokens.json")).unwrap()).unwrap();
    let texts: Vec<&str> = goldens["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let larger = std::env::var_os("OSTQ_MODELS").map(PathBuf::from).unwrap_or_default();
    let mut models = 0;
    for (model, golden) in goldens["models"].as_object().unwrap() {
        let folder = if model.starts_with("random-") { shared.join("models") } else { larger.clone() }.join(model);
        if !folder.join("config.json").is_file() {
            eprintln!("SKIPPED: no {model} (set OSTQ_MODELS)");
            continue;
        }
        let Some(mut metadata) = metadata_of(&folder) else {
            eprintln!("SKIPPED: {model}: no table for its architecture, and no converter of llama.cpp");
            continue;
        };
        if model == "random-llama-f16" {
            // the reference's scores, with which the goldens were made
            let scores = value::get(&metadata, "tokenizer.ggml.scores").unwrap().clone();
            let Value::Array(scores) = scores else { panic!("scores") };
            set(&mut metadata, "scores", Value::Array(Array::F32(vec![-1000.0; scores.len()])));
        }
        let encoder = TextEncoder::from_metadata(&metadata).unwrap_or_else(|e| panic!("{model}: {e}"));
        let ids = golden["ids"].as_array().unwrap();
        assert_eq!(ids.len(), texts.len());
        for (text, ids) in texts.iter().zip(ids) {
            let theirs: Vec<u32> = ids.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect();
            // goldens were made with llama-tokenize, which parses special tokens
            assert_same(model, &encoder, text, &encoder.encode(text, false, true), &theirs);
        }
        models += 1;
    }
    eprintln!("{models} models, {} texts", texts.len());
    assert!(models >= 9, "{models}");
}

/// Scores from merges: where the reference's are useless, the ids are those of tokenizer.json.
#[test]
fn scores_from_merges_give_the_ids_of_tokenizer_json() {
    let Some(shared) = shared() else { return };
    let goldens: Json = serde_json::from_slice(&std::fs::read(shared.join("goldens/tokens.json")).unwrap()).unwrap();
    let folder = shared.join("models/random-llama-f16");
    let encoder = TextEncoder::from_metadata(&folder_metadata(&folder).unwrap()).unwrap();
    let own = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    for text in goldens["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()) {
        let theirs = own.encode(text, false).unwrap().get_ids().to_vec();
        assert_same("random-llama-f16", &encoder, text, &encoder.encode(text, false, true), &theirs);
    }
}

#[test]
fn whole_files_and_random_text() {
    let Some(shared) = shared() else { return };
    if peer("llama-tokenize").is_none() {
        return;
    }
    let larger = std::env::var_os("OSTQ_MODELS").map(PathBuf::from).unwrap_or_default();
    let mut folders = vec![shared.join("models/tiny-llama"), larger.join("smollm2-135m")];
    folders.extend(["random-llama2", "random-llama3", "random-qwen2"].iter().map(|m| shared.join("models").join(m)));
    for folder in folders {
        if !folder.join("config.json").is_file() {
            eprintln!("SKIPPED: no {} (set OSTQ_MODELS)", folder.display());
            continue;
        }
        let metadata = Input::open(&folder, &Options::default()).unwrap().metadata;
        let encoder = TextEncoder::from_metadata(&metadata).unwrap();
        let Some(real) = LlamaTokenize::new(&metadata) else { return };
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        for file in ["calibration.txt", "evaluation.txt"] {
            let text = std::fs::read_to_string(shared.join("text").join(file)).unwrap();
            let theirs = real.ids(&text, true, true);
            assert_same(&name, &encoder, &text, &encoder.encode(&text, encoder.add_bos(), true), &theirs);
        }
        for seed in 10..14 {
            real.agrees(&name, &encoder, &nasty(seed, 4000));
        }
        real.agrees(&name, &encoder, &random_unicode(20, 20_000));
        for c in [" ", "\n", "a", "\u{4e2d}", "0", "\u{1f600}", "<s>"] {
            real.agrees(&name, &encoder, &c.repeat(3000));
        }
    }
}

/// Any code points, in runs of one range.
fn random_unicode(seed: u64, n: usize) -> String {
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

#[test]
fn categories_are_those_of_the_source() {
    let Some(tool) = peer("llama-tokenize") else { return };
    let file = tool.parent().unwrap().parent().unwrap().join("llama.cpp/src/unicode-data.cpp");
    let source = std::fs::read_to_string(file).unwrap();
    let table = |name: &str| source.split(name).nth(1).unwrap().split("};").next().unwrap();
    let number = |hex: &str| u32::from_str_radix(hex.trim().trim_start_matches("0x"), 16).unwrap();
    let ranges: Vec<(u32, u32)> = table("unicode_ranges_flags =")
        .lines()
        .filter_map(|l| l.strip_prefix('{')?.split_once('}')?.0.split_once(','))
        .map(|(start, flags)| (number(start), number(flags)))
        .collect();
    let white: BTreeSet<u32> =
        table("unicode_set_whitespace =").lines().filter_map(|l| l.strip_suffix(',').map(number)).collect();
    assert!(ranges.len() > 2000 && white.len() > 20);
    let category = |flags: u32| match flags {
        1 => Class::UNDEFINED,
        2 => Class::NUMBER,
        4 => Class::LETTER,
        8 => Class::SEPARATOR,
        0x10 => Class::MARK,
        0x20 => Class::PUNCTUATION,
        0x40 => Class::SYMBOL,
        0x80 => Class::CONTROL,
        _ => panic!("{flags:#x}"),
    };
    for pair in ranges.windows(2) {
        for c in (pair[0].0..pair[1].0).filter_map(char::from_u32) {
            let class = Class::of(c);
            assert_eq!(class.category(), category(pair[0].1), "{c:?}");
            assert_eq!(class.whitespace(), white.contains(&(c as u32)), "{c:?}");
        }
    }
}

#[test]
fn hostile_text_takes_time_in_proportion() {
    let start = std::time::Instant::now();
    for name in TINY {
        let encoder = TextEncoder::from_metadata(&tiny_metadata(name)).unwrap();
        for c in ["a", " ", "\n", "<", "1", "\u{4e2d}", "</s>", "<|", "'"] {
            let text = c.repeat((1 << 20) / c.len());
            let pieces: usize = encoder.encode(&text, false, true).iter().map(|&id| encoder.piece(id).len()).sum();
            assert!(pieces >= text.len(), "{name}, {c:?}: {pieces} bytes");
        }
    }
    assert!(start.elapsed().as_secs() < 120, "{:?}", start.elapsed());
}

#[test]
fn pieces_are_the_text() {
    for name in TINY {
        let encoder = TextEncoder::from_metadata(&tiny_metadata(name)).unwrap();
        let text = nasty(5, 500).replace("<unk>", "");
        let ids = encoder.encode(&text, false, true);
        let pieces: Vec<u8> = ids.iter().flat_map(|&id| encoder.piece(id)).collect();
        let pieces = String::from_utf8(pieces).unwrap();
        // SentencePiece sets a space before text, and behind special tokens
        let plain = |t: &str| t.replace([' ', '\u{2581}'], "");
        assert_eq!(plain(&pieces), plain(&text), "{name}");
    }
}

#[test]
fn vocabularies_that_cannot_be_used_are_refused_by_name() {
    let good = tiny_metadata("tiny");
    let refusal = |change: &dyn Fn(&mut Metadata)| {
        let mut metadata = good.clone();
        change(&mut metadata);
        TextEncoder::from_metadata(&metadata).expect_err("it is refused")
    };
    let without = |key: &'static str| refusal(&move |m| m.retain(|(k, _)| k != key));
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        assert_eq!(without(key), EncodeError::Missing { key });
    }
    for (model, kind) in
        [("bert", "WordPiece"), ("t5", "Unigram"), ("rwkv", "RWKV"), ("plamo2", "PLaMo"), ("x", "not known")]
    {
        let message = refusal(&|m| set(m, "model", model.into())).to_string();
        assert!(message.contains(&format!("`{model}`")) && message.contains(kind), "{message}");
    }
    let message = refusal(&|m| set(m, "pre", "lama-bpe".into())).to_string();
    assert!(message.contains("`lama-bpe`") && message.contains("`llama-bpe`"), "{message}");
    let message = refusal(&|m| set(m, "bos_token_id", Value::U32(1 << 30))).to_string();
    assert!(message.contains("bos_token_id") && message.contains("1073741824"), "{message}");
    let message = refusal(&|m| set(m, "bos_token_id", Value::I32(1))).to_string();
    assert!(message.contains("a i32, expected a u32"), "{message}");
    let message = refusal(&|m| set(m, "token_type", Value::Array(Array::I32(vec![1; 3])))).to_string();
    assert!(message.contains("3 elements"), "{message}");
    let message = refusal(&|m| set(m, "tokens", Value::strs(["a", "b", "a"]))).to_string();
    assert!(message.contains("tokens 0 and 2"), "{message}");
    let message = refusal(&|m| set(m, "tokens", Value::strs::<&str>([]))).to_string();
    assert!(message.contains("0 elements"), "{message}");
    let message = refusal(&|m| set(m, "merges", "a b".into())).to_string();
    assert!(message.contains("a string, expected an array of string"), "{message}");
}

#[test]
fn a_fingerprint_tells_vocabularies_apart() {
    let of = |metadata: &Metadata| TextEncoder::from_metadata(metadata).unwrap().fingerprint();
    let [a, b] = ["tiny-llama2", "tiny-llama3"].map(tiny_metadata);
    assert_eq!(of(&a).len(), 64);
    assert_eq!(of(&a), of(&a.clone()));
    assert_ne!(of(&a), of(&b));
    let mut other = b.clone();
    set(&mut other, "pre", "qwen2".into());
    assert_ne!(of(&b), of(&other));
    let mut other = b.clone();
    set(&mut other, "eos_token_id", Value::U32(3));
    assert_eq!(of(&b), of(&other));
    let mut other = b.clone();
    let Some(Value::Array(Array::Str(mut merges))) = value::get(&b, "tokenizer.ggml.merges").cloned() else { panic!() };
    merges.swap(0, 1);
    set(&mut other, "merges", Value::Array(Array::Str(merges)));
    assert_ne!(of(&b), of(&other));
}

#[test]
fn an_encoder_goes_from_thread_to_thread() {
    fn both<T: Send + Sync>(_: &T) {}
    let encoder = TextEncoder::from_metadata(&tiny_metadata("tiny")).unwrap();
    both(&encoder);
    let text = nasty(6, 300);
    let alone = encoder.encode(&text, true, true);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| encoder.encode(&text, true, true))).collect();
        threads.into_iter().for_each(|t| assert_eq!(t.join().unwrap(), alone));
    });
}
