//! The output file: written under another name beside the final one, complete before it gets it.
//!
//! `OUT.ostq-part` is created in the target's folder, locked, preallocated, written at planned places, synced, checked, and
//! only then renamed; the folder is synced after that. An error or an interrupt removes it; after a crash it stays under
//! its telling name and the next run takes it over. The final name never holds anything but a complete file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mapped::identity;
use crate::plan::memory::human;

/// Dirty bytes after which the kernel is asked to start writing back.
const WRITE_BACK: u64 = 64 << 20;

/// The output cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    #[error("{}: exists; --force replaces it", .0.display())]
    Exists(PathBuf),
    #[error("{}: is an input of this conversion", .0.display())]
    IsInput(PathBuf),
    #[error("{}: is inside the input folder, which stays as it is; choose another place or say --force", .0.display())]
    InsideInput(PathBuf),
    #[error("{}: is a folder; name a file", .0.display())]
    IsFolder(PathBuf),
    #[error("{}: is there and no regular file (a device, a pipe); it is not replaced", .0.display())]
    IsSpecial(PathBuf),
    #[error("{}: the folder {} does not exist", out.display(), folder.display())]
    NoFolder { out: PathBuf, folder: PathBuf },
    #[error("{}: another conversion is writing this file", .0.display())]
    Busy(PathBuf),
    #[error("{}: {} are needed, {} are free", path.display(), human(*needed), human(*free))]
    NoSpace { path: PathBuf, needed: u64, free: u64 },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl OutputError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> OutputError + '_ {
        move |source| OutputError::Io { path: path.to_path_buf(), source }
    }
}

/// Refuses an output that would harm an input or that cannot be written, before any work.
///
/// `inputs` are (device, inode) of every file that is read; `folder` is the input folder, if it is one.
pub fn check(out: &Path, inputs: &[(u64, u64)], folder: Option<&Path>, force: bool) -> Result<(), OutputError> {
    let dir = parent(out);
    if !dir.is_dir() {
        return Err(OutputError::NoFolder { out: out.to_path_buf(), folder: dir.to_path_buf() });
    }
    for candidate in [out.to_path_buf(), part_name(out)] {
        if let Ok(meta) = std::fs::metadata(&candidate) {
            if inputs.contains(&(meta.dev(), meta.ino())) {
                return Err(OutputError::IsInput(candidate));
            }
            if meta.is_dir() {
                return Err(OutputError::IsFolder(candidate));
            }
            if !meta.is_file() {
                return Err(OutputError::IsSpecial(candidate));
            }
        }
    }
    if std::fs::symlink_metadata(out).is_ok() && !force {
        return Err(OutputError::Exists(out.to_path_buf()));
    }
    if let Some(folder) = folder.filter(|_| !force).and_then(identity)
        && let Ok(dir) = dir.canonicalize()
        && dir.ancestors().any(|at| identity(at) == Some(folder))
    {
        return Err(OutputError::InsideInput(out.to_path_buf()));
    }
    Ok(())
}

