//! Scales in closed form from activations: SmoothQuant's and AWQ's. One pass over a text, layer by layer; scales change no
//! output, so layers do not wait for each other.

use std::collections::HashMap;

use rayon::prelude::*;

use super::TransformError;
use super::anatomy::{Anatomy, Pair};
use super::preset::Preset;
use super::set::Transforms;
use crate::calibration::moments::Moments;
use crate::calibration::run::{Collect, specs};
use crate::formats::{self, BlockFormat};
use crate::forward::{Activations, ForwardError, Hidden, Model, Observer, Runner};
use crate::gguf::GgmlType;
use crate::linalg::{self, Par};

/// Rows of a weight that errors are measured on, at most, spread over all.
const ROWS: usize = 256;
/// Exponents of AWQ are multiples of 1 / this.
const GRID: usize = 10;
/// Windows that go through a layer together.
const BATCH: usize = 16;

/// What scales are made from.
pub struct Job<'a> {
    pub model: &'a Model<'a>,
    pub anatomy: &'a Anatomy,
    /// Whole windows of `length` tokens.
    pub tokens: &'a [u32],
    pub length: usize,
    /// SmoothQuant's α, 0 to 1.
    pub alpha: f64,
    /// The type that a weight gets; `None`: it is not rounded.
    pub types: &'a (dyn Fn(&str) -> Option<GgmlType> + Sync),
}

/// Sums and largest values of inputs.
struct Sight {
    collect: Collect,
    largest: HashMap<String, Vec<f32>>,
}

impl Observer for Sight {
    fn input(&mut self, names: &[&str], expert: Option<(usize, usize)>, x: &[f32]) -> Result<(), ForwardError> {
        self.collect.input(names, expert, x)?;
        if let (Some(columns), None) = (names.first().and_then(|n| self.collect.collector.columns(n)), expert) {
            let largest = self.largest.entry(names[0].to_string()).or_insert_with(|| vec![0.0; columns]);
            for row in x.chunks_exact(columns) {
                largest.iter_mut().zip(row).for_each(|(l, v)| *l = l.max(v.abs()));
            }
        }
        Ok(())
    }
}

/// A weight matrix behind an input: tensor, expert, second moments of what reaches it.
struct Reader<'a> {
    name: String,
    expert: usize,
    moments: &'a Moments,
}

/// Scales of [`Preset::SmoothQuant`] or [`Preset::Awq`]; `done` hears of every layer.
pub fn run(job: &Job<'_>, preset: Preset, done: &mut dyn FnMut(usize)) -> Result<Transforms, TransformError> {
    let (model, layers) = (job.model, job.anatomy.spec.layers);
    let name = match preset {
        Preset::SmoothQuant => format!("{} alpha={}", preset.name(), job.alpha),
        preset => preset.name().to_string(),
    };
    let mut t = Transforms::identity(&name, layers);
    let mut runner = Runner::new(model, job.length, Activations::F32)?;
    let mut hidden = Hidden::Memory(vec![0.0; job.tokens.len() * model.spec.embed]);
    runner.embed(job.tokens, &mut hidden)?;
    for l in 0..layers {
        let second = preset == Preset::Awq;
        let collect = Collect::new(specs(model, l, second)).map_err(|e| TransformError::Other(e.to_string()))?;
        let mut sight = Sight { collect, largest: HashMap::new() };
        runner.layer_in_place(l, &mut hidden, job.tokens.len(), BATCH, &mut sight)?;
        match preset {
            Preset::SmoothQuant => smooth(job, l, &sight, &mut t),
            _ => awq(job, l, &sight, &mut t)?,
        }
        done(l + 1);
    }
    Ok(t)
}

/// Names of the weights of `parts` that layer `l` has.
fn present(job: &Job<'_>, l: usize, parts: &[&str]) -> Vec<String> {
    let has = |n: &String| job.model.source().tensors().iter().any(|t| t.name == *n);
    parts.iter().map(|p| format!("blk.{l}.{p}.weight")).filter(has).collect()
}

const ATTENTION: &[&str] = &["attn_qkv", "attn_q", "attn_k", "attn_v"];
const FEED_FORWARD: &[&str] = &["ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps"];

