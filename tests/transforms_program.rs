//! Transforms through the program: files and importers, the plan, keys of the output, the same bytes however it is run.

mod common;

use std::path::Path;

use common::program::{self, Tensor, command, fixture, safetensors};
use ostq_convert::formats::simd::Isa;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::transform::{Anatomy, file};
use serde_json::Value as Json;

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).to_str().unwrap().to_string()
}

fn text(dir: &Path) -> String {
    let words = ["the rain ", "in Spain ", "stays 12 ", "mainly\n", "on the plain. "];
    std::fs::write(dir.join("text.txt"), (0..900).map(|i| words[i * i % 7 % 5]).collect::<String>()).unwrap();
    path(dir, "text.txt")
}

/// Tensors of a file, with their digests.
fn inspect(file: &str) -> Json {
    let ran = program::run(["inspect", file, "--sha256", "--json"]).exits(0);
    serde_json::from_str(&ran.stdout).unwrap()
}

fn key<'a>(file: &'a Json, name: &str) -> Option<&'a Json> {
    file["metadata"].as_array().unwrap().iter().find(|k| k["key"] == name).map(|k| &k["value"])
}

#[test]
fn a_preset_and_its_file_give_the_same_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = fixture("tiny");
    let tiny = tiny.to_str().unwrap();
    let text = text(dir.path());
    for preset in ["quarot", "womi", "smoothquant", "awq"] {
        let (out, by_file, t) =
            (path(dir.path(), "a.gguf"), path(dir.path(), "b.gguf"), path(dir.path(), "t.safetensors"));
        let calibrate: &[&str] = match preset {
            "smoothquant" | "awq" => &["--calibrate", &text, "--ctx", "64"],
            _ => &[],
        };
        let nearest: &[&str] = if calibrate.is_empty() { &[] } else { &["--rounding", "nearest"] };
        let run = |args: &[&[&str]]| program::run(args.concat()).exits(0);
        run(&[&["transform", tiny, "-o", &t, "--preset", preset, "--for", "q8_0", "--force", "-q"], calibrate]);
        run(&[&[tiny, &out, "-t", "q8_0", "--pure", "--transform", preset, "--force", "-q"], calibrate, nearest]);
        run(&[&[tiny, &by_file, "-t", "q8_0", "--pure", "--transform", &t, "--force", "-q"], calibrate, nearest]);
        let (a, b) = (inspect(&out), inspect(&by_file));
        assert_eq!(a["tensors"], b["tensors"], "{preset}");
        assert_eq!(key(&a, "ostq.transform.sha256"), key(&b, "ostq.transform.sha256"), "{preset}");
        assert!(key(&a, "ostq.transform").unwrap().as_str().unwrap().starts_with(preset));
        // a file made from it still says so
        let again = path(dir.path(), "c.gguf");
        run(&[&[&out, &again, "-t", "copy", "--force", "-q"]]);
        assert_eq!(key(&inspect(&again), "ostq.transform"), key(&a, "ostq.transform"));
        program::run([&out, &again, "-t", "q8_0", "--transform", "quarot", "--force"])
            .exits(3)
            .says("take the original");
    }
}

#[test]
fn threads_memory_and_instruction_sets_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let out = path(dir.path(), "a.gguf");
    let model = program::Checkpoint::sized(96, 320, 2);
    let bytes = |args: &[&str], isa: Option<Isa>| {
        let mut c =
            command([model.path().to_str().unwrap(), &out, "-t", "f32", "--transform", "quarot", "-q", "--force"]);
        c.args(args);
        if let Some(isa) = isa {
            c.env("OSTQ_ISA", isa.name());
        }
        let ran = c.output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        std::fs::read(&out).unwrap()
    };
    let one = bytes(&["--threads", "1"], None);
    assert!(one == bytes(&["--threads", "3"], None), "three threads");
    assert!(one == bytes(&["--threads", "1", "--max-memory", "40MiB"], None), "little memory");
    for isa in Isa::available() {
        assert!(one == bytes(&[], Some(isa)), "{}", isa.name());
    }
    assert!(one != bytes(&["--seed", "1"], None), "another seed");
}

#[test]
fn a_rotation_unties_the_head_and_the_plan_says_so() {
    let tiny = fixture("tiny");
    let plan = program::run(["plan", tiny.to_str().unwrap(), "-t", "q8_0", "--transform", "quarot", "--json"]).exits(0);
    let plan: Json = serde_json::from_str(&plan.stdout).unwrap();
    assert!(plan["tensors"].as_array().unwrap().iter().any(|t| t["name"] == "output.weight"));
    let said =
        plan["warnings"].as_array().unwrap().iter().any(|w| w.as_str().unwrap().contains("output.weight (q8_0) adds"));
    assert!(said, "{}", plan["warnings"]);
}

