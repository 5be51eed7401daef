//! GGUF files: the cases of llama.cpp's `tests/test-gguf.cpp`, and holes that other readers had.

use super::common::program::{convert, fixture, run, sha256};
use super::{refused, try_refused};

/// A GGUF file in pieces.
#[derive(Clone)]
struct File {
    magic: &'static [u8],
    version: u32,
    n_tensors: Option<u64>,
    n_keys: Option<u64>,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    align: usize,
    data: usize,
}

fn text(s: &[u8]) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s].concat()
}

fn key(name: &str, ty: u32, value: &[u8]) -> Vec<u8> {
    [&text(name.as_bytes())[..], &ty.to_le_bytes(), value].concat()
}

fn tensor(name: &str, dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    let mut b = text(name.as_bytes());
    b.extend((dims.len() as u32).to_le_bytes());
    b.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
    b.extend(ty.to_le_bytes());
    b.extend(offset.to_le_bytes());
    b
}

impl File {
    fn new() -> File {
        File {
            magic: b"GGUF",
            version: 3,
            n_tensors: None,
            n_keys: None,
            keys: vec![key("general.architecture", 8, &text(b"llama"))],
            tensors: vec![tensor("a.weight", &[32, 2], 0, 0)],
            align: 32,
            data: 256,
        }
    }

    fn key(mut self, name: &str, ty: u32, value: &[u8]) -> File {
        self.keys.push(key(name, ty, value));
        self
    }

    fn tensors(mut self, list: &[Vec<u8>], data: usize) -> File {
        (self.tensors, self.data) = (list.to_vec(), data);
        self
    }

    fn header(&self) -> Vec<u8> {
        let mut b = self.magic.to_vec();
        b.extend(self.version.to_le_bytes());
        b.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        b.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        b.extend(self.keys.concat());
        b.extend(self.tensors.concat());
        b
    }

    fn bytes(&self) -> Vec<u8> {
        let mut b = self.header();
        b.resize(b.len().next_multiple_of(self.align.max(1)) + self.data, 0);
        b
    }
}

const MAX: [u8; 8] = [255; 8];

