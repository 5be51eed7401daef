//! Importance matrices that we write, next to those of llama.cpp's own tool: the same bytes, added up, as GGUF and as `.dat`,
//! and taken by its quantizer. One file of that tool is in the clone (`fixtures/make-imatrix.py`), more are in the shared
//! folder, programs in `OSTQ_PEERS`; without these the tests do less and say so on stderr.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::program::{convert, fixture};
use common::{peer, shared};
use ostq_convert::calibration::collector::{Collector, WeightSpec};
use ostq_convert::calibration::imatrix::Imatrix;
use ostq_convert::calibration::imatrix_sums::ImatrixSums;
use ostq_convert::calibration::imatrix_write::{Format, write};
use ostq_convert::gguf;

/// Files of llama-imatrix: the one of the clone, and those of the shared folder.
fn goldens() -> Vec<PathBuf> {
    let mut all = vec![fixture("experts.imatrix.gguf")];
    if let Some(shared) = shared() {
        all.extend(std::fs::read_dir(shared.join("goldens/imatrix")).unwrap().map(|e| e.unwrap().path()));
        all.sort();
    }
    all
}

/// Runs a program of llama.cpp that must end well.
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    output
}

/// llama-imatrix without a model: it combines files or shows what is in one.
fn imatrix(tool: &Path, inputs: &[&Path], flags: &[&str]) -> Output {
    let mut command = Command::new(tool);
    command.args(["-m", "none"]).args(flags);
    for input in inputs {
        command.arg("--in-file").arg(input);
    }
    run(&mut command)
}

/// The sums of `inputs` added up by us, written.
fn combine(inputs: &[&Path], out: &Path, format: Format) {
    let mut all = ImatrixSums::default();
    for input in inputs {
        all.add(ImatrixSums::load(input).unwrap()).unwrap();
    }
    write(out, &all, format, true).unwrap();
}

#[track_caller]
fn assert_same_bytes(what: &str, ours: &Path, theirs: &Path) {
    let (ours, theirs) = (std::fs::read(ours).unwrap(), std::fs::read(theirs).unwrap());
    let first = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert_eq!((first, ours.len()), (None, theirs.len()), "{what}: first difference and length");
}

#[test]
fn what_llama_imatrix_wrote_is_written_again_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("ours.gguf");
    let goldens = goldens();
    for golden in &goldens {
        write(&ours, &ImatrixSums::load(golden).unwrap(), Format::Gguf, true).unwrap();
        assert_same_bytes(&golden.display().to_string(), &ours, golden);
    }
    eprintln!("{} files of llama-imatrix written again", goldens.len());
}

/// This fixture has neither Σx nor statistics, and trailing dimensions of 1: what it has comes out as it was.
#[test]
fn a_file_without_statistics_keeps_its_sums() {
    let dir = tempfile::tempdir().unwrap();
    let (golden, ours) = (fixture("tiny.imatrix.gguf"), dir.path().join("ours.gguf"));
    let before = ImatrixSums::load(&golden).unwrap();
    write(&ours, &before, Format::Gguf, false).unwrap();
    assert_eq!(ImatrixSums::load(&ours).unwrap(), before);
    let (a, b) = (std::fs::read(&golden).unwrap(), std::fs::read(&ours).unwrap());
    let (a_header, b_header) = (gguf::read(&a).unwrap(), gguf::read(&b).unwrap());
    let extra = |name: &str| name.ends_with(".stats");
    let (mut kept, mut statistics) = (0, 0);
    for t in &b_header.tensors {
        let Some(old) = a_header.tensor(&t.name) else {
            assert!(extra(&t.name), "{}", t.name);
            statistics += 1;
            continue;
        };
        assert_eq!((&old.dims[..], old.ty), (&[t.dims[0], 1][..], t.ty), "{}", t.name);
        let data = |bytes: &[u8], t: &gguf::TensorInfo| bytes[t.offset as usize..][..t.bytes as usize].to_vec();
        assert_eq!(data(&a, old), data(&b, t), "{}", t.name);
        kept += 1;
    }
    assert_eq!((kept, statistics), (a_header.tensors.len(), before.entries.len()));
    assert_eq!(b_header.metadata[..a_header.metadata.len()], a_header.metadata);
}

