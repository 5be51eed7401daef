//! What must not change the bytes (threads, instruction set, memory), what repeats them (recipes), what describes them
//! (manifests), and memory ceilings that are kept.

mod common;

use std::path::Path;
use std::time::Duration;

use common::program::{Checkpoint, Ran, command, convert, fixture, hex, run, sha256};
use ostq_convert::gguf;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

const TYPES: [&str; 8] = ["bf16", "q8_0", "q4_0", "q4_k_m", "q3_k_m", "q6_k", "iq4_xs", "iq3_s"];

fn with_isa(input: &Path, out: &Path, args: &str, isa: &str) -> Ran {
    let mut c = command([input, out]);
    c.args(args.split_whitespace()).env("OSTQ_ISA", isa);
    c.output().unwrap().into()
}

#[test]
fn threads_memory_and_instruction_set_do_not_change_the_bytes() {
    let input = Checkpoint::sized(256, 1024, 1);
    let dir = tempfile::tempdir().unwrap();
    let (first, other) = (dir.path().join("first.gguf"), dir.path().join("other.gguf"));
    // the recipe is part of a file, and does not hold any of these
    for ty in TYPES {
        let type_arg = format!("--force --quiet --type {ty}");
        convert(input.path(), &first, &format!("{type_arg} --threads 1")).exits(0);
        let sum = sha256(&first);
        for args in ["--threads 2", "--threads 3", "--threads 3 --max-memory 1GiB"] {
            convert(input.path(), &other, &format!("{type_arg} {args}")).exits(0);
            assert_eq!(sha256(&other), sum, "{ty} {args}");
        }
        let least = least_memory(input.path(), ty);
        convert(input.path(), &other, &format!("{type_arg} --threads 3 --max-memory {least}")).exits(0);
        assert_eq!(sha256(&other), sum, "{ty} in {least} bytes");
        with_isa(input.path(), &other, &type_arg, "scalar").exits(0);
        assert_eq!(sha256(&other), sum, "{ty} without vectors");
    }
}

/// The smallest ceiling that is accepted, in bytes.
fn least_memory(input: &Path, ty: &str) -> u64 {
    let planned = |limit: u64| {
        run(["plan", "--json", "--type", ty, "--max-memory", &limit.to_string()]
            .map(String::from)
            .into_iter()
            .chain([input.display().to_string()]))
    };
    let (mut bad, mut good) = (1 << 20, 1 << 32);
    assert_eq!(planned(bad).code, 4);
    while good - bad > 4096 {
        let middle = (good + bad) / 2;
        *(if planned(middle).code == 0 { &mut good } else { &mut bad }) = middle;
    }
    good
}

#[test]
fn unknown_instruction_sets_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    with_isa(&fixture("tiny"), &dir.path().join("o.gguf"), "", "mmx").exits(2).says("OSTQ_ISA");
}

#[test]
fn a_ceiling_is_refused_before_work_or_kept() {
    let input = Checkpoint::sized(256, 16384, 2); // 50 MiB
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    convert(input.path(), &out, "--max-memory 8MiB")
        .exits(4)
        .says("--max-memory 8.0 MiB: this conversion needs at least");
    assert!(!out.exists());
    for args in ["--type q8_0", "--type q4_k_m", "--type q4_0 --threads 3", "--outtype f32", "--outtype bf16"] {
        let ty = args.split_whitespace().nth(1).unwrap();
        let least = least_memory(input.path(), ty) + (1 << 20);
        for limit in [Some(least), None] {
            let mut c = command([input.path(), &out]);
            c.args(args.split_whitespace()).args(["--force", "--json"]);
            if let Some(l) = limit {
                c.args(["--max-memory", &l.to_string()]);
            }
            let mut child = c.spawn().unwrap();
            let mut peak = 0;
            while child.try_wait().unwrap().is_none() {
                peak = peak.max(high_water(child.id()).unwrap_or(0));
                std::thread::sleep(Duration::from_millis(2));
            }
            let ran = Ran::from(child.wait_with_output().unwrap()).exits(0);
            let json: Json = serde_json::from_str(&ran.stdout).unwrap();
            let said = json["memory"].as_u64().unwrap();
            assert!(peak > 1 << 20, "the measurement sees nothing");
            assert!(peak <= said, "{args}: {peak} bytes resident, {said} said");
            assert!(limit.is_none_or(|l| said <= l), "{args}: {said} said, {limit:?} allowed");
            eprintln!("{args}, ceiling {limit:?}: {said} said, {peak} resident");
        }
    }
}

