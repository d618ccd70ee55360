//! The paper's experiments, at a size for tests: everything runs, replays, and is written.

use std::{sync::Arc, time::Duration};

use fervor_bench::paper::{
    self,
    cluster::{Cluster, Machines},
    mf::Factorisation,
    plan::{Course, Plan, Scale, essp},
    training::{self, Application, Job, Run},
};
use fervor_client::Model;
use fervor_verbs::transport::sim::Fabric;

/// Few nodes, few clocks.
fn tiny() -> Plan {
    let course = Course { clocks: 8, charge: Duration::from_millis(40), target: 0.95, vap: vec![0.3, 0.1] };
    Plan {
        workers: 6,
        servers: 2,
        staleness: vec![1, 3],
        seed: 1,
        seeds: 2,
        matrix: (96, 24, 1_500),
        rank: 8,
        step: 0.02,
        steps: vec![0.01, 0.02],
        mf: course.clone(),
        corpus: (24, 40, 1_200),
        topics: 5,
        lda: Course { target: 0.5, vap: vec![20.0], ..course },
        scale: Scale { workers: vec![1, 3], computing: Duration::from_millis(32), clocks: 8, step: 0.02 },
        theory: (vec![3], vec![10, 20]),
    }
}

/// Trains on a few nodes that pause.
fn train<A: Application>(application: A, model: Model, clocks: usize, seed: u64) -> Run {
    let application = Arc::new(application);
    let cluster = Cluster {
        workers: 6,
        servers: 2,
        fabric: Fabric::roce_25g(),
        machines: Machines::Pausing,
        seed,
        cache: application.cache(),
        core: None,
    };
    let job = Job { model, clocks, charge: Duration::from_millis(40) };
    training::run(&cluster, &application, job).unwrap()
}

#[test]
fn all_experiments_run_and_are_written() {
    let out = std::env::temp_dir().join(format!("fervor-paper-{}", std::process::id()));
    let sections = paper::run_plan(&tiny(), "as in a test", &out, &paper::Also::default()).unwrap();
    assert_eq!(sections.len(), 7);
    let page = std::fs::read_to_string(out.join("index.html")).unwrap();
    for section in &sections {
        assert!(page.contains(section.title), "{}", section.title);
        assert!(!section.claims.is_empty(), "{} claims nothing", section.title);
        assert!(!section.figures.is_empty(), "{} shows nothing", section.title);
    }
    assert_eq!(page.matches("</svg>").count(), sections.iter().map(|s| s.figures.len()).sum::<usize>());
    let results: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("results.json")).unwrap()).unwrap();
    assert_eq!(results["experiments"].as_array().unwrap().len(), 7);
    // What follows from the models alone comes out at any size.
    let holds = |title: &str, claim: &str| {
        let section = sections.iter().find(|section| section.title.starts_with(title)).unwrap();
        let claim = section.claims.iter().find(|c| c.claim.contains(claim)).unwrap();
        assert!(claim.holds, "{}: {}", claim.claim, claim.found);
    };
    holds("Clock differentials", "BSP: every read");
    holds("Clock differentials", "ESSP(s): differentials");
    holds("Theory", "R/T <=");
    holds("Theory", "VAP: no read lacks more");
    holds("Computing, waiting", "MF: ESSP(s) loses no more");
    holds("Computing, waiting", "LDA: ESSP(s) loses no more");
    std::fs::remove_dir_all(out).unwrap();
}

#[test]
fn a_run_replays() {
    let plan = tiny();
    let factorisation =
        |seed| train(Factorisation { input: plan.ratings(1).into(), step: plan.step }, essp(2), 8, seed);
    let documents = |seed| train(plan.documents(1), essp(2), 8, seed);
    for run in [&factorisation as &dyn Fn(u64) -> Run, &documents] {
        let (first, again, other) = (run(5), run(5), run(6));
        assert_eq!((first.hash, &first.by_time), (again.hash, &again.by_time));
        assert_ne!(first.hash, other.hash);
        let last = first.last().unwrap();
        assert!(if first.rises { last > first.initial } else { last < first.initial }, "it learns");
    }
}

/// The observer knows the topics as they are: the log-likelihood of its sums is that of one thread with all counts in its hands,
/// before the first clock exactly, and after some about.
#[test]
fn the_log_likelihood_of_a_simulated_job_is_that_of_the_same_sampler() {
    use fervor_bench::lda::{counts::Counts as _, likelihood::Likelihood, plain::Matrix};

    let input = tiny().documents(3);
    let mut sampler = input.sampler(0, 1);
    let (prior, clocks) = (*sampler.prior(), 60);
    let matrix = Matrix::new(&prior, 1);
    let mut counts = &matrix;
    counts.start(&mut sampler).unwrap();
    let likelihood = Likelihood::new(prior);
    let mut measure = |sampler: &_| {
        let mut sum = likelihood.documents(fervor_bench::lda::sampler::Sampler::documents(sampler));
        counts.rows(0..prior.words as u32, &mut |_, row| sum += likelihood.row(row)).unwrap();
        sum + likelihood.totals(&counts.totals().unwrap())
    };
    let initial = measure(&sampler);
    for _ in 0..clocks {
        (&matrix).sample(&mut sampler, 0).unwrap();
    }
    let last = measure(&sampler);
    let run = train(input, Model::Bsp, clocks, 1);
    assert!((run.initial - initial).abs() < 1e-9 * initial.abs(), "{} for {initial}", run.initial);
    let gained = (run.last().unwrap() - run.initial) / (last - initial);
    assert!((0.85..1.15).contains(&gained), "{gained} of what one thread gains");
}

/// What is charged is what is computed, and the busiest server is at work, but not for longer than the run.
#[test]
fn time_is_charged_and_servers_are_watched() {
    let plan = tiny();
    let run = train(Factorisation { input: plan.ratings(1).into(), step: plan.step }, essp(1), 8, 1);
    assert!((0.3..3.0).contains(&run.computing), "{} s in 8 clocks of 40 ms, with pauses", run.computing);
    let servers = run.servers;
    for part in [servers.sending, servers.receiving, servers.threads] {
        assert!(part > 0.0 && part < 0.5, "{servers:?}");
    }
    assert!(run.lack > 0.0, "others' updates of the same clock are not seen");
}
