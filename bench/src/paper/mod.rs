//! `fervor-bench paper`: the paper's experiments, from one command.
//!
//! The real server and client run on a simulated cluster ([`cluster`]) and train for real ([`training`]: [`mf`], [`lda`]); time is that of the
//! network's and the machines' model. Each experiment names the runs that it needs ([`spec`], [`plan`]), all of them are simulated ([`runs`]), one on
//! each processor, and each experiment makes its [`section`] of the page of them. What the paper says is a
//! [`claims`] away from what was found.
//!
//! | module | experiment |
//! |---|---|
//! | [`differentials`] | 1: distribution of clock differentials |
//! | [`shares`] | 2: computing, waiting, communication against s |
//! | [`convergence`] | 3: convergence by clock and by time |
//! | [`robustness`] | 4: step sizes at which staleness hurts |
//! | [`theory`], [`value`] | 5: regret on a convex function ([`convex`]); VAP's bound |
//! | [`scale`] | 6: more and more workers |
//! | [`stragglers`] | 7: a slow worker, and pauses |
//! | [`real`] | `--real`: on this machine |
//! | [`hosts`] | `--cluster`: as processes on hosts of a slow network |

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, value_parser};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use crate::{lda::corpus::generate as corpus, machine, report::write_json};

pub mod claims;
pub mod cluster;
pub mod convergence;
pub mod convex;
pub mod differentials;
pub mod hosts;
pub mod lda;
pub mod mf;
pub mod page;
pub mod plan;
pub mod real;
pub mod robustness;
pub mod runs;
pub mod scale;
pub mod section;
pub mod shares;
pub mod spec;
pub mod stragglers;
pub mod theory;
pub mod training;
pub mod value;

use hosts::Hosts;
use page::Preface;
use plan::Plan;
use runs::Runs;
use section::{Experiment, Section};
use spec::Spec;

/// What one step of SGD for one rating, and drawing a topic for one token, are taken to cost, if they are not measured.
const TAKEN: Costs = Costs { rating: Duration::from_nanos(16), token: Duration::from_nanos(32) };
/// How many ratings, or tokens, a clock of a worker of [`Plan::workers`] stands for. (Far fewer are trained on: the
/// mathematics of more would be the same.)
const RATINGS: u32 = 2_500_000;
const TOKENS: u32 = 1_250_000;

/// What computing costs.
#[derive(Debug, Clone, Copy)]
pub struct Costs {
    /// A step of SGD for one rating.
    pub rating: Duration,
    /// Drawing a topic for one token.
    pub token: Duration,
}

impl Costs {
    /// As they are on this machine now.
    fn measure(plan: &Plan) -> Self {
        Self { rating: plan.ratings(plan.seed).measure(), token: plan.documents(plan.seed).measure() }
    }
}

