//! Products in f32, of activations and weights above all, cut into tiles of a fixed size.
//!
//! The tiles depend on the shapes alone, never on the number of threads: every result is then the same for any number.

use faer::linalg::matmul::matmul;
use faer::{Accum, Par};
use rayon::prelude::*;

use super::{View, ViewMut};

/// Rows (tokens) and columns (outputs) of a tile. The library cuts outputs into runs of 128, which are no whole number of
/// microkernels (24 or 48 high): runs of 96 are, and take 8 % less time (`examples/bench_forward.rs`).
const TILE: (usize, usize) = (320, 96);
/// A product of fewer tiles is cut into lower ones, down to so many rows: there shall be work for the threads of a server.
const LEAST: usize = 48;
const LEAST_ROWS: usize = 96;
/// Tiles are multiples of the microkernels' height (24 with AVX2, 48 with AVX-512), so that few values are left over.
const HEIGHT: usize = 48;

/// `out = a · bᵀ`: `a` is `[m, k]`, `b` is `[n, k]`, `out` is `[m, n]`, all row-major.
pub struct Product<'a> {
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub k: usize,
    pub out: &'a mut [f32],
}

/// One product. Threads of the current pool share it.
pub fn product(a: &[f32], b: &[f32], k: usize, out: &mut [f32]) {
    products([Product { a, b, k, out }]);
}

/// Several products side by side, so that threads wait for each other once.
pub fn products<'a>(all: impl IntoIterator<Item = Product<'a>>) {
    let mut tiles = Vec::new();
    for Product { a, b, k, out } in all {
        let (m, n) = (a.len() / k, b.len() / k);
        assert!(a.len() == m * k && b.len() == n * k && out.len() == m * n, "shapes of a product");
        if m == 0 || n == 0 {
            continue;
        }
        add_tiles(&mut tiles, View::new(a, m, k), View::new(b, n, k).transpose(), (m, n, k), out);
    }
    run_tiles(tiles);
}

/// A part of a product, and the parts of its factors that make it.
type Tile<'a> = (View<'a>, View<'a>, ViewMut<'a>);

/// The tiles of `out = a · b`: `a` is `[m, k]`, `b` is `[k, n]`, rows or columns one behind the other.
fn add_tiles<'a>(
    tiles: &mut Vec<Tile<'a>>,
    a: View<'a>,
    b: View<'a>,
    (m, n, k): (usize, usize, usize),
    out: &'a mut [f32],
) {
    let mut rest = ViewMut::new(out, m, n);
    let mut most = TILE.0;
    while most > LEAST_ROWS && m.div_ceil(most) * n.div_ceil(TILE.1) < LEAST {
        most = (most / 2).max(LEAST_ROWS);
    }
    for (row, rows) in pieces(m, most) {
        let (mut band, below) = rest.split_rows(rows);
        rest = below;
        for (column, columns) in pieces(n, TILE.1) {
            let (tile, right) = band.split_columns(columns);
            band = right;
            tiles.push((a.part((row, 0), rows, k), b.part((0, column), k, columns), tile));
        }
    }
}

fn run_tiles(tiles: Vec<Tile<'_>>) {
    tiles.into_par_iter().with_max_len(1).for_each(|(a, b, tile)| times(tile, a, b, 1.0));
}

/// Start and length of pieces of about `most`, all but the last of them multiples of [`HEIGHT`].
fn pieces(n: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = n.div_ceil(n.div_ceil(most).max(1)).max(1).next_multiple_of(HEIGHT);
    (0..n).step_by(step).map(move |at| (at, step.min(n - at)))
}

/// `out = alpha · a · b` on this thread. Not generic: the library's code is compiled once.
#[inline(never)]
pub fn times(out: ViewMut<'_>, a: View<'_>, b: View<'_>, alpha: f32) {
    matmul(out.0, Accum::Replace, a.0, b.0, alpha, Par::Seq);
}

/// `out += alpha · a · b` on this thread.
///
/// The product goes through a buffer: the library's kernels that add to a strided target write outside it (faer 0.24.4 with
/// AVX2, 20 columns of a wider matrix).
pub fn add_times(out: ViewMut<'_>, a: View<'_>, b: View<'_>, alpha: f32) {
    let (m, n) = (out.0.nrows(), out.0.ncols());
    if m == 0 || n == 0 || a.0.ncols() == 0 {
        return;
    }
    let mut product = vec![0f32; m * n];
    times(ViewMut::new(&mut product, m, n), a, b, alpha);
    let mut out = out.0;
    for (i, product) in product.chunks_exact(n).enumerate() {
        let row = out.as_mut().row_mut(i).try_as_row_major_mut().expect("rows are contiguous").as_slice_mut();
        row.iter_mut().zip(product).for_each(|(o, p)| *o += p);
    }
}

/// `c += aᵀ b`: `a` is `[tokens, m]`, `b` is `[tokens, n]`, `c` is `[m, n]`. The same for any number of threads.
pub fn add_cross(c: &mut [f32], a: &[f32], b: &[f32], tokens: usize, n: usize) {
    let m = c.len() / n;
    let mut tiles = Vec::new();
    let a = View::new(a, tokens, m).transpose();
    add_tiles(&mut tiles, a, View::new(b, tokens, n), (m, n, tokens), c);
    tiles.into_par_iter().with_max_len(1).for_each(|(a, b, tile)| add_times(tile, a, b, 1.0));
}

