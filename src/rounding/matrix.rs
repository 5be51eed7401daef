//! A weight matrix, rounded: tiles of rows side by side.

use rayon::prelude::*;

use super::codebook::Norms;
use super::factor::Factor;
use super::gptq::{PANEL, Tile, gptq_tile};
use super::levels::AnyLevels;
use super::refine::{errors, refine};
use super::{RoundingError, codebook_gptq, codebook_refine, weighted};
use crate::formats::grid::{self, Grid, Parts};
use crate::formats::iq::codebook::Codebook;
use crate::forward::kernels::vectorized;
use crate::gguf::GgmlType;
use crate::linalg::{View, ViewMut, add_times};

/// Rows of a tile. It decides how products are cut, so bytes depend on it; threads do not.
pub const ROWS: usize = 96;

/// A rounded matrix.
#[derive(Clone, Debug)]
pub struct Rounded {
    pub bytes: Vec<u8>,
    /// What they decode to, `[rows, n]`.
    pub values: Vec<f32>,
    /// `Σ (v − t)ᵀ H (v − t)` over rows, of the result.
    pub error: f64,
    /// Of nearest rounding with the same importance.
    pub nearest: f64,
    /// The blocks of nearest rounding.
    pub plain: Vec<u8>,
    /// Rows that nearest rounding had better.
    pub rows_nearest: usize,
}

vectorized! {
    /// Descent on a tile of a type with a grid. Returns the errors by row.
    pub fn refine_tile(g: &Grid, levels: &AnyLevels, f: &Factor, t: &mut Tile, target: &[f32]) -> Vec<f64> {
        match *levels {
            AnyLevels::Range(l) => refine(g, l, f, t, target),
            AnyLevels::Table(l) => refine(g, l, f, t, target),
        }
    }
}

vectorized! {
    /// GPTQ and descent on a tile of a type with a vector codebook. Returns the errors by row.
    pub fn round_codebook(
        c: &Codebook,
        norms: &Norms,
        f: &Factor,
        t: &mut codebook_gptq::Tile,
        target: &[f32],
    ) -> Result<Vec<f64>, RoundingError> {
        match (c.dim, c.even) {
            (8, true) => {
                codebook_gptq::gptq::<8, true>(c, norms, f, t)?;
                Ok(codebook_refine::refine::<8, true>(c, norms, f, t, target))
            }
            (8, false) => {
                codebook_gptq::gptq::<8, false>(c, norms, f, t)?;
                Ok(codebook_refine::refine::<8, false>(c, norms, f, t, target))
            }
            (_, true) => {
                codebook_gptq::gptq::<4, true>(c, norms, f, t)?;
                Ok(codebook_refine::refine::<4, true>(c, norms, f, t, target))
            }
            _ => {
                codebook_gptq::gptq::<4, false>(c, norms, f, t)?;
                Ok(codebook_refine::refine::<4, false>(c, norms, f, t, target))
            }
        }
    }
}

/// What to round to.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub ty: GgmlType,
    /// One scale for each row ([`Grid::by_row`]) where the type can.
    pub row_scales: bool,
}

impl From<GgmlType> for Form {
    fn from(ty: GgmlType) -> Form {
        Form { ty, row_scales: false }
    }
}

impl Form {
    /// What its blocks can say; `None` for floats and vector codebooks.
    pub fn grid(self) -> Option<Grid> {
        let grid = Grid::of(self.ty)?;
        Some(if self.row_scales { grid.by_row().unwrap_or(grid) } else { grid })
    }
}

