//! One weight file.

use serde_json::{Value as Json, json};

use super::common::program::{Checkpoint, convert, fixture, run, sha256, with_header};
use super::{Case, Damage, accepted, all_refused};

const FILE: &str = "model.safetensors";
const NORM: &str = "model.norm.weight";

fn parts(c: &Checkpoint) -> (Json, Vec<u8>) {
    let bytes = std::fs::read(c.file(FILE)).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + n]).unwrap(), bytes[8 + n..].to_vec())
}

/// Changes the header, keeps the data.
fn header(c: &Checkpoint, change: impl FnOnce(&mut Json)) {
    let (mut json, data) = parts(c);
    change(&mut json);
    c.write(FILE, with_header(&json.to_string(), &data));
}

/// Changes the text of the header, keeps the data.
fn text(c: &Checkpoint, change: impl FnOnce(String) -> String) {
    let (json, data) = parts(c);
    c.write(FILE, with_header(&change(json.to_string()), &data));
}

fn with_length(c: &Checkpoint, n: u64) {
    let mut bytes = std::fs::read(c.file(FILE)).unwrap();
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    c.write(FILE, bytes);
}

fn entry(c: &Checkpoint, key: &str, value: Json) {
    header(c, |h| h[NORM][key] = value);
}

/// Adds an entry behind the others, with `n` bytes of data.
fn add(c: &Checkpoint, name: &str, dtype: &str, shape: Json, n: usize) {
    let (mut json, mut data) = parts(c);
    let begin = data.len();
    data.resize(begin + n, 0);
    json[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + n]});
    c.write(FILE, with_header(&json.to_string(), &data));
}

