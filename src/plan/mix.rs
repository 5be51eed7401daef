//! Type mixes: which tensor of a file gets which type, as `llama-quantize` decides it.
//!
//! Source: `src/llama-quant.cpp` of llama.cpp b11434 (`tensor_allows_quantization`, `llama_tensor_get_type`,
//! `llama_tensor_get_type_impl`, `tensor_type_fallback`, `tensor_requires_imatrix`). Pure: names, shapes and a few
//! hyper-parameters in, one type per tensor out. Tensors must be given in the order that llama-quantize takes them
//! (see [`processing_order`]), as the rules count.

use super::FileType;
use crate::gguf::GgmlType;

/// What the mix needs to know of a model.
#[derive(Clone, Debug, Default)]
pub struct ModelFacts {
    /// `general.architecture`.
    pub arch: String,
    /// `block_count`.
    pub layers: u64,
    /// `attention.head_count` of layer 0.
    pub heads: u64,
    /// `attention.head_count_kv` of layer 0.
    pub kv_heads: u64,
    /// `expert_count`, 0 for dense models.
    pub experts: u64,
}

/// One tensor as the mix sees it.
#[derive(Clone, Debug)]
pub struct MixTensor<'a> {
    pub name: &'a str,
    /// `ne`: fastest dimension first.
    pub dims: &'a [u64],
    /// Type before quantization.
    pub source: GgmlType,
}

/// A `--tensor-type` pattern.
#[derive(Clone, Debug)]
pub struct TensorTypeRule {
    pub pattern: fancy_regex::Regex,
    pub ty: GgmlType,
}

impl TensorTypeRule {
    /// `REGEX=TYPE`. The pattern is lower-cased and searched anywhere in the name, as in llama-quantize.
    pub fn parse(text: &str) -> Result<TensorTypeRule, String> {
        let (re, ty) = text
            .rsplit_once('=')
            .filter(|(re, ty)| !re.is_empty() && !ty.is_empty())
            .ok_or_else(|| format!("`{text}` is not of the form REGEX=TYPE"))?;
        let ty = GgmlType::from_name(ty).ok_or_else(|| format!("`{ty}` in `{text}` is no tensor type"))?;
        if crate::formats::format(ty).is_none() || ty == GgmlType::NVFP4 {
            return Err(format!("`{ty}` in `{text}` is no type that weights can be quantized to"));
        }
        let pattern = fancy_regex::Regex::new(&re.to_lowercase()).map_err(|e| format!("`{re}`: {e}"))?;
        Ok(TensorTypeRule { pattern, ty })
    }

    /// True if the pattern is found in `name`.
    pub fn matches(&self, name: &str) -> bool {
        self.pattern.is_match(name).unwrap_or(false)
    }
}

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct MixOptions {
    pub ftype: FileType,
    /// `COPY`: every tensor keeps its type.
    pub copy: bool,
    pub pure: bool,
    pub leave_output_tensor: bool,
    pub output_tensor_type: Option<GgmlType>,
    pub token_embedding_type: Option<GgmlType>,
    pub tensor_types: Vec<TensorTypeRule>,
    /// An imatrix with at least one entry was given.
    pub has_imatrix: bool,
}

/// The decision for one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub ty: GgmlType,
    /// The type that was wanted, where the row length did not allow it.
    pub fallback_from: Option<GgmlType>,
    /// Cannot be encoded without importance weights.
    pub requires_imatrix: bool,
}

