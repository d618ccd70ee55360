//! `--cluster`: the same training as processes on hosts of a slow network, SSP beside ESSP.
//!
//! The hosts are network namespaces `host1`, `host2` … with the addresses 10.8.0.1, 10.8.0.2 …, each with a link of its own. `ci/cluster`
//! makes them and runs a command in their midst. Called anywhere else, this program calls `ci/cluster` with itself as that command. On each host
//! run a server with one shard and a client with one worker, over TCP: there is no shared memory between hosts, so what a read costs
//! is real. The figures are those of client 0.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use fervor_verbs::session::KEY_FILE_VARIABLE;
use serde_json::{Value, json};

use super::{
    PaperOptions,
    claims::{Claim, Spread},
    section::{Figure, Section},
};
use crate::{
    figures::{Bars, bars},
    report::{TextTable, percent},
    server::{self, EmbeddedOptions, EmbeddedServer, Setting, on_host},
};

/// Title of the section: its table goes to the terminal, too.
pub const TITLE: &str = "On hosts of a slow network";
/// By these `ci/cluster` says how many hosts there are, and what their links are.
const HOSTS: &str = "FERVOR_CLUSTER_HOSTS";
const LINKS: &str = "FERVOR_CLUSTER_LINKS";
/// Two results are nearly the same if neither is so many times the other.
const NEARLY: f64 = 1.25;

/// The jobs: their commands, epochs, epochs of the short form, and where the result is.
const JOBS: [Job; 2] = [
    Job {
        name: "mf",
        command: &["mf", "--generate", "2000x1000:200000", "--rank", "32", "--clocks-per-epoch", "10"],
        epochs: [100, 20],
        result: |report| report["epochs"].as_array()?.last()?["loss"].as_f64(),
    },
    Job {
        name: "lda",
        command: &["lda", "--generate", "2000x4000:300000"],
        epochs: [20, 5],
        result: |report| report["log_likelihood"].as_f64(),
    },
];
const MODELS: [&str; 2] = ["ssp", "essp"];

struct Job {
    name: &'static str,
    command: &'static [&'static str],
    epochs: [u32; 2],
    result: fn(&Value) -> Option<f64>,
}

/// The hosts, and how much is done on them.
#[derive(Debug)]
pub struct Hosts {
    count: usize,
    links: String,
    staleness: Vec<u32>,
    rounds: usize,
    quick: bool,
}

impl Hosts {
    /// The hosts in whose midst this process is. If it is not, `ci/cluster` takes its place, makes some, and runs it there.
    ///
    /// # Errors
    /// There is no `ci/cluster`.
    pub fn find(options: &PaperOptions) -> Result<Self> {
        let Ok(count) = env::var(HOSTS) else { return Err(go_there(&options.out)) };
        let count = count.parse().with_context(|| format!("{HOSTS}={count} is no number of hosts"))?;
        let usual = if options.quick { vec![3] } else { vec![1, 3, 10] };
        Ok(Self {
            count,
            links: env::var(LINKS).unwrap_or_default(),
            staleness: if options.staleness.is_empty() { usual } else { options.staleness.clone() },
            rounds: options.rounds.map_or(if options.quick { 1 } else { 5 }, usize::from),
            quick: options.quick,
        })
    }

    /// Runs all of it and describes it.
    ///
    /// # Errors
    /// A run fails, or a read was too old.
    pub fn section(&self) -> Result<Section> {
        let work = Folder::new()?;
        let mut cases = Vec::new();
        for job in &JOBS {
            for &staleness in &self.staleness {
                let mut both = MODELS.map(|model| Case { job, model, staleness, runs: Vec::new() });
                // In turns: what else the machine does is alike for both.
                for _ in 0..self.rounds {
                    for case in &mut both {
                        let report = self.train(&work, case)?;
                        case.runs.push(Found::new(job, report).with_context(|| case.title())?);
                    }
                }
                for case in &both {
                    println!("       {}: {} s", case.title(), case.seconds().text(3));
                }
                cases.push(both);
            }
        }
        let figures = JOBS.iter().map(|job| figures_of(job, &cases)).collect::<Result<Vec<_>>>()?;
        Ok(Section {
            title: TITLE,
            paper: "ESSP takes communication off the workers' path: what SSP has to read again while a worker waits is pushed \
                    while it computes. So the same work takes less time.",
            setup: format!(
                "{} hosts that this machine plays, as network namespaces, with links of {}. On each a server with one shard and a \
                 client with one worker, as processes, over TCP. {} of each, in turns: medians, and in brackets the least and the \
                 greatest, as client 0 saw them.",
                self.count,
                self.links,
                if self.rounds == 1 { "One run".to_owned() } else { format!("{} runs", self.rounds) }
            ),
            figures: figures.into_iter().flatten().collect(),
            table: table(&cases),
            claims: self.claims(&cases),
            remarks: Vec::new(),
            data: cases.iter().flatten().map(Case::data).collect(),
        })
    }

