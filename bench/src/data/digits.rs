//! The built-in data: 1797 pictures of handwritten digits, 8 x 8 pixels of intensity 0 to 16.
//!
//! Each picture is a row, each pixel a column, each intensity a rating (`bench/data/README.md` has the notice).
//! The digit that a picture shows is the 65th field of its line; it is no rating.

use std::io::Read as _;

use super::{Rating, Ratings};

/// Pixels along one side of a picture.
pub const SIDE: usize = 8;
/// Pixels of a picture.
pub const PIXELS: usize = SIDE * SIDE;

const FILE: &[u8] = include_bytes!("../../data/digits.csv.gz");

/// A picture and the digit it shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// Intensities, row by row, 0 to 16.
    pub pixels: [f32; PIXELS],
    /// What it shows, 0 to 9.
    pub digit: u8,
}

/// All pictures, in the order of the file.
pub fn pictures() -> Vec<Picture> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(FILE).read_to_string(&mut text).expect("the built-in file is sound");
    text.lines().map(picture).collect()
}

fn picture(line: &str) -> Picture {
    let mut fields =
        line.split(',').map(|field| field.parse::<u8>().expect("the built-in file has integers"));
    let pixels = std::array::from_fn(|_| f32::from(fields.next().expect("64 pixels")));
    Picture { pixels, digit: fields.next().expect("a 65th field") }
}

/// The pictures as a matrix: every pixel of every picture is a rating.
pub fn ratings() -> Ratings {
    let pictures = pictures();
    let entries = (0..)
        .zip(&pictures)
        .flat_map(|(row, picture)| {
            (0..).zip(picture.pixels).map(move |(column, value)| Rating { row, column, value })
        })
        .collect();
    Ratings {
        source: "handwritten digits (built in)".into(),
        rows: pictures.len() as u32,
        columns: PIXELS as u32,
        entries,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digits_are_all_there() {
        let ratings = ratings();
        assert_eq!((ratings.rows, ratings.columns, ratings.entries.len()), (1797, 64, 115_008));
        assert!(ratings.entries.iter().all(|e| (0.0..=16.0).contains(&e.value)));
        // The first line of the file: 0,0,5,13,9,1,...
        assert_eq!(ratings.entries[3], Rating { row: 0, column: 3, value: 13.0 });
        let pictures = pictures();
        assert_eq!(pictures[1].digit, 1);
        assert!((0..10).all(|digit| pictures.iter().any(|p| p.digit == digit)));
    }
}