#[test]
fn what_does_not_go_together_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (tiny, out) = (fixture("tiny"), path(dir.path(), "x.gguf"));
    let imatrix = fixture("tiny.imatrix.gguf");
    let imatrix = imatrix.to_str().unwrap();
    let run = |args: &[&str]| {
        let mut all = vec![tiny.to_str().unwrap(), &out, "-q", "-t", "q4_0"];
        all.extend(args);
        program::run(all)
    };
    run(&["--transform", "quarot", "--exact"]).exits(2).says("--exact");
    run(&["--transform", "awq", "--rounding", "nearest"]).exits(2).says("needs --calibrate");
    run(&["--transform", "smoothquant", "--alpha", "2"]).exits(2).says("--alpha");
    run(&["--transform", "nowhere.safetensors"]).exits(3).says("nowhere.safetensors");
    run(&["--transform", "quarot", "--imatrix", imatrix]).exits(3).says("mixes the columns");
    assert!(!Path::new(&out).exists());
}

/// Second moments and importance of the original go with scales.
#[test]
fn an_importance_matrix_is_carried_over_scales() {
    let dir = tempfile::tempdir().unwrap();
    let (tiny, text) = (fixture("tiny"), text(dir.path()));
    let tiny = tiny.to_str().unwrap();
    let (im, t, own, carried) = (
        path(dir.path(), "im.gguf"),
        path(dir.path(), "t.safetensors"),
        path(dir.path(), "own.gguf"),
        path(dir.path(), "carried.gguf"),
    );
    program::run(["calibrate", tiny, "-o", &im, "-f", &text, "--ctx", "64", "-q"]).exits(0);
    let preset = ["transform", tiny, "-o", &t, "--preset", "smoothquant", "--calibrate", &text, "--ctx", "64", "-q"];
    program::run(preset).exits(0);
    let base = [tiny, &own, "-t", "q4_0", "--transform", &t, "-q"];
    program::run([&base[..], &["--calibrate", &text, "--ctx", "64", "--rounding", "nearest"]].concat()).exits(0);
    let base = [tiny, &carried, "-t", "q4_0", "--transform", &t, "-q"];
    program::run([&base[..], &["--imatrix", &im, "--rounding", "nearest"]].concat()).exits(0);
    let plain = path(dir.path(), "plain.gguf");
    program::run([tiny, &plain, "-t", "q4_0", "--transform", &t, "-q"]).exits(0);
    // sums in another order may tip single codes; keys before the tensors differ
    let data = |file: &str| {
        let bytes: u64 =
            inspect(file)["tensors"].as_array().unwrap().iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
        let all = std::fs::read(file).unwrap();
        all[all.len() - bytes as usize..].to_vec()
    };
    let (own, carried, plain) = (data(&own), data(&carried), data(&plain));
    let differ = |a: &[u8], b: &[u8]| a.iter().zip(b).filter(|(a, b)| a != b).count() as f64 / a.len() as f64;
    let (tipped, unweighted) = (differ(&own, &carried), differ(&own, &plain));
    assert!(tipped < unweighted / 20.0 && unweighted > 0.1, "{tipped} differ, {unweighted} without importance");
}

struct Foreign {
    tensors: Vec<Tensor>,
}

impl Foreign {
    fn push(&mut self, name: &str, shape: &[u64], values: Vec<f64>) {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.push(Tensor { name: name.into(), dtype: "F64".into(), shape: shape.to_vec(), data });
    }
}

/// A rotation by Householder's reflection.
fn reflection(n: usize, seed: usize) -> Vec<f64> {
    let v: Vec<f64> = (0..n).map(|i| ((i * 7 + seed) % 11) as f64 - 4.5).collect();
    let length: f64 = v.iter().map(|x| x * x).sum();
    (0..n * n).map(|at| f64::from(u8::from(at / n == at % n)) - 2.0 * v[at / n] * v[at % n] / length).collect()
}

