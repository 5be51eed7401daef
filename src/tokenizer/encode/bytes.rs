//! GPT-2's byte alphabet: every byte is a visible character.
//!
//! In: bytes or the text of a token. Out: the other. Sources: `unicode_byte_to_utf8_map` of `src/unicode.cpp`,
//! `llama_decode_text` of `src/llama-vocab.cpp`.

use std::fmt::Write;

/// Bytes that stand for themselves.
fn visible(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character of every byte.
pub fn alphabet() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if visible(byte) {
            return char::from(byte);
        }
        let c = char::from_u32(next).expect("68 code points from U+0100 are characters");
        next += 1;
        c
    })
}

/// The byte of a character of the alphabet.
pub fn byte_of(c: char) -> Option<u8> {
    match c as u32 {
        code @ 0..=0xFF => Some(code as u8).filter(|&b| visible(b)),
        code @ 0x100..=0x143 => hidden().nth(code as usize - 0x100),
        _ => None,
    }
}

fn hidden() -> impl Iterator<Item = u8> {
    (0..=255).filter(|&b| !visible(b))
}

/// The bytes that a token means, if it is written in the alphabet alone.
pub fn decode(token: &[u8]) -> Option<Vec<u8>> {
    std::str::from_utf8(token).ok()?.chars().map(byte_of).collect()
}

/// The bytes that a token means, as llama.cpp shows them: what is not of the alphabet is named, with the whole text behind.
pub fn decode_or_name(token: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(token.len());
    let text = String::from_utf8_lossy(token);
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                let mut name = String::from("[UNK_BYTE_0x");
                for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                    write!(name, "{byte:02x}").expect("a string takes everything");
                }
                out.extend(name.as_bytes());
                out.extend(token);
                out.push(b']');
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_one_to_one() {
        let alphabet = alphabet();
        for (byte, &c) in alphabet.iter().enumerate() {
            assert_eq!(byte_of(c), Some(byte as u8));
        }
        assert_eq!(
            (alphabet[b' ' as usize], alphabet[b'\n' as usize], alphabet[0xAD]),
            ('\u{120}', '\u{10a}', '\u{143}')
        );
        assert_eq!((byte_of(' '), byte_of('\u{144}'), byte_of('\u{ad}')), (None, None, None));
    }

    #[test]
    fn tokens_as_bytes() {
        assert_eq!(decode("\u{120}\u{e9}".as_bytes()), Some(vec![b' ', 0xE9]));
        assert_eq!(decode("a b".as_bytes()), None);
        assert_eq!(decode(b"\xff"), None);
        assert_eq!(decode_or_name("a b".as_bytes()), b"a[UNK_BYTE_0x20a b]b");
    }
}
