//! Codebook, ternary, binary and FP4 blocks against ggml: encoded bytes, decoded values, validation.
//!
//! `fixtures/iq-blocks.txt` holds digests of what libggml-base (llama.cpp b11434) gave for inputs that are generated
//! here and in `fixtures/make-iq-blocks.py` by the same rules; that script describes the file.

use ostq_convert::formats::{FormatError, format};
use ostq_convert::gguf::GgmlType;
use sha2::{Digest, Sha256};

const FIXTURE: &str = include_str!("../fixtures/iq-blocks.txt");
const ROWS: usize = 2;
const COLS: usize = 512;
const KINDS: [&str; 15] = [
    "gauss",
    "heavy",
    "bf16",
    "zero",
    "minuszero",
    "onehot",
    "const",
    "subnormal",
    "ties",
    "mixed",
    "gaps",
    "tiny",
    "big",
    "huge",
    "edges",
];

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// Sum of four 16-bit integers less its mean.
    fn bell(&mut self) -> f32 {
        let z = self.next();
        let sum: u64 = [0, 16, 32, 48].iter().map(|s| z >> s & 0xffff).sum();
        (sum as i64 - 131_070) as f32
    }
}

fn pow2(e: i32) -> f32 {
    2f32.powi(e)
}

fn values(kind: &str) -> Vec<f32> {
    let index = KINDS.iter().position(|k| *k == kind).expect("known kind");
    let mut r = Rng(1000 + index as u64);
    let constant = r.bell() * pow2(-18);
    let mut scale = 1.0;
    let mut out = Vec::new();
    for i in 0..ROWS * COLS {
        if i % 16 == 0 {
            match kind {
                "mixed" => scale = pow2(-2 * (r.next() % 12) as i32),
                "gaps" => scale = (r.next() % 2) as f32,
                _ => {}
            }
        }
        out.push(match kind {
            "gauss" | "mixed" | "gaps" => r.bell() * pow2(-22) * scale,
            "heavy" => {
                let b = r.bell() * pow2(-17);
                b * b * b
            }
            "bf16" => f32::from_bits((r.bell() * pow2(-22)).to_bits() & 0xffff_0000),
            "zero" => 0.0,
            "minuszero" => f32::from_bits((r.next() as u32 & 1) << 31),
            "onehot" => {
                let b = r.bell() * pow2(-18);
                if i % 256 == 37 * (i / 256 + 1) { b } else { 0.0 }
            }
            "const" => constant,
            "subnormal" => f32::from_bits(r.next() as u32 & 0x8000_03ff),
            "ties" => ((r.next() % 9) as i32 - 4) as f32 * 0.25,
            "tiny" => r.bell() * pow2(-50),
            "big" => r.bell() * pow2(30),
            "huge" => r.bell() * pow2(80),
            "edges" => {
                let z = r.next();
                let edge = (((97 + z % 30) << 23) - (z >> 32) % 8) as u32;
                if i % 32 == 5 { f32::from_bits(edge) } else { 0.0 }
            }
            _ => unreachable!(),
        });
    }
    out
}

fn weights(way: &str) -> Option<Vec<f32>> {
    let mut r = Rng(2000);
    if way == "none" {
        return None;
    }
    let weight = |i| {
        let w = ((r.next() >> 48) + 1) as f32 * pow2(-14);
        let hole = way == "zero" || way == "holes" && (i / 8 % 5 == 0 || r.next().is_multiple_of(3));
        if hole { 0.0 } else { w }
    };
    Some((0..COLS).map(weight).collect())
}

fn digest(data: &[u8]) -> String {
    Sha256::digest(data)[..8].iter().map(|b| format!("{b:02x}")).collect()
}

fn lines(what: &str) -> impl Iterator<Item = Vec<&'static str>> {
    let words = |l: &'static str| l.split(' ').collect::<Vec<_>>();
    FIXTURE.lines().map(words).filter(move |w| w[0] == what).map(|w| w[1..].to_vec())
}

