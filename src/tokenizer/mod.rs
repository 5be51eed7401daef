//! Vocabularies as GGUF metadata.
