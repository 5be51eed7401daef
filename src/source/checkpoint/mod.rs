//! A checkpoint folder as a [`TensorSource`]: names and shapes matched against the architecture's table.
//!
//! Every mismatch is collected and reported at once: a tensor that no rule knows, a required one that is missing, a
//! shape that contradicts config.json.

mod map;

use std::ops::Range;

use super::{SourceTensor, TensorSource, rows};
use crate::arch::Architecture;
use crate::checkpoint::hparams::Hparams;
use crate::checkpoint::{CheckpointError, Dtype, Weights};
use crate::gguf::GgmlType;
use crate::mapped::MappedFile;
use crate::plan::OutType;
use map::Named;

/// How tensors are mapped.
#[derive(Clone, Copy, Debug, Default)]
pub struct MapOptions {
    /// `--fuse-qkv`: one `attn_qkv` instead of `attn_q`, `attn_k`, `attn_v`.
    pub fuse_qkv: bool,
}

/// A checkpoint folder.
#[derive(Debug)]
pub struct CheckpointSource {
    weights: Weights,
    tensors: Vec<SourceTensor>,
    parts: Vec<Vec<Part>>,
}

/// One stored tensor, or a computed one, that makes (part of) the rows of a GGUF tensor.
#[derive(Debug)]
struct Part {
    data: Data,
    rows: u64,
    row_len: u64,
    order: RowOrder,
}

#[derive(Debug)]
enum Data {
    Stored { file: usize, begin: usize, dtype: Dtype, scale: Option<Scale> },
    Computed(Vec<f32>),
}

/// fp8 scales, one per block of the weight.
#[derive(Debug)]
struct Scale {
    values: Vec<f32>,
    columns: usize,
    block: (u64, u64),
}

/// Which stored row becomes which row.
#[derive(Clone, Copy, Debug)]
enum RowOrder {
    Same,
    /// `LlamaModel.permute`: out[h*d + 2j + p] = in[h*d + p*(d/2) + j].
    Rotary {
        head: u64,
    },
}

impl RowOrder {
    fn source(self, row: u64) -> u64 {
        match self {
            RowOrder::Same => row,
            RowOrder::Rotary { head } => {
                let r = row % head;
                row - r + (r % 2) * (head / 2) + r / 2
            }
        }
    }

    fn group(self) -> u64 {
        match self {
            RowOrder::Same => 1,
            RowOrder::Rotary { head } => head,
        }
    }
}

impl CheckpointSource {
    /// Matches the tensors of `weights` with the table of `arch`. `computed` are tensors that are not stored
    /// (`rope_freqs.weight`): name and values.
    pub fn new(
        weights: Weights,
        arch: &Architecture,
        hp: &Hparams,
        computed: Vec<(String, Vec<f32>)>,
        options: MapOptions,
    ) -> Result<CheckpointSource, CheckpointError> {
        let mut named = map::map(&weights, arch, hp)?;
        if options.fuse_qkv {
            named = map::fuse_qkv(named);
        }
        let mut source = CheckpointSource { weights, tensors: Vec::new(), parts: Vec::new() };
        for (name, values) in computed {
            let part =
                Part { row_len: values.len() as u64, rows: 1, order: RowOrder::Same, data: Data::Computed(values) };
            let origin = "computed from config.json".to_string();
            source.push(Named { name, dims: vec![part.row_len], origin, parts: vec![part] });
        }
        for n in named {
            source.push(n);
        }
        Ok(source)
    }

    /// What `--outtype auto` stands for: the type of the first matrix that is stored in 16 bits, else f16.
    pub fn auto_type(&self) -> OutType {
        self.tensors
            .iter()
            .filter(|t| t.dims.len() >= 2 && !t.is_fp8)
            .find_map(|t| match t.stored {
                GgmlType::BF16 => Some(OutType::BF16),
                GgmlType::F16 => Some(OutType::F16),
                _ => None,
            })
            .unwrap_or(OutType::F16)
    }

    fn push(&mut self, n: Named) {
        let stored = |p: &Part| match &p.data {
            Data::Computed(_) => GgmlType::F32,
            Data::Stored { dtype: Dtype::F16, scale: None, .. } => GgmlType::F16,
            Data::Stored { dtype: Dtype::BF16, scale: None, .. } => GgmlType::BF16,
            Data::Stored { .. } => GgmlType::F32,
        };
        let first = stored(&n.parts[0]);
        let ty = if n.parts.iter().all(|p| stored(p) == first) { first } else { GgmlType::F32 };
        let (file, position) = match &n.parts[0].data {
            Data::Stored { file, begin, .. } => (Some(*file), *begin),
            Data::Computed(_) => (None, 0),
        };
        let bytes = |p: &Part| match &p.data {
            Data::Stored { dtype, .. } => p.rows * p.row_len * dtype.bytes() as u64,
            Data::Computed(v) => v.len() as u64 * 4,
        };
        self.tensors.push(SourceTensor {
            name: n.name,
            dims: n.dims,
            stored: ty,
            origin: n.origin,
            file,
            position,
            stored_bytes: n.parts.iter().map(bytes).sum(),
            is_fp8: n.parts.iter().any(|p| matches!(&p.data, Data::Stored { scale: Some(_), .. })),
            row_group: n.parts.iter().map(|p| p.order.group()).max().unwrap_or(1),
        });
        self.parts.push(n.parts);
    }

    /// Calls `f` with each part that `rows` touches, the rows within the part, and where they begin in the result.
    fn each_part(&self, index: usize, rows: Range<u64>, mut f: impl FnMut(&Part, Range<u64>, usize)) {
        let (mut base, mut done) = (0, 0usize);
        for part in &self.parts[index] {
            let (from, to) = (rows.start.max(base), rows.end.min(base + part.rows));
            if from < to {
                f(part, from - base..to - base, done);
                done += (to - from) as usize;
            }
            base += part.rows;
        }
    }

