//! Transforms of other programs, as safetensors: names and meaning mapped to ours.
//!
//! | SpinQuant | OSTQuant | ours |
//! |---|---|---|
//! | `R1` | `R_res` | `r_res` |
//! | `model.layers.N.self_attn.R2` (one for all heads) | `model.layers.N.R_S_modules.R_ov.g` (one by KV head) | `blk.N.r_ov` |
//! | | `…S_norm_qkv`, `…S_norm_upgate` | `blk.N.s_attn`, `blk.N.s_ffn` |
//! | | `…S_ov`, `…S_up_down` | `blk.N.s_ov`, `blk.N.s_ud` |
//! | | `…S_qk` (`n_kv·hd` values, equal within a rotary pair) | `blk.N.s_qk` |
//!
//! All of them rotate from the right (`W R`), as here. A `.weight` in a name is ignored (`R_ov.weight.g`, `S_ov.weight`).

use super::TransformError;
use super::anatomy::{Anatomy, Pair};
use super::file::{Stored, put};
use super::set::Transforms;

/// Largest relative difference of scales that count as equal.
const TIED: f64 = 1e-6;

/// Reads `stored`, tensors of a foreign file called `name`.
pub(super) fn read(stored: Vec<Stored>, model: &Anatomy, name: &str) -> Result<Transforms, TransformError> {
    let mut t = Transforms::identity(name, model.spec.layers);
    let (n, heads) = (model.spec.head_dim, model.spec.kv_heads);
    let mut seen = vec![0; model.spec.layers];
    for s in stored {
        let Stored { name, shape, values } = s;
        let plain = name.replace(".weight", "");
        if plain == "R1" || plain == "R_res" {
            put(&mut t, model, Pair::Stream, 0, name, &shape, values)?;
            continue;
        }
        let unknown = || {
            let why = "neither a transform of this program nor one of SpinQuant or OSTQuant";
            TransformError::Other(format!("tensor `{name}`: {why}"))
        };
        let (layer, part) = plain.strip_prefix("model.layers.").and_then(|p| p.split_once('.')).ok_or_else(unknown)?;
        let layer: usize = layer.parse().ok().filter(|&l| l < model.spec.layers).ok_or_else(unknown)?;
        let part = part.strip_prefix("R_S_modules.").unwrap_or(part);
        let wrong = |expected: Vec<usize>| TransformError::Shape { name: name.clone(), found: shape.clone(), expected };
        match part {
            "self_attn.R2" => {
                if shape != [n, n] {
                    return Err(wrong(vec![n, n]));
                }
                let all = values.repeat(heads);
                put(&mut t, model, Pair::Values, layer, name, &[heads, n, n], all)?;
                seen[layer] = heads;
            }
            "R_ov" => {
                put(&mut t, model, Pair::Values, layer, name, &shape, values)?;
                seen[layer] = heads;
            }
            "S_norm_qkv" => put(&mut t, model, Pair::Attention, layer, name, &shape, values)?,
            "S_norm_upgate" => put(&mut t, model, Pair::FeedForward, layer, name, &shape, values)?,
            "S_ov" => put(&mut t, model, Pair::ValueScales, layer, name, &shape, values)?,
            "S_up_down" => put(&mut t, model, Pair::UpDown, layer, name, &shape, values)?,
            "S_qk" => {
                if shape != [heads * n] {
                    return Err(wrong(vec![heads * n]));
                }
                let tied = tied(&values, model, &name)?;
                put(&mut t, model, Pair::QueryKey, layer, name, &[heads, n / 2], tied)?;
            }
            _ => {
                let head: usize = part.strip_prefix("R_ov.").and_then(|g| g.parse().ok()).ok_or_else(unknown)?;
                if shape != [n, n] || head >= heads {
                    return Err(wrong(vec![n, n]));
                }
                if seen[layer] == 0 {
                    put(&mut t, model, Pair::Values, layer, name, &[heads, n, n], vec![0.0; heads * n * n])?;
                }
                seen[layer] += 1;
                let all = t.slot(Pair::Values, layer).as_mut().expect("just put");
                all[head * n * n..][..n * n].copy_from_slice(&values);
            }
        }
    }
    match seen.iter().position(|&s| s != 0 && s != heads) {
        Some(l) => {
            let (found, expected) = (vec![seen[l], n, n], vec![heads, n, n]);
            Err(TransformError::Shape { name: format!("model.layers.{l}: R_ov"), found, expected })
        }
        None => Ok(t),
    }
}

/// One scale for each rotary pair. The layout is that of the checkpoint: the members of a pair stand half the rotary width
/// apart.
fn tied(values: &[f64], model: &Anatomy, name: &str) -> Result<Vec<f64>, TransformError> {
    let (n, half) = (model.spec.head_dim, model.spec.rope_dims / 2);
    let mut out = Vec::with_capacity(values.len() / 2);
    for (head, s) in values.chunks_exact(n).enumerate() {
        for pair in 0..n / 2 {
            let (a, b) = if pair < half { (pair, pair + half) } else { (2 * pair, 2 * pair + 1) };
            if (s[a] - s[b]).abs() > TIED * s[a].abs().max(s[b].abs()) {
                return Err(TransformError::Other(format!(
                    "transform `{name}`: {} and {} at elements {a} and {b} of head {head}, which rotary embedding pairs: \
                     scales of q and k that differ within a pair change the model's function",
                    s[a], s[b]
                )));
            }
            out.push(s[a]);
        }
    }
    Ok(out)
}
