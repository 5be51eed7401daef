//! What happens to files when something goes wrong: nothing is lost, nothing half-done gets the final name.
//!
//! Some of this needs a mount (a full or read-only disk) and is skipped, loudly, where that is not allowed.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::program::{Checkpoint, Ran, command, convert, fixture, names, run, sha256};
use tempfile::TempDir;

fn part(out: &Path) -> PathBuf {
    PathBuf::from(format!("{}.ostq-part", out.display()))
}

fn tiny_to(out: &Path, args: &str) -> Ran {
    convert(&fixture("tiny"), out, args)
}

/// Every file of a folder with its content, to see that nothing changed.
fn contents(folder: &Path) -> Vec<(String, String)> {
    names(folder).into_iter().map(|n| (n.clone(), sha256(&folder.join(n)))).collect()
}

#[test]
fn an_existing_file_is_replaced_only_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    std::fs::write(&out, "mine").unwrap();
    tiny_to(&out, "--quiet").exits(2).says("out.gguf: exists; --force replaces it");
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "mine");
    assert_eq!(names(dir.path()), ["out.gguf"]);
    tiny_to(&out, "--quiet --force").exits(0);
    assert!(std::fs::read(&out).unwrap().starts_with(b"GGUF"));
    assert_eq!(names(dir.path()), ["out.gguf"]);
    // a link to nothing is something, too
    let link = dir.path().join("link.gguf");
    symlink("nowhere", &link).unwrap();
    tiny_to(&link, "--quiet").exits(2).says("exists");
}

#[test]
fn an_input_is_never_the_output() {
    let c = Checkpoint::new();
    let dir = tempfile::tempdir().unwrap();
    let weights = c.file("model.safetensors");
    let before = contents(c.path());
    let (soft, hard) = (dir.path().join("soft.gguf"), dir.path().join("hard.gguf"));
    symlink(&weights, &soft).unwrap();
    std::fs::hard_link(&weights, &hard).unwrap();
    let config = dir.path().join("config.gguf");
    std::fs::hard_link(c.file("tokenizer.json"), &config).unwrap();
    for out in [&weights, &c.file("config.json"), &soft, &hard] {
        convert(c.path(), out, "--force --quiet").exits(2).says("is an input of this conversion");
        assert_eq!(contents(c.path()), before, "{}", out.display());
    }
    // the name that it is written under first
    let free = dir.path().join("free.gguf");
    std::fs::hard_link(&weights, part(&free)).unwrap();
    convert(c.path(), &free, "--force --quiet").exits(2).says("is an input");
    // requantization in place, and the importance matrix
    let gguf = dir.path().join("model.gguf");
    convert(c.path(), &gguf, "--outtype bf16 --quiet").exits(0);
    let sum = sha256(&gguf);
    convert(&gguf, &gguf, "--force --quiet").exits(2).says("is an input");
    let imatrix = dir.path().join("imatrix.gguf");
    std::fs::copy(fixture("tiny.imatrix.gguf"), &imatrix).unwrap();
    let args = format!("--force --quiet --imatrix {}", imatrix.display());
    convert(c.path(), &imatrix, &args).exits(2).says("is an input");
    assert_eq!((sha256(&gguf), sha256(&imatrix)), (sum, sha256(&fixture("tiny.imatrix.gguf"))));
    assert_eq!(contents(c.path()), before);
}

#[test]
fn the_input_folder_stays_as_it_is() {
    let c = Checkpoint::new();
    let before = contents(c.path());
    let out = c.file("out.gguf");
    convert(c.path(), &out, "--quiet").exits(2).says("is inside the input folder");
    let deep = c.path().join("gguf");
    std::fs::create_dir(&deep).unwrap();
    convert(c.path(), &deep.join("out.gguf"), "--quiet").exits(2).says("is inside the input folder");
    std::fs::remove_dir(&deep).unwrap();
    assert_eq!(contents(c.path()), before);
    // asked for by name; and again over it
    convert(c.path(), &out, "--quiet --force").exits(0);
    convert(c.path(), &out, "--quiet --force").exits(0);
    std::fs::remove_file(&out).unwrap();
    assert_eq!(contents(c.path()), before);
}

