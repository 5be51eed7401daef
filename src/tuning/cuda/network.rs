//! Both models on the device, forward and back.

use super::device::{Arg, Buffer, Cuda, Kind, Ptr, Strided, at};
use super::{AdamArg, DeviceBlocks, DeviceNorm};
use crate::forward::backward::layer::{Norm, Slot};
use crate::forward::spec::{Activation, RopeStyle};
use crate::forward::{Activations, Model, Spec};
use crate::tuning::TuningError;
use crate::tuning::blocks::Blocks;
use crate::tuning::student::Student;
use Arg::{F, I, P};

/// Positions whose logits are on the device at a time.
const ROWS: usize = 1024;

/// Refuses what the kernels do not do.
pub fn admitted(model: &Model<'_>) -> Result<(), TuningError> {
    let s = &model.spec;
    let refused = |why: &str| Err(TuningError::Device(format!("architecture `{}`: {why}; take --device cpu", s.arch)));
    if s.experts > 0 || s.activation != Activation::Silu {
        return refused("only gated SiLU is there");
    }
    if s.attention_soft_cap.is_some() || s.final_soft_cap.is_some() {
        return refused("soft caps are not there yet");
    }
    if (0..s.layers).any(|l| s.window_of(l).is_some()) {
        return refused("sliding windows are not there yet");
    }
    Ok(())
}

/// A weight, its parameters where it is tuned, and its bias.
pub struct Weight {
    w: Buffer,
    rows: usize,
    columns: usize,
    bias: Option<Buffer>,
    pub blocks: Option<DeviceBlocks>,
}

impl Weight {
    fn new(
        gpu: &Cuda,
        w: &[f32],
        columns: usize,
        bias: Option<&[f32]>,
        blocks: Option<&mut Blocks>,
    ) -> Result<Weight, TuningError> {
        Ok(Weight {
            w: gpu.upload(w)?,
            rows: w.len() / columns,
            columns,
            bias: bias.map(|b| gpu.upload(b)).transpose()?,
            blocks: blocks.map(|b| DeviceBlocks::new(gpu, b)).transpose()?,
        })
    }

    /// `out = x Wᵀ + b` for `rows` rows.
    fn forward(&self, gpu: &Cuda, out: Ptr, x: Ptr, rows: usize) -> Result<(), TuningError> {
        gpu.product(out, x, self.w.ptr(), (rows, self.rows, self.columns))?;
        match &self.bias {
            Some(b) => {
                let count = rows * self.rows;
                gpu.each("add_bias", count, &[P(out), P(b.ptr()), I(self.rows as i32), I(count as i32)])
            }
            None => Ok(()),
        }
    }

    /// `dx = dy W + beta dx`.
    fn back(&self, gpu: &Cuda, dx: Ptr, dy: Ptr, rows: usize, beta: f32) -> Result<(), TuningError> {
        gpu.product_back(dx, dy, self.w.ptr(), (rows, self.columns, self.rows), beta)
    }

    /// A step by the gradient at its outputs.
    fn step(&self, gpu: &Cuda, g: Ptr, x: Ptr, dy: Ptr, rows: usize, adam: AdamArg) -> Result<(), TuningError> {
        let Some(blocks) = &self.blocks else { return Ok(()) };
        gpu.cross(g, dy, x, (self.rows, self.columns, rows), 0.0)?;
        blocks.step(gpu, g, self.w.ptr(), adam)
    }

    pub fn push(&mut self, gpu: &Cuda, blocks: Option<&mut Blocks>) -> Result<(), TuningError> {
        if let (Some(d), Some(b)) = (&mut self.blocks, blocks) {
            d.push(gpu, b)?;
            let none =
                AdamArg { beta1: 0.0, beta2: 0.0, correction1: 1.0, correction2: 1.0, rate: 0.0, code_rate: 0.0 };
            d.step(gpu, 0, self.w.ptr(), none)?;
        }
        Ok(())
    }
}

/// A layer of the rounded model.
pub struct Layer {
    pub linears: [Weight; 7],
    pub norms: [Option<DeviceNorm>; 6],
    rotates: bool,
}

impl Layer {
    fn of(&self, slot: Slot) -> &Weight {
        &self.linears[slot as usize]
    }

