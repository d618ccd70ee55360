//! Learned factors of the digits as pictures, as SVG.
//!
//! A column factor has `rank` numbers for each pixel; number `k` of all pixels is a picture. Blue is
//! negative, red positive. Any invertible mixture of the factors explains the ratings as well, so single ones need not look
//! like anything. Whether they are any good is seen below them: each of the digits as it is, and as the nearest
//! point of what the factors span.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use crate::data::digits::{self, PIXELS, Picture, SIDE};

/// Side of a pixel.
const PIXEL: usize = 9;
/// Side of a picture and the gap to the next.
const PITCH: usize = SIDE * PIXEL + 12;
/// Pictures in a line.
const LINE: usize = 10;
const MARGIN: usize = 24;
const TEXT: usize = 34;

/// Draws the `factors` (of each pixel, `rank` numbers) to the file at `path`.
///
/// # Errors
/// When they are not those of pictures, or the file cannot be written.
pub fn write(path: &Path, factors: &[f32], rank: usize, title: &str) -> Result<()> {
    fs::write(path, draw(factors, rank, title)?).with_context(|| format!("cannot write {}", path.display()))
}

/// The `factors` as SVG.
///
/// # Errors
/// When they are not those of pictures.
pub fn draw(factors: &[f32], rank: usize, title: &str) -> Result<String> {
    ensure!(
        factors.len() == PIXELS * rank,
        "{} numbers are not {rank} factors of {PIXELS} pixels: only those of the digits are pictures",
        factors.len()
    );
    let mut drawing = Drawing::default();
    drawing.heading(&format!("{title}: the {rank} learned factors (blue: negative, red: positive)"));
    for k in 0..rank {
        let picture: Vec<f64> = factors.iter().skip(k).step_by(rank).map(|&x| x.into()).collect();
        let most = picture.iter().fold(f64::MIN_POSITIVE, |most, x| most.max(x.abs()));
        drawing.picture(k % LINE, picture.iter().map(|x| diverging(x / most)));
        if k % LINE == LINE - 1 || k == rank - 1 {
            drawing.next_line();
        }
    }
    let pictures = digits::pictures();
    let samples: Vec<&Picture> =
        (0..10).filter_map(|digit| pictures.iter().find(|picture| picture.digit == digit)).collect();
    drawing.heading("Ten of the digits");
    for (place, sample) in samples.iter().enumerate() {
        drawing.picture(place, sample.pixels.iter().map(|&x| ink(f64::from(x) / 16.0)));
    }
    drawing.next_line();
    drawing.heading("The same, as the factors can render them");
    for (place, sample) in samples.iter().enumerate() {
        let rendered = project(factors, rank, &sample.pixels);
        drawing.picture(place, rendered.iter().map(|x| ink(x / 16.0)));
    }
    drawing.next_line();
    Ok(drawing.finish())
}

/// An SVG that grows downwards.
#[derive(Default)]
struct Drawing {
    body: String,
    height: usize,
}

impl Drawing {
    fn heading(&mut self, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        self.height += TEXT;
        let y = self.height - 12;
        writeln!(self.body, r#"<text x="{MARGIN}" y="{y}">{text}</text>"#)
            .expect("a String takes everything");
    }

    fn picture(&mut self, place: usize, colours: impl Iterator<Item = (u8, u8, u8)>) {
        for (pixel, (r, g, b)) in colours.enumerate() {
            let x = MARGIN + place * PITCH + pixel % SIDE * PIXEL;
            let y = self.height + pixel / SIDE * PIXEL;
            writeln!(
                self.body,
                r##"<rect x="{x}" y="{y}" width="{PIXEL}" height="{PIXEL}" fill="#{r:02x}{g:02x}{b:02x}"/>"##
            )
            .expect("a String takes everything");
        }
    }

    fn next_line(&mut self) {
        self.height += PITCH;
    }

    fn finish(self) -> String {
        let (width, height) = (2 * MARGIN + LINE * PITCH - 12, self.height + MARGIN / 2);
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="16" shape-rendering="crispEdges">
<rect width="100%" height="100%" fill="#ffffff"/>
{}</svg>
"##,
            self.body
        )
    }
}

