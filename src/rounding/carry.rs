//! What the errors of columns do to a few later ones: `w −= Uᵀ e`, a product too small for a library.
//!
//! Four columns and up to three vectors of rows stay in registers while the errors go by. Every lane is one row and does the same
//! fused multiplications in the same order, so that all instruction sets give the same bytes.

use crate::formats::simd::{Isa, isa};

/// Columns that are in registers together.
pub const COLUMNS: usize = 4;

/// Errors, and the part of the factor that says what they do.
pub struct Errors<'a> {
    /// `[k, rows]`, column by column.
    pub errors: &'a [f32],
    pub rows: usize,
    /// From the factor's row of the first error on, and from the column on that the first of `w` is.
    pub u: &'a [f32],
    /// Values of a row of the factor.
    pub n: usize,
}

/// `w` \[columns, rows\], column by column: a multiple of [`COLUMNS`] and rows a multiple of 16.
pub fn take(e: &Errors<'_>, w: &mut [f32]) {
    let (k, columns) = (e.errors.len() / e.rows, w.len() / e.rows);
    if k == 0 {
        return;
    }
    assert!(columns.is_multiple_of(COLUMNS) && e.rows.is_multiple_of(16) && columns * e.rows == w.len(), "whole tiles");
    assert!(
        e.errors.len() == k * e.rows && e.u.len() >= (k - 1) * e.n + columns,
        "an error for every row of the factor"
    );
    match isa() {
        // SAFETY: `isa` gives only what the processor has; the lengths were looked at.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::avx512(e, w) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::avx2(e, w) },
        // SAFETY: the lengths were looked at.
        _ => unsafe { all::<f32, 1>(e, w) },
    }
}

/// Rows that act as one.
trait Lanes: Copy {
    const LANES: usize;
    fn splat(v: f32) -> Self;
    /// # Safety
    /// `p` points at [`Lanes::LANES`] values.
    unsafe fn load(p: *const f32) -> Self;
    /// # Safety
    /// As for [`Lanes::load`].
    unsafe fn store(self, p: *mut f32);
    /// `self − a b`, rounded once.
    fn minus(self, a: Self, b: Self) -> Self;
}

impl Lanes for f32 {
    const LANES: usize = 1;

    #[inline(always)]
    fn splat(v: f32) -> f32 {
        v
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *p }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { *p = self }
    }

    #[inline(always)]
    fn minus(self, a: f32, b: f32) -> f32 {
        (-a).mul_add(b, self)
    }
}

/// All columns and rows, `G` vectors of rows at a time.
///
/// # Safety
/// The lengths are those that [`take`] asks for.
#[inline(always)]
unsafe fn all<V: Lanes, const G: usize>(e: &Errors<'_>, w: &mut [f32]) {
    let columns = w.len() / e.rows;
    for c in (0..columns).step_by(COLUMNS) {
        let mut r = 0;
        // SAFETY: rows from `r` on, and columns from `c` on, are there.
        unsafe {
            while r + G * V::LANES <= e.rows {
                some::<V, G>(e, w, c, r);
                r += G * V::LANES;
            }
            while r < e.rows {
                some::<V, 1>(e, w, c, r);
                r += V::LANES;
            }
        }
    }
}

/// [`COLUMNS`] columns from `c` on of `G` vectors of rows from `r` on.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn some<V: Lanes, const G: usize>(e: &Errors<'_>, w: &mut [f32], c: usize, r: usize) {
    let mut sums = [[V::splat(0.0); G]; COLUMNS];
    let k = e.errors.len() / e.rows;
    // SAFETY: the caller's promise.
    unsafe {
        let w = w.as_mut_ptr().add(c * e.rows + r);
        for (j, sums) in sums.iter_mut().enumerate() {
            for (g, sum) in sums.iter_mut().enumerate() {
                *sum = V::load(w.add(j * e.rows + g * V::LANES));
            }
        }
        let (mut errors, mut u) = (e.errors.as_ptr().add(r), e.u.as_ptr().add(c));
        for _ in 0..k {
            let mut x = [V::splat(0.0); G];
            for (g, x) in x.iter_mut().enumerate() {
                *x = V::load(errors.add(g * V::LANES));
            }
            for (j, sums) in sums.iter_mut().enumerate() {
                let factor = V::splat(*u.add(j));
                for (sum, x) in sums.iter_mut().zip(&x) {
                    *sum = sum.minus(*x, factor);
                }
            }
            errors = errors.wrapping_add(e.rows);
            u = u.wrapping_add(e.n);
        }
        for (j, sums) in sums.iter().enumerate() {
            for (g, sum) in sums.iter().enumerate() {
                sum.store(w.add(j * e.rows + g * V::LANES));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Errors, Lanes, all};

    macro_rules! lanes {
        ($ty:ty, $n:literal, $set:ident, $load:ident, $store:ident, $minus:ident) => {
            impl Lanes for $ty {
                const LANES: usize = $n;

                #[inline(always)]
                fn splat(v: f32) -> Self {
                    // SAFETY: used only by the entry points below, which enable the instructions.
                    unsafe { $set(v) }
                }

                #[inline(always)]
                unsafe fn load(p: *const f32) -> Self {
                    // SAFETY: as above, and the caller's promise.
                    unsafe { $load(p) }
                }

                #[inline(always)]
                unsafe fn store(self, p: *mut f32) {
                    // SAFETY: as above, and the caller's promise.
                    unsafe { $store(p, self) }
                }

                #[inline(always)]
                fn minus(self, a: Self, b: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $minus(a, b, self) }
                }
            }
        };
    }

    lanes!(__m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fnmadd_ps);
    lanes!(__m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fnmadd_ps);

    /// # Safety
    /// As for [`all`].
    #[target_feature(enable = "avx512f,fma")]
    pub unsafe fn avx512(e: &Errors<'_>, w: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { all::<__m512, 6>(e, w) }
    }

    /// # Safety
    /// As for [`all`].
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(e: &Errors<'_>, w: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { all::<__m256, 2>(e, w) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::simd::with_isa;
    use crate::linalg::tests::values;

    #[test]
    fn every_instruction_set_gives_the_textbook_s_bytes() {
        for (rows, columns, k, n) in
            [(96, 8, 24, 40), (16, 4, 1, 9), (112, 32, 200, 333), (48, 4, 0, 4), (80, 12, 7, 12)]
        {
            let (errors, u, before) = (values(k * rows, 1), values(k * n, 2), values(columns * rows, 3));
            let e = Errors { errors: &errors, rows, u: &u, n };
            let mut wanted = before.clone();
            for c in 0..columns {
                for r in 0..rows {
                    for i in 0..k {
                        let w = &mut wanted[c * rows + r];
                        *w = (-errors[i * rows + r]).mul_add(u[i * n + c], *w);
                    }
                }
            }
            for isa in Isa::available() {
                let mut w = before.clone();
                with_isa(isa, || take(&e, &mut w));
                assert_eq!(w, wanted, "{}: {rows} {columns} {k}", isa.name());
            }
        }
    }
}
