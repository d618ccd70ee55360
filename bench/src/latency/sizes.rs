//! Sizes of rows on the command line: one, or a sweep that doubles.

use std::str::FromStr;

use anyhow::{Result, ensure};

/// Bytes of an element: the least row.
const ELEMENT: u32 = 4;
/// Bytes of the greatest row.
const GREATEST: u32 = 1 << 20;

/// A size, or a sweep from one to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// So many bytes.
    One(u32),
    /// The first, doubled until the second is passed.
    Sweep(u32, u32),
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |digits: &str| {
            let number = digits.parse().ok().filter(|number| (1..=GREATEST).contains(number));
            number.ok_or_else(|| {
                format!("`{digits}` is no size: write 4 to {GREATEST}, or a sweep as in 2..65536")
            })
        };
        match text.split_once("..") {
            None => Ok(Sizes::One(number(text)?)),
            Some((first, last)) => match (number(first)?, number(last)?) {
                (first, last) if first <= last => Ok(Sizes::Sweep(first, last)),
                _ => Err(format!("`{text}` goes down: write the smaller size first")),
            },
        }
    }
}

/// All sizes in order; `default` if there are none. A sweep leaves out what no row can have.
///
/// # Errors
/// A single size that no row can have, or a sweep in which there is none.
pub fn expand(sizes: &[Sizes], default: &[u32]) -> Result<Vec<u32>> {
    let fits = |size: &u32| size.is_multiple_of(ELEMENT);
    let mut all = Vec::new();
    for sizes in sizes {
        match *sizes {
            Sizes::One(size) => {
                ensure!(
                    fits(&size),
                    "--size {size}: an element has {ELEMENT} bytes, so write a multiple of {ELEMENT}"
                );
                all.push(size);
            }
            Sizes::Sweep(first, last) => {
                let doubled = std::iter::successors(Some(first), |size| size.checked_mul(2));
                let before = all.len();
                all.extend(doubled.take_while(|size| *size <= last).filter(fits));
                ensure!(
                    all.len() > before,
                    "--size {first}..{last}: none of its sizes is a multiple of {ELEMENT}, the bytes of an element"
                );
            }
        }
    }
    Ok(if all.is_empty() { default.to_vec() } else { all })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_doubles_and_leaves_out_what_no_row_has() {
        let sizes = |texts: &[&str]| {
            let parsed: Vec<Sizes> = texts.iter().map(|text| text.parse().unwrap()).collect();
            expand(&parsed, &[64])
        };
        assert_eq!(sizes(&[]).unwrap(), [64]);
        assert_eq!(sizes(&["2..64"]).unwrap(), [4, 8, 16, 32, 64]);
        assert_eq!(sizes(&["12", "100..500"]).unwrap(), [12, 100, 200, 400]);
        assert_eq!(sizes(&["2..65536"]).unwrap().len(), 15);
        assert!(sizes(&["63"]).unwrap_err().to_string().contains("--size 63: an element has 4 bytes"));
        assert!(sizes(&["1..2"]).unwrap_err().to_string().contains("--size 1..2: none"));
        for bad in ["0", "x", "64..8", "8..", "2000000"] {
            assert!(bad.parse::<Sizes>().is_err(), "{bad}");
        }
    }
}
