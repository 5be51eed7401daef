//! Which tensor gets which type: the tables of llama.cpp's own snapshots and of further models, for every file type.
//!
//! The tables are `goldens/mixes/*.json` of the shared test bed. With `llama-quant-types` (made by the test bed's
//! `setup-peers.sh`, in `bin` of `OSTQ_PEERS`) also models of odd shapes, side by side with llama.cpp's code.

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::program::{Checkpoint, Tensor, convert, run, sha256};
use common::shared;
use ostq_convert::gguf::GgmlType;
use ostq_convert::plan::FileType;
use ostq_convert::plan::mix::{MixError, MixOptions, MixTensor, ModelFacts, choose, processing_order};
use serde_json::{Map, Value as Json, json};

/// Every file type but Q4_K and the like, which are other names.
fn types() -> impl Iterator<Item = FileType> {
    FileType::ALL.iter().copied()
}

fn options(ftype: FileType, has_imatrix: bool) -> MixOptions {
    MixOptions {
        ftype,
        copy: false,
        pure: false,
        leave_output_tensor: false,
        output_tensor_type: None,
        token_embedding_type: None,
        tensor_types: Vec::new(),
        has_imatrix,
    }
}

/// A model that is only described.
struct Model {
    facts: ModelFacts,
    /// In processing order.
    tensors: Vec<(String, Vec<u64>)>,
}

impl Model {
    fn new(facts: ModelFacts, patterns: &[(&str, Vec<u64>)]) -> Model {
        let mut all = Vec::new();
        for (pattern, dims) in patterns {
            let layers = if pattern.contains('%') { facts.layers } else { 1 };
            all.extend((0..layers).map(|l| (pattern.replace('%', &l.to_string()), dims.clone())));
        }
        let order = processing_order(&all.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>());
        Model { facts, tensors: order.into_iter().map(|i| all[i].clone()).collect() }
    }

    fn types(&self, ftype: FileType, has_imatrix: bool) -> Result<BTreeMap<&str, GgmlType>, MixError> {
        let tensors: Vec<MixTensor> =
            self.tensors.iter().map(|(name, dims)| MixTensor { name, dims, source: GgmlType::F32 }).collect();
        let choices = choose(&self.facts, &options(ftype, has_imatrix), &tensors)?;
        let quantizable = |name: &str| !name.contains("ffn_gate_inp") && !name.contains("_norm");
        Ok(tensors.iter().zip(choices).filter(|(t, _)| quantizable(t.name)).map(|(t, c)| (t.name, c.ty)).collect())
    }
}

/// `0-2,5,7-9`
fn in_ranges(ranges: &str, layer: u64) -> bool {
    ranges.split(',').any(|r| {
        let (a, b) = r.split_once('-').unwrap_or((r, r));
        (a.parse::<u64>().unwrap()..=b.parse().unwrap()).contains(&layer)
    })
}

/// The type that a golden gives a tensor.
fn golden_type(golden: &Json, name: &str) -> GgmlType {
    let (layer, pattern) = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, tail)) => (layer.parse().unwrap(), format!("blk.%.{tail}")),
        None => (0, name.to_string()),
    };
    let ty = match &golden["overrides"][&pattern] {
        Json::String(ty) => ty.as_str(),
        Json::Object(by_layer) => by_layer
            .iter()
            .find(|(_, ranges)| in_ranges(ranges.as_str().unwrap(), layer))
            .map_or(golden["default"].as_str().unwrap(), |(ty, _)| ty.as_str()),
        _ => golden["default"].as_str().unwrap(),
    };
    GgmlType::from_name(ty).unwrap_or_else(|| panic!("{ty}"))
}

fn golden_model(golden: &Json) -> Option<Model> {
    let (h, list) = (&golden["hparams"], golden["tensors"].as_array()?);
    let number = |key: &str| h[key].as_u64().unwrap();
    let facts = ModelFacts {
        arch: h["arch"].as_str()?.to_string(),
        layers: number("n_layer"),
        heads: number("n_head"),
        kv_heads: number("n_head_kv"),
        experts: number("n_expert"),
    };
    let dims = |t: &Json| t[1].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).collect();
    let patterns: Vec<(&str, Vec<u64>)> = list.iter().map(|t| (t[0].as_str().unwrap(), dims(t))).collect();
    Some(Model::new(facts, &patterns))
}

