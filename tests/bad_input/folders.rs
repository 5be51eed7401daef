//! The files of a folder against each other, and the importance matrix.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value as Json, json};

use super::common::program::{Checkpoint, Tensor, command, fixture, safetensors};
use super::{Case, accepted, all_refused, refused};

const INDEX: &str = "model.safetensors.index.json";

fn set(c: &Checkpoint, key: &str, value: Json) {
    c.edit("config.json", |j| {
        j.insert(key.into(), value);
    });
}

fn unset(c: &Checkpoint, key: &str) {
    c.edit("config.json", |j| {
        j.remove(key);
    });
}

fn rope(c: &Checkpoint, change: impl FnOnce(&mut Json)) {
    c.edit("config.json", |j| change(&mut j["rope_scaling"]));
}

/// Two shards and an index; `change` sees the index before it is written.
fn sharded(c: &Checkpoint, change: impl FnOnce(&mut Json)) {
    let all = c.tensors();
    let (a, b) = all.split_at(5);
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    c.remove("model.safetensors");
    c.write(one, safetensors(a));
    c.write(two, safetensors(b));
    let map = |list: &[Tensor], file: &str| list.iter().map(|t| (t.name.clone(), json!(file))).collect::<Vec<_>>();
    let all: serde_json::Map<String, Json> = [map(a, one), map(b, two)].concat().into_iter().collect();
    let mut index = json!({"metadata": {"total_size": 1}, "weight_map": all});
    change(&mut index);
    c.write(INDEX, index.to_string());
}

fn shape(c: &Checkpoint, name: &str, shape: &[u64]) {
    c.edit_tensor(name, |t| {
        t.shape = shape.to_vec();
        t.data.resize(2 * shape.iter().product::<u64>() as usize, 0);
    });
}

/// No weights, but a file of this name.
fn only(c: &Checkpoint, name: &str) {
    c.remove("model.safetensors");
    c.write(name, "{}");
}

