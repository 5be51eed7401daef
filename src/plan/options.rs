//! A recipe, checked: names became types, patterns became expressions. Nothing below sees raw text.

use super::FileType;
use super::mix::TensorTypeRule;
use super::recipe::Recipe;
use crate::gguf::{GgmlType, Value};
use crate::transform::Preset;

/// What the weights become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `llama-quantize ... TYPE`.
    Quantize(FileType),
    /// `llama-quantize ... COPY`: every tensor keeps its type.
    Copy,
    /// `convert_hf_to_gguf.py --outtype T`; `None` is `auto`.
    Outtype(Option<OutType>),
}

/// The types of `convert_hf_to_gguf.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutType {
    F32,
    F16,
    BF16,
    Q8_0,
    TQ1_0,
    TQ2_0,
}

impl OutType {
    const TABLE: &'static [(&'static str, OutType, GgmlType, FileType)] = &[
        ("f32", OutType::F32, GgmlType::F32, FileType::F32),
        ("f16", OutType::F16, GgmlType::F16, FileType::F16),
        ("bf16", OutType::BF16, GgmlType::BF16, FileType::BF16),
        ("q8_0", OutType::Q8_0, GgmlType::Q8_0, FileType::Q8_0),
        ("tq1_0", OutType::TQ1_0, GgmlType::TQ1_0, FileType::TQ1_0),
        ("tq2_0", OutType::TQ2_0, GgmlType::TQ2_0, FileType::TQ2_0),
    ];

    fn row(self) -> &'static (&'static str, OutType, GgmlType, FileType) {
        OutType::TABLE.iter().find(|r| r.1 == self).expect("every type has a row")
    }

    /// Tensor type.
    pub fn ggml_type(self) -> GgmlType {
        self.row().2
    }

    /// `general.file_type`.
    pub fn file_type(self) -> FileType {
        self.row().3
    }

    fn parse(text: &str) -> Option<OutType> {
        OutType::TABLE.iter().find(|r| r.0.eq_ignore_ascii_case(text)).map(|r| r.1)
    }
}

/// The size of the file that types are allocated for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    Bytes(u64),
    /// Bits per weight, of the tensors.
    Bits(f64),
    /// As large as this mix.
    Like(FileType),
}

/// How weights become codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Rounding {
    /// As llama.cpp.
    #[default]
    Nearest,
    /// Fitted to the output of each layer ([`crate::rounding`]).
    Gptq,
}

/// The file between conversion and quantization, whose rounding is reproduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Via {
    /// The stored types: nothing is lost.
    #[default]
    Auto,
    F32,
    F16,
    BF16,
}

/// `--override-kv KEY=TYPE:VALUE`.
#[derive(Clone, Debug, PartialEq)]
pub struct KvOverride {
    pub key: String,
    pub value: Value,
}

/// A checked recipe.
#[derive(Clone, Debug)]
pub struct Options {
    pub recipe: Recipe,
    pub target: Target,
    pub via: Via,
    pub rounding: Rounding,
    /// Where rounding is to nearest: search scales better than llama.cpp does ([`crate::rounding::weighted`]).
    pub search: bool,
    /// The size that types are allocated for.
    pub budget: Option<Budget>,
    /// Types that an allocation may use; empty: the default.
    pub types: Vec<GgmlType>,
    pub output_tensor_type: Option<GgmlType>,
    pub token_embedding_type: Option<GgmlType>,
    pub tensor_types: Vec<TensorTypeRule>,
    pub override_kv: Vec<KvOverride>,
}

/// The type when none is asked for.
pub const DEFAULT_TYPE: FileType = FileType::Q4_K_M;

impl Options {
    /// What the weights of a recipe become.
    pub fn target_of(r: &Recipe) -> Result<Target, String> {
        Ok(match (&r.r#type, &r.outtype) {
            (Some(_), Some(_)) => return Err("--type and --outtype exclude each other".into()),
            (Some(t), None) => parse_type("--type", t)?,
            (None, Some(t)) if t.eq_ignore_ascii_case("auto") => Target::Outtype(None),
            (None, Some(t)) => match OutType::parse(t) {
                Some(o) => Target::Outtype(Some(o)),
                None => parse_type("--outtype", t)?,
            },
            (None, None) => Target::Quantize(DEFAULT_TYPE),
        })
    }

