//! Every key, in order, equal to what the reference writes for the shared test models.
//!
//! Needs the shared folder (skipped with a line on stderr if it is missing). `smollm2-135m` is made by its tools; its folder is
//! looked for in `OSTQ_MODELS`.

mod common;

use std::path::{Path, PathBuf};

use common::{Golden, equal, manifest, shared};
use ostq_convert::arch::metadata::{Built, MetadataOptions, build, rope_freqs};
use ostq_convert::checkpoint::Config;
use ostq_convert::checkpoint::naming::ParamCount;
use ostq_convert::gguf::value;
use ostq_convert::tokenizer::pre;
use ostq_convert::tokenizer::pre::structure::Structure;
use serde_json::Value as Json;
use tokenizers::Tokenizer;

const MODELS: &[&str] = &[
    "tiny-llama",
    "random-llama2",
    "random-llama3",
    "random-llama-sharded",
    "random-llama-fp8",
    "random-llama-f16",
    "random-llama-f32",
    "random-llama-576",
    "random-mistral",
    "random-qwen2",
    "random-qwen3",
];

const SCORES: &str = "tokenizer.ggml.scores";

fn built(folder: &Path, golden: &Golden, variant: &str) -> Built {
    let config = Config::load(folder).unwrap();
    let arch = config.architecture().unwrap();
    let hp = config.hparams(arch).unwrap();
    let mut options = MetadataOptions {
        file_type: golden.value(variant, "general.file_type").and_then(Json::as_u64).unwrap() as u32,
        embedding_rows: Some(hp.vocab_size),
        ..MetadataOptions::default()
    };
    for (name, shape, _) in golden.tensors(variant) {
        options.params.add(name, &shape);
    }
    if variant.ends_with("-model-name") {
        options.model_name = Some("My Model 7B v2 Instruct".into());
    }
    build(folder, &config, &hp, arch, &options).unwrap()
}

fn compare(folder: &Path, golden: &Golden, model: &str, variant: &str) {
    let ours = built(folder, golden, variant);
    let wanted = golden.metadata(variant);
    let keys = |list: &[&str]| list.join("\n");
    let own_keys: Vec<&str> = ours.metadata.iter().map(|(k, _)| k.as_str()).collect();
    let wanted_keys: Vec<&str> = wanted.iter().map(|kv| kv[0].as_str().unwrap()).collect();
    assert_eq!(keys(&own_keys), keys(&wanted_keys), "{model} {variant}: keys");
    for ((key, value), kv) in ours.metadata.iter().zip(&wanted) {
        if model == "random-llama-f16" && key == SCORES {
            continue; // ours come from the merges, see below
        }
        let (kind, shown) = manifest(value);
        assert_eq!(kv[1], kind.as_str(), "{model} {variant}: type of {key}");
        assert!(equal(&shown, &kv[2]), "{model} {variant}: {key}: {shown}, the reference has {}", kv[2]);
    }
}

#[test]
fn every_key_in_order() {
    let Some(shared) = shared() else { return };
    for model in MODELS {
        let golden = Golden::load(&shared, model);
        let variants = golden.variants("convert-");
        assert!(variants.len() >= 4, "{model}: only {variants:?}");
        for variant in variants {
            compare(&shared.join("models").join(model), &golden, model, variant);
        }
    }
}

#[test]
fn every_key_of_smollm2() {
    let Some(shared) = shared() else { return };
    let folder = std::env::var_os("OSTQ_MODELS").map(PathBuf::from).unwrap_or_default().join("smollm2-135m");
    if !folder.join("config.json").is_file() {
        eprintln!("SKIPPED: no smollm2-135m (set OSTQ_MODELS to the folder that make-models.py filled)");
        return;
    }
    compare(&folder, &Golden::load(&shared, "smollm2-135m"), "smollm2-135m", "convert-bf16");
}

/// tokenizer.json holds the vocabulary of tokenizer.model: the scores that are made from its merges are those of the model.
#[test]
fn scores_from_merges_are_those_of_the_sentencepiece_model() {
    let Some(shared) = shared() else { return };
    let f16 = Golden::load(&shared, "random-llama-f16");
    let ours = built(&shared.join("models/random-llama-f16"), &f16, "convert-f16");
    let (_, scores) = manifest(value::get(&ours.metadata, SCORES).unwrap());
    assert_eq!(Some(&scores), Golden::load(&shared, "random-llama2").value("convert-f16", SCORES));
}

#[test]
fn rope_factors_to_the_bit() {
    let Some(shared) = shared() else { return };
    let mut checked = 0;
    for model in MODELS {
        let folder = shared.join("models").join(model);
        let config = Config::load(&folder).unwrap();
        let hp = config.hparams(config.architecture().unwrap()).unwrap();
        let golden = Golden::load(&shared, model);
        let tensors = golden.tensors("convert-f32");
        let wanted =
            tensors.iter().find(|(name, ..)| *name == "rope_freqs.weight").map(|(_, _, digest)| digest.to_string());
        let bytes = rope_freqs(&hp).map(|f| f.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        assert_eq!(bytes.map(|b| common::digest(&b)), wanted, "{model}");
        checked += usize::from(rope_freqs(&hp).is_some());
    }
    assert!(checked >= 1);
}

/// The hashes of the small tokenizers are known; the structure must lead to the name that the real family has.
#[test]
fn pre_tokenizers_by_hash_and_by_structure() {
    let Some(shared) = shared() else { return };
    let text = std::fs::read_to_string(shared.join("goldens/pre-map.json")).unwrap();
    let map: Json = serde_json::from_str(&text).unwrap();
    let mut seen = 0;
    for model in [
        "random-llama3",
        "random-llama-576",
        "random-qwen2",
        "random-qwen3",
        "random-smollm3",
        "random-olmo2",
        "random-granite",
        "random-gpt-oss",
    ] {
        let folder = shared.join("models").join(model);
        let file = folder.join("tokenizer.json");
        let hash = pre::hash(&Tokenizer::from_file(&file).unwrap()).unwrap();
        let wanted = map[&hash].as_str().unwrap_or_else(|| panic!("{model}: {hash} is not in pre-map.json"));
        let golden = Golden::load(&shared, model);
        assert_eq!(golden.value("convert-f32", "tokenizer.ggml.pre").and_then(Json::as_str), Some(wanted), "{model}");
        let Json::Object(tokenizer) = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap() else {
            panic!()
        };
        let config = Config::load(&folder).unwrap();
        let class = config.values["architectures"][0].as_str().unwrap();
        assert_eq!(Structure::read(&tokenizer).names(class).unwrap()[0], wanted, "{model}");
        seen += 1;
    }
    assert_eq!(seen, map.as_object().unwrap().len());
    assert_eq!(ParamCount::default().size_label(), None);
}
