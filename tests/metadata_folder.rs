//! A folder's files become keys, or a message: what is right, what is odd, what is wrong. Runs on the fixtures of the clone.

mod common;

use std::path::{Path, PathBuf};

use common::{equal, manifest};
use ostq_convert::arch::metadata::{Built, MetadataOptions, build};
use ostq_convert::checkpoint::Config;
use ostq_convert::gguf::{Array, Value, value};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn try_build(folder: &Path, options: &MetadataOptions) -> Result<Built, String> {
    let config = Config::load(folder).map_err(|e| e.to_string())?;
    let arch = config.architecture().map_err(|e| e.to_string())?;
    let hp = config.hparams(arch).map_err(|e| e.to_string())?;
    build(folder, &config, &hp, arch, options).map_err(|e| e.to_string())
}

/// A copy of a fixture that a test may change.
struct Folder(TempDir);

impl Folder {
    fn of(name: &str) -> Folder {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixture(name)).unwrap().flatten() {
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        Folder(dir)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn write(self, file: &str, bytes: impl AsRef<[u8]>) -> Folder {
        std::fs::write(self.path(file), bytes).unwrap();
        self
    }

    fn remove(self, file: &str) -> Folder {
        std::fs::remove_file(self.path(file)).unwrap();
        self
    }

    fn edit(self, file: &str, change: impl FnOnce(&mut Json)) -> Folder {
        let mut json: Json = serde_json::from_str(&std::fs::read_to_string(self.path(file)).unwrap()).unwrap();
        change(&mut json);
        let text = json.to_string();
        self.write(file, text)
    }

    fn built(&self) -> Built {
        try_build(self.0.path(), &MetadataOptions::default()).unwrap()
    }

    fn error(&self) -> String {
        try_build(self.0.path(), &MetadataOptions::default()).unwrap_err()
    }
}

fn key<'a>(built: &'a Built, key: &str) -> Option<&'a Value> {
    value::get(&built.metadata, key)
}

fn warned(built: &Built, words: &[&str]) {
    let found = built.warnings.iter().any(|w| words.iter().all(|word| w.contains(word)));
    assert!(found, "no warning with {words:?} among {:#?}", built.warnings);
}

#[test]
fn keys_types_values_and_order_are_those_of_the_reference() {
    for (name, title) in
        [("tiny-llama3", "Random Llama3"), ("tiny-llama2", "Random Llama2"), ("tiny-qwen3", "Random Qwen3")]
    {
        let options = MetadataOptions { file_type: 1, model_name: Some(title.into()), ..MetadataOptions::default() };
        let built = try_build(&fixture(name), &options).unwrap();
        let text = std::fs::read_to_string(fixture(name).join("expected.json")).unwrap();
        let expected: Vec<Json> = serde_json::from_str(&text).unwrap();
        let keys: Vec<&str> = built.metadata.iter().map(|(k, _)| k.as_str()).collect();
        assert_eq!(keys, expected.iter().map(|kv| kv[0].as_str().unwrap()).collect::<Vec<_>>(), "{name}");
        for ((key, value), kv) in built.metadata.iter().zip(&expected) {
            let (kind, shown) = manifest(value);
            assert!(kv[1] == kind.as_str() && equal(&shown, &kv[2]), "{name}: {key}: {kind} {shown}, expected {kv}");
        }
    }
}

#[test]
fn the_summary_says_what_was_chosen() {
    let built = Folder::of("tiny-llama3").built();
    let shown: Vec<String> = built.summary.iter().map(|(label, text)| format!("{label}: {text}")).collect();
    let all = shown.join("\n");
    for part in [
        "tokenizer: gpt2, 512 tokens, from tokenizer.json",
        "pre-tokenizer: llama-bpe (by pre-tokenizer steps)",
        "bos: 501 `<|begin_of_text|>` (tokenizer_config.json)",
        "eos: 510 `<|eot_id|>` (tokenizer_config.json)",
        "eos list: config.json has [502,509,510]; 510 is written",
        "chat template: from tokenizer_config.json",
    ] {
        assert!(all.contains(part), "{part} is not in\n{all}");
    }
    assert!(built.stem.stem(Some("q4_k_m")).ends_with("-Q4_K_M") && built.stem.stem(None).ends_with("-vocab"));
}

#[test]
fn sizes_that_do_not_fit_are_refused_in_one_message() {
    let small = Folder::of("tiny-llama3").edit("config.json", |c| c["vocab_size"] = json!(400));
    let message = small.error();
    assert!(message.contains("key `vocab_size`: 400, but the tokenizer has ids up to 511"), "{message}");
    let rows = MetadataOptions { embedding_rows: Some(520), ..MetadataOptions::default() };
    let message = try_build(&fixture("tiny-llama3"), &rows).unwrap_err();
    assert!(message.contains("512, but the token embedding has 520 rows (tokens in tokenizer.json: 512)"), "{message}");
    let large = Folder::of("tiny-llama3").edit("config.json", |c| c["vocab_size"] = json!(514)).built();
    let Some(Value::Array(Array::Str(tokens))) = key(&large, "tokenizer.ggml.tokens") else { panic!() };
    assert_eq!(tokens[512..], [b"[PAD512]".to_vec(), b"[PAD513]".to_vec()]);
}