fn smooth(job: &Job<'_>, l: usize, sight: &Sight, t: &mut Transforms) {
    for (pair, parts, shown) in [
        (Pair::Attention, ATTENTION, &["attn_qkv", "attn_q"][..]),
        (Pair::FeedForward, FEED_FORWARD, &["ffn_gate", "ffn_up", "ffn_gate_inp"][..]),
    ] {
        let x = present(job, l, shown).into_iter().find_map(|n| sight.largest.get(&n));
        let Some(x) = x.filter(|_| job.anatomy.admits(pair)) else { continue };
        let mut w = vec![0f32; x.len()];
        for name in present(job, l, parts) {
            let index = index(job.model, &name);
            let rows = job.model.source().tensors()[index].rows();
            let mut row = vec![0f32; x.len()];
            for r in 0..rows {
                job.model.source().read_rows(index, r..r + 1, &mut row);
                w.iter_mut().zip(&row).for_each(|(w, v)| *w = w.max(v.abs()));
            }
            job.model.source().release(index, 0..rows);
        }
        let s = x.iter().zip(&w).map(|(x, w)| match f64::from(*x) {
            x if x > 0.0 && *w > 0.0 => x.powf(job.alpha) / f64::from(*w).powf(1.0 - job.alpha),
            _ => 1.0,
        });
        *t.slot(pair, l) = Some(centred(s.collect()));
    }
}

/// `s / √(max s · min s)`, as AWQ's code does it: the range lies about 1.
fn centred(s: Vec<f64>) -> Vec<f64> {
    let (low, high) = s.iter().fold((f64::MAX, 0f64), |(l, h), v| (l.min(*v), h.max(*v)));
    let middle = (low * high).sqrt();
    s.iter().map(|v| v / middle).collect()
}

fn index(model: &Model<'_>, name: &str) -> usize {
    model.source().tensors().iter().position(|t| t.name == name).expect("a name of the model")
}

fn awq(job: &Job<'_>, l: usize, sight: &Sight, t: &mut Transforms) -> Result<(), TransformError> {
    let spec = &job.anatomy.spec;
    let moments = |parts: &[&str]| present(job, l, parts).iter().find_map(|n| sight.collect.collector.moments(n));
    let readers = |parts: &[&str]| {
        let mut all = Vec::new();
        for name in present(job, l, parts) {
            let own = sight.collect.collector.moments(&name).unwrap_or_default();
            all.extend(own.iter().enumerate().map(|(expert, moments)| Reader { name: name.clone(), expert, moments }));
        }
        all
    };
    let rms =
        |m: &[Moments]| -> Option<Vec<f64>> { Some(m.first()?.mean_square()?.iter().map(|v| v.sqrt()).collect()) };
    let same = |s: &[f64]| s.to_vec();
    for (pair, parts, shown) in [
        (Pair::Attention, ATTENTION, &["attn_qkv", "attn_q"][..]),
        (Pair::FeedForward, FEED_FORWARD, &["ffn_gate_inp", "ffn_gate", "ffn_up"][..]),
    ] {
        if let Some(rms) = moments(shown).and_then(rms).filter(|_| job.anatomy.admits(pair)) {
            *t.slot(pair, l) = choose(job, &readers(parts), &rms, &same)?;
        }
    }
    // the channels of a KV head are those of all its query heads
    let (n, group) = (spec.head_dim, spec.heads / spec.kv_heads);
    if let Some(rms) = moments(&["attn_output"]).and_then(rms).filter(|_| job.anatomy.admits(Pair::ValueScales)) {
        let of = |c: usize| {
            let squares = (0..group).map(|h| rms[(c / n * group + h) * n + c % n].powi(2));
            (squares.sum::<f64>() / group as f64).sqrt()
        };
        let mean: Vec<f64> = (0..spec.kv_heads * n).map(of).collect();
        let expand = |s: &[f64]| (0..spec.heads * n).map(|c| s[c / n / group * n + c % n]).collect::<Vec<f64>>();
        t.layers[l].s_ov = choose(job, &readers(&["attn_output"]), &mean, &expand)?;
    }
    let down = readers(&["ffn_down", "ffn_down_exps"]);
    let mut all = Vec::new();
    for reader in &down {
        let found = match rms(std::slice::from_ref(reader.moments)) {
            Some(rms) => choose(job, std::slice::from_ref(reader), &rms, &same)?,
            None => None,
        };
        all.extend(found.unwrap_or_else(|| vec![1.0; job.anatomy.feed_forward[l]]));
    }
    if all.iter().any(|s| *s != 1.0) {
        t.layers[l].s_ud = Some(all);
    }
    Ok(())
}

