//! Qwen2, Qwen2.5 and Qwen3: `conversion/qwen.py` (`Qwen2Model`, `Qwen3Model`). No rotary permutation.

use super::{Architecture, Default, Dim::*, TensorRule, VocabOrder, optional, rule};

const TENSORS: &[TensorRule] = &[
    rule("model.embed_tokens.weight", "token_embd.weight", &[Vocab, Embed]),
    rule("model.norm.weight", "output_norm.weight", &[Embed]),
    optional("lm_head.weight", "output.weight", &[Vocab, Embed]),
    rule("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight", &[Embed]),
    rule("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", &[Query, Embed]),
    rule("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", &[KeyValue, Embed]),
    rule("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", &[KeyValue, Embed]),
    rule("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", &[Embed, Query]),
    optional("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias", &[Query]),
    optional("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias", &[KeyValue]),
    optional("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias", &[KeyValue]),
    optional("model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias", &[Embed]),
    optional("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight", &[Head]),
    optional("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight", &[Head]),
    rule("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", &[Embed]),
    rule("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", &[FeedForward, Embed]),
    rule("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", &[FeedForward, Embed]),
    rule("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", &[Embed, FeedForward]),
];

pub static QWEN2: Architecture = Architecture {
    hf: "Qwen2ForCausalLM",
    gguf: "qwen2",
    tensors: TENSORS,
    vocab: VocabOrder::Qwen,
    defaults: &[
        ("max_position_embeddings", Default::Int(32768)),
        ("rms_norm_eps", Default::Float(1e-6)),
        ("rope_theta", Default::Float(10000.0)),
        ("num_key_value_heads", Default::Int(32)),
    ],
    llama_tail: false,
    rope_freqs: false,
};

pub static QWEN3: Architecture = Architecture {
    hf: "Qwen3ForCausalLM",
    gguf: "qwen3",
    tensors: TENSORS,
    vocab: VocabOrder::Qwen,
    defaults: &[
        ("max_position_embeddings", Default::Int(32768)),
        ("rms_norm_eps", Default::Float(1e-6)),
        ("rope_theta", Default::Float(10000.0)),
        ("num_key_value_heads", Default::Int(32)),
        ("head_dim", Default::Int(128)),
    ],
    llama_tail: false,
    rope_freqs: false,
};
