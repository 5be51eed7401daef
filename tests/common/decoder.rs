//! Small decoders with random weights in memory, one for every structure that the forward pass runs.

#![allow(dead_code)] // not every test binary uses all of it

use std::ops::Range;
use std::path::Path;

use ostq_convert::forward::{Activations, Hidden, Model, Observer, Runner, run::Head};
use ostq_convert::gguf::{GgmlType, Metadata, Value};
use ostq_convert::mapped::MappedFile;
use ostq_convert::source::{SourceTensor, TensorSource};
use ostq_convert::transform::{Anatomy, Pair, Transforms};

pub const EMBED: usize = 48;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD: usize = 16;
pub const FF: usize = 40;
pub const VOCAB: usize = 70;
pub const LAYERS: usize = 3;
pub const EXPERTS: usize = 4;

/// A textbook generator (Knuth's MMIX), on purpose not the crate's.
pub struct Numbers(pub u64);

impl Numbers {
    /// Uniform in (-1, 1).
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// Tokens of a vocabulary of so many.
pub fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut numbers = Numbers(5);
    (0..count).map(|_| ((numbers.next() + 1.0) / 2.0 * vocab as f64) as u32 % vocab as u32).collect()
}

/// Tensors in memory.
#[derive(Clone, Default)]
pub struct Memory {
    pub tensors: Vec<SourceTensor>,
    pub values: Vec<Vec<f32>>,
}

impl Memory {
    pub fn push(&mut self, name: &str, dims: &[usize], values: Vec<f32>) {
        assert_eq!(values.len(), dims.iter().product::<usize>(), "{name}");
        self.tensors.push(SourceTensor {
            name: name.into(),
            dims: dims.iter().map(|&d| d as u64).collect(),
            stored: GgmlType::F32,
            origin: name.into(),
            file: None,
            position: 0,
            stored_bytes: values.len() as u64 * 4,
            is_fp8: false,
            row_group: 1,
        });
        self.values.push(values);
    }

    /// A matrix, or a stack of some, whose outputs are `scale` times as large as inputs of size 1.
    pub fn matrix(&mut self, numbers: &mut Numbers, name: &str, dims: &[usize], scale: f64) {
        let scale = scale * (3.0 / dims[0] as f64).sqrt();
        self.push(name, dims, (0..dims.iter().product()).map(|_| (numbers.next() * scale) as f32).collect());
    }

    pub fn get(&mut self, name: &str) -> &mut Vec<f32> {
        let at = self.tensors.iter().position(|t| t.name == name).unwrap_or_else(|| panic!("{name}"));
        &mut self.values[at]
    }

    /// A copy of any source.
    pub fn of(source: &dyn TensorSource) -> Memory {
        let mut all = Memory::default();
        for (i, t) in source.tensors().iter().enumerate() {
            let mut values = vec![0f32; t.elements() as usize];
            source.read_rows(i, 0..t.rows(), &mut values);
            let dims: Vec<usize> = t.dims.iter().map(|&d| d as usize).collect();
            all.push(&t.name, &dims, values);
        }
        all
    }
}

impl TensorSource for Memory {
    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }
    fn files(&self) -> &[MappedFile] {
        &[]
    }
    fn read_rows(&self, index: usize, rows: Range<u64>, out: &mut [f32]) {
        let n = self.tensors[index].row_len() as usize;
        out.copy_from_slice(&self.values[index][rows.start as usize * n..rows.end as usize * n]);
    }
    fn copy_rows(&self, index: usize, rows: Range<u64>, out: &mut [u8]) {
        let n = self.tensors[index].row_len() as usize;
        let values = &self.values[index][rows.start as usize * n..rows.end as usize * n];
        out.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes());
    }
    fn release(&self, _: usize, _: Range<u64>) {}
}

/// A structure: what its layers have beside q, k, v, o and a feed-forward branch.
#[derive(Clone, Copy, Default)]
pub struct Kind {
    pub name: &'static str,
    pub arch: &'static str,
    pub tied: bool,
    pub biases: bool,
    pub head_norms: bool,
    /// One weight over all heads.
    pub wide_norms: bool,
    pub no_pre_norms: bool,
    pub post_norms: bool,
    pub fused: bool,
    pub experts: bool,
    /// Rotary elements of a head; 0: all.
    pub rotary: u32,
}

