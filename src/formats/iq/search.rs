//! The search for codes and scale of a sub-block, shared by the IQ2 and IQ3 encoders.
//!
//! A sub-block of `N` values is cut into groups of `DIM`; a group becomes one grid point. For each trial scale every
//! group is rounded to digits, a point off the grid goes to the neighbour with the least weighted error, and weighted
//! sums over the sub-block give the best scale for those points. The trial that explains most of the sum of squares
//! wins, the first of equals. Functions here are the definition; `simd::iq_scan` computes the same values with one trial
//! (or one neighbour) per lane.

use super::grids::VALUES_IQ3_S;
use super::neighbours::{Entry, Lattice};
use super::util::nearest_int;
use crate::formats::FormatError;
#[cfg(target_arch = "x86_64")]
use crate::formats::simd::iq_scan::Avx2;

/// Most trials of a search, a multiple of the vector length.
pub const TRIALS: usize = 32;

/// A sub-block: magnitudes (negative where a sign had to be flipped), weights of the sums, and their square roots,
/// which weigh the neighbour search.
pub struct Sub<const N: usize> {
    pub x: [f32; N],
    pub w: [f32; N],
    pub w_root: [f32; N],
}

/// Trial scales: `ids` are the reciprocals that round, `scales` their inverses.
pub struct Trials {
    pub n: usize,
    pub ids: [f32; TRIALS],
    pub scales: [f32; TRIALS],
}

impl Trials {
    /// `id = (base + is·step)/max` for `is` in `-reach..=reach`; unused places repeat the last trial.
    pub fn new(base: f32, reach: i32, step: f32, max: f32) -> Trials {
        let n = 2 * reach as usize + 1;
        let ids = std::array::from_fn(|i| (base + (i.min(n - 1) as i32 - reach) as f32 * step) / max);
        Trials { n, ids, scales: ids.map(|id| 1.0 / id) }
    }
}

/// What came of each trial: codes per group, which groups were on the grid at once, and the sums. Scratch space, kept
/// from one sub-block to the next.
pub struct Scan {
    pub codes: [[u32; TRIALS]; 8],
    /// Bit `k` of a trial: group `k` needed no neighbour.
    pub on_grid: [u8; TRIALS],
    pub sumqx: [f32; TRIALS],
    pub sumq2: [f32; TRIALS],
}

impl Scan {
    /// Empty scratch space.
    pub const NEW: Scan =
        Scan { codes: [[0; TRIALS]; 8], on_grid: [0; TRIALS], sumqx: [0.0; TRIALS], sumq2: [0.0; TRIALS] };
}

/// Scale and codes of a sub-block.
pub struct Found {
    pub scale: f32,
    pub codes: [u32; 8],
}

/// Largest digit: 2-bit codes use three values, 3-bit codes eight.
const fn max_digit(bits: u32) -> i32 {
    if bits == 2 { 2 } else { 7 }
}

/// The digits of a group at a reciprocal scale, as a code.
fn round_group(bits: u32, x: &[f32], id: f32) -> u32 {
    x.iter().enumerate().fold(0, |code, (i, &x)| {
        let l = nearest_int(0.5 * (id * x - 1.0)).clamp(0, max_digit(bits));
        code | (l as u32) << (bits * i as u32)
    })
}

/// `iq2_find_best_neighbour`, `iq3_find_best_neighbour`, `iq1_find_best_neighbour2`: the first listed point with the
/// least `Σ (w·diff)·diff`, `diff = scaled[digit] − x`. `None` if no sum is less than `FLT_MAX` (ggml aborts).
pub fn nearest(bits: u32, lattice: &Lattice, entry: Entry, x: &[f32], w: &[f32], scaled: &[f32; 8]) -> Option<u32> {
    let mut best = (f32::MAX, None);
    for &code in lattice.blocks(entry).iter().flatten().take(entry.count()) {
        let d2 = x.iter().zip(w).enumerate().fold(0.0, |d2, (i, (x, w))| {
            let diff = scaled[usize::from(code >> (bits * i as u32)) & ((1 << bits) - 1)] - x;
            d2 + w * diff * diff
        });
        if d2 < best.0 {
            best = (d2, Some(u32::from(code)));
        }
    }
    best.1
}

/// A scale times every coordinate.
pub fn scaled(scale: f32) -> [f32; 8] {
    VALUES_IQ3_S.map(|q| scale * q)
}

/// `Σ (w·x)·q` and `Σ (w·q)·q` over the sub-block, in order.
pub fn sums<const N: usize>(bits: u32, dim: usize, sub: &Sub<N>, codes: &[u32; 8]) -> (f32, f32) {
    let (mut sumqx, mut sumq2) = (0.0, 0.0);
    for i in 0..N {
        let digit = codes[i / dim] >> (bits * (i % dim) as u32) & ((1 << bits) - 1);
        let q = (2 * digit + 1) as f32;
        sumqx += sub.w[i] * sub.x[i] * q;
        sumq2 += sub.w[i] * q * q;
    }
    (sumqx, sumq2)
}

