//! Experiment 6: the same job on more and more workers.

use anyhow::Result;
use serde_json::json;

use super::{
    claims::Claim,
    figures::{Axis, Curve, curves},
    runs::{Runs, Spec},
    section::{Experiment, Figure, Plan, Section, essp, seconds},
};
use crate::report::{TextTable, percent};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

/// ESSP's bound.
const STALENESS: u32 = 3;
/// Part of perfect speed-up below which a job is said not to scale any more.
const SCALES: f64 = 0.5;

fn run(plan: &Plan, workers: usize) -> Spec {
    let charge = plan.charge.mul_f64(plan.workers as f64 / workers as f64);
    Spec { workers, charge, ..plan.run(essp(STALENESS)) }
}

fn specs(plan: &Plan) -> Vec<Spec> {
    plan.scale.iter().map(|&workers| run(plan, workers)).collect()
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let of = |workers| runs.get(&run(plan, workers));
    let time = |workers| of(workers).seconds_to(plan.target * of(workers).initial);
    let clocks = |workers| of(workers).clocks_to(plan.target * of(workers).initial);
    // Of a part of the speed-up that there could be, compared with the fewest workers.
    let fewest = plan.scale[0];
    let efficiency = |workers: usize| {
        let speed_up = time(fewest).zip(time(workers)).map_or(0.0, |(one, many)| one / many);
        speed_up / (workers as f64 / fewest as f64)
    };
    let bits = run(plan, fewest).fabric.bandwidth as f64;
    let busy = |workers| {
        let run = of(workers);
        8.0 * run.bytes_per_clock * plan.clocks as f64 / run.seconds / (bits * runs.servers() as f64)
    };
    let mut table = TextTable::new([
        "workers",
        "seconds to target",
        "clocks",
        "of perfect",
        "computing",
        "messages per clock",
        "MB per clock",
        "servers' NICs",
    ]);
    for &workers in &plan.scale {
        let run = of(workers);
        table.row([
            workers.to_string(),
            seconds(time(workers)),
            clocks(workers).map_or("never".into(), |clocks| clocks.to_string()),
            percent(efficiency(workers)),
            percent(run.computing / run.seconds),
            format!("{:.0}", run.messages_per_clock),
            format!("{:.2}", run.bytes_per_clock / 1e6),
            percent(busy(workers)),
        ]);
    }
    let found: Vec<String> =
        plan.scale.iter().map(|&w| format!("{w} workers: {} s", seconds(time(w)))).collect();
    let up_to = plan.scale.iter().copied().take_while(|&workers| efficiency(workers) >= SCALES).last();
    let remark = match plan.scale.iter().find(|&&workers| efficiency(workers) < SCALES) {
        None => format!(
            "It scales to {} workers: more than half of perfect speed-up.",
            plan.scale[plan.scale.len() - 1]
        ),
        Some(&workers) => {
            let needed = clocks(workers).zip(clocks(fewest)).map(|(many, few)| many as f64 / few as f64);
            let run = of(workers);
            format!(
                "It scales to {} workers. At {workers} two things are left of the speed-up: a clock is {} computing, since each \
                 server pushes every row to every worker while the clocks get shorter; and the target needs {} the clocks \
                 that it needs with {fewest}, since more workers change the same factors without seeing each other's changes.",
                up_to.unwrap_or(fewest),
                percent(run.computing / run.seconds),
                needed.map_or("more than all of".into(), |times| format!("{times:.2} times")),
            )
        }
    };
    let points = |value: &dyn Fn(usize) -> Option<f64>| -> Vec<(f64, f64)> {
        plan.scale.iter().filter_map(|&w| Some((w as f64, value(w)?))).collect()
    };
    let perfect = |workers: usize| Some(time(fewest)? * fewest as f64 / workers as f64);
    let sooner = plan.scale.windows(2).filter(|pair| pair[1] <= plan.workers);
    Ok(Section {
        title: "Scale",
        paper: "With more machines the same job is done sooner.",
        setup: format!(
            "The same ratings, dealt to {:?} workers, under ESSP({STALENESS}); {} servers, 25 GbE RoCE.",
            plan.scale,
            runs.servers()
        ),
        figures: vec![
            Figure::new(
                "Time to target against workers",
                curves(
                    Axis::logarithmic("workers"),
                    Axis::logarithmic("seconds to the target"),
                    &[Curve::new("ESSP", points(&time)), Curve::new("perfect", points(&perfect))],
                )?,
            ),
            Figure::new(
                "Messages per clock",
                curves(
                    Axis::logarithmic("workers"),
                    Axis::logarithmic("messages per clock"),
                    &[Curve::new("ESSP", points(&|workers| Some(of(workers).messages_per_clock)))],
                )?,
            ),
        ],
        table,
        claims: vec![Claim::new(
            format!("each step to more workers, up to {}, reaches the target sooner", plan.workers),
            found.join(", "),
            sooner
                .into_iter()
                .all(|pair| time(pair[0]).zip(time(pair[1])).is_some_and(|(fewer, more)| more < fewer)),
        )],
        remarks: vec![remark],
        data: json!(plan.scale.iter().map(|&w| (w, time(w), of(w).messages_per_clock)).collect::<Vec<_>>()),
    })
}