const PLAIN: Kind = Kind {
    name: "llama",
    arch: "llama",
    tied: false,
    biases: false,
    head_norms: false,
    wide_norms: false,
    no_pre_norms: false,
    post_norms: false,
    fused: false,
    experts: false,
    rotary: 0,
};

/// Every structure.
pub const KINDS: &[Kind] = &[
    PLAIN,
    Kind { name: "llama with biases, tied", biases: true, tied: true, ..PLAIN },
    Kind { name: "llama, experts", experts: true, ..PLAIN },
    Kind { name: "llama, partial rotary", rotary: 8, ..PLAIN },
    Kind { name: "granite", arch: "granite", tied: true, ..PLAIN },
    Kind { name: "smollm3", arch: "smollm3", tied: true, ..PLAIN },
    Kind { name: "qwen2", arch: "qwen2", biases: true, tied: true, ..PLAIN },
    Kind { name: "qwen3", arch: "qwen3", head_norms: true, ..PLAIN },
    Kind { name: "qwen3moe", arch: "qwen3moe", head_norms: true, experts: true, ..PLAIN },
    Kind { name: "olmo2", arch: "olmo2", no_pre_norms: true, post_norms: true, wide_norms: true, ..PLAIN },
    Kind { name: "phi3", arch: "phi3", fused: true, rotary: 12, ..PLAIN },
    Kind { name: "gemma2", arch: "gemma2", post_norms: true, tied: true, ..PLAIN },
    Kind { name: "gemma3", arch: "gemma3", post_norms: true, head_norms: true, tied: true, ..PLAIN },
];

impl Kind {
    /// Its keys.
    pub fn metadata(&self) -> Metadata {
        let key = |k: &str| format!("{}.{k}", self.arch);
        let mut m: Metadata = vec![("general.architecture".into(), Value::from(self.arch))];
        for (k, v) in [
            ("block_count", LAYERS),
            ("embedding_length", EMBED),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", KV_HEADS),
            ("attention.key_length", HEAD),
            ("attention.value_length", HEAD),
            ("context_length", 64),
        ] {
            m.push((key(k), Value::U32(v as u32)));
        }
        if self.rotary > 0 {
            m.push((key("rope.dimension_count"), Value::U32(self.rotary)));
        }
        if self.experts {
            m.push((key("expert_count"), Value::U32(EXPERTS as u32)));
            m.push((key("expert_used_count"), Value::U32(2)));
        }
        m.push((key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5)));
        if self.arch == "granite" {
            m.push((key("residual_scale"), Value::F32(0.3)));
            m.push((key("embedding_scale"), Value::F32(3.0)));
            m.push((key("logit_scale"), Value::F32(2.0)));
        }
        m
    }

    /// Random weights.
    pub fn weights(&self) -> Memory {
        let mut numbers = Numbers(self.name.bytes().fold(7, |s: u64, b| s.wrapping_mul(31).wrapping_add(b.into())));
        let mut m = Memory::default();
        let mut matrix = |m: &mut Memory, name: &str, dims: &[usize]| {
            let scale = (3.0 / dims[0] as f64).sqrt();
            m.push(name, dims, (0..dims.iter().product()).map(|_| (numbers.next() * scale) as f32).collect());
        };
        let mut others = Numbers(99);
        let mut vector = |m: &mut Memory, name: &str, n: usize, middle: f64| {
            m.push(name, &[n], (0..n).map(|_| (middle + 0.5 * others.next()) as f32).collect());
        };
        matrix(&mut m, "token_embd.weight", &[EMBED, VOCAB]);
        vector(&mut m, "output_norm.weight", EMBED, 1.0);
        if !self.tied {
            matrix(&mut m, "output.weight", &[EMBED, VOCAB]);
        }
        let (q, kv) = (HEADS * HEAD, KV_HEADS * HEAD);
        for l in 0..LAYERS {
            let name = |part: &str| format!("blk.{l}.{part}");
            let mut linear = |m: &mut Memory, part: &str, inputs: usize, outputs: usize| {
                matrix(m, &name(&format!("{part}.weight")), &[inputs, outputs]);
                if self.biases {
                    vector(m, &name(&format!("{part}.bias")), outputs, 0.0);
                }
            };
            if self.fused {
                linear(&mut m, "attn_qkv", EMBED, q + 2 * kv);
            } else {
                linear(&mut m, "attn_q", EMBED, q);
                linear(&mut m, "attn_k", EMBED, kv);
                linear(&mut m, "attn_v", EMBED, kv);
            }
            linear(&mut m, "attn_output", q, EMBED);
            if self.experts {
                linear(&mut m, "ffn_gate_inp", EMBED, EXPERTS);
            } else if self.fused {
                linear(&mut m, "ffn_up", EMBED, 2 * FF);
                linear(&mut m, "ffn_down", FF, EMBED);
            } else {
                linear(&mut m, "ffn_gate", EMBED, FF);
                linear(&mut m, "ffn_up", EMBED, FF);
                linear(&mut m, "ffn_down", FF, EMBED);
            }
            if self.experts {
                matrix(&mut m, &name("ffn_gate_exps.weight"), &[EMBED, FF, EXPERTS]);
                matrix(&mut m, &name("ffn_up_exps.weight"), &[EMBED, FF, EXPERTS]);
                matrix(&mut m, &name("ffn_down_exps.weight"), &[FF, EMBED, EXPERTS]);
            }
            let norms: [(&str, bool, usize); 8] = [
                ("attn_norm", !self.no_pre_norms, EMBED),
                ("ffn_norm", !self.no_pre_norms, EMBED),
                ("post_attention_norm", self.post_norms, EMBED),
                ("post_ffw_norm", self.post_norms, EMBED),
                ("attn_q_norm", self.head_norms, HEAD),
                ("attn_k_norm", self.head_norms, HEAD),
                ("attn_q_norm", self.wide_norms, q),
                ("attn_k_norm", self.wide_norms, kv),
            ];
            for (part, _, n) in norms.into_iter().filter(|n| n.1) {
                vector(&mut m, &name(&format!("{part}.weight")), n, 1.0);
            }
        }
        m
    }
}

