//! AVX2 kernels of the IQ2 and IQ3 search (`formats::iq::search`) and of the IQ1 neighbour search.
//!
//! Rounding and sums have one trial scale per lane, the neighbour search one neighbour per lane; each lane does the
//! operations of the scalar code in its order, without fused multiply-add. For a group and a scale, the weighted errors
//! of all coordinate values are a register per dimension, and a neighbour's digits select from it: the sum over the
//! dimensions is a permutation and an addition each.

use crate::formats::FormatError;
use crate::formats::iq::neighbours::{Entry, Lattice};
use crate::formats::iq::search::{Scan, Sub, TRIALS, Trials, scaled};
use std::arch::x86_64::*;

/// Proof that AVX2 is there and wanted (see [`super::isa`]).
#[derive(Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// The proof, if the instruction set in use includes it.
    #[inline]
    pub fn get() -> Option<Avx2> {
        matches!(super::isa(), super::Isa::Avx2 | super::Isa::Avx512).then_some(Avx2(()))
    }

    /// `search::scan`.
    pub fn scan<const BITS: u32, const DIM: usize, const N: usize>(
        self,
        lattice: &Lattice,
        sub: &Sub<N>,
        trials: &Trials,
        out: &mut Scan,
    ) -> Result<(), FormatError> {
        // SAFETY: `self` proves that the processor has AVX2.
        unsafe { scan::<BITS, DIM, N>(lattice, sub, trials, out) }
    }

    /// `search::settle`.
    pub fn settle<const BITS: u32, const DIM: usize, const N: usize>(
        self,
        lattice: &Lattice,
        sub: &Sub<N>,
        scale: f32,
        which: u8,
        codes: &mut [u32; 8],
    ) -> Result<(), FormatError> {
        // SAFETY: `self` proves that the processor has AVX2.
        unsafe { settle::<BITS, DIM, N>(lattice, sub, scale, which, codes) }
    }

    /// `search::nearest` for 2-bit codes.
    pub fn nearest_of_eight(
        self,
        lattice: &Lattice,
        entry: Entry,
        x: &[f32; 8],
        w: &[f32; 8],
        scaled: &[f32; 8],
    ) -> Option<u32> {
        // SAFETY: `self` proves that the processor has AVX2.
        unsafe { nearest::<2, 8>(lattice, entry, &splat(x), &splat(w), load(scaled)) }
    }
}

/// Eight f32 as a vector.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(a: &[f32; 8]) -> __m256 {
    // SAFETY: `a` is 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_ps(a.as_ptr()) }
}

/// A vector as eight f32.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store(v: __m256) -> [f32; 8] {
    let mut a = [0.0; 8];
    // SAFETY: `a` is 32 writable bytes; the store needs no alignment.
    unsafe { _mm256_storeu_ps(a.as_mut_ptr(), v) };
    a
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_u32(a: &[u32; 8]) -> __m256i {
    // SAFETY: `a` is 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(a.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_u32(v: __m256i) -> [u32; 8] {
    let mut a = [0; 8];
    // SAFETY: `a` is 32 writable bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(a.as_mut_ptr().cast(), v) };
    a
}

/// Eight codes, each in 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn load_codes(block: &[u16; 8]) -> __m256i {
    // SAFETY: `block` is 16 readable bytes; the load needs no alignment.
    _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(block.as_ptr().cast()) })
}

/// Each value in all lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn splat<const D: usize>(x: &[f32; D]) -> [__m256; D] {
    std::array::from_fn(|i| _mm256_set1_ps(x[i]))
}

/// `table[code & mask]` per lane: four or eight entries, upper bits of the index ignored.
#[inline]
#[target_feature(enable = "avx2")]
fn select<const BITS: u32>(table: __m256, index: __m256i) -> __m256 {
    if BITS == 2 { _mm256_permutevar_ps(table, index) } else { _mm256_permutevar8x32_ps(table, index) }
}

/// Code shifted so that digit `i` is lowest.
#[inline]
#[target_feature(enable = "avx2")]
fn digit<const BITS: u32>(code: __m256i, i: usize) -> __m256i {
    _mm256_srl_epi32(code, _mm_cvtsi32_si128((BITS * i as u32) as i32))
}