#[test]
fn files_add_up_to_what_llama_imatrix_makes_of_them() {
    let Some(tool) = peer("llama-imatrix") else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (ours, theirs, dat) = (at("ours"), at("theirs"), at("legacy.dat"));
    for golden in goldens() {
        let name = golden.display().to_string();
        // of one file, of two, of a legacy file alone, before and after another
        imatrix(&tool, &[&golden], &["-o", dat.to_str().unwrap(), "--output-format", "dat"]);
        let cases: [&[&Path]; 5] = [&[&golden], &[&golden, &golden], &[&dat], &[&dat, &golden], &[&golden, &dat]];
        for inputs in cases {
            for (format, flag) in [(Format::Gguf, "gguf"), (Format::Dat, "dat")] {
                imatrix(&tool, inputs, &["-o", theirs.to_str().unwrap(), "--output-format", flag]);
                combine(inputs, &ours, format);
                assert_same_bytes(&format!("{name}: {inputs:?} as {flag}"), &ours, &theirs);
            }
        }
    }
}

#[test]
fn llama_imatrix_shows_the_statistics_of_our_file() {
    let Some(tool) = peer("llama-imatrix") else { return };
    let dir = tempfile::tempdir().unwrap();
    let show = |file: &Path| {
        let shown = String::from_utf8(imatrix(&tool, &[file], &["--show-statistics"]).stdout).unwrap();
        shown.replace(file.to_str().unwrap(), "FILE")
    };
    for golden in goldens() {
        let ours = dir.path().join("ours.gguf");
        combine(&[&golden], &ours, Format::Gguf);
        let shown = show(&ours);
        assert!(shown.contains("blk.0.attn_q") && shown.contains("layer statistics"), "{shown}");
        assert_eq!(shown, show(&golden));
    }
}

/// Sums of a pass of our own: llama-quantize and we make the same tensors of them, from either kind of file, and other
/// ones than without.
#[test]
fn llama_quantize_takes_what_we_collected() {
    let Some(quantize) = peer("llama-quantize") else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let sums = ImatrixSums::load(&fixture("tiny.imatrix.gguf")).unwrap();
    let spec = |(name, s): (&String, &_)| {
        let s: &ostq_convert::calibration::imatrix_sums::Sums = s;
        WeightSpec { name: name.clone(), columns: s.in_sum2.len(), experts: None, second: false, same_as: None }
    };
    let mut collector = Collector::new(sums.entries.iter().map(spec).collect()).unwrap();
    let specs: Vec<WeightSpec> = collector.weights().cloned().collect();
    for (i, w) in specs.iter().enumerate() {
        // columns of very different size, another order for each weight
        let value = |at: usize| {
            let (token, column) = (at / w.columns, at % w.columns);
            ((token * 31 + column * 7 + i) as f32).sin() * 3f32.powi(((column * 5 + i) % 9) as i32 - 4)
        };
        let x: Vec<f32> = (0..300 * w.columns).map(value).collect();
        collector.add(&w.name, None, &x, 300).unwrap();
    }
    let sums = ImatrixSums::of(&collector, vec!["text.txt".into()], 128).unwrap();
    assert_eq!(sums.chunk_count, 2);
    convert(&fixture("tiny"), &at("base.gguf"), "--outtype bf16 --quiet").exits(0);
    let quantized = |imatrix: Option<&Path>, out: &Path| {
        let mut command = Command::new(&quantize);
        if let Some(imatrix) = imatrix {
            command.arg("--imatrix").arg(imatrix);
        }
        run(command.arg(at("base.gguf")).arg(out).args(["q4_k_m", "2"]));
        tensors(out)
    };
    for (format, name) in [(Format::Gguf, "imatrix.gguf"), (Format::Dat, "imatrix.dat")] {
        let file = at(name);
        write(&file, &sums, format, false).unwrap();
        assert_eq!(Imatrix::load(&file).unwrap().entries.len(), specs.len());
        let theirs = quantized(Some(&file), &at("theirs.gguf"));
        let flags = format!("--type q4_k_m --imatrix {} --force --quiet", file.display());
        convert(&fixture("tiny"), &at("ours.gguf"), &flags).exits(0);
        assert_eq!(tensors(&at("ours.gguf")), theirs, "{name}");
        assert_ne!(quantized(None, &at("plain.gguf")), theirs, "{name} has no effect");
    }
}

/// Names and data.
fn tensors(file: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(file).unwrap();
    let header = gguf::read(&bytes).unwrap();
    let data = |t: &gguf::TensorInfo| bytes[t.offset as usize..][..t.bytes as usize].to_vec();
    header.tensors.iter().map(|t| (t.name.clone(), data(t))).collect()
}