#[test]
fn the_tables_of_llama_cpp() {
    let Some(shared) = shared() else { return };
    let (mut models, mut compared, mut without) = (0, 0, Vec::new());
    for entry in std::fs::read_dir(shared.join("goldens/mixes")).unwrap().flatten() {
        let golden: Json = serde_json::from_str(&std::fs::read_to_string(entry.path()).unwrap()).unwrap();
        let name = golden["model"].as_str().unwrap();
        let Some(model) = golden_model(&golden) else {
            without.push(name.to_string());
            continue;
        };
        models += 1;
        for (ftype, plain) in golden["ftypes"].as_object().unwrap() {
            let parsed = FileType::parse(ftype).unwrap();
            for (has_imatrix, expected) in
                [(false, plain), (true, golden["ftypes_with_imatrix"].get(ftype).unwrap_or(plain))]
            {
                let types = match (model.types(parsed, has_imatrix), expected.get("error")) {
                    (Ok(types), None) => types,
                    (Err(MixError::NoFallback { .. }), Some(_)) => continue,
                    (other, error) => panic!("{name} {ftype}: {other:?}, the reference says {error:?}"),
                };
                for (tensor, ty) in types {
                    let expected = golden_type(expected, tensor);
                    assert_eq!(ty, expected, "{name} {ftype}, imatrix {has_imatrix}: {tensor}");
                    compared += 1;
                }
            }
        }
        assert_eq!(golden["ftypes"].as_object().unwrap().len(), types().count(), "{name}");
    }
    without.sort();
    eprintln!("{models} models, {compared} types equal; without a tensor list: {}", without.join(", "));
    assert!(models >= 17 && compared > 100_000);
}

/// A checkpoint of the shape of LLaMA 3.1 70B, 141 GB of nothing.
fn seventy_b() -> Checkpoint {
    let (embed, feed, layers, heads, kv, vocab) = (8192u64, 28672u64, 80, 64u64, 8u64, 128_256u64);
    let c = Checkpoint::new();
    c.edit("config.json", |j| {
        for (key, n) in [
            ("hidden_size", embed),
            ("intermediate_size", feed),
            ("num_hidden_layers", layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv),
            ("head_dim", 128),
            ("vocab_size", vocab),
        ] {
            j.insert(key.into(), json!(n));
        }
        j.insert("tie_word_embeddings".into(), json!(false));
    });
    let (mut header, mut at) = (Map::new(), 0u64);
    let mut add = |name: String, shape: &[u64]| {
        let end = at + 2 * shape.iter().product::<u64>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    };
    add("model.embed_tokens.weight".into(), &[vocab, embed]);
    add("lm_head.weight".into(), &[vocab, embed]);
    add("model.norm.weight".into(), &[embed]);
    for l in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![embed]),
            ("post_attention_layernorm", vec![embed]),
            ("self_attn.q_proj", vec![embed, embed]),
            ("self_attn.k_proj", vec![kv * 128, embed]),
            ("self_attn.v_proj", vec![kv * 128, embed]),
            ("self_attn.o_proj", vec![embed, embed]),
            ("mlp.gate_proj", vec![feed, embed]),
            ("mlp.up_proj", vec![feed, embed]),
            ("mlp.down_proj", vec![embed, feed]),
        ] {
            add(format!("model.layers.{l}.{name}.weight"), &shape);
        }
    }
    let text = Json::Object(header).to_string();
    c.write("model.safetensors", [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat());
    let file = std::fs::File::options().write(true).open(c.file("model.safetensors")).unwrap();
    file.set_len(8 + text.len() as u64 + at).unwrap();
    c
}

#[test]
fn a_70b_checkpoint_is_planned_from_its_header() {
    let c = seventy_b();
    let folder = c.path().to_str().unwrap();
    let plan = |args: &[&str]| {
        let start = std::time::Instant::now();
        let ran = run(["plan", folder, "--json"].into_iter().chain(args.iter().copied())).exits(0);
        assert!(start.elapsed().as_secs() < 20, "it reads weights");
        serde_json::from_str::<Json>(&ran.stdout).unwrap()
    };
    let json = plan(&["--type", "q4_k_m"]);
    assert_eq!(json["weights"], 70_553_706_496u64 + 64, "the published number of parameters, and the rope factors");
    assert!(json["memory"].as_u64().unwrap() < 300 << 20);
    let Some(shared) = shared() else { return };
    let file = shared.join("goldens/mixes/meta-llama-3.1-70b-instruct.json");
    let golden: Json = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    for ftype in ["Q8_0", "Q4_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "IQ3_M"] {
        let json = plan(&["--type", ftype]);
        let mut compared = 0;
        for t in json["tensors"].as_array().unwrap() {
            let name = t["name"].as_str().unwrap();
            if name.contains("_norm") || name == "rope_freqs.weight" {
                assert_eq!(t["type"], "f32");
                continue;
            }
            let expected = golden_type(&golden["ftypes"][ftype], name);
            assert_eq!(t["type"], expected.name(), "{ftype} {name}");
            compared += 1;
        }
        assert_eq!(compared, 80 * 7 + 2);
    }
    run(["plan", folder, "--type", "iq2_xs"]).exits(3).says("need an imatrix");
}

