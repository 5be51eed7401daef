//! The float model and a rounded one on the device, forward and back.

use super::DeviceError;
use super::buffers::{Kept, ROWS, Scratch, Sizes};
use super::device::{Arg, Buffer, Cuda, Kind, Ptr, Strided, at};
use super::simulated::{Simulated, Turn};
use super::weights::{Layer, Weight};
use crate::forward::backward::layer::{LayerBack, Norm, Slot};
use crate::forward::spec::{Activation, RopeStyle};
use crate::forward::{Activations, Model, Simulation, Spec};
use crate::tuning::head::Loss;
use Arg::{F, I, P};

/// Refuses what the kernels do not do.
pub fn admitted(model: &Model<'_>) -> Result<(), DeviceError> {
    let s = &model.spec;
    let refused = |why: &str| Err(DeviceError::Device(format!("architecture `{}`: {why}; take --device cpu", s.arch)));
    if s.experts > 0 || s.activation != Activation::Silu {
        return refused("only gated SiLU is there");
    }
    if s.attention_soft_cap.is_some() || s.final_soft_cap.is_some() {
        return refused("soft caps are not there yet");
    }
    if (0..s.layers).any(|l| s.window_of(l).is_some()) {
        return refused("sliding windows are not there yet");
    }
    let layer = LayerBack::dense(model.layer(0, Activations::F32)?, s)?;
    let norms = layer.norms();
    if norms[Norm::AfterAttention as usize].or(norms[Norm::AfterFeedForward as usize]).is_some() {
        return refused("norms behind the branches are not there yet");
    }
    if [Norm::Q, Norm::K].into_iter().filter_map(|n| norms[n as usize]).any(|w| w.len() != s.head_dim) {
        return refused("norms of all heads together are not there yet");
    }
    Ok(())
}

/// What becomes of the gradients that a backward pass finds, as [`crate::forward::backward::layer::Sink`] on the processor.
pub trait Sink {
    /// Whether the gradient at this weight is wanted.
    fn wants(&self, layer: usize, slot: Slot) -> bool;

    /// `gradient` \[rows, columns\] is that at the weight, which may change; `dy` \[tokens, rows\] that at its outputs.
    fn linear(
        &mut self,
        gpu: &Cuda,
        at: (usize, Slot),
        w: &Weight,
        gradient: Ptr,
        dy: (Ptr, usize),
    ) -> Result<(), DeviceError>;

    /// `gradient` is that at the weight of a norm, which may change.
    fn norm(&mut self, gpu: &Cuda, at: (usize, Norm), w: &Buffer, gradient: &Buffer) -> Result<(), DeviceError>;
}

/// A rotation of the stream \[n, n\] and the sum of its gradients.
pub struct StreamTurn {
    pub r: Buffer,
    pub gradient: Buffer,
}

/// What the loss of a backward pass leads to.
#[derive(Clone, Copy, Default)]
pub struct Back {
    pub loss: Loss,
    /// Where the gradients of the head and of the embedding are added; the same where they are one tensor.
    pub head: Option<Ptr>,
    pub embedding: Option<Ptr>,
}

pub struct Network {
    spec: Spec,
    length: usize,
    vocab: usize,
    pub layers: Vec<Layer>,
    pub embedding: Weight,
    pub output: Option<Weight>,
    pub norm: Buffer,
    /// Of the rounded model.
    pub stream: Option<StreamTurn>,
    simulated: Option<Simulated>,
    float: Vec<Layer>,
    float_embedding: Buffer,
    float_output: Option<Buffer>,
    float_norm: Buffer,
    rope: (Buffer, Buffer),
    /// Of every layer, or one for all of them: then the backward pass computes each layer again.
    kept: Vec<Kept>,
    /// The layers' outputs.
    outs: Vec<Buffer>,
    /// Of the float model, whose activations nobody needs again.
    once: Kept,
    s: Scratch,
}

/// The rounded model as it starts.
pub struct Start<'a> {
    pub layers: &'a [LayerBack],
    pub embedding: &'a [f32],
    pub output: Option<&'a [f32]>,
    pub norm: &'a [f32],
    /// Of its inputs, keys and values.
    pub simulation: Option<Simulation>,
}

