//! Experiment 6: the same job on more and more workers, to where it stops scaling.
//!
//! What all workers together compute in a clock is the same ([`Plan::scale`]), so a worker's part gets shorter with each
//! that joins; but each of them mirrors all columns, and all of those change in every clock. [`Limits`] is what the
//! network's parameters say of that, to be set beside what was measured.

use std::time::Duration;

use anyhow::Result;
use fervor_verbs::transport::sim::Fabric;
use serde_json::json;

use super::{
    claims::Claim,
    mf,
    plan::{Plan, Scale, essp},
    runs::Runs,
    section::{Experiment, Figure, Section, seconds},
    spec::{App, Spec},
    training::Run,
};
use crate::{
    figures::{Axis, Curve, curves},
    report::{TextTable, percent},
};

/// See the module.
pub const EXPERIMENT: Experiment = Experiment { specs, section };

/// ESSP's bound.
const STALENESS: u32 = 3;
/// Part of perfect speed-up below which a job is said not to scale any more.
const SCALES: f64 = 0.5;
/// How much longer than its greatest limit a clock may take, for that to be its reason.
const EXPLAINED: f64 = 2.0;
/// Bytes of a row's header, which is pushed with it; and of an update's row number.
const HEADERS: (usize, usize) = (16, 4);
/// Bytes of adjacent rows that are pushed in one message.
const RUN: usize = 16 << 10;
/// What posting a message costs a thread in the simulation.
const POST: Duration = Duration::from_nanos(60);

fn fabrics() -> [Fabric; 2] {
    [Fabric::roce_25g(), Fabric::ethernet_1g()]
}

fn run(plan: &Plan, fabric: &Fabric, workers: usize) -> Spec {
    let charge = plan.scale.computing / workers as u32;
    let Scale { clocks, step, .. } = plan.scale;
    Spec { workers, charge, clocks, step, fabric: fabric.clone(), ..plan.run(App::Mf, essp(STALENESS)) }
}

fn specs(plan: &Plan) -> Vec<Spec> {
    let of = |fabric: Fabric| plan.scale.workers.iter().map(move |&workers| run(plan, &fabric, workers));
    fabrics().into_iter().flat_map(of).collect()
}

/// What a clock takes at least, in seconds, by the parameters of the network alone.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// A worker's computing.
    computing: f64,
    /// A server's NIC: it pushes the rows that have changed, in runs, to each worker.
    sending: f64,
    /// A server's thread: it posts those pushes, and applies the updates.
    thread: f64,
}

impl Limits {
    fn new(plan: &Plan, input: &mf::Input, fabric: &Fabric, workers: usize) -> Self {
        // Each worker mirrors all rows, and each row has been changed by somebody.
        let updates = input.updates(workers) as f64 / plan.servers as f64;
        let rows = input.columns().len() * size_of::<f32>() / input.factor();
        let bytes = rows.div_ceil(plan.servers) * (HEADERS.0 + input.factor());
        let messages = bytes.div_ceil(RUN);
        let pushed = 8 * (bytes + messages * fabric.headers);
        let wire = Duration::from_secs_f64(pushed as f64 / fabric.bandwidth as f64);
        let applied = fabric.per_kib.mul_f64((HEADERS.1 + input.factor()) as f64 / 1024.0);
        Self {
            computing: (plan.scale.computing / workers as u32).as_secs_f64(),
            sending: workers as f64 * wire.max(fabric.per_message * messages as u32).as_secs_f64(),
            thread: (workers * messages) as f64 * POST.as_secs_f64() + updates * applied.as_secs_f64(),
        }
    }

    /// The greatest, and its name.
    fn greatest(&self) -> (f64, &'static str) {
        let all = [
            (self.computing, "computing"),
            (self.sending, "the servers' NICs, which send"),
            (self.thread, "the servers' threads"),
        ];
        all.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are three")
    }
}

/// What there is to say of one network.
struct Scaling<'a> {
    plan: &'a Plan,
    runs: &'a Runs,
    fabric: Fabric,
}

