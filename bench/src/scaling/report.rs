//! The medians of all settings: a table, a bound, a figure.

use std::fmt;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::{
    ScalingOptions, Shards,
    settings::{Setting, title},
};
use crate::{
    figures::{Axis, Curve, rising_curves},
    machine::Machine,
    report::{TextTable, percent},
};

/// The medians of a setting. The names are those of the JSON file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `mf` or `lda`.
    pub job: String,
    /// The model with its staleness.
    pub model: String,
    /// Client processes.
    pub clients: u16,
    /// Worker threads of each.
    pub workers: u16,
    /// Shards of the server.
    pub shards: u32,
    /// Seconds until the last worker was done.
    pub seconds: f64,
    /// The same with as many plain threads.
    pub plain_seconds: f64,
    /// `seconds / plain_seconds`.
    pub ratio: f64,
    /// Part of the workers' time in which they waited for clocks.
    pub waiting: f64,
    /// Part of the workers' time in which they read from servers and sent to them.
    pub communication: f64,
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scaling {
    /// Where this was measured.
    pub machine: Machine,
    /// What was run, in words.
    pub settings: String,
    /// For each setting its medians.
    pub rows: Vec<Row>,
}

/// Fails when a row is above its bound: the first of `most` is for the first number of workers, and so on.
pub(super) fn judge(rows: &[Row], most: &[f64]) -> Result<()> {
    let mut counts: Vec<u32> =
        rows.iter().map(|row| u32::from(row.clients) * u32::from(row.workers)).collect();
    counts.dedup();
    let bound = |row: &Row| {
        let workers = u32::from(row.clients) * u32::from(row.workers);
        let step = counts.iter().position(|count| *count == workers)?;
        most.get(step).or(most.last()).copied()
    };
    let above: Vec<String> = rows
        .iter()
        .filter_map(|row| {
            let most = bound(row).filter(|most| row.ratio > *most)?;
            let Row { model, clients, workers, shards, ratio, .. } = row;
            Some(format!(
                "{model} with {clients} clients x {workers} workers and {shards} shards takes {ratio:.2} times as long as \
                 plain threads, more than {most}"
            ))
        })
        .collect();
    if above.is_empty() { Ok(()) } else { bail!("{}", above.join("; ")) }
}

impl fmt::Display for Scaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}\n", self.settings, self.machine)?;
        let mut table = TextTable::new([
            "model",
            "clients x workers",
            "shards",
            "seconds",
            "plain threads",
            "ratio",
            "waiting",
            "comm.",
        ]);
        for row in &self.rows {
            table.row([
                row.model.clone(),
                format!("{} x {}", row.clients, row.workers),
                row.shards.to_string(),
                format!("{:.3}", row.seconds),
                format!("{:.3}", row.plain_seconds),
                format!("{:.2}", row.ratio),
                percent(row.waiting),
                percent(row.communication),
            ]);
        }
        table.fmt(f)
    }
}

/// The speed-up over one plain thread against the number of workers.
pub(super) fn draw(scaling: &Scaling, options: &ScalingOptions, settings: &[Setting]) -> Result<String> {
    let workers = |row: &Row| row.clients * row.workers;
    let one = scaling.rows.first().context("nothing was measured")?.plain_seconds;
    let plain = scaling.rows.iter().map(|row| (f64::from(workers(row)), one / row.plain_seconds));
    let mut all = vec![Curve::new("plain threads", plain)];
    for &Setting { model, shards, .. } in settings {
        let model = title(options, model);
        for (shape, in_one) in [("clients of one worker", false), ("one client", true)] {
            let points = scaling.rows.iter().filter(|row| {
                let all = workers(row);
                let alike = row.model == model && row.shards == shards.count(all);
                alike && (all == 1 || (row.clients == 1) == in_one)
            });
            let points = points.map(|row| (f64::from(workers(row)), one / row.seconds));
            let name = match shards {
                Shards::Auto => format!("{model}, {shape}"),
                Shards::Fixed(count) => format!("{model}, {shape}, {count} shards"),
            };
            all.push(Curve::new(name, points));
        }
    }
    rising_curves(Axis::even("workers"), Axis::even("speed-up over one plain thread"), &all)
}

#[cfg(test)]
mod tests {
    use super::{
        super::settings::{settings_of, tests::options},
        *,
    };

    fn row(clients: u16, workers: u16, ratio: f64) -> Row {
        Row {
            job: "mf".into(),
            model: "essp(3)".into(),
            clients,
            workers,
            shards: u32::from(clients * workers / 2).max(1),
            seconds: ratio,
            plain_seconds: 1.0,
            ratio,
            waiting: 0.0,
            communication: 0.0,
        }
    }

    #[test]
    fn a_row_above_its_bound_fails_by_its_number_of_workers() {
        let rows = [row(1, 1, 1.15), row(2, 1, 1.3), row(1, 2, 1.3), row(4, 1, 1.3)];
        judge(&rows, &[]).unwrap();
        judge(&rows, &[1.3]).unwrap();
        judge(&rows, &[1.15, 1.3]).unwrap();
        let said = |most: &[f64]| judge(&rows, most).unwrap_err().to_string();
        assert!(said(&[1.2]).matches("more than 1.2").count() == 3);
        let said = said(&[1.2, 1.3, 1.25]);
        assert!(said.contains("4 clients x 1 workers") && !said.contains("2 clients"), "{said}");
    }

    #[test]
    fn the_figure_has_a_curve_for_each_shape() {
        let options = options(&[]);
        let scaling = Scaling {
            machine: Machine::this(),
            settings: String::new(),
            rows: vec![row(1, 1, 1.1), row(2, 1, 1.3), row(1, 2, 1.2)],
        };
        let svg = draw(&scaling, &options, &settings_of(&options, 1)).unwrap();
        assert!(svg.contains("essp(3), one client") && svg.contains("plain threads"));
        assert!(svg.matches("<polyline").count() >= 3);
    }
}
