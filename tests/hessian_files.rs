//! Files of second moments: what is written is read, and files that are damaged, of another kind or of another model are
//! refused by name.

mod common;

use std::path::{Path, PathBuf};

use common::program::{Checkpoint, convert, fixture};
use ostq_convert::calibration::collector::{Collector, WeightSpec};
use ostq_convert::calibration::fingerprint::fingerprint;
use ostq_convert::calibration::hessian_file::{HessianFile, Origin};
use ostq_convert::calibration::hessian_write::{HessianSpec, HessianWriter};
use ostq_convert::calibration::moments::Moments;
use ostq_convert::gguf;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::source::GgufSource;

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A dense weight, one with the same input, a stacked one whose last expert saw nothing.
fn collected() -> Collector {
    let spec = |name: &str, columns, experts, same_as: Option<&str>| WeightSpec {
        name: name.into(),
        columns,
        experts,
        second: true,
        same_as: same_as.map(str::to_string),
    };
    let mut c = Collector::new(vec![
        spec("blk.0.attn_q.weight", 40, None, None),
        spec("blk.0.attn_k.weight", 40, None, Some("blk.0.attn_q.weight")),
        spec("blk.0.ffn_up_exps.weight", 17, Some(3), None),
    ])
    .unwrap();
    c.add("blk.0.attn_q.weight", None, &values(40 * 90, 1), 90).unwrap();
    c.add("blk.0.attn_k.weight", None, &values(40 * 90, 1), 90).unwrap();
    c.add("blk.0.ffn_up_exps.weight", Some(0), &values(17 * 60, 2), 60).unwrap();
    c.add("blk.0.ffn_up_exps.weight", Some(1), &values(17 * 5, 3), 5).unwrap();
    c.check_shared().unwrap();
    c
}

fn origin() -> Origin {
    Origin { fingerprint: "ab".repeat(32), tokens: 90, texts: vec![("prose.txt".into(), "cd".repeat(32))] }
}

fn write(path: &Path) -> Collector {
    let c = collected();
    let mut out = HessianWriter::create(path, c.weights().map(HessianSpec::from).collect(), &origin(), true).unwrap();
    // in any order
    for name in ["blk.0.ffn_up_exps.weight", "blk.0.attn_q.weight"] {
        out.put(name, c.moments(name).unwrap()).unwrap();
    }
    let size = out.file_size();
    out.finish().unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().len(), size);
    c
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("h.gguf");
    let c = write(&path);
    let file = HessianFile::open(&path).unwrap();
    assert_eq!(file.origin, origin());
    assert_eq!(file.names(), ["blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"]);
    for name in ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_up_exps.weight"] {
        let (moments, entry) = (c.moments(name).unwrap(), file.entry(name).unwrap());
        assert_eq!(entry.counts, moments.iter().map(|m| m.count()).collect::<Vec<_>>());
        assert_eq!(entry.experts.is_some(), name.contains("exps"));
        for (e, m) in moments.iter().enumerate() {
            let n = entry.columns;
            let exact: Vec<f32> = m.second().unwrap().iter().map(|v| *v as f32).collect();
            assert_eq!(file.lower(name, e).unwrap(), exact);
            let full = file.matrix(name, e).unwrap();
            for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let (a, b) = (i.max(j), i.min(j));
                assert_eq!(full[i * n + j], f64::from(exact[a * (a + 1) / 2 + b]));
            }
            let sum = file.sum(name, e).unwrap();
            assert_eq!(sum, m.sum().iter().map(|v| f64::from(*v as f32)).collect::<Vec<_>>());
        }
    }
    file.check_model(&"ab".repeat(32)).unwrap();
    let error = file.check_model("00").unwrap_err().to_string();
    assert!(error.contains("h.gguf: was made from another model") && error.contains("this model has 00"), "{error}");
    let error = file.lower("blk.0.ffn_up_exps.weight", 3).unwrap_err().to_string();
    assert!(error.contains("`blk.0.ffn_up_exps.weight`: expert 3 is asked for, there are 3"), "{error}");
    assert!(file.matrix("blk.1.attn_q.weight", 0).unwrap_err().to_string().contains("no second moment"));
}

