//! Sums over a run of tokens, both that corrected targets need in one go: `Σ r rᵀ` and `Σ d rᵀ`.

use rayon::prelude::*;

use super::{View, ViewMut, packed_at, packed_len, times};

/// Rows of a band of the result: one task. The library packs the right side anew for each of them, a fifth of the time and more
/// where bands are low; narrow sums have low ones, since half of the square on the diagonal is for nothing.
fn band(n: usize) -> usize {
    if n < 2048 { 96 } else { 384 }
}

/// Columns of a band that are in work at a time.
const COLUMNS: usize = 2048;

/// A band to add to.
enum Band<'a> {
    /// Rows of the packed lower triangle of `Σ r rᵀ`.
    Second(&'a mut [f64]),
    /// Rows of `Σ d rᵀ`.
    Cross(&'a mut [f32], View<'a>),
}

/// `second += rᵀ r`, packed lower triangle as in [`super::syrk_packed`], and `cross += dᵀ r` \[n, n\] of `(cross, d)`: `r` and
/// `d` are \[tokens, n\]. Products are summed in f32 over the tokens of the call. The same for any number of threads; beside
/// its arguments it takes a band of 384 rows and 2048 columns of f32 at most per thread.
pub fn add_sums(second: &mut [f64], cross: Option<(&mut [f32], &[f32])>, r: &[f32], tokens: usize, n: usize) {
    assert!(Some(second.len()) == packed_len(n) && r.len() == tokens * n, "{tokens}x{n}");
    let r = View::new(r, tokens, n);
    let band = band(n);
    // the largest first, so that no thread is left with one at the end
    let mut bands = Vec::new();
    if let Some((cross, d)) = cross {
        assert!(cross.len() == n * n && d.len() == tokens * n, "{tokens}x{n}");
        let d = View::new(d, tokens, n);
        bands.extend(cross.chunks_mut(band * n).enumerate().map(|(i, c)| (i * band, Band::Cross(c, d))));
    }
    let mut rest = second;
    let mut from_top = Vec::new();
    for row in (0..n).step_by(band) {
        let to = (row + band).min(n);
        let (own, below) = rest.split_at_mut(to * (to + 1) / 2 - row * (row + 1) / 2);
        rest = below;
        from_top.push((row, Band::Second(own)));
    }
    bands.extend(from_top.into_iter().rev());
    bands.into_par_iter().with_max_len(1).for_each_init(Vec::new, |product: &mut Vec<f32>, (row, mut to)| {
        let rows = band.min(n - row);
        let (left, columns) = match &to {
            Band::Second(_) => (r, row + rows),
            Band::Cross(_, d) => (*d, n),
        };
        let left = left.part((0, row), tokens, rows).transpose();
        for from in (0..columns).step_by(COLUMNS) {
            let width = COLUMNS.min(columns - from);
            product.resize(rows * width, 0.0);
            times(ViewMut::new(product, rows, width), left, r.part((0, from), tokens, width), 1.0);
            for (i, p) in product.chunks_exact(width).enumerate() {
                match &mut to {
                    Band::Cross(c, _) => c[i * n + from..][..width].iter_mut().zip(p).for_each(|(c, p)| *c += p),
                    Band::Second(h) => {
                        // the row's own part of the triangle, as far as it reaches
                        let (at, end) = (packed_at(row + i, 0) - packed_at(row, 0), row + i + 1);
                        let own = &mut h[at + from.min(end)..at + end.min(from + width)];
                        own.iter_mut().zip(p).for_each(|(h, p)| *h += f64::from(*p));
                    }
                }
            }
        }
        product.clear();
    });
}

#[cfg(test)]
mod tests {
    use super::super::tests::{abs, near, on_threads, textbook, values};
    use super::*;

    #[test]
    fn both_sums_are_right_at_odd_shapes() {
        for (tokens, n) in [(1, 1), (7, 5), (40, 96), (130, 97), (33, 300), (5, 2500), (0, 4)] {
            let (r, d) = (values(tokens * n, 1), values(tokens * n, 2));
            let across =
                |x: &[f32]| -> Vec<f32> { (0..n * tokens).map(|at| x[at % tokens * n + at / tokens]).collect() };
            let (rt, dt) = (across(&r), across(&d));
            let (exact, size) = (textbook(&rt, &rt, n, n, tokens), textbook(&abs(&rt), &abs(&rt), n, n, tokens));
            let (exact_c, size_c) = (textbook(&dt, &rt, n, n, tokens), textbook(&abs(&dt), &abs(&rt), n, n, tokens));
            let run = |threads| {
                let (mut h, mut c) = (vec![0.5f64; packed_len(n).unwrap()], vec![0.5f32; n * n]);
                on_threads(threads, || add_sums(&mut h, Some((&mut c, &d)), &r, tokens, n));
                (h, c)
            };
            let (h, c) = run(1);
            for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let (at, noise) = (i * n + j, tokens + 4);
                assert!(near(c[at].into(), exact_c[at] + 0.5, size_c[at] + 0.5, noise), "{tokens}x{n} at {i},{j}");
                if j <= i {
                    let own = h[i * (i + 1) / 2 + j];
                    assert!(near(own, exact[at] + 0.5, size[at] + 0.5, noise), "{tokens}x{n} at {i},{j}");
                }
            }
            assert_eq!((&h, &c), (&run(3).0, &run(3).1), "{tokens}x{n} on 3 threads");
            let mut alone = vec![0.5f64; h.len()];
            add_sums(&mut alone, None, &r, tokens, n);
            assert_eq!(alone, h);
        }
    }
}
