//! What a tensor's name says: its category, and whether it is quantized at all.

use super::{MixOptions, MixTensor, ModelFacts};

/// Kinds of tensors that the rules tell apart (`tensor_category`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Category {
    Output,
    TokenEmbd,
    ValueLike,
    Key,
    Query,
    AttnOutput,
    Up,
    Gate,
    Down,
    Other,
}

pub fn category(name: &str) -> Category {
    use Category::*;
    if name == "output.weight" {
        return Output;
    }
    if name == "token_embd.weight" || name == "per_layer_token_embd.weight" {
        return TokenEmbd;
    }
    const BY_PART: &[(&str, Category)] = &[
        ("attn_qkv.weight", ValueLike),
        ("attn_kv_b.weight", ValueLike),
        ("attn_v.weight", ValueLike),
        ("attn_k.weight", Key),
        ("attn_q.weight", Query),
        ("attn_output.weight", AttnOutput),
        ("ffn_up", Up),
        ("ffn_gate", Gate),
        ("ffn_down", Down),
    ];
    BY_PART.iter().find(|(part, _)| name.contains(part)).map_or(Other, |(_, c)| *c)
}

/// Names, parts of names, that keep their type whatever the target.
const KEPT_PARTS: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];

const KEPT_GLM5_NEXT: &[&str] = &[
    "hc_",
    "indexer.attn_q_b",
    "indexer.attn_k",
    "indexer.proj",
    "indexer_compressor_gate",
    "indexer_compressor_ape",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    "ssm_beta.weight",
    "attn_kv_a_mqa.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
];

pub fn allows_quantization(t: &MixTensor, facts: &ModelFacts, o: &MixOptions) -> bool {
    let n_dims = t.dims.iter().rposition(|&d| d > 1).map_or(1, |i| i + 1);
    let kept = KEPT_PARTS.iter().any(|p| t.name.contains(p))
        || matches!(t.name, "position_embd.weight" | "token_types.weight")
        || (o.leave_output_tensor && t.name == "output.weight")
        || (facts.arch == "glm5-next" && KEPT_GLM5_NEXT.iter().any(|p| t.name.contains(p)));
    !o.copy && n_dims >= 2 && t.name.ends_with("weight") && !kept
}