#[test]
fn an_unfinished_file_leaves_nothing_and_faults_name_the_weight() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("h.gguf");
    let c = collected();
    let specs = || c.weights().map(HessianSpec::from).collect::<Vec<_>>();
    let create = |specs| HessianWriter::create(&path, specs, &origin(), false);
    let mut out = create(specs()).unwrap();
    let says = |error: ostq_convert::calibration::CalibrationError, text: &str| {
        let error = error.to_string();
        assert!(error.contains(text) && error.contains("h.gguf"), "{error}");
    };
    let q = c.moments("blk.0.attn_q.weight").unwrap();
    says(out.put("blk.9.x", q).unwrap_err(), "`blk.9.x`: is not one of the weights");
    says(out.put("blk.0.attn_k.weight", q).unwrap_err(), "has the sums of `blk.0.attn_q.weight`");
    says(out.put("blk.0.ffn_up_exps.weight", q).unwrap_err(), "1 sums for 3 experts");
    let other = Collector::new(vec![WeightSpec { columns: 41, same_as: None, ..c.weights().next().unwrap().clone() }]);
    let other = other.unwrap();
    let wrong = other.moments("blk.0.attn_q.weight").unwrap();
    says(out.put("blk.0.attn_q.weight", wrong).unwrap_err(), "41 columns for 40");
    out.put("blk.0.attn_q.weight", q).unwrap();
    says(out.finish().unwrap_err(), "`blk.0.ffn_up_exps.weight`: was never written");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let mut twice = specs();
    twice.push(twice[0].clone());
    says(create(twice).unwrap_err(), "appears twice");
    let mut lost = specs();
    lost.remove(0);
    says(create(lost).unwrap_err(), "`blk.0.attn_q.weight`, which is no such weight before it");
    let mut long = specs();
    long[2].name = "x".repeat(60);
    says(create(long).unwrap_err(), "at most 63");
}

/// Activations whose squares are too small for f32, as closed gates leave them, are no damage.
#[test]
fn squares_that_vanish_are_not_taken_for_damage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("h.gguf");
    let mut m = Moments::new(3, true).unwrap();
    m.add(&[1e-25, 1.0, 0.0, 2e-25, 0.5, 0.0], 2).unwrap();
    let spec = HessianSpec { name: "w".into(), columns: 3, experts: None, same_as: None };
    let mut out = HessianWriter::create(&path, vec![spec], &origin(), false).unwrap();
    out.put("w", &[m]).unwrap();
    out.finish().unwrap();
    let h = HessianFile::open(&path).unwrap().lower("w", 0).unwrap();
    assert_eq!((h[0], h[2]), (0.0, 1.25));
    assert!((h[1] / 2e-25 - 1.0).abs() < 1e-6, "{h:?}");
}

/// Overwrites bytes of the good file and opens it.
struct Damaged {
    dir: tempfile::TempDir,
    good: Vec<u8>,
    header: gguf::Header,
}

impl Damaged {
    fn new() -> Damaged {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("h.gguf");
        write(&path);
        let good = std::fs::read(&path).unwrap();
        let header = gguf::read(&good).unwrap();
        Damaged { dir, good, header }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("h.gguf")
    }

    fn open(&self, bytes: &[u8]) -> Result<HessianFile, String> {
        std::fs::write(self.path(), bytes).unwrap();
        HessianFile::open(&self.path()).map_err(|e| e.to_string())
    }

    /// With f32 `value` as element `at` of `tensor`.
    fn with(&self, tensor: &str, at: usize, value: f32) -> HessianFile {
        let mut bytes = self.good.clone();
        let place = self.header.tensor(tensor).unwrap().offset as usize + 4 * at;
        bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
        self.open(&bytes).unwrap()
    }

    /// Rewritten with other keys and tensors; data is zero.
    fn rebuilt(
        &self,
        change: impl FnOnce(&mut gguf::Metadata, &mut Vec<gguf::TensorSpec>),
    ) -> Result<HessianFile, String> {
        let mut keys = self.header.metadata.clone();
        let spec = |t: &gguf::TensorInfo| gguf::TensorSpec { name: t.name.clone(), dims: t.dims.clone(), ty: t.ty };
        let mut tensors = self.header.tensors.iter().map(spec).collect();
        change(&mut keys, &mut tensors);
        let layout = gguf::layout(&keys, &tensors, false).unwrap();
        let mut bytes = layout.header;
        bytes.resize(layout.file_size as usize, 0);
        self.open(&bytes)
    }
}

