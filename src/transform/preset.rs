//! Transforms in closed form, by name, so that the field can be compared in one program.
//!
//! `quarot` and `womi` are made from shapes and weights, `smoothquant` and `awq` ([`super::scales`]) from a calibration too.
//! `spinquant` and `ostquant` are learned ([`crate::learning`]) from what `quarot` and `womi` begin with.

use super::TransformError;
use super::anatomy::{Anatomy, Pair};
use super::set::Transforms;
use crate::linalg::hadamard;
use crate::linalg::random::Random;
use crate::linalg::{self, Par};
use crate::source::TensorSource;

/// What `--transform` names beside files.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Preset {
    /// Nothing.
    None,
    /// `s = absmax(x)^α / absmax(w)^(1-α)` before q, k, v and before gate, up (Xiao et al., arXiv 2211.10438, eq. 4).
    SmoothQuant,
    /// `s = rms(x)^a` at every site, `a` by the error of the output (Lin et al., arXiv 2306.00978, section 3.2).
    Awq,
    /// Random Hadamard rotations of the stream and of values (Ashkboos et al., arXiv 2404.00456).
    QuaRot,
    /// Eigenbasis of the weights that read the stream, then a random Hadamard (OSTQuant, arXiv 2501.13987, section 4.3).
    Womi,
    /// Rotations of the stream and of values, learned (Liu et al., arXiv 2405.16406).
    SpinQuant,
    /// Rotations and scales, learned (arXiv 2501.13987).
    OstQuant,
    /// The one of these that pays, or none.
    Auto,
}

impl Preset {
    /// Names, in the order in which they are explained.
    pub const ALL: [(&'static str, Preset); 8] = [
        ("none", Preset::None),
        ("smoothquant", Preset::SmoothQuant),
        ("awq", Preset::Awq),
        ("quarot", Preset::QuaRot),
        ("womi", Preset::Womi),
        ("spinquant", Preset::SpinQuant),
        ("ostquant", Preset::OstQuant),
        ("auto", Preset::Auto),
    ];

    /// By name; `auto:` and a list is `auto`.
    pub fn parse(name: &str) -> Option<Preset> {
        let name = if Preset::listed(name).is_some() { "auto" } else { name };
        Preset::ALL.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, p)| *p)
    }

    /// What stands behind `auto:`.
    fn listed(name: &str) -> Option<&str> {
        name.split_once(':').filter(|(auto, _)| auto.eq_ignore_ascii_case("auto")).map(|(_, list)| list)
    }

    /// What `auto` tries: all presets, or those that `auto:quarot,womi` lists.
    pub fn candidates(name: &str) -> Result<Vec<Preset>, String> {
        let tried = |p: &Preset| !matches!(p, Preset::None | Preset::Auto);
        let Some(list) = Preset::listed(name) else {
            return Ok(Preset::ALL.iter().map(|(_, p)| *p).filter(tried).collect());
        };
        let one = |n: &str| {
            Preset::parse(n)
                .filter(tried)
                .ok_or_else(|| format!("`{n}` is not smoothquant, awq, quarot, womi, spinquant or ostquant"))
        };
        list.split(',').map(one).collect()
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Preset::ALL.iter().find(|(_, p)| *p == self).expect("all are listed").0
    }

    /// True if activations over a text are needed.
    pub fn calibrates(self) -> bool {
        !matches!(self, Preset::None | Preset::QuaRot | Preset::Womi)
    }

    /// True if it is learned, step by step.
    pub fn learns(self) -> bool {
        matches!(self, Preset::SpinQuant | Preset::OstQuant)
    }
}

/// What the rotating presets leave out for `model`, and why.
pub fn left_out(preset: Preset, model: &Anatomy) -> Vec<String> {
    let pairs: &[Pair] = match preset {
        // each of those that are tried has its own
        Preset::None | Preset::Auto => &[],
        Preset::SmoothQuant => &[Pair::Attention, Pair::FeedForward],
        Preset::Awq => &[Pair::Attention, Pair::FeedForward, Pair::ValueScales, Pair::UpDown],
        Preset::QuaRot | Preset::Womi | Preset::SpinQuant => &[Pair::Stream, Pair::Values],
        Preset::OstQuant => &Pair::ALL,
    };
    let say = |p: &Pair| Some(format!("{}: `{}` left out: {}", preset.name(), p.name(), model.refusal(*p)?));
    pairs.iter().filter_map(say).collect()
}

/// A rotation of each KV head from `make`, of all layers.
fn values(
    t: &mut Transforms,
    model: &Anatomy,
    mut make: impl FnMut(usize, usize) -> Result<Vec<f64>, TransformError>,
) -> Result<(), TransformError> {
    if !model.admits(Pair::Values) {
        return Ok(());
    }
    for l in 0..model.spec.layers {
        let heads = (0..model.spec.kv_heads).map(|g| make(l, g)).collect::<Result<Vec<_>, _>>()?;
        t.layers[l].r_ov = Some(heads.concat());
    }
    Ok(())
}

