//! The convergence curves of several runs, as SVG: loss against time, and loss against epochs.
//!
//! The first shows what a model gains altogether, the second what its staleness costs in each pass.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use plotters::{prelude::Text, style::IntoFont as _};

use crate::{
    figures::{Axis, Curve, FONT, failed, panel, svg},
    mf::{Report, report::Epoch},
};

const SIZE: (u32, u32) = (1120, 480);

/// Draws the curves of `reports` to the file at `path`.
///
/// # Errors
/// When there is nothing to draw, or the file cannot be written.
pub fn write(path: &Path, reports: &[Report]) -> Result<()> {
    fs::write(path, draw(reports)?).with_context(|| format!("cannot write {}", path.display()))
}

/// The curves of `reports` as SVG.
///
/// # Errors
/// When there is nothing to draw.
pub fn draw(reports: &[Report]) -> Result<String> {
    ensure!(
        reports.iter().any(|report| report.epochs.len() > 1),
        "no run has an epoch: there is no curve to draw"
    );
    let data = &reports[0].data;
    let title = format!(
        "{}: {} ratings of {} x {}, rank {}",
        data.source, data.ratings, data.rows, data.columns, reports[0].rank
    );
    let curves = |x: fn(&Epoch) -> f64| -> Vec<Curve> {
        let points =
            |report: &Report| report.epochs.iter().map(|epoch| (x(epoch), epoch.loss)).collect::<Vec<_>>();
        reports.iter().map(|report| Curve::new(report.title(), points(report))).collect()
    };
    let loss = Axis::logarithmic("loss (sum of squared errors)");
    svg(SIZE, |area| {
        area.draw(&Text::new(title, (24, 12), (FONT, 18).into_font())).map_err(failed)?;
        let (left, right) = area.margin(40, 8, 8, 16).split_horizontally(SIZE.0 / 2);
        panel(&left, Axis::even("seconds"), loss, &curves(|epoch| epoch.seconds))?;
        panel(&right, Axis::even("epochs"), loss, &curves(|epoch| epoch.epoch as f64))
    })
}