/// `out += alpha · a · b` on this thread, where `out` is a whole matrix, not a part of the columns of one ([`add_times`]).
#[inline(never)]
pub fn add_times_whole(out: ViewMut<'_>, a: View<'_>, b: View<'_>, alpha: f32) {
    if out.0.nrows() == 0 || a.0.ncols() == 0 {
        return;
    }
    assert!(out.0.row_stride() == out.0.ncols() as isize && out.0.col_stride() == 1, "rows one behind the other");
    matmul(out.0, Accum::Add, a.0, b.0, alpha, Par::Seq);
}

/// `out = a · w`: `a` is `[m, k]`, `w` is `[k, n]`, `out` is `[m, n]`: a gradient led back through a weight.
pub fn product_back(a: &[f32], w: &[f32], k: usize, out: &mut [f32]) {
    let (m, n) = (a.len() / k, w.len() / k);
    assert!(a.len() == m * k && w.len() == k * n && out.len() == m * n, "shapes of a product");
    if m == 0 || n == 0 {
        return;
    }
    let mut tiles = Vec::new();
    add_tiles(&mut tiles, View::new(a, m, k), View::new(w, k, n), (m, n, k), out);
    run_tiles(tiles);
}

#[cfg(test)]
mod tests {
    use super::super::tests::{abs, near, on_threads, textbook, values};
    use super::*;

    #[test]
    fn equal_to_the_textbook_at_odd_shapes() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (513, 641, 33), (0, 4, 2), (4, 0, 3), (700, 1300, 5), (17, 300, 40)] {
            let (a, b) = (values(m * k, 1), values(n * k, 2));
            let mut out = vec![f32::NAN; m * n];
            product(&a, &b, k, &mut out);
            let (exact, size) = (textbook(&a, &b, m, n, k), textbook(&abs(&a), &abs(&b), m, n, k));
            let fits = out.iter().zip(&exact).zip(&size).all(|((c, e), s)| near((*c).into(), *e, *s, k));
            assert!(fits, "{m}x{n}x{k}");
        }
    }

    #[test]
    fn products_of_gradients_are_the_textbook_ones() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (513, 341, 33), (330, 1300, 5), (17, 300, 40)] {
            let (a, w, b) = (values(m * k, 1), values(k * n, 2), values(k * m, 3));
            let mut out = vec![f32::NAN; m * n];
            product_back(&a, &w, k, &mut out);
            let mut cross = vec![1.0; m * n];
            add_cross(&mut cross, &b, &w, k, n);
            for (at, (out, cross)) in out.iter().zip(&cross).enumerate() {
                let (i, j) = (at / n, at % n);
                let sum: f64 = (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(w[x * n + j])).sum();
                assert!((f64::from(*out) - sum).abs() < 1e-4, "{i} {j}");
                let sum: f64 = (0..k).map(|x| f64::from(b[x * m + i]) * f64::from(w[x * n + j])).sum();
                assert!((f64::from(*cross) - 1.0 - sum).abs() < 1e-4, "{i} {j}");
            }
        }
    }

    #[test]
    fn additions_to_whole_matrices_stay_inside_them() {
        for (m, n, k, wide) in [(20, 64, 32, 40), (223, 96, 16, 500), (7, 16, 5, 9), (576, 80, 256, 600), (3, 48, 1, 3)]
        {
            let (a, b) = (values(k * wide, 1), values(k * n, 2));
            let mut out = values((m + 2) * n, 3);
            let before = out.clone();
            // the transpose of a part, as GPTQ has it
            let a_part = View::new(&a, k, wide).part((0, wide - m), k, m).transpose();
            add_times_whole(ViewMut::new(&mut out[n..(m + 1) * n], m, n), a_part, View::new(&b, k, n), -1.0);
            for (at, (new, old)) in out.iter().zip(&before).enumerate() {
                let (i, j) = (at / n, at % n);
                if i == 0 || i > m {
                    assert_eq!(new, old, "outside at {i}, {j}");
                    continue;
                }
                let terms = (0..k).map(|x| f64::from(a[x * wide + wide - m + i - 1]) * f64::from(b[x * n + j]));
                let exact = f64::from(*old) - terms.sum::<f64>();
                assert!((f64::from(*new) - exact).abs() < 1e-4, "{m}x{n}x{k} at {i}, {j}: {new} {exact}");
            }
        }
    }

    #[test]
    fn additions_stay_inside_their_target() {
        for (m, n, k, wide) in [(64, 20, 32, 512), (24, 20, 7, 20), (5, 3, 0, 9), (64, 224, 256, 1000)] {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let mut out = values((m + 2) * wide, 3);
            let before = out.clone();
            let target = ViewMut::new(&mut out, m + 2, wide).part((1, wide - n), m, n);
            add_times(target, View::new(&a, m, k), View::new(&b, k, n), -1.0);
            for (at, (new, old)) in out.iter().zip(&before).enumerate() {
                let (i, j) = (at / wide, at % wide);
                if (1..=m).contains(&i) && j >= wide - n {
                    let sum: f32 = (0..k).map(|x| a[(i - 1) * k + x] * b[x * n + j + n - wide]).sum();
                    assert!((new - (old - sum)).abs() < 1e-4, "{i} {j}");
                } else {
                    assert_eq!(new, old, "{i} {j}");
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (m, n, k) = (1030, 700, 576);
        let (a, b) = (values(m * k, 1), values(n * k, 2));
        let run = |threads| {
            let mut out = vec![0.0; m * n];
            on_threads(threads, || product(&a, &b, k, &mut out));
            out
        };
        let one = run(1);
        assert!(run(2) == one && run(5) == one);
    }
}
