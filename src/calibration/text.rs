//! The text that calibration runs through a model when none is given: it ships with the program.
//!
//! Public-domain prose with verse, other languages, numbers and code between; `assets/README.md` names the works. Files of
//! importance matrices and second moments say that it was used by [`NAME`] and by its sha256.

use sha2::{Digest, Sha256};

use super::imatrix::hex;

/// What files call it.
pub const NAME: &str = "ostq-convert/calibration.txt";

/// The text, UTF-8.
pub const TEXT: &str = include_str!("../../assets/calibration.txt");

/// sha256 of the text, in hexadecimal.
pub fn sha256() -> String {
    hex(&Sha256::digest(TEXT.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_some_of_everything_early() {
        assert!((120_000..160_000).contains(&TEXT.len()), "{} bytes", TEXT.len());
        assert!(!TEXT.contains(['\r', '\0', '\u{feff}', '\u{fffd}']) && TEXT.ends_with('\n'));
        let half: String = TEXT.chars().take(TEXT.len() / 2).collect();
        for text in ["Time Traveller", "summer's day", "Ozymandias", "| planet", "Assistant:"] {
            assert!(half.contains(text), "{text} is not in the first half");
        }
        for text in ["```rust", "吾輩は猫である", "Я помню", "قفا نبك"] {
            assert!(TEXT.contains(text), "{text} is missing");
        }
        // fences close
        assert_eq!(TEXT.matches("```").count() % 2, 0);
        assert_eq!(sha256().len(), 64);
    }
}
