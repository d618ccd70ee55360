//! Curves and bars as SVG.

use std::ops::Range;

use anyhow::{Result, anyhow, ensure};
use plotters::{
    chart::ChartContext,
    coord::{Shift, types::RangedCoordf64},
    prelude::{
        Cartesian2d, ChartBuilder, DrawingArea, IntoDrawingArea as _, LineSeries, PathElement, RGBColor,
        Rectangle, SVGBackend, SeriesLabelPosition, WHITE,
    },
    style::{Color as _, ShapeStyle},
};

/// Okabe and Ito's colours, which are told apart with any kind of sight.
const COLOURS: [RGBColor; 9] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(120, 120, 120),
    RGBColor(0, 0, 0),
    RGBColor(240, 228, 66),
];
const SIZE: (u32, u32) = (720, 400);
/// What text is written with.
pub const FONT: &str = "sans-serif";

/// A curve.
#[derive(Debug, Clone)]
pub struct Curve {
    /// Its name.
    pub name: String,
    /// Its points, by x.
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// A curve.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        Self { name: name.into(), points: points.into_iter().collect() }
    }
}

/// Bars: of each group one of each kind, side by side or, if they are parts of a whole, one upon the other.
#[derive(Debug, Clone)]
pub struct Bars {
    /// Names of the kinds.
    pub kinds: Vec<String>,
    /// Name of each group, and its values.
    pub groups: Vec<(String, Vec<f64>)>,
    /// One upon the other.
    pub stacked: bool,
}

/// What an axis shows.
#[derive(Debug, Clone, Copy)]
pub struct Axis<'a> {
    /// What it counts.
    pub name: &'a str,
    /// Whether it is one of logarithms.
    pub logarithmic: bool,
}

impl<'a> Axis<'a> {
    /// An even axis.
    pub fn even(name: &'a str) -> Self {
        Self { name, logarithmic: false }
    }

    /// One of logarithms.
    pub fn logarithmic(name: &'a str) -> Self {
        Self { name, logarithmic: true }
    }

    fn place(&self, value: f64) -> f64 {
        if self.logarithmic { value.log10() } else { value }
    }

    fn label(&self, place: f64) -> String {
        let value = if self.logarithmic { 10f64.powf(place) } else { place };
        match value.abs() {
            0.0 => "0".into(),
            size if !(1e-3..1e5).contains(&size) => format!("{value:.1e}"),
            size if size >= 100.0 => format!("{value:.0}"),
            _ => format!("{}", (value * 1e3).round() / 1e3),
        }
    }
}

/// An error of drawing.
pub fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw a figure: {error}")
}

/// A place to draw on.
pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// A chart on it.
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Draws on white of this size, with `draw`.
///
/// # Errors
/// What `draw` says.
pub fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        draw(&root)?;
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// An empty chart.
fn chart<'a, 'b>(area: &'a Area<'b>, x: Range<f64>, y: Range<f64>) -> Result<Chart<'a, 'b>> {
    let mut builder = ChartBuilder::on(area);
    builder.margin(10).x_label_area_size(44).y_label_area_size(76);
    builder.build_cartesian_2d(x, y).map_err(failed)
}

/// Says which series is which.
fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, position: SeriesLabelPosition) -> Result<()> {
    chart
        .configure_series_labels()
        .position(position)
        .label_font((FONT, 13))
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .draw()
        .map_err(failed)
}

/// Draws curves.
///
/// # Errors
/// When there is nothing to draw.
pub fn curves(x: Axis<'_>, y: Axis<'_>, curves: &[Curve]) -> Result<String> {
    svg(SIZE, |area| panel(area, x, y, curves))
}

/// Draws curves that rise: the legend is on the left, where they are low.
///
/// # Errors
/// When there is nothing to draw.
pub fn rising_curves(x: Axis<'_>, y: Axis<'_>, curves: &[Curve]) -> Result<String> {
    svg(SIZE, |area| panel_with(area, x, y, curves, SeriesLabelPosition::UpperLeft))
}

/// Draws curves on `area`. What has no place on an axis (0 on one of logarithms) is left out.
///
/// # Errors
/// When there is nothing to draw.
pub fn panel(area: &Area<'_>, x: Axis<'_>, y: Axis<'_>, curves: &[Curve]) -> Result<()> {
    panel_with(area, x, y, curves, SeriesLabelPosition::UpperRight)
}