impl Network {
    pub fn new(
        gpu: &Cuda,
        model: &Model<'_>,
        start: &Start<'_>,
        (length, batch): (usize, usize),
        again: bool,
    ) -> Result<Network, DeviceError> {
        let spec = model.spec.clone();
        let (n, vocab, tokens) = (spec.embed, model.vocab, length * batch);
        let ff = model.feed_forward();
        let (mut layers, mut float) = (Vec::new(), Vec::new());
        for (l, layer) in start.layers.iter().enumerate() {
            let original = LayerBack::dense(model.layer(l, Activations::F32)?, &spec)?;
            if start.simulation.is_some_and(|s| s.online) && layer.linear(Slot::Down).inputs != ff {
                let why = "online rotations of layers of different widths are not there yet; take --device cpu";
                return Err(DeviceError::Device(why.into()));
            }
            layers.push(Layer::new(gpu, layer, spec.has_rope(l))?);
            float.push(Layer::new(gpu, &original, spec.has_rope(l))?);
        }
        let mut rows = vec![0f32; vocab * n];
        model.embedding_rows(0, vocab, &mut rows)?;
        let float_embedding = gpu.upload(&rows)?;
        let float_output = match start.output {
            Some(_) => Some(gpu.upload(&model.head(Activations::F32)?.weight)?),
            None => None,
        };
        let (table_of_angles, _) = model.rope_tables(length)?;
        let (cos, sin) = table_of_angles.values();
        let sizes = Sizes::of(model, tokens, length);
        Ok(Network {
            embedding: Weight::new(gpu, start.embedding, n, None)?,
            output: start.output.map(|w| Weight::new(gpu, w, n, None)).transpose()?,
            norm: gpu.upload(start.norm)?,
            stream: None,
            simulated: start.simulation.map(|s| Simulated::new(gpu, s, &spec, ff)).transpose()?,
            float_norm: gpu.upload(&model.output_norm()?)?,
            rope: (gpu.upload(cos)?, gpu.upload(sin)?),
            kept: (0..if again { 1 } else { spec.layers }).map(|_| Kept::new(gpu, sizes)).collect::<Result<_, _>>()?,
            outs: (0..spec.layers).map(|_| gpu.zeros(tokens * n)).collect::<Result<_, _>>()?,
            once: Kept::new(gpu, sizes)?,
            s: Scratch::new(gpu, sizes)?,
            layers,
            float,
            float_embedding,
            float_output,
            length,
            vocab,
            spec,
        })
    }

    /// The online rotation of inputs and rows of the down matrix.
    pub fn down(&self) -> Option<Turn> {
        self.simulated.as_ref().and_then(|s| s.down.clone())
    }

    /// Σ KL over the positions of `tokens`.
    pub fn loss(&mut self, gpu: &Cuda, tokens: &[u32]) -> Result<f64, DeviceError> {
        self.forward(gpu, tokens)?;
        self.head(gpu, tokens.len(), None)
    }

    /// The sum of the losses, and the gradients of their mean: that at the final norm's weight as norm of layer `layers`.
    pub fn back(&mut self, gpu: &Cuda, tokens: &[u32], back: &Back, sink: &mut dyn Sink) -> Result<f64, DeviceError> {
        let rows = tokens.len();
        let n = self.spec.embed;
        self.forward(gpu, tokens)?;
        let loss = self.head(gpu, rows, Some(back))?;
        sink.norm(gpu, (self.layers.len(), Norm::Attention), &self.norm, &self.s.norm_gradient)?;
        if let Some(turn) = &self.stream {
            // x = last Rᵀ
            let last = self.input_of(self.layers.len());
            gpu.cross(turn.gradient.ptr(), self.s.d.ptr(), last, (n, n, rows), 1.0)?;
            gpu.product_back(self.s.d_branch.ptr(), self.s.d.ptr(), turn.r.ptr(), (rows, n, n), 0.0)?;
            self.copy(gpu, self.s.d.ptr(), self.s.d_branch.ptr(), rows * n)?;
        }
        for l in (0..self.layers.len()).rev() {
            let x = self.input_of(l);
            // what the last layer left is still there
            if self.kept.len() < self.layers.len() && l + 1 < self.layers.len() {
                let (layer, out) = (&self.layers[l], self.outs[l].ptr());
                self.layer(gpu, layer, (x, out), self.kept_of(l), rows, self.simulated.as_ref())?;
            }
            self.layer_back(gpu, l, x, rows, sink)?;
        }
        if let Some(turn) = &self.stream {
            // the first stream = first R
            self.embed(gpu, self.s.branch.ptr(), self.embedding.w.ptr(), rows)?;
            gpu.cross(turn.gradient.ptr(), self.s.branch.ptr(), self.s.d.ptr(), (n, n, rows), 1.0)?;
        }
        if let Some(g) = back.embedding {
            let scale = F(self.spec.embedding_scale);
            let args = [P(g), P(self.s.tokens.ptr()), P(self.s.d.ptr()), I(n as i32), scale];
            gpu.run("scatter", rows, (128, 1), &args)?;
        }
        Ok(loss)
    }

