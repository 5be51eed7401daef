//! Transforms change no logits, whatever the structure of the model; what a model does not admit is refused.

mod common;
#[path = "common/decoder.rs"]
mod decoder;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use decoder::{KINDS, Kind, Memory, Numbers, logits, random_transforms};
use ostq_convert::forward::{ForwardError, Observer};
use ostq_convert::gguf::Metadata;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::source::TensorSource;
use ostq_convert::transform::{Anatomy, Pair, TransformedSource, Transforms, preset};

const PATH: &str = "memory";

fn kind(name: &str) -> Kind {
    *KINDS.iter().find(|k| k.name == name).unwrap()
}

fn admitted(model: &Anatomy) -> Vec<Pair> {
    Pair::ALL.into_iter().filter(|p| model.admits(*p)).collect()
}

/// Largest difference of logits, by their standard deviation.
fn moved(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let n = a.len() as f64;
    let mean = a.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let std = (a.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n).sqrt();
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, f64::max) / std
}

fn behind(source: Box<dyn TensorSource>, metadata: &Metadata, t: Transforms) -> TransformedSource {
    TransformedSource::new(Path::new(PATH), source, metadata, Arc::new(t)).unwrap_or_else(|e| panic!("{e}"))
}

/// All admitted pairs of a model at once and each alone leave its logits; the largest movement.
fn keeps(name: &str, open: &dyn Fn() -> Box<dyn TensorSource>, metadata: &Metadata, ids: &[u32]) -> f64 {
    let source = open();
    let model = Anatomy::new(Path::new(PATH), &*source, metadata).unwrap_or_else(|e| panic!("{name}: {e}"));
    let before = logits(&*source, metadata, ids, &mut ());
    let all = admitted(&model);
    let mut most = 0f64;
    for pairs in all.iter().map(std::slice::from_ref).chain([&all[..]]) {
        let t = random_transforms(&model, pairs, 5);
        let after = logits(&behind(open(), metadata, t), metadata, ids, &mut ());
        let d = moved(&before, &after);
        assert!(d < 1e-3, "{name}, {pairs:?}: {d:.2e} of the standard deviation");
        // f32 weights were really changed
        assert!(before != after, "{name}, {pairs:?}: nothing happened");
        most = most.max(d);
    }
    most
}

#[test]
fn every_structure_keeps_its_function() {
    let ids: Vec<u32> = (0..40).map(|i| i * 29 % 70).collect();
    for kind in KINDS {
        let metadata = kind.metadata();
        let d = keeps(kind.name, &|| Box::new(kind.weights()), &metadata, &ids);
        println!("{}: {d:.1e} of the standard deviation", kind.name);
    }
}

#[test]
fn checkpoints_keep_their_function() {
    let mut folders = vec![common::program::fixture("tiny")];
    if let Some(shared) = common::shared() {
        let all = std::fs::read_dir(shared.join("models")).unwrap().flatten().map(|e| e.path());
        let mut all: Vec<_> = all.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("random-")).collect();
        all.sort();
        folders.extend(all);
    }
    let mut done = 0;
    for folder in folders {
        let options = Options::resolve(Recipe { r#type: Some("q8_0".into()), ..Recipe::default() }).unwrap();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let input = match Input::open(&folder, &options) {
            Ok(input) => input,
            Err(e) => {
                println!("{name}: not read yet ({e})");
                continue;
            }
        };
        if let Err(e) = Anatomy::new(&folder, &*input.source, &input.metadata) {
            println!("{name}: no transforms ({e})");
            continue;
        }
        let open = || Input::open(&folder, &options).unwrap().source;
        let ids: Vec<u32> = (0..64).map(|i| 3 + i * 37 % 250).collect();
        println!("{name}: {:.1e} of the standard deviation", keeps(&name, &open, &input.metadata, &ids));
        done += 1;
    }
    assert!(done > 0);
}

/// Scales of q and k that are not equal within a rotary pair, as they were once published.
#[test]
fn untied_scales_of_q_and_k_move_logits() {
    let ids: Vec<u32> = (0..40).map(|i| i * 29 % 70).collect();
    let kind = kind("llama");
    let before = logits(&kind.weights(), &kind.metadata(), &ids, &mut ());
    let mut untied = kind.weights();
    let mut numbers = Numbers(3);
    for l in 0..decoder::LAYERS {
        let s: Vec<f64> = (0..decoder::KV_HEADS * decoder::HEAD).map(|_| 2f64.powf(numbers.next())).collect();
        let group = decoder::HEADS / decoder::KV_HEADS;
        let n = decoder::HEAD;
        for (r, row) in untied.get(&format!("blk.{l}.attn_q.weight")).chunks_exact_mut(decoder::EMBED).enumerate() {
            row.iter_mut().for_each(|v| *v = (f64::from(*v) / s[r / n / group * n + r % n]) as f32);
        }
        for (r, row) in untied.get(&format!("blk.{l}.attn_k.weight")).chunks_exact_mut(decoder::EMBED).enumerate() {
            row.iter_mut().for_each(|v| *v = (f64::from(*v) * s[r]) as f32);
        }
    }
    let d = moved(&before, &logits(&untied, &kind.metadata(), &ids, &mut ()));
    assert!(d > 0.1, "{d:.2e}");
}