    /// Checks a recipe. The error names the flag and what it takes.
    pub fn resolve(recipe: Recipe) -> Result<Options, String> {
        let r = &recipe;
        let target = Options::target_of(r)?;
        if r.imatrix.is_some() && !r.calibrate.is_empty() {
            return Err("--imatrix and --calibrate exclude each other".into());
        }
        let via = match r.via.as_deref().map(str::to_ascii_lowercase).as_deref() {
            None | Some("auto") => Via::Auto,
            Some("f32") => Via::F32,
            Some("f16") => Via::F16,
            Some("bf16") => Via::BF16,
            Some(other) => return Err(format!("--via: `{other}` is not auto, f32, f16 or bf16")),
        };
        let rounding = match r.rounding.as_deref().map(str::to_ascii_lowercase).as_deref() {
            None | Some("auto") if r.calibrate.is_empty() || r.exact => Rounding::Nearest,
            None | Some("auto") => Rounding::Gptq,
            Some("nearest") => Rounding::Nearest,
            Some("gptq") if r.exact => return Err("--exact promises llama.cpp's bytes: it rounds to nearest".into()),
            Some("gptq") if r.calibrate.is_empty() => {
                return Err(format!("--rounding gptq needs --calibrate TEXT (or --calibrate {})", super::BUILT_IN));
            }
            Some("gptq") => Rounding::Gptq,
            Some(other) => return Err(format!("--rounding: `{other}` is not nearest, gptq or auto")),
        };
        if r.tune_local && r.tune.is_none() {
            return Err("--tune-local needs --tune".into());
        }
        if let Some(batch) = r.tune_batch.filter(|b| !(1..=1024).contains(b)) {
            return Err(format!("--tune-batch: {batch} is not between 1 and 1024"));
        }
        let search = !r.exact && r.rounding.as_deref().is_some_and(|w| w.eq_ignore_ascii_case("nearest"));
        if rounding == Rounding::Gptq && !r.prune_layers.is_empty() {
            return Err("--prune-layers leaves another model: write it with --outtype bf16, then round that".into());
        }
        if r.row_scales && (r.exact || r.calibrate.is_empty()) {
            return Err(match r.exact {
                true => "--exact promises llama.cpp's bytes: it does not go with --row-scales".into(),
                false => format!("--row-scales needs --calibrate TEXT (or --calibrate {})", super::BUILT_IN),
            });
        }
        let budget = match (r.target_size, r.target_bpw, &r.like) {
            (Some(bytes), None, None) => Some(Budget::Bytes(bytes)),
            (None, Some(bits), None) if bits.is_finite() && bits > 0.0 => Some(Budget::Bits(bits)),
            (None, Some(bits), None) => return Err(format!("--target-bpw: {bits} is no number of bits")),
            (None, None, Some(name)) => match parse_type("--like", name)? {
                Target::Quantize(f) => Some(Budget::Like(f)),
                _ => return Err(format!("--like: `{name}` is no mix")),
            },
            (None, None, None) => None,
            _ => return Err("--target-size, --target-bpw and --like exclude each other".into()),
        };
        if r.row_scales && budget.is_some() {
            return Err("--row-scales is for one type: it does not go with a target size".into());
        }
        if r.measure && budget.is_none() {
            return Err("--measure goes with --target-size, --target-bpw or --like".into());
        }
        match &r.mix {
            Some(mix) if !mix.eq_ignore_ascii_case("stock") => return Err(format!("--mix: `{mix}` is not stock")),
            Some(_) if budget.is_some() => {
                return Err("--mix stock excludes --target-size, --target-bpw and --like".into());
            }
            _ => {}
        }
        if budget.is_some() && (r.exact || r.calibrate.is_empty()) {
            return Err(match r.exact {
                true => "--exact keeps llama.cpp's mix: it does not go with a target size".into(),
                false => format!("a target size needs --calibrate TEXT (or --calibrate {})", super::BUILT_IN),
            });
        }
        if let Some(a) = r.alpha.filter(|a| !(0.0..=1.0).contains(a)) {
            return Err(format!("--alpha: {a} is not between 0 and 1"));
        }
        let word = r.transform.as_deref().and_then(std::path::Path::to_str);
        let preset = word.and_then(Preset::parse);
        if let (Some(word), Some(Preset::Auto)) = (word, preset) {
            Preset::candidates(word).map_err(|e| format!("--transform {word}: {e}"))?;
        }
        if r.transform.is_some() && preset != Some(Preset::None) {
            if r.exact {
                return Err("--exact promises llama.cpp's bytes: it does not go with --transform".into());
            }
            if r.vocab_only {
                return Err("--vocab-only writes no weights that --transform could change".into());
            }
            if let Some(p) = preset.filter(|p| p.calibrates() && r.calibrate.is_empty()) {
                let name = p.name();
                return Err(format!("--transform {name} needs --calibrate TEXT (or --calibrate {})", super::BUILT_IN));
            }
        }
        let types = r.types.iter().map(|t| tensor_type("--types", t)).collect::<Result<Vec<_>, _>>()?;
        if !r.include_weights.is_empty() && !r.exclude_weights.is_empty() {
            return Err("--include-weights and --exclude-weights exclude each other".into());
        }
        let one = |flag: &str, text: &Option<String>| text.as_deref().map(|t| tensor_type(flag, t)).transpose();
        let tensor_types = r
            .tensor_type
            .iter()
            .map(|t| TensorTypeRule::parse(t).map_err(|e| format!("--tensor-type: {e}")))
            .collect::<Result<Vec<_>, _>>()?;
        let override_kv = r.override_kv.iter().map(|t| parse_override(t)).collect::<Result<Vec<_>, _>>()?;
        if r.bigendian && !matches!(target, Target::Outtype(Some(OutType::F32 | OutType::F16 | OutType::BF16))) {
            return Err(
                "--bigendian goes with --outtype f32, f16 or bf16: block formats have no big-endian form".into()
            );
        }
        Ok(Options {
            target,
            via,
            rounding,
            search,
            budget,
            types,
            output_tensor_type: one("--output-tensor-type", &r.output_tensor_type)?,
            token_embedding_type: one("--token-embedding-type", &r.token_embedding_type)?,
            tensor_types,
            override_kv,
            recipe,
        })
    }
}

