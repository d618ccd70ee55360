//! Experiment 3: convergence per clock and per second.

use anyhow::Result;
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::{self, Claim, Spread},
    plan::{Plan, essp, ssp},
    runs::Runs,
    section::{Experiment, Figure, Section},
    spec::{App, Spec},
    training::Run,
};
use crate::{
    figures::{Axis, Curve, curves},
    report::TextTable,
};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

fn specs(plan: &Plan) -> Vec<Spec> {
    let bounded = |app| plan.value_bounded(app).map(move |model| plan.run(app, model));
    let seeded = |app| plan.models().into_iter().flat_map(move |model| plan.seeds(plan.run(app, model)));
    App::ALL.into_iter().flat_map(|app| seeded(app).chain(bounded(app))).collect()
}

/// The objective as figures show it.
fn shown(plan: &Plan, app: App, run: &Run, objective: f64) -> f64 {
    match app {
        App::Mf => objective / run.initial,
        App::Lda => objective / f64::from(plan.corpus.2),
    }
}

/// The axis of [`shown`].
pub fn axis(app: App) -> Axis<'static> {
    match app {
        App::Mf => Axis::logarithmic("loss, of the initial one"),
        App::Lda => Axis::even("log-likelihood of a token"),
    }
}

fn by_clock(plan: &Plan, app: App, name: String, run: &Run) -> Curve {
    let all = std::iter::once(&run.initial).chain(&run.by_clock);
    Curve::new(name, (0u32..).map(f64::from).zip(all.map(|&objective| shown(plan, app, run, objective))))
}

/// The objective by time; some hundred points of it.
pub fn by_time(plan: &Plan, app: App, name: String, run: &Run) -> Curve {
    let every = (run.by_time.len() / 200).max(1);
    let point = |&(time, objective): &(f64, f64)| (time, shown(plan, app, run, objective));
    Curve::new(name, run.by_time.iter().step_by(every).map(point))
}

/// What is said of one application.
struct Convergence<'a> {
    plan: &'a Plan,
    runs: &'a Runs,
    app: App,
}

