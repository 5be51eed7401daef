//! What every tensor of a model has lost: ‖W - Q‖² / ‖W‖², and the same weighted by the importance of each input.

use rayon::prelude::*;

use crate::calibration::imatrix::Imatrix;
use crate::gguf::GgmlType;
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
    /// Σ h_j (w - q)² / Σ h_j w² with h_j the mean square of input j, where an importance matrix has the tensor.
    pub weighted: Option<f64>,
}

/// Values that one task compares at a time.
const CHUNK: u64 = 1 << 18;

/// Tensors that both have, in the model's order, but those that are stored alike in both with no loss possible.
///
/// Errors: a tensor whose shapes differ, by name.
pub fn errors(
    reference: &dyn TensorSource,
    model: &dyn TensorSource,
    imatrix: Option<&Imatrix>,
) -> Result<Vec<TensorError>, String> {
    let mut out = Vec::new();
    for (index, t) in model.tensors().iter().enumerate() {
        let Some(other) = reference.tensors().iter().position(|r| r.name == t.name) else { continue };
        if reference.tensors()[other].dims != t.dims {
            return Err(format!(
                "tensor `{}` is {:?} in the model and {:?} in the reference",
                t.name,
                t.dims,
                reference.tensors()[other].dims
            ));
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
            weighted: importance.map(|_| ratio(sums[2], sums[3])),
        });
    }
    Ok(out)
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