/// What llama.cpp's own code gives, by file type: tensor types, or an error.
fn peer_types(
    tool: &PathBuf,
    m: &Model,
    has_imatrix: bool,
) -> BTreeMap<String, Result<BTreeMap<String, String>, String>> {
    let f = &m.facts;
    let embed = m.tensors.iter().find(|(n, _)| n == "token_embd.weight").unwrap().1[0];
    let head = embed / f.heads;
    let mut text = format!(
        "{} {embed} {} {} {} {} {} {head} {head} {}\n",
        f.arch,
        512,
        f.layers,
        f.heads,
        f.kv_heads,
        f.experts,
        u8::from(has_imatrix)
    );
    for (name, dims) in &m.tensors {
        text += &format!("{name} {}\n", dims.iter().map(u64::to_string).collect::<Vec<_>>().join(" "));
    }
    let mut child = Command::new(tool).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    let mut all = BTreeMap::new();
    let (mut name, mut default) = (String::new(), String::new());
    for line in String::from_utf8(output.stdout).unwrap().lines().filter(|l| !l.is_empty()) {
        if let Some((ftype, ty)) = line.strip_prefix('[').and_then(|l| l.split_once("] ")) {
            (name, default) = (ftype.to_string(), ty.to_string());
            let types: BTreeMap<_, _> = m.tensors.iter().map(|(n, _)| (n.clone(), default.clone())).collect();
            all.insert(name.clone(), Ok(types));
        } else if let Some(why) = line.strip_prefix("! ") {
            all.insert(name.clone(), Err(why.to_string()));
        } else if let Ok(types) = all.get_mut(&name).unwrap() {
            let (tensor, ty) = line.split_once(' ').unwrap();
            types.insert(tensor.to_string(), ty.to_string());
        }
    }
    assert!(all.len() >= types().count(), "{default}");
    all
}

#[test]
fn odd_models_side_by_side_with_llama_cpp() {
    let tool = std::env::var_os("OSTQ_PEERS").map(|p| PathBuf::from(p).join("bin/llama-quant-types"));
    let Some(tool) = tool.filter(|t| t.exists()) else {
        eprintln!("SKIPPED: no llama-quant-types (set OSTQ_PEERS)");
        return;
    };
    let mut compared = 0;
    // layers, heads, kv heads, embedding, feed forward, experts, untied
    let shapes = [
        (1, 4, 4, 256, 512, 0, false),
        (2, 8, 4, 288, 576, 0, true),
        (3, 8, 2, 320, 896, 0, true),
        (7, 8, 1, 512, 1280, 0, false),
        (16, 32, 8, 2048, 8192, 0, true),
        (31, 14, 2, 896, 4864, 0, false),
        (80, 64, 8, 8192, 1024, 0, true),
        (80, 64, 64, 1024, 1024, 0, true),
        (9, 8, 2, 512, 1024, 4, true),
        (32, 32, 8, 4096, 1024, 8, true),
    ];
    for arch in ["llama", "qwen2", "qwen3", "falcon", "gemma2", "phi3"] {
        for (layers, heads, kv, embed, feed, experts, untied) in shapes {
            // the tool's mock model is a "70B" only for this architecture; see the next test
            if (experts > 0 || layers == 80) && arch != "llama" {
                continue;
            }
            let kv_rows = embed / heads * kv;
            let feed_dims = |a, b| if experts > 0 { vec![a, b, experts] } else { vec![a, b] };
            let suffix = if experts > 0 { "_exps" } else { "" };
            let ffn = |part: &str| format!("blk.%.ffn_{part}{suffix}.weight");
            let (gate, up, down) = (ffn("gate"), ffn("up"), ffn("down"));
            let mut patterns = vec![
                ("token_embd.weight", vec![embed, 1000]),
                ("blk.%.attn_output.weight", vec![embed, embed]),
                (&gate, feed_dims(embed, feed)),
                (&up, feed_dims(embed, feed)),
                (&down, feed_dims(feed, embed)),
            ];
            if arch == "phi3" {
                patterns.push(("blk.%.attn_qkv.weight", vec![embed, embed + 2 * kv_rows]));
            } else {
                patterns.push(("blk.%.attn_q.weight", vec![embed, embed]));
                patterns.push(("blk.%.attn_k.weight", vec![embed, kv_rows]));
                patterns.push(("blk.%.attn_v.weight", vec![embed, kv_rows]));
            }
            if untied {
                patterns.push(("output.weight", vec![embed, 1000]));
            }
            let facts = ModelFacts { arch: arch.into(), layers, heads, kv_heads: kv, experts };
            let model = Model::new(facts, &patterns);
            for has_imatrix in [false, true] {
                let peer = peer_types(&tool, &model, has_imatrix);
                for ftype in types() {
                    let at = format!("{arch}, {layers} layers of {embed}, {}, imatrix {has_imatrix}", ftype.name());
                    match (model.types(ftype, has_imatrix), &peer[ftype.name()]) {
                        (Ok(ours), Ok(theirs)) => {
                            for (name, ty) in ours {
                                assert_eq!(ty.name(), theirs[name], "{at}: {name}");
                                compared += 1;
                            }
                        }
                        (Err(_), Err(_)) => {}
                        (ours, theirs) => panic!("{at}: {ours:?}, the reference {theirs:?}"),
                    }
                }
            }
        }
    }
    eprintln!("{compared} types equal");
}

