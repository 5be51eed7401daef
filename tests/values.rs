//! Values that cannot be converted are named by tensor and by their place in the checkpoint.

mod common;

use common::program::{Checkpoint, Tensor, convert, names};
use serde_json::json;

/// Puts a value (in the stored type) at an element.
fn put(t: &mut Tensor, element: usize, value: f64) {
    match t.dtype.as_str() {
        "BF16" => t.data[element * 2..][..2].copy_from_slice(&half::bf16::from_f64(value).to_le_bytes()),
        "F16" => t.data[element * 2..][..2].copy_from_slice(&half::f16::from_f64(value).to_le_bytes()),
        "F32" => t.data[element * 4..][..4].copy_from_slice(&(value as f32).to_le_bytes()),
        "F64" => t.data[element * 8..][..8].copy_from_slice(&value.to_le_bytes()),
        other => panic!("{other}"),
    }
}

const LAYER: &str = "model.layers.0.";

#[test]
fn nan_and_infinity_are_named() {
    // tensor, columns, row, column: through rows as they are, rotary rows (q, k) and a vector
    let places = [
        ("mlp.down_proj", 256, 3, 17),
        ("self_attn.q_proj", 32, 37, 5),
        ("self_attn.k_proj", 32, 127, 31),
        ("input_layernorm", 32, 0, 9),
    ];
    let outputs =
        ["--outtype f32", "--outtype f16", "--outtype bf16", "--outtype auto", "--type q8_0", "--type q4_k_m"];
    for dtype in ["BF16", "F16", "F32", "F64"] {
        for (i, (name, columns, row, column)) in places.into_iter().enumerate() {
            let c = Checkpoint::new();
            c.store_as(dtype);
            let name = format!("{LAYER}{name}.weight");
            let (value, word) = [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")][i % 3];
            c.edit_tensor(&name, |t| put(t, row * columns + column, value));
            let dir = tempfile::tempdir().unwrap();
            for args in outputs {
                let element = row * columns + column;
                convert(c.path(), &dir.path().join("o.gguf"), args).exits(3).says(&format!(
                    "model.safetensors: tensor `{name}`: {word} at element {element} (row {row}, column {column})"
                ));
                assert!(names(dir.path()).is_empty());
            }
        }
    }
}

#[test]
fn a_bias_is_named_by_its_stored_element() {
    let c = Checkpoint::new();
    c.edit("config.json", |j| {
        j.insert("attention_bias".into(), json!(true));
    });
    c.edit_tensors(|all| {
        let name = format!("{LAYER}self_attn.q_proj.bias");
        let mut bias = Tensor { name, dtype: "F32".into(), shape: vec![256], data: vec![0; 1024] };
        put(&mut bias, 37, f64::NAN); // rotary: becomes element 42
        all.push(bias);
    });
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("o.gguf");
    convert(c.path(), &out, "").exits(3).says("q_proj.bias`: NaN at element 37 (row 0, column 37)");
}

#[test]
fn the_first_in_the_file_is_named_whatever_the_threads() {
    let c = Checkpoint::new();
    c.edit_tensors(|all| {
        for t in all.iter_mut() {
            let last = t.data.len() / 2 - 1;
            put(t, last, f64::NAN);
        }
    });
    let dir = tempfile::tempdir().unwrap();
    for threads in ["1", "2", "7"] {
        for _ in 0..5 {
            let args = format!("--threads {threads} --type q8_0");
            let ran = convert(c.path(), &dir.path().join("o.gguf"), &args).exits(3);
            assert!(
                ran.stderr.contains("`model.embed_tokens.weight`: NaN at element 16383 (row 511"),
                "{}",
                ran.stderr
            );
        }
    }
}

#[test]
fn what_does_not_fit_in_f16() {
    for dtype in ["BF16", "F32"] {
        let c = Checkpoint::new();
        c.store_as(dtype);
        let q = format!("{LAYER}self_attn.q_proj.weight");
        c.edit_tensor(&q, |t| {
            put(t, 37 * 32 + 5, 70000.0);
            put(t, 250 * 32, -1e30);
        });
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("o.gguf");
        for args in ["--outtype f16", "--type f16", "--via f16 --type q8_0"] {
            let ran = convert(c.path(), &out, args).exits(3);
            // rotary rows: 37 is written as 42, 250 as 245; the first written is named, by where it is stored
            assert!(ran.stderr.contains(&format!("tensor `{q}`: ")), "{}", ran.stderr);
            assert!(ran.stderr.contains("at element 1189 does not fit in f16 (largest 65504)"), "{}", ran.stderr);
            assert!(ran.stderr.contains("--allow-f16-overflow"), "{}", ran.stderr);
            assert!(names(dir.path()).is_empty());
        }
        convert(c.path(), &out, "--outtype f16 --allow-f16-overflow").exits(0).says("2 values did not fit in f16");
        // an infinity has no scale
        convert(c.path(), &out, "--via f16 --type q8_0 --allow-f16-overflow --force").exits(3).says(&q);
        convert(c.path(), &out, "--outtype bf16 --force --quiet").exits(0);
    }
}

#[test]
fn the_largest_f16_fits_and_the_next_does_not() {
    let c = Checkpoint::new();
    c.store_as("F32");
    let name = format!("{LAYER}mlp.up_proj.weight");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("o.gguf");
    for (value, code) in [(65504.0, 0), (65519.996, 0), (-65519.996, 0), (65520.0, 3), (-65520.0, 3)] {
        c.edit_tensor(&name, |t| put(t, 0, value));
        convert(c.path(), &out, "--outtype f16 --force --quiet").exits(code);
    }
    // a vector stays f32: no overflow there
    c.edit_tensor(&name, |t| put(t, 0, 0.0));
    c.edit_tensor("model.norm.weight", |t| put(t, 0, 1e9));
    convert(c.path(), &out, "--outtype f16 --force --quiet").exits(0);
}

#[test]
fn what_a_block_format_cannot_hold() {
    let c = Checkpoint::new();
    let name = format!("{LAYER}self_attn.q_proj.weight");
    let dir = tempfile::tempdir().unwrap();
    // the scale of the block is an f16, the row is the stored one
    c.edit_tensor(&name, |t| put(t, 37 * 32 + 5, 1e30));
    let out = dir.path().join("o.gguf");
    for ty in ["q8_0", "q4_0", "q5_1", "iq4_nl"] {
        convert(c.path(), &out, &format!("--type {ty}")).exits(3).says(&format!("tensor `{name}`, row 37: "));
    }
    let down = format!("{LAYER}mlp.down_proj.weight");
    let c = Checkpoint::new();
    c.edit_tensor(&down, |t| put(t, 7 * 256 + 5, 1e10));
    for ty in ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq3_s", "tq1_0", "tq2_0"] {
        convert(c.path(), &out, &format!("--type {ty}")).exits(3).says(&format!("tensor `{down}`, row 7: block 7"));
    }
    // with squares that overflow the reference ends in an assertion
    c.edit_tensor(&down, |t| put(t, 7 * 256 + 5, 1e30));
    convert(c.path(), &out, "--type iq3_s").exits(3).says(&format!("tensor `{down}`, row 7: the search for a scale"));
    assert!(names(dir.path()).is_empty());
    // f32 to bf16 can overflow, too
    c.store_as("F32");
    c.edit_tensor(&down, |t| put(t, 7 * 256 + 5, f64::from(f32::MAX)));
    convert(c.path(), &out, "--outtype bf16").exits(3).says(&format!("tensor `{down}`, row 7: "));
    convert(c.path(), &out, "--via bf16 --type q8_0").exits(3).says(&format!("tensor `{down}`, row 7: "));
    convert(c.path(), &out, "--outtype f32 --quiet").exits(0);
}
