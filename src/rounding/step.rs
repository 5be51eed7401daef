//! The four inputs of a layer, in order: which linears have them, how they are made, what follows from them.

use crate::forward::layer::{FeedForward, Layer, Linear, Pass, Scratch, gated};

/// The four inputs of a layer, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Qkv,
    Output,
    GateUp,
    Down,
}

impl Step {
    pub const ALL: [Step; 4] = [Step::Qkv, Step::Output, Step::GateUp, Step::Down];

    /// Name of the file of its input.
    pub fn name(self) -> &'static str {
        match self {
            Step::Qkv => "qkv",
            Step::Output => "attended",
            Step::GateUp => "gate-up",
            Step::Down => "hidden",
        }
    }

    /// Its input is made from the stream before the layer.
    pub fn is_attention(self) -> bool {
        matches!(self, Step::Qkv | Step::Output)
    }

    /// Its output is added to the stream.
    pub fn leads_back(self) -> bool {
        matches!(self, Step::Output | Step::Down)
    }

    /// The linears that share the input; none for experts.
    pub fn linears(self, layer: &Layer) -> Option<Vec<&Linear>> {
        Some(match (self, &layer.ffn) {
            (Step::Qkv, _) => vec![&layer.q, &layer.k, &layer.v],
            (Step::Output, _) => vec![&layer.o],
            (Step::GateUp, FeedForward::Dense { gate, up, .. }) => vec![gate, up],
            (Step::Down, FeedForward::Dense { down, .. }) => vec![down],
            _ => return None,
        })
    }

    /// The same, to write.
    pub fn linears_mut(self, layer: &mut Layer) -> Option<Vec<&mut Linear>> {
        Some(match (self, &mut layer.ffn) {
            (Step::Qkv, _) => vec![&mut layer.q, &mut layer.k, &mut layer.v],
            (Step::Output, _) => vec![&mut layer.o],
            (Step::GateUp, FeedForward::Dense { gate, up, .. }) => vec![gate, up],
            (Step::Down, FeedForward::Dense { down, .. }) => vec![down],
            _ => return None,
        })
    }

    /// The input of its linears, from the stream `x`, in a buffer of `s`.
    pub fn input(self, layer: &Layer, pass: &Pass<'_>, x: &[f32], s: &mut Scratch) -> Vec<f32> {
        match self {
            Step::Qkv => layer.attention_input(pass, x, s),
            Step::GateUp => layer.feed_forward_input(pass, x, s),
            Step::Output => {
                let input = layer.attention_input(pass, x, s);
                layer.attend(pass, &input, s);
                s.normed = input;
                std::mem::take(&mut s.attended)
            }
            Step::Down => {
                let input = layer.feed_forward_input(pass, x, s);
                if let FeedForward::Dense { gate, up, .. } = &layer.ffn {
                    gated(pass, (gate, up), &input, s);
                }
                s.normed = input;
                std::mem::take(&mut s.gate)
            }
        }
    }

    /// Returns the buffer of [`Step::input`].
    pub fn give_back(self, buffer: Vec<f32>, s: &mut Scratch) {
        match self {
            Step::Qkv | Step::GateUp => s.normed = buffer,
            Step::Output => s.attended = buffer,
            Step::Down => s.gate = buffer,
        }
    }

    /// Adds the output for `input` to the stream `x`.
    pub fn output(self, layer: &Layer, pass: &Pass<'_>, input: &[f32], x: &mut [f32], s: &mut Scratch) {
        match self {
            Step::Output => layer.attention_output(pass, input, x, s),
            Step::Down => layer.feed_forward_output(pass, input, x, s),
            Step::Qkv | Step::GateUp => {}
        }
    }
}
