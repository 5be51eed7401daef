//! The rules of every mix, in the order in which llama-quantize tries them, and the fallback for odd row lengths.

use super::names::{Category, allows_quantization, category};
use super::{Choice, MixError, MixOptions, MixTensor, ModelFacts, layer_of};
use crate::gguf::GgmlType;
use crate::plan::FileType;

/// The state that the rules count in (`quantize_state_impl`).
pub struct Mix<'a> {
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

impl<'a> Mix<'a> {
    /// Counters at their start.
    pub fn new(facts: &'a ModelFacts, o: &'a MixOptions, tensors: &[MixTensor]) -> Mix<'a> {
        Mix {
            facts,
            o,
            tied: !tensors.iter().any(|t| t.name == "output.weight"),
            gqa: facts.heads.checked_div(facts.kv_heads).unwrap_or(0),
            n_wv: tensors.iter().filter(|t| category(t.name) == Category::ValueLike).count() as u64,
            i_wv: 0,
            i_down: 0,
            i_gate: 0,
            i_up: 0,
        }
    }

    /// `llama_tensor_get_type`.
    pub fn target(&mut self, t: &MixTensor) -> Result<Choice, MixError> {
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
