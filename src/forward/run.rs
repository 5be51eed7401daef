//! Running a model over windows of text: hidden states of all windows in memory or in a scratch file, one layer of weights
//! at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::gemm::product;
use super::layer::{Pass, Scratch};
use super::rope::RopeTable;
use super::rounding::{Activations, Rounding};
use super::{ForwardError, Model, Observer, interrupted, kernels};

/// Values that one thread reads or writes at a time.
const PIECE: usize = 1 << 19;

/// The residual stream of every token, `[tokens, embed]`.
pub enum Hidden {
    Memory(Vec<f32>),
    /// In a file, native byte order.
    File {
        file: File,
        path: PathBuf,
    },
}

impl Hidden {
    /// In a file at `path`, created or opened, `bytes` long.
    pub fn in_file(path: &Path, bytes: u64) -> Result<Hidden, ForwardError> {
        let io = |source| ForwardError::Io { file: path.to_path_buf(), source };
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        file.set_len(bytes).map_err(io)?;
        Ok(Hidden::File { file, path: path.to_path_buf() })
    }

    /// In a new file of folder `dir` that has no name: it is gone with the process.
    pub fn scratch(dir: &Path, number: usize, bytes: u64) -> Result<Hidden, ForwardError> {
        let path = dir.join(format!(".ostq-{}-{number}.f32", std::process::id()));
        let hidden = Hidden::in_file(&path, bytes)?;
        let _ = std::fs::remove_file(&path);
        Ok(hidden)
    }

    /// Values from `at` on.
    pub fn read(&self, at: usize, out: &mut [f32]) -> Result<(), ForwardError> {
        out.par_chunks_mut(PIECE).enumerate().try_for_each(|(i, out)| {
            let at = at + i * PIECE;
            match self {
                Hidden::Memory(v) => out.copy_from_slice(&v[at..at + out.len()]),
                Hidden::File { file, path } => file
                    .read_exact_at(bytemuck::cast_slice_mut(out), at as u64 * 4)
                    .map_err(|source| ForwardError::Io { file: path.clone(), source })?,
            }
            Ok(())
        })
    }

    /// `count` values from `at` on: themselves if they are in memory, otherwise read into `buffer`.
    pub fn part<'a>(&'a self, at: usize, count: usize, buffer: &'a mut Vec<f32>) -> Result<&'a [f32], ForwardError> {
        if let Hidden::Memory(v) = self {
            return Ok(&v[at..at + count]);
        }
        buffer.resize(count, 0.0);
        self.read(at, buffer)?;
        Ok(buffer)
    }

    /// Copies the first `values` values of `other`.
    pub fn copy(&mut self, other: &Hidden, values: usize) -> Result<(), ForwardError> {
        let mut buffer = Vec::new();
        for at in (0..values).step_by(16 * PIECE) {
            self.write(at, other.part(at, (16 * PIECE).min(values - at), &mut buffer)?)?;
        }
        Ok(())
    }

    /// A checksum of the first `values` values, in hexadecimal: against accidents, not against intent.
    pub fn digest(&self, values: usize) -> Result<String, ForwardError> {
        let piece = |i: usize| {
            let at = i * PIECE;
            let mut x = vec![0.0; PIECE.min(values - at)];
            self.read(at, &mut x)?;
            Ok::<u64, ForwardError>(kernels::checksum(&x).wrapping_mul(2 * i as u64 + 1))
        };
        let parts = (0..values.div_ceil(PIECE)).into_par_iter().map(piece).collect::<Result<Vec<_>, _>>()?;
        Ok(format!("{:016x}", parts.iter().fold(0u64, |all, p| all.wrapping_add(*p))))
    }

    /// Overwrites values from `at` on.
    pub fn write(&mut self, at: usize, values: &[f32]) -> Result<(), ForwardError> {
        match self {
            Hidden::Memory(v) => {
                let into = v[at..at + values.len()].par_chunks_mut(PIECE / 8);
                into.zip(values.par_chunks(PIECE / 8)).for_each(|(o, v)| o.copy_from_slice(v));
            }
            // one thread: a file takes one write at a time
            Hidden::File { file, path } => file
                .write_all_at(bytemuck::cast_slice(values), at as u64 * 4)
                .map_err(|source| ForwardError::Io { file: path.clone(), source })?,
        }
        Ok(())
    }
}

/// A model set up for windows of one length.
pub struct Runner<'a> {
    pub model: &'a Model<'a>,
    activations: Activations,
    /// Tokens of a window.
    pub length: usize,
    rope: RopeTable,
    window_rope: RopeTable,
    scratch: Scratch,
}