/// Bytes free for this user where `out` will be.
pub fn free_space(out: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let dir = std::ffi::CString::new(parent(out).as_os_str().as_bytes())?;
    let mut s = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `dir` is a NUL-terminated string and `s` is large enough for the call to fill.
    if unsafe { libc::statvfs(dir.as_ptr(), s.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so `s` is filled.
    let s = unsafe { s.assume_init() };
    #[allow(clippy::unnecessary_cast)] // narrower on other systems
    Ok((s.f_bavail as u64).saturating_mul(s.f_frsize as u64))
}

fn parent(out: &Path) -> &Path {
    match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// The name under which `out` is written.
pub fn part_name(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".ostq-part");
    PathBuf::from(name)
}

fn open_part(part: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(part)
}

/// An output in the making. Dropped without [`PartFile::publish`], it removes itself.
#[derive(Debug)]
pub struct PartFile {
    file: File,
    part: PathBuf,
    out: PathBuf,
    force: bool,
    published: bool,
    dirty: AtomicU64,
}

impl PartFile {
    /// Creates `out.ostq-part` with `size` bytes reserved on the disk.
    pub fn create(out: &Path, size: u64, force: bool) -> Result<PartFile, OutputError> {
        let part = part_name(out);
        let file = loop {
            let file = open_part(&part).map_err(OutputError::io(&part))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(std::fs::TryLockError::WouldBlock) => return Err(OutputError::Busy(out.to_path_buf())),
                Err(std::fs::TryLockError::Error(_)) => {} // a file system without locks
            }
            let own = file.metadata().map_err(OutputError::io(&part))?;
            match std::fs::symlink_metadata(&part) {
                // a run that ended between the opening and the lock has renamed or removed what was opened
                Ok(now) if (now.dev(), now.ino()) != (own.dev(), own.ino()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(OutputError::io(&part)(e)),
                // killed while it published: the file has its final name as well, and is not to be touched
                Ok(now) if now.nlink() > 1 => std::fs::remove_file(&part).map_err(OutputError::io(&part))?,
                Ok(_) => break file,
            }
        };
        let this = PartFile { file, part, out: out.to_path_buf(), force, published: false, dirty: AtomicU64::new(0) };
        this.file.set_len(0).map_err(OutputError::io(&this.part))?;
        this.reserve(size)?;
        Ok(this)
    }

    fn reserve(&self, size: u64) -> Result<(), OutputError> {
        let no_space = |_| {
            let free = free_space(&self.out).unwrap_or(0);
            OutputError::NoSpace { path: self.out.clone(), needed: size, free }
        };
        let len = libc::off_t::try_from(size)
            .map_err(|_| OutputError::io(&self.part)(io::Error::from_raw_os_error(libc::EFBIG)))?;
        #[cfg(target_os = "linux")]
        if len > 0 {
            // SAFETY: a plain system call on a file descriptor that this struct owns.
            let rc = unsafe { libc::fallocate(self.file.as_raw_fd(), 0, 0, len) };
            if rc != 0 {
                let e = io::Error::last_os_error();
                match e.raw_os_error() {
                    Some(libc::EOPNOTSUPP | libc::ENOSYS) => {}
                    Some(libc::ENOSPC | libc::EDQUOT) => return Err(no_space(e)),
                    _ => return Err(OutputError::io(&self.part)(e)),
                }
            }
        }
        let _ = no_space;
        self.file.set_len(size).map_err(OutputError::io(&self.part))
    }

    /// Where the bytes are now.
    pub fn path(&self) -> &Path {
        &self.part
    }

    /// Writes `bytes` at `offset`. May be called from several threads for different places.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), OutputError> {
        self.file.write_all_at(bytes, offset).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => OutputError::NoSpace {
                path: self.out.clone(),
                needed: bytes.len() as u64,
                free: free_space(&self.out).unwrap_or(0),
            },
            _ => OutputError::io(&self.part)(e),
        })?;
        let before = self.dirty.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if before / WRITE_BACK != (before + bytes.len() as u64) / WRITE_BACK {
            self.start_write_back();
        }
        Ok(())
    }

    /// Asks the kernel to begin writing, so that the final sync has little left to do.
    fn start_write_back(&self) {
        #[cfg(target_os = "linux")]
        // SAFETY: a plain system call on a file descriptor that this struct owns; it waits for nothing.
        unsafe {
            libc::sync_file_range(self.file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE);
        }
    }

    /// Everything is on the disk.
    pub fn sync(&self) -> Result<(), OutputError> {
        self.file.sync_all().map_err(OutputError::io(&self.part))
    }

    /// Gives the file its final name.
    pub fn publish(&mut self) -> Result<(), OutputError> {
        self.publish_unsynced()?;
        // the name itself must reach the disk
        File::open(parent(&self.out)).and_then(|d| d.sync_all()).map_err(OutputError::io(&self.out))
    }

    /// The same for a file that need not outlive a crash of the machine.
    pub fn publish_unsynced(&mut self) -> Result<(), OutputError> {
        let rename = if self.force { std::fs::rename(&self.part, &self.out) } else { self.rename_new() };
        rename.map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => OutputError::Exists(self.out.clone()),
            _ => OutputError::io(&self.out)(e),
        })?;
        self.published = true;
        Ok(())
    }

    /// Renames without replacing a file that appeared meanwhile.
    fn rename_new(&self) -> io::Result<()> {
        std::fs::hard_link(&self.part, &self.out).and_then(|()| std::fs::remove_file(&self.part)).or_else(|e| {
            match e.kind() {
                io::ErrorKind::AlreadyExists => Err(e),
                _ => std::fs::rename(&self.part, &self.out), // a file system without links
            }
        })
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.published {
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

/// Writes a small file whole: under another name, synced, then renamed.
pub fn write_new(path: &Path, bytes: &[u8], force: bool) -> Result<(), OutputError> {
    check(path, &[], None, force)?;
    let mut out = PartFile::create(path, bytes.len() as u64, force)?;
    out.write_at(bytes, 0)?;
    out.sync()?;
    out.publish()
}
