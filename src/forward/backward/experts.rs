//! Backward of the feed-forward branch of a mixture: `y = Σ_e w_e E_e(x)` over the experts that a token is routed to, `w` the softmax
//! of their logits times a scale (`build_moe_ffn` of llama.cpp). Which experts these are has no gradient; their weights have.

use super::kernels::{activate, activate_back, add_all, copy};
use super::layer::{Sink, Slot, back as product_back, forward};
use crate::forward::layer::{Linear, Pass, route};
use crate::forward::{Activations, ForwardError, interrupted, kernels};

/// Leads `d_branch`, the gradient at the branch's output, to its input: `d_input`; all `[tokens, embed]`. `input` is what the router
/// and the experts of layer `l` read. Experts are loaded one after the other; errors are those of loading.
pub fn back(
    pass: &Pass<'_>,
    l: usize,
    router: &Linear,
    input: &[f32],
    d_branch: &[f32],
    d_input: &mut Vec<f32>,
    sink: &mut dyn Sink,
) -> Result<(), ForwardError> {
    let spec = &pass.model.spec;
    let (n, used) = (spec.embed, spec.experts_used);
    let mut logits = Vec::new();
    forward([(router, &mut logits)], input);
    let chosen = route(&logits, spec.experts, used, spec.expert_scale);
    // of the weight of each token's chosen experts
    let mut d_weights = vec![0f32; chosen.len()];
    d_input.clear();
    d_input.resize(input.len(), 0.0);
    let (mut x, mut d) = (Vec::new(), Vec::new());
    let (mut gate, mut up, mut hidden, mut out) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut d_hidden, mut d_x, mut part) = (Vec::new(), Vec::new(), Vec::new());
    for e in 0..spec.experts {
        interrupted()?;
        let mine: Vec<usize> = (0..chosen.len()).filter(|&i| chosen[i].0 == e).collect();
        if mine.is_empty() {
            continue;
        }
        let [w_gate, w_up, w_down] = pass.model.expert(l, e, Activations::F32)?;
        x.clear();
        mine.iter().for_each(|i| x.extend_from_slice(&input[i / used * n..][..n]));
        forward([(&w_gate, &mut gate), (&w_up, &mut up)], &x);
        copy(&gate, &mut hidden);
        activate(spec.activation, &mut hidden, &up);
        forward([(&w_down, &mut out)], &hidden);
        d.clear();
        for (&i, out) in mine.iter().zip(out.chunks_exact(n)) {
            let dy = &d_branch[i / used * n..][..n];
            d_weights[i] = dy.iter().zip(out).map(|(d, y)| d * y).sum();
            d.extend(dy.iter().map(|d| d * chosen[i].1));
        }
        sink.expert(Slot::Down, e, &w_down, &hidden, &d);
        product_back(&w_down, &d, &mut d_hidden);
        activate_back(spec.activation, &mut gate, &mut up, &d_hidden);
        sink.expert(Slot::Gate, e, &w_gate, &x, &gate);
        sink.expert(Slot::Up, e, &w_up, &x, &up);
        product_back(&w_gate, &gate, &mut d_x);
        product_back(&w_up, &up, &mut part);
        add_all(&mut d_x, &part);
        for (&i, d) in mine.iter().zip(d_x.chunks_exact(n)) {
            kernels::add(&mut d_input[i / used * n..][..n], d);
        }
    }
    // w_i = scale softmax(logits of the chosen)_i: dlogit_i = w_i (dw_i - Σ_j w_j dw_j / scale)
    logits.fill(0.0);
    let tokens = logits.chunks_exact_mut(spec.experts).zip(chosen.chunks_exact(used));
    for ((logits, chosen), d) in tokens.zip(d_weights.chunks_exact(used)) {
        let mean = chosen.iter().zip(d).map(|((_, w), d)| w * d).sum::<f32>() / spec.expert_scale;
        chosen.iter().zip(d).for_each(|(&(e, w), d)| logits[e] = w * (d - mean));
    }
    product_back(router, &logits, &mut part);
    add_all(d_input, &part);
    Ok(())
}