fn mix(from: (f64, f64, f64), to: (f64, f64, f64), part: f64) -> (u8, u8, u8) {
    let part = part.clamp(0.0, 1.0);
    let mix = |from: f64, to: f64| (from + (to - from) * part).round() as u8;
    (mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

/// -1 is blue, 0 light grey, 1 red.
fn diverging(value: f64) -> (u8, u8, u8) {
    let middle = (242.0, 242.0, 242.0);
    mix(middle, if value < 0.0 { (5.0, 80.0, 160.0) } else { (178.0, 24.0, 43.0) }, value.abs())
}

/// 0 is paper, 1 ink.
fn ink(value: f64) -> (u8, u8, u8) {
    mix((242.0, 242.0, 242.0), (20.0, 20.0, 20.0), value)
}

/// The point nearest to `pixels` among the combinations of the factors: solves the normal equations of least
/// squares. A millionth of the largest square is added to the diagonal, so that factors that depend on
/// each other have a solution too.
fn project(factors: &[f32], rank: usize, pixels: &[f32]) -> Vec<f64> {
    let rows: Vec<Vec<f64>> =
        factors.chunks(rank).map(|row| row.iter().map(|&x| x.into()).collect()).collect();
    let mut matrix = vec![vec![0.0; rank]; rank];
    let mut right = vec![0.0; rank];
    for (row, &pixel) in rows.iter().zip(pixels) {
        for i in 0..rank {
            right[i] += row[i] * f64::from(pixel);
            for j in 0..rank {
                matrix[i][j] += row[i] * row[j];
            }
        }
    }
    let largest = (0..rank).map(|i| matrix[i][i]).fold(f64::MIN_POSITIVE, f64::max);
    (0..rank).for_each(|i| matrix[i][i] += 1e-6 * largest);
    let weights = solve(matrix, right);
    rows.iter().map(|row| row.iter().zip(&weights).map(|(a, b)| a * b).sum()).collect()
}

/// Solves a positive definite system by elimination, which needs no pivoting there.
fn solve(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let size = right.len();
    for pivot in 0..size {
        let (above, below) = matrix.split_at_mut(pivot + 1);
        let above = &above[pivot];
        for (offset, row) in below.iter_mut().enumerate() {
            let factor = row[pivot] / above[pivot];
            row.iter_mut().zip(above).skip(pivot).for_each(|(x, above)| *x -= factor * above);
            right[pivot + 1 + offset] -= factor * right[pivot];
        }
    }
    for row in (0..size).rev() {
        let known: f64 = (row + 1..size).map(|column| matrix[row][column] * right[column]).sum();
        right[row] = (right[row] - known) / matrix[row][row];
    }
    right
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_is_solved() {
        let solution = solve(vec![vec![4.0, 1.0], vec![1.0, 3.0]], vec![1.0, 2.0]);
        assert!((solution[0] - 1.0 / 11.0).abs() < 1e-12 && (solution[1] - 7.0 / 11.0).abs() < 1e-12);
    }

    #[test]
    fn what_the_factors_span_is_rendered_as_it_is() {
        // Two factors, and a third that is their sum.
        let column = |pixel: usize| [pixel as f32 / 64.0, (pixel % 8) as f32, 0.0];
        let factors: Vec<f32> = (0..PIXELS).map(column).flat_map(|[a, b, _]| [a, b, a + b]).collect();
        let pixels: Vec<f32> = (0..PIXELS).map(column).map(|[a, b, _]| 3.0 * a + 0.5 * b).collect();
        for (rendered, pixel) in project(&factors, 3, &pixels).iter().zip(&pixels) {
            assert!((rendered - f64::from(*pixel)).abs() < 1e-3, "{rendered}, not {pixel}");
        }
    }

    #[test]
    fn a_drawing_has_every_pixel_and_the_text() {
        let factors: Vec<f32> = (0..PIXELS * 12).map(|i| (i as f32).sin()).collect();
        let svg = draw(&factors, 12, "a < b").unwrap();
        assert_eq!(svg.matches("<rect x=").count(), PIXELS * (12 + 10 + 10));
        assert!(svg.contains("a &lt; b") && svg.contains("12 learned factors"));
        assert!(draw(&factors, 13, "").unwrap_err().to_string().contains("only those of the digits"));
    }
}
