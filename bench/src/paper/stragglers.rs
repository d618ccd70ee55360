//! Experiment 7: one slow worker, and pauses at random.

use anyhow::Result;
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::{self, Claim},
    cluster::{Machines, PAUSE, PAUSE_EVERY, SLOWNESS},
    convergence::by_time,
    figures::{Axis, Bars, bars, curves},
    runs::{Runs, Spec},
    section::{Experiment, Figure, Plan, Section, essp, seconds, ssp},
};
use crate::report::{TextTable, percent};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

/// How much sooner than BSP.
const SOONER: f64 = 1.3;

fn run(plan: &Plan, model: Model, machines: Machines) -> Spec {
    Spec { machines, ..plan.run(model) }
}

fn models(plan: &Plan) -> Vec<Model> {
    std::iter::once(Model::Bsp).chain(plan.few().into_iter().flat_map(|s| [ssp(s), essp(s)])).collect()
}

fn specs(plan: &Plan) -> Vec<Spec> {
    let both = |model| [Machines::OneSlow, Machines::Pausing].map(|machines| run(plan, model, machines));
    models(plan).into_iter().flat_map(both).collect()
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let of = |model, machines| runs.get(&run(plan, model, machines));
    let time = |model, machines| of(model, machines).seconds_to(plan.target * of(model, machines).initial);
    let kinds = [Machines::Equal, Machines::OneSlow, Machines::Pausing];
    let models = models(plan);
    let mut table =
        TextTable::new(["model", "equal", "one slow", "pausing", "waiting, one slow", "waiting, pausing"]);
    let waiting = |model, machines| {
        let run = of(model, machines);
        percent(run.waiting / (run.computing + run.waiting + run.communicating))
    };
    for &model in &models {
        let mut row = vec![model.to_string()];
        row.extend(kinds.map(|machines| seconds(time(model, machines))));
        row.extend([waiting(model, Machines::OneSlow), waiting(model, Machines::Pausing)]);
        table.row(row);
    }
    let groups = models
        .iter()
        .map(|&model| {
            (model.to_string(), kinds.map(|machines| time(model, machines).unwrap_or(0.0)).to_vec())
        })
        .collect();
    let times = Bars {
        kinds: ["equal machines", "one slow worker", "random pauses"].map(String::from).to_vec(),
        groups,
        stacked: false,
    };
    let pausing: Vec<_> =
        models.iter().map(|&model| by_time(model.to_string(), of(model, Machines::Pausing))).collect();
    let bsp = time(Model::Bsp, Machines::Pausing);
    let essps: Vec<_> = plan.few().into_iter().map(|s| (s, time(essp(s), Machines::Pausing))).collect();
    let slowest = of(Model::Bsp, Machines::OneSlow).seconds;
    let ends: Vec<f64> = plan.few().into_iter().map(|s| of(essp(s), Machines::OneSlow).seconds).collect();
    Ok(Section {
        title: "Stragglers",
        paper: "A bounded staleness hides delays that come and go: others go on while one is late. It cannot hide a worker that is \
                always slow, to whose speed all come down in the end.",
        setup: format!(
            "One worker that computes {SLOWNESS} times as long as the others; or, on each worker, pauses of {} ms after {} s of \
             computing on average. The pauses come after the same amounts of computing under every model.",
            PAUSE.as_millis(),
            PAUSE_EVERY.as_secs()
        ),
        figures: vec![
            Figure::new("Time to target with stragglers", bars("model (none: never)", "seconds", &times)?),
            Figure::new(
                "Loss by time with random pauses",
                curves(Axis::even("seconds"), Axis::logarithmic("loss, of the initial one"), &pausing)?,
            ),
        ],
        table,
        claims: vec![
            claims::essp_sooner_than_bsp(SOONER, bsp, &essps),
            Claim::new(
                "with one slow worker, all its clocks take as long under ESSP as under BSP: within 10 %",
                format!(
                    "BSP {slowest:.2} s; ESSP {}",
                    ends.iter().map(|end| format!("{end:.2} s")).collect::<Vec<_>>().join(", ")
                ),
                ends.iter().all(|end| (end / slowest - 1.0).abs() <= 0.1),
            ),
        ],
        remarks: Vec::new(),
        data: json!({
            "pausing": { "bsp": bsp, "essp": essps },
            "one slow": models.iter().map(|&m| (m.to_string(), time(m, Machines::OneSlow))).collect::<Vec<_>>(),
        }),
    })
}