/// Logits of every position, `[tokens, vocab]`; `observer` sees the inputs of linears.
pub fn logits(source: &dyn TensorSource, metadata: &Metadata, ids: &[u32], observer: &mut dyn Observer) -> Vec<f32> {
    let model = Model::new(Path::new("memory"), source, metadata).unwrap_or_else(|e| panic!("{e}"));
    let mut runner = Runner::new(&model, ids.len(), Activations::F32).unwrap();
    let mut hidden = Hidden::Memory(vec![0.0; ids.len() * model.spec.embed]);
    runner.embed(ids, &mut hidden).unwrap();
    for l in 0..model.spec.layers {
        runner.layer_in_place(l, &mut hidden, ids.len(), 1, observer).unwrap();
    }
    let Hidden::Memory(mut x) = hidden else { unreachable!() };
    let mut out = Vec::new();
    Head::new(&model, Activations::F32, 1 << 30).unwrap().logits(&mut x, &mut out, observer).unwrap();
    out
}

/// Gram and Schmidt, twice.
pub fn orthonormal(n: usize, numbers: &mut Numbers) -> Vec<f64> {
    let mut r: Vec<f64> = (0..n * n).map(|_| numbers.next()).collect();
    for i in 0..n {
        for _ in 0..2 {
            for j in 0..i {
                let dot: f64 = (0..n).map(|k| r[i * n + k] * r[j * n + k]).sum();
                (0..n).for_each(|k| r[i * n + k] -= dot * r[j * n + k]);
            }
        }
        let length = (0..n).map(|k| r[i * n + k] * r[i * n + k]).sum::<f64>().sqrt();
        (0..n).for_each(|k| r[i * n + k] /= length);
    }
    r
}

/// Random transforms of `pairs`: orthonormal, and scales between 0.5 and 2.
pub fn random_transforms(model: &Anatomy, pairs: &[Pair], seed: u64) -> Transforms {
    let mut numbers = Numbers(seed);
    let mut t = Transforms::identity("random", model.spec.layers);
    for &pair in pairs {
        let layers = if pair == Pair::Stream { 1 } else { model.spec.layers };
        for l in 0..layers {
            let shape = model.shape(pair, l);
            let count: usize = shape.iter().product();
            let values = match pair {
                Pair::Stream => orthonormal(shape[0], &mut numbers),
                Pair::Values => (0..shape[0]).flat_map(|_| orthonormal(shape[1], &mut numbers)).collect(),
                _ => (0..count).map(|_| 2f64.powf(numbers.next())).collect(),
            };
            *t.slot(pair, l) = Some(values);
        }
    }
    t
}
