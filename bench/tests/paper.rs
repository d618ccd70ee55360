//! The paper's experiments, at a size for tests: everything runs, replays, and is written.

use std::{sync::Arc, time::Duration};

use fervor_bench::paper::{
    self,
    cluster::{Cluster, Machines},
    mf::{self, Input, Job},
    section::{Plan, essp},
};
use fervor_verbs::transport::sim::Fabric;

/// Few nodes, few clocks.
fn tiny() -> Plan {
    Plan {
        workers: 6,
        servers: 2,
        matrix: (96, 24, 1_500),
        rank: 8,
        staleness: vec![1, 3],
        vap: vec![0.3],
        clocks: 8,
        step: 0.02,
        steps: vec![0.01, 0.02],
        target: 0.95,
        charge: Duration::from_millis(40),
        scale: vec![1, 3],
        theory: (vec![3], vec![10, 20]),
    }
}

#[test]
fn all_experiments_run_and_are_written() {
    let out = std::env::temp_dir().join(format!("fervor-paper-{}", std::process::id()));
    let sections = paper::run_plan(&tiny(), Duration::from_nanos(16), &out, None).unwrap();
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
        let section = sections.iter().find(|section| section.title == title).unwrap();
        let claim = section.claims.iter().find(|c| c.claim.contains(claim)).unwrap();
        assert!(claim.holds, "{}: {}", claim.claim, claim.found);
    };
    holds("Clock differentials", "BSP: every read");
    holds("Clock differentials", "ESSP(s): differentials");
    holds("Theory", "R/T <=");
    holds("Theory", "VAP: no view");
    std::fs::remove_dir_all(out).unwrap();
}

#[test]
fn a_run_replays() {
    let plan = tiny();
    let input = Arc::new(Input::new(&plan.planted(), plan.rank, 1));
    let run = |seed| {
        let cluster = Cluster {
            workers: plan.workers,
            servers: plan.servers,
            fabric: Fabric::roce_25g(),
            machines: Machines::Pausing,
            seed,
            cache: input.cache(),
            core: None,
        };
        let job = Job { model: essp(2), step: plan.step, clocks: plan.clocks, charge: plan.charge };
        mf::run(&cluster, &input, job).unwrap()
    };
    let (first, again, other) = (run(5), run(5), run(6));
    assert_eq!((first.hash, &first.by_time), (again.hash, &again.by_time));
    assert_ne!(first.hash, other.hash);
    assert!(first.by_clock.last().unwrap() < &first.initial, "it learns");
}
