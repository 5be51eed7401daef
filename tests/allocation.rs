//! What types cost: the gain of GPTQ tensor by tensor, where rounding has it; the second moment of the head's input; what is measured.

use std::path::{Path, PathBuf};

use ostq_convert::allocation::costs::{self, TensorCosts};
use ostq_convert::allocation::measured;
use ostq_convert::forward::backward::{Labels, Windows, fisher_of};
use ostq_convert::forward::run::Head;
use ostq_convert::forward::{Activations, ForwardError, Hidden, Model, Observer, Runner};
use ostq_convert::gguf::GgmlType;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::rounding::run::weighs_embedding;
use ostq_convert::tuning::engine::{Engine, Processor};
use ostq_convert::tuning::layer::Rounded;
use ostq_convert::tuning::student::Student;

const LENGTH: usize = 16;

fn fixture() -> (PathBuf, Input) {
    let options = Options::resolve(Recipe { r#type: Some("q8_0".into()), ..Recipe::default() }).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny");
    let input = Input::open(&path, &options).unwrap_or_else(|e| panic!("{e}"));
    (path, input)
}

fn tokens() -> Vec<u32> {
    (0..40 * LENGTH as u32).map(|i| i * i % 487 + i % 13).collect()
}

/// Σ x xᵀ of the inputs of some linears, first tokens of windows left out.
struct Sums {
    names: [&'static str; 2],
    columns: [usize; 2],
    second: [Vec<f64>; 2],
    first: usize,
}

impl Observer for Sums {
    fn input(&mut self, names: &[&str], _: Option<(usize, usize)>, x: &[f32]) -> Result<(), ForwardError> {
        for k in 0..2 {
            if !names.contains(&self.names[k]) {
                continue;
            }
            let n = self.columns[k];
            self.second[k].resize(n * n, 0.0);
            for row in x.chunks_exact(n).enumerate().filter(|(t, _)| t % LENGTH >= self.first).map(|(_, row)| row) {
                for i in 0..n * n {
                    self.second[k][i] += f64::from(row[i / n]) * f64::from(row[i % n]);
                }
            }
        }
        Ok(())
    }
}

/// Σ 1 / U_jj² by Σ H_jj of the matrix `h` [n, n], damped by a hundredth: what is left of a column's variance when all later columns
/// are known, by elimination from the last column on.
fn left(mut h: Vec<f64>, n: usize) -> f64 {
    let mean = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
    (0..n).for_each(|i| h[i * n + i] += 0.01 * mean);
    let all: f64 = (0..n).map(|i| h[i * n + i]).sum();
    let mut kept = 0.0;
    // 1 / U_jj² is the pivot of column j when the columns behind it have been eliminated
    for j in (0..n).rev() {
        let pivot = h[j * n + j];
        kept += pivot;
        for a in 0..j {
            let f = h[a * n + j] / pivot;
            (0..j).for_each(|b| h[a * n + b] -= f * h[j * n + b]);
        }
    }
    kept / all
}

#[test]
fn costs_know_what_gptq_gains() {
    let (path, input) = fixture();
    let model = Model::new(&path, &*input.source, &input.metadata).unwrap();
    let ids = tokens();
    let mut sums = Sums {
        names: ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"],
        columns: [32, 256],
        second: Default::default(),
        first: 1,
    };
    let mut runner = Runner::new(&model, LENGTH, Activations::F32).unwrap();
    let mut hidden = Hidden::Memory(vec![0.0; ids.len() * model.spec.embed]);
    runner.embed(&ids, &mut hidden).unwrap();
    runner.layer_in_place(0, &mut hidden, ids.len(), 4, &mut sums).unwrap();
    let names = ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight"];
    let types = [GgmlType::Q4_0, GgmlType::Q5_1, GgmlType::Q8_0];
    let found = |gptq: bool| -> Vec<TensorCosts> {
        let folder = tempfile::tempdir().unwrap();
        let candidates = names.iter().map(|n| (n.to_string(), types.to_vec())).collect();
        let (model, tokens, state) = (&model, &ids[..], folder.path());
        let job = costs::Job { model, tokens, length: LENGTH, batch: 4, backward: 16, candidates, gptq, state };
        let mut costs = costs::run(&job, &mut |_, _| ()).unwrap();
        costs.sort_by_key(|c| names.iter().position(|n| *n == c.name));
        costs
    };
    let (with, without) = (found(true), found(false));
    assert_eq!(with.len(), 3);
    for (t, (a, b)) in with.iter().zip(&without).enumerate() {
        for (ty, (a, b)) in types.iter().zip(a.choices.iter().zip(&b.choices)) {
            let gain = a.cost / b.cost;
            match t {
                // the head as well; Q8_0 is rounded with all columns alike
                0 if !weighs_embedding(*ty, true) => assert_eq!((gain, *ty), (1.0, GgmlType::Q8_0)),
                0 => assert!(gain > 0.0 && gain < 0.95, "{ty}: {gain}"),
                _ => {
                    let wanted = left(sums.second[t - 1].clone(), sums.columns[t - 1]);
                    assert!((gain / wanted - 1.0).abs() < 1e-3, "{} {ty}: {gain} {wanted}", names[t]);
                    assert!(wanted < 0.95, "nothing to see");
                }
            }
        }
    }
}

#[test]
fn the_heads_input_is_summed_where_the_loss_counts() {
    let (path, input) = fixture();
    let model = Model::new(&path, &*input.source, &input.metadata).unwrap();
    let (ids, n) = (tokens(), model.spec.embed);
    let windows = Windows { length: LENGTH, batch: 3, first: 5 };
    let found = fisher_of(&model, &ids, windows, Labels::Sampled(1), None, &mut |_| {}).unwrap();
    let mut sums =
        Sums { names: ["token_embd.weight", ""], columns: [n, 1], second: Default::default(), first: windows.first };
    let mut runner = Runner::new(&model, LENGTH, Activations::F32).unwrap();
    let mut hidden = Hidden::Memory(vec![0.0; ids.len() * n]);
    runner.embed(&ids, &mut hidden).unwrap();
    runner.layer_in_place(0, &mut hidden, ids.len(), 4, &mut ()).unwrap();
    let mut x = vec![0.0; ids.len() * n];
    hidden.read(0, &mut x).unwrap();
    Head::new(&model, Activations::F32, 0).unwrap().input(&mut x, &mut sums).unwrap();
    for i in 0..n {
        for j in 0..=i {
            let wanted = sums.second[0][i * n + j] / found.tokens as f64;
            let got = found.head_input[i * (i + 1) / 2 + j];
            assert!((got - wanted).abs() < 1e-5 * (1.0 + wanted.abs()), "{i} {j}: {got} {wanted}");
        }
    }
}

/// Each tensor alone, rounded to a type that does not ask for importance, against the loss of a student that has it: what is
/// measured, and what it does to costs.
#[test]
fn measured_costs_are_those_of_a_model_with_one_rounded_tensor() {
    let (path, input) = fixture();
    let model = Model::new(&path, &*input.source, &input.metadata).unwrap();
    let tokens = tokens();
    let ty = GgmlType::MXFP4;
    let names = ["token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight", "blk.0.attn_q.weight"];
    let mut wanted = Vec::new();
    for name in names {
        let index = input.source.tensors().iter().position(|t| t.name == name).unwrap();
        let t = &input.source.tensors()[index];
        let mut x = vec![0f32; t.elements() as usize];
        input.source.read_rows(index, 0..t.rows(), &mut x);
        let mut bytes = vec![0; x.len() / 32 * ty.block_bytes()];
        ostq_convert::formats::format(ty).unwrap().encode(&x, t.row_len() as usize, None, &mut bytes).unwrap();
        let rounded = [(name.to_string(), Rounded { ty, bytes })].into();
        let student = Student::new(&model, &rounded, 0, false).unwrap();
        wanted.push(Processor::new(&model, student, LENGTH, 4).unwrap().loss(&tokens).unwrap());
    }
    // predicted: three times too much, a hundredth, right, right
    let by = [3.0, 0.01, 1.0, 1.0];
    let mut costs: Vec<TensorCosts> = names
        .iter()
        .zip(wanted.iter().zip(by))
        .map(|(name, (kld, by))| {
            let choice = |cost| costs::Choice { ty: ty.name().into(), bytes: 1, cost, nearest: kld * by };
            TensorCosts { name: name.to_string(), choices: vec![choice(7.0), choice(1.0)] }
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let (path, metadata, state) = (&*path, &input.metadata, dir.path());
    let job = measured::Job { path, model: &model, metadata, tokens: &tokens, length: LENGTH, batch: 4, state };
    let found = measured::run(&job, &mut costs, &[1; 4], &mut |_, _| {}).unwrap();
    for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        let found = found.unwrap();
        assert!((found / wanted - 1.0).abs() < 1e-3, "{}: {found} {wanted}", names[i]);
        let factor = [1.0 / 3.0, 4.0, 1.0, 1.0][i];
        assert!((costs[i].choices[0].cost / (7.0 * factor) - 1.0).abs() < 1e-3, "{}", names[i]);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left on disk");
}
