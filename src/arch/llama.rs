//! LLaMA 1/2/3, SmolLM, SmolLM2 and Mistral: `conversion/llama.py` (`LlamaModel`).

use super::{Architecture, Default, Dim::*, TensorRule, Transform, VocabOrder, optional, rule};

const TENSORS: &[TensorRule] = &[
    rule("model.embed_tokens.weight", "token_embd.weight", &[Vocab, Embed]),
    rule("model.norm.weight", "output_norm.weight", &[Embed]),
    optional("lm_head.weight", "output.weight", &[Vocab, Embed]),
    rule("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight", &[Embed]),
    TensorRule {
        transform: Transform::PermuteQuery,
        ..rule("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", &[Query, Embed])
    },
    TensorRule {
        transform: Transform::PermuteKey,
        ..rule("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", &[KeyValue, Embed])
    },
    rule("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", &[KeyValue, Embed]),
    rule("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", &[Embed, Query]),
    TensorRule {
        transform: Transform::PermuteQuery,
        ..optional("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias", &[Query])
    },
    TensorRule {
        transform: Transform::PermuteKey,
        ..optional("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias", &[KeyValue])
    },
    optional("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias", &[KeyValue]),
    optional("model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias", &[Embed]),
    rule("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", &[Embed]),
    rule("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", &[FeedForward, Embed]),
    rule("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", &[FeedForward, Embed]),
    rule("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", &[Embed, FeedForward]),
    optional("model.layers.{}.mlp.gate_proj.bias", "blk.{}.ffn_gate.bias", &[FeedForward]),
    optional("model.layers.{}.mlp.up_proj.bias", "blk.{}.ffn_up.bias", &[FeedForward]),
    optional("model.layers.{}.mlp.down_proj.bias", "blk.{}.ffn_down.bias", &[Embed]),
];

pub static LLAMA: Architecture = Architecture {
    hf: "LlamaForCausalLM",
    gguf: "llama",
    tensors: TENSORS,
    vocab: VocabOrder::Llama,
    defaults: &[
        ("max_position_embeddings", Default::Int(2048)),
        ("rms_norm_eps", Default::Float(1e-6)),
        ("rope_theta", Default::Float(10000.0)),
        ("num_key_value_heads", Default::SameAsHeads),
        ("head_dim", Default::HiddenOverHeads),
    ],
    llama_tail: true,
    rope_freqs: true,
};

pub static MISTRAL: Architecture = Architecture {
    hf: "MistralForCausalLM",
    gguf: "llama",
    tensors: TENSORS,
    vocab: VocabOrder::Llama,
    defaults: &[
        ("max_position_embeddings", Default::Int(131072)),
        ("rms_norm_eps", Default::Float(1e-6)),
        ("rope_theta", Default::Float(10000.0)),
        ("num_key_value_heads", Default::Int(8)),
        ("head_dim", Default::HiddenOverHeads),
        ("sliding_window", Default::Int(4096)),
    ],
    llama_tail: true,
    rope_freqs: true,
};
