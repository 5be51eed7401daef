//! Products and solves of rounding, on top of faer.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// A matrix inside a slice: its first element, rows, columns, elements from row to row.
#[derive(Clone, Copy)]
pub struct View {
    pub at: usize,
    pub rows: usize,
    pub columns: usize,
    pub stride: usize,
}

impl View {
    fn of<'a>(&self, values: &'a [f32]) -> MatRef<'a, f32> {
        MatRef::from_row_major_slice_with_stride(&values[self.at..], self.rows, self.columns, self.stride)
    }
}

/// `c += alpha · a b` on this thread.
///
/// The product goes through a buffer: the library's kernels that add to a strided target write outside it (faer 0.24.4 with
/// AVX2, 20 columns of a wider matrix).
#[inline(never)]
pub fn add_product(c: (&mut [f32], View), a: (&[f32], View), b: (&[f32], View), alpha: f32) {
    let v = c.1;
    if v.rows == 0 || v.columns == 0 || a.1.columns == 0 {
        return;
    }
    let mut product = vec![0f32; v.rows * v.columns];
    let into = MatMut::from_row_major_slice_mut(&mut product, v.rows, v.columns);
    matmul(into, Accum::Replace, a.1.of(a.0), b.1.of(b.0), alpha, Par::Seq);
    for (i, p) in product.chunks_exact(v.columns).enumerate() {
        c.0[v.at + i * v.stride..][..v.columns].iter_mut().zip(p).for_each(|(c, p)| *c += p);
    }
}

/// `c += aᵀ b`: `a` and `b` are `[tokens, n]`, `c` is `[n, n]`. The same for any number of threads.
#[inline(never)]
pub fn add_cross(c: &mut [f32], a: &[f32], b: &[f32], tokens: usize, n: usize) {
    const BAND: usize = 96;
    let (a, b) = (MatRef::from_row_major_slice(a, tokens, n), MatRef::from_row_major_slice(b, tokens, n));
    c.par_chunks_mut(BAND * n).enumerate().for_each_init(Vec::new, |product: &mut Vec<f32>, (i, c)| {
        let rows = c.len() / n;
        product.resize(rows * n, 0.0);
        let into = MatMut::from_row_major_slice_mut(product, rows, n);
        matmul(into, Accum::Replace, a.subcols(i * BAND, rows).transpose(), b, 1.0, Par::Seq);
        c.iter_mut().zip(&*product).for_each(|(c, p)| *c += p);
    });
}

/// The inverse of a lower triangular `l` \[n, n\], in place of it.
#[inline(never)]
pub fn invert_lower(l: &mut Vec<f64>, n: usize, par: Par) {
    let mut inverse = vec![0.0; n * n];
    let into = MatMut::from_row_major_slice_mut(&mut inverse, n, n);
    faer::linalg::triangular_inverse::invert_lower_triangular(into, MatRef::from_row_major_slice(l, n, n), par);
    *l = inverse;
}

/// `x ← x (L Lᵀ)⁻¹`: `l` lower triangular \[n, n\], `x` \[m, n\].
#[inline(never)]
pub fn solve(l: &[f64], x: &mut [f64], n: usize, par: Par) {
    use faer::linalg::cholesky::llt::solve::{solve_in_place, solve_in_place_scratch};
    let m = x.len() / n;
    let mut memory = MemBuffer::new(solve_in_place_scratch::<f64>(n, m, par));
    let x = MatMut::from_column_major_slice_mut(x, n, m);
    solve_in_place(MatRef::from_row_major_slice(l, n, n), x, par, MemStack::new(&mut memory));
}
