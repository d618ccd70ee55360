//! Experiment 4: step sizes at which staleness hurts.

use anyhow::Result;
use fervor_client::Model;
use serde_json::json;

use super::{
    claims::Claim,
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

/// How much greater the last loss may be at the greatest s than at the least, to count as the same.
const SAME: f64 = 1.25;

fn run(plan: &Plan, model: Model, step: f32) -> Spec {
    Spec { step, ..plan.run(App::Mf, model) }
}

fn specs(plan: &Plan) -> Vec<Spec> {
    let of = |step| plan.few().into_iter().flat_map(move |s| [(ssp(s), step), (essp(s), step)]);
    plan.steps.iter().copied().flat_map(of).map(|(model, step)| run(plan, model, step)).collect()
}

/// The last loss as part of the first; 100 where it went beyond all bounds.
fn last(run: &Run) -> f64 {
    run.last().map(|loss| loss / run.initial).filter(|part| part.is_finite()).unwrap_or(100.0)
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let few = plan.few();
    let of = |model, step| last(runs.get(&run(plan, model, step)));
    let mut shown = Vec::new();
    let mut table = TextTable::new(
        ["step".to_owned()]
            .into_iter()
            .chain(few.iter().flat_map(|s| [ssp(*s).to_string(), essp(*s).to_string()])),
    );
    for &step in &plan.steps {
        for (name, model) in [("SSP", ssp as fn(u32) -> Model), ("ESSP", essp)] {
            let points = few.iter().map(|&s| (f64::from(s), of(model(s), step)));
            shown.push(Curve::new(format!("{name}, step {step}"), points));
        }
        let mut row = vec![step.to_string()];
        row.extend(
            few.iter().flat_map(|&s| [ssp(s), essp(s)]).map(|model| format!("{:.4}", of(model, step))),
        );
        table.row(row);
    }
    let (least, most) = (few[0], few[few.len() - 1]);
    let worse = |model: fn(u32) -> Model| -> Vec<f64> {
        plan.steps.iter().map(|&step| of(model(most), step) / of(model(least), step)).collect()
    };
    let (of_ssp, of_essp) = (worse(ssp), worse(essp));
    let text = |factors: &[f64]| {
        let each =
            plan.steps.iter().zip(factors).map(|(step, factor)| format!("step {step}: {factor:.2} times"));
        each.collect::<Vec<_>>().join(", ")
    };
    Ok(Section {
        title: "Robustness to staleness",
        paper: "There are step sizes at which SSP converges ever worse as s grows, and may diverge, while ESSP does not notice.",
        setup: format!(
            "The loss after {} clocks, as part of the initial one (100: it went beyond all bounds), for {} sizes of the step.",
            plan.mf.clocks,
            plan.steps.len()
        ),
        figures: vec![Figure::new(
            "Last loss against s",
            curves(Axis::even("s"), Axis::logarithmic("last loss, of the initial one"), &shown)?,
        )],
        table,
        claims: vec![
            Claim::new(
                format!("at some step SSP({most}) ends with more than {SAME} times the loss of SSP({least})"),
                text(&of_ssp),
                of_ssp.iter().any(|&factor| factor > SAME),
            ),
            Claim::new(
                format!(
                    "at every step ESSP({most}) ends with at most {SAME} times the loss of ESSP({least}), and below the initial one"
                ),
                text(&of_essp),
                of_essp.iter().all(|&factor| factor <= SAME)
                    && plan.steps.iter().all(|&step| of(essp(most), step) < 1.0),
            ),
        ],
        remarks: Vec::new(),
        data: json!({ "steps": plan.steps, "ssp": of_ssp, "essp": of_essp }),
    })
}
