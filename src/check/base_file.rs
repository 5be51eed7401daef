//! Files of log-probabilities, as `llama-perplexity --kl-divergence-base FILE` writes them.
//!
//! Little-endian: `_logits_`, n_ctx (u32), n_vocab (i32), n_chunk (i32), n_chunk x n_ctx tokens (i32), then a row
//! ([`super::base_row`]) for each scored position of each window ([`super::windows`]). The tokens are those of the text; where
//! the vocabulary asks for BOS, it replaces the first of each window during evaluation only.
//!
//! Files are gigabytes, so they are read and written window by window. A reader compares the length that the header
//! promises with that of the file before it allocates anything by it. The writer is in [`super::base_writer`].

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::base_row::{self, BaseRow};
use super::stats::{self, Position};
use super::windows::{Windows, scored};
use super::{CheckError, LogitsError};

pub(super) const MAGIC: &[u8; 8] = b"_logits_";
const HEADER: u64 = 20;

/// What stands in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub n_ctx: usize,
    pub n_vocab: usize,
    pub n_chunks: usize,
}

impl Header {
    /// Bytes of the rows of one window, and of the file; `None` if no file can be as long.
    pub(super) fn lengths(&self) -> Option<(u64, u64)> {
        let row = u64::try_from(base_row::units(self.n_vocab)?).ok()?.checked_mul(2)?;
        let rows = row.checked_mul(scored(self.n_ctx) as u64)?;
        let window = rows.checked_add((self.n_ctx as u64).checked_mul(4)?)?;
        Some((rows, window.checked_mul(self.n_chunks as u64)?.checked_add(HEADER)?))
    }

    /// Reads and checks the 20 bytes in front; `len` is the length of the file.
    fn parse(bytes: &[u8; HEADER as usize], len: u64) -> Result<Header, String> {
        if !bytes.starts_with(MAGIC) {
            return Err("not a file of log-probabilities: it does not begin with `_logits_`. \
                        `llama-perplexity --kl-divergence-base` writes such files"
                .into());
        }
        let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let positive = |name: &str, v: u32| match i32::try_from(v) {
            Ok(v) if v > 0 => Ok(v as usize),
            _ => Err(format!("{name} is {}: the header is damaged", v as i32)),
        };
        let header = Header {
            n_ctx: positive("n_ctx", field(8))?,
            n_vocab: positive("n_vocab", field(12))?,
            n_chunks: positive("n_chunk", field(16))?,
        };
        if scored(header.n_ctx) == 0 {
            return Err(format!("n_ctx is {}: windows of that length have no scored position", header.n_ctx));
        }
        let says = format!("{} windows of {} tokens, {} words", header.n_chunks, header.n_ctx, header.n_vocab);
        match header.lengths() {
            Some((_, want)) if want == len => Ok(header),
            Some((rows, want)) if len < want => {
                let front = HEADER + 4 * (header.n_ctx * header.n_chunks) as u64;
                let whole = len.saturating_sub(front) / rows;
                Err(format!(
                    "truncated: {says} make {want} bytes, the file has {len}, which is {whole} whole windows. \
                     Was its writer interrupted? Write it again"
                ))
            }
            Some((_, want)) => Err(format!("{} bytes too long: {says} make {want} bytes", len - want)),
            None => Err(format!("{says}: no file is that long; the header is damaged")),
        }
    }
}

/// A file of log-probabilities, open for reading.
pub struct BaseFile {
    path: PathBuf,
    input: BufReader<File>,
    header: Header,
    windows: Windows,
    tokens: Vec<i32>,
    /// The next window.
    at: usize,
}

/// The rows of one window. Reuse it: it is tens of megabytes.
#[derive(Clone, Debug, Default)]
pub struct Chunk {
    /// Which window.
    pub index: usize,
    /// Its tokens, n_ctx of them.
    pub tokens: Vec<i32>,
    units: Vec<u16>,
    n_vocab: usize,
}

