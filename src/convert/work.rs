//! Work items and what a worker does with one.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::hash::Hasher;
use super::output::PartFile;
use super::{ConvertError, INTERRUPTED, Run};
use crate::formats::{self, BlockFormat, FormatError};
use crate::gguf::GgmlType;
use crate::plan::PlannedTensor;
use crate::plan::memory::rows_per_item;
use crate::rounding::matrix::Form;
use crate::rounding::weighted;

/// A tensor that cannot be converted: which, where, why.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    #[error(transparent)]
    Rounded(crate::rounding::RoundingError),
    #[error(
        "{}: tensor `{tensor}`: {value} at element {index} (row {row}, column {column}): the checkpoint is damaged",
        file.display()
    )]
    NotFinite { file: PathBuf, tensor: String, index: u64, row: u64, column: u64, value: f32 },
    #[error(
        "{}: tensor `{tensor}`: {value:e} at element {index} does not fit in f16 (largest 65504); take bf16, or accept \
         infinities with --allow-f16-overflow",
        file.display()
    )]
    F16Overflow { file: PathBuf, tensor: String, index: u64, value: f32 },
    #[error("{}: tensor `{tensor}`, row {row}: {source}", file.display())]
    Format { file: PathBuf, tensor: String, row: u64, source: FormatError },
    #[error("{}: {source}", file.display())]
    Read { file: PathBuf, source: std::io::Error },
}

/// Elements that are read and encoded at a time within an item.
const CACHED_ELEMENTS: u64 = 1 << 15;

struct Item {
    tensor: usize,
    rows: Range<u64>,
}

/// Buffers of one worker, reused from item to item.
#[derive(Default)]
struct Buffers {
    values: Vec<f32>,
    rounded: Vec<u8>,
    bytes: Vec<u8>,
}