fn parse_type(flag: &str, text: &str) -> Result<Target, String> {
    if text.eq_ignore_ascii_case("copy") {
        return Ok(Target::Copy);
    }
    FileType::parse(text).map(Target::Quantize).ok_or_else(|| {
        let names = FileType::ALL.iter().map(|f| f.name());
        let near = crate::checkpoint::nearest::nearest(&text.to_uppercase(), names);
        let hint = near.map_or(String::new(), |n| format!(" did you mean `{}`?", n.to_lowercase()));
        format!("{flag}: `{text}` is no type;{hint} `--list-types` shows all")
    })
}

fn tensor_type(flag: &str, text: &str) -> Result<GgmlType, String> {
    GgmlType::from_name(text)
        .filter(|&t| crate::formats::format(t).is_some() && t != GgmlType::NVFP4)
        .ok_or_else(|| format!("{flag}: `{text}` is no tensor type; `--list-types` shows all"))
}

/// `string_parse_kv_override`: keys and strings of at most 127 bytes; an integer is written as u32 of its absolute value.
fn parse_override(text: &str) -> Result<KvOverride, String> {
    const MAX: usize = 127;
    let bad = |why: &str| format!("--override-kv: `{text}`: {why}");
    let (key, rest) = text.split_once('=').ok_or_else(|| bad("not of the form KEY=TYPE:VALUE"))?;
    let (ty, value) = rest.split_once(':').ok_or_else(|| bad("not of the form KEY=TYPE:VALUE"))?;
    if key.is_empty() || key.len() > MAX {
        return Err(bad("the key must have 1 to 127 bytes"));
    }
    if key == "general.alignment" || key.starts_with(super::PROVENANCE_PREFIX) {
        return Err(bad("this key describes the file itself and cannot be set"));
    }
    let value = match ty {
        "int" => {
            let n: i64 = value.parse().map_err(|_| bad("not a whole number"))?;
            Value::U32(u32::try_from(n.unsigned_abs()).map_err(|_| bad("does not fit in 32 bits"))?)
        }
        "float" => Value::F32(value.parse::<f64>().map_err(|_| bad("not a number"))? as f32),
        "bool" => match value {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            _ => return Err(bad("a bool is true or false")),
        },
        "str" if value.len() > MAX => return Err(bad("a string has at most 127 bytes")),
        "str" => Value::from(value),
        _ => return Err(bad("the type is int, float, bool or str")),
    };
    Ok(KvOverride { key: key.to_string(), value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outtype_and_type_are_two_rules() {
        let opt = |t: Option<&str>, o: Option<&str>| {
            Options::resolve(Recipe { r#type: t.map(Into::into), outtype: o.map(Into::into), ..Recipe::default() })
        };
        assert_eq!(opt(None, None).unwrap().target, Target::Quantize(FileType::Q4_K_M));
        assert_eq!(opt(None, Some("tq1_0")).unwrap().target, Target::Outtype(Some(OutType::TQ1_0)));
        assert_eq!(opt(Some("tq1_0"), None).unwrap().target, Target::Quantize(FileType::TQ1_0));
        assert_eq!(opt(None, Some("q4_k_m")).unwrap().target, Target::Quantize(FileType::Q4_K_M));
        assert_eq!(opt(Some("copy"), None).unwrap().target, Target::Copy);
        let e = opt(Some("q4_k_x"), None).unwrap_err();
        assert!(e.contains("q4_k_") && e.contains("did you mean"), "{e}");
    }

    #[test]
    fn overrides() {
        assert_eq!(parse_override("a.b=int:-5").unwrap().value, Value::U32(5));
        assert_eq!(parse_override("a=bool:true").unwrap().value, Value::Bool(true));
        assert!(
            parse_override("a=int:x").is_err() && parse_override("a").is_err() && parse_override("=int:1").is_err()
        );
    }
}
