//! Digests of the input files, computed beside the conversion.
//!
//! A file's digest is the sha256 of the sha256 digests of its pieces of [`PIECE`] bytes (the last one shorter), one after the
//! other. One stream of sha256 is 1.5 GB/s on a processor with instructions for it, less than a conversion to Q4_0 or Q8_0 reads;
//! pieces are computed by several threads, two side by side on each.
//!
//! The threads walk the files from front to back, at most a window ahead of the workers: what they have read is in the page
//! cache when the workers come to it, so the disk is read once. They read through small buffers of their own: no resident pages.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{Scope, ScopedJoinHandle};

use sha2::{Digest, Sha256};

use super::sha256::Pair;
use crate::calibration::imatrix::hex;
use crate::mapped::MappedFile;

/// Bytes of a piece.
pub const PIECE: usize = 8 << 20;
const BUFFER: usize = 1 << 18;
/// How far the threads may be ahead of the workers.
const AHEAD: usize = 256 << 20;
/// More threads would only wait for the disk.
const THREADS: usize = 8;

/// A piece's place, and its digest; or the file that could not be read.
type Pieces = Result<Vec<(usize, [u8; 32])>, (PathBuf, io::Error)>;

/// The threads and their limits.
pub struct Hasher<'scope> {
    shared: Arc<Shared>,
    threads: Vec<ScopedJoinHandle<'scope, Pieces>>,
    /// Pieces of each file.
    counts: Vec<usize>,
}

/// A hasher that is dropped (a worker failed or panicked) ends its threads: the scope waits for them.
impl Drop for Hasher<'_> {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.moved.notify_all();
    }
}

struct Shared {
    /// The pieces of all files, in order: file and first byte.
    pieces: Vec<(usize, usize)>,
    /// The next one to take.
    next: AtomicUsize,
    /// Bytes of each file that may be read now.
    limits: Vec<AtomicUsize>,
    stop: AtomicBool,
    lock: Mutex<()>,
    moved: Condvar,
}

impl<'scope> Hasher<'scope> {
    /// Starts hashing `files` on as many threads as the conversion has.
    pub fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        files: &'env [MappedFile],
        threads: usize,
    ) -> Hasher<'scope> {
        let counts: Vec<usize> = files.iter().map(|f| f.bytes().len().div_ceil(PIECE)).collect();
        let pieces = counts.iter().enumerate().flat_map(|(f, n)| (0..*n).map(move |i| (f, i * PIECE))).collect();
        let shared = Arc::new(Shared {
            pieces,
            next: AtomicUsize::new(0),
            limits: files.iter().map(|_| AtomicUsize::new(AHEAD)).collect(),
            stop: AtomicBool::new(false),
            lock: Mutex::new(()),
            moved: Condvar::new(),
        });
        // first itself: were a thread refused, it would end those that run
        let mut hasher = Hasher { shared, threads: Vec::new(), counts };
        for _ in 0..threads.clamp(1, THREADS) {
            let shared = hasher.shared.clone();
            hasher.threads.push(scope.spawn(move || {
                step_back();
                shared.work(files)
            }));
        }
        hasher
    }

    /// Workers have reached byte `end` of file `index`.
    pub fn reached(&self, index: usize, end: usize) {
        self.shared.limits[index].fetch_max(end.saturating_add(AHEAD), Ordering::Relaxed);
        self.shared.moved.notify_all();
    }

    /// Lets the threads read to the end; the digests in lower-case hex, in the order of the files.
    pub fn finish(mut self) -> Result<Vec<String>, (PathBuf, io::Error)> {
        for l in &self.shared.limits {
            l.store(usize::MAX, Ordering::Relaxed);
        }
        self.shared.moved.notify_all();
        let mut all = Vec::with_capacity(self.shared.pieces.len());
        for thread in self.threads.drain(..) {
            all.extend(thread.join().expect("a hasher does not panic")?);
        }
        all.sort_unstable_by_key(|p| p.0);
        let mut digests = all.iter().map(|p| p.1);
        Ok(self.counts.iter().map(|n| digest(digests.by_ref().take(*n))).collect())
    }
}

/// The digest of a file whose pieces have these digests, in lower-case hex.
pub fn digest(pieces: impl Iterator<Item = [u8; 32]>) -> String {
    let mut hash = Sha256::new();
    pieces.for_each(|p| hash.update(p));
    hex(&hash.finalize())
}