#[test]
fn special_tokens_that_cannot_be() {
    let outside = Folder::of("tiny-llama2").edit("config.json", |c| c["pad_token_id"] = json!(32000)).built();
    assert_eq!(key(&outside, "tokenizer.ggml.padding_token_id"), None);
    warned(&outside, &["pad token has the id 32000"]);
    let negative = Folder::of("tiny-llama3").edit("config.json", |c| c["pad_token_id"] = json!(-1)).built();
    assert_eq!(key(&negative, "tokenizer.ggml.padding_token_id"), None);
    warned(&negative, &["pad token has the id -1"]);
    let unnamed =
        Folder::of("tiny-llama3").edit("tokenizer_config.json", |c| c["eos_token"] = json!("<|nowhere|>")).built();
    assert_eq!(key(&unnamed, "tokenizer.ggml.eos_token_id"), Some(&Value::U32(502)));
    warned(&unnamed, &["eos_token_id is a list", "first"]);
}

#[test]
fn post_processors_decide_over_bos_and_eos() {
    let with_eos = Folder::of("tiny-llama3").edit("tokenizer.json", |t| {
        let end = json!({"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}});
        t["post_processor"]["processors"][1]["single"].as_array_mut().unwrap().push(end);
        t["post_processor"]["processors"][1]["special_tokens"]["<|end_of_text|>"] =
            json!({"id": "<|end_of_text|>", "ids": [502], "tokens": ["<|end_of_text|>"]});
    });
    let built = with_eos.built();
    assert_eq!(key(&built, "tokenizer.ggml.add_eos_token"), Some(&Value::Bool(true)));
    // What the template puts last becomes eos, the former eos becomes eot.
    assert_eq!(key(&built, "tokenizer.ggml.eos_token_id"), Some(&Value::U32(502)));
    assert_eq!(key(&built, "tokenizer.ggml.eot_token_id"), Some(&Value::U32(510)));
    let contradiction =
        Folder::of("tiny-llama3").edit("tokenizer_config.json", |c| c["add_bos_token"] = json!(false)).built();
    assert_eq!(key(&contradiction, "tokenizer.ggml.add_bos_token"), Some(&Value::Bool(true)));
    warned(&contradiction, &["add_bos_token false", "the latter counts"]);
}

#[test]
fn vocabularies_that_contradict_themselves() {
    let twice = Folder::of("tiny-llama3").edit("tokenizer.json", |t| t["model"]["vocab"]["a"] = json!(5));
    assert!(twice.error().contains("have the same id 5"), "{}", twice.error());
    let unknown =
        Folder::of("tiny-llama3").edit("tokenizer.json", |t| t["model"]["merges"][7] = json!(["qqq", "zzz"])).built();
    warned(&unknown, &["1 of 245 merges name tokens that the vocabulary lacks", "qqq zzz"]);
    let text = Folder::of("tiny-llama3").edit("tokenizer.json", |t| t["model"]["merges"][7] = json!(7));
    assert!(text.error().contains("key `model.merges`: entry 7 is not a pair"), "{}", text.error());
    let words = Folder::of("tiny-llama3").edit("tokenizer.json", |t| t["model"]["type"] = json!("WordPiece"));
    assert!(words.error().contains("key `model.type`: `WordPiece`"), "{}", words.error());
}

#[test]
fn pre_tokenizers_that_nobody_knows() {
    let odd = Folder::of("tiny-llama3").edit("tokenizer.json", |t| {
        t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("\\p{L}+|\\p{N}");
    });
    let message = odd.error();
    assert!(message.contains("unknown pre-tokenizer (hash ") && message.contains("--pre"), "{message}");
    let options = MetadataOptions { pre: Some("qwen2".into()), ..MetadataOptions::default() };
    let built = try_build(odd.0.path(), &options).unwrap();
    assert_eq!(key(&built, "tokenizer.ggml.pre"), Some(&"qwen2".into()));
}

#[test]
fn templates_that_would_stop_the_tokenizers_library() {
    let undescribed = Folder::of("tiny-llama3")
        .edit("tokenizer.json", |t| t["post_processor"]["processors"][1]["special_tokens"] = json!({}))
        .built();
    warned(&undescribed, &["the post-processor puts `<|begin_of_text|>` into texts"]);
    assert_eq!(key(&undescribed, "tokenizer.ggml.pre"), Some(&"llama-bpe".into()));
}

#[test]
fn folders_without_a_usable_tokenizer() {
    let none = Folder::of("tiny-llama3").remove("tokenizer.json");
    assert!(none.error().contains("no tokenizer: neither tokenizer.json"), "{}", none.error());
    let broken = Folder::of("tiny-llama3").write("tokenizer.json", "{\"model\": ");
    assert!(broken.error().contains("tokenizer.json: not valid JSON"), "{}", broken.error());
    let list = Folder::of("tiny-llama3").write("tokenizer.json", "[]");
    assert!(list.error().contains("a list, where an object was expected"), "{}", list.error());
    let cut = Folder::of("tiny-llama2");
    let bytes = std::fs::read(cut.path("tokenizer.model")).unwrap();
    let cut = cut.write("tokenizer.model", &bytes[..1001]);
    assert!(cut.error().contains("not a SentencePiece model"), "{}", cut.error());
    let tiktoken = Folder::of("tiny-llama3").write("tokenizer.model", "IQ== 0\nIg== 1\n").built();
    warned(&tiktoken, &["a tiktoken file"]);
    let tekken = Folder::of("tiny-llama3").remove("tokenizer.json").write("tekken.json", "{}");
    assert!(tekken.error().contains("Mistral's own tokenizer format"), "{}", tekken.error());
}

#[test]
fn the_files_of_slow_tokenizers_will_do() {
    let fast = Folder::of("tiny-llama3");
    let tokenizer: Json = serde_json::from_str(&std::fs::read_to_string(fast.path("tokenizer.json")).unwrap()).unwrap();
    let pairs = tokenizer["model"]["merges"].as_array().unwrap().iter();
    let merges: Vec<String> = pairs.map(|p| format!("{} {}", p[0].as_str().unwrap(), p[1].as_str().unwrap())).collect();
    let wanted = fast.built();
    let slow = fast
        .write("vocab.json", tokenizer["model"]["vocab"].to_string())
        .write("merges.txt", format!("#version: 0.2\n{}\n", merges.join("\n")))
        .edit("tokenizer_config.json", |c| c["tokenizer_class"] = json!("GPT2Tokenizer"))
        .remove("tokenizer.json")
        .built();
    for name in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"] {
        assert_eq!(key(&slow, name), key(&wanted, name), "{name}");
    }
    assert_eq!(key(&slow, "tokenizer.ggml.pre"), Some(&"gpt-2".into()));
}

#[test]
fn a_sentencepiece_vocabulary_without_its_model() {
    let model = Folder::of("tiny-llama2").built();
    let json = Folder::of("tiny-llama2").remove("tokenizer.model").built();
    for name in
        ["tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id"]
    {
        assert_eq!(key(&json, name), key(&model, name), "{name}");
    }
}

#[test]
fn odd_side_files_are_told_and_passed_over() {
    let card = Folder::of("tiny-llama3").write("README.md", "---\na: b: c\n---\n").built();
    warned(&card, &["README.md", "the model card is left out"]);
    let generation = Folder::of("tiny-llama3").write("generation_config.json", "{\"temperature\": NaN}").built();
    warned(&generation, &["generation_config.json", "NaN in line 1"]);
    let template = Folder::of("tiny-llama3").write("chat_template.jinja", "another").built();
    warned(&template, &["chat template of tokenizer_config.json differs from chat_template.jinja"]);
    let own = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(own.path(), "mine").unwrap();
    let options = MetadataOptions { chat_template: Some(own.path().into()), ..MetadataOptions::default() };
    let built = try_build(&fixture("tiny-llama3"), &options).unwrap();
    assert_eq!(key(&built, "tokenizer.chat_template"), Some(&"mine".into()));
}

#[test]
fn folders_that_are_no_checkpoints() {
    let message = |name: &str| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), "{}").unwrap();
        Config::load(dir.path()).unwrap_err().to_string()
    };
    assert!(message("adapter_config.json").contains("LoRA adapter"));
    assert!(message("model_index.json").contains("diffusers"));
    assert!(message("x.gguf").contains("GGUF"));
    assert!(Config::load(Path::new("no such folder")).unwrap_err().to_string().contains("no such folder"));
}

/// Files cut short and files with a byte changed: an error, a warning or other keys, never a panic.
#[test]
fn damaged_files_never_panic() {
    for (name, file, step) in [
        ("tiny-llama3", "tokenizer_config.json", 41),
        ("tiny-llama3", "config.json", 7),
        ("tiny-llama3", "tokenizer.json", 211),
        ("tiny-llama2", "tokenizer.model", 53),
    ] {
        let original = std::fs::read(fixture(name).join(file)).unwrap();
        for at in (0..original.len()).step_by(step) {
            let _ = try_build(Folder::of(name).write(file, &original[..at]).0.path(), &MetadataOptions::default());
            let mut changed = original.clone();
            changed[at] ^= 0x15;
            let _ = try_build(Folder::of(name).write(file, &changed).0.path(), &MetadataOptions::default());
        }
    }
}
