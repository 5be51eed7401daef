//! GPTQ of mixtures: every expert on its own tokens, the same blocks however it is run, few tokens said.

#[path = "common/decoder.rs"]
mod decoder;

use std::collections::BTreeMap;
use std::path::Path;

use decoder::{Memory, Numbers};
use ostq_convert::allocation::costs;
use ostq_convert::formats::format;
use ostq_convert::forward::{Activations, ForwardError, Hidden, Model, Observer, Runner, backward};
use ostq_convert::gguf::{GgmlType, Metadata, Value};
use ostq_convert::rounding::run::{self, Job};
use ostq_convert::rounding::state::{Report, RoundedTensors};

const EMBED: usize = 64;
const FF: usize = 96;
const EXPERTS: usize = 5;
const LAYERS: usize = 2;
const VOCAB: usize = 90;
const LENGTH: usize = 32;

/// A small mixture whose last expert is never taken.
fn mixture() -> (Memory, Metadata) {
    let mut numbers = Numbers(11);
    let mut m = Memory::default();
    m.matrix(&mut numbers, "token_embd.weight", &[EMBED, VOCAB], 6.0);
    m.get("token_embd.weight").chunks_exact_mut(EMBED).for_each(|row| row[0] = 5.0);
    for l in 0..LAYERS {
        let name = |part: &str| format!("blk.{l}.{part}.weight");
        for (part, dims) in [
            ("attn_q", vec![EMBED, EMBED]),
            ("attn_k", vec![EMBED, EMBED / 2]),
            ("attn_v", vec![EMBED, EMBED / 2]),
            ("attn_output", vec![EMBED, EMBED]),
            ("ffn_gate_inp", vec![EMBED, EXPERTS]),
            ("ffn_gate_exps", vec![EMBED, FF, EXPERTS]),
            ("ffn_up_exps", vec![EMBED, FF, EXPERTS]),
            ("ffn_down_exps", vec![FF, EMBED, EXPERTS]),
        ] {
            m.matrix(&mut numbers, &name(part), &dims, 1.5);
        }
        m.push(&name("attn_norm"), &[EMBED], vec![1.0; EMBED]);
        m.push(&name("ffn_norm"), &[EMBED], vec![1.0; EMBED]);
        // every input has a large first column: the last expert's logit is the least by far
        let router = m.get(&name("ffn_gate_inp"));
        router.chunks_exact_mut(EMBED).for_each(|row| row[0] = 0.0);
        router[(EXPERTS - 1) * EMBED] = -20.0;
    }
    m.push("output_norm.weight", &[EMBED], vec![1.0; EMBED]);
    m.matrix(&mut numbers, "output.weight", &[EMBED, VOCAB], 1.0);
    let mut keys: Metadata = vec![("general.architecture".into(), Value::from("llama"))];
    for (k, v) in [
        ("block_count", LAYERS),
        ("embedding_length", EMBED),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("context_length", 64),
        ("expert_count", EXPERTS),
        ("expert_used_count", 2),
    ] {
        keys.push((format!("llama.{k}"), Value::U32(v as u32)));
    }
    keys.push(("llama.attention.layer_norm_rms_epsilon".into(), Value::F32(1e-5)));
    (m, keys)
}

fn tokens(windows: usize) -> Vec<u32> {
    decoder::tokens(windows * LENGTH, VOCAB)
}

fn types(memory: &Memory, ty: GgmlType) -> BTreeMap<String, GgmlType> {
    let wanted = |n: &str| n.starts_with("blk.") && !n.contains("norm") && !n.contains("gate_inp");
    memory.tensors.iter().filter(|t| wanted(&t.name)).map(|t| (t.name.clone(), ty)).collect()
}

struct Run {
    one_pass: bool,
    keep: bool,
    batch: usize,
    threads: usize,
}

const PLAIN: Run = Run { one_pass: false, keep: true, batch: 4, threads: 2 };