#[test]
fn what_a_structure_does_not_admit_is_refused_with_the_reason() {
    let refused = |name: &str, pair: Pair| {
        let kind = kind(name);
        let model = Anatomy::new(Path::new(PATH), &kind.weights(), &kind.metadata()).unwrap();
        let t = random_transforms(&model, &[pair], 1);
        let made = TransformedSource::new(Path::new(PATH), Box::new(kind.weights()), &kind.metadata(), Arc::new(t));
        made.err().unwrap_or_else(|| panic!("{name} took {pair:?}")).to_string()
    };
    assert!(refused("gemma2", Pair::Stream).contains("post_attention_norm"));
    assert!(refused("olmo2", Pair::Stream).contains("post_attention_norm"));
    assert!(refused("olmo2", Pair::Attention).contains("no `blk.0.attn_norm.weight`"));
    assert!(refused("olmo2", Pair::FeedForward).contains("no `blk.0.ffn_norm.weight`"));
    for name in ["qwen3", "qwen3moe", "gemma3", "olmo2"] {
        assert!(refused(name, Pair::QueryKey).contains("q and k are normalised"), "{name}");
    }
    let mut strange = kind("llama").weights();
    strange.push("blk.0.reader_of_the_stream.weight", &[48, 4], vec![0.0; 192]);
    let error = Anatomy::new(Path::new(PATH), &strange, &kind("llama").metadata()).unwrap_err().to_string();
    assert!(error.contains("reader_of_the_stream"), "{error}");
}

#[test]
fn wrong_values_are_refused_with_numbers() {
    let kind = kind("llama");
    let model = Anatomy::new(Path::new(PATH), &kind.weights(), &kind.metadata()).unwrap();
    let error = |change: &dyn Fn(&mut Transforms)| {
        let mut t = random_transforms(&model, &Pair::ALL, 2);
        t.check(&model).unwrap();
        change(&mut t);
        t.check(&model).unwrap_err().to_string()
    };
    let e = error(&|t| t.r_res.as_mut().unwrap()[5] += 1e-4);
    assert!(e.contains("`r_res`: not orthogonal") && e.contains("1e-6"), "{e}");
    let e = error(&|t| t.layers[1].r_ov.as_mut().unwrap()[300] += 1e-3);
    assert!(e.contains("`blk.1.r_ov[1]`: not orthogonal"), "{e}");
    let e = error(&|t| t.layers[2].s_ud.as_mut().unwrap()[7] = 0.0);
    assert!(e.contains("`blk.2.s_ud`: scales must be above 0, element 7 is 0"), "{e}");
    let e = error(&|t| t.layers[0].s_qk.as_mut().unwrap()[3] = f64::NAN);
    assert!(e.contains("`blk.0.s_qk`: holds NaN at 3"), "{e}");
    let e = error(&|t| t.layers[0].s_attn.as_mut().unwrap().truncate(5));
    assert!(e.contains("`blk.0.s_attn`: has shape [5], this model wants [48]"), "{e}");
    assert!(error(&|t| t.layers.truncate(2)).contains("has shape [2], this model wants [3]"));
}