/// The power of `rms` with the least error of all `readers`; `None` where no scale is better than none. `expand`: scales as
/// columns of the readers.
fn choose(
    job: &Job<'_>,
    readers: &[Reader<'_>],
    rms: &[f64],
    expand: &(dyn Fn(&[f64]) -> Vec<f64> + Sync),
) -> Result<Option<Vec<f64>>, TransformError> {
    let largest = rms.iter().copied().fold(0.0, f64::max);
    if largest.is_nan() || largest <= 0.0 {
        return Ok(None);
    }
    let samples: Vec<Sample<'_>> = readers.iter().filter_map(|r| Sample::new(job, r)).collect();
    let scales = |a: usize| {
        // channels that are hardly ever used do not get endless scales
        let power = |v: &f64| v.max(1e-4 * largest).powf(a as f64 / GRID as f64);
        centred(rms.iter().map(power).collect())
    };
    let errors: Vec<f64> = (0..=GRID)
        .into_par_iter()
        .map(|a| {
            let s = expand(&scales(a));
            samples.iter().try_fold(0.0, |sum, sample| Ok(sum + sample.error(&s)?))
        })
        .collect::<Result<_, TransformError>>()?;
    let best = (0..=GRID).min_by(|&a, &b| errors[a].total_cmp(&errors[b])).expect("a grid");
    Ok((errors[best] < errors[0]).then(|| scales(best)))
}

/// Some rows of a weight and what its errors are weighed with.
struct Sample<'a> {
    name: &'a str,
    format: &'static dyn BlockFormat,
    ty: GgmlType,
    columns: usize,
    rows: Vec<f32>,
    /// Rows of the weight for each row here.
    each: f64,
    /// `[columns, columns]`.
    hessian: Vec<f64>,
    /// Mean squares of the input.
    squares: Vec<f64>,
}

impl<'a> Sample<'a> {
    fn new(job: &Job<'_>, reader: &'a Reader<'_>) -> Option<Sample<'a>> {
        let ty = (job.types)(&reader.name).filter(|t| t.is_quantized())?;
        let index = index(job.model, &reader.name);
        let source = job.model.source();
        let t = &source.tensors()[index];
        let (columns, height) = (t.row_len() as usize, t.dims[1]);
        let (first, count) = (reader.expert as u64 * height, height.min(ROWS as u64));
        let mut rows = vec![0f32; count as usize * columns];
        for (i, out) in rows.chunks_exact_mut(columns).enumerate() {
            let row = first + i as u64 * height / count;
            source.read_rows(index, row..row + 1, out);
        }
        source.release(index, first..first + height);
        Some(Sample {
            name: &reader.name,
            format: formats::format(ty)?,
            ty,
            columns,
            rows,
            each: height as f64 / count as f64,
            hessian: linalg::unpack(reader.moments.second()?, columns),
            squares: reader.moments.mean_square()?,
        })
    }

    /// `tr(ΔW H ΔWᵀ)` of nearest rounding of `W diag(s)`, as an error of `W`.
    fn error(&self, s: &[f64]) -> Result<f64, TransformError> {
        let n = self.columns;
        let scaled: Vec<f32> = self.rows.iter().enumerate().map(|(i, w)| (f64::from(*w) * s[i % n]) as f32).collect();
        let importance: Vec<f32> = self.squares.iter().zip(s).map(|(x, s)| (x / (s * s)) as f32).collect();
        let mut bytes = vec![0; scaled.len() / self.ty.block_len() * self.ty.block_bytes()];
        let encoded = self.format.encode(&scaled, n, Some(&importance), &mut bytes);
        encoded.map_err(|source| TransformError::Format { tensor: self.name.to_string(), source })?;
        let mut back = vec![0f32; scaled.len()];
        self.format.decode(&bytes, &mut back);
        let delta: Vec<f64> = back
            .iter()
            .zip(&self.rows)
            .enumerate()
            .map(|(i, (b, w))| f64::from(*b) / s[i % n] - f64::from(*w))
            .collect();
        let mut product = vec![0.0; delta.len()];
        linalg::gemm_f64(&mut product, &delta, &self.hessian, (delta.len() / n, n, n), Par::Seq);
        Ok(self.each * product.iter().zip(&delta).map(|(p, d)| p * d).sum::<f64>())
    }
}