const CONFIG: &[Case] = &[
    ("no config", |c| c.remove("config.json"), &["config.json"]),
    ("config is no JSON", |c| c.write("config.json", "{"), &["config.json: not valid JSON"]),
    ("config holds NaN", |c| c.write("config.json", "{\"a\": NaN}"), &["config.json", "NaN in line 1"]),
    ("config is a list", |c| c.write("config.json", "[]"), &["config.json", "object"]),
    ("config is deep", |c| c.write("config.json", "[".repeat(1 << 20)), &["config.json"]),
    ("config is not UTF-8", |c| c.write("config.json", b"{\"a\": \"\xff\"}"), &["config.json: not UTF-8"]),
    ("no architectures", |c| unset(c, "architectures"), &["config.json", "architectures"]),
    ("empty architectures", |c| set(c, "architectures", json!([])), &["config.json", "architectures"]),
    (
        "unknown architecture",
        |c| set(c, "architectures", json!(["LlamaForCausalLM2"])),
        &["config.json", "`LlamaForCausalLM2`", "LlamaForCausalLM", "Qwen3ForCausalLM"],
    ),
    ("architectures holds a number", |c| set(c, "architectures", json!([7])), &["config.json", "architectures"]),
    ("no hidden size", |c| unset(c, "hidden_size"), &["config.json: key `hidden_size`"]),
    ("no layers", |c| set(c, "num_hidden_layers", json!(0)), &["key `num_hidden_layers`: 0"]),
    ("2^31 layers", |c| set(c, "num_hidden_layers", json!(1u64 << 31)), &["key `num_hidden_layers`"]),
    ("negative heads", |c| set(c, "num_attention_heads", json!(-8)), &["key `num_attention_heads`"]),
    ("kv heads that do not divide", |c| set(c, "num_key_value_heads", json!(3)), &["key `num_key_value_heads`"]),
    ("odd heads", |c| set(c, "head_dim", json!(31)), &["key `head_dim`", "odd"]),
    ("a width of text", |c| set(c, "intermediate_size", json!("256")), &["key `intermediate_size`"]),
    ("a huge width", |c| set(c, "intermediate_size", json!(1u64 << 63)), &["key `intermediate_size`"]),
    ("an epsilon of zero", |c| set(c, "rms_norm_eps", json!(0.0)), &["key `rms_norm_eps`"]),
    ("tied is text", |c| set(c, "tie_word_embeddings", json!("true")), &["key `tie_word_embeddings`"]),
    ("untied without a head", |c| set(c, "tie_word_embeddings", json!(false)), &["`lm_head.weight` is missing"]),
    (
        "gptq",
        |c| set(c, "quantization_config", json!({"quant_method": "gptq", "bits": 4})),
        &["quant_method", "`gptq`"],
    ),
    ("no method", |c| set(c, "quantization_config", json!({"bits": 4})), &["quantization_config.quant_method"]),
    ("rope of an unknown kind", |c| rope(c, |r| r["rope_type"] = json!("spiral")), &["config.json", "spiral"]),
    (
        "rope without a factor",
        |c| set(c, "rope_scaling", json!({"type": "linear"})),
        &["rope_scaling.factor`: missing"],
    ),
    ("rope factor of zero", |c| rope(c, |r| r["factor"] = json!(0)), &["config.json", "factor"]),
    ("equal frequency factors", |c| rope(c, |r| r["low_freq_factor"] = json!(4.0)), &["config.json", "freq_factor"]),
    ("two kinds of rope", |c| rope(c, |r| r["type"] = json!("linear")), &["config.json", "type"]),
    ("rope is a list", |c| set(c, "rope_scaling", json!([1])), &["config.json", "rope_scaling"]),
    ("no tokenizer", |c| c.remove("tokenizer.json"), &["no tokenizer"]),
    ("tokenizer is cut", |c| c.write("tokenizer.json", "{\"model\": {"), &["tokenizer.json: not valid JSON"]),
    ("a vocabulary that is too small", |c| set(c, "vocab_size", json!(100)), &["[512, 32]", "[100, 32] (vocab"]),
    ("a template that is not UTF-8", |c| c.write("chat_template.jinja", b"{{ \xff }}"), &["chat_template.jinja"]),
];

