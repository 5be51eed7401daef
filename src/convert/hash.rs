//! sha256 of the input files, computed beside the conversion.
//!
//! One thread walks each file from front to back, at most a window ahead of the workers: what it has read is in the page
//! cache when they come to it, so the disk is read once. It reads through its own small buffer: no resident pages.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread::{Scope, ScopedJoinHandle};

use sha2::{Digest, Sha256};

use crate::calibration::imatrix::hex;
use crate::mapped::MappedFile;

const BUFFER: usize = 1 << 18;
/// How far it may be ahead of the workers.
const AHEAD: usize = 256 << 20;

/// Digests in the order of the files, or the file that could not be read.
type Digests = Result<Vec<String>, (PathBuf, io::Error)>;

/// The thread and its limits.
pub struct Hasher<'scope> {
    shared: std::sync::Arc<Shared>,
    thread: Option<ScopedJoinHandle<'scope, Digests>>,
}

/// A hasher that is dropped (a worker failed or panicked) ends its thread: the scope waits for it.
impl Drop for Hasher<'_> {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.moved.notify_all();
    }
}

struct Shared {
    /// Bytes of each file that may be read now.
    limits: Vec<AtomicUsize>,
    stop: AtomicBool,
    lock: Mutex<()>,
    moved: Condvar,
}

impl<'scope> Hasher<'scope> {
    /// Starts hashing `files`.
    pub fn start<'env>(scope: &'scope Scope<'scope, 'env>, files: &'env [MappedFile]) -> Hasher<'scope> {
        let shared = std::sync::Arc::new(Shared {
            limits: files.iter().map(|_| AtomicUsize::new(AHEAD)).collect(),
            stop: AtomicBool::new(false),
            lock: Mutex::new(()),
            moved: Condvar::new(),
        });
        let theirs = shared.clone();
        let thread = scope.spawn(move || {
            files
                .iter()
                .enumerate()
                .map(|(i, f)| digest(f, i, &theirs).map_err(|e| (f.path().to_path_buf(), e)))
                .collect()
        });
        Hasher { shared, thread: Some(thread) }
    }

    /// Workers have reached byte `end` of file `index`.
    pub fn reached(&self, index: usize, end: usize) {
        self.shared.limits[index].fetch_max(end.saturating_add(AHEAD), Ordering::Relaxed);
        self.shared.moved.notify_all();
    }

    /// Lets the thread read to the end; the digests in lower-case hex, in the order of the files.
    pub fn finish(mut self) -> Digests {
        for l in &self.shared.limits {
            l.store(usize::MAX, Ordering::Relaxed);
        }
        self.shared.moved.notify_all();
        let thread = self.thread.take().expect("taken once, here");
        thread.join().expect("the hasher does not panic")
    }
}

fn digest(file: &MappedFile, index: usize, shared: &Shared) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut input = File::open(file.path())?;
    let mut buffer = vec![0u8; BUFFER];
    let mut done = 0usize;
    while !shared.stop.load(Ordering::Relaxed) {
        wait_for(shared, index, done);
        match input.read(&mut buffer)? {
            0 => break,
            n => {
                hash.update(&buffer[..n]);
                done += n;
            }
        }
    }
    Ok(hex(&hash.finalize()))
}

fn wait_for(shared: &Shared, index: usize, done: usize) {
    let reached = || shared.limits[index].load(Ordering::Relaxed) > done || shared.stop.load(Ordering::Relaxed);
    if reached() {
        return;
    }
    let mut guard = shared.lock.lock().unwrap_or_else(|e| e.into_inner());
    while !reached() {
        // a missed wake-up costs one tick
        (guard, _) =
            shared.moved.wait_timeout(guard, std::time::Duration::from_millis(5)).unwrap_or_else(|e| e.into_inner());
    }
}