impl<'a> Convergence<'a> {
    fn run(&self, model: Model) -> &'a Run {
        self.runs.get(&self.plan.run(self.app, model))
    }

    /// What each seed's run of `model` needs to the target. VAP has run with the first seed only.
    fn need(&self, model: Model, need: impl Fn(&Run, f64) -> Option<f64>) -> Spread {
        let Self { plan, runs, app } = *self;
        let seeds = if model.value_bounded() { 1 } else { plan.seeds as usize };
        let one = |spec: Spec| {
            let bsp = runs.get(&Spec { model: Model::Bsp, ..spec.clone() });
            need(runs.get(&spec), plan.target(app, bsp))
        };
        Spread::new(plan.seeds(plan.run(app, model)).take(seeds).map(one))
    }

    fn seconds(&self, model: Model) -> Spread {
        self.need(model, Run::seconds_to)
    }

    fn clocks(&self, model: Model) -> Spread {
        self.need(model, |run, target| run.clocks_to(target).map(|clocks| clocks as f64))
    }

    fn rows(&self, table: &mut TextTable) {
        for model in self.plan.all_models(self.app) {
            let run = self.run(model);
            let last = run.by_clock.last().map_or(f64::NAN, |&last| shown(self.plan, self.app, run, last));
            table.row([
                self.app.to_string(),
                model.to_string(),
                self.clocks(model).text(0),
                self.seconds(model).text(3),
                format!("{last:.4}"),
                format!("{:.1}", run.bytes_per_clock / 1e6),
            ]);
        }
    }

    fn figures(&self) -> Result<Vec<Figure>> {
        let Self { plan, app, .. } = *self;
        let all = |curve: fn(&Plan, App, String, &Run) -> Curve| -> Vec<Curve> {
            let models = plan.shown(app);
            models.into_iter().map(|model| curve(plan, app, model.to_string(), self.run(model))).collect()
        };
        let against_s = |name: &str, model: fn(u32) -> Model| {
            let time = |&s: &u32| Some((f64::from(s), self.seconds(model(s)).median()?));
            Curve::new(name, plan.staleness.iter().filter_map(time))
        };
        let mut figures = vec![
            Figure::new(format!("{app} by clock"), curves(Axis::even("clocks"), axis(app), &all(by_clock))?),
            Figure::new(format!("{app} by time"), curves(Axis::even("seconds"), axis(app), &all(by_time))?),
        ];
        // Where nobody has reached the target there is nothing to draw, and the claims say so.
        let times = [against_s("SSP(s)", ssp), against_s("ESSP(s)", essp)];
        if times.iter().any(|curve| !curve.points.is_empty()) {
            let svg = curves(Axis::even("s"), Axis::even("seconds to the target (medians)"), &times)?;
            figures.push(Figure::new(format!("{app}: time to target"), svg));
        }
        Ok(figures)
    }

    /// Of each s what SSP and ESSP need.
    fn pairs(&self, need: impl Fn(Model) -> Spread) -> Vec<(u32, Spread, Spread)> {
        self.plan.staleness.iter().map(|&s| (s, need(ssp(s)), need(essp(s)))).collect()
    }

    fn claims(&self) -> Vec<Claim> {
        let app = self.app;
        let mut claims = vec![
            claims::essp_no_more(
                &format!("{app}: ESSP(s) reaches the target no later than SSP(s), at every s (seconds)"),
                3,
                &self.pairs(|model| self.seconds(model)),
            ),
            claims::essp_no_more(
                &format!("{app}: ESSP(s) needs no more clocks to the target than SSP(s), at every s"),
                0,
                &self.pairs(|model| self.clocks(model)),
            ),
            self.staleness_costs_ssp(),
        ];
        if self.plan.value_bounded(app).next().is_some() {
            claims.push(self.ideal());
        }
        claims
    }

    /// The greatest s costs SSP more clocks than the least, and ESSP less of that.
    fn staleness_costs_ssp(&self) -> Claim {
        let few = self.plan.few();
        let (least, most) = (few[0], few[few.len() - 1]);
        let more = |model: fn(u32) -> Model| {
            let clocks = |s| self.clocks(model(s)).median().unwrap_or(f64::INFINITY);
            clocks(most) / clocks(least)
        };
        let (ssp, essp) = (more(ssp), more(essp));
        let text = |times: f64| if times.is_finite() { format!("{times:.2} times") } else { "never".into() };
        Claim::new(
            format!(
                "{}: with s = {most} SSP needs more clocks to the target than with s = {least}; ESSP at most 5 % more",
                self.app
            ),
            format!("SSP {}, ESSP {}", text(ssp), text(essp)),
            ssp > 1.0 && essp <= 1.05,
        )
    }

    /// VAP converges by clock as BSP does. (It has run with the first seed only.)
    fn ideal(&self) -> Claim {
        let target = self.plan.target(self.app, self.run(Model::Bsp));
        let clocks = |model| self.run(model).clocks_to(target);
        let text = |model| {
            let clocks = clocks(model).map_or("never".to_owned(), |clocks| clocks.to_string());
            format!("{model}: {clocks}")
        };
        let all = || self.plan.value_bounded(self.app);
        Claim::new(
            format!(
                "{}: VAP, the ideal, needs no more than 5 % more clocks to the target than BSP",
                self.app
            ),
            std::iter::once(Model::Bsp).chain(all()).map(text).collect::<Vec<_>>().join(", "),
            all().all(|model| {
                clocks(model)
                    .zip(clocks(Model::Bsp))
                    .is_some_and(|(vap, bsp)| vap as f64 <= 1.05 * bsp as f64)
            }),
        )
    }
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let both = App::ALL.map(|app| Convergence { plan, runs, app });
    let mut table = TextTable::new([
        "application",
        "model",
        "clocks to target",
        "seconds to target",
        "last objective",
        "MB per clock",
    ]);
    both.iter().for_each(|one| one.rows(&mut table));
    let figures = both.iter().map(Convergence::figures).collect::<Result<Vec<_>>>()?;
    let data = |one: &Convergence<'_>| json!({ "application": one.app, "bsp": one.seconds(Model::Bsp), "s, ssp, essp": one.pairs(|m| one.seconds(m)) });
    Ok(Section {
        title: "Convergence",
        paper: "Per iteration ESSP converges as fast as BSP or nearly so, whatever s is, while SSP needs more iterations as s grows; \
                per second ESSP is the fastest.",
        setup: format!(
            "The network and the machines of experiment 1. The target of MF is {} % of the initial loss; that of LDA {} % of the way \
             from the initial log-likelihood to that of BSP's last clock. A run that has not reached it in {} (MF) or {} (LDA) clocks is \
             counted as never. To the target: medians over {} seeds of data, initial values, machines and network (VAP: one), and in brackets the \
             least and the greatest.",
            100.0 * plan.mf.target,
            100.0 * plan.lda.target,
            plan.mf.clocks,
            plan.lda.clocks,
            plan.seeds
        ),
        figures: figures.into_iter().flatten().collect(),
        table,
        claims: both.iter().flat_map(Convergence::claims).collect(),
        remarks: Vec::new(),
        data: both.iter().map(data).collect(),
    })
}