    fn claims(&self, cases: &[[Case; 2]]) -> Vec<Claim> {
        let each = |text: &str, found: &dyn Fn(&[Case; 2]) -> (String, bool)| {
            let all: Vec<_> = cases.iter().map(|both| (both[1].title(), found(both))).collect();
            let list: Vec<_> = all.iter().map(|(title, (found, _))| format!("{title}: {found}")).collect();
            Claim::new(text, list.join(", "), all.iter().all(|(_, (_, holds))| *holds))
        };
        let mut claims = vec![
            each(
                "ESSP pushes what SSP has to READ: it takes less than a tenth of the READs",
                &|[ssp, essp]| {
                    let [ssp, essp] = [ssp, essp].map(|case| case.median(|found| found.reads));
                    (format!("{essp:.0} for {ssp:.0}"), essp < ssp / 10.0)
                },
            ),
            each("both come to nearly the same result", &|[ssp, essp]| {
                let [ssp, essp] = [ssp, essp].map(|case| case.median(|found| found.result));
                let ratio = essp / ssp;
                (format!("{ratio:.3} times"), ratio < NEARLY && ratio > 1.0 / NEARLY)
            }),
        ];
        // One run of a short job says nothing about time.
        if !self.quick {
            claims.push(each("the job takes less time under ESSP(s) than under SSP(s)", &|[ssp, essp]| {
                let ratio = essp.median(|found| found.seconds) / ssp.median(|found| found.seconds);
                (format!("{ratio:.2} times as long"), ratio < 1.0)
            }));
        }
        claims
    }

    /// Runs a job once, with servers of its own: what client 0 reports.
    fn train(&self, work: &Folder, case: &Case) -> Result<Value> {
        let Folder { path, keys } = work;
        let embedded = EmbeddedOptions { shards: 1, memory: "64M".into() };
        let names: Vec<String> = (1..=self.count).map(|number| format!("host{number}")).collect();
        let servers = names.iter().zip(1..).map(|(name, number)| {
            let url = format!("fervor://10.8.0.{number}:7471?via=tcp");
            let setting = Setting { host: Some(name), key_file: Some(keys) };
            let server = EmbeddedServer::start_in(setting, &url, &embedded, self.count as u16, 3);
            server.with_context(|| format!("the server of {name} does not start"))
        });
        let servers: Vec<EmbeddedServer> = servers.collect::<Result<_>>()?;
        let (own, results) =
            (env::current_exe().context("cannot find the own program")?, path.join("results.json"));
        let clients = names.iter().enumerate().map(|(index, name)| {
            let words = on_host(Some(name), &own);
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]).args(case.job.command).env(KEY_FILE_VARIABLE, keys);
            command.args(["--epochs", &case.job.epochs[usize::from(self.quick)].to_string()]);
            command.args(["--model", case.model, "--staleness", &case.staleness.to_string()]);
            command.args(["--clients", &self.count.to_string(), "--client-index", &index.to_string()]);
            servers.iter().for_each(|server| {
                _ = command.args(["--server", &format!("{}?via=tcp", bare(server.url()))])
            });
            if index == 0 {
                command.arg("--json").arg(&results);
            }
            Client::start(command, path, name)
        });
        let clients: Vec<Client> = clients.collect::<Result<_>>()?;
        clients.into_iter().try_for_each(Client::wait).with_context(|| case.title())?;
        let text =
            fs::read_to_string(&results).with_context(|| format!("cannot read {}", results.display()))?;
        serde_json::from_str(&text).context("the results of client 0 make no sense")
    }
}