#[test]
fn damaged_values_are_named() {
    let d = Damaged::new();
    let q = "blk.0.attn_q.weight";
    let says = |file: HessianFile, weight: &str, expert: usize, text: &str| {
        let error = file.lower(weight, expert).unwrap_err().to_string();
        assert!(error.contains(text) && error.contains(weight) && error.contains("h.gguf"), "{error}");
    };
    let packed = |i: usize, j: usize| i * (i + 1) / 2 + j;
    let second = "blk.0.attn_q.weight.second";
    says(d.with(second, packed(3, 1), f32::NAN), q, 0, "is NaN at 3,1, more than its diagonal allows");
    says(d.with(second, packed(39, 39), f32::INFINITY), q, 0, "is inf at 39,39, no sum of squares");
    says(d.with(second, packed(2, 2), -1.0), q, 0, "is -1 at 2,2, no sum of squares");
    says(d.with(second, packed(8, 5), 90.0), q, 0, "is 90 at 8,5, more than its diagonal allows");
    let experts = "blk.0.ffn_up_exps.weight";
    let last = d.with("blk.0.ffn_up_exps.weight.second", 2 * 153, 1.0);
    says(last, experts, 2, "expert 2: the second moment is 1 at 0,0, without a token");
    let error = d.with("blk.0.ffn_up_exps.weight.in_sum", 17 + 4, f32::NAN).sum(experts, 1).unwrap_err().to_string();
    assert!(error.contains("expert 1: the sum of column 4 is NaN"), "{error}");
}

#[test]
fn files_that_do_not_fit_together_are_refused() {
    let d = Damaged::new();
    let fails = |result: Result<HessianFile, String>, text: &str| {
        let error = result.unwrap_err();
        assert!(error.contains(text) && error.contains("h.gguf"), "{error}");
    };
    assert!(d.open(&d.good).is_ok());
    fails(d.open(&d.good[..d.good.len() - 40]), "truncated?");
    fails(d.open(&d.good[..100]), "at byte");
    fails(d.open(&std::fs::read(fixture("tiny.imatrix.gguf")).unwrap()), "not a file of second moments");
    let key = |name: &'static str, value: gguf::Value| d.rebuilt(move |keys, _| gguf::value::set(keys, name, value));
    fails(key("ostq.hessian.version", gguf::Value::U32(2)), "this program reads 1");
    fails(key("ostq.hessian.tokens", gguf::Value::U32(2)), "`ostq.hessian.tokens`: is missing or no u64");
    fails(key("ostq.hessian.fingerprint", gguf::Value::U32(2)), "`ostq.hessian.fingerprint`");
    fails(key("ostq.hessian.texts", gguf::Value::strs([""; 0])), "has 1 entries, `ostq.hessian.texts` has 0");
    fails(key("ostq.hessian.shared.with", gguf::Value::strs(["blk.7"])), "share the sums of `blk.7`");
    let tensors = |change: fn(&mut Vec<gguf::TensorSpec>)| d.rebuilt(|_, tensors| change(tensors));
    fails(tensors(|t| t[0].dims[0] -= 1), "dimensions do not fit together");
    fails(tensors(|t| t[3].dims = vec![153]), "dimensions do not fit together");
    fails(tensors(|t| t[2].dims[0] = 41), "dimensions do not fit together");
    fails(tensors(|t| t[2].dims = vec![]), "dimensions do not fit together");
    fails(tensors(|t| t[1].ty = gguf::GgmlType::F64), "counts` is f64, not i64");
    fails(tensors(|t| drop(t.remove(1))), "counts` is missing");
    fails(tensors(|t| t[0].name = "blk.0.attn_q.weight.third".into()), "does not belong to any");
    fails(tensors(|t| t.iter_mut().skip(3).for_each(|t| t.dims[1] = 0)), "dimensions do not fit together");
    let mut negative = d.good.clone();
    let place = d.header.tensor("blk.0.attn_q.weight.counts").unwrap().offset as usize;
    negative[place..place + 8].copy_from_slice(&(-3i64).to_le_bytes());
    fails(d.open(&negative), "a count is -3");
}

/// The fingerprint of a checkpoint and of the files made from it.
#[test]
fn a_fingerprint_is_that_of_the_weights_not_of_their_file() {
    let dir = tempfile::tempdir().unwrap();
    let of_folder = |path: &Path| {
        let input = Input::open(path, &Options::resolve(Recipe::default()).unwrap()).unwrap();
        fingerprint(input.source.as_ref())
    };
    let of_gguf = |flags: &str| {
        let path = dir.path().join("out.gguf");
        convert(&fixture("tiny"), &path, &format!("{flags} --force --quiet")).exits(0);
        fingerprint(&GgufSource::open(&path).unwrap())
    };
    let tiny = of_folder(&fixture("tiny"));
    assert_eq!(tiny.len(), 64);
    assert_eq!(of_gguf("--outtype f32"), tiny);
    assert_eq!(of_gguf("--outtype bf16"), tiny);
    assert_ne!(of_gguf("--type q8_0"), tiny);
    let changed = Checkpoint::new();
    // bf16 -1.5 as the first weight of a projection
    changed.edit_tensor("model.layers.0.mlp.down_proj.weight", |t| t.data[..2].copy_from_slice(&[0xc0, 0xbf]));
    assert_ne!(of_folder(changed.path()), tiny);
}
