//! Experiment 3: convergence per clock and per second.

use anyhow::Result;
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::{self, Claim},
    differentials,
    figures::{Axis, Curve, curves},
    mf::MfRun,
    runs::Runs,
    section::{Experiment, Figure, Plan, Section, essp, seconds, ssp},
};
use crate::report::TextTable;

/// See the module. The runs are those of experiment 1.
pub const EXPERIMENT: Experiment = Experiment { specs: differentials::EXPERIMENT.specs, section };

/// Loss by clock, as part of the first.
pub fn by_clock(name: String, run: &MfRun) -> Curve {
    let losses = std::iter::once(&run.initial).chain(&run.by_clock);
    Curve::new(name, (0u32..).map(f64::from).zip(losses.map(|loss| loss / run.initial)))
}

/// Loss by time, as part of the first; some hundred points of it.
pub fn by_time(name: String, run: &MfRun) -> Curve {
    let every = (run.by_time.len() / 200).max(1);
    Curve::new(name, run.by_time.iter().step_by(every).map(|&(time, loss)| (time, loss / run.initial)))
}

/// VAP converges by clock as BSP does.
fn ideal(vap: &[Model], bsp: Option<usize>, clocks: &dyn Fn(Model) -> Option<usize>) -> Claim {
    let text = |clocks: Option<usize>| clocks.map_or("never".to_owned(), |clocks| clocks.to_string());
    let of = |&model: &Model| format!("{model}: {}", text(clocks(model)));
    Claim::new(
        "VAP, the ideal, needs no more than 5 % more clocks to the target than BSP",
        format!("bsp: {}, {}", text(bsp), vap.iter().map(of).collect::<Vec<_>>().join(", ")),
        vap.iter()
            .all(|&model| clocks(model).zip(bsp).is_some_and(|(vap, bsp)| vap as f64 <= 1.05 * bsp as f64)),
    )
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let of = |model| runs.get(&plan.run(model));
    let target = |run: &MfRun| plan.target * run.initial;
    let time = |model| of(model).seconds_to(target(of(model)));
    let clocks = |model| of(model).clocks_to(target(of(model)));
    let shown = plan.shown();
    let all = |curve: fn(String, &MfRun) -> Curve| -> Vec<Curve> {
        shown.iter().map(|&model| curve(model.to_string(), of(model))).collect()
    };
    let against_s = |name: &str, model: fn(u32) -> Model| {
        let points = plan.staleness.iter().filter_map(|&s| Some((f64::from(s), time(model(s))?)));
        Curve::new(name, points)
    };
    let loss = Axis::logarithmic("loss, of the initial one");
    let mut table = TextTable::new([
        "model",
        "clocks to target",
        "seconds to target",
        "last loss",
        "of the first",
        "MB per clock",
    ]);
    for model in plan.models().into_iter().chain(plan.value_bounded()) {
        let run = of(model);
        let last = run.by_clock.last().copied().unwrap_or(f64::NAN);
        table.row([
            model.to_string(),
            clocks(model).map_or("never".into(), |clocks| clocks.to_string()),
            seconds(time(model)),
            format!("{last:.4e}"),
            format!("{:.4}", last / run.initial),
            format!("{:.1}", run.bytes_per_clock / 1e6),
        ]);
    }
    let times: Vec<_> = plan.staleness.iter().map(|&s| (s, time(ssp(s)), time(essp(s)))).collect();
    let fewer = |s: &u32| match (clocks(ssp(*s)), clocks(essp(*s))) {
        (Some(ssp), Some(essp)) => essp <= ssp,
        (ssp, essp) => ssp.is_none() && essp.is_some(),
    };
    let clocks_text = |model| clocks(model).map_or("never".to_owned(), |clocks| clocks.to_string());
    // Where nobody has reached the target there is nothing to draw, and the claims say so.
    let curves_of_s = [against_s("SSP(s)", ssp), against_s("ESSP(s)", essp)];
    let times_figure = curves_of_s
        .iter()
        .any(|curve| !curve.points.is_empty())
        .then(|| curves(Axis::even("s"), Axis::even("seconds to the target"), &curves_of_s))
        .transpose()?
        .map(|svg| Figure::new("Time to target", svg));
    Ok(Section {
        title: "Convergence",
        paper: "Per iteration ESSP converges as fast as BSP or nearly so, whatever s is, while SSP needs more iterations as s grows; \
                per second ESSP is the fastest.",
        setup: format!(
            "The runs of experiment 1. The target is {} % of the initial loss; a run that has not reached it in {} clocks is counted \
             as never.",
            100.0 * plan.target,
            plan.clocks
        ),
        figures: [
            Some(Figure::new("Loss by clock", curves(Axis::even("clocks"), loss, &all(by_clock))?)),
            Some(Figure::new("Loss by time", curves(Axis::even("seconds"), loss, &all(by_time))?)),
            times_figure,
        ]
        .into_iter()
        .flatten()
        .collect(),
        table,
        claims: vec![
            claims::essp_no_later(&times),
            Claim::new(
                "ESSP(s) needs no more clocks to the target than SSP(s), at every s",
                plan.staleness
                    .iter()
                    .map(|&s| format!("s={s}: {} for {}", clocks_text(essp(s)), clocks_text(ssp(s))))
                    .collect::<Vec<_>>()
                    .join(", "),
                plan.staleness.iter().all(fewer),
            ),
            ideal(&plan.value_bounded().collect::<Vec<_>>(), clocks(Model::Bsp), &clocks),
        ],
        remarks: Vec::new(),
        data: json!({ "bsp": time(Model::Bsp), "s, ssp, essp": times }),
    })
}