    fn bytes(&self, file: usize, begin: usize, len: usize) -> &[u8] {
        &self.weights.files[file].bytes()[begin..begin + len]
    }
}

impl TensorSource for CheckpointSource {
    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn files(&self) -> &[MappedFile] {
        &self.weights.files
    }

    fn read_rows(&self, index: usize, rows: Range<u64>, out: &mut [f32]) {
        if self.tensors[index].dims.len() == 1 {
            return self.read_vector(index, out);
        }
        self.each_part(index, rows, |part, rows, done| {
            let n = part.row_len as usize;
            let out = &mut out[done * n..][..(rows.end - rows.start) as usize * n];
            match &part.data {
                Data::Computed(v) => out.copy_from_slice(&v[rows.start as usize * n..][..out.len()]),
                Data::Stored { file, begin, dtype, scale } => {
                    let bytes = n * dtype.bytes();
                    match part.order {
                        RowOrder::Same => {
                            let begin = begin + rows.start as usize * bytes;
                            rows::to_f32(*dtype, self.bytes(*file, begin, out.len() * dtype.bytes()), out);
                        }
                        order => {
                            for (row, out) in rows.clone().zip(out.chunks_exact_mut(n)) {
                                let begin = begin + order.source(row) as usize * bytes;
                                rows::to_f32(*dtype, self.bytes(*file, begin, bytes), out);
                            }
                        }
                    }
                    if let Some(scale) = scale {
                        for (row, out) in rows.zip(out.chunks_exact_mut(n)) {
                            scale.apply(part.order.source(row), out);
                        }
                    }
                }
            }
        });
    }

    fn copy_rows(&self, index: usize, rows: Range<u64>, out: &mut [u8]) {
        let t = &self.tensors[index];
        let plain = self.parts[index].iter().all(|p| match &p.data {
            Data::Stored { dtype, scale: None, .. } => dtype.bytes() == t.stored.block_bytes() && *dtype != Dtype::F64,
            _ => false,
        });
        if t.dims.len() == 1 || !plain {
            let n = (t.row_len() * (rows.end - rows.start)) as usize;
            let mut values = vec![0.0; n];
            self.read_rows(index, rows, &mut values);
            let format = crate::formats::format(t.stored).expect("float types have a format");
            format.encode(&values, t.row_len() as usize, None, out).expect("float types encode everything");
            return;
        }
        self.each_part(index, rows, |part, rows, done| {
            let Data::Stored { file, begin, dtype, .. } = &part.data else { return };
            let bytes = part.row_len as usize * dtype.bytes();
            let out = &mut out[done * bytes..][..(rows.end - rows.start) as usize * bytes];
            match part.order {
                RowOrder::Same => {
                    out.copy_from_slice(self.bytes(*file, begin + rows.start as usize * bytes, out.len()));
                }
                order => {
                    for (row, out) in rows.zip(out.chunks_exact_mut(bytes)) {
                        out.copy_from_slice(self.bytes(*file, begin + order.source(row) as usize * bytes, bytes));
                    }
                }
            }
        });
    }

    fn stored_element(&self, index: usize, element: u64) -> u64 {
        // elements of a vector are its rows
        let width = if self.tensors[index].dims.len() == 1 { 1 } else { self.tensors[index].row_len().max(1) };
        let (row, column) = (element / width, element % width);
        let mut base = 0;
        for part in &self.parts[index] {
            let rows = part.rows * part.row_len / width;
            if row < base + rows {
                return (base + part.order.source(row - base)) * width + column;
            }
            base += rows;
        }
        element
    }

    fn release(&self, index: usize, rows: Range<u64>) {
        self.each_part(index, rows, |part, rows, _| {
            if let Data::Stored { file, begin, dtype, .. } = &part.data {
                let bytes = part.row_len as usize * dtype.bytes();
                // whole heads only: rows of a head are stored in another order
                let g = part.order.group();
                let (from, to) = (rows.start / g * g, rows.end / g * g);
                self.weights.files[*file].release_around(begin + from as usize * bytes..begin + to as usize * bytes);
            }
        });
    }
}

impl CheckpointSource {
    /// A 1-D tensor: its elements are the rows of the row order.
    fn read_vector(&self, index: usize, out: &mut [f32]) {
        let mut done = 0;
        for part in &self.parts[index] {
            let n = part.row_len as usize;
            let out = &mut out[done..done + n];
            match &part.data {
                Data::Computed(v) => out.copy_from_slice(v),
                Data::Stored { file, begin, dtype, .. } => {
                    rows::to_f32(*dtype, self.bytes(*file, *begin, n * dtype.bytes()), out);
                    if part.order.group() > 1 {
                        let plain = out.to_vec();
                        for (i, o) in out.iter_mut().enumerate() {
                            *o = plain[part.order.source(i as u64) as usize];
                        }
                    }
                }
            }
            done += n;
        }
    }
}

impl Scale {
    fn apply(&self, row: u64, out: &mut [f32]) {
        let scales = &self.values[(row / self.block.0) as usize * self.columns..][..self.columns];
        for (chunk, s) in out.chunks_mut(self.block.1 as usize).zip(scales) {
            for v in chunk {
                *v *= s;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotary_order_is_that_of_permute() {
        // reshape(heads, 2, d/2).swapaxes(1, 2) for d = 6: rows 0 3 1 4 2 5
        let order = RowOrder::Rotary { head: 6 };
        let rows: Vec<u64> = (0..12).map(|r| order.source(r)).collect();
        assert_eq!(rows, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }
}
