//! Topics of documents as a user learns them: parent, server and clients are processes.

mod common;

use std::fs;

use common::{Folder, Server, by_hand, check_report, fail, number, objectives, results, succeed};
use serde_json::Value;

const TINY: [&str; 4] = ["lda", "--generate=300x200:20000", "--topics=20", "--beta=0.05"];

fn run(more: &[&str]) -> Value {
    results(&[&TINY[..], more].concat())
}

fn likelihoods(results: &Value) -> Vec<f64> {
    objectives(results, "log_likelihood")
}

/// The tokens of all topics.
fn counted(results: &Value) -> u64 {
    let topics = results["top_words"].as_array().expect("topics");
    assert_eq!(topics.len(), 20);
    topics.iter().map(|topic| topic["tokens"].as_u64().expect("a count")).sum()
}

#[test]
fn every_model_learns_counts_every_token_once_and_reports() {
    let plain = run(&["--no-server", "--epochs=40"]);
    let reached = number(&plain["log_likelihood"]);
    let models = [("bsp", Some(0)), ("ssp", Some(3)), ("essp", Some(3)), ("async", None), ("vap", None)];
    let both = models.into_iter().flat_map(|model| [(model, false), (model, true)]);
    for ((model, staleness), copies) in both {
        let name = format!("--model={model}");
        let mut arguments = vec![&*name, "--epochs=40", "--workers=2", "--shards=2"];
        arguments.extend(copies.then_some("--copies"));
        arguments.extend((model == "vap").then_some("--v0=1000"));
        let results = run(&arguments);
        assert_eq!(results["application"], "lda");
        assert_eq!(results["data"]["tokens"], 20_000);
        check_report(&results, model, staleness, copies);
        assert_eq!(counted(&results), 20_000, "{model}");
        let likelihoods = likelihoods(&results);
        assert_eq!(likelihoods.len(), 41, "{model}");
        // The same topics are dealt at the beginning, whoever has the document.
        let first = number(&plain["epochs"][0]["log_likelihood"]);
        assert!((likelihoods[0] / first - 1.0).abs() < 1e-9, "{model}: {}, not {first}", likelihoods[0]);
        let last = number(&results["log_likelihood"]);
        assert!(last > 0.6 * first, "{model}: {last}, at first {first}");
        // Nothing keeps workers together without clocks: one may be done before another has begun.
        assert!(staleness.is_none() || (last / reached - 1.0).abs() < 0.05, "{model}: {last}, not {reached}");
    }
}

#[test]
fn one_worker_on_a_server_draws_exactly_what_a_plain_thread_draws() {
    let one = ["--clients=1", "--workers=1", "--epochs=6"];
    let plain = run(&[&one[..], &["--no-server"]].concat());
    let models = [&["bsp"][..], &["ssp"], &["essp"], &["async"], &["vap", "--v0=20"]];
    for model in models {
        let served = run(&[&one[..], &["--check", "--model"], model].concat());
        assert_eq!(likelihoods(&served), likelihoods(&plain), "{model:?}");
        assert_eq!(served["top_words"], plain["top_words"], "{model:?}");
    }
}

/// A worker of VAP may be far ahead of another, and what it drew then was drawn without the other's. So they go on
/// until both are there, and the number of passes says nothing.
#[test]
fn two_workers_come_as_far_as_one_thread() {
    let one = number(&run(&["--no-server", "--clients=1", "--epochs=80"])["log_likelihood"]);
    let target = 1.012 * one;
    for model in [&["ssp"][..], &["essp"], &["vap", "--v0=1000"], &["vap", "--v0=20"]] {
        let goal = format!("--target-loglikelihood={target}");
        let results = run(&[&["--check", "--epochs=3000", &goal, "--model"], model].concat());
        assert!(results["seconds_to_target"].is_number(), "{model:?} has not come to {target}");
        // That was a sum of what the workers saw, each at its own time. When all has settled it is about so.
        let last = number(&results["log_likelihood"]);
        assert!(last > 1.03 * one, "{model:?}: {last}, and of one thread {one}");
        assert_eq!(counted(&results), 20_000, "{model:?}");
    }
}

#[test]
fn a_target_ends_the_job_and_every_token_is_still_counted() {
    for kind in [&["--no-server"][..], &["--model=essp"], &["--model=async"]] {
        let first = number(&run(&[kind, &["--epochs=1"]].concat())["epochs"][0]["log_likelihood"]);
        let target = format!("--target-loglikelihood={}", 0.9 * first);
        let results = run(&[kind, &["--epochs=3000", &target]].concat());
        let likelihoods = likelihoods(&results);
        assert!(likelihoods.len() < 2000, "it went on for {} epochs", likelihoods.len());
        let reached = likelihoods.iter().position(|l| *l >= 0.9 * first).expect("it was reached");
        assert_eq!(results["seconds_to_target"], results["epochs"][reached]["seconds"]);
        assert_eq!(counted(&results), 20_000);
    }
}

