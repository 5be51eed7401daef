//! Which positions of a text are scored: those of llama-perplexity.
//!
//! The tokens of the text, with the BOS that the tokenizer puts in front, are cut into windows of `n_ctx`; what is left
//! over is dropped. Each window is evaluated on its own, from an empty cache. Its first half is context only; in the
//! second half, every position but the last is scored by the token that follows it. Where the vocabulary asks for a BOS
//! token, it stands in place of the first token of every window during evaluation (`perplexity` and `kl_divergence` of
//! llama.cpp's tools/perplexity/perplexity.cpp).

use super::CheckError;

/// Windows of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    n_ctx: usize,
    n_chunks: usize,
}

/// A context has a context half and at least one scored position.
const MIN_CTX: usize = 3;

impl Windows {
    /// As many windows of `n_ctx` as `n_tokens` tokens fill, `limit` at most.
    ///
    /// Errors: a context below 3, fewer tokens than two windows (llama-perplexity refuses these as well).
    pub fn new(n_tokens: usize, n_ctx: usize, limit: Option<usize>) -> Result<Windows, CheckError> {
        if n_ctx < MIN_CTX {
            let why = format!("a context of {n_ctx} tokens has no position to score; {MIN_CTX} is the least");
            return Err(CheckError::Text(why));
        }
        if n_tokens / 2 < n_ctx {
            return Err(CheckError::Text(format!(
                "the text has {n_tokens} tokens; a context of {n_ctx} needs {} at least. Take a longer text or a smaller context",
                2 * n_ctx as u128
            )));
        }
        let n_chunks = (n_tokens / n_ctx).min(limit.unwrap_or(usize::MAX));
        if n_chunks == 0 {
            return Err(CheckError::Text("no windows were asked for; one is the least".into()));
        }
        Ok(Windows { n_ctx, n_chunks })
    }

    /// Tokens in a window.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Windows.
    pub fn n_chunks(&self) -> usize {
        self.n_chunks
    }

    /// The first scored position of a window.
    pub fn first(&self) -> usize {
        self.n_ctx / 2
    }

    /// Scored positions of a window.
    pub fn scored(&self) -> usize {
        scored(self.n_ctx)
    }

    /// Scored positions of all windows.
    pub fn positions(&self) -> usize {
        self.n_chunks * self.scored()
    }

    /// The tokens of window `chunk`; `None` if there is no such window or `tokens` ends before it.
    pub fn tokens<'a>(&self, tokens: &'a [i32], chunk: usize) -> Option<&'a [i32]> {
        let start = chunk.checked_mul(self.n_ctx).filter(|_| chunk < self.n_chunks)?;
        tokens.get(start..start.checked_add(self.n_ctx)?)
    }

    /// What a model evaluates for window `chunk`: its tokens, the first replaced by `bos` where the vocabulary asks for one.
    pub fn input(&self, tokens: &[i32], chunk: usize, bos: Option<i32>) -> Option<Vec<i32>> {
        let mut input = self.tokens(tokens, chunk)?.to_vec();
        if let (Some(first), Some(bos)) = (input.first_mut(), bos) {
            *first = bos;
        }
        Some(input)
    }

    /// The tokens that the scored positions of a window should predict, from the window's own `n_ctx` tokens.
    pub fn next<'a>(&self, window: &'a [i32]) -> &'a [i32] {
        window.get(self.first() + 1..self.n_ctx).unwrap_or_default()
    }
}

/// Scored positions of a window of `n_ctx` tokens.
pub(super) fn scored(n_ctx: usize) -> usize {
    n_ctx.saturating_sub(1 + n_ctx / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_half_is_scored_but_for_the_last() {
        let w = Windows::new(1300, 512, None).unwrap();
        assert_eq!((w.n_chunks(), w.first(), w.scored(), w.positions()), (2, 256, 255, 510));
        let tokens: Vec<i32> = (0..1300).collect();
        let window = w.tokens(&tokens, 1).unwrap();
        assert_eq!((window[0], window.len()), (512, 512));
        assert_eq!((w.next(window)[0], *w.next(window).last().unwrap()), (512 + 257, 1023));
        assert_eq!(w.next(window).len(), w.scored());
        assert_eq!((w.tokens(&tokens, 2), w.input(&tokens, 2, Some(7))), (None, None));
        let (with, without) = (w.input(&tokens, 1, Some(7)).unwrap(), w.input(&tokens, 1, None).unwrap());
        assert_eq!((with[0], &with[1..], &*without), (7, &window[1..], window));
        // an odd context
        let odd = Windows::new(100, 7, Some(3)).unwrap();
        assert_eq!((odd.first(), odd.scored(), odd.positions()), (3, 3, 9));
    }

    #[test]
    fn too_little_is_refused() {
        let why = |t, c, l| Windows::new(t, c, l).unwrap_err().to_string();
        assert!(why(1023, 512, None).contains("1023 tokens"));
        assert!(why(9, 2, None).contains("context of 2"));
        assert!(why(100, 8, Some(0)).contains("no windows"));
        assert!(why(5, usize::MAX, None).contains("5 tokens"));
    }
}
