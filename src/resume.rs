//! The state of a long run in one file: what it belongs to, as JSON, and after it plain numbers. Written beside and renamed, so
//! that a killed run leaves the state before.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use bytemuck::Pod;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// No head is longer.
const HEAD: u64 = 1 << 20;

/// Of a run of gradient descent: what it belongs to, and how far it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Descent<S> {
    version: String,
    /// Of everything that the result depends on beside the settings.
    key: String,
    settings: S,
    /// Steps that are done.
    pub step: usize,
    /// Divergence on the windows held out: before the first step, and the least so far with its step.
    pub before: f64,
    pub best: f64,
    pub best_step: usize,
}

impl<S: Clone + PartialEq> Descent<S> {
    /// No step done yet.
    pub fn new(key: &str, settings: &S) -> Descent<S> {
        let (version, key, settings) = (env!("CARGO_PKG_VERSION").into(), key.into(), settings.clone());
        Descent { version, key, settings, step: 0, before: 0.0, best: f64::INFINITY, best_step: 0 }
    }

    /// True if `other` is the same run.
    pub fn is_run_of(&self, other: &Descent<S>) -> bool {
        (&self.version, &self.key, &self.settings) == (&other.version, &other.key, &other.settings)
    }
}

/// Writes `head` and all `values`.
pub fn save<T: Pod>(path: &Path, head: &impl Serialize, values: Vec<&mut Vec<T>>) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&new)?);
    let head = serde_json::to_vec(head).expect("plain data");
    out.write_all(&(head.len() as u64).to_le_bytes())?;
    out.write_all(&head)?;
    for values in values {
        out.write_all(bytemuck::cast_slice(values))?;
    }
    out.into_inner()?.sync_data()?;
    std::fs::rename(&new, path)
}

/// Reads what was saved into `values`, whose lengths it must have, if `belongs` says so of its head; the head then.
pub fn load<T: Pod, H: DeserializeOwned>(
    path: &Path,
    values: Vec<&mut Vec<T>>,
    belongs: impl FnOnce(&H) -> bool,
) -> io::Result<Option<H>> {
    let Ok(file) = File::open(path) else { return Ok(None) };
    let length = file.metadata().map_or(0, |m| m.len());
    let mut file = BufReader::with_capacity(1 << 20, file);
    let mut size = [0u8; 8];
    if file.read_exact(&mut size).is_err() || u64::from_le_bytes(size) > length.min(HEAD) {
        return Ok(None);
    }
    let mut head = vec![0; u64::from_le_bytes(size) as usize];
    let found: Option<H> = file.read_exact(&mut head).ok().and_then(|()| serde_json::from_slice(&head).ok());
    let Some(found) = found.filter(|f| belongs(f)) else { return Ok(None) };
    let count: usize = values.iter().map(|v| v.len()).sum();
    if length != (8 + head.len() + count * size_of::<T>()) as u64 {
        return Ok(None);
    }
    for values in values {
        file.read_exact(bytemuck::cast_slice_mut(values))?;
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_comes_back_where_it_belongs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.state");
        let (mut a, mut b) = (vec![1.0f64, 2.0], vec![3.5f64]);
        save(&path, &"mine", vec![&mut a, &mut b]).unwrap();
        let (mut x, mut y) = (vec![0.0f64; 2], vec![0.0f64; 1]);
        let load = |x: &mut Vec<f64>, y: &mut Vec<f64>, name: &str| {
            super::load(&path, vec![x, y], |head: &String| head == name).unwrap()
        };
        assert_eq!(load(&mut x, &mut y, "other"), None);
        assert_eq!(load(&mut x, &mut y, "mine").as_deref(), Some("mine"));
        assert_eq!((x, y), (a.clone(), b.clone()));
        // another number of values, and a file cut short, are no state
        assert_eq!(load(&mut vec![0.0; 3], &mut vec![0.0; 1], "mine"), None);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(load(&mut vec![0.0; 2], &mut vec![0.0; 1], "mine"), None);
        std::fs::write(&path, [0xff; 20]).unwrap();
        assert_eq!(load(&mut vec![0.0; 2], &mut vec![0.0; 1], "mine"), None);
    }
}
