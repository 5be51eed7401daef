//! What every tensor of a model has lost: ‖W - Q‖² / ‖W‖², and the same weighted by the inputs: by the mean square of each
//! (importance matrix), or by how they vary together, tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ) with H = Σ x xᵀ.

use rayon::prelude::*;

use crate::calibration::hessian_file::HessianFile;
use crate::calibration::imatrix::Imatrix;
use crate::checkpoint::CheckpointError;
use crate::gguf::GgmlType;
use crate::linalg;
use crate::source::TensorSource;

/// One tensor of a model against the reference's.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorError {
    pub name: String,
    pub ty: GgmlType,
    pub elements: u64,
    pub bytes: u64,
    /// Σ(w - q)² / Σw²; 0 for an exact copy.
    pub relative: f64,
    /// Weighted by the inputs, where the tensor has an entry.
    pub weighted: Option<f64>,
}

/// What errors are weighted by.
#[derive(Clone, Copy)]
pub enum Weighting<'a> {
    None,
    /// Mean square of every input.
    Importance(&'a Imatrix),
    /// Second moments.
    Hessian(&'a HessianFile),
}

/// A comparison that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TensorsError {
    #[error("tensor `{name}` is {model:?} in the model and {reference:?} in the reference")]
    Shape { name: String, model: Vec<u64>, reference: Vec<u64> },
    #[error("{0}")]
    Hessian(#[from] CheckpointError),
}

/// Values that one task compares at a time.
const CHUNK: u64 = 1 << 18;

/// Tensors that both have, in the model's order.
pub fn errors(
    reference: &dyn TensorSource,
    model: &dyn TensorSource,
    weighting: Weighting<'_>,
) -> Result<Vec<TensorError>, TensorsError> {
    let imatrix = if let Weighting::Importance(i) = weighting { Some(i) } else { None };
    let mut out = Vec::new();
    for (index, t) in model.tensors().iter().enumerate() {
        let Some(other) = reference.tensors().iter().position(|r| r.name == t.name) else { continue };
        if reference.tensors()[other].dims != t.dims {
            return Err(TensorsError::Shape {
                name: t.name.clone(),
                model: t.dims.clone(),
                reference: reference.tensors()[other].dims.clone(),
            });
        }
        let columns = t.row_len().max(1);
        let inner = t.dims.get(1).copied().unwrap_or(1).max(1);
        let importance = imatrix
            .and_then(|i| i.entries.get(&t.name))
            .filter(|h| h.len() as u64 == columns || h.len() as u64 == columns * (t.rows() / inner).max(1));
        let group = reference.tensors()[other].row_group.max(1);
        let step = (CHUNK / columns).max(1).next_multiple_of(group);
        let parts: Vec<[f64; 4]> = (0..t.rows().div_ceil(step))
            .into_par_iter()
            .map_init(
                || (Vec::new(), Vec::new()),
                |(w, q), i| {
                    let rows = i * step..((i + 1) * step).min(t.rows());
                    let n = ((rows.end - rows.start) * columns) as usize;
                    w.resize(n, 0.0);
                    q.resize(n, 0.0);
                    reference.read_rows(other, rows.clone(), w);
                    model.read_rows(index, rows.clone(), q);
                    reference.release(other, rows.clone());
                    model.release(index, rows.clone());
                    let mut sums = [0.0f64; 4];
                    let each = w.chunks_exact(columns as usize).zip(q.chunks_exact(columns as usize));
                    for (row, (w, q)) in rows.zip(each) {
                        add(&mut sums, w, q, importance.map(|h| row_of(h, row / inner, columns as usize)));
                    }
                    sums
                },
            )
            .collect();
        // in order: the same for any number of threads
        let sums = parts.iter().fold([0.0; 4], |mut all, part| {
            all.iter_mut().zip(part).for_each(|(a, p)| *a += p);
            all
        });
        let ratio = |e: f64, s: f64| if s > 0.0 { e / s } else { e };
        out.push(TensorError {
            name: t.name.clone(),
            ty: t.stored,
            elements: t.elements(),
            bytes: t.stored_bytes,
            relative: ratio(sums[0], sums[1]),
            weighted: match weighting {
                Weighting::Hessian(file) => by_hessian(reference, other, model, index, file)?,
                _ => importance.map(|_| ratio(sums[2], sums[3])),
            },
        });
    }
    Ok(out)
}

/// tr(E H Eᵀ) / tr(W H Wᵀ) of a tensor, over its experts; `None` without an entry of its width.
fn by_hessian(
    reference: &dyn TensorSource,
    other: usize,
    model: &dyn TensorSource,
    index: usize,
    file: &HessianFile,
) -> Result<Option<f64>, TensorsError> {
    let t = &model.tensors()[index];
    let n = t.row_len() as usize;
    let Some(entry) = file.entry(&t.name).filter(|e| e.columns == n) else { return Ok(None) };
    let inner = t.dims.get(1).copied().unwrap_or(1).max(1);
    let step = 256u64.next_multiple_of(reference.tensors()[other].row_group.max(1));
    let (mut w, mut q, mut product) = (Vec::new(), Vec::new(), Vec::new());
    let (mut error, mut size) = (0.0, 0.0);
    for expert in 0..(t.rows() / inner).min(entry.counts.len() as u64) {
        let lower = file.lower(&t.name, expert as usize)?;
        let mut h = vec![0.0f32; n * n];
        let mut at = 0;
        for i in 0..n {
            for j in 0..=i {
                (h[i * n + j], h[j * n + i]) = (lower[at], lower[at]);
                at += 1;
            }
        }
        drop(lower);
        for from in (0..inner).step_by(step as usize) {
            let rows = expert * inner + from..expert * inner + (from + step).min(inner);
            let m = (rows.end - rows.start) as usize;
            for v in [&mut w, &mut q, &mut product] {
                v.resize(m * n, 0.0);
            }
            reference.read_rows(other, rows.clone(), &mut w);
            model.read_rows(index, rows, &mut q);
            q.iter_mut().zip(&w).for_each(|(q, w)| *q = w - *q);
            for (x, sum) in [(&q, &mut error), (&w, &mut size)] {
                linalg::product(x, &h, n, &mut product);
                *sum += x.iter().zip(&product).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
            }
        }
    }
    Ok(Some(if size > 0.0 { error / size } else { error }))
}

/// Importance of an expert's columns, or of all.
fn row_of(h: &[f32], expert: u64, columns: usize) -> &[f32] {
    if h.len() == columns { h } else { &h[expert as usize * columns..][..columns] }
}

fn add(sums: &mut [f64; 4], w: &[f32], q: &[f32], h: Option<&[f32]>) {
    for (j, (&w, &q)) in w.iter().zip(q).enumerate() {
        let (w, d) = (f64::from(w), f64::from(w) - f64::from(q));
        sums[0] += d * d;
        sums[1] += w * w;
        if let Some(h) = h {
            sums[2] += f64::from(h[j]) * d * d;
            sums[3] += f64::from(h[j]) * w * w;
        }
    }
}