#[test]
fn places_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    tiny_to(&dir.path().join("no/such/out.gguf"), "--quiet").exits(2).says("does not exist");
    tiny_to(dir.path(), "--quiet").exits(2).says("is a folder; name a file");
    tiny_to(dir.path(), "--quiet --force").exits(2).says("is a folder; name a file");
    tiny_to(&dir.path().join("a".repeat(300)), "--quiet").exits(4);
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    tiny_to(&pipe, "--quiet --force").exits(2).says("no regular file");
    std::fs::remove_file(&pipe).unwrap();
    symlink("/dev/null", &pipe).unwrap();
    tiny_to(&pipe, "--quiet --force").exits(2).says("no regular file");
    std::fs::remove_file(&pipe).unwrap();
    assert!(names(dir.path()).is_empty());
}

/// A file system of its own, unmounted at the end.
struct Mounted(TempDir);

impl Mounted {
    fn new(options: &str) -> Option<Mounted> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(dir.path()).output();
        if mount.is_ok_and(|o| o.status.success()) {
            return Some(Mounted(dir));
        }
        eprintln!("SKIPPED: no file system can be mounted here ({options})");
        None
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk() {
    let Some(disk) = Mounted::new("size=256k") else { return };
    let out = disk.0.path().join("out.gguf");
    tiny_to(&out, "--quiet --outtype f32").exits(4).says("are needed").says("are free");
    assert!(names(disk.0.path()).is_empty());
    tiny_to(&out, "--quiet --type q8_0").exits(0);
    // the old file stays when the new one does not fit
    let sum = sha256(&out);
    std::fs::write(disk.0.path().join("fill"), vec![1u8; 100_000]).unwrap();
    tiny_to(&out, "--quiet --outtype bf16 --force").exits(4).says("are free");
    assert_eq!(sha256(&out), sum);
    assert_eq!(names(disk.0.path()), ["fill", "out.gguf"]);
}

#[test]
fn a_file_size_limit() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    for limit in [0u64, 4096, 60_000] {
        let mut c = command([fixture("tiny").as_os_str(), out.as_os_str()]);
        // SAFETY: setrlimit is safe to call between fork and exec.
        unsafe {
            c.pre_exec(move || {
                let l = libc::rlimit { rlim_cur: limit, rlim_max: limit };
                if libc::setrlimit(libc::RLIMIT_FSIZE, &l) == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            });
        }
        Ran::from(c.output().unwrap()).exits(4).says("out.gguf").says("File too large");
        assert!(names(dir.path()).is_empty(), "{limit}");
    }
}

#[test]
fn a_read_only_folder() {
    if let Some(disk) = Mounted::new("size=256k,ro") {
        tiny_to(&disk.0.path().join("out.gguf"), "--quiet").exits(4).says("Read-only file system");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o555)).unwrap();
    if std::fs::write(dir.path().join("probe"), "").is_ok() {
        eprintln!("SKIPPED: this user may write everywhere");
        return;
    }
    tiny_to(&dir.path().join("out.gguf"), "--quiet").exits(4).says("Permission denied");
    assert!(names(dir.path()).is_empty());
}

/// A conversion that takes many seconds, well under way.
struct Slow {
    input: Checkpoint,
    dir: TempDir,
    child: Child,
}

impl Slow {
    const TYPE: &str = "iq3_s";

    fn start() -> Slow {
        let (input, dir) = (Checkpoint::sized(256, 16384, 2), tempfile::tempdir().unwrap());
        let out = dir.path().join("out.gguf");
        let args = [input.path().to_str().unwrap(), out.to_str().unwrap(), "--type", Slow::TYPE, "--threads", "1"];
        let child = command(args).spawn().unwrap();
        let begin = Instant::now();
        while std::fs::metadata(part(&out)).map_or(0, |m| m.blocks()) == 0 {
            assert!(begin.elapsed() < Duration::from_secs(60), "it does not begin");
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(100));
        Slow { input, dir, child }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out.gguf")
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a signal to a child that was not waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    fn end(self) -> (Checkpoint, TempDir, Ran) {
        (self.input, self.dir, self.child.wait_with_output().unwrap().into())
    }
}

#[test]
fn an_interrupt_leaves_nothing() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let slow = Slow::start();
        let begin = Instant::now();
        slow.signal(signal);
        let (_, dir, ran) = slow.end();
        ran.exits(5).says("interrupted; nothing was written");
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        assert!(names(dir.path()).is_empty());
    }
}