    /// The stream before layer `l`.
    fn input_of(&self, l: usize) -> Ptr {
        l.checked_sub(1).map_or(self.s.x.ptr(), |before| self.outs[before].ptr())
    }

    fn kept_of(&self, l: usize) -> &Kept {
        &self.kept[l.min(self.kept.len() - 1)]
    }

    fn copy(&self, gpu: &Cuda, to: Ptr, from: Ptr, count: usize) -> Result<(), DeviceError> {
        gpu.each("scaled", count, &[P(to), P(from), F(1.0), I(count as i32)])
    }

    fn embed(&self, gpu: &Cuda, out: Ptr, table: Ptr, rows: usize) -> Result<(), DeviceError> {
        let n = I(self.spec.embed as i32);
        let args = [P(out), P(table), P(self.s.tokens.ptr()), n, F(self.spec.embedding_scale)];
        gpu.run("embed", rows, (128, 1), &args)
    }

    /// Both models up to their last streams: the float one's is then in `s.teacher`.
    fn forward(&mut self, gpu: &Cuda, tokens: &[u32]) -> Result<(), DeviceError> {
        let rows = tokens.len();
        let n = self.spec.embed;
        gpu.tokens(&mut self.s.tokens, tokens)?;
        self.embed(gpu, self.s.teacher.ptr(), self.float_embedding.ptr(), rows)?;
        for layer in &self.float {
            let x = self.s.teacher.ptr();
            self.layer(gpu, layer, (x, x), &self.once, rows, None)?;
        }
        let table = self.embedding.w.ptr();
        match &self.stream {
            Some(turn) => {
                self.embed(gpu, self.s.branch.ptr(), table, rows)?;
                gpu.product_back(self.s.x.ptr(), self.s.branch.ptr(), turn.r.ptr(), (rows, n, n), 0.0)?;
            }
            None => self.embed(gpu, self.s.x.ptr(), table, rows)?,
        }
        for (l, layer) in self.layers.iter().enumerate() {
            let streams = (self.input_of(l), self.outs[l].ptr());
            self.layer(gpu, layer, streams, self.kept_of(l), rows, self.simulated.as_ref())?;
        }
        Ok(())
    }

    fn rms_norm(&self, gpu: &Cuda, out: Ptr, x: Ptr, w: Ptr, (rows, n): (usize, usize)) -> Result<(), DeviceError> {
        gpu.run("rms_norm", rows, (256, 1), &[P(out), P(0), P(x), P(w), I(n as i32), F(self.spec.rms_eps)])
    }

    fn rotate(&self, gpu: &Cuda, x: Ptr, heads: usize, rows: usize, sign: f32) -> Result<(), DeviceError> {
        let s = &self.spec;
        let halves = i32::from(s.rope_style == RopeStyle::Halves);
        let args = [
            P(x),
            P(self.rope.0.ptr()),
            P(self.rope.1.ptr()),
            I(heads as i32),
            I(s.head_dim as i32),
            I((s.rope_dims / 2) as i32),
            I(self.length as i32),
            I(halves),
            F(sign),
        ];
        gpu.run("rope", rows, (256, 1), &args)
    }

