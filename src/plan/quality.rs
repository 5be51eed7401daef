//! `--quality`: one word for a whole way of converting, spelled out as the recipe that it stands for.
//!
//! | word | is |
//! |---|---|
//! | exact | llama.cpp's bytes (`--exact`) |
//! | fast | llama.cpp's mix, nearest codes; scales searched, weighted by an importance matrix of the built-in text |
//! | balanced | types allocated at the size of the mix, GPTQ with corrected targets; Hadamard rotations where they measure better |
//! | best | balanced, and tuning |
//!
//! Without the word and without any other flag that says how weights become codes, it is `balanced`.

use super::options::Target;
use super::recipe::{BUILT_IN, OWN, Recipe};
use super::{FileType, Options};

/// A way of converting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Quality {
    Exact,
    Fast,
    Balanced,
    Best,
}

/// Steps of tuning that `best` does.
pub const BEST_STEPS: u32 = 600;

impl Quality {
    /// From the text of a recipe.
    pub fn parse(text: &str) -> Result<Quality, String> {
        clap::ValueEnum::from_str(text, true)
            .map_err(|_| format!("--quality: `{text}` is not exact, fast, balanced or best"))
    }

    pub fn name(self) -> &'static str {
        match self {
            Quality::Exact => "exact",
            Quality::Fast => "fast",
            Quality::Balanced => "balanced",
            Quality::Best => "best",
        }
    }

    /// The word of a recipe.
    pub fn of_word(r: &Recipe) -> Option<Quality> {
        r.quality.as_deref().and_then(|w| Quality::parse(w).ok())
    }

    /// What a recipe asks for: by its word, or `otherwise` where it says nothing of the matter and there is something to gain.
    /// None: it stands as it is.
    pub fn of(r: &Recipe, otherwise: Quality) -> Result<Option<Quality>, String> {
        if let Some(word) = &r.quality {
            let quality = Quality::parse(word)?;
            return match quality {
                _ if r.exact && quality != Quality::Exact => Err("--exact is --quality exact".into()),
                Quality::Fast if r.like.is_some() || r.tune.is_some() => {
                    Err("--quality fast neither allocates nor tunes; take balanced or best".into())
                }
                _ if r.imatrix.is_some() && quality != Quality::Exact => {
                    Err(format!("--quality {word} makes its own calibration: --imatrix does not go with it"))
                }
                _ => Ok(Some(quality)),
            };
        }
        let says = r.exact
            || r.imatrix.is_some()
            || !r.calibrate.is_empty()
            || r.rounding.is_some()
            || r.row_scales
            || r.outtype.is_some()
            || r.via.is_some()
            || r.vocab_only
            || !r.prune_layers.is_empty()
            || r.bigendian
            || r.tune.is_some();
        Ok((!says && otherwise != Quality::Exact && worth(r)).then_some(otherwise))
    }
}

/// Whether the type leaves something to gain: not floats, copies, or 8 bits.
fn worth(r: &Recipe) -> bool {
    let none = [FileType::F32, FileType::F16, FileType::BF16, FileType::Q8_0];
    match Options::target_of(r) {
        Ok(Target::Quantize(f)) => !none.contains(&f),
        _ => false,
    }
}

/// What `balanced` and `best` measure: behind GPTQ in block formats nothing else that was tried brings more than this (docs/quality.md).
const TRANSFORM: &str = "auto:quarot";

/// Whether transforms are measured because a word stands for it: where they cannot be, they are left out.
pub fn implies_transform(r: &Recipe) -> bool {
    r.quality.is_some() && r.transform.as_deref() == Some(std::path::Path::new(TRANSFORM))
}

/// The recipe spelled out. What it says by itself stands.
pub fn spelled_out(mut r: Recipe, quality: Quality) -> Recipe {
    r.quality = Some(quality.name().into());
    if quality == Quality::Exact {
        r.exact = true;
        return r;
    }
    if !worth(&r) {
        return r;
    }
    if r.calibrate.is_empty() {
        r.calibrate = vec![BUILT_IN.into()];
        if quality != Quality::Fast {
            r.calibrate.push(OWN.into());
        }
    }
    if quality == Quality::Fast {
        r.rounding.get_or_insert_with(|| "nearest".into());
        return r;
    }
    let rounding = r.rounding.get_or_insert_with(|| "gptq".into());
    let gptq = ["gptq", "auto"].iter().any(|w| rounding.eq_ignore_ascii_case(w));
    if gptq && !r.vocab_only {
        r.transform.get_or_insert_with(|| TRANSFORM.into());
    }
    let sized = r.target_size.is_some() || r.target_bpw.is_some() || r.like.is_some();
    if !sized && r.mix.is_none() && !r.pure && gptq {
        r.like = r.r#type.clone();
    }
    if quality == Quality::Best && r.tune.is_none() {
        r.tune = Some(BEST_STEPS);
    }
    r
}
