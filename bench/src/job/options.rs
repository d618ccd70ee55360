//! The part of a job's command line that all applications have: how often its data is gone through, and who works where.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Result, bail};
use clap::{Args, value_parser};
use fervor_client::ClientOptions;
use fervor_verbs::rails::RailName;

use crate::{
    connect::{self, ReadOptions},
    model::ModelOptions,
    server::EmbeddedOptions,
};

/// Rows that a worker of a checked job counts its clocks in ([`oracle`](super::oracle)).
pub const SPREAD: usize = 8;

/// Passes, processes, threads and servers of a job.
#[derive(Debug, Clone, Args)]
pub struct JobOptions {
    /// Clocks that each worker ends in one pass over its data
    #[arg(long, default_value_t = 10, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub clocks_per_epoch: u32,
    /// Passes over the data. The job makes fewer if it reaches a target before
    #[arg(long, default_value_t = 50, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub epochs: u32,
    /// Seed of all that is drawn: generated data, initial values, the order of the ratings, topics
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The consistency model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// Client processes
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u16).range(1..=4096))]
    pub clients: u16,
    /// Worker threads in each client
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u16).range(1..=4096))]
    pub workers: u16,
    /// Use this running server instead of starting one; may be repeated
    #[arg(long, value_name = "URL")]
    pub server: Vec<String>,
    /// Train with plain threads of one process and no parameter server. There are --clients times --workers threads
    #[arg(long, conflicts_with_all = ["server", "client_index"])]
    pub no_server: bool,
    /// Be client number I of a job whose other clients are started elsewhere in the same way
    #[arg(long, value_name = "I", requires = "server")]
    pub client_index: Option<u16>,
    /// Ports of RDMA devices that each client uses, all at once, as in mlx5_0:1,mlx5_1 [default: those that FERVOR_IB_HCA names; or all that
    /// are active]
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "server")]
    pub devices: Vec<RailName>,
    /// Name of the job on the servers. Clients that give the same name work together. A name can be used once [default:
    /// a new name, or with --client-index the name of this command]
    #[arg(long)]
    pub job: Option<String>,
    /// The server that is started if none is named.
    #[command(flatten)]
    pub embedded: EmbeddedOptions,
    /// Bytes of a client's cache [default: enough for all that the workers share]
    #[arg(long, value_name = "BYTES")]
    pub cache: Option<usize>,
    /// Write the results to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Fail when a read returns older data than the model allows. The client checks each read, and an extra table of
    /// counters checks the client
    #[arg(long, conflicts_with = "no_server")]
    pub check: bool,
    /// How rows are read.
    #[command(flatten)]
    pub reads: ReadOptions,
    /// Show no progress
    #[arg(long, hide = true)]
    pub quiet: bool,
    /// Say what is told to the parent process
    #[arg(long, hide = true, requires = "client_index")]
    pub tell_parent: bool,
}