#[test]
fn encoded_bytes_are_those_of_ggml() {
    let (mut cases, mut aborts, mut wrong) = (0, 0, Vec::new());
    for line in lines("encode") {
        let ty = GgmlType::from_name(line[0]).expect("known type");
        let weights = weights(line[1]);
        for case in &line[2..] {
            let (kind, want) = case.split_once('=').expect("KIND=DIGEST");
            // Filled, so that a byte that is not written shows.
            let mut out = vec![0xa5; ty.row_bytes((ROWS * COLS) as u64).unwrap() as usize];
            let got = match format(ty).unwrap().encode(&values(kind), COLS, weights.as_deref(), &mut out) {
                Ok(()) => digest(&out),
                Err(FormatError::Overflow) => "abort".into(),
                Err(e) => panic!("{ty} {kind}: {e}"),
            };
            cases += 1;
            aborts += usize::from(want == "abort");
            if got != want {
                wrong.push(format!("{ty} {} {kind}: {got}, ggml {want}", line[1]));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {cases} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(cases, (5 + 4 * 4 + 3 * 3) * KINDS.len());
    assert!(aborts > 0, "no case where ggml aborts");
}

#[test]
fn decoded_values_and_validation_are_those_of_ggml() {
    let mut types = 0;
    for line in lines("decode") {
        let ty = GgmlType::from_name(line[0]).expect("known type");
        let size = ty.block_bytes();
        let mut r = Rng(3000 + ty as u64);
        let mut raw: Vec<u8> = (0..16 * size).map(|_| r.next() as u8).collect();
        raw[..size].fill(0xff);
        raw[size..2 * size].fill(0x7c);
        let mut y = vec![1.0; 16 * ty.block_len()];
        format(ty).unwrap().decode(&raw, &mut y);
        let canonical = |v: &f32| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }.to_le_bytes();
        let bytes: Vec<u8> = y.iter().flat_map(canonical).collect();
        assert_eq!(digest(&bytes), line[1], "{ty}: decoded values");
        let valid: String =
            raw.chunks(size).map(|block| if format(ty).unwrap().validate(block).is_ok() { '1' } else { '0' }).collect();
        assert_eq!(valid, line[2], "{ty}: validation");
        types += 1;
    }
    assert_eq!(types, 13);
}

#[test]
fn a_bad_scale_is_reported_by_its_block() {
    for ty in [GgmlType::IQ3_S, GgmlType::IQ1_M, GgmlType::TQ1_0, GgmlType::TQ2_0, GgmlType::MXFP4] {
        let size = ty.block_bytes();
        let mut raw = vec![0; 4 * size];
        raw[2 * size..3 * size].fill(0xff);
        assert_eq!(format(ty).unwrap().validate(&raw), Err(FormatError::BadScale { block: 2 }), "{ty}");
    }
}

#[test]
fn refusals() {
    for ty in [GgmlType::IQ2_XXS, GgmlType::IQ2_XS, GgmlType::IQ1_S] {
        let mut out = vec![0; ty.block_bytes()];
        let result = format(ty).unwrap().encode(&[0.5; 256], 256, None, &mut out);
        assert_eq!(result, Err(FormatError::NeedsWeights(ty)));
    }
    let result = format(GgmlType::NVFP4).unwrap().encode(&[0.5; 64], 64, None, &mut [0; 36]);
    assert_eq!(result, Err(FormatError::DecodeOnly(GgmlType::NVFP4)));
}

/// Weights belong to columns: a row encodes the same alone and after others.
#[test]
fn rows_are_independent() {
    let (x, w) = (values("gauss"), weights("random").unwrap());
    for line in lines("encode").filter(|l| l[1] == "random") {
        let ty = GgmlType::from_name(line[0]).unwrap();
        let row = ty.row_bytes(COLS as u64).unwrap() as usize;
        let (mut both, mut one) = (vec![0; 2 * row], vec![0; row]);
        format(ty).unwrap().encode(&x, COLS, Some(&w), &mut both).unwrap();
        format(ty).unwrap().encode(&x[COLS..], COLS, Some(&w), &mut one).unwrap();
        assert_eq!(both[row..], one, "{ty}");
    }
}
