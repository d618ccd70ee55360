//! Experiment 1: how stale what is read is, under each model.

use anyhow::Result;
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::{self, Claim},
    plan::{Plan, essp, ssp},
    runs::Runs,
    section::{Experiment, Figure, Section},
    spec::{App, Spec},
    training::Run,
};
use crate::{
    figures::{Axis, Bars, Curve, bars, curves},
    report::{TextTable, percent},
};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

fn specs(plan: &Plan) -> Vec<Spec> {
    plan.all_models(App::Mf).into_iter().map(|model| plan.run(App::Mf, model)).collect()
}

/// What VAP is the ideal for. (It promises nothing about clocks: who has waited for values is behind, and nobody waits for
/// that, so that differentials grow.)
fn freshest<'a>(plan: &Plan, of: &dyn Fn(Model) -> &'a Run) -> Claim {
    let bounded: Vec<Model> = plan.value_bounded(App::Mf).collect();
    let others = plan.staleness.iter().flat_map(|&s| [ssp(s), essp(s)]);
    let least = others.min_by(|a, b| of(*a).lack.total_cmp(&of(*b).lack)).expect("there is some s");
    let text = |model: Model| format!("{model}: {:.2e}", of(model).lack);
    Claim::new(
        "VAP, the ideal: by value a read lacks less than under SSP(s) and ESSP(s), at every s",
        format!(
            "{}; the least of the others: {}",
            bounded.iter().map(|&m| text(m)).collect::<Vec<_>>().join(", "),
            text(least)
        ),
        bounded.iter().all(|&model| of(model).lack < of(least).lack),
    )
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let of = |model| runs.get(&plan.run(App::Mf, model));
    let means = |model: fn(u32) -> Model| -> Vec<(u32, f64)> {
        plan.staleness.iter().map(|&s| (s, of(model(s)).mean_differential())).collect()
    };
    let (of_ssp, of_essp) = (means(ssp), means(essp));
    let bsp = of(Model::Bsp);

    let shown = plan.shown(App::Mf);
    let furthest = -i64::from(plan.staleness.iter().max().copied().unwrap_or(0)) - 1;
    let distribution = Bars {
        kinds: shown.iter().map(ToString::to_string).collect(),
        groups: (furthest..=-1)
            .map(|d| (d.to_string(), shown.iter().map(|&model| of(model).part_at(d)).collect()))
            .collect(),
        stacked: false,
    };
    let lack = Bars {
        kinds: vec!["what a read lacks".into()],
        groups: shown.iter().map(|&model| (model.to_string(), vec![of(model).lack])).collect(),
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
    let mut table = TextTable::new(["model", "mean", "at -1", "at -2", "at -3", "further", "lacks"]);
    for model in plan.all_models(App::Mf) {
        let run = of(model);
        let at = [-1, -2, -3].map(|d| run.part_at(d));
        let further = (1.0 - at.iter().sum::<f64>()).max(0.0);
        let mut row = vec![model.to_string(), format!("{:.3}", run.mean_differential())];
        row.extend(at.into_iter().chain([further]).map(percent));
        row.push(format!("{:.2e}", run.lack));
        table.row(row);
    }
    Ok(Section {
        title: "Clock differentials",
        paper: "Under BSP every read returns data of the clock before; under SSP(s) the age of what is read is spread evenly up \
                to the bound; under ESSP(s) nearly all reads return the freshest data there can be, whatever the bound.",
        setup: format!(
            "MF on {} equal workers, one each on a node of its own; 25 GbE RoCE. What a read lacks by value is the difference from the \
             sum of all updates that anybody has made until then, in the row's greatest element, mean over reads.",
            plan.workers
        ),
        figures: vec![
            Figure::new(
                "Distribution of clock differentials",
                bars("clock differential of a read", "part of reads", &distribution)?,
            ),
            Figure::new(
                "Mean clock differential",
                curves(Axis::even("s"), Axis::even("mean clock differential"), &against_s)?,
            ),
            Figure::new("What a read lacks by value", bars("model", "greatest element, mean over reads", &lack)?),
        ],
        table,
        claims: vec![
            claims::bsp_at_minus_one(bsp.part_at(-1)),
            claims::ssp_mean(&of_ssp),
            claims::essp_mean(&of_essp),
            freshest(plan, &of),
        ],
        remarks: vec![
            "VAP bounds values, not clocks: a worker that had to wait until its updates were visible is behind in clocks, and the \
             others do not wait for it. So its clock differentials say little; what its reads lack by value does."
                .into(),
        ],
        data: json!({ "bsp": bsp.mean_differential(), "ssp": of_ssp, "essp": of_essp }),
    })
}