/// A URL without what follows the address.
fn bare(url: &str) -> &str {
    url.split('?').next().expect("a split has a part")
}

/// `ci/cluster` takes the place of this process, and runs it again among hosts. Returns only if it cannot.
fn go_there(out: &Path) -> anyhow::Error {
    let replace = || -> Result<()> {
        let own = env::current_exe().context("cannot find the own program")?;
        let scripts = own.ancestors().skip(1).map(|folder| folder.join("ci/cluster"));
        let script = scripts.into_iter().find(|script| script.is_file()).with_context(|| {
            format!(
                "--cluster needs hosts, which ci/cluster of the repository makes, and that is in no folder above {}: run `ci/cluster -- \
                 fervor-bench paper --cluster`",
                own.display()
            )
        })?;
        fs::create_dir_all(out).with_context(|| format!("cannot make the folder {}", out.display()))?;
        let out = out.canonicalize().context("cannot find the own folder")?;
        let arguments = env::args_os().skip(1);
        let failed = Command::new(&script).arg("-w").arg(out).arg("--").arg(&own).args(arguments).exec();
        Err(failed).with_context(|| format!("cannot run {}", script.display()))
    };
    replace().expect_err("it returns only when it fails")
}

/// A job under a model.
struct Case {
    job: &'static Job,
    model: &'static str,
    staleness: u32,
    runs: Vec<Found>,
}

/// What one run found.
struct Found {
    seconds: f64,
    /// Computing, waiting, communicating.
    shares: [f64; 3],
    differentials: BTreeMap<i64, u64>,
    reads: f64,
    result: f64,
}

impl Found {
    fn new(job: &Job, report: Value) -> Result<Self> {
        let violations = report["cache"]["violations"].as_u64();
        ensure!(violations == Some(0), "reads were too old: {violations:?}");
        let all = || {
            let time = &report["time"];
            let differentials = report["clock_differential"].as_object()?.iter();
            Some(Self {
                seconds: report["seconds"].as_f64()?,
                shares: [
                    time["compute"].as_f64()?,
                    time["waiting"].as_f64()?,
                    time["communication"].as_f64()?,
                ],
                differentials: differentials
                    .map(|(differential, count)| Some((differential.parse().ok()?, count.as_u64()?)))
                    .collect::<Option<_>>()?,
                reads: report["cache"]["reads"].as_u64()? as f64,
                result: (job.result)(&report)?,
            })
        };
        all().context("the results of client 0 lack something")
    }
}

impl Case {
    fn title(&self) -> String {
        format!("{} under {}", self.job.name, self.bound())
    }

    fn bound(&self) -> String {
        format!("{}({})", self.model, self.staleness)
    }

    fn spread(&self, value: impl Fn(&Found) -> f64) -> Spread {
        Spread::new(self.runs.iter().map(|found| Some(value(found))))
    }

    fn median(&self, value: impl Fn(&Found) -> f64) -> f64 {
        self.spread(value).median().unwrap_or(f64::NAN)
    }

    fn seconds(&self) -> Spread {
        self.spread(|found| found.seconds)
    }

    fn shares(&self) -> [f64; 3] {
        [0, 1, 2].map(|which| self.median(|found| found.shares[which]))
    }

    /// Part of the reads of all runs with this differential.
    fn part_at(&self, holds: impl Fn(i64) -> bool) -> f64 {
        let all = || self.runs.iter().flat_map(|found| &found.differentials);
        let count: u64 =
            all().filter(|(differential, _)| holds(**differential)).map(|(_, count)| count).sum();
        count as f64 / all().map(|(_, count)| count).sum::<u64>().max(1) as f64
    }

    fn mean_differential(&self) -> f64 {
        let all = || self.runs.iter().flat_map(|found| &found.differentials);
        let sum: f64 = all().map(|(differential, count)| *differential as f64 * *count as f64).sum();
        sum / all().map(|(_, count)| count).sum::<u64>() as f64
    }