/// Rounds `weight` \[rows, n\] to `form`, near `target` in the norm of the Hessian.
pub fn round(form: Form, weight: &[f32], target: &[f32], f: &Factor) -> Result<Rounded, RoundingError> {
    let (n, ty) = (f.n, form.ty);
    assert!(weight.len() == target.len() && weight.len().is_multiple_of(n), "whole rows");
    let row_bytes = n / ty.block_len() * ty.block_bytes();
    let rows = weight.len() / n;
    let (mut bytes, mut values) = (vec![0u8; rows * row_bytes], vec![0f32; rows * n]);
    let mut plain = vec![0u8; bytes.len()];
    let books = Codebook::of(ty).map(|c| (c, Norms::new(c, f)));
    let books = books.as_ref().map(|(c, norms)| (*c, norms));
    let tiles: Result<Vec<(f64, f64, usize)>, RoundingError> = bytes
        .par_chunks_mut(ROWS * row_bytes)
        .zip(plain.par_chunks_mut(ROWS * row_bytes))
        .zip(values.par_chunks_mut(ROWS * n))
        .zip(weight.par_chunks(ROWS * n).zip(target.par_chunks(ROWS * n)))
        .with_max_len(1)
        .map(|(((bytes, plain), values), wt)| tile((form, books), wt, f, (bytes, plain), values))
        .collect();
    let (mut error, mut nearest, mut rows_nearest) = (0.0, 0.0, 0);
    for (e, n, r) in tiles? {
        error += e;
        nearest += n;
        rows_nearest += r;
    }
    Ok(Rounded { bytes, values, error, nearest, plain, rows_nearest })
}

/// Nearest rounding as `ggml_quantize_chunk` does it, with the mean squares of the input as its importance.
pub fn nearest(ty: GgmlType, weight: &[f32], f: &Factor) -> Result<(Vec<u8>, Vec<f32>), RoundingError> {
    let format = crate::formats::format(ty).expect("the plan holds only types that can be encoded");
    let mut bytes = vec![0u8; weight.len() / ty.block_len() * ty.block_bytes()];
    let mut values = vec![0f32; weight.len()];
    format.encode(weight, f.n, Some(&f.importance), &mut bytes)?;
    format.decode(&bytes, &mut values);
    Ok((bytes, values))
}

fn tile(
    (form, books): (Form, Option<(&Codebook, &Norms)>),
    (weight, target): (&[f32], &[f32]),
    f: &Factor,
    (bytes, plain_bytes): (&mut [u8], &mut [u8]),
    values: &mut [f32],
) -> Result<(f64, f64, usize), RoundingError> {
    let (n, ty) = (f.n, form.ty);
    let rows = weight.len() / n;
    let mut gradient = Vec::new();
    let (coded, plain) = match form.grid() {
        Some(g) if g.row => {
            let mut coded = vec![0u8; bytes.len()];
            weighted::encode(&g, weight, &f.importance, &mut coded);
            let mut decoded = vec![0f32; weight.len()];
            crate::formats::format(ty).expect("it has a grid").decode(&coded, &mut decoded);
            (coded, decoded)
        }
        _ => nearest(ty, weight, f)?,
    };
    plain_bytes.copy_from_slice(&coded);
    let plain_errors = errors(f, &plain, target, &mut gradient);
    let own_errors = match form.grid() {
        Some(g) => {
            let mut t = Tile::new(&g, target, n);
            let mut padded = target.to_vec();
            padded.resize(t.rows * n, 0.0);
            let levels = AnyLevels::of(g.levels);
            gptq_tile(&g, &levels, f, &mut t, true);
            let own = refine_tile(&g, &levels, f, &mut t, &padded);
            let (coded, decoded) = packed(&g, &t, rows)?;
            bytes.copy_from_slice(&coded);
            values.copy_from_slice(&decoded);
            own
        }
        None => match books {
            Some((c, norms)) => {
                let mut t = codebook_gptq::Tile::new(target, n);
                let own = round_codebook(c, norms, f, &mut t, target)?;
                let blocks = bytes.chunks_exact_mut(ty.block_bytes());
                blocks.zip(t.d.iter().zip(&t.parts)).for_each(|(out, (d, parts))| c.pack(*d, parts, out));
                let format = crate::formats::format(ty).expect("it has a codebook");
                format.validate(bytes)?;
                format.decode(bytes, values);
                own
            }
            None => {
                panels(ty, target, f, bytes, values)?;
                errors(f, values, target, &mut gradient)
            }
        },
    };
    let row_bytes = bytes.len() / rows;
    let (mut error, mut worse) = (0.0, 0);
    for r in 0..rows {
        if plain_errors[r] < own_errors[r] {
            worse += 1;
            bytes[r * row_bytes..][..row_bytes].copy_from_slice(&plain_bytes[r * row_bytes..][..row_bytes]);
            values[r * n..][..n].copy_from_slice(&plain[r * n..][..n]);
        }
        error += own_errors[r].min(plain_errors[r]);
    }
    Ok((error, plain_errors.iter().sum(), worse))
}

