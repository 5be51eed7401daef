//! The product of transforms: f64, one order of summation whatever the shape of the call, no fused multiply-add, so that
//! weights read in any portions on any machine are the same to the last bit.

use crate::forward::kernels::vectorized;

/// Rows of `a` that go together.
const ROWS: usize = 4;
/// Columns of `b` that go together.
const COLUMNS: usize = 8;
/// Terms between two visits of `c`.
const DEPTH: usize = 128;

vectorized! {
    /// `c += a b`: `c` is \[m, n\], `b` is \[k, n\], element (i, j) of `a` is at `i * strides.0 + j * strides.1`. Every
    /// element of `c` gets its `k` terms in their order.
    pub fn add_product(c: &mut [f64], a: &[f64], strides: (usize, usize), b: &[f64], sizes: (usize, usize, usize)) {
        let (m, n, k) = sizes;
        let mut packed = [[0f64; COLUMNS]; DEPTH];
        for k0 in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - k0);
            for j0 in (0..n).step_by(COLUMNS) {
                let width = COLUMNS.min(n - j0);
                for (x, row) in packed[..depth].iter_mut().enumerate() {
                    row[..width].copy_from_slice(&b[(k0 + x) * n + j0..][..width]);
                }
                let mut i0 = 0;
                while i0 + ROWS <= m {
                    let mut sums = [[0f64; COLUMNS]; ROWS];
                    for (i, sums) in sums.iter_mut().enumerate() {
                        sums[..width].copy_from_slice(&c[(i0 + i) * n + j0..][..width]);
                    }
                    for (x, row) in packed[..depth].iter().enumerate() {
                        for (i, sums) in sums.iter_mut().enumerate() {
                            let a = a[(i0 + i) * strides.0 + (k0 + x) * strides.1];
                            for (s, b) in sums.iter_mut().zip(row) {
                                *s += a * b;
                            }
                        }
                    }
                    for (i, sums) in sums.iter().enumerate() {
                        c[(i0 + i) * n + j0..][..width].copy_from_slice(&sums[..width]);
                    }
                    i0 += ROWS;
                }
                for i in i0..m {
                    let mut sums = [0f64; COLUMNS];
                    sums[..width].copy_from_slice(&c[i * n + j0..][..width]);
                    for (x, row) in packed[..depth].iter().enumerate() {
                        let a = a[i * strides.0 + (k0 + x) * strides.1];
                        for (s, b) in sums.iter_mut().zip(row) {
                            *s += a * b;
                        }
                    }
                    c[i * n + j0..][..width].copy_from_slice(&sums[..width]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::random::Random;

    #[test]
    fn sums_in_order_whatever_the_shape() {
        let mut random = Random::new(1);
        for (m, n, k) in [(1, 1, 1), (5, 9, 130), (4, 8, 128), (11, 23, 300), (0, 3, 2), (3, 0, 2)] {
            let a: Vec<f64> = (0..m * k).map(|_| random.uniform() - 0.5).collect();
            let b: Vec<f64> = (0..k * n).map(|_| random.uniform() - 0.5).collect();
            let mut c: Vec<f64> = (0..m * n).map(|_| random.uniform()).collect();
            let textbook: Vec<f64> =
                (0..m * n).map(|at| (0..k).fold(c[at], |s, x| s + a[at / n * k + x] * b[x * n + at % n])).collect();
            let t: Vec<f64> = (0..k * m).map(|at| a[at % m.max(1) * k + at / m.max(1)]).collect();
            let mut other = c.clone();
            add_product(&mut c, &a, (k, 1), &b, (m, n, k));
            add_product(&mut other, &t, (1, m), &b, (m, n, k));
            assert!(c == textbook && other == textbook, "{m}x{n}x{k}");
        }
    }
}