    /// A layer of either model: from the stream `x` to the stream `out`, which may be the same.
    fn layer(
        &self,
        gpu: &Cuda,
        w: &Layer,
        (x, out): (Ptr, Ptr),
        k: &Kept,
        rows: usize,
        simulated: Option<&Simulated>,
    ) -> Result<(), DeviceError> {
        let spec = &self.spec;
        let (n, hd) = (spec.embed, spec.head_dim);
        let input = self.input(gpu, x, w.norm(Norm::Attention), rows, simulated)?;
        for (slot, which, raw, to, heads) in
            [(Slot::Q, Norm::Q, &k.raw_q, &k.q, spec.heads), (Slot::K, Norm::K, &k.raw_k, &k.k, spec.kv_heads)]
        {
            match w.norm(which) {
                Some(weight) => {
                    w.of(slot).forward(gpu, raw.ptr(), input, rows)?;
                    self.rms_norm(gpu, to.ptr(), raw.ptr(), weight, (rows * heads, hd))?;
                }
                None => w.of(slot).forward(gpu, to.ptr(), input, rows)?,
            }
            if w.rotates {
                self.rotate(gpu, to.ptr(), heads, rows, 1.0)?;
            }
        }
        w.of(Slot::V).forward(gpu, k.v.ptr(), input, rows)?;
        if let Some(s) = simulated {
            let (heads, part) = ((rows * spec.kv_heads, hd), self.s.d_k.ptr());
            Simulated::round(gpu, (k.k.ptr(), part), heads, s.of.cache, &s.keys)?;
            Simulated::round(gpu, (k.v.ptr(), part), heads, s.of.cache, &None)?;
        }
        self.attend(gpu, k, rows)?;
        if let Some(s) = simulated {
            let width = w.of(Slot::O).columns;
            Simulated::round(gpu, (k.attended.ptr(), 0), (rows, width), s.of.inputs, &None)?;
        }
        w.of(Slot::O).forward(gpu, self.s.branch.ptr(), k.attended.ptr(), rows)?;
        self.copy(gpu, k.middle.ptr(), x, rows * n)?;
        let count = I((rows * n) as i32);
        gpu.each("add", rows * n, &[P(k.middle.ptr()), P(self.s.branch.ptr()), F(spec.residual_scale), count])?;
        let input = self.input(gpu, k.middle.ptr(), w.norm(Norm::FeedForward), rows, simulated)?;
        w.of(Slot::Gate).forward(gpu, k.gate.ptr(), input, rows)?;
        w.of(Slot::Up).forward(gpu, k.up.ptr(), input, rows)?;
        self.activate(gpu, k, (rows, w.of(Slot::Gate).rows), simulated)?;
        w.of(Slot::Down).forward(gpu, self.s.branch.ptr(), self.s.hidden.ptr(), rows)?;
        self.copy(gpu, out, k.middle.ptr(), rows * n)?;
        gpu.each("add", rows * n, &[P(out), P(self.s.branch.ptr()), F(spec.residual_scale), count])
    }

    /// The input of a branch: normed, and rounded where a precision is simulated.
    fn input(
        &self,
        gpu: &Cuda,
        x: Ptr,
        norm: Option<Ptr>,
        rows: usize,
        simulated: Option<&Simulated>,
    ) -> Result<Ptr, DeviceError> {
        let n = self.spec.embed;
        let own = self.s.normed.ptr();
        match (norm, simulated) {
            (Some(w), _) => self.rms_norm(gpu, own, x, w, (rows, n))?,
            (None, Some(_)) => self.copy(gpu, own, x, rows * n)?,
            (None, None) => return Ok(x),
        }
        if let Some(s) = simulated {
            Simulated::round(gpu, (own, 0), (rows, n), s.of.inputs, &None)?;
        }
        Ok(own)
    }

    /// The input of the down matrix, `s.hidden`.
    fn activate(
        &self,
        gpu: &Cuda,
        k: &Kept,
        (rows, width): (usize, usize),
        simulated: Option<&Simulated>,
    ) -> Result<(), DeviceError> {
        let args = [P(self.s.hidden.ptr()), P(k.gate.ptr()), P(k.up.ptr()), I((rows * width) as i32)];
        gpu.each("silu_mul", rows * width, &args)?;
        match simulated {
            Some(s) => {
                let x = (self.s.hidden.ptr(), self.s.d_wide.ptr());
                Simulated::round(gpu, x, (rows, width), s.of.inputs, &s.down)
            }
            None => Ok(()),
        }
    }

