//! Experiment 5: the regret of SGD under bounded staleness, against its bound.
//!
//! `f_t(x) = |x - a_t|² / 2` for points `a_t` drawn around a centre: convex, with the gradient `x - a_t`. Update `t = w + P c + 1` is
//! that of worker `w` of `P` in its clock `c`: it reads the view `x̃_t`, and adds `-η_t (x̃_t - a_t)` with
//! `η_t = σ / sqrt(t)`, `σ = F / (L sqrt(2 (s + 1) P))`. As `σ` does not depend on the number of updates `T`, one run has the
//! regret for every `T` up to its end.

use std::time::Duration;

use anyhow::{Context as _, Result};
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::{self, Claim},
    cluster::{self, Place},
    convex::{DIMENSIONS, F, L, Point, cluster, point},
    plan::{Plan, essp, ssp},
    runs::in_parallel,
    section::{Figure, Section},
    value,
};
use crate::{
    figures::{Axis, Curve, curves},
    report::TextTable,
};

fn square(a: &Point, b: &Point) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

fn mean<'a>(points: impl Iterator<Item = &'a Point>) -> Point {
    let (mut sum, mut count) = ([0.0; DIMENSIONS], 0);
    for point in points {
        sum.iter_mut().zip(point).for_each(|(sum, x)| *sum += x);
        count += 1;
    }
    sum.map(|sum| sum / f64::from(count.max(1)))
}

/// A run: the views and the points, by `t`.
#[derive(Debug)]
struct Trace {
    model: Model,
    workers: usize,
    steps: Vec<(Point, Point)>,
}

impl Trace {
    /// Mean regret over the first `count` updates.
    fn regret(&self, count: usize) -> f64 {
        let steps = &self.steps[..count];
        let best = mean(steps.iter().map(|(_, a)| a));
        steps.iter().map(|(x, a)| (square(x, a) - square(&best, a)) / 2.0).sum::<f64>() / count as f64
    }

    /// The bound of it.
    fn bound(&self, count: usize) -> f64 {
        4.0 * F * L * (2.0 * (staleness(self.model) + 1.0) * self.workers as f64 / count as f64).sqrt()
    }

    /// Mean square distance of the views from the optimum, in each quarter of the run.
    fn quarters(&self) -> Vec<f64> {
        let best = mean(self.steps.iter().map(|(_, a)| a));
        let quarter = self.steps.len().div_ceil(4);
        let far = |steps: &[(Point, Point)]| steps.iter().map(|(x, _)| square(x, &best)).sum::<f64>();
        self.steps.chunks(quarter).map(|steps| far(steps) / steps.len() as f64).collect()
    }

    /// Whether what the bound assumes was so: how far views were from the optimum (as `D`), and the greatest gradient.
    fn extremes(&self) -> (f64, f64) {
        let best = mean(self.steps.iter().map(|(_, a)| a));
        let most = |value: &dyn Fn(&(Point, Point)) -> f64| self.steps.iter().map(value).fold(0.0, f64::max);
        (most(&|(x, _)| square(x, &best) / 2.0), most(&|(x, a)| square(x, a).sqrt()))
    }
}

fn staleness(model: Model) -> f64 {
    model.staleness().map_or(f64::INFINITY, f64::from)
}

/// What one worker does.
fn work(place: &Place, workers: usize, model: Model, clocks: usize) -> Result<Vec<(Point, Point)>> {
    let table = place.client.table::<f64>("x", 1, DIMENSIONS, model)?;
    let mut worker = place.client.worker()?;
    let sigma = F / (L * (2.0 * (staleness(model) + 1.0) * workers as f64).sqrt());
    let mut steps = Vec::with_capacity(clocks);
    for clock in 0..clocks {
        let mut view = [0.0; DIMENSIONS];
        worker.get(&table, 0, &mut view)?;
        place.node.compute(Duration::from_millis(1));
        let a = point(place.number, clock);
        let step = sigma / ((place.number + workers * clock + 1) as f64).sqrt();
        let update: Point = std::array::from_fn(|i| -step * (view[i] - a[i]));
        worker.inc(&table, 0, &update)?;
        worker.clock()?;
        steps.push((view, a));
    }
    Ok(steps)
}

fn trace(model: Model, workers: usize, clocks: usize, seed: u64, core: Option<usize>) -> Result<Trace> {
    let simulated =
        cluster::run(&cluster(workers, seed, core), move |place| work(place, workers, model, clocks))?;
    let steps = (0..clocks * workers).map(|t| simulated.results[t % workers][t / workers]).collect();
    Ok(Trace { model, workers, steps })
}