/// Values of every rounded tensor, and the reports.
fn round(r: &Run, types: &BTreeMap<String, GgmlType>) -> (BTreeMap<String, Vec<f32>>, Vec<Report>) {
    let (memory, metadata) = mixture();
    let model = Model::new(Path::new("memory"), &memory, &metadata).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ids = tokens(60);
    let job = Job {
        model: &model,
        tokens: &ids,
        length: LENGTH,
        types: types.clone(),
        fingerprint: "f".into(),
        text: "t".into(),
        one_pass: r.one_pass,
        row_scales: false,
        batch: r.batch,
        backward: 0,
        keep: r.keep,
        state: folder.path(),
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(r.threads).build().unwrap();
    struct Silent;
    impl ostq_convert::calibration::run::Watch for Silent {
        fn layer(&mut self, _: usize) {}
        fn resumed(&mut self, _: usize) {}
    }
    let reports = pool.install(|| run::run(&job, &mut Silent)).unwrap();
    let rounded = RoundedTensors::open(folder.path(), types.clone().into_iter()).unwrap();
    let mut values = BTreeMap::new();
    for (name, &ty) in types {
        let t = memory.tensors.iter().find(|t| t.name == *name).unwrap();
        let count = t.elements() as usize;
        let mut bytes = vec![0u8; count / ty.block_len() * ty.block_bytes()];
        assert!(rounded.read(name, ty, 0, &mut bytes).unwrap(), "{name}");
        let mut v = vec![0f32; count];
        format(ty).unwrap().decode(&bytes, &mut v);
        values.insert(name.clone(), v);
    }
    (values, reports)
}

/// Σ x xᵀ of every expert's inputs in the float model.
#[derive(Default)]
struct Moments(BTreeMap<(String, usize), (usize, Vec<f64>)>);

impl Observer for Moments {
    fn input(&mut self, names: &[&str], expert: Option<(usize, usize)>, x: &[f32]) -> Result<(), ForwardError> {
        let Some((e, _)) = expert else { return Ok(()) };
        for name in names {
            let n = if name.contains("ffn_down") { FF } else { EMBED };
            let (count, h) = self.0.entry((name.to_string(), e)).or_insert_with(|| (0, vec![0.0; n * n]));
            for row in x.chunks_exact(n) {
                *count += 1;
                for i in 0..n {
                    for j in 0..n {
                        h[i * n + j] += f64::from(row[i]) * f64::from(row[j]);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Of the mixture on its text.
fn moments() -> Moments {
    let (memory, metadata) = mixture();
    let model = Model::new(Path::new("memory"), &memory, &metadata).unwrap();
    let ids = tokens(60);
    let mut runner = Runner::new(&model, LENGTH, Activations::F32).unwrap();
    let mut hidden = Hidden::Memory(vec![0.0; ids.len() * EMBED]);
    let mut moments = Moments::default();
    runner.embed(&ids, &mut hidden).unwrap();
    for l in 0..LAYERS {
        runner.layer_in_place(l, &mut hidden, ids.len(), 4, &mut moments).unwrap();
    }
    moments
}

/// With the float model's inputs, in the norm of each expert's own second moment, GPTQ is nearer than nearest rounding; the expert
/// that sees no token is what nearest rounding makes of it, and its report says so.
#[test]
fn experts_are_rounded_on_their_own_tokens() {
    let (memory, moments) = (mixture().0, moments());
    for ty in [GgmlType::Q4_0, GgmlType::IQ4_NL] {
        let types = types(&memory, ty);
        let (values, reports) = round(&Run { one_pass: true, ..PLAIN }, &types);
        let mut checked = 0;
        for (name, values) in values.iter().filter(|(n, _)| n.contains("_exps")) {
            let index = memory.tensors.iter().position(|t| t.name == *name).unwrap();
            let (w, n) = (&memory.values[index], memory.tensors[index].row_len() as usize);
            let size = w.len() / EXPERTS;
            let mut plain = vec![0f32; w.len()];
            let mut bytes = vec![0u8; w.len() / ty.block_len() * ty.block_bytes()];
            format(ty).unwrap().encode(w, n, None, &mut bytes).unwrap();
            format(ty).unwrap().decode(&bytes, &mut plain);
            for e in 0..EXPERTS {
                let own = e * size..(e + 1) * size;
                let Some((count, h)) = moments.0.get(&(name.clone(), e)).filter(|(c, _)| *c > 200) else {
                    assert_eq!(e, EXPERTS - 1, "{name}");
                    continue;
                };
                let error = |v: &[f32]| -> f64 {
                    let rows = v.chunks_exact(n).zip(w[own.clone()].chunks_exact(n));
                    let form = |(v, w): (&[f32], &[f32])| -> f64 {
                        let d: Vec<f64> = v.iter().zip(w).map(|(v, w)| f64::from(v - w)).collect();
                        (0..n * n).map(|at| d[at / n] * h[at] * d[at % n]).sum()
                    };
                    rows.map(form).sum()
                };
                let (own_error, nearest) = (error(&values[own.clone()]), error(&plain[own.clone()]));
                assert!(own_error < 0.9 * nearest, "{name} {e} of {count} tokens: {own_error} {nearest}");
                checked += 1;
            }
        }
        assert_eq!(checked, LAYERS * 3 * (EXPERTS - 1), "{ty}");
        let reports: Vec<&Report> = reports.iter().filter(|r| r.name.contains("_exps")).collect();
        assert_eq!(reports.len(), LAYERS * 3);
        assert!(reports.iter().all(|r| r.note.as_ref().unwrap().contains("1 of 5 experts saw hardly a token")));
        assert!(reports.iter().all(|r| r.error < r.nearest && r.held_out.is_some_and(|(own, n)| own < n)));
    }
}

#[test]
fn threads_batches_and_files_change_no_bit() {
    let types = types(&mixture().0, GgmlType::Q4_0);
    let (wanted, reports) = round(&PLAIN, &types);
    for other in [Run { threads: 1, ..PLAIN }, Run { keep: false, ..PLAIN }, Run { batch: 1, ..PLAIN }] {
        let (values, again) = round(&other, &types);
        assert!(values == wanted && again == reports);
    }
}

/// Tensors that nobody asked to round stay out of it, and the others of the layer come out.
#[test]
fn one_of_the_three_may_stay() {
    let mut types = types(&mixture().0, GgmlType::Q4_0);
    types.retain(|n, _| !n.contains("ffn_down_exps"));
    let (values, reports) = round(&PLAIN, &types);
    assert_eq!(values.keys().filter(|n| n.contains("_exps")).count(), LAYERS * 2);
    assert!(!reports.iter().any(|r| r.name.contains("ffn_down_exps")));
}

/// What types cost the experts of a mixture is ½ Σ E[g²] (ΔW H ΔWᵀ) with the mean squares of the inputs that they see, as far as they see
/// tokens; what GPTQ gains is one factor for all three. Dense linears and the head have costs, too, and more bits cost less.
#[test]
fn types_of_experts_cost_what_their_errors_do() {
    let (memory, metadata) = mixture();
    let model = Model::new(Path::new("memory"), &memory, &metadata).unwrap();
    let moments = moments();
    let ids = tokens(60);
    let folder = tempfile::tempdir().unwrap();
    let choices = [GgmlType::Q4_0, GgmlType::Q5_0, GgmlType::Q8_0];
    let mut all = types(&memory, GgmlType::Q4_0);
    all.extend(["token_embd.weight", "output.weight"].map(|n| (n.to_string(), GgmlType::Q4_0)));
    let candidates = all.keys().map(|n| (n.clone(), choices.to_vec())).collect();
    let (batch, state) = (4, folder.path());
    let job =
        costs::Job { model: &model, tokens: &ids, length: LENGTH, batch, backward: 8, candidates, gptq: true, state };
    let found = costs::run(&job, &mut |_, _| ()).unwrap();
    let fisher = backward::sample(&model, &ids, LENGTH, (8, batch), state, &mut |_| ()).unwrap();
    assert_eq!(found.len(), all.len());
    let mut gains = BTreeMap::new();
    for c in &found {
        assert!(c.choices.iter().all(|o| o.cost > 0.0) && c.choices.is_sorted_by(|a, b| a.cost > b.cost), "{c:?}");
        if !c.name.contains("_exps") {
            continue;
        }
        let index = memory.tensors.iter().position(|t| t.name == c.name).unwrap();
        let (w, n) = (&memory.values[index], memory.tensors[index].row_len() as usize);
        let (size, gradients) = (w.len() / EXPERTS, fisher.of(&c.name).unwrap());
        assert_eq!(gradients.len(), w.len() / n);
        // those that no token comes to
        for (e, g) in gradients.chunks(gradients.len() / EXPERTS).enumerate() {
            assert!(moments.0.contains_key(&(c.name.clone(), e)) || g.iter().all(|g| *g == 0.0), "{} {e}", c.name);
        }
        for (ty, choice) in choices.iter().zip(&c.choices) {
            let mut error = 0.0;
            for e in 0..EXPERTS {
                let Some((count, h)) = moments.0.get(&(c.name.clone(), e)) else { continue };
                let squares: Vec<f64> = (0..n).map(|i| h[i * n + i] / *count as f64).collect();
                let importance: Vec<f32> = squares.iter().map(|s| *s as f32).collect();
                let own = &w[e * size..(e + 1) * size];
                let mut bytes = vec![0u8; size / ty.block_len() * ty.block_bytes()];
                format(*ty).unwrap().encode(own, n, Some(&importance), &mut bytes).unwrap();
                let mut made = vec![0f32; size];
                format(*ty).unwrap().decode(&bytes, &mut made);
                for (i, (v, w)) in made.iter().zip(own).enumerate() {
                    error += 0.5 * gradients[e * size / n + i / n] * f64::from(v - w).powi(2) * squares[i % n];
                }
            }
            assert!((choice.nearest / error - 1.0).abs() < 1e-4, "{} {ty}: {} {error}", c.name, choice.nearest);
            let gain = choice.cost / choice.nearest;
            let layer = gains.entry(c.name.split('.').nth(1).unwrap().to_string()).or_insert(gain);
            assert!(gain < 1.0 && (gain / *layer - 1.0).abs() < 1e-9, "{}: {gain} {layer}", c.name);
        }
    }
}

/// The gradient at an embedding, through experts, their weights and the router, is what a small change of it does to the loss.
#[test]
fn gradients_of_a_mixture_are_differences_of_its_loss() {
    let (mut memory, metadata) = mixture();
    let (token, label) = (17u32, 40usize);
    let loss = |memory: &Memory| -> f64 {
        let logits = decoder::logits(memory, &metadata, &[token], &mut ());
        let largest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = logits.iter().map(|l| (f64::from(*l) - largest).exp()).sum();
        largest + sum.ln() - f64::from(logits[label])
    };
    let windows = backward::Windows { length: 1, batch: 1, first: 0 };
    let found = {
        let model = Model::new(Path::new("memory"), &memory, &metadata).unwrap();
        let labels = backward::Labels::Given(&[label as u32]);
        backward::fisher_of(&model, &[token], windows, labels, None, &mut |_| ()).unwrap().embedding
    };
    const STEP: f32 = 4e-3;
    let mut gradient = Vec::new();
    for i in 0..EMBED {
        let at = token as usize * EMBED + i;
        let was = memory.get("token_embd.weight")[at];
        let mut beside = |by: f32| {
            memory.get("token_embd.weight")[at] = was + by;
            loss(&memory)
        };
        let slope = (beside(STEP) - beside(-STEP)) / f64::from(2.0 * STEP);
        memory.get("token_embd.weight")[at] = was;
        gradient.push(slope);
    }
    let largest = gradient.iter().fold(0.0f64, |m, g| m.max(g * g));
    assert!(largest > 0.0);
    for i in 0..EMBED {
        for j in 0..=i {
            let (want, got) = (gradient[i] * gradient[j], found[i * (i + 1) / 2 + j]);
            assert!((want - got).abs() < 5e-3 * largest, "{i} {j}: {got} {want} {largest}");
        }
    }
}