/// Least lane, in all lanes. No lane is NaN.
#[inline]
#[target_feature(enable = "avx2")]
fn least(v: __m256) -> __m256 {
    let v = _mm256_min_ps(v, _mm256_permute2f128_ps::<1>(v, v));
    let v = _mm256_min_ps(v, _mm256_permute_ps::<0b01_00_11_10>(v));
    _mm256_min_ps(v, _mm256_permute_ps::<0b10_11_00_01>(v))
}

/// `search::nearest`: `x`, `w` splat per dimension, `scaled` with the coordinates times the scale (for 2-bit codes four
/// values twice, the fourth NaN so that fillers are never less).
#[inline]
#[target_feature(enable = "avx2")]
fn nearest<const BITS: u32, const DIM: usize>(
    lattice: &Lattice,
    entry: Entry,
    x: &[__m256; DIM],
    w: &[__m256; DIM],
    scaled: __m256,
) -> Option<u32> {
    let errors: [__m256; DIM] = std::array::from_fn(|i| {
        let diff = _mm256_sub_ps(scaled, x[i]);
        _mm256_mul_ps(_mm256_mul_ps(w[i], diff), diff)
    });
    let distances = |block: &[u16; 8]| {
        let codes = load_codes(block);
        let mut d2 = select::<BITS>(errors[0], codes);
        for (i, &e) in errors.iter().enumerate().skip(1) {
            d2 = _mm256_add_ps(d2, select::<BITS>(e, digit::<BITS>(codes, i)));
        }
        d2
    };
    let max = _mm256_set1_ps(f32::MAX);
    let blocks = lattice.blocks(entry);
    // `min_ps` gives its second operand for equal and NaN: the earlier block keeps its place.
    let mut best = _mm256_min_ps(distances(&blocks[0]), max);
    let mut at = _mm256_setzero_si256();
    for (n, block) in blocks.iter().enumerate().skip(1) {
        let d2 = distances(block);
        let less = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(d2, best));
        best = _mm256_min_ps(d2, best);
        at = _mm256_blendv_epi8(at, _mm256_set1_epi32(n as i32), less);
    }
    let min = least(best);
    if _mm256_cvtss_f32(min) == f32::MAX {
        return None;
    }
    let mut lanes = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(best, min)) as u32;
    let mut lane = lanes.trailing_zeros() as usize;
    if blocks.len() == 1 {
        return Some(u32::from(blocks[0][lane & 7]));
    }
    let at = store_u32(at);
    let mut first = at[lane & 7];
    lanes &= lanes - 1;
    while lanes != 0 {
        let other = lanes.trailing_zeros() as usize;
        if at[other & 7] < first {
            (first, lane) = (at[other & 7], other);
        }
        lanes &= lanes - 1;
    }
    Some(u32::from(blocks[first as usize][lane & 7]))
}

/// `search::scaled` for the lanes of `nearest`.
#[inline]
#[target_feature(enable = "avx2")]
fn scaled_table<const BITS: u32>() -> __m256 {
    if BITS == 2 { _mm256_setr_ps(1.0, 3.0, 5.0, f32::NAN, 1.0, 3.0, 5.0, f32::NAN) } else { load(&scaled(1.0)) }
}

/// Digits of one value for eight reciprocal scales.
#[inline]
#[target_feature(enable = "avx2")]
fn round_digit<const BITS: u32>(x: __m256, id: __m256) -> __m256i {
    let v = _mm256_sub_ps(_mm256_mul_ps(id, x), _mm256_set1_ps(1.0));
    let v = _mm256_mul_ps(_mm256_set1_ps(0.5), v);
    let bits = _mm256_castps_si256(_mm256_add_ps(v, _mm256_set1_ps(12_582_912.0)));
    let l = _mm256_sub_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x007f_ffff)), _mm256_set1_epi32(0x0040_0000));
    let max = if BITS == 2 { 2 } else { 7 };
    _mm256_max_epi32(_mm256_min_epi32(l, _mm256_set1_epi32(max)), _mm256_setzero_si256())
}