/// `VmHWM`, in bytes.
fn high_water(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[test]
fn a_printed_recipe_repeats_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, recipe) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"), dir.path().join("r.toml"));
    let imatrix = fixture("tiny.imatrix.gguf");
    let lines = [
        String::new(),
        "--outtype f16".into(),
        "--type q5_k_s --pure --via f32 --exact".into(),
        format!("--type iq3_s --imatrix {} --exclude-weights ffn_up --tensor-type ffn_down=q6_k", imatrix.display()),
        "--type q4_0 --model-name Other --override-kv llama.context_length=int:77 --token-embedding-type q8_0".into(),
        "--type q8_0 --tensor-type attn_(k|q)=q5_1 --tensor-type ffn=q4_1 --leave-output-tensor --no-provenance".into(),
        "--vocab-only".into(),
        "--outtype bf16 --bigendian".into(),
        "--outtype bf16 --fuse-qkv".into(),
    ];
    for args in lines {
        let ran = convert(&fixture("tiny"), &a, &format!("{args} --force --quiet --print-recipe")).exits(0);
        std::fs::write(&recipe, &ran.stdout).unwrap();
        convert(&fixture("tiny"), &b, &format!("--recipe {} --force --quiet", recipe.display())).exits(0);
        assert_eq!(sha256(&a), sha256(&b), "{args}\n{}", ran.stdout);
        // without work: the same recipe
        let dry = convert(&fixture("tiny"), &b, &format!("{args} --dry-run --print-recipe")).exits(0);
        assert_eq!(dry.stdout, ran.stdout);
        // and the file says how it was made, without a folder of this machine
        let bytes = std::fs::read(&a).unwrap();
        let header = gguf::read(&bytes).map(|h| h.metadata).unwrap_or_default();
        if let Some(text) = gguf::value::get(&header, "ostq.recipe").and_then(|v| v.as_str()) {
            let local = imatrix.parent().unwrap().to_str().unwrap();
            assert_eq!(text, ran.stdout.replace(&format!("{local}/"), ""), "{args}");
            assert!(!text.contains(local));
        }
    }
}

#[test]
fn flags_are_laid_over_a_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("r.toml");
    std::fs::write(&recipe, "type = \"q4_0\"\npure = true\n").unwrap();
    let plan = |args: &str| {
        let tiny = fixture("tiny");
        let all = ["plan", tiny.to_str().unwrap(), "--recipe", recipe.to_str().unwrap(), "--print-recipe"];
        run(all.into_iter().chain(args.split_whitespace()))
    };
    assert_eq!(plan("").exits(0).stdout, "type = \"q4_0\"\npure = true\n");
    assert_eq!(plan("--outtype f16").exits(0).stdout, "outtype = \"f16\"\npure = true\n");
    std::fs::write(&recipe, "typ = \"q4_0\"\n").unwrap();
    plan("").exits(2).says("unknown field `typ`");
    std::fs::write(&recipe, [0xff, 0xfe]).unwrap();
    plan("").exits(2).says("r.toml");
    std::fs::remove_file(&recipe).unwrap();
    plan("").exits(2).says("r.toml");
}