/// Small ones with the 80 layers of a 70B: the whole files, through the real llama-quantize.
#[test]
fn eighty_layers_by_llama_quantize() {
    let tool = std::env::var_os("OSTQ_PEERS").map(|p| PathBuf::from(p).join("bin/llama-quantize"));
    let Some(tool) = tool.filter(|t| t.exists()) else {
        eprintln!("SKIPPED: no llama-quantize (set OSTQ_PEERS)");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (f32, ours, theirs) = (dir.path().join("f32.gguf"), dir.path().join("o.gguf"), dir.path().join("t.gguf"));
    for (arch, kv_heads, untied) in [("Llama", 4, false), ("Llama", 8, true), ("Qwen2", 4, true)] {
        let c = Checkpoint::sized(256, 256, 80);
        c.edit("config.json", |j| {
            j.insert("architectures".into(), json!([format!("{arch}ForCausalLM")]));
            j.insert("model_type".into(), json!(arch.to_lowercase()));
            j.insert("num_key_value_heads".into(), json!(kv_heads));
            j.insert("tie_word_embeddings".into(), json!(!untied));
        });
        c.edit_tensors(|all| {
            let wide = all.iter().find(|t| t.name.ends_with("q_proj.weight")).unwrap().data.clone();
            let new = |name: &str, n: u64| Tensor {
                name: name.into(),
                dtype: "F32".into(),
                shape: vec![n],
                data: vec![0; n as usize * 4],
            };
            for l in 0..80 {
                let attn = format!("model.layers.{l}.self_attn.");
                if arch == "Qwen2" {
                    all.push(new(&format!("{attn}q_proj.bias"), 256));
                    all.push(new(&format!("{attn}k_proj.bias"), kv_heads * 32));
                    all.push(new(&format!("{attn}v_proj.bias"), kv_heads * 32));
                }
            }
            for t in all
                .iter_mut()
                .filter(|t| kv_heads == 8 && (t.name.ends_with("k_proj.weight") || t.name.ends_with("v_proj.weight")))
            {
                (t.shape, t.data) = (vec![256, 256], wide.clone());
            }
            if untied {
                let embed = all.iter().find(|t| t.name.contains("embed_tokens")).unwrap().clone();
                all.push(Tensor { name: "lm_head.weight".into(), ..embed });
            }
        });
        convert(c.path(), &f32, "--outtype f32 --no-provenance --quiet --force").exits(0);
        for ftype in ["Q2_K", "Q4_K_M"] {
            let quantize = Command::new(&tool).args([&f32, &theirs]).arg(ftype).output().unwrap();
            assert!(quantize.status.success(), "{}", String::from_utf8_lossy(&quantize.stderr));
            let args = format!("--type {ftype} --via f32 --no-provenance --quiet --force");
            convert(c.path(), &ours, &args).exits(0);
            assert_eq!(sha256(&ours), sha256(&theirs), "{arch}, {kv_heads} kv heads, {ftype}");
        }
    }
}
