//! File types: the names that `llama-quantize` offers, their numbers and default tensor types.
//!
//! Source: `tools/quantize/quantize.cpp` (`QUANT_OPTIONS`), `include/llama.h` (`enum llama_ftype`) and
//! `src/llama-quant.cpp` (`llama_ftype_get_default_type`) of llama.cpp b11434.

use crate::gguf::GgmlType;

macro_rules! ftypes {
    ($($variant:ident = $id:literal, $name:literal, $ty:ident, $about:literal;)*) => {
        /// What a file is quantized to (`general.file_type`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types)]
        #[repr(u32)]
        pub enum FileType { $($variant = $id,)* }

        impl FileType {
            /// Every file type, in the order of the number.
            pub const ALL: &'static [FileType] = &[$(FileType::$variant,)*];

            /// The name, in the spelling of llama-quantize.
            pub fn name(self) -> &'static str {
                match self { $(FileType::$variant => $name,)* }
            }

            /// Type of a tensor that no rule of the mix changes.
            pub fn default_type(self) -> GgmlType {
                match self { $(FileType::$variant => GgmlType::$ty,)* }
            }

            /// One line for `--list-types`.
            pub fn about(self) -> &'static str {
                match self { $(FileType::$variant => $about,)* }
            }
        }
    };
}

ftypes! {
    F32 = 0, "F32", F32, "32-bit floats";
    F16 = 1, "F16", F16, "16-bit floats";
    Q4_0 = 2, "Q4_0", Q4_0, "4.5 bpw, one scale per 32";
    Q4_1 = 3, "Q4_1", Q4_1, "5.0 bpw, scale and minimum per 32";
    Q8_0 = 7, "Q8_0", Q8_0, "8.5 bpw, one scale per 32";
    Q5_0 = 8, "Q5_0", Q5_0, "5.5 bpw, one scale per 32";
    Q5_1 = 9, "Q5_1", Q5_1, "6.0 bpw, scale and minimum per 32";
    Q2_K = 10, "Q2_K", Q2_K, "k-quant mix around 2.6 bpw, attention and ffn_down larger";
    Q3_K_S = 11, "Q3_K_S", Q3_K, "3.4 bpw k-quant";
    Q3_K_M = 12, "Q3_K_M", Q3_K, "k-quant mix around 3.9 bpw";
    Q3_K_L = 13, "Q3_K_L", Q3_K, "k-quant mix around 4.2 bpw";
    Q4_K_S = 14, "Q4_K_S", Q4_K, "k-quant mix around 4.6 bpw";
    Q4_K_M = 15, "Q4_K_M", Q4_K, "k-quant mix around 4.8 bpw, the default";
    Q5_K_S = 16, "Q5_K_S", Q5_K, "5.5 bpw k-quant";
    Q5_K_M = 17, "Q5_K_M", Q5_K, "k-quant mix around 5.7 bpw";
    Q6_K = 18, "Q6_K", Q6_K, "6.6 bpw k-quant";
    IQ2_XXS = 19, "IQ2_XXS", IQ2_XXS, "2.06 bpw codebook, needs an imatrix";
    IQ2_XS = 20, "IQ2_XS", IQ2_XS, "2.31 bpw codebook, needs an imatrix";
    Q2_K_S = 21, "Q2_K_S", Q2_K, "2.6 bpw k-quant, needs an imatrix";
    IQ3_XS = 22, "IQ3_XS", IQ3_S, "3.3 bpw codebook mix, needs an imatrix";
    IQ3_XXS = 23, "IQ3_XXS", IQ3_XXS, "3.06 bpw codebook mix, needs an imatrix";
    IQ1_S = 24, "IQ1_S", IQ1_S, "1.56 bpw codebook, needs an imatrix";
    IQ4_NL = 25, "IQ4_NL", IQ4_NL, "4.5 bpw, non-linear grid per 32";
    IQ3_S = 26, "IQ3_S", IQ3_S, "3.44 bpw codebook";
    IQ3_M = 27, "IQ3_M", IQ3_S, "3.66 bpw codebook mix";
    IQ2_S = 28, "IQ2_S", IQ2_XS, "2.5 bpw codebook mix, needs an imatrix";
    IQ2_M = 29, "IQ2_M", IQ2_S, "2.7 bpw codebook mix, needs an imatrix";
    IQ4_XS = 30, "IQ4_XS", IQ4_XS, "4.25 bpw, non-linear grid";
    IQ1_M = 31, "IQ1_M", IQ1_M, "1.75 bpw codebook, needs an imatrix";
    BF16 = 32, "BF16", BF16, "bfloat16";
    TQ1_0 = 36, "TQ1_0", TQ1_0, "1.69 bpw ternary (for models trained ternary)";
    TQ2_0 = 37, "TQ2_0", TQ2_0, "2.06 bpw ternary (for models trained ternary)";
    MXFP4_MOE = 38, "MXFP4_MOE", MXFP4, "MXFP4 experts, Q8_0 for everything else";
    Q1_0 = 40, "Q1_0", Q1_0, "1.125 bpw binary (for models trained binary)";
    Q2_0 = 41, "Q2_0", Q2_0, "2.25 bpw ternary, one scale per 64 (for models trained ternary)";
}

impl FileType {
    /// The names that stand for another.
    pub const ALIASES: &'static [(&'static str, FileType)] =
        &[("Q3_K", FileType::Q3_K_M), ("Q4_K", FileType::Q4_K_M), ("Q5_K", FileType::Q5_K_M)];

    /// The type of a `general.file_type`.
    pub fn of_number(number: u64) -> Option<FileType> {
        FileType::ALL.iter().copied().find(|t| *t as u64 == number)
    }

    /// A name (any case), an alias or a number, as llama-quantize takes them; also the name of a tensor type that has a
    /// file type of its own (`mxfp4`).
    pub fn parse(text: &str) -> Option<FileType> {
        let text = text.trim();
        let by_name = FileType::ALL.iter().copied().find(|f| f.name().eq_ignore_ascii_case(text));
        let by_alias = || FileType::ALIASES.iter().find(|(n, _)| n.eq_ignore_ascii_case(text)).map(|(_, f)| *f);
        let by_number = || {
            let n: u32 = if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok()? } else { return None };
            FileType::ALL.iter().copied().find(|f| *f as u32 == n)
        };
        by_name
            .or_else(by_alias)
            .or_else(|| text.eq_ignore_ascii_case("mxfp4").then_some(FileType::MXFP4_MOE))
            .or_else(by_number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_aliases_and_numbers() {
        assert_eq!(FileType::parse("q4_k_m"), Some(FileType::Q4_K_M));
        assert_eq!(FileType::parse("Q4_K"), Some(FileType::Q4_K_M));
        assert_eq!(FileType::parse("15"), Some(FileType::Q4_K_M));
        assert_eq!(FileType::parse("7b"), None);
        assert_eq!(FileType::parse("-2"), None);
        assert_eq!(FileType::parse(""), None);
    }
}