impl<'a> Runner<'a> {
    /// `length`: tokens of a window.
    pub fn new(model: &'a Model<'a>, length: usize, activations: Activations) -> Result<Runner<'a>, ForwardError> {
        let (rope, window_rope) = model.rope_tables(length)?;
        Ok(Runner { model, activations, length, rope, window_rope, scratch: Scratch::default() })
    }

    /// Bytes that a batch of `tokens` needs beside the weights: the stream and every buffer of [`Scratch`].
    pub fn batch_bytes(model: &Model<'_>, tokens: usize) -> u64 {
        let s = &model.spec;
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let ff = model.feed_forward();
        let rounded = q.max(ff).max(s.embed);
        (3 * s.embed + 2 * q + 2 * kv + 2 * ff + rounded) as u64 * 4 * tokens as u64
    }

    /// Lends what steps of a layer need.
    pub fn pass<R>(&mut self, step: impl FnOnce(&Pass<'_>, &mut Scratch) -> R) -> R {
        let pass = Pass {
            model: self.model,
            rope: &self.rope,
            window_rope: &self.window_rope,
            activations: self.activations,
            length: self.length,
        };
        step(&pass, &mut self.scratch)
    }

    /// Embeds all `tokens` into `hidden`.
    pub fn embed(&mut self, tokens: &[u32], hidden: &mut Hidden) -> Result<(), ForwardError> {
        let n = self.model.spec.embed;
        let mut rows = Vec::new();
        for (i, tokens) in tokens.chunks(4096).enumerate() {
            rows.resize(tokens.len() * n, 0.0);
            self.model.embed(tokens, &mut rows)?;
            hidden.write(i * 4096 * n, &rows)?;
        }
        Ok(())
    }

    /// Runs layer `l` over `tokens` tokens of `from` into `to`, `batch` windows at a time.
    pub fn layer(
        &mut self,
        l: usize,
        from: &Hidden,
        to: &mut Hidden,
        tokens: usize,
        batch: usize,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        self.each(l, tokens, batch, observer, |at, x| from.read(at, x), |at, x| to.write(at, x))
    }

    /// The same in place.
    pub fn layer_in_place(
        &mut self,
        l: usize,
        hidden: &mut Hidden,
        tokens: usize,
        batch: usize,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let cell = std::cell::RefCell::new(hidden);
        self.each(l, tokens, batch, observer, |at, x| cell.borrow().read(at, x), |at, x| cell.borrow_mut().write(at, x))
    }

    fn each(
        &mut self,
        l: usize,
        tokens: usize,
        batch: usize,
        observer: &mut dyn Observer,
        read: impl Fn(usize, &mut [f32]) -> Result<(), ForwardError>,
        mut write: impl FnMut(usize, &[f32]) -> Result<(), ForwardError>,
    ) -> Result<(), ForwardError> {
        let layer = self.model.layer(l, self.activations)?;
        let n = self.model.spec.embed;
        let step = batch.max(1) * self.length;
        let mut x = Vec::new();
        for at in (0..tokens).step_by(step) {
            interrupted()?;
            let here = step.min(tokens - at);
            x.resize(here * n, 0.0);
            read(at * n, &mut x)?;
            self.pass(|pass, scratch| layer.run(pass, &mut x, scratch, observer))?;
            if !kernels::all_finite(&x) {
                let i = x.iter().position(|v| !v.is_finite()).unwrap_or(0);
                let (token, column) = (at + i / n, i % n);
                return Err(ForwardError::NotFinite { layer: l, token, column, value: x[i] }.of(self.model.path()));
            }
            write(at * n, &x)?;
        }
        Ok(())
    }
}

/// The head, a part of its rows in memory at a time.
pub struct Head<'a> {
    model: &'a Model<'a>,
    norm: Vec<f32>,
    rounding: Rounding,
    /// Rows of the head as f32: all, or the part in work.
    rows: Vec<f32>,
    /// Rows that are kept.
    most: usize,
}

impl<'a> Head<'a> {
    /// `bytes`: what its rows may take in memory.
    pub fn new(model: &'a Model<'a>, activations: Activations, bytes: u64) -> Result<Head<'a>, ForwardError> {
        let most = (bytes / (model.spec.embed as u64 * 4)).clamp(1, model.vocab as u64) as usize;
        let rounding = Rounding::of(model.head_type(), activations);
        Ok(Head { model, norm: model.output_norm()?, rounding, rows: Vec::new(), most })
    }

    /// The final norm of rows of the stream, in place: what the head is multiplied with, shown to `observer`.
    pub fn input(&self, x: &mut [f32], observer: &mut dyn Observer) -> Result<(), ForwardError> {
        let n = self.model.spec.embed;
        x.par_chunks_mut(n).for_each_init(
            || vec![0.0; n],
            |out, row| {
                kernels::rms_norm(row, &self.norm, self.model.spec.rms_eps, out);
                row.copy_from_slice(out);
            },
        );
        observer.input(&[self.model.head_name()], None, x)
    }

    /// Logits `[rows, vocab]` of rows of the stream (`[rows, embed]`, changed). `observer` sees the head's input.
    pub fn logits(
        &mut self,
        x: &mut [f32],
        logits: &mut Vec<f32>,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let s = &self.model.spec;
        let (n, vocab) = (s.embed, self.model.vocab);
        let count = x.len() / n;
        self.input(x, observer)?;
        self.rounding.apply(x, n);
        logits.resize(count * vocab, 0.0);
        if self.most >= vocab {
            if self.rows.is_empty() {
                self.rows.resize(vocab * n, 0.0);
                self.model.head_rows(0, vocab, &mut self.rows)?;
            }
            product(x, &self.rows, n, logits);
        } else {
            let mut part = Vec::new();
            for from in (0..vocab).step_by(self.most) {
                let to = (from + self.most).min(vocab);
                self.rows.resize((to - from) * n, 0.0);
                self.model.head_rows(from, to, &mut self.rows)?;
                part.resize(count * (to - from), 0.0);
                product(x, &self.rows, n, &mut part);
                logits
                    .par_chunks_mut(vocab)
                    .zip(part.par_chunks(to - from))
                    .for_each(|(row, part)| row[from..to].copy_from_slice(part));
            }
        }
        if s.logit_scale != 1.0 || s.final_soft_cap.is_some() {
            logits.par_chunks_mut(vocab).for_each(|row| {
                if s.logit_scale != 1.0 {
                    kernels::scale(row, s.logit_scale);
                }
                if let Some(cap) = s.final_soft_cap {
                    kernels::soft_cap(row, cap);
                }
            });
        }
        Ok(())
    }
}
