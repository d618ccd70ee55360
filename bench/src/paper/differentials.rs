//! Experiment 1: how stale what is read is, under each model.

use anyhow::Result;
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::{self, Claim},
    figures::{Axis, Bars, Curve, bars, curves},
    runs::{Runs, Spec},
    section::{Experiment, Figure, Plan, Section, essp, ssp},
};
use crate::report::{TextTable, percent};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

fn specs(plan: &Plan) -> Vec<Spec> {
    plan.models().into_iter().chain(plan.value_bounded()).map(|model| plan.run(model)).collect()
}

/// VAP reads are the freshest.
fn freshest(plan: &Plan, mean: &dyn Fn(Model) -> f64) -> Claim {
    let vap: Vec<(Model, f64)> = plan.value_bounded().map(|model| (model, mean(model))).collect();
    let found = vap.iter().map(|(model, mean)| format!("{model}: {mean:.2}")).collect::<Vec<_>>().join(", ");
    Claim::new(
        "VAP: what is read is about as fresh as under ESSP, though nobody waits for a clock: the mean is above -1.6",
        found,
        vap.iter().all(|(_, mean)| *mean > -1.6),
    )
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let mean = |model| runs.get(&plan.run(model)).mean_differential();
    let means = |model: fn(u32) -> Model| -> Vec<(u32, f64)> {
        plan.staleness.iter().map(|&s| (s, mean(model(s)))).collect()
    };
    let (of_ssp, of_essp) = (means(ssp), means(essp));
    let bsp = runs.get(&plan.run(Model::Bsp));

    let shown = plan.shown();
    let furthest = -i64::from(plan.staleness.iter().max().copied().unwrap_or(0)) - 1;
    let part = |model: &Model, differential| runs.get(&plan.run(*model)).part_at(differential);
    let distribution = Bars {
        kinds: shown.iter().map(ToString::to_string).collect(),
        groups: (furthest..=-1)
            .map(|d| (d.to_string(), shown.iter().map(|model| part(model, d)).collect()))
            .collect(),
        stacked: false,
    };
    let points = |means: &[(u32, f64)]| -> Vec<(f64, f64)> {
        means.iter().map(|&(s, mean)| (s.into(), mean)).collect()
    };
    let uniform = plan.staleness.iter().map(|&s| (f64::from(s), -f64::from(s + 2) / 2.0));
    let against_s = [
        Curve::new("SSP(s)", points(&of_ssp)),
        Curve::new("ESSP(s)", points(&of_essp)),
        Curve::new("-(s+2)/2", uniform),
    ];
    let mut table = TextTable::new(["model", "mean", "at -1", "at -2", "at -3", "further"]);
    for model in plan.models().into_iter().chain(plan.value_bounded()) {
        let at = [-1, -2, -3].map(|d| part(&model, d));
        let further = (1.0 - at.iter().sum::<f64>()).max(0.0);
        let mut row = vec![model.to_string(), format!("{:.3}", mean(model))];
        row.extend(at.into_iter().chain([further]).map(percent));
        table.row(row);
    }
    Ok(Section {
        title: "Clock differentials",
        paper: "Under BSP every read returns data of the clock before; under SSP(s) the age of what is read is spread evenly up \
                to the bound; under ESSP(s) nearly all reads return the freshest data there can be, whatever the bound.",
        setup: format!("{} equal workers, one each on a node of its own; 25 GbE RoCE.", plan.workers),
        figures: vec![
            Figure::new(
                "Distribution of clock differentials",
                bars("clock differential of a read", "part of reads", &distribution)?,
            ),
            Figure::new(
                "Mean clock differential",
                curves(Axis::even("s"), Axis::even("mean clock differential"), &against_s)?,
            ),
        ],
        table,
        claims: vec![
            claims::bsp_at_minus_one(bsp.part_at(-1)),
            claims::ssp_mean(&of_ssp),
            claims::essp_mean(&of_essp),
            freshest(plan, &mean),
        ],
        remarks: Vec::new(),
        data: json!({ "bsp": bsp.mean_differential(), "ssp": of_ssp, "essp": of_essp }),
    })
}
