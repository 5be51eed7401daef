//! The program as a user runs it, and checkpoints for it.

#![allow(dead_code)] // not every test binary uses all of it

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// What a run did.
#[derive(Debug)]
pub struct Ran {
    /// Exit code; 128 + signal if a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(o: Output) -> Ran {
        Ran {
            code: o.status.code().unwrap_or_else(|| 128 + o.status.signal().unwrap_or(0)),
            stdout: String::from_utf8_lossy(&o.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&o.stderr).into_owned(),
        }
    }
}

impl Ran {
    /// Panics unless the exit code is `code`.
    #[track_caller]
    pub fn exits(self, code: i32) -> Ran {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Panics unless standard error contains `text`.
    #[track_caller]
    pub fn says(self, text: &str) -> Ran {
        assert!(self.stderr.contains(text), "`{text}` is not in: {}", self.stderr);
        self
    }
}

/// The program with arguments, not started.
pub fn command<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(args: I) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_ostq-convert"));
    // what no test asks for by name is llama.cpp's
    c.env("OSTQ_QUALITY", "exact");
    c.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env_remove("OSTQ_ISA");
    c
}

/// Runs the program.
pub fn run<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(args: I) -> Ran {
    command(args).output().expect("the program starts").into()
}

/// Converts `input` to `out`; `args` is split at white space.
pub fn convert(input: &Path, out: &Path, args: &str) -> Ran {
    let paths = [input.as_os_str(), out.as_os_str()];
    run(paths.into_iter().chain(args.split_whitespace().map(OsStr::new)))
}

/// A folder of `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// sha256 of a file in hexadecimal.
pub fn sha256(path: &Path) -> String {
    hex(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// sha256 of bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let mut all: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

/// True where the tests that take minutes are wanted.
pub fn slow() -> bool {
    std::env::var_os("OSTQ_SLOW").is_some_and(|v| v == "1")
}

/// A tensor of a safetensors file to be made.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub data: Vec<u8>,
}

/// A copy of `fixtures/tiny` that a test may change.
pub struct Checkpoint(pub TempDir);

impl Checkpoint {
    pub fn new() -> Checkpoint {
        let dir = tempfile::tempdir().unwrap();
        for e in std::fs::read_dir(fixture("tiny")).unwrap().flatten() {
            std::fs::copy(e.path(), dir.path().join(e.file_name())).unwrap();
        }
        Checkpoint(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.file(name), bytes).unwrap();
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.file(name)).unwrap();
    }

    /// Changes a JSON file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Map<String, Json>)) {
        let mut json: Map<String, Json> =
            serde_json::from_str(&std::fs::read_to_string(self.file(name)).unwrap()).unwrap();
        change(&mut json);
        self.write(name, Json::Object(json).to_string());
    }

    /// Its tensors in the order of their data.
    pub fn tensors(&self) -> Vec<Tensor> {
        let bytes = std::fs::read(self.file("model.safetensors")).unwrap();
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Map<String, Json> = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
        let number = |v: &Json| v.as_u64().unwrap();
        let mut all: Vec<(u64, Tensor)> = header
            .iter()
            .filter(|(name, _)| *name != "__metadata__")
            .map(|(name, e)| {
                let (begin, end) = (number(&e["data_offsets"][0]), number(&e["data_offsets"][1]));
                let t = Tensor {
                    name: name.clone(),
                    dtype: e["dtype"].as_str().unwrap().to_string(),
                    shape: e["shape"].as_array().unwrap().iter().map(number).collect(),
                    data: bytes[8 + n..][begin as usize..end as usize].to_vec(),
                };
                (begin, t)
            })
            .collect();
        all.sort_by_key(|(begin, _)| *begin);
        all.into_iter().map(|(_, t)| t).collect()
    }

    /// Replaces its tensors.
    pub fn set_tensors(&self, tensors: &[Tensor]) {
        self.write("model.safetensors", safetensors(tensors));
    }

    /// Changes the tensors.
    pub fn edit_tensors(&self, change: impl FnOnce(&mut Vec<Tensor>)) {
        let mut all = self.tensors();
        change(&mut all);
        self.set_tensors(&all);
    }

    /// Changes the tensor called `name`.
    pub fn edit_tensor(&self, name: &str, change: impl FnOnce(&mut Tensor)) {
        self.edit_tensors(|all| change(all.iter_mut().find(|t| t.name == name).unwrap()));
    }

    /// Stores every tensor in another float type.
    pub fn store_as(&self, dtype: &str) {
        self.edit_tensors(|all| {
            for t in all {
                let values = t.data.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32());
                t.data = match dtype {
                    "F32" => values.flat_map(f32::to_le_bytes).collect(),
                    "F16" => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
                    "F64" => values.flat_map(|v| f64::from(v).to_le_bytes()).collect(),
                    "BF16" => continue,
                    other => panic!("{other}"),
                };
                t.dtype = dtype.to_string();
            }
        });
    }
}

/// A safetensors file.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for t in tensors {
        let begin = data.len();
        data.extend(&t.data);
        let entry = json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, data.len()] });
        header.insert(t.name.clone(), entry);
    }
    with_header(&Json::Object(header).to_string(), &data)
}

/// A file of a header's text and data.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

impl Checkpoint {
    /// A model that takes a while: `hidden` columns, `layers` layers, values that repeat.
    pub fn sized(hidden: u64, feed_forward: u64, layers: u64) -> Checkpoint {
        let c = Checkpoint::new();
        c.edit("config.json", |j| {
            j.insert("hidden_size".into(), json!(hidden));
            j.insert("intermediate_size".into(), json!(feed_forward));
            j.insert("num_hidden_layers".into(), json!(layers));
        });
        let tensor = |name: String, shape: &[u64]| {
            let n: u64 = shape.iter().product();
            let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ n;
            let mut value = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                half::bf16::from_f32((state >> 40) as f32 / (1 << 24) as f32 - 0.5).to_le_bytes()
            };
            Tensor { name, dtype: "BF16".into(), shape: shape.to_vec(), data: (0..n).flat_map(|_| value()).collect() }
        };
        let (q, kv) = (256, 128); // heads of fixtures/tiny
        let mut all = vec![
            tensor("model.embed_tokens.weight".into(), &[512, hidden]),
            tensor("model.norm.weight".into(), &[hidden]),
        ];
        for layer in 0..layers {
            let shapes: [(&str, &[u64]); 9] = [
                ("input_layernorm", &[hidden]),
                ("post_attention_layernorm", &[hidden]),
                ("self_attn.q_proj", &[q, hidden]),
                ("self_attn.k_proj", &[kv, hidden]),
                ("self_attn.v_proj", &[kv, hidden]),
                ("self_attn.o_proj", &[hidden, q]),
                ("mlp.gate_proj", &[feed_forward, hidden]),
                ("mlp.up_proj", &[feed_forward, hidden]),
                ("mlp.down_proj", &[hidden, feed_forward]),
            ];
            all.extend(shapes.iter().map(|(name, shape)| tensor(format!("model.layers.{layer}.{name}.weight"), shape)));
        }
        c.set_tensors(&all);
        c
    }
}