impl<'a> Scaling<'a> {
    fn of(&self, workers: usize) -> &'a Run {
        self.runs.get(&run(self.plan, &self.fabric, workers))
    }

    fn fewest(&self) -> usize {
        self.plan.scale.workers[0]
    }

    fn most(&self) -> usize {
        self.plan.scale.workers[self.plan.scale.workers.len() - 1]
    }

    fn limits(&self, workers: usize) -> Limits {
        Limits::new(self.plan, self.runs.ratings(self.plan.seed), &self.fabric, workers)
    }

    fn time(&self, workers: usize) -> Option<f64> {
        self.of(workers).seconds_to(self.plan.mf.target * self.of(workers).initial)
    }

    fn clocks(&self, workers: usize) -> Option<usize> {
        self.of(workers).clocks_to(self.plan.mf.target * self.of(workers).initial)
    }

    /// What a clock takes, in seconds.
    fn clock(&self, workers: usize) -> f64 {
        self.of(workers).seconds / self.plan.scale.clocks as f64
    }

    /// How often a clock is as short as it could be, compared with the fewest workers.
    fn efficiency(&self, workers: usize) -> f64 {
        self.clock(self.fewest()) * self.fewest() as f64 / (self.clock(workers) * workers as f64)
    }

    /// What was at work for the greatest part of the time, by what was measured.
    fn busiest(&self, workers: usize) -> (f64, &'static str) {
        let run = self.of(workers);
        let all = [
            (run.computing / run.seconds, "the workers' computing"),
            (run.servers.sending, "the busiest server's NIC, sending"),
            (run.servers.receiving, "the busiest server's NIC, receiving"),
            (run.servers.threads, "the busiest server's threads"),
        ];
        all.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are four")
    }

    /// The first number of workers to which it does not scale.
    fn end(&self) -> Option<usize> {
        self.plan.scale.workers.iter().copied().find(|&workers| self.efficiency(workers) < SCALES)
    }

    /// Where it stops scaling, and why.
    fn remark(&self) -> String {
        let (name, most) = (self.fabric.name, self.most());
        let Some(workers) = self.end() else {
            let part = percent(self.efficiency(most));
            return format!(
                "On {name} it scales to {most} workers: their clocks are at {part} of perfect speed-up."
            );
        };
        let before = self.plan.scale.workers.iter().take_while(|&&w| w != workers).last().unwrap_or(&workers);
        let ((part, busiest), (limit, limiting)) = (self.busiest(workers), self.limits(workers).greatest());
        let times =
            self.clocks(workers).zip(self.clocks(*before)).map(|(many, few)| many as f64 / few as f64);
        let target = match times {
            Some(times) => format!("takes {times:.2} times as many clocks as with {before}"),
            None => format!("is not reached in {} clocks", self.plan.scale.clocks),
        };
        format!(
            "On {name} it scales to {before} workers. With {workers} a clock takes {:.3} ms, {} of perfect speed-up. Busiest was {busiest}, \
             {} of the time; by the model's parameters the limit is {limiting}: {:.3} ms, while a worker computes for {:.3} ms. The \
             target {target}: who computes so shortly reads what is old by more clocks (a mean differential of {:.2}, after {:.2}).",
            1e3 * self.clock(workers),
            percent(self.efficiency(workers)),
            percent(part),
            1e3 * limit,
            1e3 * self.limits(workers).computing,
            self.of(workers).mean_differential(),
            self.of(*before).mean_differential(),
        )
    }

    fn rows(&self, table: &mut TextTable) {
        for &workers in &self.plan.scale.workers {
            let (run, limits) = (self.of(workers), self.limits(workers));
            let ms = |seconds: f64| format!("{:.3}", 1e3 * seconds);
            table.row([
                self.fabric.name.to_owned(),
                workers.to_string(),
                seconds(self.time(workers)),
                self.clocks(workers).map_or("never".into(), |clocks| clocks.to_string()),
                ms(self.clock(workers)),
                percent(self.efficiency(workers)),
                ms(limits.computing),
                ms(limits.sending),
                ms(limits.thread),
                percent(run.computing / run.seconds),
                percent(run.servers.sending),
                percent(run.servers.threads),
                format!("{:.0}", run.messages_per_clock),
                format!("{:.2}", run.bytes_per_clock / 1e6),
            ]);
        }
    }

    fn points(&self, value: impl Fn(usize) -> Option<f64>) -> Vec<(f64, f64)> {
        self.plan.scale.workers.iter().filter_map(|&w| Some((w as f64, value(w)?))).collect()
    }

    /// A clock takes no less than its greatest limit, and not much more.
    fn explained(&self) -> Claim {
        let all = &self.plan.scale.workers;
        let times = |workers: usize| self.clock(workers) / self.limits(workers).greatest().0;
        let each = all
            .iter()
            .map(|&w| format!("{w} workers: {:.2} times {}", times(w), self.limits(w).greatest().1));
        Claim::new(
            format!(
                "on {} a clock takes as long as what limits it by the model's parameters, and at most {EXPLAINED} times that",
                self.fabric.name
            ),
            each.collect::<Vec<_>>().join("; "),
            // Computing is shorter or longer by chance, and the mean over all clocks hardly.
            all.iter().all(|&workers| (0.98..=EXPLAINED).contains(&times(workers))),
        )
    }
}