/// Runs the experiment.
///
/// # Errors
/// As [`cluster::run`].
pub fn section(plan: &Plan) -> Result<Section> {
    let (workers, clocks) = &plan.theory;
    let most = *clocks.iter().max().context("the experiment about theory has no number of clocks")?;
    let bounds: Vec<u32> = std::iter::once(0).chain(plan.few()).collect();
    let jobs: Vec<(Model, usize)> = workers
        .iter()
        .flat_map(|&workers| bounds.iter().flat_map(move |&s| [(ssp(s), workers), (essp(s), workers)]))
        .collect();
    let traces: Vec<Trace> =
        in_parallel(&jobs, |_, core, &(model, workers)| trace(model, workers, most, plan.seed, core))
            .into_iter()
            .collect::<Result<_>>()?;

    let mut table = TextTable::new(["model", "P", "T", "R/T", "bound", "of the bound"]);
    let (mut within, mut greatest, mut count) = (true, 0.0f64, 0);
    for trace in &traces {
        for clocks in clocks {
            let updates = clocks * trace.workers;
            let (regret, bound) = (trace.regret(updates), trace.bound(updates));
            within &= regret <= bound;
            greatest = greatest.max(regret / bound);
            count += 1;
            table.row([
                trace.model.to_string(),
                trace.workers.to_string(),
                updates.to_string(),
                format!("{regret:.5}"),
                format!("{bound:.4}"),
                format!("{:.4}", regret / bound),
            ]);
        }
    }
    let extremes =
        traces.iter().map(Trace::extremes).fold((0.0f64, 0.0f64), |a, b| (a.0.max(b.0), a.1.max(b.1)));
    let largest = *workers.iter().max().context("the experiment about theory has no number of workers")?;
    let shown: Vec<&Trace> = traces.iter().filter(|trace| trace.workers == largest).collect();
    let points = |value: &dyn Fn(usize) -> f64| -> Vec<(f64, f64)> {
        (1..=most).step_by((most / 50).max(1)).map(|c| c * largest).map(|t| (t as f64, value(t))).collect()
    };
    let mut lines: Vec<Curve> = shown
        .iter()
        .filter(|trace| [0.0, staleness(ssp(bounds[bounds.len() - 1]))].contains(&staleness(trace.model)))
        .map(|trace| Curve::new(trace.model.to_string(), points(&|t| trace.regret(t))))
        .collect();
    lines.extend([0, bounds[bounds.len() - 1]].map(|s| {
        let trace = shown.iter().find(|trace| trace.model == ssp(s)).expect("it is among the jobs");
        Curve::new(format!("bound for s={s}"), points(&|t| trace.bound(t)))
    }));
    let falling: Vec<Claim> = shown
        .iter()
        .filter(|trace| staleness(trace.model) == f64::from(bounds[bounds.len() - 1]))
        .map(|trace| {
            let claim = format!(
                "under {} the views' mean square distance from the optimum falls, quarter by quarter",
                trace.model
            );
            claims::falls(&claim, &trace.quarters(), 0.0)
        })
        .collect();
    let mut all = vec![
        Claim::new(
            "R/T <= 4 F L sqrt(2 (s + 1) P / T), for every s, P, T",
            format!("{count} cases, the greatest at {greatest:.4} of its bound"),
            within,
        ),
        Claim::new(
            "what the bound assumes was so: D(x, x*) <= F² and gradients of at most L",
            format!("at most {:.3} for {}, and {:.3} for {L}", extremes.0, F * F, extremes.1),
            extremes.0 <= F * F && extremes.1 <= L,
        ),
    ];
    all.extend(falling);
    all.extend(value::claims(workers[0], most, plan.seed)?);
    Ok(Section {
        title: "Theory",
        paper: "SGD under SSP (and so under ESSP) has a mean regret of at most 4FL sqrt(2(s+1)P/T) on convex functions, with steps \
                sigma/sqrt(t), sigma = F/(L sqrt(2(s+1)P)); and near the optimum the variance of what workers see falls. VAP bounds \
                what a view may lack by value.",
        setup: format!(
            "f_t(x) = |x - a_t|²/2 in {DIMENSIONS} dimensions, one update for each worker and clock, by the real server and client; \
             F = {F}, L = {L}."
        ),
        figures: vec![Figure::new(
            "Mean regret and its bound",
            curves(Axis::logarithmic("updates T"), Axis::logarithmic("R/T"), &lines)?,
        )],
        table,
        claims: all,
        remarks: vec![
            "The statement was checked by deriving it, not against the text of Ho et al. (2013). With x_t the sum of all updates \
             before t: <x_t - x*, g_t> = η_t |g_t|²/2 + (D_t - D_{t+1})/η_t, whose sum over t is at most σL² sqrt(T) + F² \
             sqrt(T)/σ. A view differs from x_t by at most 2(s+1)P updates, each of at most η L, which adds at most \
             4(s+1)P L² σ sqrt(T), but for the first few t. With the σ above the sum is F L sqrt(2(s+1)PT) (1/(2(s+1)P) + 1 + 2), and the \
             bracket is below 4."
                .into(),
        ],
        data: json!(traces
            .iter()
            .map(|trace| {
                let count = trace.steps.len();
                (trace.model.to_string(), trace.workers, count, trace.regret(count), trace.bound(count))
            })
            .collect::<Vec<_>>()),
    })
}