impl Shared {
    /// Takes pieces until none is left, two at a time.
    fn work(&self, files: &[MappedFile]) -> Pieces {
        let mut done = Vec::new();
        let mut open: Option<(usize, File)> = None;
        let mut buffers = [(); 2].map(|()| vec![0u8; BUFFER]);
        loop {
            let at = self.next.fetch_add(2, Ordering::Relaxed);
            let taken = &self.pieces[at.min(self.pieces.len())..(at + 2).min(self.pieces.len())];
            let Some(&(index, first)) = taken.first() else { return Ok(done) };
            taken.iter().for_each(|&(index, first)| self.wait_for(index, first));
            if self.stop.load(Ordering::Relaxed) {
                return Ok(done);
            }
            // side by side where both are whole pieces of one file
            let whole = |&(i, first): &(usize, usize)| i == index && first + PIECE <= files[index].bytes().len();
            if let (2, true, Some(mut pair)) = (taken.len(), taken.iter().all(whole), Pair::new()) {
                let file = opened(&mut open, files, index)?;
                for from in (first..first + PIECE).step_by(BUFFER) {
                    for (buffer, &(_, start)) in buffers.iter_mut().zip(taken) {
                        read(file, buffer, from - first + start).map_err(|e| failed(files, index, e))?;
                    }
                    pair.update([&buffers[0], &buffers[1]]);
                }
                let [one, two] = pair.finish();
                done.extend([(at, one), (at + 1, two)]);
                continue;
            }
            for (i, &(index, first)) in taken.iter().enumerate() {
                let file = opened(&mut open, files, index)?;
                let end = (first + PIECE).min(files[index].bytes().len());
                let mut hash = Sha256::new();
                for from in (first..end).step_by(BUFFER) {
                    let part = &mut buffers[0][..BUFFER.min(end - from)];
                    read(file, part, from).map_err(|e| failed(files, index, e))?;
                    hash.update(part);
                }
                done.push((at + i, hash.finalize().into()));
            }
        }
    }

    fn wait_for(&self, index: usize, first: usize) {
        let reached = || self.limits[index].load(Ordering::Relaxed) > first || self.stop.load(Ordering::Relaxed);
        if reached() {
            return;
        }
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        while !reached() {
            // a missed wake-up costs one tick
            let tick = std::time::Duration::from_millis(5);
            (guard, _) = self.moved.wait_timeout(guard, tick).unwrap_or_else(|e| e.into_inner());
        }
    }
}

/// Lets the workers have three quarters of a processor that both want: what they write, the disk can begin to write, and digests
/// that are missing at the end are computed while it does. Enough is left to keep up with them where the disk is what all wait for.
fn step_back() {
    #[cfg(target_os = "linux")]
    // SAFETY: a plain system call; on Linux 0 is this thread alone. If it is refused nothing is lost.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 5);
    }
}

fn failed(files: &[MappedFile], index: usize, e: io::Error) -> (PathBuf, io::Error) {
    (files[index].path().to_path_buf(), e)
}

/// File `index`, which stays open until another is asked for.
fn opened<'a>(
    open: &'a mut Option<(usize, File)>,
    files: &[MappedFile],
    index: usize,
) -> Result<&'a File, (PathBuf, io::Error)> {
    if open.as_ref().is_none_or(|(i, _)| *i != index) {
        *open = Some((index, File::open(files[index].path()).map_err(|e| failed(files, index, e))?));
    }
    Ok(&open.as_ref().expect("opened above").1)
}

fn read(file: &File, part: &mut [u8], from: usize) -> io::Result<()> {
    file.read_exact_at(part, from as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Several pieces, files that end inside one and on the end of one: the textbook's digests for any threads.
    #[test]
    fn digests_are_those_of_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let sizes = [5 * PIECE + 12_345, PIECE, 7, 2 * PIECE];
        let contents = sizes.map(|n| (0..n).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect::<Vec<u8>>());
        let files: Vec<MappedFile> = contents
            .iter()
            .enumerate()
            .map(|(i, bytes)| {
                let path = dir.path().join(i.to_string());
                std::fs::write(&path, bytes).unwrap();
                MappedFile::open(&path).unwrap()
            })
            .collect();
        let wanted: Vec<String> = contents
            .iter()
            .map(|bytes| hex(&Sha256::digest(bytes.chunks(PIECE).flat_map(Sha256::digest).collect::<Vec<u8>>())))
            .collect();
        for threads in [1, 3, 64] {
            let got = std::thread::scope(|scope| Hasher::start(scope, &files, threads).finish()).unwrap();
            assert_eq!(got, wanted, "{threads} threads");
        }
    }
}
