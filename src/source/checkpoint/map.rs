//! Stored names, shapes and types against the table of the architecture.

use std::collections::HashMap;

use super::{Data, Part, RowOrder, Scale};
use crate::arch::{Architecture, Dim, Presence, TensorRule, Transform};
use crate::checkpoint::hparams::Hparams;
use crate::checkpoint::{CheckpointError, Dtype, Weights};
use crate::source::rows;

/// Names that `convert_hf_to_gguf.py` leaves out (`ModelBase.get_tensors`, `filter_tensors`).
const SKIPPED_SUFFIXES: &[&str] = &[".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq"];
/// Side tensors of fp8 checkpoints that are used with their weight, or not at all.
const FP8_SIDE: &[&str] = &["_scale_inv", ".activation_scale", "_activation_scale"];

/// Maps every stored tensor; all problems in one error.
pub fn map(weights: &Weights, arch: &Architecture, hp: &Hparams) -> Result<Vec<Named>, CheckpointError> {
    let mut mapper = Mapper { weights, arch, hp, problems: Vec::new(), seen: HashMap::new() };
    let named = mapper.map()?;
    mapper.check_complete(&named);
    match mapper.problems.first() {
        Some(first) => Err(CheckpointError::file(&weights.folder, list_problems(first, &mapper.problems))),
        None => Ok(named),
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

/// A tensor under its GGUF name.
pub struct Named {
    pub name: String,
    /// `ne`.
    pub dims: Vec<u64>,
    pub origin: String,
    pub(super) parts: Vec<Part>,
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
            Transform::PermuteQuery | Transform::PermuteKey if !self.hp.head_dim.is_multiple_of(2) => {
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
pub fn fuse_qkv(named: Vec<Named>) -> Vec<Named> {
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