/// [`Preset::QuaRot`]: what the model admits of it.
pub fn quarot(model: &Anatomy, seed: u64) -> Transforms {
    let mut random = Random::new(seed);
    let mut t = Transforms::identity(Preset::QuaRot.name(), model.spec.layers);
    if model.admits(Pair::Stream) {
        t.r_res = Some(hadamard::rotation(model.spec.embed, &mut random));
    }
    values(&mut t, model, |_, _| Ok(hadamard::rotation(model.spec.head_dim, &mut random))).expect("nothing can fail");
    t
}

/// [`Preset::Womi`]: what the model admits of it. Reads the weights twice at most.
pub fn womi(model: &Anatomy, source: &dyn TensorSource, seed: u64) -> Result<Transforms, TransformError> {
    let mut random = Random::new(seed);
    let mut t = Transforms::identity(Preset::Womi.name(), model.spec.layers);
    let n = model.spec.embed;
    if model.admits(Pair::Stream) {
        let covariance = readers(model, source);
        t.r_res = Some(basis(&covariance, n, &mut random)?);
    }
    let (head, group) = (model.spec.head_dim, model.spec.heads / model.spec.kv_heads);
    let (width, square) = (model.spec.heads * head, head * head);
    let mut seconds = (usize::MAX, Vec::new());
    values(&mut t, model, |l, g| {
        if seconds.0 != l {
            // the columns of the query heads of a KV head are its samples
            let mut all = vec![0.0; model.spec.kv_heads * square];
            each(source, &format!("blk.{l}.attn_output.weight"), |w| {
                for (g, second) in all.chunks_exact_mut(square).enumerate() {
                    let of = |row: &[f64]| row[g * group * head..][..group * head].to_vec();
                    let samples: Vec<f64> = w.chunks_exact(width).flat_map(of).collect();
                    linalg::syrk_f64(second, &samples, samples.len() / head, head, linalg::all_threads());
                }
            });
            seconds = (l, all);
        }
        basis(&seconds.1[g * square..][..square], head, &mut random)
    })?;
    Ok(t)
}

/// Eigenvectors of `a` (lower triangle) as columns, times a random Hadamard rotation.
fn basis(a: &[f64], n: usize, random: &mut Random) -> Result<Vec<f64>, TransformError> {
    // vectors[i] is row i of Uᵀ
    let (_, vectors) = linalg::eigen(a, n, Par::Seq)?;
    let h = hadamard::rotation(n, random);
    let mut r = vec![0.0; n * n];
    super::product::add_product(&mut r, &vectors, (1, n), &h, (n, n, n));
    Ok(r)
}

/// Rows of a weight at a time.
const STEP: u64 = 1024;

/// Rows of a weight, if it is there, portion by portion in f64.
fn each(source: &dyn TensorSource, name: &str, mut see: impl FnMut(&mut [f64])) {
    let Some(index) = source.tensors().iter().position(|t| t.name == name) else { return };
    let t = &source.tensors()[index];
    let mut values = Vec::new();
    for at in (0..t.rows()).step_by(STEP as usize) {
        let rows = at..(at + STEP).min(t.rows());
        values.resize(((rows.end - rows.start) * t.row_len()) as usize, 0f32);
        source.read_rows(index, rows.clone(), &mut values);
        source.release(index, rows);
        see(&mut values.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>());
    }
}

/// Covariance of the rows of all q, k, v, gate and up with the norms before them folded in; lower triangle.
fn readers(model: &Anatomy, source: &dyn TensorSource) -> Vec<f64> {
    const READERS: [(&str, &[&str]); 2] = [
        ("attn_norm", &["attn_q", "attn_k", "attn_v", "attn_qkv"]),
        ("ffn_norm", &["ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps"]),
    ];
    let n = model.spec.embed;
    let (mut second, mut sum, mut count) = (vec![0.0; n * n], vec![0.0; n], 0usize);
    for l in 0..model.spec.layers {
        for (norm, parts) in READERS {
            let mut gamma = vec![1.0; n];
            each(source, &format!("blk.{l}.{norm}.weight"), |g| gamma.copy_from_slice(g));
            for part in parts {
                each(source, &format!("blk.{l}.{part}.weight"), |w| {
                    for row in w.chunks_exact_mut(n) {
                        row.iter_mut().zip(&gamma).for_each(|(v, g)| *v *= g);
                        sum.iter_mut().zip(row).for_each(|(s, v)| *s += *v);
                    }
                    linalg::syrk_f64(&mut second, w, w.len() / n, n, linalg::all_threads());
                    count += w.len() / n;
                });
            }
        }
    }
    let count = count.max(1) as f64;
    for i in 0..n {
        for j in 0..=i {
            let v = &mut second[i * n + j];
            *v = *v / count - sum[i] / count * (sum[j] / count);
        }
    }
    second
}
