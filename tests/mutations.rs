//! Files with bytes changed at random: the readers say no, or yes, and never panic. Seeded, so that a failure repeats.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use common::program::{convert, fixture};
use ostq_convert::calibration::collector::{Collector, WeightSpec};
use ostq_convert::calibration::hessian_file::{HessianFile, Origin};
use ostq_convert::calibration::hessian_write::{HessianSpec, HessianWriter};
use ostq_convert::calibration::imatrix::Imatrix;
use ostq_convert::checkpoint::safetensors;
use ostq_convert::gguf;

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
        (self.next() % n.max(1) as u64) as usize
    }

    /// Changes `bytes` within the first `n`: single bits and bytes, numbers that are on an edge, pieces cut or doubled.
    fn mutate(&mut self, bytes: &mut Vec<u8>, n: usize) {
        for _ in 0..1 + self.below(4) {
            let n = n.min(bytes.len());
            let at = self.below(n);
            let edges = [0, 1, u64::MAX, 1 << 63, 1 << 31, u64::from(u32::MAX), 1 << 62, bytes.len() as u64];
            match self.below(8) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.next() as u8,
                2 if at + 8 <= bytes.len() => bytes[at..at + 8].copy_from_slice(&edges[self.below(8)].to_le_bytes()),
                3 if at + 4 <= bytes.len() => {
                    bytes[at..at + 4].copy_from_slice(&(edges[self.below(8)] as u32).to_le_bytes());
                }
                4 => bytes.truncate(at),
                5 => {
                    let to = (at + self.below(40)).min(bytes.len());
                    bytes.drain(at..to);
                }
                6 => {
                    let piece = bytes[at..(at + self.below(40)).min(bytes.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => bytes[at] = b"0123456789[]{},:\"-.eE\\ \0"[self.below(24)],
            }
            if bytes.is_empty() {
                return;
            }
        }
    }
}

/// Calls `read` on many changed copies of `good`; how many were accepted.
fn attack(good: &[u8], header: usize, rounds: u64, read: impl Fn(&[u8]) -> bool) -> u64 {
    let mut accepted = 0;
    for seed in 0..rounds {
        let mut bytes = good.to_vec();
        Random(seed).mutate(&mut bytes, header);
        let result = catch_unwind(AssertUnwindSafe(|| read(&bytes)));
        accepted += u64::from(result.unwrap_or_else(|_| panic!("seed {seed} panics")));
    }
    accepted
}

#[test]
fn gguf_files() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    convert(&fixture("tiny"), &out, "--vocab-only --quiet").exits(0);
    convert(&fixture("tiny"), &out, "--type q4_k_m --force --quiet").exits(0);
    let good = std::fs::read(&out).unwrap();
    let header = gguf::read(&good).unwrap();
    // keys and tensors; the long lists of the vocabulary between them are left out to be quick
    let small: Vec<(String, gguf::Value)> =
        header.metadata.iter().filter(|(_, v)| !matches!(v, gguf::Value::Array(a) if a.len() > 50)).cloned().collect();
    let specs: Vec<gguf::TensorSpec> = header
        .tensors
        .iter()
        .map(|t| gguf::TensorSpec { name: t.name.clone(), dims: t.dims.clone(), ty: t.ty })
        .collect();
    let layout = gguf::layout(&small, &specs, false).unwrap();
    let mut bytes = layout.header.clone();
    bytes.resize(layout.file_size as usize, 0);
    assert!(gguf::read(&bytes).is_ok());
    let accepted = attack(&bytes, layout.header.len(), 20_000, |b| gguf::read(b).is_ok());
    assert!((100..19_000).contains(&accepted), "{accepted} of 20000 accepted");
}