    fn data(&self) -> Value {
        let runs = self.runs.iter().map(|found| {
            let Found { seconds, shares, differentials, reads, result } = found;
            json!({
                "seconds": seconds, "shares": shares, "clock_differential": differentials, "reads": reads, "result": result
            })
        });
        json!({ "job": self.job.name, "model": self.model, "s": self.staleness, "runs": runs.collect::<Vec<_>>() })
    }
}

fn table(cases: &[[Case; 2]]) -> TextTable {
    let mut table = TextTable::new([
        "job",
        "model",
        "seconds",
        "ratio",
        "computing",
        "waiting",
        "communication",
        "differential",
        "READs",
        "result",
    ]);
    for both in cases {
        let ssp = both[0].median(|found| found.seconds);
        for case in both {
            let ratio = case.median(|found| found.seconds) / ssp;
            let [computing, waiting, communication] = case.shares().map(percent);
            table.row([
                case.job.name.to_owned(),
                case.bound(),
                case.seconds().text(3),
                format!("{ratio:.2}"),
                computing,
                waiting,
                communication,
                format!("{:.2}", case.mean_differential()),
                format!("{:.0}", case.median(|found| found.reads)),
                format!("{:.4e}", case.median(|found| found.result)),
            ]);
        }
    }
    table
}

fn figures_of(job: &Job, cases: &[[Case; 2]]) -> Result<[Figure; 2]> {
    let cases: Vec<&Case> = cases.iter().flatten().filter(|case| case.job.name == job.name).collect();
    let furthest = -cases.iter().map(|case| i64::from(case.staleness)).max().unwrap_or(0) - 1;
    let parts = |holds: &dyn Fn(i64) -> bool| cases.iter().map(|case| case.part_at(holds)).collect();
    let ages = Bars {
        kinds: cases.iter().map(|case| case.bound()).collect(),
        // One that is behind the others reads what is newer than its own clock.
        groups: (furthest..-1)
            .map(|d| (d.to_string(), parts(&|differential| differential == d)))
            .chain([("-1 and more".to_owned(), parts(&|differential| differential >= -1))])
            .collect(),
        stacked: false,
    };
    let times = Bars {
        kinds: ["computing", "waiting", "communication"].map(String::from).to_vec(),
        groups: cases.iter().map(|case| (case.bound(), case.shares().to_vec())).collect(),
        stacked: true,
    };
    Ok([
        Figure::new(
            format!("Clock differentials of {} on hosts of a slow network", job.name),
            bars("clock differential of a read", "part of reads", &ages)?,
        ),
        Figure::new(
            format!("What time goes to in {} on hosts of a slow network", job.name),
            bars("model", "part of time", &times)?,
        ),
    ])
}

/// A client process, and where it says what goes wrong.
struct Client {
    child: Child,
    name: String,
    said: PathBuf,
}

impl Client {
    fn start(mut command: Command, folder: &Path, name: &str) -> Result<Self> {
        let said = folder.join(name);
        let file = File::create(&said).with_context(|| format!("cannot write {}", said.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let child = command.spawn().with_context(|| format!("the client of {name} does not start"))?;
        Ok(Self { child, name: name.to_owned(), said })
    }

    fn wait(mut self) -> Result<()> {
        let status = self.child.wait().context("cannot wait for a client")?;
        if !status.success() {
            let said = fs::read_to_string(&self.said).unwrap_or_default();
            bail!(
                "the client of {} failed ({status}): {}",
                self.name,
                said.lines().last().unwrap_or("it says nothing")
            );
        }
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Those that have been waited for are gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder of its own with a key file, removed at the end.
struct Folder {
    path: PathBuf,
    keys: PathBuf,
}

impl Folder {
    fn new() -> Result<Self> {
        let path = env::temp_dir().join(format!("fervor-hosts-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make the folder {}", path.display()))?;
        let folder = Self { keys: path.join("keys"), path };
        let made = Command::new(server::program()?)
            .arg("keygen")
            .arg("--out")
            .arg(&folder.keys)
            .stdout(Stdio::null())
            .status();
        ensure!(made.context("cannot run fervor-server")?.success(), "fervor-server keygen failed");
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
