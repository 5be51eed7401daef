//! What transforms learn of a model: rotations and scales, those that a start has.

use super::LearningError;
use super::manifold::{Rates, Rotation, Scales};
use crate::transform::{Anatomy, LayerTransforms, Pair, Transforms};

/// What of a layer learns.
#[derive(Clone, Debug, Default)]
pub struct LayerValues {
    /// Rotations of values, one for each KV head; none: not there.
    pub r_ov: Vec<Rotation>,
    pub s_attn: Option<Scales>,
    pub s_ffn: Option<Scales>,
    pub s_ov: Option<Scales>,
    pub s_qk: Option<Scales>,
    pub s_ud: Option<Scales>,
}

impl LayerValues {
    /// Its vectors of scales.
    pub fn all_scales(&mut self) -> impl Iterator<Item = &mut Scales> {
        [&mut self.s_attn, &mut self.s_ffn, &mut self.s_ov, &mut self.s_qk, &mut self.s_ud].into_iter().flatten()
    }

    /// Everything that a step depends on.
    pub fn state(&mut self) -> Vec<&mut Vec<f64>> {
        let LayerValues { r_ov, s_attn, s_ffn, s_ov, s_qk, s_ud } = self;
        let mut all: Vec<&mut Vec<f64>> = r_ov.iter_mut().flat_map(|r| r.state()).collect();
        all.extend([s_attn, s_ffn, s_ov, s_qk, s_ud].into_iter().flatten().flat_map(|s| s.state()));
        all
    }
}

/// What of a model learns.
#[derive(Clone, Debug, Default)]
pub struct Values {
    pub r_res: Option<Rotation>,
    pub layers: Vec<LayerValues>,
}

/// The scales of a pair.
pub fn scales(l: &LayerValues, pair: Pair) -> &Option<Scales> {
    match pair {
        Pair::Attention => &l.s_attn,
        Pair::FeedForward => &l.s_ffn,
        Pair::ValueScales => &l.s_ov,
        Pair::QueryKey => &l.s_qk,
        Pair::UpDown => &l.s_ud,
        Pair::Stream | Pair::Values => &None,
    }
}

/// The same, to write.
pub fn scales_mut(l: &mut LayerValues, pair: Pair) -> Option<&mut Scales> {
    match pair {
        Pair::Attention => l.s_attn.as_mut(),
        Pair::FeedForward => l.s_ffn.as_mut(),
        Pair::ValueScales => l.s_ov.as_mut(),
        Pair::QueryKey => l.s_qk.as_mut(),
        Pair::UpDown => l.s_ud.as_mut(),
        Pair::Stream | Pair::Values => None,
    }
}

/// The pairs of scales.
pub const SCALES: [Pair; 5] = [Pair::Attention, Pair::FeedForward, Pair::ValueScales, Pair::QueryKey, Pair::UpDown];

impl Values {
    /// Those of `start`, whose other pairs stay away.
    pub fn new(start: &Transforms, anatomy: &Anatomy) -> Values {
        let s = &anatomy.spec;
        let head = s.head_dim;
        let layer = |l: &LayerTransforms| LayerValues {
            r_ov: l
                .r_ov
                .iter()
                .flat_map(|r| r.chunks_exact(head * head))
                .map(|r| Rotation::new(r.to_vec(), head))
                .collect(),
            s_attn: l.s_attn.as_deref().map(Scales::new),
            s_ffn: l.s_ffn.as_deref().map(Scales::new),
            s_ov: l.s_ov.as_deref().map(Scales::new),
            s_qk: l.s_qk.as_deref().map(Scales::new),
            s_ud: l.s_ud.as_deref().map(Scales::new),
        };
        Values {
            r_res: start.r_res.clone().map(|r| Rotation::new(r, s.embed)),
            layers: start.layers.iter().map(layer).collect(),
        }
    }

    /// As transforms.
    pub fn transforms(&self, name: &str) -> Transforms {
        let layer = |l: &LayerValues| {
            let of = |s: &Option<Scales>| s.as_ref().map(Scales::values);
            LayerTransforms {
                r_ov: (!l.r_ov.is_empty()).then(|| l.r_ov.iter().flat_map(|r| r.values.iter().copied()).collect()),
                s_attn: of(&l.s_attn),
                s_ffn: of(&l.s_ffn),
                s_ov: of(&l.s_ov),
                s_qk: of(&l.s_qk),
                s_ud: of(&l.s_ud),
            }
        };
        Transforms {
            name: name.into(),
            r_res: self.r_res.as_ref().map(|r| r.values.clone()),
            layers: self.layers.iter().map(layer).collect(),
        }
    }

    /// Everything that a step depends on; call [`Values::refresh`] after writing to it.
    pub fn state(&mut self) -> Vec<&mut Vec<f64>> {
        let mut all: Vec<&mut Vec<f64>> = self.r_res.iter_mut().flat_map(|r| r.state()).collect();
        self.layers.iter_mut().for_each(|l| all.extend(l.state()));
        all
    }

    /// Moves rotations and scales against the gradients that were added up.
    pub fn step(&mut self, rates: &Rates) -> Result<(), LearningError> {
        self.rotations().try_for_each(|r| r.step(rates))?;
        self.all_scales().for_each(|s| s.step(rates));
        Ok(())
    }

    /// Takes up what was written to [`Values::state`].
    pub fn refresh(&mut self) {
        self.rotations().for_each(Rotation::refresh);
        self.all_scales().for_each(Scales::refresh);
    }

    /// Every rotation.
    pub fn rotations(&mut self) -> impl Iterator<Item = &mut Rotation> {
        self.r_res.iter_mut().chain(self.layers.iter_mut().flat_map(|l| &mut l.r_ov))
    }

    /// Every vector of scales.
    pub fn all_scales(&mut self) -> impl Iterator<Item = &mut Scales> {
        self.layers.iter_mut().flat_map(LayerValues::all_scales)
    }
}
