//! A checkpoint folder as a [`TensorSource`]: names and shapes matched against the architecture's table.
//!
//! Every mismatch is collected and reported at once: a tensor that no rule knows, a required one that is missing, a
//! shape that contradicts config.json.

use std::collections::HashMap;
use std::ops::Range;

use super::{SourceTensor, TensorSource, rows};
use crate::arch::{Architecture, Dim, Presence, TensorRule, Transform};
use crate::checkpoint::hparams::Hparams;
use crate::checkpoint::{CheckpointError, Dtype, Weights};
use crate::gguf::GgmlType;
use crate::mapped::MappedFile;
use crate::plan::OutType;

/// How tensors are mapped.
#[derive(Clone, Copy, Debug, Default)]
pub struct MapOptions {
    /// `--fuse-qkv`: one `attn_qkv` instead of `attn_q`, `attn_k`, `attn_v`.
    pub fuse_qkv: bool,
}

/// Names that `convert_hf_to_gguf.py` leaves out (`ModelBase.get_tensors`, `filter_tensors`).
const SKIPPED_SUFFIXES: &[&str] = &[".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq"];
/// Side tensors of fp8 checkpoints that are used with their weight, or not at all.
const FP8_SIDE: &[&str] = &["_scale_inv", ".activation_scale", "_activation_scale"];

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
        let mut mapper = Mapper { weights: &weights, arch, hp, problems: Vec::new(), seen: HashMap::new() };
        let mut named = mapper.map()?;
        mapper.check_complete(&named);
        if let Some(first) = mapper.problems.first() {
            return Err(CheckpointError::file(&weights.folder, list_problems(first, &mapper.problems)));
        }
        if options.fuse_qkv {
            named = fuse_qkv(named);
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

fn list_problems(first: &str, all: &[String]) -> String {
    const SHOWN: usize = 12;
    if all.len() == 1 {
        return first.to_string();
    }
    let mut text = format!("{} problems:", all.len());
    for p in all.iter().take(SHOWN) {
        text += &format!("\n  {p}");
    }
    if all.len() > SHOWN {
        text += &format!("\n  ... and {} more", all.len() - SHOWN);
    }
    text
}

struct Named {
    name: String,
    dims: Vec<u64>,
    origin: String,
    parts: Vec<Part>,
}

struct Mapper<'a> {
    weights: &'a Weights,
    arch: &'a Architecture,
    hp: &'a Hparams,
    problems: Vec<String>,
    /// (rule, layer) -> found.
    seen: HashMap<(usize, Option<u64>), ()>,
}