const CASES: &[Case] = &[
    ("seven bytes", |c| c.write(FILE, b"\x08\0\0\0\0\0\0"), &["model.safetensors: 7 bytes are too few"]),
    ("nothing", |c| c.write(FILE, b""), &["model.safetensors", "the file is empty"]),
    ("length above the limit", |c| with_length(c, 100_000_001), &["model.safetensors: the header says", "100000001"]),
    ("length of 2^64 - 1", |c| with_length(c, u64::MAX), &["model.safetensors", "18446744073709551615"]),
    ("length beyond the file", |c| with_length(c, 140_000), &["model.safetensors", "140000 bytes, the file has"]),
    ("not UTF-8", |c| c.write(FILE, [&8u64.to_le_bytes()[..], b"{\"\xff\":{}}"].concat()), &["not UTF-8 at byte 10"]),
    ("a list", |c| c.write(FILE, with_header("[]", b"")), &["does not start with `{`"]),
    ("a blank first", |c| text(c, |t| format!(" {t}")), &["does not start with `{`"]),
    ("cut JSON", |c| text(c, |t| t[..t.len() - 1].into()), &["model.safetensors: the header is not a valid JSON"]),
    ("words behind", |c| text(c, |t| t + "x"), &["the header is not a valid JSON"]),
    ("NUL behind", |c| text(c, |t| t + "\0\0"), &["the header is not a valid JSON"]),
    ("deep", |c| text(c, |t| format!("{{\"a\":{}{}", "[".repeat(100_000), &t[1..])), &["not a valid JSON"]),
    (
        "the same name twice",
        |c| text(c, |t| t.replace("model.layers.0.input_layernorm", "model.norm")),
        &["tensor `model.norm.weight` appears twice"],
    ),
    ("metadata is a list", |c| header(c, |h| h["__metadata__"] = json!([1])), &["__metadata__", "strings"]),
    ("metadata holds a number", |c| header(c, |h| h["__metadata__"]["x"] = json!(1)), &["__metadata__", "strings"]),
    ("an entry is a number", |c| header(c, |h| h[NORM] = json!(5)), &[NORM, "`dtype` is missing"]),
    ("an entry is null", |c| header(c, |h| h[NORM] = Json::Null), &[NORM, "`dtype` is missing"]),
    ("dtype is null", |c| entry(c, "dtype", Json::Null), &[NORM, "`dtype` is not a string"]),
    ("shape is a number", |c| entry(c, "shape", json!(32)), &[NORM, "`shape` is not a list"]),
    ("shape is negative", |c| entry(c, "shape", json!([-32])), &[NORM, "`shape` holds -32"]),
    ("shape is a fraction", |c| entry(c, "shape", json!([32.0])), &[NORM, "`shape` holds 32.0"]),
    ("shape is text", |c| entry(c, "shape", json!(["32"])), &[NORM, "`shape` holds \"32\""]),
    (
        "shape is above 2^64",
        |c| text(c, |t| t.replace("[32]", "[18446744073709551616]")),
        &["`shape` holds 18446744073709551616"],
    ),
    ("one offset", |c| entry(c, "data_offsets", json!([0])), &[NORM, "holds 1 numbers, not 2"]),
    ("three offsets", |c| entry(c, "data_offsets", json!([0, 1, 2])), &[NORM, "holds 3 numbers, not 2"]),
    ("negative offset", |c| entry(c, "data_offsets", json!([-1, 64])), &[NORM, "`data_offsets` holds -1"]),
    ("unknown dtype", |c| entry(c, "dtype", json!("F128")), &[NORM, "dtype `F128` is not known"]),
    ("lower case", |c| entry(c, "dtype", json!("bf16")), &[NORM, "dtype `bf16` is not known"]),
    ("integers", |c| entry(c, "dtype", json!("I16")), &[NORM, "I16 cannot be converted"]),
    ("a known dtype that nothing reads", |c| entry(c, "dtype", json!("U16")), &[NORM, "U16 cannot be converted"]),
    ("a size that is not its dtype's", |c| entry(c, "dtype", json!("C64")), &[NORM, "of C64 needs 256 bytes"]),
    ("half a size", |c| entry(c, "shape", json!([31])), &[NORM, "needs 62 bytes"]),
    ("end before begin", |c| entry(c, "data_offsets", json!([64, 0])), &[NORM, "the end is before the beginning"]),
    (
        "end beyond the data",
        |c| entry(c, "data_offsets", json!([1u64 << 40, (1u64 << 40) + 64])),
        &[NORM, "the file has only", "truncated"],
    ),
    (
        "truncated download",
        |c| {
            let bytes = std::fs::read(c.file(FILE)).unwrap();
            c.write(FILE, &bytes[..bytes.len() - 10]);
        },
        &["the file has only", "truncated download"],
    ),
    ("2^64 elements", |c| entry(c, "shape", json!([1u64 << 32, 1u64 << 32])), &[NORM, "overflows"]),
    ("2^64 bytes", |c| entry(c, "shape", json!([1u64 << 62, 4])), &[NORM, "overflows"]),
    ("2^61 elements", |c| entry(c, "shape", json!([1u64 << 61])), &[NORM, "overflows"]),
    ("overlap", |c| entry(c, "data_offsets", json!([2, 66])), &["overlaps the tensor before it"]),
    (
        "a hole",
        |c| {
            let (mut json, mut data) = parts(c);
            data.resize(data.len() + 64, 0);
            let n = data.len();
            json["extra"] = json!({"dtype": "U8", "shape": [32], "data_offsets": [n - 32, n]});
            c.write(FILE, with_header(&json.to_string(), &data));
        },
        &["`extra`", "leaves a hole before it"],
    ),
    (
        "bytes behind the last",
        |c| c.write(FILE, [std::fs::read(c.file(FILE)).unwrap(), vec![0; 5]].concat()),
        &["5 bytes belong to no tensor"],
    ),
    ("half a byte", |c| add(c, "x", "F4", json!([3]), 1), &["`x`", "of F4 needs 2 bytes"]),
    (
        "a pointer of Git LFS",
        |c| c.write(FILE, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        &["model.safetensors", "a Git LFS pointer", "git lfs pull"],
    ),
    ("a web page", |c| c.write(FILE, "<!DOCTYPE html><html></html>"), &["an HTML page, the download failed"]),
    ("a zip", |c| c.write(FILE, [&b"PK\x03\x04"[..], &[0; 60]].concat()), &["a PyTorch pickle"]),
    ("a pickle", |c| c.write(FILE, [&b"\x80\x02"[..], &[255; 60]].concat()), &["a PyTorch pickle"]),
    ("a GGUF file", |c| c.write(FILE, [&b"GGUF"[..], &[3; 60]].concat()), &["a GGUF file"]),
    ("zeros", |c| c.write(FILE, [0; 64]), &["does not start with `{`"]),
    (
        "a folder",
        |c| {
            c.remove(FILE);
            std::fs::create_dir(c.file(FILE)).unwrap();
        },
        &["model.safetensors: a folder, not a file"],
    ),
    (
        "a pipe",
        |c| {
            c.remove(FILE);
            assert!(std::process::Command::new("mkfifo").arg(c.file(FILE)).status().unwrap().success());
        },
        &["model.safetensors: not a regular file"],
    ),
    (
        "a link to nothing",
        |c| {
            c.remove(FILE);
            std::os::unix::fs::symlink("../../blobs/none", c.file(FILE)).unwrap();
        },
        &["model.safetensors", "download"],
    ),
    (
        "a link to itself",
        |c| {
            c.remove(FILE);
            std::os::unix::fs::symlink(FILE, c.file(FILE)).unwrap();
        },
        &["model.safetensors"],
    ),
    ("a name that is no model's", |c| add(c, "x\u{0}\n", "U8", json!([1]), 1), &["is not part of a LlamaForCausalLM"]),
];

#[test]
fn damaged_files_are_refused() {
    all_refused(CASES);
    for field in ["dtype", "shape", "data_offsets"] {
        let c = Checkpoint::new();
        header(&c, |h| {
            h[NORM].as_object_mut().unwrap().remove(field);
        });
        super::refused(field, c.path(), "", &[NORM, &format!("`{field}` is missing")]);
    }
}

#[test]
fn what_the_format_allows_is_read() {
    let good = Checkpoint::new();
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    convert(good.path(), &a, "--no-provenance --quiet").exits(0);
    let changes: [(&str, Damage); 5] = [
        ("blanks behind the header, data at any byte", |c| text(c, |t| t + "   ")),
        ("no metadata", |c| {
            header(c, |h| {
                h.as_object_mut().unwrap().remove("__metadata__");
            })
        }),
        ("fields of tomorrow", |c| entry(c, "checksum", json!({"a": [1, 2.5]}))),
        ("escapes in names", |c| text(c, |t| t.replace("model.norm", "model\\u002enorm"))),
        ("another order of names", |c| {
            let (json, data) = parts(c);
            let all: serde_json::Map<String, Json> =
                json.as_object().unwrap().iter().rev().map(|(k, v)| (k.clone(), v.clone())).collect();
            c.write(FILE, with_header(&Json::Object(all).to_string(), &data));
        }),
    ];
    for (case, change) in changes {
        // in the same folder, as its name becomes the model's
        std::fs::copy(fixture("tiny").join(FILE), good.file(FILE)).unwrap();
        change(&good);
        accepted(case, good.path(), "");
        convert(good.path(), &b, "--no-provenance --quiet --force").exits(0);
        assert_eq!(sha256(&a), sha256(&b), "{case}");
    }
    // nothing in a tensor, and no dimensions
    let c = Checkpoint::new();
    add(&c, "empty", "F32", json!([0, 7]), 0);
    add(&c, "scalar", "F64", json!([]), 8);
    add(&c, "last", "F16", json!([5, 0]), 0);
    let ran = run(["inspect", c.path().to_str().unwrap(), "--json", "--sha256"]).exits(0);
    assert_eq!(ran.stdout.matches("e3b0c44298fc1c149afbf4c8996fb924").count(), 2);
    run(["inspect", c.file(FILE).to_str().unwrap()]).exits(0);
}