/// Converts everything; the number of f16 overflows that were accepted.
pub fn run(run: &Run, out: &PartFile, pool: &rayon::ThreadPool, hasher: Option<&Hasher>) -> Result<u64, ConvertError> {
    let items = items(run);
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<(usize, ConvertError)>> = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let overflows = AtomicU64::new(0);
    let left: Vec<AtomicU64> = run.plan.tensors.iter().map(|t| AtomicU64::new(t.rows())).collect();
    pool.scope(|scope| {
        for _ in 0..run.memory.threads {
            scope.spawn(|_| {
                let mut buffers = Buffers::default();
                while !stop.load(Ordering::Relaxed) && !INTERRUPTED.load(Ordering::Relaxed) {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(i) else { break };
                    match convert(run, out, hasher, item, &mut buffers) {
                        Ok(n) => {
                            overflows.fetch_add(n, Ordering::Relaxed);
                            finish(run, item, &left);
                        }
                        Err(e) => {
                            stop.store(true, Ordering::Relaxed);
                            let mut slot = failed.lock().unwrap_or_else(|e| e.into_inner());
                            // the first item in order wins, whatever the threads did
                            if slot.as_ref().is_none_or(|(at, _)| i < *at) {
                                *slot = Some((i, e));
                            }
                        }
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some((_, e)) => Err(e),
        None => {
            super::stop_if_interrupted()?;
            Ok(overflows.into_inner())
        }
    }
}

/// Every run of rows, in the order in which the input files hold them.
fn items(run: &Run) -> Vec<Item> {
    let sources = run.input.source.tensors();
    let mut order: Vec<usize> = (0..run.plan.tensors.len()).collect();
    order.sort_by_key(|&i| {
        let s = &sources[run.plan.tensors[i].source];
        (s.file, s.position)
    });
    let mut items = Vec::new();
    for tensor in order {
        let t = &run.plan.tensors[tensor];
        let group = sources[t.source].row_group;
        // importance has one row per expert: an item stays within one
        let inner = t.dims.get(1).copied().unwrap_or(1).max(1);
        let step = rows_per_item(t.row_len(), t.rows(), group, run.memory.chunk);
        for matrix in 0..t.rows() / inner {
            let (mut at, end) = (matrix * inner, (matrix + 1) * inner);
            while at < end {
                let to = (at + step).min(end);
                items.push(Item { tensor, rows: at..to });
                at = to;
            }
        }
    }
    items
}

fn finish(run: &Run, item: &Item, left: &[AtomicU64]) {
    let t = &run.plan.tensors[item.tensor];
    let s = &run.input.source.tensors()[t.source];
    let n = item.rows.end - item.rows.start;
    run.progress.advance(s.stored_bytes * n / t.rows().max(1));
    if left[item.tensor].fetch_sub(n, Ordering::Relaxed) == n {
        run.progress.tensor(&t.name);
    }
}

fn convert(
    run: &Run,
    out: &PartFile,
    hasher: Option<&Hasher>,
    item: &Item,
    b: &mut Buffers,
) -> Result<u64, ConvertError> {
    let t = &run.plan.tensors[item.tensor];
    let source = &*run.input.source;
    let s = &source.tensors()[t.source];
    let (rows, n) = (item.rows.clone(), (item.rows.end - item.rows.start) as usize);
    let row_len = t.row_len() as usize;
    if let (Some(h), Some(file)) = (hasher, s.file) {
        let done = s.stored_bytes * rows.end / t.rows().max(1);
        h.reached(file, s.position + done as usize);
    }
    let row_bytes = (t.bytes / t.rows().max(1)) as usize;
    b.bytes.resize(n * row_bytes, 0);
    let mut overflows = 0;
    if let Some(rounded) = run.rounded
        && rounded.read(&t.name, t.ty, rows.start * row_bytes as u64, &mut b.bytes).map_err(WorkError::Rounded)?
    {
    } else if t.ty == s.stored && t.via == s.stored {
        source.copy_rows(t.source, rows.clone(), &mut b.bytes);
        let fail = Fail { run, t, first: rows.start * t.row_len() };
        validate(&fail, s.stored, &b.bytes)?;
    } else {
        // pieces that stay in the second-level cache from reading to encoding
        let step = rows_per_item(t.row_len(), n as u64, s.row_group, CACHED_ELEMENTS) as usize;
        let Buffers { values, rounded, bytes } = b;
        for (i, bytes) in bytes.chunks_mut((step * row_bytes).max(1)).enumerate() {
            let from = rows.start + (i * step) as u64;
            let to = (from + step as u64).min(rows.end);
            values.resize((to - from) as usize * row_len, 0.0);
            source.read_rows(t.source, from..to, values);
            overflows += encode(run, t, from, values, rounded, bytes)?;
        }
    }
    if run.plan.big_endian {
        swap_bytes(t.ty, &mut b.bytes);
    }
    out.write_at(&b.bytes, t.offset + rows.start * row_bytes as u64)?;
    source.release(t.source, rows);
    Ok(overflows)
}

/// Rows from `row` on, as f32, become `bytes`; the number of f16 overflows.
fn encode(
    run: &Run,
    t: &PlannedTensor,
    row: u64,
    values: &mut [f32],
    rounded: &mut Vec<u8>,
    bytes: &mut [u8],
) -> Result<u64, ConvertError> {
    let fail = Fail { run, t, first: row * t.row_len() };
    let row_len = t.row_len() as usize;
    if let Some(i) = formats::simd::convert::find_non_finite(values) {
        return Err(fail.not_finite(i, values[i]).into());
    }
    let mut overflows = 0;
    let stored = run.input.source.tensors()[t.source].stored;
    if t.via != stored && matches!(t.via, GgmlType::F16 | GgmlType::BF16) && t.ty != t.via {
        overflows += round_through(&fail, t.via, values, rounded, row_len)?;
    }
    let format = format_of(t.ty);
    let encoded = weighted::nearest(
        Form { ty: t.ty, row_scales: run.row_scales },
        values,
        row_len,
        importance(run, t, row),
        run.search,
        bytes,
    );
    encoded.map_err(|source| fail.format(source, t.ty, values))?;
    if t.ty == GgmlType::F16 {
        overflows += fail.f16_overflows(values, bytes)?;
    } else {
        format.validate(bytes).map_err(|source| fail.format(source, t.ty, &[]))?;
    }
    Ok(overflows)
}

/// Checks bytes that are copied as they are.
fn validate(fail: &Fail, ty: GgmlType, bytes: &[u8]) -> Result<(), ConvertError> {
    let Some(format) = formats::format(ty) else { return Ok(()) }; // integers
    format.validate(bytes).map_err(|source| match source {
        FormatError::NotFinite { index, value } => fail.not_finite(index, value).into(),
        source => fail.format(source, ty, &[]).into(),
    })
}

/// The two-step way: values become what the intermediate file would hold.
fn round_through(
    fail: &Fail,
    via: GgmlType,
    values: &mut [f32],
    rounded: &mut Vec<u8>,
    row_len: usize,
) -> Result<u64, ConvertError> {
    let format = format_of(via);
    rounded.resize(values.len() * via.block_bytes(), 0);
    format.encode(values, row_len, None, rounded).map_err(|source| fail.format(source, via, values))?;
    let n = if via == GgmlType::F16 { fail.f16_overflows(values, rounded)? } else { 0 };
    format.decode(rounded, values);
    Ok(n)
}

fn format_of(ty: GgmlType) -> &'static dyn BlockFormat {
    formats::format(ty).expect("the plan holds only types that can be encoded")
}

/// Importance of the columns, for the expert that row `row` belongs to.
fn importance<'a>(run: &Run<'a>, t: &PlannedTensor, row: u64) -> Option<&'a [f32]> {
    let values = run.imatrix?.entries.get(t.importance.as_ref()?)?;
    let n = t.row_len() as usize;
    let expert = (row / t.dims.get(1).copied().unwrap_or(1).max(1)) as usize;
    values.get(expert * n..(expert + 1) * n)
}

fn swap_bytes(ty: GgmlType, bytes: &mut [u8]) {
    for element in bytes.chunks_exact_mut(ty.block_bytes()) {
        element.reverse();
    }
}

/// Names the place of an error.
struct Fail<'a, 'r> {
    run: &'a Run<'r>,
    t: &'a PlannedTensor,
    /// Element at which the item begins.
    first: u64,
}

impl Fail<'_, '_> {
    fn file(&self) -> PathBuf {
        let source = &self.run.input.source;
        let file = source.tensors()[self.t.source].file;
        file.map_or_else(PathBuf::new, |f| source.files()[f].path().to_path_buf())
    }

    fn tensor(&self) -> String {
        self.run.input.source.tensors()[self.t.source].origin.clone()
    }

    /// Where element `index` of the item stands in the input.
    fn stored(&self, index: usize) -> u64 {
        self.run.input.source.stored_element(self.t.source, self.first + index as u64)
    }

    fn not_finite(&self, index: usize, value: f32) -> WorkError {
        let index = self.stored(index);
        let (row, column) = (index / self.t.row_len().max(1), index % self.t.row_len().max(1));
        WorkError::NotFinite { file: self.file(), tensor: self.tensor(), index, row, column, value }
    }

    /// What a format of type `ty` says of the item, with the row that it means; of values that are too large, that of
    /// the largest.
    fn format(&self, source: FormatError, ty: GgmlType, values: &[f32]) -> WorkError {
        let largest = || (0..values.len()).max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs()));
        let index = match source {
            FormatError::Overflow => largest().unwrap_or(0),
            FormatError::BadScale { block } => block * ty.block_len(),
            FormatError::NotFinite { index, .. } => index,
            _ => 0,
        };
        let row = self.stored(index) / self.t.row_len().max(1);
        WorkError::Format { file: self.file(), tensor: self.tensor(), row, source }
    }

    /// Finite values that became infinite: an error, or their number if that is allowed.
    fn f16_overflows(&self, values: &[f32], halves: &[u8]) -> Result<u64, WorkError> {
        let infinite = |h: &[u8; 2]| u16::from_le_bytes(*h) & 0x7fff == 0x7c00;
        let halves = halves.as_chunks::<2>().0;
        match halves.iter().position(infinite) {
            None => Ok(0),
            Some(_) if self.run.allow_f16_overflow => Ok(halves.iter().filter(|h| infinite(h)).count() as u64),
            Some(i) => Err(WorkError::F16Overflow {
                file: self.file(),
                tensor: self.tensor(),
                index: self.stored(i),
                value: values[i],
            }),
        }
    }
}
