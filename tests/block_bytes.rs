//! Every block format gives the bytes of ggml's quantizers, and decodes and validates as ggml does, on each
//! instruction set of this machine. The expected hashes are in `fixtures/blocks/TYPE.txt`, written by
//! `fixtures/make-blocks.py`, which also documents the inputs made here.

use ostq_convert::formats::{format, simd};
use ostq_convert::gguf::GgmlType;
use sha2::{Digest, Sha256};

const SHAPES: [(usize, usize); 6] = [(5, 32), (3, 96), (2, 256), (3, 768), (1, 2048), (96, 1024)];
const KINDS: [&str; 17] = [
    "gauss",
    "heavy",
    "bf16",
    "zero",
    "minus_zero",
    "signed_zeros",
    "one_hot",
    "steps",
    "minus_steps",
    "tiny",
    "subnormal",
    "least",
    "large",
    "huge",
    "max",
    "ties",
    "mixed",
];

/// Output `i` of SplitMix64.
fn mix(seed: u64, i: u64) -> u64 {
    let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn gauss(seed: u64, i: u64) -> f32 {
    let parts = (0..3).map(|k| mix(seed, 3 * i + k)).flat_map(|z| (0..4).map(move |part| (z >> (16 * part)) & 0xffff));
    (parts.sum::<u64>() as i64 - 393210) as f32 / 65536.0
}

fn value(kind: &str, seed: u64, i: u64) -> f32 {
    let g = gauss(seed, i);
    let sign = 1.0 - 2.0 * (mix(seed, i) & 1) as f32;
    match kind {
        "gauss" => g * 0.02,
        "heavy" => g * g * g * 0.01,
        "bf16" => f32::from_bits((g * 0.02).to_bits() & 0xffff_0000),
        "zero" => 0.0,
        "minus_zero" => -0.0,
        "signed_zeros" => sign * 0.0,
        "one_hot" => [0.0, g][(i % 97 == 13) as usize],
        "steps" => gauss(seed, i - i % 64).abs(),
        "minus_steps" => -gauss(seed, i - i % 64).abs(),
        "tiny" => g * 1e-15,
        "subnormal" => g * 1e-41,
        "least" => 1e-42,
        "large" => g * 3e4,
        "huge" => g * 1e30,
        "max" => sign * 3.4e38,
        "ties" => ((mix(seed, i) % 31) as i64 - 15) as f32 * 0.5,
        "mixed" => g * 2f32.powi((i / 32 * 7 % 41) as i32 - 20),
        _ => panic!("unknown kind {kind}"),
    }
}

fn weight(mode: &str, seed: u64, i: u64) -> f32 {
    let z = mix(seed + 500, i);
    let u = (z >> 40) as f32 / (1 << 24) as f32;
    if mode == "zero" || z.is_multiple_of(16) { 0.0 } else { u * u }
}

/// What one line of a fixture holds.
#[derive(Debug, PartialEq)]
struct Outcome {
    blocks: String,
    decoded: String,
    valid: bool,
}

fn outcome(ty: GgmlType, kind: &str, mode: &str, decodes: bool) -> Outcome {
    let format = format(ty).expect("a format that encodes");
    let k = KINDS.iter().position(|k| *k == kind).expect("a known kind");
    let (mut blocks, mut decoded, mut valid) = (Sha256::new(), Sha256::new(), true);
    for (s, &(rows, columns)) in SHAPES.iter().enumerate() {
        if columns % ty.block_len() != 0 {
            continue;
        }
        let seed = (1000 * k + s) as u64;
        let n = rows * columns;
        let x: Vec<f32> = (0..n as u64).map(|i| value(kind, seed, i)).collect();
        let w: Vec<f32> = (0..columns as u64).map(|i| weight(mode, seed, i)).collect();
        let mut out = vec![0xa5; n / ty.block_len() * ty.block_bytes()];
        format.encode(&x, columns, (mode != "none").then_some(&w[..]), &mut out).expect("it encodes");
        blocks.update(&out);
        valid &= format.validate(&out).is_ok();
        let mut y = vec![f32::NAN; n];
        format.decode(&out, &mut y);
        y.iter().for_each(|y| decoded.update(y.to_le_bytes()));
    }
    let short = |h: Sha256| h.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect::<String>();
    Outcome { blocks: short(blocks), decoded: if decodes { short(decoded) } else { "-".into() }, valid }
}

#[test]
fn blocks_are_those_of_ggml() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/blocks");
    let (mut cases, mut wrong) = (0, Vec::new());
    for entry in std::fs::read_dir(folder).expect("fixtures") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let ty = GgmlType::from_name(&name).unwrap_or_else(|| panic!("{name} is no type"));
        for line in std::fs::read_to_string(&path).expect("a text file").lines() {
            let [kind, mode, blocks, decoded, valid] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{name}: {line}");
            };
            let want = Outcome { blocks: blocks.into(), decoded: decoded.into(), valid: valid == "ok" };
            for isa in simd::Isa::available() {
                let got = simd::with_isa(isa, || outcome(ty, kind, mode, decoded != "-"));
                if got != want {
                    wrong.push(format!("{name} {kind} {mode} {}: {got:?}, not {want:?}", isa.name()));
                }
                cases += 1;
            }
        }
    }
    assert!(cases >= 15 * 30, "only {cases} cases");
    assert!(wrong.is_empty(), "{} of {cases} wrong:\n{}", wrong.len(), wrong.join("\n"));
}