fn panel_with(
    area: &Area<'_>,
    x: Axis<'_>,
    y: Axis<'_>,
    curves: &[Curve],
    position: SeriesLabelPosition,
) -> Result<()> {
    let placed: Vec<(&str, Vec<(f64, f64)>)> = curves
        .iter()
        .map(|curve| {
            let points = curve.points.iter().map(|&(a, b)| (x.place(a), y.place(b)));
            (curve.name.as_str(), points.filter(|(a, b)| a.is_finite() && b.is_finite()).collect())
        })
        .collect();
    let all = || placed.iter().flat_map(|(_, points)| points);
    ensure!(all().next().is_some(), "a figure of {} against {} has no point", y.name, x.name);
    let range = |value: fn(&(f64, f64)) -> f64| {
        let least = all().map(value).fold(f64::INFINITY, f64::min);
        let most = all().map(value).fold(f64::NEG_INFINITY, f64::max);
        let margin = 0.04 * (most - least).max(1e-6);
        least - margin..most + margin
    };
    let mut chart = chart(area, range(|point| point.0), range(|point| point.1))?;
    chart
        .configure_mesh()
        .x_desc(x.name)
        .y_desc(y.name)
        .axis_desc_style((FONT, 15))
        .label_style((FONT, 13))
        .x_labels(8)
        .y_labels(8)
        .x_label_formatter(&|place| x.label(*place))
        .y_label_formatter(&|place| y.label(*place))
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for ((name, points), colour) in placed.iter().zip(COLOURS.iter().cycle()) {
        let style: ShapeStyle = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))
            .map_err(failed)?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    legend(&mut chart, position)
}

/// Draws bars.
///
/// # Errors
/// When there is nothing to draw.
pub fn bars(x: &str, y: &str, bars: &Bars) -> Result<String> {
    ensure!(!bars.groups.is_empty() && !bars.kinds.is_empty(), "a figure of {y} against {x} has no bar");
    let height = |values: &Vec<f64>| match bars.stacked {
        true => values.iter().sum(),
        false => values.iter().copied().fold(0.0, f64::max),
    };
    let most = bars.groups.iter().map(|(_, values)| height(values)).fold(0.0, f64::max);
    // The legend has its place above the bars.
    let top = (most * (1.1 + 0.08 * bars.kinds.len() as f64)).max(1e-9);
    let groups = bars.groups.len();
    let name = |place: &f64| {
        let near = (place - place.round()).abs() < 0.01 && *place > -0.4;
        let group = bars.groups.get(place.round() as usize).filter(|_| near);
        group.map_or(String::new(), |(name, _)| name.clone())
    };
    svg(SIZE, |area| {
        let mut chart = chart(area, -0.5..groups as f64 - 0.5, 0.0..top)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_desc(x)
            .y_desc(y)
            .axis_desc_style((FONT, 15))
            .label_style((FONT, 12))
            .x_labels(2 * groups + 1)
            .x_label_formatter(&name)
            .y_labels(8)
            .light_line_style(WHITE)
            .draw()
            .map_err(failed)?;
        let width = 0.8 / if bars.stacked { 1.0 } else { bars.kinds.len() as f64 };
        for (kind, (name, colour)) in bars.kinds.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let fill = colour.filled();
            let rectangles = bars.groups.iter().enumerate().map(|(group, (_, values))| {
                let left = group as f64 - 0.4 + if bars.stacked { 0.0 } else { kind as f64 * width };
                let base = if bars.stacked { values[..kind].iter().sum() } else { 0.0 };
                Rectangle::new([(left, base), (left + width, base + values[kind])], fill)
            });
            chart
                .draw_series(rectangles)
                .map_err(failed)?
                .label(name)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], fill));
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_whole_and_name_what_they_show() {
        let svg = curves(
            Axis::even("clocks"),
            Axis::logarithmic("loss"),
            &[Curve::new("essp(3)", [(0.0, 100.0), (1.0, 10.0), (2.0, 0.0)])],
        )
        .unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("essp(3)") && svg.contains("clocks"));
        let parts = Bars {
            kinds: vec!["computing".into(), "waiting".into()],
            groups: vec![("bsp".into(), vec![0.5, 0.5]), ("essp(1)".into(), vec![0.9, 0.1])],
            stacked: true,
        };
        let svg = bars("model", "part of time", &parts).unwrap();
        assert!(svg.contains("essp(1)") && svg.contains("waiting"));
    }

    #[test]
    fn an_empty_figure_is_refused() {
        assert!(curves(Axis::even("x"), Axis::even("y"), &[]).is_err());
        assert!(bars("x", "y", &Bars { kinds: vec![], groups: vec![], stacked: false }).is_err());
    }
}
