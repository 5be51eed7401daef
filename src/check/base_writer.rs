//! Writes files of log-probabilities as llama-perplexity does, window by window; see [`super::base_file`].
//!
//! The work is done on `FILE.ostq-part`; the file gets its name when all rows are there and synced.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::base_file::{Header, MAGIC};
use super::base_row;
use super::stats;
use super::windows::Windows;
use super::{CheckError, LogitsError};

/// A file of log-probabilities that is being written. Dropped before [`BaseWriter::finish`], it leaves nothing.
pub struct BaseWriter {
    path: PathBuf,
    part: PathBuf,
    output: Option<BufWriter<File>>,
    windows: Windows,
    tokens: Vec<i32>,
    n_vocab: usize,
    /// The next window.
    at: usize,
    units: Vec<u16>,
}

impl BaseWriter {
    /// Begins `path`, which is replaced at the end if it is there. `tokens` are those of the text; the first
    /// n_chunks x n_ctx of them are used.
    ///
    /// Errors: fewer tokens, tokens outside the vocabulary, sizes beyond the format.
    pub fn create(path: &Path, windows: Windows, n_vocab: usize, tokens: &[i32]) -> Result<BaseWriter, CheckError> {
        let header = Header { n_ctx: windows.n_ctx(), n_vocab, n_chunks: windows.n_chunks() };
        let small = [header.n_ctx, header.n_vocab, header.n_chunks].map(|n| i32::try_from(n).ok());
        let ([Some(n_ctx), Some(words), Some(n_chunk)], Some(_)) = (small, header.lengths()) else {
            return Err(CheckError::file(path, "context, vocabulary or text beyond what the format holds"));
        };
        let wanted = header.n_ctx * header.n_chunks;
        let Some(tokens) = tokens.get(..wanted) else {
            return Err(CheckError::Text(format!("{} tokens for windows of {wanted}", tokens.len())));
        };
        if let Some(&token) = tokens.iter().find(|&&t| usize::try_from(t).map_or(true, |t| t >= n_vocab)) {
            return Err(LogitsError::Token { next: token as u32 as usize, n_vocab }.into());
        }
        let mut part = path.as_os_str().to_owned();
        part.push(".ostq-part");
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(|e| CheckError::io(&part, e))?;
        let mut writer = BaseWriter {
            path: path.to_path_buf(),
            part,
            output: Some(BufWriter::with_capacity(1 << 20, file)),
            windows,
            tokens: tokens.to_vec(),
            n_vocab,
            at: 0,
            units: Vec::new(),
        };
        writer.put(MAGIC)?;
        for word in [n_ctx, words, n_chunk] {
            writer.put(&word.to_le_bytes())?;
        }
        let tokens: Vec<u8> = writer.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        writer.put(&tokens)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), CheckError> {
        let output = self.output.as_mut().expect("open until it is finished");
        output.write_all(bytes).map_err(|e| CheckError::io(&self.part, e))
    }

    /// Writes the next window from the logits at its scored positions (positions x n_vocab), encoded on all threads of
    /// the pool. Gives -ln P of the tokens that follow, nats.
    pub fn write_chunk(&mut self, logits: &[f32]) -> Result<Vec<f64>, CheckError> {
        let Some(window) = self.windows.tokens(&self.tokens, self.at) else {
            return Err(CheckError::file(&self.path, format!("more than its {} windows", self.windows.n_chunks())));
        };
        let (n_vocab, next) = (self.n_vocab, self.windows.next(window));
        stats::check_shape(logits.len(), n_vocab, next.len())?;
        let units = base_row::units(n_vocab).unwrap_or(1);
        let mut rows = std::mem::take(&mut self.units);
        rows.resize(units * next.len(), 0);
        let work = rows.par_chunks_exact_mut(units).zip(logits.par_chunks_exact(n_vocab)).zip(next);
        let nll = stats::first_error(
            work.map(|((row, logits), &next)| base_row::encode(logits, stats::token(next, n_vocab)?, row)).collect(),
        )?;
        rows.iter_mut().for_each(|u| *u = u.to_le());
        self.put(bytemuck::cast_slice(&rows))?;
        self.units = rows;
        self.at += 1;
        Ok(nll)
    }

    /// Syncs the file and gives it its name.
    ///
    /// Errors: windows are missing.
    pub fn finish(mut self) -> Result<(), CheckError> {
        let n = self.windows.n_chunks();
        if self.at != n {
            return Err(CheckError::file(&self.path, format!("only {} of its {n} windows were written", self.at)));
        }
        let Some(output) = self.output.take() else { return Ok(()) };
        let synced = output.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all());
        let named = synced.and_then(|()| std::fs::rename(&self.part, &self.path));
        named.map_err(|e| {
            let _ = std::fs::remove_file(&self.part);
            CheckError::io(&self.path, e)
        })
    }
}

impl Drop for BaseWriter {
    fn drop(&mut self) {
        if self.output.take().is_some() {
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N_VOCAB: usize = 11;

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let windows = Windows::new(27, 8, None).unwrap();
        let mut writer = BaseWriter::create(&path, windows, N_VOCAB, &[1; 24]).unwrap();
        assert!(writer.write_chunk(&[f32::NAN; 33]).is_err_and(|e| e.to_string().contains("word 0 is NaN")));
        assert!(writer.write_chunk(&[0.0; 34]).is_err());
        writer.write_chunk(&[0.0; 33]).unwrap();
        assert!(writer.finish().is_err_and(|e| e.to_string().contains("only 1 of its 3 windows")));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(BaseWriter::create(&path, windows, N_VOCAB, &[1; 23]).is_err());
        assert!(BaseWriter::create(&path, windows, N_VOCAB, &[11; 24]).is_err());
    }
}