#[test]
fn damaged_files_are_refused() {
    let f = File::new;
    let one = |dims: &[u64], ty, offset| f().tensors(&[tensor("a.weight", dims, ty, offset)], 256).bytes();
    let with = |name: &str, ty, value: &[u8]| f().key(name, ty, value).bytes();
    let list = |ty: u32, n: u64| [&ty.to_le_bytes()[..], &n.to_le_bytes()].concat();
    let align = |ty, value: &[u8]| with("general.alignment", ty, value);
    let u32s = |n: u32| n.to_le_bytes();
    let name64 = "n".repeat(64);
    let good = f().bytes();
    // data is laid out for an alignment of 32, 64 is said
    let two = [tensor("a.weight", &[8], 0, 0), tensor("b.weight", &[8], 0, 32)];
    let inconsistent = f().key("general.alignment", 4, &u32s(64)).tensors(&two, 64).bytes();
    let huge =
        [tensor("a", &[i64::MAX as u64 - 63], 24, 0), tensor("b", &[i64::MAX as u64 - 63], 24, i64::MAX as u64 - 63)];
    let twice = [tensor("a.weight", &[8], 0, 0), tensor("a.weight", &[8], 0, 32)];
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("1 magic", File { magic: b"FUGG", ..f() }.bytes(), &["not a GGUF file"]),
        ("2 version 0", File { version: 0, ..f() }.bytes(), &["GGUF version 0"]),
        ("3 version 1", File { version: 1, ..f() }.bytes(), &["GGUF version 1"]),
        ("4 version 4", File { version: 4, ..f() }.bytes(), &["GGUF version 4"]),
        ("5 tensors -1", File { n_tensors: Some(u64::MAX), ..f() }.bytes(), &["number of tensors"]),
        ("6 keys -1", File { n_keys: Some(u64::MAX), ..f() }.bytes(), &["number of keys"]),
        (
            "7 nothing in it",
            File { keys: vec![], tensors: vec![], data: 0, ..f() }.bytes(),
            &["`general.architecture` is missing"],
        ),
        ("8 key size -1", File { keys: vec![MAX.to_vec()], ..f() }.bytes(), &["string of 18446744073709551615 bytes"]),
        ("9 empty key", with("", 4, &u32s(1)), &["an empty key"]),
        ("10 value type 13", with("x", 13, &u32s(1)), &["key `x`", "value type 13"]),
        ("10 value type -1", with("x", u32::MAX, &u32s(1)), &["key `x`", "value type 4294967295"]),
        ("11 key twice", with("general.architecture", 8, &text(b"llama")), &["`general.architecture` appears twice"]),
        ("12 alignment 13", align(4, &u32s(13)), &["general.alignment"]),
        ("12 alignment 0", align(4, &u32s(0)), &["general.alignment"]),
        ("38 alignment 2^31", align(4, &u32s(1 << 31)), &["general.alignment"]),
        ("38 alignment 2^32 - 1", align(4, &u32s(u32::MAX)), &["general.alignment"]),
        ("13 alignment is i32", align(5, &u32s(32)), &["general.alignment"]),
        ("13 alignment is text", align(8, &text(b"32")), &["general.alignment"]),
        ("15 name of 64", f().tensors(&[tensor(&name64, &[8], 0, 0)], 32).bytes(), &["tensor name of 64 bytes"]),
        ("15 name of 2^64 - 1", f().tensors(&[MAX.to_vec(), vec![0; 64]], 32).bytes(), &["18446744073709551615 bytes"]),
        ("16 five dimensions", one(&[1, 1, 1, 1, 1], 0, 0), &["`a.weight`", "5 dimensions"]),
        ("17 dimension -1", one(&[u64::MAX, 1], 0, 0), &["`a.weight`", "dimension -1 is negative"]),
        ("19 elements", one(&[1 << 31, 1 << 31, 4], 0, 0), &["`a.weight`", "overflows"]),
        ("19 elements, zero last", one(&[1 << 31, 1 << 31, 4, 0], 0, 0), &["`a.weight`", "overflows"]),
        ("20 bytes", one(&[1 << 31, 1 << 31], 0, 0), &["`a.weight`", "overflows"]),
        ("21 padding wraps", one(&[4, (1 << 30) - 1, (1 << 30) + 1], 0, 0), &["`a.weight`"]),
        ("22 type 43", one(&[32], 43, 0), &["`a.weight`", "type 43 is not known"]),
        ("39 removed type 4", one(&[32], 4, 0), &["`a.weight`", "type 4 is not known"]),
        ("39 removed type 31", one(&[32], 31, 0), &["`a.weight`", "type 31 is not known"]),
        ("23 offset -1", one(&[32], 0, u64::MAX), &["`a.weight`", "data offset 18446744073709551615"]),
        ("40 offset into the data", one(&[32], 0, 32), &["`a.weight`", "data offset 32, expected 0"]),
        ("24 name twice", f().tensors(&twice, 64).bytes(), &["`a.weight`", "appears twice"]),
        ("26 another alignment", inconsistent, &["`b.weight`", "data offset 32, expected 64"]),
        ("29 one byte short", good[..good.len() - 1].to_vec(), &["`a.weight`", "truncated"]),
        ("32 sizes that add up to 2^64", f().tensors(&huge, 256).bytes(), &["`a`"]),
        ("35 string of 2^64 - 1", with("x", 8, &MAX), &["key `x`", "18446744073709551615 bytes"]),
        ("35 string of 2^30 + 1", with("x", 8, &((1u64 << 30) + 1).to_le_bytes()), &["key `x`", "1073741825 bytes"]),
        ("36 array of 2^63", with("x", 9, &list(4, 1 << 63)), &["key `x`", "array of 9223372036854775808"]),
        ("36 array of 2^62 strings", with("x", 9, &list(8, 1 << 62)), &["key `x`", "array of 4611686018427387904"]),
        ("36 array of 2^30 bytes", with("x", 9, &list(0, 1 << 30)), &["key `x`", "array of 1073741824"]),
        ("36 array of type 13", with("x", 9, &list(13, 1)), &["key `x`", "element type 13"]),
        ("43 array of arrays", with("x", 9, &list(9, 1)), &["key `x`", "an array of arrays"]),
        ("37 2^40 keys", File { n_keys: Some(1 << 40), ..f() }.bytes(), &["number of keys is 1099511627776"]),
        ("37 2^40 tensors", File { n_tensors: Some(1 << 40), ..f() }.bytes(), &["number of tensors is 1099511627776"]),
        ("37 a key too many", File { n_keys: Some(2), ..f() }.bytes(), &[]),
        ("41 half a block", one(&[33], 2, 0), &["`a.weight`", "33", "32 elements"]),
        (
            "42 architecture is a number",
            File { keys: vec![key("general.architecture", 4, &u32s(1))], ..f() }.bytes(),
            &["`general.architecture`"],
        ),
        (
            "42 architecture is no UTF-8",
            File { keys: vec![key("general.architecture", 8, &text(b"\xff"))], ..f() }.bytes(),
            &["`general.architecture`"],
        ),
        (
            "44 key is no UTF-8",
            File { keys: vec![[&text(b"\xff\xfe")[..], &u32s(4), &u32s(1)].concat()], ..f() }.bytes(),
            &["a key is not UTF-8"],
        ),
        (
            "44 name is no UTF-8",
            {
                let mut t = tensor("a.weight", &[32], 0, 0);
                t[8] = 0xff;
                f().tensors(&[t], 128).bytes()
            },
            &["a tensor name is not UTF-8"],
        ),
        ("45 big-endian", big_endian(), &["big-endian"]),
        ("46 one part of two", f().key("split.count", 2, &2u16.to_le_bytes()).bytes(), &["one part of a split GGUF"]),
        ("49 no data", f().header(), &["`a.weight`", "truncated"]),
        ("50 zeros", vec![0; 4096], &["an interrupted write"]),
        ("23 bytes", good[..23].to_vec(), &["23 bytes are too few"]),
        ("nothing", vec![], &["0 bytes are too few"]),
    ];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.gguf");
    let mut wrong = String::new();
    for (case, bytes, words) in &cases {
        std::fs::write(&file, bytes).unwrap();
        let words: Vec<&str> = ["bad.gguf"].iter().chain(words.iter()).copied().collect();
        for args in ["--type q8_0", "--type copy"] {
            if let Err(e) = try_refused(&file, args, &words) {
                wrong += &format!("{case}, {args}: {e}\n");
            }
        }
        let ran = run(["inspect", file.to_str().unwrap()]);
        if ran.code != 3 && !(ran.code == 0 && ["7 ", "42", "45", "46"].iter().any(|n| case.starts_with(n))) {
            wrong += &format!("{case}, inspect: exit code {}: {}\n", ran.code, ran.stderr);
        }
    }
    // and every shorter file
    let whole = File { keys: every_key(), ..f() }.bytes();
    for n in 0..whole.len() {
        if ostq_convert::gguf::read(&whole[..n]).is_ok() {
            wrong += &format!("the first {n} bytes are read\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    refused("a folder of none", dir.path(), "", &["config.json"]);
}

fn big_endian() -> Vec<u8> {
    let mut b = b"GGUF".to_vec();
    b.extend(3u32.to_be_bytes());
    b.extend(0u64.to_be_bytes());
    b.extend(1u64.to_be_bytes());
    b.extend(20u64.to_be_bytes());
    b.extend(b"general.architecture");
    b.extend(8u32.to_be_bytes());
    b.extend(5u64.to_be_bytes());
    b.extend(b"llama");
    b.resize(b.len().next_multiple_of(32), 0);
    b
}

/// One key of every type, and arrays of all.
fn every_key() -> Vec<Vec<u8>> {
    let sizes = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
    let mut keys = vec![key("general.architecture", 8, &text(b"llama"))];
    for ty in (0..13u32).filter(|t| *t != 9) {
        let value: Vec<u8> = if ty == 8 { text(b"\0\xffx") } else { vec![1; sizes[ty as usize]] };
        keys.push(key(&format!("k{ty}"), ty, &value));
        for n in [0u64, 1, 9] {
            let items = value.repeat(n as usize);
            keys.push(key(&format!("a{ty}.{n}"), 9, &[&ty.to_le_bytes()[..], &n.to_le_bytes(), &items].concat()));
        }
    }
    keys
}

#[test]
fn what_the_format_allows_is_read() {
    let f = File::new;
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("in.gguf"), dir.path().join("out.gguf"));
    let aligned = |a: u32, list: &[Vec<u8>], data| {
        File { align: a as usize, ..f().key("general.alignment", 4, &a.to_le_bytes()).tensors(list, data) }.bytes()
    };
    let long = "k".repeat(70_000);
    let odd = [tensor("a", &[3], 1, 0), tensor("b", &[5], 30, 6), tensor("c", &[1], 0, 16)];
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("version 2", File { version: 2, ..f() }.bytes()),
        ("every kind of key", File { keys: every_key(), ..f() }.bytes()),
        ("no tensors", f().tensors(&[], 0).bytes()),
        ("no tensors, no padding", f().tensors(&[], 0).header()),
        (
            "zero elements",
            f().tensors(
                &[tensor("a", &[0], 0, 0), tensor("b.weight", &[32, 0, 5], 0, 0), tensor("c.weight", &[0, 7], 8, 0)],
                0,
            )
            .bytes(),
        ),
        ("no dimensions", f().tensors(&[tensor("a", &[], 0, 0)], 32).bytes()),
        ("four dimensions", f().tensors(&[tensor("a.weight", &[32, 2, 3, 2], 0, 0)], 1536).bytes()),
        ("alignment 1", aligned(1, &odd, 20)),
        ("alignment 4096", aligned(4096, &[tensor("a", &[8], 0, 0), tensor("b", &[8], 0, 4096)], 8192)),
        ("a name of 63", f().tensors(&[tensor(&"n".repeat(63), &[8], 0, 0)], 32).bytes()),
        ("an empty name", f().tensors(&[tensor("", &[8], 0, 0)], 32).bytes()),
        ("bools that are 2", f().key("x", 7, &[2]).bytes()),
        ("a key of 70000 bytes", f().key(&long, 4, &[0; 4]).bytes()),
        ("no padding behind the last", f().tensors(&[tensor("a", &[3], 0, 0)], 12).bytes()),
        ("bytes behind the last", f().tensors(&[tensor("a", &[8], 0, 0)], 64 + 5).bytes()),
        ("split of one", f().key("split.count", 2, &1u16.to_le_bytes()).bytes()),
        (
            "2^31 layers, no heads",
            f().key("llama.block_count", 4, &(1u32 << 31).to_le_bytes())
                .key("llama.attention.head_count", 4, &[0; 4])
                .bytes(),
        ),
        ("layers are text", f().key("llama.block_count", 8, &text(b"many")).bytes()),
        (
            "heads are an empty list",
            f().key("llama.attention.head_count", 9, &[&4u32.to_le_bytes()[..], &[0; 8]].concat()).bytes(),
        ),
        ("-1 heads", f().key("llama.attention.head_count_kv", 5, &[255; 4]).bytes()),
        (
            "tokens and types of two lengths",
            f().key("tokenizer.ggml.scores", 9, &[&6u32.to_le_bytes()[..], &[0; 8]].concat()).bytes(),
        ),
    ];
    let mut wrong = String::new();
    for (case, bytes) in &cases {
        std::fs::write(&file, bytes).unwrap();
        for args in ["--type q8_0", "--type f16", "--type copy", "--type q4_k_m --pure"] {
            let ran = convert(&file, &out, &format!("{args} --allow-requantize --force --quiet"));
            if ran.code != 0 {
                wrong += &format!("{case}, {args}: exit code {}: {}\n", ran.code, ran.stderr);
                continue;
            }
            let ran = run(["inspect", out.to_str().unwrap(), "--json"]);
            if ran.code != 0 {
                wrong += &format!("{case}, {args}: the result: {}\n", ran.stderr);
            }
        }
        for args in [&["inspect"][..], &["inspect", "--json"]] {
            let ran = run(args.iter().copied().chain([file.to_str().unwrap()]));
            if ran.code != 0 {
                wrong += &format!("{case}, {args:?}: exit code {}: {}\n", ran.code, ran.stderr);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn a_copy_is_the_same_and_keys_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"), dir.path().join("c.gguf"));
    convert(&fixture("tiny"), &a, "--type q4_k_m --no-provenance --quiet").exits(0);
    convert(&a, &b, "--type copy --no-provenance --quiet").exits(0);
    assert_eq!(sha256(&a), sha256(&b));
    convert(&a, &c, "--type copy --override-kv general.name=str:new --no-provenance --quiet").exits(0);
    let keys = |file: &std::path::Path| ostq_convert::gguf::read(&std::fs::read(file).unwrap()).unwrap().metadata;
    let (before, after) = (keys(&a), keys(&c));
    assert_eq!(before.len(), after.len());
    let name = |m| ostq_convert::gguf::value::get(m, "general.name").and_then(|v| v.as_str().map(str::to_string));
    assert_eq!(name(&after).as_deref(), Some("new"));
    // provenance is replaced, not repeated
    convert(&fixture("tiny"), &c, "--type f16 --force --quiet").exits(0);
    convert(&c, &b, "--type q8_0 --force --quiet").exits(0);
    let recipe = |m| ostq_convert::gguf::value::get(m, "ostq.recipe").and_then(|v| v.as_str().map(str::to_string));
    assert_eq!(recipe(&keys(&b)).as_deref(), Some("type = \"q8_0\"\n"));
    convert(&c, &b, "--type q8_0 --no-provenance --force --quiet").exits(0);
    assert!(keys(&b).iter().all(|(k, _)| !k.starts_with("ostq.")));
    refused("quantized already", &a, "--type q8_0", &["is already quantized", "--allow-requantize"]);
    refused("an outtype", &a, "--outtype f16", &["a.gguf: --outtype converts a checkpoint folder"]);
    // damage in the data: scales that are no numbers
    let mut bytes = std::fs::read(&a).unwrap();
    let header = ostq_convert::gguf::read(&bytes).unwrap();
    let down = header.tensor("blk.0.ffn_down.weight").unwrap();
    for at in (down.offset..down.offset + down.bytes).step_by(2) {
        bytes[at as usize..][..2].copy_from_slice(&[0, 0x7c]);
    }
    std::fs::write(&a, &bytes).unwrap();
    refused("damaged data", &a, "--type copy", &["a.gguf: tensor `blk.0.ffn_down.weight`, row 0: block 0"]);
    refused("damaged data", &a, "--type q8_0 --allow-requantize", &["a.gguf: tensor `blk.0.ffn_down.weight`"]);
}
