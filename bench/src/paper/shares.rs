//! Experiment 2: what time goes to, against s.

use std::time::Duration;

use anyhow::Result;
use fervor_client::Model;
use fervor_verbs::transport::sim::Fabric;
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
    figures::{Bars, bars},
    report::{TextTable, percent},
};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

/// What a worker computes in a clock: little, on a slow network, so that there is something to see.
const CHARGE: Duration = Duration::from_millis(10);

fn run(plan: &Plan, app: App, model: Model) -> Spec {
    Spec { fabric: Fabric::ethernet_1g(), charge: CHARGE, ..plan.run(app, model) }
}

fn models(plan: &Plan, app: App) -> Vec<Model> {
    plan.models().into_iter().chain(plan.loosest(app)).collect()
}

fn specs(plan: &Plan) -> Vec<Spec> {
    let of = |app| models(plan, app).into_iter().map(move |model| run(plan, app, model));
    App::ALL.into_iter().flat_map(of).collect()
}

/// What is said of one application.
struct Shares<'a> {
    plan: &'a Plan,
    runs: &'a Runs,
    app: App,
}

impl<'a> Shares<'a> {
    fn of(&self, model: Model) -> &'a Run {
        self.runs.get(&run(self.plan, self.app, model))
    }

    /// Parts of time that are lost to waiting and communication.
    fn lost(&self, model: Model) -> f64 {
        1.0 - self.of(model).shares()[0]
    }

    fn figure(&self) -> Result<Figure> {
        let models = self.plan.shown(self.app).into_iter();
        let stacked = Bars {
            kinds: ["computing", "waiting", "communication"].map(String::from).to_vec(),
            groups: models.map(|model| (model.to_string(), self.of(model).shares().to_vec())).collect(),
            stacked: true,
        };
        let svg = bars("model", "part of time", &stacked)?;
        Ok(Figure::new(format!("What time goes to in {}", self.app), svg))
    }

    fn rows(&self, table: &mut TextTable) {
        for model in models(self.plan, self.app) {
            let run = self.of(model);
            let mut row = vec![self.app.to_string(), model.to_string()];
            row.extend(run.shares().map(percent));
            row.extend([
                percent(run.hit_rate()),
                format!("{:.2}", run.bytes_per_clock / 1e6),
                format!("{:.3}", run.seconds),
            ]);
            table.row(row);
        }
    }

    /// `value` of ESSP(s) is not above (or, if `strictly`, is below) that of SSP(s), at every s.
    fn essp_not_above(&self, claim: &str, value: impl Fn(Model) -> f64, strictly: bool) -> Claim {
        let staleness = &self.plan.staleness;
        let pairs: Vec<(f64, f64)> = staleness.iter().map(|&s| (value(ssp(s)), value(essp(s)))).collect();
        let text = staleness.iter().zip(&pairs);
        let text = text.map(|(s, (ssp, essp))| format!("s={s}: {} for {}", percent(*essp), percent(*ssp)));
        Claim::new(
            format!("{}: {claim}, at every s (parts of time)", self.app),
            text.collect::<Vec<_>>().join(", "),
            pairs.iter().all(|(ssp, essp)| essp < ssp || !strictly && essp <= ssp),
        )
    }

    fn claims(&self) -> Vec<Claim> {
        let waiting: Vec<f64> = std::iter::once(Model::Bsp)
            .chain(self.plan.few().into_iter().map(essp))
            .map(|model| self.of(model).shares()[1])
            .collect();
        let text = format!("{}: from BSP on, waiting falls as ESSP's s grows (parts of time)", self.app);
        let mut claims = vec![
            self.essp_not_above(
                "ESSP(s) loses no more to waiting and communication together than SSP(s)",
                |model| self.lost(model),
                false,
            ),
            self.essp_not_above(
                "workers spend less on communication under ESSP(s) than under SSP(s)",
                |model| self.of(model).shares()[2],
                true,
            ),
            claims::falls(&text, &waiting, 0.1),
        ];
        claims.extend(self.plan.loosest(self.app).map(|vap| self.ideal_costs(vap)));
        claims
    }

    /// What the paper calls VAP impractical for.
    fn ideal_costs(&self, vap: Model) -> Claim {
        let staleness = &self.plan.staleness;
        let most = staleness.iter().map(|&s| self.lost(essp(s))).fold(0.0, f64::max);
        Claim::new(
            format!("{}: VAP's bound has to be waited for: more is lost than under any ESSP(s)", self.app),
            format!("{vap}: {}; ESSP at most {}", percent(self.lost(vap)), percent(most)),
            self.lost(vap) > most,
        )
    }
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let both = App::ALL.map(|app| Shares { plan, runs, app });
    let mut table = TextTable::new([
        "application",
        "model",
        "computing",
        "waiting",
        "communication",
        "hits",
        "MB per clock",
        "seconds",
    ]);
    both.iter().for_each(|one| one.rows(&mut table));
    let data = |one: &Shares<'_>| {
        let models = models(plan, one.app).into_iter();
        let shares: Vec<_> = models.map(|model| (model.to_string(), one.of(model).shares())).collect();
        json!({ "application": one.app, "shares": shares })
    };
    Ok(Section {
        title: "Computing, waiting, communication",
        paper: "With s the time that is lost to waiting falls. ESSP pushes while workers compute, so of its communication less is \
                waited for than under SSP, where each copy that is too old is read again while the worker waits. VAP, the ideal, \
                is impractical: its bound has to be waited for.",
        setup: format!(
            "As experiment 1, but on 1 GbE and with clocks of {} ms of computing: on faster networks, or with longer clocks, \
             hardly anything is lost under any model. Waiting is for clocks; under VAP, until updates are visible.",
            CHARGE.as_millis()
        ),
        figures: both.iter().map(Shares::figure).collect::<Result<_>>()?,
        table,
        claims: both.iter().flat_map(Shares::claims).collect(),
        remarks: Vec::new(),
        data: both.iter().map(data).collect(),
    })
}