/// Options of `fervor-bench paper`.
#[derive(Debug, Clone, Args)]
pub struct PaperOptions {
    /// Folder for the page, the figures and the results. It is made if it does not exist
    #[arg(long, value_name = "DIR", default_value = "out/paper")]
    pub out: PathBuf,
    /// Run less: fewer clocks, fewer staleness values, fewer seeds, a smaller matrix
    #[arg(long)]
    pub quick: bool,
    /// Also train on this machine, in real time
    #[arg(long)]
    pub real: bool,
    /// Also train as processes on hosts of a slow network. Calls ci/cluster, which makes them and runs this command there
    #[arg(long)]
    pub cluster: bool,
    /// Leave the simulated experiments out
    #[arg(long)]
    pub no_simulation: bool,
    /// Values of s on those hosts [default: 1,3,10; with --quick 3]
    #[arg(long, value_name = "S", value_delimiter = ',', requires = "cluster")]
    pub staleness: Vec<u32>,
    /// Runs of each on those hosts [default: 5; with --quick 1]
    #[arg(long, requires = "cluster", value_parser = value_parser!(u16).range(1..=1000))]
    pub rounds: Option<u16>,
    /// Measure on this machine how long computing takes, instead of using fixed times. Then no two runs are the same
    #[arg(long)]
    pub measure: bool,
    /// The first seed of the data, the initial values and the simulations
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Runs the experiments and writes `index.html`, `results.json` and the figures.
///
/// # Errors
/// When a simulation fails, or the folder cannot be written.
pub fn run(options: &PaperOptions) -> Result<Vec<Section>> {
    let also = Also { real: options.real, hosts: options.cluster.then(|| Hosts::find(options)).transpose()? };
    if options.no_simulation {
        ensure!(
            options.real || options.cluster,
            "--no-simulation leaves nothing: say --real or --cluster, too"
        );
        let sections = also.sections(Instant::now())?;
        let preface = Preface { machine: machine::Machine::this().to_string(), parameters: Vec::new() };
        return finish(&options.out, None, &preface, sections);
    }
    let mut plan = if options.quick { Plan::quick() } else { Plan::full() };
    plan.seed = options.seed;
    let measured = Costs::measure(&plan);
    let costs = if options.measure { measured } else { TAKEN };
    plan.mf.charge = costs.rating * RATINGS;
    plan.lda.charge = costs.token * TOKENS;
    let note = format!(
        "{:?} for a rating, {:?} for a token; here and now they were measured as {:?} and {:?}",
        costs.rating, costs.token, measured.rating, measured.token
    );
    run_plan(&plan, &note, &options.out, &also)
}

/// What is run besides the simulations.
#[derive(Debug, Default)]
pub struct Also {
    /// On this machine, too.
    pub real: bool,
    /// On hosts of a slow network, too.
    pub hosts: Option<Hosts>,
}

impl Also {
    fn sections(&self, start: Instant) -> Result<Vec<Section>> {
        let mut sections = Vec::new();
        if self.real {
            println!("{:>4} s  on this machine", start.elapsed().as_secs());
            sections.push(real::section()?);
        }
        if let Some(hosts) = &self.hosts {
            println!("{:>4} s  on hosts of a slow network", start.elapsed().as_secs());
            sections.push(hosts.section()?);
        }
        Ok(sections)
    }
}

/// As [`run`], with a plan, and what there is to say about what computing costs.
///
/// # Errors
/// As [`run`].
pub fn run_plan(plan: &Plan, costs: &str, out: &Path, also: &Also) -> Result<Vec<Section>> {
    let start = Instant::now();
    more_files();
    let preface_parameters = parameters(plan, costs);
    for (name, value) in &preface_parameters {
        println!("{name}: {value}");
    }
    let experiments: [Experiment; 6] = [
        differentials::EXPERIMENT,
        shares::EXPERIMENT,
        convergence::EXPERIMENT,
        robustness::EXPERIMENT,
        scale::EXPERIMENT,
        stragglers::EXPERIMENT,
    ];
    let specs: Vec<Spec> = experiments.iter().flat_map(|experiment| (experiment.specs)(plan)).collect();
    let runs = Runs::simulate(plan, &specs, |number, count, spec| {
        println!("{:>4} s  {:>3} of {count}: {spec}", start.elapsed().as_secs(), number + 1);
    })?;
    let mut sections: Vec<Section> =
        experiments.iter().map(|experiment| (experiment.section)(plan, &runs)).collect::<Result<_>>()?;
    println!("{:>4} s  theory", start.elapsed().as_secs());
    sections.insert(4, theory::section(plan)?);
    sections.extend(also.sections(start)?);
    let preface = Preface {
        machine: format!(
            "{} runs of training, {:.1} million events, were simulated in {:.0} s on {}.",
            runs.count(),
            runs.events() as f64 / 1e6,
            start.elapsed().as_secs_f64(),
            machine::Machine::this()
        ),
        parameters: preface_parameters,
    };
    finish(out, Some(plan), &preface, sections)
}

/// Writes the sections, and tells what came of them.
fn finish(
    out: &Path,
    plan: Option<&Plan>,
    preface: &Preface,
    sections: Vec<Section>,
) -> Result<Vec<Section>> {
    write(out, plan, preface, &sections)?;
    tell(&sections);
    println!("\n{}\nwrote {}", preface.machine, out.join("index.html").display());
    Ok(sections)
}

/// Raises the limit of open files as far as it may: each memory of a simulated node is one.
fn more_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // If it cannot be raised, the memory that there is no descriptor for says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// The model's parameters, for people.
fn parameters(plan: &Plan, costs: &str) -> Vec<(String, String)> {
    let (rows, columns, ratings) = plan.matrix;
    let (documents, words, tokens) = plan.corpus;
    let workers = plan.workers;
    let fabric = |fabric: fervor_verbs::transport::sim::Fabric| {
        let text = format!(
            "{:?} + up to {:?} of latency, {} Gb/s, {:?} for a message at least, {} bytes of headers, {:?} to wake a thread, {:?} to \
             make or apply 1 KiB of updates",
            fabric.latency,
            fabric.jitter,
            fabric.bandwidth as f64 / 1e9,
            fabric.per_message,
            fabric.headers,
            fabric.wake,
            fabric.per_kib
        );
        (fabric.name.to_owned(), text)
    };
    vec![
        (
            "nodes".into(),
            format!("{} of one worker each, and {} servers of one shard", plan.workers, plan.servers),
        ),
        (
            "MF".into(),
            format!(
                "{rows} x {columns}, {ratings} ratings around planted factors; rank {}; {} clocks, steps of {}, all ratings in \
                 each clock",
                plan.rank, plan.mf.clocks, plan.step
            ),
        ),
        (
            "LDA".into(),
            format!(
                "{documents} documents, {words} words, {tokens} tokens around {} planted topics; {} topics; {} clocks, all tokens \
                 in each clock",
                corpus::PLANTED_TOPICS,
                plan.topics,
                plan.lda.clocks
            ),
        ),
        ("computing".into(), costs.to_owned()),
        (
            "a clock".into(),
            format!(
                "of MF stands for {RATINGS} ratings of each of {workers} workers, {:?}, of which {} are trained on; of LDA for \
                 {TOKENS} tokens, {:?}, of which {}; from one time to the next up to {} % more or less",
                plan.mf.charge,
                ratings / workers as u64,
                plan.lda.charge,
                tokens as usize / workers,
                100.0 * cluster::JITTER
            ),
        ),
        fabric(fervor_verbs::transport::sim::Fabric::roce_25g()),
        fabric(fervor_verbs::transport::sim::Fabric::ethernet_1g()),
    ]
}

fn write(out: &Path, plan: Option<&Plan>, preface: &Preface, sections: &[Section]) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("cannot make the folder {}", out.display()))?;
    let put = |name: &str, text: &str| {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    for (number, section) in (1..).zip(sections) {
        for figure in &section.figures {
            let title = figure.title.to_lowercase().replace(": ", "-").replace(' ', "-");
            put(&format!("{number}-{title}.svg"), &figure.svg)?;
        }
    }
    put("index.html", &page::page(preface, sections))?;
    let results = json!({
        "machine": machine::Machine::this(),
        "plan": plan,
        "experiments": sections
            .iter()
            .map(|section| json!({ "title": section.title, "claims": section.claims, "data": section.data }))
            .collect::<Vec<_>>(),
    });
    write_json(&out.join("results.json"), &results)
}

/// The claims, on the terminal.
fn tell(sections: &[Section]) {
    for (number, section) in (1..).zip(sections) {
        println!("\n{number}. {}", section.title);
        for claim in &section.claims {
            let verdict = if claim.holds { "supported" } else { "NOT SUPPORTED" };
            println!("   {verdict}: {}\n      {}", claim.claim, claim.found);
        }
        for remark in &section.remarks {
            println!("   {remark}");
        }
        if section.title == hosts::TITLE {
            println!("\n{}", section.table);
        }
    }
}
