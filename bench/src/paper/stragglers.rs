//! Experiment 7: one slow worker, and pauses at random.

use anyhow::Result;
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::{self, Claim},
    cluster::{Machines, PAUSE, PAUSE_EVERY, SLOWNESS},
    convergence::{axis, by_time},
    plan::{Plan, essp},
    runs::Runs,
    section::{Experiment, Figure, Section, seconds},
    spec::{App, Spec},
    training::Run,
};
use crate::{
    figures::{Axis, Bars, bars, curves},
    report::{TextTable, percent},
};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

/// How much sooner than BSP.
const SOONER: f64 = 1.3;

fn run(plan: &Plan, model: Model, machines: Machines) -> Spec {
    Spec { machines, ..plan.run(App::Mf, model) }
}

fn specs(plan: &Plan) -> Vec<Spec> {
    let both = |model| [Machines::OneSlow, Machines::Pausing].map(|machines| run(plan, model, machines));
    plan.shown(App::Mf).into_iter().flat_map(both).collect()
}

/// What is said of it.
struct Stragglers<'a> {
    plan: &'a Plan,
    runs: &'a Runs,
}

impl<'a> Stragglers<'a> {
    fn of(&self, model: Model, machines: Machines) -> &'a Run {
        self.runs.get(&run(self.plan, model, machines))
    }

    fn time(&self, model: Model, machines: Machines) -> Option<f64> {
        let target = self.plan.target(App::Mf, self.of(Model::Bsp, Machines::Equal));
        self.of(model, machines).seconds_to(target)
    }

    /// Under VAP nobody waits for the slow one.
    fn nobody_waits(&self, vap: Model) -> Claim {
        let half = |machines| self.of(vap, machines).half_done;
        let (slow, equal) = (half(Machines::OneSlow), half(Machines::Equal));
        Claim::new(
            "VAP bounds values, not clocks: with one slow worker half of the workers are done as soon as on equal machines \
             (within 10 %)",
            format!("{vap}: {slow:.2} s for {equal:.2} s"),
            slow <= 1.1 * equal,
        )
    }

    fn claims(&self) -> Vec<Claim> {
        let few = self.plan.few();
        let essps: Vec<_> = few.iter().map(|&s| (s, self.time(essp(s), Machines::Pausing))).collect();
        let slowest = self.of(Model::Bsp, Machines::OneSlow).seconds;
        let ends: Vec<f64> = few.iter().map(|&s| self.of(essp(s), Machines::OneSlow).seconds).collect();
        let mut claims = vec![
            claims::essp_sooner_than_bsp(SOONER, self.time(Model::Bsp, Machines::Pausing), &essps),
            Claim::new(
                "with one slow worker, all its clocks take as long under ESSP as under BSP: within 10 %",
                format!(
                    "BSP {slowest:.2} s; ESSP {}",
                    ends.iter().map(|end| format!("{end:.2} s")).collect::<Vec<_>>().join(", ")
                ),
                ends.iter().all(|end| (end / slowest - 1.0).abs() <= 0.1),
            ),
        ];
        claims.extend(self.plan.loosest(App::Mf).map(|vap| self.nobody_waits(vap)));
        claims
    }
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let all = Stragglers { plan, runs };
    let kinds = [Machines::Equal, Machines::OneSlow, Machines::Pausing];
    let models = plan.shown(App::Mf);
    let mut table =
        TextTable::new(["model", "equal", "one slow", "pausing", "waiting, one slow", "waiting, pausing"]);
    let waiting = |model, machines| percent(all.of(model, machines).shares()[1]);
    for &model in &models {
        let mut row = vec![model.to_string()];
        row.extend(kinds.map(|machines| seconds(all.time(model, machines))));
        row.extend([waiting(model, Machines::OneSlow), waiting(model, Machines::Pausing)]);
        table.row(row);
    }
    let bar = |model| kinds.map(|machines| all.time(model, machines).unwrap_or(0.0)).to_vec();
    let times = Bars {
        kinds: ["equal machines", "one slow worker", "random pauses"].map(String::from).to_vec(),
        groups: models.iter().map(|&model| (model.to_string(), bar(model))).collect(),
        stacked: false,
    };
    let curve = |&model: &Model| by_time(plan, App::Mf, model.to_string(), all.of(model, Machines::Pausing));
    let pausing: Vec<_> = models.iter().map(curve).collect();
    let data = |&model: &Model| (model.to_string(), kinds.map(|machines| all.time(model, machines)));
    Ok(Section {
        title: "Stragglers",
        paper: "A bounded staleness hides delays that come and go: others go on while one is late. It cannot hide a worker that is \
                always slow, to whose speed all come down in the end.",
        setup: format!(
            "MF. One worker that computes {SLOWNESS} times as long as the others; or, on each worker, pauses of {} ms after {} s of \
             computing on average. The pauses come after the same amounts of computing under every model.",
            PAUSE.as_millis(),
            PAUSE_EVERY.as_secs()
        ),
        figures: vec![
            Figure::new("Time to target with stragglers", bars("model (none: never)", "seconds", &times)?),
            Figure::new(
                "Loss by time with random pauses",
                curves(Axis::even("seconds"), axis(App::Mf), &pausing)?,
            ),
        ],
        table,
        claims: all.claims(),
        remarks: Vec::new(),
        data: json!({ "equal, one slow, pausing": models.iter().map(data).collect::<Vec<_>>() }),
    })
}