#[target_feature(enable = "avx2")]
fn scan<const BITS: u32, const DIM: usize, const N: usize>(
    lattice: &Lattice,
    sub: &Sub<N>,
    trials: &Trials,
    out: &mut Scan,
) -> Result<(), FormatError> {
    out.on_grid = [0; TRIALS];
    let vectors = trials.n.div_ceil(8);
    let table = scaled_table::<BITS>();
    for k in 0..N / DIM {
        let x: [__m256; DIM] = splat(sub.x[k * DIM..].first_chunk().expect("whole groups"));
        let w: [__m256; DIM] = splat(sub.w_root[k * DIM..].first_chunk().expect("whole groups"));
        let codes = &mut out.codes[k];
        for (codes, ids) in codes.as_chunks_mut::<8>().0.iter_mut().zip(trials.ids.as_chunks::<8>().0).take(vectors) {
            let id = load(ids);
            let mut code = _mm256_setzero_si256();
            for (i, &x) in x.iter().enumerate() {
                let shift = _mm_cvtsi32_si128((BITS * i as u32) as i32);
                code = _mm256_or_si256(code, _mm256_sll_epi32(round_digit::<BITS>(x, id), shift));
            }
            *codes = store_u32(code);
        }
        for (t, code) in codes.iter_mut().enumerate().take(trials.n) {
            let entry = lattice.entry(*code);
            if entry.on_grid() {
                out.on_grid[t] |= 1 << k;
            } else {
                let scaled = _mm256_mul_ps(_mm256_set1_ps(trials.scales[t]), table);
                *code = nearest::<BITS, DIM>(lattice, entry, &x, &w, scaled).ok_or(FormatError::Overflow)?;
            }
        }
    }
    let mut sumqx = [_mm256_setzero_ps(); TRIALS / 8];
    let mut sumq2 = sumqx;
    for k in 0..N / DIM {
        let codes = out.codes[k].as_chunks::<8>().0;
        for i in 0..DIM {
            let (x, w) = (sub.x[k * DIM + i], sub.w[k * DIM + i]);
            let (wx, w) = (_mm256_set1_ps(w * x), _mm256_set1_ps(w));
            for v in 0..vectors {
                let q = select::<BITS>(table, digit::<BITS>(load_u32(&codes[v]), i));
                sumqx[v] = _mm256_add_ps(sumqx[v], _mm256_mul_ps(wx, q));
                sumq2[v] = _mm256_add_ps(sumq2[v], _mm256_mul_ps(_mm256_mul_ps(w, q), q));
            }
        }
    }
    for v in 0..vectors {
        out.sumqx.as_chunks_mut::<8>().0[v] = store(sumqx[v]);
        out.sumq2.as_chunks_mut::<8>().0[v] = store(sumq2[v]);
    }
    Ok(())
}