    /// A head of all windows: of queries (`kv` false) or keys.
    fn head_of(&self, p: Ptr, head: usize, kv: bool) -> Strided {
        let (hd, heads) = (self.spec.head_dim, if kv { self.spec.kv_heads } else { self.spec.heads });
        Strided(at(p, head * hd), heads * hd, self.length * heads * hd)
    }

    /// The scores of a head of all windows.
    fn scores_of(&self, p: Ptr, head: usize) -> Strided {
        let square = self.length * self.length;
        Strided(at(p, head * square), self.length, self.spec.heads * square)
    }

    fn attend(&self, gpu: &Cuda, k: &Kept, rows: usize) -> Result<(), DeviceError> {
        let (s, l) = (&self.spec, self.length);
        let (windows, group) = (rows / l, s.heads / s.kv_heads);
        for h in 0..s.heads {
            let (q, key) = (self.head_of(k.q.ptr(), h, false), self.head_of(k.k.ptr(), h / group, true));
            gpu.batched(Kind::Transposed, (l, l, s.head_dim), self.scores_of(k.p.ptr(), h), q, key, 0.0, windows)?;
        }
        let args = [P(k.p.ptr()), I(l as i32), F(s.attention_scale)];
        gpu.run("softmax", windows * s.heads * l, (128, 1), &args)?;
        for h in 0..s.heads {
            let (out, v) = (self.head_of(k.attended.ptr(), h, false), self.head_of(k.v.ptr(), h / group, true));
            gpu.batched(Kind::Plain, (l, s.head_dim, l), out, self.scores_of(k.p.ptr(), h), v, 0.0, windows)?;
        }
        Ok(())
    }

    /// Gradients of the heads, in `d_q`, `d_k`, `d_v`, from that of the output, `d_wide`.
    fn attend_back(&self, gpu: &Cuda, k: &Kept, rows: usize) -> Result<(), DeviceError> {
        let (s, l, hd) = (&self.spec, self.length, self.spec.head_dim);
        let (windows, group) = (rows / l, s.heads / s.kv_heads);
        let (d_out, d_p) = (self.s.d_wide.ptr(), self.s.d_p.ptr());
        for h in 0..s.heads {
            let (d_out, v) = (self.head_of(d_out, h, false), self.head_of(k.v.ptr(), h / group, true));
            gpu.batched(Kind::Transposed, (l, l, hd), self.scores_of(d_p, h), d_out, v, 0.0, windows)?;
            let beta = if h % group == 0 { 0.0 } else { 1.0 };
            let d_v = self.head_of(self.s.d_v.ptr(), h / group, true);
            gpu.batched(Kind::Cross, (l, hd, l), d_v, self.scores_of(k.p.ptr(), h), d_out, beta, windows)?;
        }
        let args = [P(k.p.ptr()), P(d_p), I(l as i32), F(s.attention_scale)];
        gpu.run("softmax_back", windows * s.heads * l, (128, 1), &args)?;
        for h in 0..s.heads {
            let (q, key) = (self.head_of(k.q.ptr(), h, false), self.head_of(k.k.ptr(), h / group, true));
            let ds = self.scores_of(d_p, h);
            let d_q = self.head_of(self.s.d_q.ptr(), h, false);
            gpu.batched(Kind::Plain, (l, hd, l), d_q, ds, key, 0.0, windows)?;
            let beta = if h % group == 0 { 0.0 } else { 1.0 };
            let d_k = self.head_of(self.s.d_k.ptr(), h / group, true);
            gpu.batched(Kind::Cross, (l, hd, l), d_k, ds, q, beta, windows)?;
        }
        Ok(())
    }

    /// Leads back through a norm of rows of `columns`, adding to `dx` or not; the gradient of its weight is in
    /// `s.norm_gradient`.
    #[allow(clippy::too_many_arguments)]
    fn norm_back(
        &self,
        gpu: &Cuda,
        weight: &Buffer,
        dx: Ptr,
        x: Ptr,
        dy: Ptr,
        (rows, columns): (usize, usize),
        add: bool,
    ) -> Result<(), DeviceError> {
        let (n, inverse) = (I(columns as i32), self.s.inverse.ptr());
        let args = [P(dx), P(inverse), P(x), P(weight.ptr()), P(dy), n, F(self.spec.rms_eps), I(i32::from(add))];
        gpu.run("rms_norm_back", rows, (256, 1), &args)?;
        let args = [P(self.s.norm_gradient.ptr()), P(x), P(dy), P(inverse), I(rows as i32), n];
        gpu.run("norm_gradient", columns.div_ceil(32), (32, 8), &args)
    }

