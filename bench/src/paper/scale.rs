//! Experiment 6: the same job on more and more workers.

use anyhow::Result;
use fervor_verbs::transport::sim::Fabric;
use serde_json::json;

use super::{
    claims::Claim,
    figures::{Axis, Curve, curves},
    runs::{Runs, Spec},
    section::{App, Experiment, Figure, Plan, Section, essp, seconds},
    training::Run,
};
use crate::report::{TextTable, percent};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

/// ESSP's bound.
const STALENESS: u32 = 3;
/// Part of perfect speed-up below which a job is said not to scale any more.
const SCALES: f64 = 0.5;

fn fabrics() -> [Fabric; 2] {
    [Fabric::roce_25g(), Fabric::ethernet_1g()]
}

fn run(plan: &Plan, fabric: &Fabric, workers: usize) -> Spec {
    let charge = plan.scale.1 / workers as u32;
    Spec { workers, charge, fabric: fabric.clone(), ..plan.run(App::Mf, essp(STALENESS)) }
}

fn specs(plan: &Plan) -> Vec<Spec> {
    let of = |fabric: Fabric| plan.scale.0.iter().map(move |&workers| run(plan, &fabric, workers));
    fabrics().into_iter().flat_map(of).collect()
}

/// What there is to say of one network.
struct Scaling<'a> {
    plan: &'a Plan,
    runs: &'a Runs,
    fabric: Fabric,
}

impl<'a> Scaling<'a> {
    fn of(&self, workers: usize) -> &'a Run {
        self.runs.get(&run(self.plan, &self.fabric, workers))
    }

    fn fewest(&self) -> usize {
        self.plan.scale.0[0]
    }

    fn time(&self, workers: usize) -> Option<f64> {
        self.of(workers).seconds_to(self.plan.mf.target * self.of(workers).initial)
    }

    fn clocks(&self, workers: usize) -> Option<usize> {
        self.of(workers).clocks_to(self.plan.mf.target * self.of(workers).initial)
    }

    /// The speed-up as part of what it could be, compared with the fewest workers.
    fn efficiency(&self, workers: usize) -> f64 {
        let speed_up = self.time(self.fewest()).zip(self.time(workers)).map_or(0.0, |(one, many)| one / many);
        speed_up / (workers as f64 / self.fewest() as f64)
    }

    /// The bytes that move, as part of what the servers' NICs could send.
    fn busy(&self, workers: usize) -> f64 {
        let run = self.of(workers);
        let bits = self.fabric.bandwidth as f64 * self.runs.servers() as f64;
        8.0 * run.bytes_per_clock * self.plan.mf.clocks as f64 / run.seconds / bits
    }

    /// Where it stops scaling, and why.
    fn remark(&self) -> String {
        let (name, scale) = (self.fabric.name, &self.plan.scale.0);
        let Some(&workers) = scale.iter().find(|&&workers| self.efficiency(workers) < SCALES) else {
            return format!(
                "On {name} it scales to {} workers: to {} of perfect speed-up.",
                scale[scale.len() - 1],
                percent(self.efficiency(scale[scale.len() - 1]))
            );
        };
        let before = scale.iter().take_while(|&&w| w != workers).last().unwrap_or(&scale[0]);
        let (run, fewest) = (self.of(workers), self.fewest());
        let needed =
            self.clocks(workers).zip(self.clocks(fewest)).map(|(many, few)| many as f64 / few as f64);
        format!(
            "On {name} it scales to {before} workers. With {workers} it is at {} of perfect speed-up: computing is {} of the time, \
             since clocks get shorter while each server pushes every changed row to every worker (what moves is {} of what the \
             servers' NICs can send); and the target takes {} as many clocks as with {fewest}, since more workers change the same \
             factors without seeing each other's changes.",
            percent(self.efficiency(workers)),
            percent(run.computing / run.seconds),
            percent(self.busy(workers)),
            needed.map_or("more than".into(), |times| format!("{times:.2} times")),
        )
    }
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let all = fabrics().map(|fabric| Scaling { plan, runs, fabric });
    let mut table = TextTable::new([
        "network",
        "workers",
        "seconds to target",
        "clocks",
        "of perfect",
        "computing",
        "messages per clock",
        "MB per clock",
        "servers' NICs",
    ]);
    for (scaling, &workers) in all.iter().flat_map(|scaling| plan.scale.0.iter().map(move |w| (scaling, w))) {
        let run = scaling.of(workers);
        table.row([
            scaling.fabric.name.to_owned(),
            workers.to_string(),
            seconds(scaling.time(workers)),
            scaling.clocks(workers).map_or("never".into(), |clocks| clocks.to_string()),
            percent(scaling.efficiency(workers)),
            percent(run.computing / run.seconds),
            format!("{:.0}", run.messages_per_clock),
            format!("{:.2}", run.bytes_per_clock / 1e6),
            percent(scaling.busy(workers)),
        ]);
    }
    let points = |value: &dyn Fn(usize) -> Option<f64>| -> Vec<(f64, f64)> {
        plan.scale.0.iter().filter_map(|&w| Some((w as f64, value(w)?))).collect()
    };
    let fast = &all[0];
    let perfect = |workers: usize| Some(fast.time(fast.fewest())? * fast.fewest() as f64 / workers as f64);
    let mut times: Vec<Curve> =
        all.iter().map(|scaling| Curve::new(scaling.fabric.name, points(&|w| scaling.time(w)))).collect();
    times.push(Curve::new("perfect", points(&perfect)));
    let messages = Curve::new("ESSP", points(&|w| Some(fast.of(w).messages_per_clock)));
    let found: Vec<String> =
        plan.scale.0.iter().map(|&w| format!("{w} workers: {} s", seconds(fast.time(w)))).collect();
    let mut steps = plan.scale.0.windows(2).filter(|pair| pair[1] <= plan.workers);
    let mut figures = vec![Figure::new(
        "Messages per clock",
        curves(Axis::logarithmic("workers"), Axis::logarithmic("messages per clock"), &[messages])?,
    )];
    // Where nobody has reached the target there is nothing to draw, and the claim says so.
    if times.iter().any(|curve| !curve.points.is_empty()) {
        let svg = curves(Axis::logarithmic("workers"), Axis::logarithmic("seconds to the target"), &times)?;
        figures.insert(0, Figure::new("Time to target against workers", svg));
    }
    Ok(Section {
        title: "Scale",
        paper: "With more machines the same job is done sooner.",
        setup: format!(
            "The same ratings, dealt to {:?} workers, under ESSP({STALENESS}); {} servers.",
            plan.scale.0,
            runs.servers()
        ),
        figures,
        table,
        claims: vec![Claim::new(
            format!(
                "on {}, each step to more workers, up to {}, reaches the target sooner",
                fast.fabric.name, plan.workers
            ),
            found.join(", "),
            steps.all(|pair| {
                fast.time(pair[0]).zip(fast.time(pair[1])).is_some_and(|(fewer, more)| more < fewer)
            }),
        )],
        remarks: all.iter().map(Scaling::remark).collect(),
        data: json!(
            all.iter()
                .flat_map(|scaling| {
                    let of = |&w: &usize| {
                        (scaling.fabric.name, w, scaling.time(w), scaling.of(w).messages_per_clock)
                    };
                    plan.scale.0.iter().map(of).collect::<Vec<_>>()
                })
                .collect::<Vec<_>>()
        ),
    })
}