impl BaseFile {
    /// Opens a file and reads its header and tokens.
    ///
    /// Errors: not such a file, shorter or longer than its header says, tokens outside the vocabulary.
    pub fn open(path: &Path) -> Result<BaseFile, CheckError> {
        let io = |e| CheckError::io(path, e);
        let refuse = |why: String| CheckError::file(path, why);
        let meta = std::fs::metadata(path).map_err(io)?;
        if !meta.is_file() {
            return Err(refuse(format!(
                "{}, not a file",
                if meta.is_dir() { "a folder" } else { "a device or a pipe" }
            )));
        }
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut input = BufReader::with_capacity(1 << 20, file);
        let mut bytes = [0; HEADER as usize];
        if len < HEADER {
            return Err(refuse(format!("{len} bytes are not even a header of {HEADER}")));
        }
        read(&mut input, &mut bytes, path)?;
        let header = Header::parse(&bytes, len).map_err(refuse)?;
        // the length of the file bounds all three
        let mut tokens = vec![0i32; header.n_ctx * header.n_chunks];
        read(&mut input, bytemuck::cast_slice_mut(&mut tokens), path)?;
        tokens.iter_mut().for_each(|t| *t = i32::from_le(*t));
        if let Some(i) = tokens.iter().position(|&t| usize::try_from(t).map_or(true, |t| t >= header.n_vocab)) {
            let n_vocab = header.n_vocab;
            return Err(refuse(format!("token {i} is {}, the vocabulary has {n_vocab} words: damaged", tokens[i])));
        }
        let windows = if header.n_chunks == 1 {
            // llama-perplexity wants two windows of text; a file of one is made with `--chunks 1`
            Windows::new(2 * header.n_ctx, header.n_ctx, Some(1))
        } else {
            Windows::new(tokens.len(), header.n_ctx, None)
        }?;
        Ok(BaseFile { path: path.to_path_buf(), input, header, windows, tokens, at: 0 })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn n_vocab(&self) -> usize {
        self.header.n_vocab
    }

    /// The windows that the file covers.
    pub fn windows(&self) -> Windows {
        self.windows
    }

    /// The tokens of all windows, n_chunks x n_ctx.
    pub fn tokens(&self) -> &[i32] {
        &self.tokens
    }

    /// Refuses the file for a model of another vocabulary, or if the run asks for another context length.
    pub fn expect(&self, n_vocab: usize, n_ctx: Option<usize>) -> Result<(), CheckError> {
        if n_vocab != self.header.n_vocab {
            return Err(CheckError::file(
                &self.path,
                format!("made from a vocabulary of {} words, the model has {n_vocab}", self.header.n_vocab),
            ));
        }
        match n_ctx {
            Some(n) if n != self.header.n_ctx => Err(CheckError::file(
                &self.path,
                format!(
                    "made with windows of {} tokens, {n} are asked for; leave the context length out or take {}",
                    self.header.n_ctx, self.header.n_ctx
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Reads the next window into `chunk`; false after the last.
    pub fn read_chunk(&mut self, chunk: &mut Chunk) -> Result<bool, CheckError> {
        let Some(tokens) = self.windows.tokens(&self.tokens, self.at) else { return Ok(false) };
        let units = base_row::units(self.header.n_vocab).unwrap_or(0);
        chunk.index = self.at;
        chunk.n_vocab = self.header.n_vocab;
        chunk.tokens.clear();
        chunk.tokens.extend_from_slice(tokens);
        chunk.units.resize(units * self.windows.scored(), 0);
        read(&mut self.input, bytemuck::cast_slice_mut(&mut chunk.units), &self.path)?;
        chunk.units.iter_mut().for_each(|u| *u = u16::from_le(*u));
        for i in 0..self.windows.scored() {
            let Some(row) = chunk.row(i) else { continue };
            if !(row.scale.is_finite() && row.scale >= 0.0 && row.min_log_prob.is_finite()) {
                let why = format!(
                    "window {}, position {i}: scale {}, min_log_prob {}: ",
                    self.at, row.scale, row.min_log_prob
                );
                return Err(CheckError::file(&self.path, why + "the model that wrote it was broken, or the file is"));
            }
        }
        self.at += 1;
        Ok(true)
    }
}

/// Fills `bytes`; the file may have become shorter since it was opened.
fn read(input: &mut impl Read, bytes: &mut [u8], path: &Path) -> Result<(), CheckError> {
    input.read_exact(bytes).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => CheckError::file(path, "truncated while it was read"),
        _ => CheckError::io(path, e),
    })
}

impl Chunk {
    /// Scored position `i` of this window.
    pub fn row(&self, i: usize) -> Option<BaseRow<'_>> {
        let units = base_row::units(self.n_vocab)?;
        let start = i.checked_mul(units)?;
        BaseRow::new(self.units.get(start..start.checked_add(units)?)?, self.n_vocab)
    }

    /// Compares a model's logits at the scored positions of this window (positions x n_vocab) with the rows, on all
    /// threads of the pool; records in the order of the positions.
    pub fn compare(&self, logits: &[f32]) -> Result<Vec<Position>, LogitsError> {
        let next = self.tokens.get(self.tokens.len() / 2 + 1..).unwrap_or_default();
        stats::check_shape(logits.len(), self.n_vocab, next.len())?;
        let units = base_row::units(self.n_vocab).unwrap_or(1);
        let rows = self.units.par_chunks_exact(units).zip(logits.par_chunks_exact(self.n_vocab)).zip(next);
        stats::first_error(
            rows.map(|((units, logits), &next)| {
                let base = BaseRow::new(units, self.n_vocab).ok_or(LogitsError::Shape {
                    values: units.len(),
                    positions: 1,
                    n_vocab: self.n_vocab,
                })?;
                base_row::compare(base, logits, stats::token(next, self.n_vocab)?)
            })
            .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::base_writer::BaseWriter;
    use super::*;

    const N_VOCAB: usize = 11;

    fn logits(seed: usize, windows: Windows) -> Vec<f32> {
        (0..windows.scored() * N_VOCAB).map(|i| ((i * 7919 + seed * 31) % 97) as f32 * 0.3 - 10.0).collect()
    }

    fn write(path: &Path) -> (Windows, Vec<i32>) {
        let windows = Windows::new(27, 8, None).unwrap();
        let tokens: Vec<i32> = (0..27).map(|i| i % N_VOCAB as i32).collect();
        let mut writer = BaseWriter::create(path, windows, N_VOCAB, &tokens).unwrap();
        for i in 0..windows.n_chunks() {
            assert!(!path.exists());
            assert_eq!(writer.write_chunk(&logits(i, windows)).unwrap().len(), 3);
        }
        assert!(writer.write_chunk(&logits(0, windows)).is_err_and(|e| e.to_string().contains("more than its 3")));
        writer.finish().unwrap();
        (windows, tokens)
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let (windows, tokens) = write(&path);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 20 + 3 * 8 * 4 + 3 * 3 * 16 * 2);
        let mut file = BaseFile::open(&path).unwrap();
        assert_eq!((file.windows(), file.n_vocab(), file.tokens()), (windows, N_VOCAB, &tokens[..24]));
        let mut chunk = Chunk::default();
        for i in 0..3 {
            assert!(file.read_chunk(&mut chunk).unwrap());
            assert_eq!((chunk.index, &*chunk.tokens), (i, &tokens[8 * i..8 * i + 8]));
            let logits = logits(i, windows);
            let records = chunk.compare(&logits).unwrap();
            for (k, record) in records.iter().enumerate() {
                let (row, next) = (&logits[k * N_VOCAB..][..N_VOCAB], tokens[8 * i + 5 + k] as usize);
                assert_eq!(*record, base_row::compare(chunk.row(k).unwrap(), row, next).unwrap());
                assert!(record.kld.abs() < 1e-5 && record.same_top, "{record:?}");
            }
            assert_eq!(chunk.row(3), None);
            assert!(chunk.compare(&logits[1..]).is_err());
        }
        assert!(!file.read_chunk(&mut chunk).unwrap());
    }

    #[test]
    fn another_vocabulary_or_context_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        write(&path);
        let file = BaseFile::open(&path).unwrap();
        assert!(file.expect(11, None).is_ok() && file.expect(11, Some(8)).is_ok());
        let why = |v, c| file.expect(v, c).unwrap_err().to_string();
        assert!(
            why(12, None).ends_with("base: made from a vocabulary of 11 words, the model has 12"),
            "{}",
            why(12, None)
        );
        assert!(why(11, Some(512)).contains("windows of 8 tokens, 512 are asked for"));
    }

    #[test]
    fn damaged_files_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        write(&path);
        let good = std::fs::read(&path).unwrap();
        let open = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let mut file = BaseFile::open(&path)?;
            let mut chunk = Chunk::default();
            while file.read_chunk(&mut chunk)? {}
            Ok::<_, CheckError>(())
        };
        let with = |at: usize, bytes: &[u8]| {
            let mut copy = good.clone();
            copy[at..at + bytes.len()].copy_from_slice(bytes);
            copy
        };
        open(&good).unwrap();
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (vec![], "0 bytes are not even a header"),
            (good[..19].to_vec(), "19 bytes are not even a header"),
            (with(0, b"_LOGITS_"), "does not begin with `_logits_`"),
            (
                good[..good.len() - 1].to_vec(),
                "truncated: 3 windows of 8 tokens, 11 words make 404 bytes, the file has 403, which is 2 whole windows",
            ),
            (good[..100].to_vec(), "0 whole windows"),
            ([&good[..], &[0]].concat(), "1 bytes too long"),
            (with(8, &2u32.to_le_bytes()), "n_ctx is 2"),
            (with(8, &u32::MAX.to_le_bytes()), "n_ctx is -1"),
            (with(8, &i32::MAX.to_le_bytes()), "truncated"),
            (with(12, &i32::MAX.to_le_bytes()), "truncated"),
            (with(12, &(-5i32).to_le_bytes()), "n_vocab is -5"),
            (with(16, &0u32.to_le_bytes()), "n_chunk is 0"),
            (with(24, &11u32.to_le_bytes()), "token 1 is 11, the vocabulary has 11 words"),
            (with(24, &(-3i32).to_le_bytes()), "token 1 is -3"),
            (with(116 + 32, &f32::NAN.to_le_bytes()), "window 0, position 1: scale NaN"),
        ];
        for (bytes, text) in cases {
            let error = open(&bytes).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("base: "), "{error}\nhas not: {text}");
        }
        let all = [&good[..8], &[255, 255, 255, 127].repeat(3)].concat();
        assert!(open(&all).unwrap_err().to_string().contains("no file is that long"));
        assert!(BaseFile::open(dir.path()).is_err_and(|e| e.to_string().contains("a folder, not a file")));
        assert!(BaseFile::open(&dir.path().join("none")).is_err_and(|e| matches!(e, CheckError::Io { .. })));
    }

    #[test]
    fn random_damage_is_refused_or_read_but_never_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let (windows, _) = write(&path);
        let good = std::fs::read(&path).unwrap();
        let mut state = 7u64;
        let mut random = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        let (mut refused, mut read) = (0, 0);
        for _ in 0..1000 {
            let mut bytes = good.clone();
            for _ in 0..1 + random(3) {
                // often in front, where the numbers are
                let at = if random(6) == 0 { random(40) } else { random(bytes.len()) };
                bytes[at] = random(256) as u8;
            }
            bytes.truncate(if random(10) == 0 { random(bytes.len()) } else { bytes.len() });
            std::fs::write(&path, bytes).unwrap();
            let whole = BaseFile::open(&path).and_then(|mut file| {
                let mut chunk = Chunk::default();
                while file.read_chunk(&mut chunk)? {
                    // whatever stands in it, scoring ends with figures or with an error
                    let _ = chunk.compare(&logits(0, windows));
                }
                Ok(())
            });
            *if whole.is_ok() { &mut read } else { &mut refused } += 1;
        }
        assert!(refused > 200 && read > 200, "{refused} {read}");
    }
}