const WEIGHTS: &[Case] = &[
    ("no weights", |c| c.remove("model.safetensors"), &["no model*.safetensors file here"]),
    ("pickles", |c| only(c, "pytorch_model.bin"), &["only PyTorch pickle files", "safe_serialization=True"]),
    ("an adapter", |c| only(c, "adapter_config.json"), &["a LoRA adapter"]),
    ("a pipeline", |c| only(c, "model_index.json"), &["a diffusers pipeline"]),
    ("GGUF files", |c| only(c, "x.gguf"), &["only GGUF files here"]),
    ("ONNX", |c| only(c, "model.onnx"), &["an ONNX export"]),
    ("half a download", |c| only(c, "0123.incomplete"), &["the download is incomplete"]),
    ("another name", |c| only(c, "consolidated.safetensors"), &["no file is named model*.safetensors"]),
    (
        "two files without an index",
        |c| c.write("model-2.safetensors", safetensors(&[])),
        &["2 weight files", "no model.safetensors.index.json"],
    ),
    (
        "a tensor that is no model's",
        |c| c.edit_tensors(|all| all[0].name += "s"),
        &["`model.embed_tokens.weights` is not part of a LlamaForCausalLM", "`model.embed_tokens.weight` is missing"],
    ),
    (
        "a tensor is missing",
        |c| c.edit_tensors(|all| all.retain(|t| !t.name.contains("up_proj"))),
        &["tensor `model.layers.0.mlp.up_proj.weight` is missing"],
    ),
    ("a layer is missing", |c| set(c, "num_hidden_layers", json!(2)), &["9 problems", "model.layers.1.", "is missing"]),
    (
        "a layer too many",
        |c| c.edit_tensor("model.layers.0.mlp.up_proj.weight", |t| t.name = t.name.replace("s.0", "s.1")),
        &["layer 1, but num_hidden_layers is 1"],
    ),
    (
        "a layer 00",
        |c| c.edit_tensor("model.layers.0.mlp.up_proj.weight", |t| t.name = t.name.replace("s.0", "s.00")),
        &["`model.layers.00.mlp.up_proj.weight` is not part of"],
    ),
    (
        "a layer 2^64",
        |c| {
            c.edit_tensor("model.layers.0.mlp.up_proj.weight", |t| {
                t.name = t.name.replace("s.0", "s.18446744073709551616");
            })
        },
        &["`model.layers.18446744073709551616.mlp.up_proj.weight` is not part of"],
    ),
    (
        "embedding rows",
        |c| shape(c, "model.embed_tokens.weight", &[500, 32]),
        &["embed_tokens", "[500, 32]", "[512, 32]"],
    ),
    ("norm length", |c| shape(c, "model.norm.weight", &[33]), &["`model.norm.weight`", "[33]", "[32]"]),
    ("a norm of two dimensions", |c| shape(c, "model.norm.weight", &[1, 32]), &["`model.norm.weight`", "[1, 32]"]),
    (
        "query rows",
        |c| shape(c, "model.layers.0.self_attn.q_proj.weight", &[128, 32]),
        &["q_proj", "[256, 32]", "query"],
    ),
    ("key rows", |c| shape(c, "model.layers.0.self_attn.k_proj.weight", &[256, 32]), &["k_proj", "[128, 32]"]),
    ("value columns", |c| shape(c, "model.layers.0.self_attn.v_proj.weight", &[128, 33]), &["v_proj", "[128, 32]"]),
    ("transposed", |c| shape(c, "model.layers.0.mlp.down_proj.weight", &[256, 32]), &["down_proj", "[32, 256]"]),
    ("no elements", |c| shape(c, "model.layers.0.mlp.down_proj.weight", &[0, 256]), &["down_proj", "[0, 256]"]),
    (
        "fp8 without a config",
        |c| {
            c.edit_tensor("model.layers.0.mlp.up_proj.weight", |t| {
                t.dtype = "F8_E4M3".into();
                t.data.truncate(t.data.len() / 2);
            })
        },
        &["up_proj", "quantization_config"],
    ),
    (
        "fp8 without scales",
        |c| {
            set(c, "quantization_config", json!({"quant_method": "fp8", "weight_block_size": [128, 128]}));
            c.edit_tensor("model.layers.0.mlp.up_proj.weight", |t| {
                t.dtype = "F8_E4M3".into();
                t.data.truncate(t.data.len() / 2);
            });
        },
        &["up_proj", "without its scales `model.layers.0.mlp.up_proj.weight_scale_inv`"],
    ),
    (
        "fp8 with other scales",
        |c| {
            set(c, "quantization_config", json!({"quant_method": "fp8", "weight_block_size": [128, 128]}));
            c.edit_tensors(|all| {
                let t = all.iter_mut().find(|t| t.name.contains("up_proj")).unwrap();
                t.dtype = "F8_E4M3".into();
                t.data.truncate(t.data.len() / 2);
                let name = format!("{}_scale_inv", t.name);
                all.push(Tensor { name, dtype: "F32".into(), shape: vec![1, 1], data: vec![0; 4] });
            });
        },
        &["up_proj", "has shape [1, 1], blocks of 128 x 128 need [2, 1]"],
    ),
    (
        "weights of MLX",
        |c| {
            set(c, "quantization", json!({"group_size": 64, "bits": 4}));
            c.edit_tensor("model.layers.0.mlp.up_proj.weight", |t| {
                t.dtype = "U32".into();
                t.shape = vec![256, 4];
                t.data.truncate(4096);
            });
        },
        &["config.json: key `quantization`: an MLX-quantized checkpoint"],
    ),
    ("no map", |c| c.write(INDEX, "{}"), &["index.json: key `weight_map`"]),
    ("index is no JSON", |c| c.write(INDEX, "x"), &["index.json: not valid JSON"]),
    ("index is a link to nothing", |c| std::os::unix::fs::symlink("none", c.file(INDEX)).unwrap(), &["index.json"]),
    (
        "index is a pipe",
        |c| assert!(std::process::Command::new("mkfifo").arg(c.file(INDEX)).status().unwrap().success()),
        &["index.json: not a regular file"],
    ),
    ("an empty map", |c| sharded(c, |i| i["weight_map"] = json!({})), &["key `weight_map`: is empty"]),
    (
        "a number for a file",
        |c| sharded(c, |i| i["weight_map"]["model.norm.weight"] = json!(5)),
        &["`model.norm.weight` names no file: 5"],
    ),
    (
        "a file elsewhere",
        |c| sharded(c, |i| i["weight_map"]["model.norm.weight"] = json!("../model.safetensors")),
        &["only files of the same folder are read"],
    ),
    (
        "a file at the root",
        |c| sharded(c, |i| i["weight_map"]["model.norm.weight"] = json!("/etc/passwd")),
        &["only files of the same folder are read"],
    ),
    (
        "a shard is missing",
        |c| {
            sharded(c, |_| ());
            c.remove("model-00002-of-00002.safetensors");
        },
        &["model-00002-of-00002.safetensors: is named in", "the download is incomplete"],
    ),
    (
        "listed, not there",
        |c| sharded(c, |i| i["weight_map"]["model.none"] = json!("model-00001-of-00002.safetensors")),
        &["tensor `model.none`: is not in model-00001-of-00002.safetensors"],
    ),
    (
        "there, not listed",
        |c| {
            sharded(c, |i| {
                i["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
            })
        },
        &["does not list 1 tensors", "`model.norm.weight`"],
    ),
    (
        "in the other shard",
        |c| sharded(c, |i| i["weight_map"]["model.norm.weight"] = json!("model-00001-of-00002.safetensors")),
        &["tensor `model.norm.weight`: should be in model-00001-of-00002.safetensors, is in model-00002"],
    ),
    (
        "in both shards",
        |c| {
            sharded(c, |_| ());
            std::fs::copy(c.file("model-00001-of-00002.safetensors"), c.file("model-00002-of-00002.safetensors"))
                .unwrap();
        },
        &["model-00002-of-00002.safetensors: tensor `", "is also in model-00001-of-00002.safetensors"],
    ),
];

#[test]
fn folders_that_contradict_themselves_are_refused() {
    all_refused(CONFIG);
    all_refused(WEIGHTS);
}

#[test]
fn odd_folders_that_are_right() {
    let c = Checkpoint::new();
    sharded(&c, |_| ());
    accepted("two shards", c.path(), "");
    let c = Checkpoint::new();
    c.write("README.md", "---\nlicense: [a, b\n\t- x\n---\n");
    c.write("generation_config.json", "{");
    accepted("side files that nothing depends on", c.path(), "");
    let c = Checkpoint::new();
    c.write("generation_config.json", r#"{"top_k": 2.5, "temperature": null, "top_p": "x"}"#);
    accepted("sampling numbers of other kinds", c.path(), "");
    c.edit("tokenizer_config.json", |j| {
        j.insert("chat_template".into(), json!(5));
    });
    let said = accepted("a template that is a number", c.path(), "");
    assert!(said.contains("tokenizer_config.json") && said.contains("chat_template"), "{said}");
    let c = Checkpoint::new();
    let said = accepted("rows of 32", c.path(), "--type q4_k_m");
    assert!(said.contains("5 of 12 tensors have rows that the wanted type does not divide"), "{said}");
    // a head beside a tied embedding is written, as the reference does
    c.edit_tensors(|all| {
        let head = Tensor { name: "lm_head.weight".into(), ..all[0].clone() };
        all.push(head);
    });
    accepted("tied, with a head", c.path(), "");
    // through the links of a download cache
    let cache = tempfile::tempdir().unwrap();
    for name in super::names(c.path()) {
        std::os::unix::fs::symlink(c.file(&name), cache.path().join(name)).unwrap();
    }
    accepted("links", cache.path(), "");
    // a path that is no UTF-8
    let odd = cache.path().join(OsStr::from_bytes(b"x\xff"));
    std::fs::create_dir(&odd).unwrap();
    for name in super::names(&fixture("tiny")) {
        std::fs::copy(fixture("tiny").join(&name), odd.join(name)).unwrap();
    }
    let out = cache.path().join(OsStr::from_bytes(b"\xfe.gguf"));
    let ran = command([odd.as_os_str(), out.as_os_str()]).output().unwrap();
    assert!(ran.status.success() && out.exists(), "{}", String::from_utf8_lossy(&ran.stderr));
}

/// A legacy importance matrix.
fn legacy(entries: &[(&str, Vec<f32>)]) -> Vec<u8> {
    let mut b = (entries.len() as i32).to_le_bytes().to_vec();
    for (name, values) in entries {
        b.extend((name.len() as i32).to_le_bytes());
        b.extend(name.as_bytes());
        b.extend(1i32.to_le_bytes());
        b.extend((values.len() as i32).to_le_bytes());
        b.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }
    b
}

#[test]
fn importance_matrices() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("im.dat");
    let args = |ty: &str| format!("--type {ty} --imatrix {}", file.display());
    let down = "blk.0.ffn_down.weight";
    let good = std::fs::read(fixture("tiny.imatrix.gguf")).unwrap();
    let input = fixture("tiny");
    let cases: [(&str, Vec<u8>, &str, &[&str]); 12] = [
        ("nothing", vec![], "q4_k_m", &["im.dat"]),
        ("words", b"hello, world".to_vec(), "q4_k_m", &["im.dat: neither GGUF nor a legacy imatrix"]),
        ("a model", std::fs::read(input.join("model.safetensors")).unwrap(), "q4_k_m", &["im.dat: neither"]),
        ("cut", good[..good.len() - 40].to_vec(), "q4_k_m", &["im.dat", "truncated"]),
        ("cut in the header", good[..200].to_vec(), "q4_k_m", &["im.dat"]),
        ("another length", legacy(&[(down, vec![1.0; 255])]), "q4_k_m", &[down, "255 values, the tensor has 256"]),
        ("NaN", legacy(&[(down, vec![f32::NAN; 256])]), "q4_k_m", &["im.dat", down, "NaN at column 0"]),
        ("infinity", legacy(&[(down, vec![f32::INFINITY; 256])]), "q4_k_m", &["im.dat", down, "inf at column 0"]),
        ("another model's", legacy(&[("x", vec![1.0; 256])]), "iq2_xs", &["no entry for", "blk.0.attn_output.weight"]),
        (
            "not all",
            legacy(&[(down, vec![1.0; 256])]),
            "iq1_s",
            &["no entry for 1 tensors", "blk.0.attn_output.weight"],
        ),
        ("twice", legacy(&[(down, vec![1.0; 256]), (down, vec![1.0; 256])]), "q4_0", &[down, "appears twice"]),
        (
            "a GGUF that is none",
            b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
            "q4_0",
            &["imatrix.datasets"],
        ),
    ];
    for (case, bytes, ty, words) in cases {
        std::fs::write(&file, bytes).unwrap();
        refused(case, &input, &args(ty), words);
    }
    std::fs::remove_file(&file).unwrap();
    refused("none", &input, &args("q4_0"), &["im.dat: No such file"]);
    std::fs::write(&file, legacy(&[(down, vec![0.0; 256])])).unwrap();
    accepted("all zero", &input, &args("q4_k_m"));
    let said = accepted("another model's, where none is needed", &input, &args("q4_k_m"));
    assert!(said.contains("imatrix: no entry for"), "{said}");
}