/// A tensor for which no type is possible.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum MixError {
    #[error(
        "tensor `{tensor}`: its row length {ne0} is no multiple of the block of {ty}, and {ty} has no fallback type"
    )]
    NoFallback { tensor: String, ne0: u64, ty: GgmlType },
    #[error("tensor `{tensor}`: the type {ty} was asked for, but its row length {ne0} is no multiple of {block}")]
    ForcedShape { tensor: String, ne0: u64, ty: GgmlType, block: usize },
    #[error(
        "tensor `{tensor}`: its name has no layer number below {layers} (`blk.N.`), the mix of a model with experts needs it"
    )]
    NoLayer { tensor: String, layers: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Category {
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

fn category(name: &str) -> Category {
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

fn allows_quantization(t: &MixTensor, facts: &ModelFacts, o: &MixOptions) -> bool {
    let n_dims = t.dims.iter().rposition(|&d| d > 1).map_or(1, |i| i + 1);
    let kept = KEPT_PARTS.iter().any(|p| t.name.contains(p))
        || matches!(t.name, "position_embd.weight" | "token_types.weight")
        || (o.leave_output_tensor && t.name == "output.weight")
        || (facts.arch == "glm5-next" && KEPT_GLM5_NEXT.iter().any(|p| t.name.contains(p)));
    !o.copy && n_dims >= 2 && t.name.ends_with("weight") && !kept
}

/// Indices of `names` in the order in which llama-quantize takes and writes them: by layer (none first), then name.
pub fn processing_order(names: &[&str]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_by_key(|&i| (layer_of(names[i]).map_or(-1, |l| l as i64), names[i]));
    order
}

/// The N of `blk.N.`.
pub fn layer_of(name: &str) -> Option<u64> {
    let rest = name.strip_prefix("blk.")?;
    rest[..rest.find('.')?].parse().ok()
}

/// Chooses the type of every tensor; `tensors` in [`processing_order`].
pub fn choose(facts: &ModelFacts, o: &MixOptions, tensors: &[MixTensor]) -> Result<Vec<Choice>, MixError> {
    let count = |c: Category| tensors.iter().filter(|t| category(t.name) == c).count() as u64;
    let mut mix = Mix {
        facts,
        o,
        tied: !tensors.iter().any(|t| t.name == "output.weight"),
        gqa: facts.heads.checked_div(facts.kv_heads).unwrap_or(0),
        n_wv: count(Category::ValueLike),
        i_wv: 0,
        i_down: 0,
        i_gate: 0,
        i_up: 0,
    };
    tensors.iter().map(|t| mix.target(t)).collect()
}

struct Mix<'a> {
    facts: &'a ModelFacts,
    o: &'a MixOptions,
    tied: bool,
    gqa: u64,
    n_wv: u64,
    i_wv: u64,
    i_down: u64,
    i_gate: u64,
    i_up: u64,
}

/// `use_more_bits`: the first and last eighth, and every third layer between.
fn more(i: u64, n: u64) -> bool {
    i < n / 8 || i >= 7 * n / 8 || (i.wrapping_sub(n / 8)) % 3 == 2
}

impl Mix<'_> {
    fn target(&mut self, t: &MixTensor) -> Result<Choice, MixError> {
        let cat = category(t.name);
        let o = self.o;
        let kept = |ty| Choice { ty, fallback_from: None, requires_imatrix: false };
        if !allows_quantization(t, self.facts, o) {
            return Ok(kept(t.source));
        }
        let forced = match cat {
            Category::TokenEmbd => o.token_embedding_type.filter(|_| {
                t.name != "per_layer_token_embd.weight" || !o.tensor_types.iter().any(|r| r.matches(t.name))
            }),
            Category::Output => o.output_tensor_type,
            _ => None,
        };
        if let Some(ty) = forced {
            return if t.dims[0].is_multiple_of(ty.block_len() as u64) {
                Ok(kept(ty))
            } else {
                let (tensor, block) = (t.name.to_string(), ty.block_len());
                Err(MixError::ForcedShape { tensor, ne0: t.dims[0], ty, block })
            };
        }
        let default = o.ftype.default_type();
        if !default.is_quantized() {
            return Ok(kept(default));
        }
        let wanted = match o.tensor_types.iter().find(|r| r.matches(t.name)) {
            Some(rule) => rule.ty,
            None if o.pure => default,
            None => self.mix(default, t, cat)?,
        };
        let ty = shape_fallback(wanted, t)?;
        let requires_imatrix = !matches!(cat, Category::Output | Category::TokenEmbd) && requires_imatrix(ty, o.ftype);
        Ok(Choice { ty, fallback_from: (ty != wanted).then_some(wanted), requires_imatrix })
    }

    fn is_70b(&self) -> bool {
        let f = self.facts;
        match f.arch.as_str() {
            "llama" => f.layers == 80 && f.heads != f.kv_heads && f.experts != 8,
            "qwen2" | "deci" | "olmo" => f.layers == 80,
            "jais2" => f.layers == 68,
            _ => false,
        }
    }

    /// Layer and number of layers for a rule that counts: the counter, or the name's layer where there are experts.
    fn layer(&self, counter: u64, name: &str) -> Result<(u64, u64), MixError> {
        let n = self.facts.layers;
        if self.facts.experts <= 1 {
            return Ok((counter, n));
        }
        match layer_of(name) {
            Some(i) if i < n => Ok((i, n)),
            _ => Err(MixError::NoLayer { tensor: name.to_string(), layers: n }),
        }
    }

    fn mix(&mut self, default: GgmlType, t: &MixTensor, cat: Category) -> Result<GgmlType, MixError> {
        use FileType as F;
        use GgmlType as T;
        let (f, o) = (self.facts, self.o);
        let ftype = o.ftype;
        let falcon = f.arch == "falcon";
        if f.arch == "glm5-next" && ["attn_q_a", "attn_q_b", "nextn.eh_proj"].iter().any(|p| t.name.contains(p)) {
            return Ok(T::Q8_0);
        }
        if cat == Category::Output || (self.tied && cat == Category::TokenEmbd) {
            return Ok(self.output_type(default, t));
        }
        if ftype == F::MXFP4_MOE {
            let expert = t.dims.get(2).is_some_and(|&n| n > 1)
                || (f.arch == "bailingmoe3" && matches!(cat, Category::Up | Category::Gate | Category::Down));
            return Ok(if expert { T::MXFP4 } else { T::Q8_0 });
        }
        if cat == Category::TokenEmbd {
            return Ok(match ftype {
                F::IQ2_XXS | F::IQ2_XS | F::IQ1_S | F::IQ1_M => T::Q2_K,
                F::IQ2_S | F::IQ2_M | F::IQ3_XXS => T::IQ3_S,
                F::TQ1_0 | F::TQ2_0 | F::Q2_0 => T::Q4_K,
                _ => default,
            });
        }
        if matches!(ftype, F::IQ2_XXS | F::IQ2_XS | F::IQ1_S | F::IQ2_S | F::IQ2_M | F::IQ1_M) {
            return Ok(self.small_iq(default, cat));
        }
        Ok(match cat {
            Category::ValueLike => self.value_type(default),
            Category::Key if f.experts == 8 => T::Q8_0,
            Category::Key | Category::Query => match ftype {
                F::IQ3_XS => T::IQ3_XXS,
                F::IQ3_XXS => T::IQ2_S,
                _ => default,
            },
            Category::Down => {
                let (i, n) = self.layer(self.i_down, t.name)?;
                self.i_down += 1;
                self.down_type(default, i, n, falcon)
            }
            Category::AttnOutput => self.attn_output_type(default, falcon),
            Category::Gate => {
                let (i, n) = self.layer(self.i_gate, t.name)?;
                self.i_gate += 1;
                middle_layers(default, ftype, i, n)
            }
            Category::Up => {
                let (i, n) = self.layer(self.i_up, t.name)?;
                self.i_up += 1;
                middle_layers(default, ftype, i, n)
            }
            _ => default,
        })
    }

    fn output_type(&self, default: GgmlType, t: &MixTensor) -> GgmlType {
        use FileType as F;
        if let Some(ty) = self.o.output_tensor_type {
            return ty;
        }
        match self.o.ftype {
            F::MXFP4_MOE => GgmlType::Q8_0,
            _ if self.facts.arch == "falcon" || !t.dims[0].is_multiple_of(default.block_len() as u64) => GgmlType::Q8_0,
            F::IQ2_XXS | F::IQ2_XS | F::IQ2_S | F::IQ2_M | F::IQ3_XXS | F::IQ1_S | F::IQ1_M => GgmlType::Q5_K,
            _ if default != GgmlType::Q8_0 => GgmlType::Q6_K,
            _ => default,
        }
    }

    /// The rules of IQ1 and IQ2 files.
    fn small_iq(&mut self, default: GgmlType, cat: Category) -> GgmlType {
        use GgmlType as T;
        let s = matches!(self.o.ftype, FileType::IQ2_S | FileType::IQ2_M);
        let better = if s { T::IQ3_S } else { T::Q2_K };
        match cat {
            Category::ValueLike => {
                self.i_wv += 1;
                if self.gqa >= 4 || self.facts.experts >= 4 { T::Q4_K } else { better }
            }
            Category::Key if self.facts.experts == 8 => T::Q4_K,
            Category::Down => {
                let i = self.i_down;
                self.i_down += 1;
                if i < self.facts.layers / 8 { better } else { default }
            }
            Category::AttnOutput if self.facts.experts == 8 => T::Q5_K,
            Category::AttnOutput => match self.o.ftype {
                FileType::IQ1_S | FileType::IQ1_M => T::IQ2_XXS,
                _ if s => T::IQ3_S,
                _ => default,
            },
            _ => default,
        }
    }

    fn value_type(&mut self, default: GgmlType) -> GgmlType {
        use FileType as F;
        use GgmlType as T;
        let (i, n, gqa4) = (self.i_wv, self.n_wv, self.gqa >= 4);
        self.i_wv += 1;
        let ty = match self.o.ftype {
            F::Q2_K => {
                if gqa4 {
                    T::Q4_K
                } else {
                    T::Q3_K
                }
            }
            F::Q2_K_S if gqa4 => T::Q4_K,
            F::Q3_K_M => {
                if i < 2 {
                    T::Q5_K
                } else {
                    T::Q4_K
                }
            }
            F::Q3_K_L => T::Q5_K,
            F::Q4_K_S if i < 4 => T::Q5_K,
            F::Q4_K_M | F::Q5_K_M if more(i, n) => T::Q6_K,
            F::IQ4_NL | F::IQ4_XS if gqa4 => T::Q5_K,
            F::IQ3_XXS => match (gqa4, self.o.has_imatrix) {
                (true, _) => T::Q4_K,
                (false, true) => T::IQ3_XXS,
                (false, false) => T::IQ3_S,
            },
            F::IQ3_XS | F::IQ3_S if gqa4 => T::Q4_K,
            F::IQ3_M => T::Q4_K,
            _ => default,
        };
        let ty = if self.is_70b() && matches!(ty, T::Q3_K | T::Q4_K) { T::Q5_K } else { ty };
        if self.facts.experts == 8 { T::Q8_0 } else { ty }
    }

    fn down_type(&self, default: GgmlType, i: u64, n: u64, falcon: bool) -> GgmlType {
        use FileType as F;
        use GgmlType as T;
        let imatrix = self.o.has_imatrix;
        match self.o.ftype {
            F::Q2_K => T::Q3_K,
            F::Q2_K_S if i < n / 8 => T::Q4_K,
            F::Q3_K_M if i < n / 16 => T::Q5_K,
            F::Q3_K_M if !falcon || more(i, n) => T::Q4_K,
            F::Q3_K_L => {
                if falcon {
                    T::Q4_K
                } else {
                    T::Q5_K
                }
            }
            F::Q4_K_S if !falcon && i < n / 8 => T::Q5_K,
            F::Q4_K_M if falcon => {
                if i < n / 16 {
                    T::Q6_K
                } else if more(i, n) {
                    T::Q5_K
                } else {
                    T::Q4_K
                }
            }
            F::Q4_K_M | F::Q5_K_M if more(i, n) => T::Q6_K,
            F::Q4_0 if imatrix && i < n / 8 => T::Q4_1,
            F::Q5_0 if imatrix && i < n / 8 => T::Q5_1,
            F::IQ4_NL | F::IQ4_XS if i < n / 8 && !imatrix => T::Q5_K,
            F::IQ3_XXS if !imatrix => {
                if i < n / 8 {
                    T::Q4_K
                } else {
                    T::Q3_K
                }
            }
            F::IQ3_M if i < n / 8 || (self.facts.experts == 8 && more(i, n)) => T::Q4_K,
            _ => default,
        }
    }

    fn attn_output_type(&self, default: GgmlType, falcon: bool) -> GgmlType {
        use FileType as F;
        use GgmlType as T;
        let ftype = self.o.ftype;
        if falcon {
            return if ftype == F::Q3_K_L { T::Q4_K } else { default };
        }
        if self.facts.experts == 8 {
            return match ftype {
                F::Q2_K
                | F::IQ3_XS
                | F::IQ3_XXS
                | F::Q3_K_S
                | F::Q3_K_M
                | F::IQ4_NL
                | F::Q4_K_S
                | F::Q4_K_M
                | F::IQ3_S
                | F::IQ3_M
                | F::IQ4_XS => T::Q5_K,
                _ => default,
            };
        }
        match ftype {
            F::Q2_K => T::Q3_K,
            F::IQ3_XXS => T::IQ3_S,
            F::Q3_K_M | F::IQ3_M => T::Q4_K,
            F::Q3_K_L => T::Q5_K,
            _ => default,
        }
    }
}

/// IQ3_XS spends fewer bits on the middle six eighths of ffn_gate and ffn_up.
fn middle_layers(default: GgmlType, ftype: FileType, i: u64, n: u64) -> GgmlType {
    if ftype == FileType::IQ3_XS && i >= n / 8 && i < 7 * n / 8 { GgmlType::IQ3_XXS } else { default }
}

/// `tensor_type_fallback`: a type whose block divides the row.
fn shape_fallback(wanted: GgmlType, t: &MixTensor) -> Result<GgmlType, MixError> {
    use GgmlType::*;
    let ne0 = t.dims[0];
    let fits = |ty: GgmlType| ne0.is_multiple_of(ty.block_len() as u64);
    if fits(wanted) {
        return Ok(wanted);
    }
    let next = match wanted {
        IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ4_XS => IQ4_NL,
        Q2_0 | Q2_K | Q3_K | TQ1_0 | TQ2_0 => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        ty if ty.block_len() == 32 => ty,
        ty => return Err(MixError::NoFallback { tensor: t.name.to_string(), ne0, ty }),
    };
    Ok(if fits(next) { next } else { F16 })
}

/// `tensor_requires_imatrix`, for tensors that are neither embedding nor output.
fn requires_imatrix(ty: GgmlType, ftype: FileType) -> bool {
    use GgmlType::*;
    matches!(ty, IQ3_XXS | IQ2_XXS | IQ2_XS | IQ2_S | IQ1_S | IQ1_M) || (ty == Q2_K && ftype == FileType::Q2_K_S)
}