#[test]
fn a_manifest_says_what_is_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let ran = convert(&fixture("tiny"), &out, "--type q4_k_m --manifest --quiet").exits(0);
    let bytes = std::fs::read(&out).unwrap();
    let header = gguf::read(&bytes).unwrap();
    let mut expected = format!("{}  {}\n", hex(&bytes), out.display());
    for t in &header.tensors {
        let sum = hex(&bytes[t.offset as usize..][..t.bytes as usize]);
        expected += &format!("{sum}  {}:{}\n", out.display(), t.name);
    }
    assert_eq!(ran.stdout, expected);
    let ran = convert(&fixture("tiny"), &out, "--type q4_k_m --manifest --json --quiet --force").exits(0);
    let json: Json = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json["manifest"]["sha256"], hex(&bytes), "again the same file");
    for t in &header.tensors {
        let sum = hex(&bytes[t.offset as usize..][..t.bytes as usize]);
        assert_eq!(json["manifest"]["tensors"][&t.name], sum);
    }
    let inspect = run(["inspect", "--sha256", "--json", out.to_str().unwrap()]).exits(0);
    let json: Json = serde_json::from_str(&inspect.stdout).unwrap();
    assert_eq!((&json["sha256"], json["tensors"].as_array().unwrap().len()), (&Json::from(hex(&bytes)), 12));
}

#[test]
fn provenance_names_the_source() {
    let c = Checkpoint::new();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    convert(c.path(), &out, "--quiet").exits(0);
    let bytes = std::fs::read(&out).unwrap();
    let header = gguf::read(&bytes).unwrap();
    let strings = |key: &str| match gguf::value::get(&header.metadata, key) {
        Some(gguf::Value::Array(gguf::Array::Str(v))) => {
            v.iter().map(|s| String::from_utf8(s.clone()).unwrap()).collect::<Vec<_>>()
        }
        other => panic!("{key}: {other:?}"),
    };
    // the sha256 of the sha256 of its pieces of 8 MiB
    let source = std::fs::read(c.file("model.safetensors")).unwrap();
    let pieces: Vec<u8> = source.chunks(8 << 20).flat_map(Sha256::digest).collect();
    assert_eq!(strings("ostq.source.sha256_pieces"), [hex(&pieces)]);
    assert_eq!(strings("ostq.source.files"), ["model.safetensors"]);
    let local = c.path().to_str().unwrap().as_bytes();
    assert!(!bytes.windows(local.len()).any(|w| w == local), "nothing local");
}

#[test]
fn wrong_words_get_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("o.gguf");
    let tiny = |args: &str| convert(&fixture("tiny"), &out, args);
    tiny("--type q4_km").exits(2).says("`q4_km` is no type; did you mean `q4_k_m`?");
    tiny("--outtype bf61").exits(2).says("did you mean `bf16`?");
    tiny("--type q4_0 --tensor-type nothing_here=q8_0").exits(2).says("no tensor matches `nothing_here=q8_0`");
    tiny("--tensor-type ffn_up=q9").exits(2).says("`q9` in `ffn_up=q9` is no tensor type");
    tiny("--tensor-type ffn_up").exits(2).says("not of the form REGEX=TYPE");
    tiny("--tensor-type (=q8_0").exits(2).says("--tensor-type");
    tiny("--output-tensor-type q9").exits(2).says("--output-tensor-type: `q9`");
    tiny("--prune-layers 5").exits(2).says("there is no layer 5");
    tiny("--max-memory lots").exits(2).says("no size");
    tiny("--threads 0").exits(2);
    tiny("--type q4_0 --outtype f16").exits(2);
    tiny("--override-kv a=int:x").exits(2).says("not a whole number");
    tiny("--override-kv general.alignment=int:64").exits(2).says("cannot be set");
    tiny("--override-kv ostq.version=str:x").exits(2).says("cannot be set");
    run(["--no-such-flag"]).exits(2);
    run(["plan"]).exits(2);
    convert(&dir.path().join("none"), &out, "").exits(3).says("none: No such file");
    assert!(!out.exists());
}