impl JobOptions {
    /// Checks what the parser cannot.
    ///
    /// # Errors
    /// Values that make no sense together.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        if let Some(index) = self.client_index.filter(|&index| index >= self.clients) {
            bail!(
                "--client-index {index} is too large: with --clients {} it is 0 to {}",
                self.clients,
                self.clients - 1
            );
        }
        Ok(())
    }

    /// Workers of the whole job.
    pub fn all_workers(&self) -> usize {
        self.clients as usize * self.workers as usize
    }

    /// The numbers, within the job, of the workers of client `index`.
    pub fn workers_of(&self, index: u16) -> std::ops::Range<usize> {
        let first = index as usize * self.workers as usize;
        first..first + self.workers as usize
    }

    /// How a client connects whose largest table has so many rows of so many elements of 4 bytes.
    pub fn client_options(&self, rows: u64, width: usize) -> ClientOptions {
        // A row has a header of 16 bytes, as its image in the servers has. One table may take half of the cache.
        let row = (16 + 4 * width).next_multiple_of(16);
        let oracle = if self.check { 2 * self.all_workers() * SPREAD * 64 } else { 0 };
        let cache_bytes = self.cache.unwrap_or((1 << 20) + 2 * rows as usize * row + oracle);
        let options = connect::client_options(self.clients, self.reads);
        ClientOptions { cache_bytes, check: self.check, devices: self.devices.clone(), ..options }
    }

    /// The model, as the reports name it: `none` without a server.
    pub fn model_name(&self) -> String {
        if self.no_server { "none".into() } else { self.model.model.to_string() }
    }

    /// The staleness, where the model has one.
    pub fn staleness(&self) -> Option<u32> {
        self.model.bounded_by().filter(|_| !self.no_server)
    }

    /// What the job is, in a few words.
    pub fn title(&self) -> String {
        if self.no_server { plain_threads(self.all_workers()) } else { self.model.to_string() }
    }

    /// Puts the arguments of client number `index` of the job called `job`, for its servers at `urls`.
    pub fn put(&self, index: u16, job: &str, urls: &[String], arguments: &mut Arguments) {
        arguments.put("client-index", &index);
        arguments.put("job", &job);
        urls.iter().for_each(|url| arguments.put("server", url));
        self.devices.iter().for_each(|device| arguments.put("devices", device));
        arguments.put("clocks-per-epoch", &self.clocks_per_epoch);
        arguments.put("epochs", &self.epochs);
        arguments.put("seed", &self.seed);
        arguments.put("model", &self.model.model);
        arguments.put("clients", &self.clients);
        arguments.put("workers", &self.workers);
        arguments.put_some("cache", self.cache.as_ref());
        arguments.put_some("staleness", self.model.staleness.as_ref());
        arguments.put_some("v0", self.model.v0.as_ref());
        arguments.put_some("continuous", self.model.continuous.as_ref());
        arguments.flag("check", self.check);
        arguments.flag("copies", self.reads.copies);
        arguments.put("read-lanes", &self.reads.read_lanes);
        arguments.flag("tell-parent", true);
    }
}

/// So many plain threads, in words.
pub fn plain_threads(count: usize) -> String {
    format!("{count} plain thread{}", if count == 1 { "" } else { "s" })
}

/// Arguments of a client process, as they are put together.
#[derive(Debug, Default)]
pub struct Arguments(pub Vec<OsString>);

impl Arguments {
    /// Puts `--name=value`.
    pub fn put(&mut self, name: &str, value: &dyn ToString) {
        self.0.push(format!("--{name}={}", value.to_string()).into());
    }

    /// The same, if there is a value.
    pub fn put_some<T: ToString>(&mut self, name: &str, value: Option<&T>) {
        value.into_iter().for_each(|value| self.put(name, value));
    }

    /// Puts `--name=path`; a path need not be text.
    pub fn put_path(&mut self, name: &str, path: Option<&std::path::PathBuf>) {
        if let Some(path) = path {
            let mut argument = OsString::from(format!("--{name}="));
            argument.push(path);
            self.0.push(argument);
        }
    }

    /// Puts `--name` if it is set.
    pub fn flag(&mut self, name: &str, set: bool) {
        self.0.extend(set.then(|| OsString::from(format!("--{name}"))));
    }
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches as _;

    use super::*;

    #[test]
    fn its_clients_use_the_devices_that_are_named() {
        let command = JobOptions::augment_args(clap::Command::new("job").no_binary_name(true));
        let given = ["--devices", "mlx5_0:1,mlx5_1", "--server", "fervor://a:1"];
        let options = command.clone().try_get_matches_from(given).unwrap();
        let options = JobOptions::from_arg_matches(&options).unwrap();
        let mut arguments = Arguments::default();
        options.put(0, "job", &options.server, &mut arguments);
        let again = command.try_get_matches_from(arguments.0).unwrap();
        let again = JobOptions::from_arg_matches(&again).unwrap().client_options(1, 1).devices;
        assert_eq!(again.iter().map(RailName::to_string).collect::<Vec<_>>(), ["mlx5_0:1", "mlx5_1"]);
    }

    #[test]
    fn a_job_that_is_checked_has_checked_clients() {
        let command = JobOptions::augment_args(clap::Command::new("job").no_binary_name(true));
        for check in [false, true] {
            let arguments = check.then_some("--check");
            let matches = command.clone().try_get_matches_from(arguments).unwrap();
            let options = JobOptions::from_arg_matches(&matches).unwrap();
            assert_eq!(options.client_options(1, 1).check, check);
            let mut arguments = Arguments::default();
            options.put(0, "job", &["shm:///s".into()], &mut arguments);
            let matches = command.clone().try_get_matches_from(arguments.0).unwrap();
            assert_eq!(JobOptions::from_arg_matches(&matches).unwrap().check, check);
        }
    }
}
