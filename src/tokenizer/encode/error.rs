//! What can be wrong with the tokenizer keys of a file.

/// Metadata that cannot tokenize: the key, what was found, what helps.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// A key that must be there is not.
    #[error("key `{key}` is missing; convert the model again, with its tokenizer files")]
    Missing { key: &'static str },
    /// A key has another type than llama.cpp reads.
    #[error("key `{key}` is of type {found}, expected {expected}")]
    Type { key: String, found: String, expected: &'static str },
    /// A vocabulary of another kind.
    #[error("`tokenizer.ggml.model` is `{model}` ({what}); text can be encoded for `llama`, `gpt2` and `gemma4`")]
    Model { model: String, what: &'static str },
    /// A pre-tokenizer that llama.cpp b11434 does not have.
    #[error("`tokenizer.ggml.pre` is `{pre}`, which llama.cpp does not know; the nearest that it knows is `{nearest}`")]
    Pre { pre: String, nearest: String },
    /// No tokens, or more than ids.
    #[error("`tokenizer.ggml.tokens` has {found} elements, expected 1 to 4294967294")]
    Count { found: usize },
    /// Arrays that belong together and do not fit.
    #[error("`{key}` has {found} elements for {tokens} tokens")]
    Length { key: &'static str, found: usize, tokens: usize },
    /// An id of a token that is not there.
    #[error("`{key}` is {id}, but there are {tokens} tokens")]
    Id { key: String, id: u64, tokens: usize },
    /// Two tokens cannot be told apart.
    #[error("tokens {first} and {second} have the same text, {text:?}")]
    Duplicate { first: u32, second: u32, text: String },
    /// A token that is unusable.
    #[error("token {id} ({text:?}) {reason}")]
    Token { id: u32, text: String, reason: &'static str },
    /// `add_bos_token` or `add_eos_token` without the token.
    #[error(
        "`tokenizer.ggml.add_{name}_token` is true, but there is no {name} token; set `tokenizer.ggml.{name}_token_id` or the former to false"
    )]
    NoToken { name: &'static str },
}
