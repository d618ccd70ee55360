//! Ratings: a sparse matrix of rows, columns and values, from a file, from the built-in digits, or generated.
//!
//! What comes out is the same for every process of a job that was given the same source, entry for entry:
//! the processes never send each other ratings, each one takes its own share of the same list.

use std::{fmt, path::PathBuf};

pub mod digits;
pub mod generate;
pub mod lines;
pub mod parse;

pub use generate::Planted;

/// One known entry of the matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rating {
    /// Row, counted from 0: a user, a picture.
    pub row: u32,
    /// Column, counted from 0: a film, a pixel.
    pub column: u32,
    /// The value.
    pub value: f32,
}

/// A sparse matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Ratings {
    /// Where it came from and how it was understood, for people.
    pub source: String,
    /// Number of rows.
    pub rows: u32,
    /// Number of columns.
    pub columns: u32,
    /// The known entries, in the order of the source.
    pub entries: Vec<Rating>,
}

impl Ratings {
    /// Sum of the squares of all values: the loss of a model that answers 0 to everything.
    pub fn sum_of_squares(&self) -> f64 {
        self.entries.iter().map(|e| f64::from(e.value) * f64::from(e.value)).sum()
    }

    /// Root of the mean square of the values.
    pub fn root_mean_square(&self) -> f64 {
        (self.sum_of_squares() / self.entries.len().max(1) as f64).sqrt()
    }
}

impl fmt::Display for Ratings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ratings of {} x {}", self.source, self.entries.len(), self.rows, self.columns)
    }
}

/// Where ratings come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// A file, of a format recognised by its content.
    File(PathBuf),
    /// The built-in pictures of handwritten digits.
    Digits,
    /// Made up around planted factors.
    Planted(Planted),
}

impl Source {
    /// Reads or makes the ratings; `seed` matters to those that are made up.
    ///
    /// # Errors
    /// A file that cannot be read or understood.
    pub fn load(&self, seed: u64) -> Result<Ratings, DataError> {
        match self {
            Source::File(path) => parse::file(path),
            Source::Digits => Ok(digits::ratings()),
            Source::Planted(planted) => Ok(planted.ratings(seed)),
        }
    }
}

/// Why ratings could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file cannot be opened or read.
    #[error("{path}: {reason}")]
    Read {
        /// The file.
        path: String,
        /// What the system or the decompressor said.
        reason: std::io::Error,
    },
    /// A line cannot be understood.
    #[error("{path}:{line}: {reason}; the line is `{content}`")]
    Line {
        /// The file.
        path: String,
        /// Line number, counted from 1.
        line: u64,
        /// The line, shortened.
        content: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// The file as a whole is no matrix that can be used.
    #[error("{path}: {reason}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}