#[test]
fn safetensors_files() {
    let good = std::fs::read(fixture("tiny/model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let path = Path::new("model.safetensors");
    let accepted = attack(&good, header, 20_000, |bytes| safetensors::parse(path, bytes).is_ok());
    assert!((10..19_000).contains(&accepted), "{accepted} of 20000 accepted");
}

#[test]
fn importance_matrices() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("im");
    let good = std::fs::read(fixture("tiny.imatrix.gguf")).unwrap();
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Imatrix::load(&path).is_ok()
    };
    let accepted = attack(&good, good.len(), 3000, read);
    assert!((10..2990).contains(&accepted), "{accepted} of 3000 accepted");
    let mut legacy = 2i32.to_le_bytes().to_vec();
    for name in ["blk.0.ffn_up.weight", "blk.0.ffn_down.weight"] {
        legacy.extend((name.len() as i32).to_le_bytes());
        legacy.extend(name.as_bytes());
        legacy.extend([1i32.to_le_bytes(), 4i32.to_le_bytes()].concat());
        legacy.extend([0, 0, 128, 63].repeat(4));
    }
    let accepted = attack(&legacy, legacy.len(), 3000, read);
    assert!((10..2990).contains(&accepted), "{accepted} of 3000 accepted");
}

/// Whatever opens gives its matrices or says why not.
#[test]
fn second_moments() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("h");
    let spec = |name: &str, experts| WeightSpec { name: name.into(), columns: 5, experts, second: true, same_as: None };
    let same = WeightSpec { same_as: Some("q".into()), ..spec("k", None) };
    let mut c = Collector::new(vec![spec("q", None), same, spec("up_exps", Some(2))]).unwrap();
    let x: Vec<f32> = (0..35).map(|i| ((i * i % 11) as f32) - 4.5).collect();
    c.add("q", None, &x, 7).unwrap();
    c.add("up_exps", Some(1), &x, 7).unwrap();
    let specs = c.weights().map(HessianSpec::from).collect();
    let mut out = HessianWriter::create(&path, specs, &Origin::default(), false).unwrap();
    out.put("q", c.moments("q").unwrap()).unwrap();
    out.put("up_exps", c.moments("up_exps").unwrap()).unwrap();
    out.finish().unwrap();
    let good = std::fs::read(&path).unwrap();
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let Ok(file) = HessianFile::open(&path) else { return false };
        let all = file.names().iter().flat_map(|n| (0..file.entry(n).unwrap().counts.len()).map(move |e| (n, e)));
        let whole = |(n, e): (&String, usize)| {
            let full = file.matrix(n, e).map(|m| m.len());
            let sum = file.sum(n, e).map(|s| s.len());
            matches!((full, sum), (Ok(m), Ok(s)) if m == s * s)
        };
        // every one of them is asked for
        all.map(whole).filter(|ok| !ok).count() == 0
    };
    assert!(read(&good));
    let accepted = attack(&good, good.len(), 5000, read);
    assert!((50..4950).contains(&accepted), "{accepted} of 5000 accepted");
}

/// The whole program on changed files: every seed ends with a code that is meant.
#[test]
fn the_program() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (dir.path().join("in.gguf"), dir.path().join("out.gguf"));
    convert(&fixture("tiny"), &input, "--type q8_0 --quiet").exits(0);
    let good = std::fs::read(&input).unwrap();
    let end = gguf::read(&good).unwrap().data_offset as usize;
    let checkpoint = common::program::Checkpoint::new();
    let files = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"];
    for seed in 0..200u64 {
        let mut random = Random(1 << 40 | seed);
        let mut bytes = good.clone();
        // the infos of the tensors stand at the end of the header
        random.mutate(&mut bytes, if seed % 2 == 0 { 1200 } else { end });
        std::fs::write(&input, bytes).unwrap();
        let ran = convert(&input, &out, "--type q4_0 --allow-requantize --force --quiet");
        assert!([0, 3].contains(&ran.code), "GGUF, seed {seed}: {ran:?}");
        let name = files[seed as usize % files.len()];
        let mut bytes = std::fs::read(fixture("tiny").join(name)).unwrap();
        let n = bytes.len();
        random.mutate(&mut bytes, n);
        checkpoint.write(name, &bytes);
        let ran = convert(checkpoint.path(), &out, "--type q4_0 --force --quiet");
        // a number in config.json may ask for more memory than there is
        assert!([0, 3, 4].contains(&ran.code), "{name}, seed {seed}: {ran:?}");
        std::fs::copy(fixture("tiny").join(name), checkpoint.file(name)).unwrap();
    }
}
