//! A read-only memory map of an input file, with the checks that make it safe enough to read through.
//!
//! A map is only as good as the file under it: a file that shrinks while it is mapped ends the process (SIGBUS).
//! So the length is taken once, every range is checked against it, and [`MappedFile::unchanged`] tells at the end
//! whether length, modification time and inode are still the same. Inputs are never written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, UncheckedAdvice};

/// Linux maps more than the page that was asked for: an aligned window of 64 KiB (`fault_around_bytes`), or the whole
/// large folio of the page cache, up to this size (seen on Linux 6.18).
const FAULT_AROUND: usize = 2 << 20;

/// Device and inode of what `path` leads to; `None` if it cannot be told.
pub fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// An input file, mapped.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
    stamp: Stamp,
}

/// What identifies the contents of a file without reading them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(meta: &std::fs::Metadata) -> Stamp {
        Stamp { device: meta.dev(), inode: meta.ino(), len: meta.len(), modified: (meta.mtime(), meta.mtime_nsec()) }
    }
}

impl MappedFile {
    /// Maps a regular file. Anything else (folder, pipe, device) is `InvalidInput`.
    pub fn open(path: &Path) -> io::Result<MappedFile> {
        let kind = std::fs::metadata(path)?;
        if !kind.is_file() {
            let what = if kind.is_dir() { "a folder, not a file" } else { "not a regular file" };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let file = File::open(path)?;
        let stamp = Stamp::of(&file.metadata()?);
        // SAFETY: the map is private to this process and read-only. Another process could still change the file;
        // the program documents that inputs must not change during a run, and `unchanged` detects it afterwards.
        let map = unsafe { Mmap::map(&file)? };
        Ok(MappedFile { path: path.to_path_buf(), map, stamp })
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Device and inode, to tell whether two paths are one file.
    pub fn identity(&self) -> (u64, u64) {
        (self.stamp.device, self.stamp.inode)
    }

    /// The file will be read from front to back: read ahead far.
    pub fn advise_sequential(&self) {
        let _ = self.map.advise(Advice::Sequential);
    }

    /// Drops the pages of `range` from this process (they stay in the page cache): resident memory stays flat.
    pub fn release(&self, range: Range<usize>) {
        if range.end > range.start && range.end <= self.map.len() {
            // SAFETY: the map is read-only and file-backed: dropped pages come back from the file on the next access.
            let _ = unsafe {
                self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.end - range.start)
            };
        }
    }

    /// [`MappedFile::release`] of `range` and a window on both sides: a page fault maps the pages around it too, so what
    /// a neighbour has released may be back.
    pub fn release_around(&self, range: Range<usize>) {
        self.release(range.start.saturating_sub(FAULT_AROUND)..(range.end + FAULT_AROUND).min(self.map.len()));
    }

    /// True if the file is still the one that was opened: same inode, length and modification time.
    pub fn unchanged(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|m| Stamp::of(&m) == self.stamp)
    }
}