#[test]
fn files_of_spinquant_and_ostquant_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::resolve(Recipe { r#type: Some("q8_0".into()), ..Recipe::default() }).unwrap();
    let input = Input::open(&fixture("tiny"), &options).unwrap();
    let model = Anatomy::new(&fixture("tiny"), &*input.source, &input.metadata).unwrap();
    let (d, n, kv, ff) = (model.spec.embed, model.spec.head_dim, model.spec.kv_heads, model.feed_forward[0]);
    let out = dir.path().join("foreign.safetensors");
    let read = |f: &Foreign| {
        std::fs::write(&out, safetensors(&f.tensors)).unwrap();
        file::read(&out, &model, "any").map_err(|e| e.to_string())
    };
    let mut spin = Foreign { tensors: Vec::new() };
    spin.push("R1", &[d as u64, d as u64], reflection(d, 1));
    spin.push("model.layers.0.self_attn.R2", &[n as u64, n as u64], reflection(n, 2));
    let t = read(&spin).unwrap();
    assert_eq!(t.r_res.as_deref(), Some(&reflection(d, 1)[..]));
    assert_eq!(t.layers[0].r_ov.as_deref(), Some(&reflection(n, 2).repeat(kv)[..]));
    let mut ost = Foreign { tensors: Vec::new() };
    ost.push("R_res.weight", &[d as u64, d as u64], reflection(d, 1));
    let module = "model.layers.0.R_S_modules";
    for g in 0..kv {
        ost.push(&format!("{module}.R_ov.weight.{g}"), &[n as u64, n as u64], reflection(n, 3 + g));
    }
    ost.push(&format!("{module}.S_norm_qkv.weight"), &[d as u64], vec![1.5; d]);
    ost.push(&format!("{module}.S_up_down.weight"), &[ff as u64], vec![0.75; ff]);
    let half = n / 2;
    let tied: Vec<f64> = (0..kv * n).map(|i| 1.0 + (i / n * half + i % half) as f64 / 100.0).collect();
    ost.push(&format!("{module}.S_qk.weight"), &[(kv * n) as u64], tied.clone());
    let t = read(&ost).unwrap();
    let l = &t.layers[0];
    assert_eq!(l.r_ov.as_ref().unwrap()[(kv - 1) * n * n..], reflection(n, 3 + kv - 1)[..]);
    assert_eq!((l.s_attn.as_ref().unwrap()[3], l.s_ud.as_ref().unwrap()[ff - 1]), (1.5, 0.75));
    let want: Vec<f64> = (0..kv * half).map(|i| 1.0 + i as f64 / 100.0).collect();
    assert_eq!(l.s_qk.as_deref(), Some(&want[..]));
    // what was published does not tie the members of a pair
    let at = ost.tensors.len() - 1;
    let untied: Vec<f64> = (0..kv * n).map(|i| 1.0 + i as f64 / 100.0).collect();
    ost.tensors[at].data = untied.iter().flat_map(|v| v.to_le_bytes()).collect();
    let e = read(&ost).unwrap_err();
    assert!(e.contains("S_qk") && e.contains("change the model's function"), "{e}");
    ost.tensors.truncate(2);
    assert!(read(&ost).unwrap_err().contains("R_ov"), "one head of several");
    spin.push("model.layers.0.mlp.R9", &[1], vec![1.0]);
    assert!(read(&spin).unwrap_err().contains("`model.layers.0.mlp.R9`: neither"));
    spin.tensors.truncate(1);
    spin.tensors[0].dtype = "I64".into();
    assert!(read(&spin).unwrap_err().contains("F32 or F64"));
}

#[test]
fn a_file_for_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let t = path(dir.path(), "t.safetensors");
    let model = program::Checkpoint::sized(96, 320, 2);
    program::run(["transform", model.path().to_str().unwrap(), "-o", &t, "--preset", "quarot", "-q"]).exits(0);
    let out = path(dir.path(), "x.gguf");
    let convert =
        |m: &Path| program::run([m.to_str().unwrap(), &out, "-t", "q8_0", "--transform", &t, "-q", "--force"]);
    convert(model.path()).exits(0);
    convert(&fixture("tiny")).exits(3).says("made for another model");
    let change = |from: &str, to: &str| {
        let text = String::from_utf8_lossy(&std::fs::read(&t).unwrap()).into_owned();
        assert!(text.contains(from));
        let mut bytes = std::fs::read(&t).unwrap();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&t, bytes).unwrap();
    };
    change("blk.1.r_ov", "blk.1.r_xy");
    convert(model.path()).exits(3).says("`blk.1.r_xy`: no transform of this model");
    change("blk.1.r_xy", "blk.7.r_ov");
    convert(model.path()).exits(3).says("`blk.7.r_ov`");
    change("blk.7.r_ov", "blk.1.r_ov");
    change("\"version\":\"1\"", "\"version\":\"9\"");
    convert(model.path()).exits(3).says("format version is 9");
}

