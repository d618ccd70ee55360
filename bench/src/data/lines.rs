//! Reading a file line by line, plain or gzip, such that an error can show the line.

use std::io::{BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use super::DataError;

/// Longest part of a line that an error shows, in characters.
const SHOWN: usize = 80;

/// The lines of a file, with what an error message needs.
pub struct Lines<'a> {
    name: &'a str,
    /// `plain` or `gzip`.
    pub packing: &'static str,
    input: Box<dyn BufRead + 'a>,
    number: u64,
    /// The line, without its end.
    pub bytes: Vec<u8>,
}

impl<'a> Lines<'a> {
    /// The lines of `input`, unpacked if it begins like gzip; errors call it `name`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn new(name: &'a str, input: impl Read + 'a) -> Result<Self, DataError> {
        let mut input = BufReader::with_capacity(1 << 16, input);
        let start = input.fill_buf().map_err(|reason| DataError::Read { path: name.into(), reason })?;
        let (packing, input): (_, Box<dyn BufRead + 'a>) = match start.starts_with(&[0x1f, 0x8b]) {
            true => ("gzip", Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(input)))),
            false => ("plain", Box::new(input)),
        };
        Ok(Lines { name, packing, input, number: 0, bytes: Vec::new() })
    }

    /// Goes to the next line; false at the end of the file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn advance(&mut self) -> Result<bool, DataError> {
        self.bytes.clear();
        let read = self.input.read_until(b'\n', &mut self.bytes);
        if read.map_err(|reason| DataError::Read { path: self.name.into(), reason })? == 0 {
            return Ok(false);
        }
        self.number += 1;
        while matches!(self.bytes.last(), Some(b'\n' | b'\r')) {
            self.bytes.pop();
        }
        if self.number == 1 && self.bytes.starts_with("\u{feff}".as_bytes()) {
            self.bytes.drain(..3);
        }
        Ok(true)
    }

    /// Goes to the next line that has more in it than blanks or a comment.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn advance_to_data(&mut self) -> Result<bool, DataError> {
        while self.advance()? {
            if !matches!(self.bytes.trim_ascii_start().first(), None | Some(b'#' | b'%')) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The line, without its end and surrounding blanks.
    ///
    /// # Errors
    /// It is not UTF-8.
    pub fn text(&self) -> Result<&str, DataError> {
        let text = std::str::from_utf8(&self.bytes).map_err(|_| self.error("it is not UTF-8 text"))?;
        Ok(text.trim())
    }

    /// What errors call the file.
    pub fn name(&self) -> &str {
        self.name
    }

    /// An error in this line.
    pub fn error(&self, reason: impl Into<String>) -> DataError {
        let text = String::from_utf8_lossy(&self.bytes);
        let mut content: String = text
            .chars()
            .map(|c| {
                if c == '\t' {
                    ' '
                } else if c.is_control() {
                    '\u{fffd}'
                } else {
                    c
                }
            })
            .take(SHOWN)
            .collect();
        if text.chars().nth(SHOWN).is_some() {
            content.push('…');
        }
        DataError::Line { path: self.name.into(), line: self.number, content, reason: reason.into() }
    }

    /// An error in the file as a whole.
    pub fn whole(&self, reason: impl Into<String>) -> DataError {
        DataError::Content { path: self.name.into(), reason: reason.into() }
    }
}
