//! Experiment 2: what time goes to, against s.

use std::time::Duration;

use anyhow::Result;
use fervor_client::Model;
use fervor_verbs::transport::sim::Fabric;
use serde_json::json;

use super::{
    claims::{self, Claim},
    figures::{Bars, bars},
    mf::MfRun,
    runs::{Runs, Spec},
    section::{Experiment, Figure, Plan, Section, essp, ssp},
};
use crate::report::{TextTable, percent};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

/// What a worker computes in a clock: little, on a slow network, so that there is something to see.
const CHARGE: Duration = Duration::from_millis(10);

fn run(plan: &Plan, model: Model) -> Spec {
    Spec { fabric: Fabric::ethernet_1g(), charge: CHARGE, ..plan.run(model) }
}

fn specs(plan: &Plan) -> Vec<Spec> {
    plan.models().into_iter().map(|model| run(plan, model)).collect()
}

/// Computing, waiting and communication as parts of the whole.
fn shares(run: &MfRun) -> [f64; 3] {
    let all = run.computing + run.waiting + run.communicating;
    [run.computing, run.waiting, run.communicating].map(|time| time / all)
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let of = |model| runs.get(&run(plan, model));
    let shown: Vec<Model> =
        std::iter::once(Model::Bsp).chain(plan.few().into_iter().flat_map(|s| [ssp(s), essp(s)])).collect();
    let stacked = Bars {
        kinds: ["computing", "waiting for clocks", "communication"].map(String::from).to_vec(),
        groups: shown.iter().map(|&model| (model.to_string(), shares(of(model)).to_vec())).collect(),
        stacked: true,
    };
    let mut table =
        TextTable::new(["model", "computing", "waiting", "communication", "hits", "MB per clock", "seconds"]);
    for model in plan.models() {
        let run = of(model);
        let mut row = vec![model.to_string()];
        row.extend(shares(run).map(percent));
        row.extend([
            percent(run.hit_rate),
            format!("{:.2}", run.bytes_per_clock / 1e6),
            format!("{:.3}", run.seconds),
        ]);
        table.row(row);
    }
    let lost = |model| 1.0 - shares(of(model))[0];
    let pairs: Vec<(u32, f64, f64)> =
        plan.staleness.iter().map(|&s| (s, lost(ssp(s)), lost(essp(s)))).collect();
    let text = pairs.iter().map(|(s, ssp, essp)| format!("s={s}: {} for {}", percent(*essp), percent(*ssp)));
    let communication: Vec<(f64, f64)> =
        plan.staleness.iter().map(|&s| (shares(of(ssp(s)))[2], shares(of(essp(s)))[2])).collect();
    let waiting: Vec<f64> = std::iter::once(Model::Bsp)
        .chain(plan.few().into_iter().map(essp))
        .map(|model| shares(of(model))[1])
        .collect();
    Ok(Section {
        title: "Computing, waiting, communication",
        paper: "With s the time that is lost to waiting falls. ESSP pushes while workers compute, so of its communication less is \
                waited for than under SSP, where each copy that is too old is read again while the worker waits.",
        setup: format!(
            "As experiment 1, but on 1 GbE and with clocks of {} ms of computing: on faster networks, or with longer clocks, \
             hardly anything is lost under any model.",
            CHARGE.as_millis()
        ),
        figures: vec![Figure::new("What time goes to", bars("model", "part of time", &stacked)?)],
        table,
        claims: vec![
            Claim::new(
                "ESSP(s) loses no more to waiting and communication together than SSP(s), at every s",
                text.collect::<Vec<_>>().join(", "),
                pairs.iter().all(|(_, ssp, essp)| essp <= ssp),
            ),
            Claim::new(
                "workers spend less on communication under ESSP(s) than under SSP(s), at every s",
                format!(
                    "of time, ESSP for SSP: {}",
                    communication
                        .iter()
                        .map(|(ssp, essp)| format!("{} for {}", percent(*essp), percent(*ssp)))
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
                communication.iter().all(|(ssp, essp)| essp < ssp),
            ),
            claims::falls("from BSP on, waiting falls as ESSP's s grows (parts of time)", &waiting, 0.1),
        ],
        remarks: Vec::new(),
        data: json!(
            plan.models().into_iter().map(|model| (model.to_string(), shares(of(model)))).collect::<Vec<_>>()
        ),
    })
}