#[test]
fn rows_come_out_alike_in_any_portions() {
    for name in ["llama with biases, tied", "phi3", "qwen3moe"] {
        let kind = kind(name);
        let model = Anatomy::new(Path::new(PATH), &kind.weights(), &kind.metadata()).unwrap();
        let source =
            behind(Box::new(kind.weights()), &kind.metadata(), random_transforms(&model, &admitted(&model), 8));
        let whole = Memory::of(&source);
        for (i, t) in source.tensors().iter().enumerate().filter(|(_, t)| t.dims.len() > 1) {
            let n = t.row_len();
            for step in [1, 3, 17, 29] {
                for at in (0..t.rows()).step_by(step) {
                    let to = (at + step as u64).min(t.rows());
                    let mut part = vec![0f32; ((to - at) * n) as usize];
                    source.read_rows(i, at..to, &mut part);
                    let want = &whole.values[i][(at * n) as usize..(to * n) as usize];
                    assert!(part == want, "{name}: {} rows {at}..{to}", t.name);
                    let mut bytes = vec![0; part.len() * 4];
                    source.copy_rows(i, at..to, &mut bytes);
                    assert!(bytes == part.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
                }
            }
        }
    }
}

/// Σxxᵀ of every input, by weight and expert.
#[derive(Default)]
struct Seconds(HashMap<(String, usize), Vec<f64>>);

impl Observer for Seconds {
    fn input(&mut self, names: &[&str], expert: Option<(usize, usize)>, x: &[f32]) -> Result<(), ForwardError> {
        for name in names {
            let n = match *name {
                n if n.contains("attn_output") => decoder::HEADS * decoder::HEAD,
                n if n.contains("ffn_down") => decoder::FF,
                _ => decoder::EMBED,
            };
            let key = (name.to_string(), expert.map_or(0, |(e, _)| e));
            let h = self.0.entry(key).or_insert_with(|| vec![0.0; n * n]);
            for row in x.chunks_exact(n) {
                for i in 0..n {
                    (0..n).for_each(|j| h[i * n + j] += f64::from(row[i]) * f64::from(row[j]));
                }
            }
        }
        Ok(())
    }
}

/// Second moments that were carried over are those that are collected behind the transforms.
#[test]
fn second_moments_are_carried_over() {
    let ids: Vec<u32> = (0..40).map(|i| i * 29 % 70).collect();
    for name in ["llama with biases, tied", "llama, experts", "phi3", "gemma3"] {
        let kind = kind(name);
        let metadata = kind.metadata();
        let model = Anatomy::new(Path::new(PATH), &kind.weights(), &metadata).unwrap();
        let (mut before, mut after) = (Seconds::default(), Seconds::default());
        logits(&kind.weights(), &metadata, &ids, &mut before);
        let source = behind(Box::new(kind.weights()), &metadata, random_transforms(&model, &admitted(&model), 4));
        logits(&source, &metadata, &ids, &mut after);
        for ((weight, expert), h) in before.0 {
            // the head of a tied model has another name afterwards
            let weight = if source.unties() && weight == "token_embd.weight" { "output.weight".into() } else { weight };
            let n = h.len().isqrt();
            let map = source.input_map(&weight).unwrap();
            let mut mapped = h.clone();
            map.hessian(&mut mapped, n, expert);
            let want = &after.0[&(weight.clone(), expert)];
            let size = want.iter().map(|v| v.abs()).fold(0.0, f64::max);
            let off = mapped.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / size;
            assert!(off < 1e-4, "{name}: {weight}, expert {expert}: {off:.1e}");
            let diagonal: Vec<f32> = (0..n).map(|i| h[i * n + i] as f32).collect();
            match map.importance(&diagonal, expert) {
                Some(moved) => assert!(
                    (0..n).all(|i| (f64::from(moved[i]) - want[i * n + i]).abs() < 1e-4 * size),
                    "{name}: {weight}"
                ),
                None => assert!(!map.is_diagonal(), "{name}: {weight}"),
            }
        }
    }
}

#[test]
fn presets_rotate_what_the_model_admits() {
    let made = |name: &str, seed| {
        let kind = kind(name);
        let model = Anatomy::new(Path::new(PATH), &kind.weights(), &kind.metadata()).unwrap();
        let womi = preset::womi(&model, &kind.weights(), seed).unwrap();
        let quarot = preset::quarot(&model, seed);
        womi.check(&model).unwrap();
        quarot.check(&model).unwrap();
        (quarot, womi, model)
    };
    let (quarot, womi, _) = made("llama", 0);
    assert!(quarot.r_res.is_some() && womi.r_res.is_some() && quarot.layers[2].r_ov.is_some());
    assert!(quarot.digest() != made("llama", 1).0.digest() && quarot.digest() == made("llama", 0).0.digest());
    let (quarot, womi, model) = made("gemma2", 0);
    assert!(quarot.r_res.is_none() && womi.r_res.is_none() && womi.layers[0].r_ov.is_some());
    let said = preset::left_out(preset::Preset::QuaRot, &model);
    assert!(said.len() == 1 && said[0].contains("`r_res` left out"), "{said:?}");
}

/// After WOMI every column of the stacked readers has the same variance.
#[test]
fn womi_levels_the_columns_of_readers() {
    let kind = kind("llama");
    let model = Anatomy::new(Path::new(PATH), &kind.weights(), &kind.metadata()).unwrap();
    let t = preset::womi(&model, &kind.weights(), 0).unwrap();
    let n = decoder::EMBED;
    let r = t.r_res.clone();
    let source =
        behind(Box::new(kind.weights()), &kind.metadata(), Transforms { r_res: r, ..Transforms::identity("r", 3) });
    let all = Memory::of(&source);
    let mut rows: Vec<&[f32]> = Vec::new();
    for (t, v) in all.tensors.iter().zip(&all.values) {
        if ["attn_q.", "attn_k.", "attn_v.", "ffn_gate.", "ffn_up."].iter().any(|p| t.name.contains(p)) {
            rows.extend(v.chunks_exact(n));
        }
    }
    let count = rows.len() as f64;
    let variance = |c: usize| {
        let mean = rows.iter().map(|r| f64::from(r[c])).sum::<f64>() / count;
        rows.iter().map(|r| (f64::from(r[c]) - mean).powi(2)).sum::<f64>() / count
    };
    let all: Vec<f64> = (0..n).map(variance).collect();
    let mean = all.iter().sum::<f64>() / n as f64;
    // 48 = 4 x 12: a Hadamard matrix of the whole width
    assert!(all.iter().all(|v| (v / mean - 1.0).abs() < 1e-5), "{all:?}");
}
