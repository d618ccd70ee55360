//! Experiment 1: how stale what is read is, under each model.

use anyhow::Result;
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::{self, Claim},
    figures::{Axis, Bars, Curve, bars, curves},
    runs::{Runs, Spec},
    section::{App, Experiment, Figure, Plan, Section, essp, ssp},
    training::Run,
};
use crate::report::{TextTable, percent};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

fn specs(plan: &Plan) -> Vec<Spec> {
    plan.all_models(App::Mf).into_iter().map(|model| plan.run(App::Mf, model)).collect()
}

/// What the bound of VAP is about: the smaller it is, the less a read lacks, and the more is waited for that.
fn value_bound<'a>(plan: &Plan, of: &dyn Fn(Model) -> &'a Run) -> Claim {
    let vap: Vec<(Model, &Run)> = plan.value_bounded(App::Mf).map(|model| (model, of(model))).collect();
    let each = vap.iter().map(|(model, run)| {
        format!("{model}: lacks {:.2e}, waits {} of the time", run.lack, percent(run.shares()[1]))
    });
    Claim::new(
        "VAP(v0): the smaller v0 is, the less a read lacks by value, and the more time goes to waiting",
        each.collect::<Vec<_>>().join("; "),
        vap.windows(2).all(|pair| {
            let [(_, more), (_, less)] = pair else { unreachable!("windows of two") };
            less.lack < more.lack && less.shares()[1] > more.shares()[1]
        }),
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
            Figure::new("What a read lacks by value", bars("model", "greatest element, mean over reads", &lack)?),
        ],
        table,
        claims: vec![
            claims::bsp_at_minus_one(bsp.part_at(-1)),
            claims::ssp_mean(&of_ssp),
            claims::essp_mean(&of_essp),
            value_bound(plan, &of),
        ],
        remarks: Vec::new(),
        data: json!({ "bsp": bsp.mean_differential(), "ssp": of_ssp, "essp": of_essp }),
    })
}