#[test]
fn what_a_killed_run_leaves_is_taken_over() {
    let slow = Slow::start();
    let out = slow.out();
    slow.signal(libc::SIGKILL);
    let (input, dir, ran) = slow.end();
    ran.exits(128 + libc::SIGKILL);
    assert_eq!(names(dir.path()), ["out.gguf.ostq-part"], "no file under the final name");
    convert(input.path(), &out, "--type q8_0 --quiet").exits(0);
    assert_eq!(names(dir.path()), ["out.gguf"]);
    let other = dir.path().join("other.gguf");
    convert(input.path(), &other, "--type q8_0 --quiet").exits(0);
    assert_eq!(sha256(&out), sha256(&other), "nothing of the old file is left in the new one");
}

#[test]
fn one_run_at_a_time_writes_a_file() {
    let slow = Slow::start();
    let before = std::fs::metadata(part(&slow.out())).unwrap();
    convert(slow.input.path(), &slow.out(), "--type q8_0 --quiet").exits(4).says("another conversion is writing this");
    let after = std::fs::metadata(part(&slow.out())).unwrap();
    assert_eq!((before.ino(), before.len()), (after.ino(), after.len()), "the first run's file is untouched");
    slow.signal(libc::SIGINT);
    slow.end().2.exits(5);
}

#[test]
fn runs_that_begin_together_never_harm_what_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let (out, alone) = (dir.path().join("out.gguf"), dir.path().join("alone.gguf"));
    tiny_to(&alone, "--quiet").exits(0);
    for _ in 0..12 {
        let args = [fixture("tiny"), out.clone(), "--force".into(), "--quiet".into(), "--threads=1".into()];
        let children: Vec<Child> = (0..6).map(|_| command(&args).spawn().unwrap()).collect();
        let codes: Vec<i32> = children.into_iter().map(|c| Ran::from(c.wait_with_output().unwrap()).code).collect();
        assert!(codes.iter().all(|c| [0, 4].contains(c)) && codes.contains(&0), "{codes:?}");
        assert_eq!(sha256(&out), sha256(&alone));
        assert_eq!(names(dir.path()), ["alone.gguf", "out.gguf"]);
    }
}

#[test]
fn a_run_killed_while_it_published_cannot_hurt_the_file() {
    let (c, dir) = (Checkpoint::new(), tempfile::tempdir().unwrap());
    let out = dir.path().join("out.gguf");
    tiny_to(&out, "--quiet").exits(0);
    let sum = sha256(&out);
    std::fs::hard_link(&out, part(&out)).unwrap(); // both names, as between link and unlink
    c.edit_tensor("model.norm.weight", |t| t.data[..2].copy_from_slice(&[0xc0, 0x7f]));
    convert(c.path(), &out, "--quiet --force").exits(3);
    assert_eq!((sha256(&out), names(dir.path())), (sum, vec!["out.gguf".to_string()]));
}

#[test]
fn an_input_that_changes_meanwhile() {
    let slow = Slow::start();
    let file = slow.input.file("model.safetensors");
    let time = std::fs::File::options().append(true).open(&file).unwrap();
    time.set_modified(std::time::SystemTime::now()).unwrap();
    // do not wait for the end of it: a shorter way is not needed where it takes seconds
    let (_, dir, ran) = slow.end();
    ran.exits(3).says("model.safetensors: changed while it was being read");
    assert!(names(dir.path()).is_empty());
}

#[test]
fn readers_that_go_away() {
    let tiny = fixture("tiny");
    let tiny = tiny.to_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    // standard output: no failure, whatever prints
    for args in [vec!["--list-types"], vec!["plan", tiny], vec!["plan", tiny, "--json"], vec!["inspect", tiny]] {
        let mut child = command(&args).spawn().unwrap();
        drop(child.stdout.take());
        Ran::from(child.wait_with_output().unwrap()).exits(0);
    }
    // standard error: the conversion goes on
    let mut child = command([tiny, out.to_str().unwrap()]).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(Ran::from(child.wait_with_output().unwrap()).code, 0);
    assert!(out.exists());
    let mut child = command(["plan", "/no/such/folder"]).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(Ran::from(child.wait_with_output().unwrap()).code, 3);
    run(["plan", "/no/such/folder"]).exits(3).says("/no/such/folder");
}
