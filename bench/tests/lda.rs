//! Topics of documents as a user learns them: parent, server and clients are processes.

mod common;

use std::{
    fs,
    process::{Child, Stdio},
};

use common::{Folder, Server, bench, fail, said, succeed};
use serde_json::Value;

const TINY: [&str; 4] = ["lda", "--generate=300x200:20000", "--topics=20", "--beta=0.05"];

fn run(more: &[&str]) -> Value {
    let folder = Folder::new();
    let json = format!("--json={}", folder.file("results.json"));
    let arguments: Vec<&str> = TINY.into_iter().chain(more.iter().copied()).chain([json.as_str()]).collect();
    succeed(&arguments);
    folder.json("results.json")
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn likelihoods(results: &Value) -> Vec<f64> {
    let epochs = results["epochs"].as_array().expect("epochs");
    for (number, epoch) in epochs.iter().enumerate() {
        assert_eq!(epoch["epoch"], number);
    }
    epochs.iter().map(|epoch| number(&epoch["log_likelihood"])).collect()
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
    for (model, staleness) in models {
        let name = format!("--model={model}");
        let mut arguments = vec![&*name, "--epochs=40", "--workers=2", "--shards=2"];
        arguments.extend((model == "vap").then_some("--v0=1000"));
        let results = run(&arguments);
        assert_eq!(results["application"], "lda");
        assert_eq!(results["model"], model);
        assert_eq!(results["staleness"].as_u64(), staleness, "{model}");
        assert_eq!(results["data"]["tokens"], 20_000);
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

        let differential = results["clock_differential"].as_object().expect("an object");
        let differential: Vec<(i64, u64)> =
            differential.iter().map(|(key, count)| (key.parse().unwrap(), count.as_u64().unwrap())).collect();
        let least = -1 - staleness.unwrap_or(1000) as i64;
        assert!(differential.iter().all(|(key, _)| *key >= least), "{model}: {differential:?}");
        assert!(model != "bsp" || differential.iter().all(|(key, _)| *key == -1), "{differential:?}");
        let reads: u64 = differential.iter().map(|(_, count)| count).sum();
        let [hits, misses] = ["hits", "misses"].map(|name| results["cache"][name].as_u64().unwrap());
        assert_eq!(reads, hits + misses, "{model}");
        assert!(results["bytes"]["sent"].as_u64() > Some(0), "{model}");
        assert!(model != "essp" || results["bytes"]["pushed"].as_u64() > Some(0), "{}", results["bytes"]);
        let time: f64 =
            ["compute", "waiting", "communication"].iter().map(|name| number(&results["time"][name])).sum();
        assert!((time - 1.0).abs() < 1e-9, "{model}: {}", results["time"]);
    }
}

#[test]
fn one_worker_on_a_server_draws_exactly_what_a_plain_thread_draws() {
    let one = ["--clients=1", "--workers=1", "--epochs=6"];
    let plain = run(&[&one[..], &["--no-server"]].concat());
    for model in ["bsp", "ssp", "essp", "async"] {
        let served = run(&[&one[..], &["--model", model]].concat());
        assert_eq!(likelihoods(&served), likelihoods(&plain), "{model}");
        assert_eq!(served["top_words"], plain["top_words"], "{model}");
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
    let clients: Vec<Child> = (0..2)
        .map(|index| {
            let mut command = bench(&TINY);
            command.args(["--epochs=5", "--clients=2", "--server", &server.url]);
            command.args(["--client-index", &index.to_string()]);
            command.args(["--json", &folder.file(&format!("{index}.json"))]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
        })
        .collect();
    for client in clients {
        let output = client.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", said(&output));
    }
    let parts = [folder.json("0.json"), folder.json("1.json")];
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
        (vec!["lda", "--generate=9x9:9", "--server=shm:///s", "--client-index=2"], "the last has index 1"),
        (vec!["lda", "--generate=90x90:900", "--memory=4K"], "table `lda-"),
    ] {
        let said = fail(&arguments);
        assert!(said.contains(message), "{arguments:?}: {said}");
    }
}
