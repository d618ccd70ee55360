//! The convergence curves of several runs, as SVG: loss against time, and loss against epochs.
//!
//! The first shows what a model gains altogether, the second what its staleness costs in each pass.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, anyhow, ensure};
use plotters::{
    prelude::{
        ChartBuilder, DrawingArea, IntoDrawingArea as _, LineSeries, PathElement, RGBColor, SVGBackend,
        SeriesLabelPosition, Text, WHITE,
    },
    style::{Color as _, IntoFont as _, ShapeStyle},
};

use crate::mf::{Report, report::Epoch};

/// Okabe and Ito's colours, which are told apart with any kind of sight.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];
const SIZE: (u32, u32) = (1120, 480);
const FONT: &str = "sans-serif";

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
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let data = &reports[0].data;
        let title = format!(
            "{}: {} ratings of {} x {}, rank {}",
            data.source, data.ratings, data.rows, data.columns, reports[0].rank
        );
        root.draw(&Text::new(title, (24, 12), (FONT, 18).into_font())).map_err(failed)?;
        let (left, right) = root.margin(40, 8, 8, 16).split_horizontally(SIZE.0 / 2);
        panel(&left, reports, "seconds", |epoch| epoch.seconds)?;
        panel(&right, reports, "epochs", |epoch| epoch.epoch as f64)?;
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw the curves: {error}")
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    reports: &[Report],
    unit: &str,
    x: fn(&Epoch) -> f64,
) -> Result<()> {
    let epochs = || reports.iter().flat_map(|report| &report.epochs);
    let last = epochs().map(x).fold(0.0, f64::max);
    // A loss of exactly 0 has no place on a logarithmic axis. The axis is a plain one of logarithms: its
    // marks are evenly spaced, however few powers of ten there are.
    let logarithms = || epochs().filter(|epoch| epoch.loss > 0.0).map(|epoch| epoch.loss.log10());
    let most = logarithms().fold(f64::NEG_INFINITY, f64::max);
    let least = logarithms().fold(f64::INFINITY, f64::min);
    ensure!(least.is_finite(), "no loss is above 0: there is no curve to draw");
    let margin = 0.05 * (most - least).max(0.1);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(44)
        .y_label_area_size(84)
        .build_cartesian_2d(0.0..last.max(1e-3) * 1.02, least - margin..most + margin)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc(unit)
        .y_desc("loss (sum of squared errors)")
        .axis_desc_style((FONT, 15))
        .label_style((FONT, 13))
        .x_labels(6)
        .x_label_formatter(&|x| format!("{}", (x * 1e4).round() / 1e4))
        .y_labels(8)
        .y_label_formatter(&|logarithm| format!("{:.1e}", 10f64.powf(*logarithm)))
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for (report, colour) in reports.iter().zip(COLOURS.iter().cycle()) {
        let style: ShapeStyle = colour.stroke_width(2);
        let points =
            report.epochs.iter().filter(|epoch| epoch.loss > 0.0).map(|epoch| (x(epoch), epoch.loss.log10()));
        chart
            .draw_series(LineSeries::new(points, style))
            .map_err(failed)?
            .label(report.title())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font((FONT, 14))
        .background_style(WHITE)
        .border_style(RGBColor(190, 190, 190))
        .draw()
        .map_err(failed)?;
    Ok(())
}