#[test]
fn folders_and_bags_of_words_are_read() {
    let folder = Folder::new();
    fs::create_dir(folder.path().join("texts")).unwrap();
    for i in 0..40 {
        let text = ["boat sail_wind wave harbour ", "breadOven flour, yeast; butter "][i % 2].repeat(5 + i);
        fs::write(folder.file(&format!("texts/{i}.txt")), text).unwrap();
    }
    fs::write(folder.file("texts/picture.bin"), [0xff, 0x00, 0x80]).unwrap();
    let common = ["--topics=2", "--epochs=30", "--alpha=0.05"];
    let out = succeed(
        &[
            &["lda", "--corpus", &folder.file("texts"), "--max-share=0.6"][..],
            &common,
            &["--json", &folder.file("folder.json")],
        ]
        .concat(),
    );
    assert!(out.contains("(40 text files, 1 others left out)"), "{out}");
    let results = folder.json("folder.json");
    assert_eq!(results["data"]["words"], 10);
    let topics: Vec<Vec<&str>> = results["top_words"]
        .as_array()
        .unwrap()
        .iter()
        .map(|topic| {
            let words = topic["words"].as_array().unwrap();
            let mut words: Vec<&str> = words.iter().map(|word| word[0].as_str().unwrap()).collect();
            words.sort_unstable();
            words
        })
        .collect();
    let sea = ["boat", "harbour", "sail", "wave", "wind"];
    let kitchen = ["bread", "butter", "flour", "oven", "yeast"];
    // `harbourboat` is where a text is repeated: it is one word, and left out by none of the options.
    let holds =
        |topic: &[&str], words: &[&str]| words.iter().filter(|word| topic.contains(word)).count() >= 4;
    assert!(
        topics.iter().any(|topic| holds(topic, &sea)) && topics.iter().any(|topic| holds(topic, &kitchen)),
        "{topics:?}"
    );

    fs::write(folder.file("docword.t.txt"), "2\n3\n3\n1 1 4\n1 2 3\n2 3 5\n").unwrap();
    fs::write(folder.file("vocab.t.txt"), "apple\npear\nnail\n").unwrap();
    let docword = folder.file("docword.t.txt");
    let out = succeed(&[&["lda", "--docword", &docword][..], &common].concat());
    assert!(
        out.contains("docword.t.txt (UCI bag of words, plain): 12 tokens in 2 documents, 3 words"),
        "{out}"
    );
    assert!(out.contains("apple pear") && out.contains("nail"), "{out}");
}

#[test]
fn clients_started_by_hand_work_together_on_a_running_server() {
    let folder = Folder::new();
    let server = Server::start(&format!("shm://{}", folder.file("s.sock")), &["--shards=1"]);
    let parts = by_hand(&[&TINY[..], &["--epochs=5"]].concat(), &server);
    let plain = run(&["--no-server", "--epochs=5"]);
    // Epoch 0 is exact: both parts together are the whole.
    let first: f64 = parts.iter().map(|part| number(&part["epochs"][0]["log_likelihood"])).sum();
    assert!((first / number(&plain["epochs"][0]["log_likelihood"]) - 1.0).abs() < 1e-9);
    assert_eq!(counted(&parts[0]), 20_000);
    assert_eq!(parts[1]["top_words"], Value::Array(Vec::new()));

    let again = ["--clients=1", "--workers=2", "--server", &server.url, "--client-index=0"];
    let said = fail(&[&TINY[..], &again].concat());
    assert!(said.contains("has run on these servers before"), "{said}");
}

#[test]
fn bad_input_is_refused_with_the_cure() {
    let folder = Folder::new();
    fs::write(folder.file("docword.a.txt"), "1\n1\n1\n1 2 1\n").unwrap();
    fs::write(folder.file("vocab.a.txt"), "word\n").unwrap();
    fs::write(folder.file("docword.b.txt"), "1\n1\n1\n1 1 1\n").unwrap();
    fs::write(folder.file("other.txt"), "1\n1\n1\n1 1 1\n").unwrap();
    fs::create_dir(folder.path().join("empty")).unwrap();
    let [a, b, other, empty, nowhere] =
        ["docword.a.txt", "docword.b.txt", "other.txt", "empty", "nowhere"].map(|name| folder.file(name));
    for (arguments, message) in [
        (vec!["lda", "--docword", &a], "docword.a.txt:4: word 2 is not one of 1 to 1; the line is `1 2 1`"),
        (vec!["lda", "--docword", &b], "vocab.b.txt beside it: name its vocabulary with --vocabulary"),
        (vec!["lda", "--docword", &other], "its name is not docword.NAME.txt"),
        (vec!["lda", "--corpus", &empty], "no words are left"),
        (vec!["lda", "--corpus", &nowhere], "nowhere"),
        (vec!["lda"], "--corpus"),
        (vec!["lda", "--generate=9x9"], "write DOCSxWORDS:TOKENS"),
        (vec!["lda", "--generate=9x9:9", "--max-words=5"], "cannot be used with"),
        (vec!["lda", "--generate=9x9:9", "--alpha=0"], "--alpha 0: a concentration is a number above 0"),
        (vec!["lda", "--generate=9x9:9", "--model=bsp", "--staleness=2"], "--staleness 2 goes with"),
        (vec!["lda", "--generate=9x9:9", "--topics=0"], "--topics"),
        (
            vec!["lda", "--generate=9x9:9", "--server=shm:///s", "--client-index=2"],
            "with --clients 2 it is 0 to 1",
        ),
        (vec!["lda", "--generate=90x90:900", "--memory=4K"], "table `lda-"),
    ] {
        let said = fail(&arguments);
        assert!(said.contains(message), "{arguments:?}: {said}");
    }
}