#[target_feature(enable = "avx2")]
fn settle<const BITS: u32, const DIM: usize, const N: usize>(
    lattice: &Lattice,
    sub: &Sub<N>,
    scale: f32,
    which: u8,
    codes: &mut [u32; 8],
) -> Result<(), FormatError> {
    let scaled = _mm256_mul_ps(_mm256_set1_ps(scale), scaled_table::<BITS>());
    let id = _mm256_set1_ps(1.0 / scale);
    let shifts = _mm256_mullo_epi32(_mm256_set1_epi32(BITS as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    for k in (0..N / DIM).filter(|k| which >> k & 1 == 1) {
        let x: &[f32; DIM] = sub.x[k * DIM..].first_chunk().expect("whole groups");
        // One dimension per lane here.
        let digits = round_digit::<BITS>(load(&std::array::from_fn(|i| if i < DIM { x[i] } else { 0.0 })), id);
        let parts = store_u32(_mm256_sllv_epi32(digits, shifts));
        let code = parts[..DIM].iter().fold(0, |code, part| code | part);
        let entry = lattice.entry(code);
        codes[k] = if entry.on_grid() {
            code
        } else {
            let w = splat(sub.w_root[k * DIM..].first_chunk().expect("whole groups"));
            nearest::<BITS, DIM>(lattice, entry, &splat(x), &w, scaled).ok_or(FormatError::Overflow)?
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::iq::neighbours;
    use crate::formats::iq::search::{self, Trials};

    struct Lcg(u32);

    impl Lcg {
        fn next(&mut self) -> f32 {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.0 >> 8) as f32 / 16_777_216.0
        }

        /// Values on a grid now and then (ties), a few negative; weights with holes; magnitudes up to overflow.
        fn sub<const N: usize>(&mut self, case: usize) -> Sub<N> {
            let steps = [4.0f32, 1e6][case % 2];
            let size = [1.0, 1e-6, 1e9, 1e-42, 3e19][case / 2 % 5];
            let x = std::array::from_fn(|_| ((self.next() * self.next() - 0.03) * steps).round() / steps * size);
            let w: [f32; N] = std::array::from_fn(|_| (self.next() - 0.2).max(0.0) * size * size);
            Sub { x, w, w_root: w.map(f32::sqrt) }
        }
    }

    fn compare<const BITS: u32, const DIM: usize, const N: usize>(lattice: &Lattice, base: f32, reach: i32, step: f32) {
        let Some(isa) = Avx2::get() else { return };
        let (mut lcg, mut overflows) = (Lcg(3), 0);
        for case in 0..600 {
            let sub: Sub<N> = lcg.sub(case);
            let max = sub.x.iter().fold(0.0f32, |m, &x| m.max(x));
            let trials = Trials::new(base, reach, step, max);
            let (mut a, mut b) = (Scan::NEW, Scan::NEW);
            let want = search::scan::<BITS, DIM, N>(lattice, &sub, &trials, &mut a);
            assert_eq!(isa.scan::<BITS, DIM, N>(lattice, &sub, &trials, &mut b), want, "case {case}");
            if want.is_err() {
                overflows += 1;
                continue;
            }
            for t in 0..trials.n {
                let bits = |s: &Scan| (s.sumqx[t].to_bits(), s.sumq2[t].to_bits(), s.on_grid[t]);
                // A NaN may differ in its sign.
                if !a.sumqx[t].is_nan() && !a.sumq2[t].is_nan() {
                    assert_eq!(bits(&a), bits(&b), "case {case} trial {t}");
                }
                assert!((0..N / DIM).all(|k| a.codes[k][t] == b.codes[k][t]), "case {case} trial {t}");
            }
            let scale = max / 4.0;
            let which = (case % 255) as u8;
            let (mut a, mut b) = ([0; 8], [0; 8]);
            let want = search::settle::<BITS, DIM, N>(lattice, &sub, scale, which, &mut a);
            assert_eq!(isa.settle::<BITS, DIM, N>(lattice, &sub, scale, which, &mut b), want);
            assert_eq!(a, b, "case {case}");
        }
        assert!((1..400).contains(&overflows), "{overflows}");
    }

    #[test]
    fn scans_are_those_of_the_scalar_search() {
        compare::<2, 8, 32>(neighbours::iq2_xxs(), 5.0, 6, 0.1);
        compare::<2, 8, 16>(neighbours::iq2_xs(), 5.0, 9, 0.1);
        compare::<2, 8, 16>(neighbours::iq2_s(), 5.0, 9, 0.1);
        compare::<3, 4, 32>(neighbours::iq3_xxs(), 15.0, 15, 0.2);
        compare::<3, 4, 32>(neighbours::iq3_s(), 15.0, 9, 0.2);
    }

    #[test]
    fn neighbours_are_those_of_the_scalar_search() {
        let Some(isa) = Avx2::get() else { return };
        let (lattice, mut lcg, mut searches) = (neighbours::iq1(), Lcg(5), 0);
        for case in 0..5000 {
            let code = (0..8).fold(0, |code, i| code | ((lcg.next() * 3.0) as u32) << (2 * i));
            let entry = lattice.entry(code);
            let sub: Sub<8> = lcg.sub(case);
            let s = lcg.next();
            let v = [-0.875, 0.125, 1.125].map(|v| s * v);
            let scaled = [v[0], v[1], v[2], f32::NAN, v[0], v[1], v[2], f32::NAN];
            let want = search::nearest(2, lattice, entry, &sub.x, &sub.w, &scaled);
            assert_eq!(isa.nearest_of_eight(lattice, entry, &sub.x, &sub.w, &scaled), want, "case {case}");
            searches += usize::from(!entry.on_grid());
        }
        assert!(searches > 1000);
    }
}