/// The blocks of the first `rows` rows of a tile, and what they decode to.
fn packed(g: &Grid, t: &Tile, rows: usize) -> Result<(Vec<u8>, Vec<f32>), RoundingError> {
    let (ty, heads) = (g.ty, &t.heads[..rows * (t.n / g.block)]);
    let mut bytes = vec![0u8; heads.len() * ty.block_bytes()];
    let blocks = bytes.chunks_exact_mut(ty.block_bytes()).zip(t.codes.chunks_exact(g.block));
    for ((out, codes), head) in blocks.zip(heads) {
        let (scales, offsets) = (&head.scales[..g.subs()], &head.offsets[..g.subs()]);
        grid::pack(ty, &Parts { d: head.d, m: head.m, scales, offsets, codes }, out);
    }
    let format = crate::formats::format(ty).expect("it has a grid");
    format.validate(&bytes)?;
    let mut values = vec![0f32; rows * t.n];
    format.decode(&bytes, &mut values);
    Ok((bytes, values))
}

/// IQ1, whose points have shifts: ggml's search on a super-block at a time, errors carried to the later ones.
fn panels(ty: GgmlType, target: &[f32], f: &Factor, bytes: &mut [u8], values: &mut [f32]) -> Result<(), RoundingError> {
    let n = f.n;
    let rows = target.len() / n;
    let format = crate::formats::format(ty).expect("the plan holds only types that can be encoded");
    let row_bytes = bytes.len() / rows;
    let width = ty.block_len().max(PANEL).min(n);
    let mut w = target.to_vec();
    let block_bytes = width / ty.block_len() * ty.block_bytes();
    let (mut part, mut coded, mut decoded) =
        (vec![0f32; rows * width], vec![0u8; rows * block_bytes], vec![0f32; rows * width]);
    for p0 in (0..n).step_by(width) {
        for r in 0..rows {
            part[r * width..][..width].copy_from_slice(&w[r * n + p0..][..width]);
        }
        format.encode(&part, width, Some(&f.importance[p0..p0 + width]), &mut coded)?;
        format.decode(&coded, &mut decoded);
        let at = p0 / width * block_bytes;
        for r in 0..rows {
            bytes[r * row_bytes + at..][..block_bytes].copy_from_slice(&coded[r * block_bytes..][..block_bytes]);
            values[r * n + p0..][..width].copy_from_slice(&decoded[r * width..][..width]);
            // E U = W − V, column by column
            let e = &mut part[r * width..][..width];
            e.iter_mut().zip(&decoded[r * width..]).for_each(|(e, v)| *e -= v);
            for j in 0..width {
                let u = &f.u[(p0 + j) * n + p0 + j..][..width - j];
                let (own, rest) = e[j..].split_first_mut().expect("not empty");
                *own /= u[0];
                rest.iter_mut().zip(&u[1..]).for_each(|(e, u)| *e -= *own * u);
            }
        }
        let p1 = p0 + width;
        let rest = ViewMut::new(&mut w, rows, n).part((0, p1), rows, n - p1);
        let u = View::new(&f.u, n, n).part((p0, p1), width, n - p1);
        add_times(rest, View::new(&part, rows, width), u, -1.0);
    }
    Ok(())
}