    fn norm(&self, norm: Norm) -> Option<Ptr> {
        self.norms[norm as usize].as_ref().map(DeviceNorm::weight)
    }
}

/// A layer of the float model.
struct Float {
    linears: [Weight; 7],
    norms: [Option<Buffer>; 6],
    rotates: bool,
}

/// What passes need of a layer of either model.
struct Weights<'a> {
    linears: &'a [Weight; 7],
    norms: [Option<Ptr>; 6],
    rotates: bool,
}

/// What a layer's forward pass leaves to its backward pass.
struct Kept {
    raw_q: Buffer,
    raw_k: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    p: Buffer,
    attended: Buffer,
    middle: Buffer,
    gate: Buffer,
    up: Buffer,
    /// The layer's output.
    out: Buffer,
}

/// Buffers that are used again and again.
struct Scratch {
    tokens: Buffer,
    x: Buffer,
    normed: Buffer,
    hidden: Buffer,
    branch: Buffer,
    d: Buffer,
    d_branch: Buffer,
    d_wide: Buffer,
    d_q: Buffer,
    d_k: Buffer,
    d_v: Buffer,
    d_input: Buffer,
    d_p: Buffer,
    inverse: Buffer,
    teacher: Buffer,
    logits: Buffer,
    wanted: Buffer,
    sums: Buffer,
    gradient: Buffer,
}

pub struct Network {
    spec: Spec,
    length: usize,
    vocab: usize,
    pub layers: Vec<Layer>,
    pub embedding: Option<Weight>,
    pub output: Option<Weight>,
    pub norm: DeviceNorm,
    float: Vec<Float>,
    float_embedding: Buffer,
    float_output: Option<Buffer>,
    float_norm: Buffer,
    rope: (Buffer, Buffer),
    kept: Vec<Kept>,
    /// Of the float model, whose activations nobody needs again.
    once: Kept,
    s: Scratch,
    /// Of the embedding, and of the head where it is another tensor.
    embedding_gradient: Buffer,
    output_gradient: Option<Buffer>,
}

