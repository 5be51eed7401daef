//! The recipe: everything that a command line can say about a conversion, as a TOML file.
//!
//! Keys are the long flags without the dashes. A run prints the recipe it used (`--print-recipe`); running that recipe
//! on the same input gives the same bytes. Command-line flags are laid over a recipe file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::transform::Preset;

/// In place of a text: the corpus that ships with the program.
pub const BUILT_IN: &str = "builtin";
/// And for text that the model writes itself.
pub const OWN: &str = "self";

/// What a user can ask for. `None` and empty mean: the default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Recipe {
    /// File type as llama-quantize spells it, or `COPY`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<String>,
    /// File type as convert_hf_to_gguf.py spells it (its rules for which tensor is quantized).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outtype: Option<String>,
    /// Rounding of the 16- or 32-bit file that the two-step way goes through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// `exact`, `fast`, `balanced` or `best`: a whole way of converting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub exact: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensor_type: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_tensor_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_embedding_type: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub leave_output_tensor: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pure: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imatrix: Option<PathBuf>,
    /// Texts that an importance matrix is made from before the conversion; [`BUILT_IN`] stands for the one that ships,
    /// [`OWN`] for what the model writes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub calibrate: Vec<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibrate_tokens: Option<u64>,
    /// Tokens of a window.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ctx: Option<u32>,
    /// `nearest`, `gptq` or `auto`: how weights become codes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<String>,
    /// Bytes of the file that types are allocated for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_size: Option<u64>,
    /// The same, in bits per weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_bpw: Option<f64>,
    /// The same: the size of this mix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub like: Option<String>,
    /// Costs of an allocation are measured, not only predicted.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub measure: bool,
    /// `stock`: llama.cpp's own mix, no allocation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mix: Option<String>,
    /// Types that an allocation may use; empty: a default set.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<String>,
    /// Hessians of the float model only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub one_pass: bool,
    /// GPTQ with one scale for each row.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub row_scales: bool,
    /// Steps of tuning after GPTQ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tune: Option<u32>,
    /// Tuning goes layer by layer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tune_local: bool,
    /// Texts to tune on; empty: those of `calibrate`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tune_text: Vec<PathBuf>,
    /// Windows of a step of tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tune_batch: Option<u32>,
    /// A preset's name or a transforms file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transform: Option<PathBuf>,
    /// SmoothQuant's migration strength.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Of random rotations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub include_weights: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_weights: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub override_kv: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prune_layers: Vec<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub vocab_only: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fuse_qkv: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fp8_as_q8: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub bigendian: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_requantize: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_f16_overflow: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_provenance: bool,
}

impl Recipe {
    /// Reads a TOML file. Paths in it are relative to the file's folder.
    pub fn load(path: &Path) -> Result<Recipe, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut recipe: Recipe = toml::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        for file in recipe.files() {
            if file.is_relative() && file.as_os_str() != BUILT_IN && file.as_os_str() != OWN {
                *file = folder.join(&*file);
            }
        }
        Ok(recipe)
    }

    /// Every file that it names.
    fn files(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let one = [&mut self.imatrix, &mut self.metadata, &mut self.chat_template].into_iter().flatten();
        let is_file = |t: &&mut PathBuf| t.to_str().and_then(Preset::parse).is_none();
        let transform = self.transform.as_mut().filter(is_file);
        one.chain(&mut self.calibrate).chain(&mut self.tune_text).chain(transform)
    }

    /// `over` wins where it says something; lists are appended.
    pub fn overlaid(mut self, over: Recipe) -> Recipe {
        macro_rules! take {
            ($($f:ident)*) => { $(if over.$f.is_some() { self.$f = over.$f; })* };
        }
        macro_rules! or {
            ($($f:ident)*) => { $(self.$f |= over.$f;)* };
        }
        macro_rules! extend {
            ($($f:ident)*) => { $(self.$f.extend(over.$f);)* };
        }
        let imatrix_over = over.imatrix.is_some();
        if over.r#type.is_some() || over.outtype.is_some() {
            (self.r#type, self.outtype) = (None, None);
        }
        take!(r#type outtype via output_tensor_type token_embedding_type imatrix model_name metadata chat_template pre);
        take!(quality calibrate_tokens ctx rounding tune tune_batch transform alpha seed);
        // one word on which tensor gets which type
        if over.target_size.is_some() || over.target_bpw.is_some() || over.like.is_some() || over.mix.is_some() {
            (self.target_size, self.target_bpw, self.like) = (over.target_size, over.target_bpw, over.like);
            self.mix = over.mix;
        }
        // an importance matrix comes from one place
        if !over.calibrate.is_empty() {
            self.imatrix = None;
        } else if imatrix_over {
            self.calibrate.clear();
        }
        or!(exact measure one_pass row_scales tune_local leave_output_tensor pure vocab_only fuse_qkv fp8_as_q8 bigendian);
        or!(allow_requantize allow_f16_overflow no_provenance);
        extend!(tensor_type types calibrate tune_text include_weights exclude_weights override_kv prune_layers);
        self
    }

    /// As TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe is plain data")
    }

    /// For `ostq.recipe` in the output: as TOML, without folders of this machine.
    pub fn to_portable_toml(&self) -> String {
        let mut r = self.clone();
        for file in r.files() {
            if let Some(name) = file.file_name() {
                *file = PathBuf::from(name);
            }
        }
        r.to_toml()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_reads_back_as_written() {
        let r = Recipe {
            r#type: Some("q4_k_m".into()),
            tensor_type: vec!["attn_v=q8_0".into()],
            imatrix: Some("a/im.gguf".into()),
            pure: true,
            ..Recipe::default()
        };
        assert_eq!(toml::from_str::<Recipe>(&r.to_toml()).unwrap(), r);
        assert!(!r.to_portable_toml().contains("a/"));
        assert!(toml::from_str::<Recipe>("typ = 'q4_0'").unwrap_err().to_string().contains("unknown field `typ`"));
    }
}