    /// The gradient at a weight, for the sink.
    fn weight_back(
        &self,
        gpu: &Cuda,
        (l, slot): (usize, Slot),
        (x, dy): (Ptr, Ptr),
        rows: usize,
        sink: &mut dyn Sink,
    ) -> Result<(), DeviceError> {
        if !sink.wants(l, slot) {
            return Ok(());
        }
        let (w, g) = (self.layers[l].of(slot), self.s.gradient.ptr());
        gpu.cross(g, dy, x, (w.rows, w.columns, rows), 0.0)?;
        sink.linear(gpu, (l, slot), w, g, (dy, rows))
    }

    /// `s.d`, the gradient at the output of layer `l`, becomes that at its input `x`.
    fn layer_back(&self, gpu: &Cuda, l: usize, x: Ptr, rows: usize, sink: &mut dyn Sink) -> Result<(), DeviceError> {
        let (spec, layer, k, s) = (&self.spec, &self.layers[l], self.kept_of(l), &self.s);
        let (n, simulated) = (spec.embed, self.simulated.as_ref());
        let count = I((rows * n) as i32);
        let (d, d_branch, d_input) = (s.d.ptr(), s.d_branch.ptr(), s.d_input.ptr());
        let (gate, up, down) = (layer.of(Slot::Gate), layer.of(Slot::Up), layer.of(Slot::Down));
        // feed-forward
        gpu.each("scaled", rows * n, &[P(d_branch), P(d), F(spec.residual_scale), count])?;
        self.activate(gpu, k, (rows, gate.rows), simulated)?;
        down.back(gpu, s.d_wide.ptr(), d_branch, rows, 0.0)?;
        self.weight_back(gpu, (l, Slot::Down), (s.hidden.ptr(), d_branch), rows, sink)?;
        let wide = rows * gate.rows;
        gpu.each("silu_mul_back", wide, &[P(k.gate.ptr()), P(k.up.ptr()), P(s.d_wide.ptr()), I(wide as i32)])?;
        gate.back(gpu, d_input, k.gate.ptr(), rows, 0.0)?;
        up.back(gpu, d_input, k.up.ptr(), rows, 1.0)?;
        let input = self.input(gpu, k.middle.ptr(), layer.norm(Norm::FeedForward), rows, simulated)?;
        self.weight_back(gpu, (l, Slot::Gate), (input, k.gate.ptr()), rows, sink)?;
        self.weight_back(gpu, (l, Slot::Up), (input, k.up.ptr()), rows, sink)?;
        match &layer.norms[Norm::FeedForward as usize] {
            Some(norm) => {
                self.norm_back(gpu, norm, d, k.middle.ptr(), d_input, (rows, n), true)?;
                sink.norm(gpu, (l, Norm::FeedForward), norm, &s.norm_gradient)?;
            }
            None => gpu.each("add", rows * n, &[P(d), P(d_input), F(1.0), count])?,
        }
        // attention
        let (q, key, v, o) = (layer.of(Slot::Q), layer.of(Slot::K), layer.of(Slot::V), layer.of(Slot::O));
        gpu.each("scaled", rows * n, &[P(d_branch), P(d), F(spec.residual_scale), count])?;
        o.back(gpu, s.d_wide.ptr(), d_branch, rows, 0.0)?;
        self.weight_back(gpu, (l, Slot::O), (k.attended.ptr(), d_branch), rows, sink)?;
        self.attend_back(gpu, k, rows)?;
        let mut gradients = [s.d_q.ptr(), s.d_k.ptr()];
        for (i, (which, raw, heads)) in
            [(Norm::Q, &k.raw_q, spec.heads), (Norm::K, &k.raw_k, spec.kv_heads)].into_iter().enumerate()
        {
            if layer.rotates {
                self.rotate(gpu, gradients[i], heads, rows, -1.0)?;
            }
            if let Some(norm) = &layer.norms[which as usize] {
                // the forward pass is done with what stands in `q` and `k`
                let to = if i == 0 { k.q.ptr() } else { k.k.ptr() };
                self.norm_back(gpu, norm, to, raw.ptr(), gradients[i], (rows * heads, spec.head_dim), false)?;
                sink.norm(gpu, (l, which), norm, &s.norm_gradient)?;
                gradients[i] = to;
            }
        }
        let [d_q, d_k] = gradients;
        let d_v = s.d_v.ptr();
        q.back(gpu, d_input, d_q, rows, 0.0)?;
        key.back(gpu, d_input, d_k, rows, 1.0)?;
        v.back(gpu, d_input, d_v, rows, 1.0)?;
        let input = self.input(gpu, x, layer.norm(Norm::Attention), rows, simulated)?;
        self.weight_back(gpu, (l, Slot::Q), (input, d_q), rows, sink)?;
        self.weight_back(gpu, (l, Slot::K), (input, d_k), rows, sink)?;
        self.weight_back(gpu, (l, Slot::V), (input, d_v), rows, sink)?;
        match &layer.norms[Norm::Attention as usize] {
            Some(norm) => {
                self.norm_back(gpu, norm, d, x, d_input, (rows, n), true)?;
                sink.norm(gpu, (l, Norm::Attention), norm, &s.norm_gradient)
            }
            None => gpu.each("add", rows * n, &[P(d), P(d_input), F(1.0), count]),
        }
    }