impl Network {
    pub fn new(gpu: &Cuda, student: &mut Student<'_>, length: usize, batch: usize) -> Result<Network, TuningError> {
        let model = student.model;
        let spec = model.spec.clone();
        let (n, vocab, tokens) = (spec.embed, model.vocab, length * batch);
        let (q, kv, ff) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, model.feed_forward());
        let (mut layers, mut float) = (Vec::new(), Vec::new());
        for (l, (layer, tuned)) in student.layers.iter().zip(&mut student.tuned).enumerate() {
            let original = model.layer(l, Activations::F32)?;
            let original = crate::forward::backward::layer::LayerBack::new(original, &spec)?;
            let mut both = Vec::new();
            for slot in Slot::ALL {
                let (now, then) = (layer.linear(slot), original.linear(slot));
                let blocks = tuned.linears[slot as usize].as_mut();
                both.push((
                    Weight::new(gpu, &now.weight, now.inputs, now.bias.as_deref(), blocks)?,
                    Weight::new(gpu, &then.weight, then.inputs, then.bias.as_deref(), None)?,
                ));
            }
            let (now, then): (Vec<_>, Vec<_>) = both.into_iter().unzip();
            let seven = |v: Vec<Weight>| v.try_into().unwrap_or_else(|_| unreachable!("seven linears"));
            let norms = &mut tuned.norms.0;
            let [a, b, c, d, e, f] = norms.each_mut().map(|p| p.as_mut().map(|p| DeviceNorm::new(gpu, p)).transpose());
            let rotates = spec.has_rope(l);
            layers.push(Layer { linears: seven(now), norms: [a?, b?, c?, d?, e?, f?], rotates });
            let [a, b, c, d, e, f] = original.norms().map(|w| w.map(|w| gpu.upload(w)).transpose());
            float.push(Float { linears: seven(then), norms: [a?, b?, c?, d?, e?, f?], rotates });
        }
        let table = |t: &mut crate::tuning::student::Table| Weight::new(gpu, &t.weight, n, None, t.blocks.as_mut());
        let mut rows = vec![0f32; vocab * n];
        model.embedding_rows(0, vocab, &mut rows)?;
        let float_embedding = gpu.upload(&rows)?;
        let float_output = match student.output {
            Some(_) => Some(gpu.upload(&model.head(Activations::F32)?.weight)?),
            None => None,
        };
        let (table_of_angles, _) = model.rope_tables(length)?;
        let (cos, sin) = table_of_angles.values();
        let z = |n: usize| gpu.zeros(n);
        let kept = || -> Result<Kept, TuningError> {
            Ok(Kept {
                raw_q: z(tokens * q)?,
                raw_k: z(tokens * kv)?,
                q: z(tokens * q)?,
                k: z(tokens * kv)?,
                v: z(tokens * kv)?,
                p: z(tokens * length * spec.heads)?,
                attended: z(tokens * q)?,
                middle: z(tokens * n)?,
                gate: z(tokens * ff)?,
                up: z(tokens * ff)?,
                out: z(tokens * n)?,
            })
        };
        let widest = (q * n).max(n * ff);
        let s = Scratch {
            tokens: z(tokens)?,
            x: z(tokens * n)?,
            normed: z(tokens * n)?,
            hidden: z(tokens * ff)?,
            branch: z(tokens * n)?,
            d: z(tokens * n)?,
            d_branch: z(tokens * n)?,
            d_wide: z(tokens * q.max(ff))?,
            d_q: z(tokens * q)?,
            d_k: z(tokens * kv)?,
            d_v: z(tokens * kv)?,
            d_input: z(tokens * n.max(q))?,
            d_p: z(tokens * length * spec.heads)?,
            inverse: z(tokens * spec.heads)?,
            teacher: z(tokens * n)?,
            logits: z(ROWS * vocab)?,
            wanted: z(ROWS * vocab)?,
            sums: z(2 * tokens)?,
            gradient: z(widest)?,
        };
        Ok(Network {
            embedding: Some(table(&mut student.embedding)?),
            output: student.output.as_mut().map(table).transpose()?,
            norm: DeviceNorm::new(gpu, &mut student.head.norm)?,
            float_norm: gpu.upload(&model.output_norm()?)?,
            rope: (gpu.upload(cos)?, gpu.upload(sin)?),
            kept: (0..spec.layers).map(|_| kept()).collect::<Result<_, _>>()?,
            once: kept()?,
            embedding_gradient: z(vocab * n)?,
            output_gradient: student.output.as_ref().map(|_| z(vocab * n)).transpose()?,
            layers,
            float,
            float_embedding,
            float_output,
            s,
            length,
            vocab,
            spec,
        })
    }

    /// Σ KL over the positions of `tokens`.
    pub fn loss(&mut self, gpu: &Cuda, tokens: &[u32]) -> Result<f64, TuningError> {
        self.forward(gpu, tokens)?;
        self.head(gpu, tokens.len(), None)
    }

    /// The same, and one step.
    pub fn step(&mut self, gpu: &Cuda, tokens: &[u32], adam: AdamArg) -> Result<f64, TuningError> {
        let rows = tokens.len();
        let n = self.spec.embed;
        self.forward(gpu, tokens)?;
        let loss = self.head(gpu, rows, Some(adam))?;
        for l in (0..self.layers.len()).rev() {
            let x = if l == 0 { self.s.x.ptr() } else { self.kept[l - 1].out.ptr() };
            self.layer_back(gpu, l, x, rows, adam)?;
        }
        if let Some(e) = &self.embedding
            && let Some(b) = &e.blocks
        {
            let g = self.embedding_gradient.ptr();
            let scale = F(self.spec.embedding_scale);
            let args = [P(g), P(self.s.tokens.ptr()), P(self.s.d.ptr()), I(n as i32), scale];
            gpu.run("scatter", rows, (128, 1), &args)?;
            b.step(gpu, g, e.w.ptr(), adam)?;
            let count = self.vocab * n;
            gpu.each("fill", count, &[P(g), F(0.0), I(count as i32)])?;
        }
        Ok(loss)
    }

    /// Both models up to their last streams: the float one's is then in `s.teacher`.
    fn forward(&mut self, gpu: &Cuda, tokens: &[u32]) -> Result<(), TuningError> {
        let rows = tokens.len();
        let n = self.spec.embed;
        gpu.tokens(&mut self.s.tokens, tokens)?;
        let embed = |out: Ptr, table: Ptr| {
            let args = [P(out), P(table), P(self.s.tokens.ptr()), I(n as i32), F(self.spec.embedding_scale)];
            gpu.run("embed", rows, (128, 1), &args)
        };
        embed(self.s.teacher.ptr(), self.float_embedding.ptr())?;
        for f in &self.float {
            let norms = f.norms.each_ref().map(|b| b.as_ref().map(Buffer::ptr));
            let w = Weights { linears: &f.linears, norms, rotates: f.rotates };
            self.layer(gpu, &w, self.s.teacher.ptr(), &self.once, rows)?;
            gpu.each(
                "scaled",
                rows * n,
                &[P(self.s.teacher.ptr()), P(self.once.out.ptr()), F(1.0), I((rows * n) as i32)],
            )?;
        }
        let table = self.embedding.as_ref().expect("always there").w.ptr();
        embed(self.s.x.ptr(), table)?;
        for (l, layer) in self.layers.iter().enumerate() {
            let x = if l == 0 { self.s.x.ptr() } else { self.kept[l - 1].out.ptr() };
            let norms = layer.norms.each_ref().map(|b| b.as_ref().map(DeviceNorm::weight));
            let w = Weights { linears: &layer.linears, norms, rotates: layer.rotates };
            self.layer(gpu, &w, x, &self.kept[l], rows)?;
        }
        Ok(())
    }

    fn rms_norm(&self, gpu: &Cuda, out: Ptr, x: Ptr, w: Ptr, (rows, n): (usize, usize)) -> Result<(), TuningError> {
        gpu.run("rms_norm", rows, (256, 1), &[P(out), P(0), P(x), P(w), I(n as i32), F(self.spec.rms_eps)])
    }

    fn rotate(&self, gpu: &Cuda, x: Ptr, heads: usize, rows: usize, sign: f32) -> Result<(), TuningError> {
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

    /// A layer of either model: from `x` to `k.out`.
    fn layer(&self, gpu: &Cuda, w: &Weights<'_>, x: Ptr, k: &Kept, rows: usize) -> Result<(), TuningError> {
        let spec = &self.spec;
        let (n, hd) = (spec.embed, spec.head_dim);
        let of = |s: Slot| &w.linears[s as usize];
        let norm = |n: Norm| w.norms[n as usize];
        let input = self.input(gpu, x, norm(Norm::Attention), rows)?;
        for (slot, which, raw, out, heads) in
            [(Slot::Q, Norm::Q, &k.raw_q, &k.q, spec.heads), (Slot::K, Norm::K, &k.raw_k, &k.k, spec.kv_heads)]
        {
            match norm(which) {
                Some(weight) => {
                    of(slot).forward(gpu, raw.ptr(), input, rows)?;
                    self.rms_norm(gpu, out.ptr(), raw.ptr(), weight, (rows * heads, hd))?;
                }
                None => of(slot).forward(gpu, out.ptr(), input, rows)?,
            }
            if w.rotates {
                self.rotate(gpu, out.ptr(), heads, rows, 1.0)?;
            }
        }
        of(Slot::V).forward(gpu, k.v.ptr(), input, rows)?;
        self.attend(gpu, k, rows)?;
        of(Slot::O).forward(gpu, self.s.branch.ptr(), k.attended.ptr(), rows)?;
        let count = (rows * n) as i32;
        gpu.each("scaled", rows * n, &[P(k.middle.ptr()), P(x), F(1.0), I(count)])?;
        let branch = [P(k.middle.ptr()), P(self.s.branch.ptr()), F(spec.residual_scale), I(count)];
        gpu.each("add", rows * n, &branch)?;
        let input = self.input(gpu, k.middle.ptr(), norm(Norm::FeedForward), rows)?;
        of(Slot::Gate).forward(gpu, k.gate.ptr(), input, rows)?;
        of(Slot::Up).forward(gpu, k.up.ptr(), input, rows)?;
        self.activate(gpu, k, rows * of(Slot::Gate).rows)?;
        of(Slot::Down).forward(gpu, self.s.branch.ptr(), self.s.hidden.ptr(), rows)?;
        gpu.each("scaled", rows * n, &[P(k.out.ptr()), P(k.middle.ptr()), F(1.0), I(count)])?;
        let branch = [P(k.out.ptr()), P(self.s.branch.ptr()), F(spec.residual_scale), I(count)];
        gpu.each("add", rows * n, &branch)
    }

    /// The normed input of a branch.
    fn input(&self, gpu: &Cuda, x: Ptr, norm: Option<Ptr>, rows: usize) -> Result<Ptr, TuningError> {
        match norm {
            Some(w) => {
                self.rms_norm(gpu, self.s.normed.ptr(), x, w, (rows, self.spec.embed))?;
                Ok(self.s.normed.ptr())
            }
            None => Ok(x),
        }
    }

    fn activate(&self, gpu: &Cuda, k: &Kept, count: usize) -> Result<(), TuningError> {
        let args = [P(self.s.hidden.ptr()), P(k.gate.ptr()), P(k.up.ptr()), I(count as i32)];
        gpu.each("silu_mul", count, &args)
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

    fn attend(&self, gpu: &Cuda, k: &Kept, rows: usize) -> Result<(), TuningError> {
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
    fn attend_back(&self, gpu: &Cuda, k: &Kept, rows: usize) -> Result<(), TuningError> {
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

    /// Leads back through a norm of rows of `columns`, adding to `dx` or not, and steps its weight.
    #[allow(clippy::too_many_arguments)]
    fn norm_back(
        &self,
        gpu: &Cuda,
        norm: &DeviceNorm,
        dx: Ptr,
        x: Ptr,
        dy: Ptr,
        (rows, columns): (usize, usize),
        add: bool,
        adam: AdamArg,
    ) -> Result<(), TuningError> {
        let (n, inverse) = (I(columns as i32), self.s.inverse.ptr());
        let args = [P(dx), P(inverse), P(x), P(norm.weight()), P(dy), n, F(self.spec.rms_eps), I(i32::from(add))];
        gpu.run("rms_norm_back", rows, (256, 1), &args)?;
        let args = [P(norm.gradient.ptr()), P(x), P(dy), P(inverse), I(rows as i32), n];
        gpu.run("norm_gradient", columns.div_ceil(32), (32, 8), &args)?;
        norm.step(gpu, adam)
    }

    /// `s.d`, the gradient at the output of layer `l`, becomes that at its input `x`; steps of all that it has.
    fn layer_back(&self, gpu: &Cuda, l: usize, x: Ptr, rows: usize, adam: AdamArg) -> Result<(), TuningError> {
        let (spec, layer, k, s) = (&self.spec, &self.layers[l], &self.kept[l], &self.s);
        let n = spec.embed;
        let count = I((rows * n) as i32);
        let (d, d_branch, d_input, g) = (s.d.ptr(), s.d_branch.ptr(), s.d_input.ptr(), s.gradient.ptr());
        let (gate, up, down) = (layer.of(Slot::Gate), layer.of(Slot::Up), layer.of(Slot::Down));
        // feed-forward
        gpu.each("scaled", rows * n, &[P(d_branch), P(d), F(spec.residual_scale), count])?;
        self.activate(gpu, k, rows * gate.rows)?;
        down.back(gpu, s.d_wide.ptr(), d_branch, rows, 0.0)?;
        down.step(gpu, g, s.hidden.ptr(), d_branch, rows, adam)?;
        let wide = rows * gate.rows;
        gpu.each("silu_mul_back", wide, &[P(k.gate.ptr()), P(k.up.ptr()), P(s.d_wide.ptr()), I(wide as i32)])?;
        gate.back(gpu, d_input, k.gate.ptr(), rows, 0.0)?;
        up.back(gpu, d_input, k.up.ptr(), rows, 1.0)?;
        let input = self.input(gpu, k.middle.ptr(), layer.norm(Norm::FeedForward), rows)?;
        gate.step(gpu, g, input, k.gate.ptr(), rows, adam)?;
        up.step(gpu, g, input, k.up.ptr(), rows, adam)?;
        match &layer.norms[Norm::FeedForward as usize] {
            Some(norm) => self.norm_back(gpu, norm, d, k.middle.ptr(), d_input, (rows, n), true, adam)?,
            None => gpu.each("add", rows * n, &[P(d), P(d_input), F(1.0), count])?,
        }
        // attention
        let (q, key, v, o) = (layer.of(Slot::Q), layer.of(Slot::K), layer.of(Slot::V), layer.of(Slot::O));
        gpu.each("scaled", rows * n, &[P(d_branch), P(d), F(spec.residual_scale), count])?;
        o.back(gpu, s.d_wide.ptr(), d_branch, rows, 0.0)?;
        o.step(gpu, g, k.attended.ptr(), d_branch, rows, adam)?;
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
                self.norm_back(gpu, norm, to, raw.ptr(), gradients[i], (rows * heads, spec.head_dim), false, adam)?;
                gradients[i] = to;
            }
        }
        let [d_q, d_k] = gradients;
        let d_v = s.d_v.ptr();
        q.back(gpu, d_input, d_q, rows, 0.0)?;
        key.back(gpu, d_input, d_k, rows, 1.0)?;
        v.back(gpu, d_input, d_v, rows, 1.0)?;
        let input = self.input(gpu, x, layer.norm(Norm::Attention), rows)?;
        q.step(gpu, g, input, d_q, rows, adam)?;
        key.step(gpu, g, input, d_k, rows, adam)?;
        v.step(gpu, g, input, d_v, rows, adam)?;
        match &layer.norms[Norm::Attention as usize] {
            Some(norm) => self.norm_back(gpu, norm, d, x, d_input, (rows, n), true, adam),
            None => gpu.each("add", rows * n, &[P(d), P(d_input), F(1.0), count]),
        }
    }

    /// Σ KL; with `adam` the gradient at the last stream in `s.d`, and a step of head and norm.
    fn head(&self, gpu: &Cuda, rows: usize, adam: Option<AdamArg>) -> Result<f64, TuningError> {
        let (spec, s) = (&self.spec, &self.s);
        let (n, vocab) = (spec.embed, self.vocab);
        let head = self.output.as_ref().or(self.embedding.as_ref()).expect("always there");
        let float = self.float_output.as_ref().unwrap_or(&self.float_embedding);
        let last = self.kept.last().map_or(s.x.ptr(), |k| k.out.ptr());
        let gradient = self.output_gradient.as_ref().unwrap_or(&self.embedding_gradient);
        let weight = if adam.is_some() { 1.0 / rows as f32 } else { 0.0 };
        self.rms_norm(gpu, s.normed.ptr(), last, self.norm.weight(), (rows, n))?;
        self.rms_norm(gpu, s.branch.ptr(), s.teacher.ptr(), self.float_norm.ptr(), (rows, n))?;
        for from in (0..rows).step_by(ROWS) {
            let here = ROWS.min(rows - from);
            let (x, y) = (at(s.normed.ptr(), from * n), at(s.branch.ptr(), from * n));
            gpu.product(s.logits.ptr(), x, head.w.ptr(), (here, vocab, n))?;
            gpu.product(s.wanted.ptr(), y, float.ptr(), (here, vocab, n))?;
            let args = [
                P(at(s.sums.ptr(), 2 * from)),
                P(s.logits.ptr()),
                P(s.wanted.ptr()),
                I(vocab as i32),
                F(spec.logit_scale),
                F(weight),
            ];
            gpu.run("divergence", here, (512, 1), &args)?;
            if adam.is_some() {
                gpu.product_back(at(s.d_input.ptr(), from * n), s.logits.ptr(), head.w.ptr(), (here, n, vocab), 0.0)?;
                if head.blocks.is_some() {
                    gpu.cross(gradient.ptr(), s.logits.ptr(), x, (vocab, n, here), 1.0)?;
                }
            }
        }
        if let Some(adam) = adam {
            self.norm_back(gpu, &self.norm, s.d.ptr(), last, s.d_input.ptr(), (rows, n), false, adam)?;
            if let (Some(output), Some(g)) = (&self.output, &self.output_gradient)
                && let Some(b) = &output.blocks
            {
                b.step(gpu, g.ptr(), output.w.ptr(), adam)?;
                gpu.each("fill", vocab * n, &[P(g.ptr()), F(0.0), I((vocab * n) as i32)])?;
            }
        }
        Ok(gpu.read_f64(&s.sums, rows)?.iter().sum())
    }
}