#[test]
fn learned_transforms_are_written_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = fixture("tiny");
    let tiny = tiny.to_str().unwrap();
    let text = text(dir.path());
    let (t, again) = (path(dir.path(), "t.safetensors"), path(dir.path(), "again.safetensors"));
    let learn = |out: &str, more: &[&str]| {
        let fixed = ["learn", tiny, "-o", out, "--steps", "3", "--calibrate", &text, "--ctx", "64", "--force"];
        program::run([&fixed, more].concat())
    };
    for (method, target) in [("ostquant", "q4_0"), ("spinquant", "q8_0"), ("ostquant", "w4a4kv4")] {
        let more = ["--method", method, "--for", target];
        let ran = learn(&t, &more).exits(0);
        assert!(ran.stderr.contains("KLD") && ran.stderr.contains(method), "{}", ran.stderr);
        assert!(!dir.path().join("t.safetensors.ostq-state").exists(), "what a run keeps goes with it");
        learn(&again, &[&more[..], &["--threads", "1", "-q"]].concat()).exits(0);
        assert!(std::fs::read(&t).unwrap() == std::fs::read(&again).unwrap(), "{method} {target}: one thread");
        let out = path(dir.path(), "out.gguf");
        program::run([tiny, &out, "-t", "f32", "--transform", &t, "--force", "-q"]).exits(0);
        let check = |more: &[&str]| {
            let args = ["check", tiny, &out, "-f", &text, "--ctx", "64", "--json", "-q"];
            let ran = program::run([&args, more].concat()).exits(0);
            let report: Json = serde_json::from_str(&ran.stdout).unwrap();
            report["models"][0]["summary"]["kld"]["value"].as_f64().unwrap()
        };
        let float = check(&[]);
        assert!(float.abs() < 1e-5, "{method} {target}: the function moved: {float}");
        let rough = check(&["--activations", "w4a4kv4"]);
        assert!(rough > 1e-4 && check(&["--activations", "w8a8"]) < rough);
        assert_ne!(check(&["--activations", "w4a4kv4", "--online-hadamard"]), rough);
    }
    let ran = learn(&t, &["--local", "--for", "q4_0"]).exits(0);
    assert!(ran.stderr.contains("errors of layers"), "{}", ran.stderr);
    learn(&again, &["--local", "--for", "q4_0", "--threads", "1", "--max-memory", "300MiB", "-q"]).exits(0);
    assert!(std::fs::read(&t).unwrap() == std::fs::read(&again).unwrap(), "layer by layer, one thread");
    learn(&t, &["--for", "q4_0", "--max-memory", "1MiB"]).exits(4).says("--local");
    learn(&t, &["--for", "w4a8", "--rotation-rate", "-1"]).exits(2);
    learn(&t, &["--for", "q4_9"]).exits(2).says("q4_9");
    for nothing in ["q8_1", "f16", "nvfp4"] {
        learn(&t, &["--for", nothing]).exits(2).says("nothing to learn");
    }
    // a type that wants to know which columns matter
    learn(&t, &["--for", "iq2_xs"]).exits(0);
    learn(&t, &["--for", "q4_0", "--online-hadamard"]).exits(2).says("--online-hadamard");
    program::run(["check", tiny, tiny, "-f", &text, "--activations", "w4"]).exits(2).says("w4a8");
    program::run(["check", tiny, tiny, "-f", &text, "--online-hadamard"]).exits(2).says("--online-hadamard");
    program::run(["transform", tiny, "--preset", "ostquant", "-o", &t, "--force"]).exits(2).says("learn");
}

#[test]
fn auto_says_what_each_preset_gives_and_is_never_worse() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = fixture("tiny");
    let tiny = tiny.to_str().unwrap();
    let text = text(dir.path());
    let out = path(dir.path(), "out.gguf");
    for rounding in ["nearest", "gptq"] {
        let ran = program::run([
            tiny,
            &out,
            "-t",
            "q8_0",
            "--pure",
            "--transform",
            "auto",
            "--calibrate",
            &text,
            "--ctx",
            "64",
            "--calibrate-tokens",
            "2048",
            "--rounding",
            rounding,
            "--force",
        ])
        .exits(0);
        let of = |name: &str| -> Option<f64> {
            let line = ran.stderr.lines().find(|l| l.starts_with(&format!("transform {name}: ")))?;
            line.split("KLD ").nth(1)?.split([' ', ',']).next()?.parse().ok()
        };
        let plain = of("none").unwrap_or_else(|| panic!("{}", ran.stderr));
        let line = ran.stderr.lines().find_map(|l| l.strip_prefix("transform auto: ")).unwrap();
        let chosen = line.split(['(', ' ']).next().unwrap();
        let best = ["smoothquant", "awq", "quarot", "womi", "spinquant", "ostquant"]
            .iter()
            .filter_map(|n| of(n))
            .fold(plain, f64::min);
        let own = of(chosen).unwrap();
        assert!(own <= plain && (own == best || best > 0.98 * plain), "{rounding}: {}", ran.stderr);
        let key = inspect(&out);
        let key = self::key(&key, "ostq.transform").map(|k| k.as_str().unwrap().to_string());
        assert_eq!(key.is_none(), chosen == "none", "{rounding}: {key:?} {chosen}");
    }
}