    /// The sum of the losses, KL without `back`; with it the gradient at the last stream, turned back, in `s.d` and that of the
    /// norm's weight in `s.norm_gradient`.
    fn head(&self, gpu: &Cuda, rows: usize, back: Option<&Back>) -> Result<f64, DeviceError> {
        let (spec, s) = (&self.spec, &self.s);
        let (n, vocab) = (spec.embed, self.vocab);
        let head = self.output.as_ref().unwrap_or(&self.embedding);
        let float = self.float_output.as_ref().unwrap_or(&self.float_embedding);
        let mut last = self.input_of(self.layers.len());
        if let Some(turn) = &self.stream {
            gpu.product(s.d_branch.ptr(), last, turn.r.ptr(), (rows, n, n))?;
            last = s.d_branch.ptr();
        }
        let weight = if back.is_some() { 1.0 / rows as f32 } else { 0.0 };
        self.rms_norm(gpu, s.normed.ptr(), last, self.norm.ptr(), (rows, n))?;
        self.rms_norm(gpu, s.branch.ptr(), s.teacher.ptr(), self.float_norm.ptr(), (rows, n))?;
        for from in (0..rows).step_by(ROWS) {
            let here = ROWS.min(rows - from);
            let (x, y) = (at(s.normed.ptr(), from * n), at(s.branch.ptr(), from * n));
            gpu.product(s.logits.ptr(), x, head.w.ptr(), (here, vocab, n))?;
            gpu.product(s.wanted.ptr(), y, float.ptr(), (here, vocab, n))?;
            let sums = P(at(s.sums.ptr(), 2 * from));
            let (q, p, size) = (P(s.logits.ptr()), P(s.wanted.ptr()), I(vocab as i32));
            let (scale, weight) = (F(spec.logit_scale), F(weight));
            match back.map_or(Loss::Kl, |b| b.loss) {
                Loss::Kl => gpu.run("divergence", here, (512, 1), &[sums, q, p, size, scale, weight])?,
                Loss::KlTop(k) => {
                    let k = I(k.min(vocab) as i32);
                    gpu.run("top_divergence", here, (512, 1), &[sums, q, p, size, scale, weight, k])?;
                }
                Loss::CrossEntropy => {
                    let (tokens, length) = (P(s.tokens.ptr()), I(self.length as i32));
                    let args = [sums, q, tokens, size, scale, weight, I(from as i32), length];
                    gpu.run("surprise", here, (512, 1), &args)?;
                }
            }
            if let Some(back) = back {
                gpu.product_back(at(s.d_input.ptr(), from * n), s.logits.ptr(), head.w.ptr(), (here, n, vocab), 0.0)?;
                if let Some(g) = back.head {
                    gpu.cross(g, s.logits.ptr(), x, (vocab, n, here), 1.0)?;
                }
            }
        }
        if back.is_some() {
            self.norm_back(gpu, &self.norm, s.d.ptr(), last, s.d_input.ptr(), (rows, n), false)?;
        }
        Ok(gpu.read_f64(&s.sums, rows)?.iter().sum())
    }
}