/// The grid point of group `k` at a scale, and whether it was on the grid at once.
fn place<const N: usize>(
    bits: u32,
    dim: usize,
    lattice: &Lattice,
    sub: &Sub<N>,
    k: usize,
    (id, scale): (f32, f32),
) -> Result<(u32, bool), FormatError> {
    let x = &sub.x[k * dim..][..dim];
    let code = round_group(bits, x, id);
    let entry = lattice.entry(code);
    if entry.on_grid() {
        return Ok((code, true));
    }
    let code = nearest(bits, lattice, entry, x, &sub.w_root[k * dim..], &scaled(scale)).ok_or(FormatError::Overflow)?;
    Ok((code, false))
}

/// All trials, one after the other.
pub fn scan<const BITS: u32, const DIM: usize, const N: usize>(
    lattice: &Lattice,
    sub: &Sub<N>,
    trials: &Trials,
    out: &mut Scan,
) -> Result<(), FormatError> {
    for t in 0..trials.n {
        let mut codes = [0; 8];
        out.on_grid[t] = 0;
        for (k, code) in codes.iter_mut().enumerate().take(N / DIM) {
            let (found, on_grid) = place(BITS, DIM, lattice, sub, k, (trials.ids[t], trials.scales[t]))?;
            *code = found;
            out.codes[k][t] = found;
            out.on_grid[t] |= u8::from(on_grid) << k;
        }
        (out.sumqx[t], out.sumq2[t]) = sums(BITS, DIM, sub, &codes);
    }
    Ok(())
}

/// Moves the groups of `which` to their grid points at `scale`.
pub fn settle<const BITS: u32, const DIM: usize, const N: usize>(
    lattice: &Lattice,
    sub: &Sub<N>,
    scale: f32,
    which: u8,
    codes: &mut [u32; 8],
) -> Result<(), FormatError> {
    for (k, code) in codes.iter_mut().enumerate().take(N / DIM) {
        if which >> k & 1 == 1 {
            *code = place(BITS, DIM, lattice, sub, k, (1.0 / scale, scale))?.0;
        }
    }
    Ok(())
}

/// Which groups get a second search at the scale that was found.
#[derive(Clone, Copy, PartialEq)]
pub enum Again {
    /// Those that were off the grid.
    OffGrid,
    /// All, if one was off the grid; nothing accepted counts as off the grid (IQ3_S).
    AllIfAnyOff,
    /// All (IQ2_XXS).
    All,
}

/// The search of `quantize_row_iq{2,3}_*_impl` for one sub-block, from the trials to the last fit of the scale.
/// `first` is the scale if no trial is accepted.
pub fn search<const BITS: u32, const DIM: usize, const N: usize>(
    lattice: &Lattice,
    sub: &Sub<N>,
    trials: &Trials,
    first: f32,
    again: Again,
    seen: &mut Scan,
) -> Result<Found, FormatError> {
    let all = ((1u32 << (N / DIM)) - 1) as u8;
    #[cfg(target_arch = "x86_64")]
    let avx2 = Avx2::get();
    #[cfg(target_arch = "x86_64")]
    match avx2 {
        Some(isa) => isa.scan::<BITS, DIM, N>(lattice, sub, trials, seen),
        None => scan::<BITS, DIM, N>(lattice, sub, trials, seen),
    }?;
    #[cfg(not(target_arch = "x86_64"))]
    scan::<BITS, DIM, N>(lattice, sub, trials, seen)?;

    let (mut scale, mut best, mut chosen) = (first, 0.0, None);
    for t in 0..trials.n {
        let (sumqx, sumq2) = (seen.sumqx[t], seen.sumq2[t]);
        if sumq2 > 0.0 && sumqx * sumqx > best * sumq2 {
            scale = sumqx / sumq2;
            best = scale * sumqx;
            chosen = Some(t);
        }
    }
    let mut codes = chosen.map_or([0; 8], |t| std::array::from_fn(|k| seen.codes[k][t]));
    let off = match (again, chosen) {
        (Again::All, _) => all,
        (Again::OffGrid, None) => 0,
        (Again::OffGrid, Some(t)) => all & !seen.on_grid[t],
        (Again::AllIfAnyOff, Some(t)) if seen.on_grid[t] == all => 0,
        (Again::AllIfAnyOff, _) => all,
    };
    if off != 0 && scale > 0.0 {
        #[cfg(target_arch = "x86_64")]
        match avx2 {
            Some(isa) => isa.settle::<BITS, DIM, N>(lattice, sub, scale, off, &mut codes),
            None => settle::<BITS, DIM, N>(lattice, sub, scale, off, &mut codes),
        }?;
        #[cfg(not(target_arch = "x86_64"))]
        settle::<BITS, DIM, N>(lattice, sub, scale, off, &mut codes)?;
        let (sumqx, sumq2) = sums(BITS, DIM, sub, &codes);
        if sumq2 > 0.0 {
            scale = sumqx / sumq2;
        }
    }
    if scale.is_nan() {
        return Err(FormatError::Overflow);
    }
    Ok(Found { scale, codes })
}
