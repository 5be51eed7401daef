//! Every instruction set of this machine gives the bytes of the scalar code at sizes that do not fill its lanes: one
//! row and many, one block per row and odd numbers of them, rows of different scales, weights and none.

use ostq_convert::formats::simd::{self, Isa};
use ostq_convert::formats::{FormatError, format};
use ostq_convert::gguf::GgmlType::{self, *};

const TYPES: [GgmlType; 15] =
    [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// −1..1.
    fn symmetric(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

#[test]
fn every_isa_gives_the_scalar_bytes() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for ty in TYPES {
        let format = format(ty).expect("a format");
        for blocks_per_row in [1, 3, 7, 16, 17] {
            for rows in [1, 2, 5, 16, 19, 33] {
                let n = blocks_per_row * ty.block_len();
                let x: Vec<f32> = (0..rows * n)
                    .map(|i| random.symmetric() * random.symmetric() * 10f32.powi((i / n % 11) as i32 - 5))
                    .collect();
                let w: Vec<f32> = (0..n).map(|_| random.symmetric().max(0.0)).collect();
                for w in [None, Some(&w[..])] {
                    let encode = |isa| {
                        let mut out = vec![0x5a; rows * blocks_per_row * ty.block_bytes()];
                        simd::with_isa(isa, || format.encode(&x, n, w, &mut out)).expect("it encodes");
                        out
                    };
                    let want = encode(Isa::Scalar);
                    for isa in Isa::available() {
                        let weighted = w.is_some();
                        assert!(
                            encode(isa) == want,
                            "{ty}, {}, {rows} rows of {blocks_per_row} blocks, weights: {weighted}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn no_rows_are_no_blocks() {
    for ty in TYPES {
        let format = format(ty).expect("a format");
        for isa in Isa::available() {
            simd::with_isa(isa, || format.encode(&[], ty.block_len(), None, &mut [])).expect("nothing to do");
        }
    }
}

#[test]
fn validation_finds_the_block_of_a_bad_scale() {
    // Offsets of the f16 fields.
    let fields: [(GgmlType, &[usize]); 12] = [
        (Q4_0, &[0]),
        (Q4_1, &[0, 2]),
        (Q5_0, &[0]),
        (Q5_1, &[0, 2]),
        (Q8_0, &[0]),
        (Q2_K, &[80, 82]),
        (Q3_K, &[108]),
        (Q4_K, &[0, 2]),
        (Q5_K, &[0, 2]),
        (Q6_K, &[208]),
        (IQ4_NL, &[0]),
        (IQ4_XS, &[0]),
    ];
    for (ty, offsets) in fields {
        let format = format(ty).expect("a format");
        for &at in offsets {
            for bad in [0x7c00u16, 0xfc00, 0x7e00, 0xfc01] {
                let mut bytes = vec![0xbb; 9 * ty.block_bytes()];
                assert_eq!(format.validate(&bytes), Ok(()), "{ty}");
                bytes[6 * ty.block_bytes() + at..][..2].copy_from_slice(&bad.to_le_bytes());
                assert_eq!(format.validate(&bytes), Err(FormatError::BadScale { block: 6 }), "{ty} {at}");
            }
        }
    }
    let mut halves = vec![0x33u8; 2000];
    halves[1998..].fill(0xff);
    for ty in [F16, BF16] {
        let found = format(ty).expect("a format").validate(&halves);
        assert!(
            matches!(found, Err(FormatError::NotFinite { index: 999, value }) if value.is_nan()),
            "{ty}: {found:?}"
        );
    }
    let mut floats: Vec<u8> = [1.0f32; 700].iter().flat_map(|v| v.to_le_bytes()).collect();
    floats[4 * 650..][..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    let want = Err(FormatError::NotFinite { index: 650, value: f32::NEG_INFINITY });
    assert_eq!(format(F32).expect("a format").validate(&floats), want);
}

#[test]
fn an_isa_can_be_chosen() {
    let before = simd::isa();
    for isa in Isa::available() {
        assert_eq!(simd::with_isa(isa, simd::isa), isa);
    }
    assert_eq!(simd::isa(), before);
    assert_eq!(Isa::available().next(), Some(Isa::Scalar));
}
