//! What a long run tells while it runs. The command line shows it as a bar or as plain lines.

/// Receives progress from any thread.
pub trait Progress: Sync {
    /// `bytes` of input were converted.
    fn advance(&self, bytes: u64);
    /// A tensor is complete.
    fn tensor(&self, name: &str);
}

/// Says nothing.
pub struct Silent;

impl Progress for Silent {
    fn advance(&self, _: u64) {}
    fn tensor(&self, _: &str) {}
}
