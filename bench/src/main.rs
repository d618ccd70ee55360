//! `fervor-bench`: Fervor's applications and measurements.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use fervor_bench::{
    check, compare, connecting, demo, devices, flood, latency, lda, limits, mf, paper, report, scaling,
    server, start, throughput,
};

/// Applications and measurements of the Fervor parameter server.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Matrix factorisation by stochastic gradient descent
    Mf(Box<mf::MfOptions>),
    /// Topics of documents: latent Dirichlet allocation by collapsed Gibbs sampling
    Lda(Box<lda::LdaOptions>),
    /// How long a job takes with 1, 2, 4 … workers, compared with as many plain threads
    Scaling(Box<scaling::ScalingOptions>),
    /// How fast this machine is without Fervor: loads, copies, messages between cores, wakes, and perftest if there is an
    /// RDMA device
    Limits(limits::LimitsOptions),
    /// How long single operations take: hits, misses, updates, clocks, barriers
    Latency(Box<latency::LatencyOptions>),
    /// How many rows a second are read, updated and pushed
    Throughput(Box<throughput::ThroughputOptions>),
    /// How long it takes until all processes of a job are connected
    Connect(connecting::ConnectOptions),
    /// How long a server takes until all its memory is there, beside filling as much memory
    Start(start::StartOptions),
    /// How much slower a job is while strangers besiege its server with handshakes that they do not finish, and with garbage
    Flood(flood::FloodOptions),
    /// Compare the latencies of several runs, from their logs
    Compare(compare::CompareOptions),
    /// Train on handwritten digits under all four models; draw the convergence and the factors
    Demo(demo::DemoOptions),
    /// The paper's experiments on 64 simulated nodes: figures, and one page with the verdict on each claim
    Paper(paper::PaperOptions),
    /// The RDMA devices of this machine
    Devices,
    /// Check the guarantee of a consistency model: every read is within its bounds, every update counts exactly once
    Check(check::CheckOptions),
    /// Run a command that gets SIGTERM when the process that started this one dies
    #[command(name = server::WITH_PARENT, hide = true)]
    WithParent {
        /// Process number of the parent
        parent: u32,
        /// Program and arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fervor-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Mf(options) => run_mf(&options),
        Command::Lda(options) => run_lda(&options),
        Command::Demo(options) => demo::run(&options).map(drop),
        Command::Paper(options) => paper::run(&options).map(drop),
        Command::Scaling(options) => scaling::run(&options),
        Command::Limits(options) => limits::run(&options),
        Command::Latency(options) => latency::run(&options),
        Command::Throughput(options) => throughput::run(&options),
        Command::Connect(options) => connecting::run(&options),
        Command::Start(options) => start::run(&options),
        Command::Flood(options) => flood::run(&options),
        Command::Compare(options) => compare::run(&options),
        Command::Devices => devices::run().map(|text| print!("{text}")),
        Command::Check(options) => check::run(&options).map(|checked| print!("{checked}")),
        Command::WithParent { parent, command } => match server::with_parent(parent, &command)? {},
    }
}

fn run_mf(options: &mf::MfOptions) -> Result<()> {
    let Some(results) = mf::run(options)? else { return Ok(()) };
    print!("{results}");
    if let Some(path) = &options.job.json {
        report::write_json(path, &results)?;
    }
    if let (Some(path), Some(factors)) = (&options.factors, results.factors_by_column()) {
        report::write_json(path, &factors)?;
    }
    Ok(())
}

fn run_lda(options: &lda::LdaOptions) -> Result<()> {
    let Some(results) = lda::run(options)? else { return Ok(()) };
    print!("{results}");
    options.job.json.as_ref().map_or(Ok(()), |path| report::write_json(path, &results))
}