impl Mapper<'_> {
    /// Every stored tensor, files in order, names sorted within a file as the converter takes them.
    fn map(&mut self) -> Result<Vec<Named>, CheckpointError> {
        let mut order: Vec<usize> = (0..self.weights.tensors.len()).collect();
        order.sort_by(|&a, &b| {
            let (fa, ea) = &self.weights.tensors[a];
            let (fb, eb) = &self.weights.tensors[b];
            (fa, &ea.name).cmp(&(fb, &eb.name))
        });
        let mut out = Vec::with_capacity(order.len());
        for i in order {
            let name = self.weights.tensors[i].1.name.clone();
            if SKIPPED_SUFFIXES.iter().any(|s| name.ends_with(s)) || self.is_fp8_side(&name) {
                continue;
            }
            match self.rule(&name) {
                Some((r, layer)) => {
                    self.seen.insert((r, layer), ());
                    match self.named(i, &self.arch.tensors[r], layer) {
                        Ok(n) => out.push(n),
                        Err(why) => self.problems.push(format!("tensor `{name}`: {why}")),
                    }
                }
                None => self.problems.push(format!("tensor `{name}` is not part of a {}", self.arch.hf)),
            }
        }
        Ok(out)
    }

    fn is_fp8_side(&self, name: &str) -> bool {
        self.hp.quantization.is_some() && FP8_SIDE.iter().any(|s| name.ends_with(s))
    }

    fn rule(&self, name: &str) -> Option<(usize, Option<u64>)> {
        self.arch.tensors.iter().enumerate().find_map(|(i, rule)| match rule.hf.split_once("{}") {
            None => (rule.hf == name).then_some((i, None)),
            Some((head, tail)) => {
                let layer = name.strip_prefix(head)?.strip_suffix(tail)?;
                let canonical = layer.bytes().all(|b| b.is_ascii_digit()) && (layer == "0" || !layer.starts_with('0'));
                Some((i, Some(layer.parse().ok().filter(|_| canonical)?)))
            }
        })
    }

    fn dim(&self, d: Dim) -> u64 {
        let hp = self.hp;
        match d {
            Dim::Vocab => hp.vocab_size,
            Dim::Embed => hp.embed,
            Dim::FeedForward => hp.feed_forward,
            Dim::Query => hp.heads * hp.head_dim,
            Dim::KeyValue => hp.kv_heads * hp.head_dim,
            Dim::Head => hp.head_dim,
        }
    }

    fn named(&self, i: usize, rule: &TensorRule, layer: Option<u64>) -> Result<Named, String> {
        let (file, e) = &self.weights.tensors[i];
        if let Some(l) = layer.filter(|&l| l >= self.hp.layers) {
            return Err(format!("layer {l}, but num_hidden_layers is {}", self.hp.layers));
        }
        let expected: Vec<u64> = rule.shape.iter().map(|&d| self.dim(d)).collect();
        if e.shape != expected {
            let names: Vec<String> = rule.shape.iter().map(|d| format!("{d:?}")).collect();
            return Err(format!(
                "shape {:?}, config.json says {expected:?} ({})",
                e.shape,
                names.join(" x ").to_lowercase()
            ));
        }
        let dtype = e
            .dtype
            .filter(|d| d.is_float())
            .ok_or_else(|| format!("its type {} cannot be converted; a float checkpoint is needed", e.dtype_name))?;
        let scale = self.scale(&e.name, dtype, &e.shape)?;
        let dims: Vec<u64> = e.shape.iter().rev().copied().collect();
        let order = match rule.transform {
            Transform::None => RowOrder::Same,
            Transform::PermuteQuery | Transform::PermuteKey if self.hp.head_dim % 2 != 0 => {
                return Err(format!("head dimension {} is odd, rotary halves need an even one", self.hp.head_dim));
            }
            Transform::PermuteQuery | Transform::PermuteKey => RowOrder::Rotary { head: self.hp.head_dim },
        };
        let part = Part {
            rows: dims[1..].iter().product(),
            row_len: dims[0],
            order,
            data: Data::Stored { file: *file, begin: e.begin, dtype, scale },
        };
        let name = match layer {
            Some(l) => rule.gguf.replace("{}", &l.to_string()),
            None => rule.gguf.to_string(),
        };
        Ok(Named { name, dims, origin: e.name.clone(), parts: vec![part] })
    }

    /// The fp8 scales of a weight (`dequant_simple`): block-wise or one per tensor or row.
    fn scale(&self, name: &str, dtype: Dtype, shape: &[u64]) -> Result<Option<Scale>, String> {
        if !matches!(dtype, Dtype::F8E4M3 | Dtype::F8E5M2) {
            return Ok(None);
        }
        let q = self.hp.quantization.as_ref();
        if q.is_none_or(|q| q.method != "fp8") {
            return Err("an fp8 weight, but config.json has no quantization_config with quant_method fp8".into());
        }
        let scale_name = format!("{name}_scale_inv");
        let (file, e) =
            self.weights.find(&scale_name).ok_or_else(|| format!("an fp8 weight without its scales `{scale_name}`"))?;
        let dtype =
            e.dtype.filter(|d| d.is_float()).ok_or_else(|| format!("`{scale_name}` has type {}", e.dtype_name))?;
        let (rows, cols) = (shape[0], shape.get(1).copied().unwrap_or(1));
        let block = q.and_then(|q| q.weight_block_size).unwrap_or((rows.max(1), cols.max(1)));
        let (sr, sc) = (rows.div_ceil(block.0), cols.div_ceil(block.1));
        let n: u64 = e.shape.iter().product();
        if n != sr * sc || (q.is_some_and(|q| q.weight_block_size.is_some()) && e.shape != [sr, sc]) {
            return Err(format!(
                "`{scale_name}` has shape {:?}, blocks of {} x {} need [{sr}, {sc}]",
                e.shape, block.0, block.1
            ));
        }
        let mut values = vec![0.0; n as usize];
        rows::to_f32(dtype, &self.weights.files[file].bytes()[e.begin..e.end], &mut values);
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!("`{scale_name}` holds {} at position {i}", values[i]));
        }
        Ok(Some(Scale { values, columns: sc as usize, block }))
    }

    fn check_complete(&mut self, found: &[Named]) {
        for (r, rule) in self.arch.tensors.iter().enumerate() {
            if rule.presence != Presence::Required {
                continue;
            }
            let layers: Vec<Option<u64>> =
                if rule.hf.contains("{}") { (0..self.hp.layers).map(Some).collect() } else { vec![None] };
            for layer in layers {
                if !self.seen.contains_key(&(r, layer)) {
                    let name = rule.hf.replace("{}", &layer.unwrap_or(0).to_string());
                    self.problems.push(format!("tensor `{name}` is missing"));
                }
            }
        }
        if !self.hp.tie_word_embeddings && !found.iter().any(|n| n.name == "output.weight") && self.problems.is_empty()
        {
            self.problems
                .push("`lm_head.weight` is missing and config.json does not say tie_word_embeddings".to_string());
        }
    }
}

/// q, k and v of a layer become one tensor, where the last of the three stood (`--fuse-qkv` of the converter).
fn fuse_qkv(named: Vec<Named>) -> Vec<Named> {
    let mut out: Vec<Named> = Vec::with_capacity(named.len());
    let mut waiting: HashMap<String, Vec<Named>> = HashMap::new();
    for n in named {
        let key = ["q", "k", "v"]
            .iter()
            .find_map(|c| n.name.split_once(&format!(".attn_{c}.")).map(|(a, b)| format!("{a}.attn_qkv.{b}")));
        let Some(key) = key else {
            out.push(n);
            continue;
        };
        let group = waiting.entry(key.clone()).or_default();
        group.push(n);
        if group.len() == 3 {
            let mut g = waiting.remove(&key).expect("just filled");
            g.sort_by_key(|n| ["q", "k", "v"].iter().position(|c| n.name.contains(&format!(".attn_{c}."))));
            let mut dims = g[0].dims.clone();
            let last = dims.len() - 1;
            dims[last] = g.iter().map(|n| n.dims[last]).sum();
            let origin = g.iter().map(|n| n.origin.as_str()).collect::<Vec<_>>().join(" + ");
            out.push(Named { name: key, dims, origin, parts: g.into_iter().flat_map(|n| n.parts).collect() });
        }
    }
    out.extend(waiting.into_values().flatten());
    out
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
                self.weights.files[*file].release(begin + from as usize * bytes..begin + to as usize * bytes);
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