fn section(plan: &Plan, runs: &Runs) -> Result<Section> {
    let all = fabrics().map(|fabric| Scaling { plan, runs, fabric });
    let mut table = TextTable::new([
        "network",
        "workers",
        "seconds to target",
        "clocks",
        "ms per clock",
        "of perfect",
        "limit: computing, ms",
        "limit: NIC, ms",
        "limit: thread, ms",
        "computing",
        "server's NIC",
        "server's thread",
        "messages per clock",
        "MB per clock",
    ]);
    all.iter().for_each(|scaling| scaling.rows(&mut table));
    let fast = &all[0];
    let mut lines = Vec::new();
    for scaling in &all {
        let name = scaling.fabric.name;
        lines.push(Curve::new(name, scaling.points(|w| Some(1e3 * scaling.clock(w)))));
        let limit = |w| Some(1e3 * scaling.limits(w).greatest().0);
        lines.push(Curve::new(format!("{name}: the model's limit"), scaling.points(limit)));
    }
    lines.push(Curve::new("computing", fast.points(|w| Some(1e3 * fast.limits(w).computing))));
    let workers = Axis::logarithmic("workers");
    let messages = Curve::new("ESSP", fast.points(|w| Some(fast.of(w).messages_per_clock)));
    let mut figures = vec![
        Figure::new("A clock against workers", curves(workers, Axis::logarithmic("ms per clock"), &lines)?),
        Figure::new(
            "Messages per clock",
            curves(workers, Axis::logarithmic("messages per clock"), &[messages])?,
        ),
    ];
    // Where nobody has reached the target there is nothing to draw, and the claim says so.
    let times: Vec<Curve> =
        all.iter().map(|one| Curve::new(one.fabric.name, one.points(|w| one.time(w)))).collect();
    if times.iter().any(|curve| !curve.points.is_empty()) {
        let svg = curves(workers, Axis::logarithmic("seconds to the target"), &times)?;
        figures.insert(0, Figure::new("Time to target against workers", svg));
    }
    let found: Vec<String> =
        plan.scale.workers.iter().map(|&w| format!("{w} workers: {}", seconds(fast.time(w)))).collect();
    let sooner =
        |pair: &[usize]| fast.time(pair[0]).zip(fast.time(pair[1])).is_some_and(|(fewer, more)| more < fewer);
    let data = |one: &Scaling<'_>| -> Vec<_> {
        let of = |&w: &usize| (one.fabric.name, w, one.time(w), one.clock(w), one.of(w).messages_per_clock);
        plan.scale.workers.iter().map(of).collect()
    };
    Ok(Section {
        title: "Scale",
        paper: "With more machines the same job is done sooner.",
        setup: format!(
            "MF: the same ratings, dealt to {:?} workers, under ESSP({STALENESS}); {} servers. All workers together compute for {} ms in \
             a clock: so little that it does not scale for ever.",
            plan.scale.workers,
            runs.servers(),
            plan.scale.computing.as_millis()
        ),
        figures,
        table,
        claims: [Claim::new(
            format!(
                "on {}, each step to more workers, up to {}, reaches the target sooner",
                fast.fabric.name, plan.workers
            ),
            found.join(", "),
            plan.scale.workers.windows(2).filter(|pair| pair[1] <= plan.workers).all(sooner),
        )]
        .into_iter()
        .chain(all.iter().map(Scaling::explained))
        .collect(),
        remarks: all.iter().map(Scaling::remark).collect(),
        data: json!(all.iter().flat_map(data).collect::<Vec<_>>()),
    })
}
