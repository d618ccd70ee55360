//! What is run: each setting, as the command line of its job.

use anyhow::Result;
use clap::Args;

use super::{Job, ScalingOptions, Shards};
use crate::{job::options::plain_threads, model::ModelName};

/// One way to run the job on a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) model: ModelName,
    pub(super) clients: u16,
    /// Of each client.
    pub(super) workers: u16,
    pub(super) shards: Shards,
}

/// All settings with one number of workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) workers: u16,
    pub(super) settings: Vec<Setting>,
}

/// 1, 2, 4 … and `most`.
pub(super) fn steps(most: u16) -> Vec<u16> {
    let mut steps: Vec<u16> =
        std::iter::successors(Some(1u16), |n| n.checked_mul(2)).take_while(|n| *n < most).collect();
    steps.push(most);
    steps
}

/// The settings with so many workers. One worker is one client of one worker, either way.
pub(super) fn settings_of(options: &ScalingOptions, workers: u16) -> Vec<Setting> {
    let mut settings = Vec::new();
    for &model in &options.models {
        for &shards in &options.shards {
            settings.push(Setting { model, clients: workers, workers: 1, shards });
            if workers > 1 {
                settings.push(Setting { model, clients: 1, workers, shards });
            }
        }
    }
    settings
}

pub(super) fn describe(options: &ScalingOptions, workers: u16, setting: Option<&Setting>) -> String {
    let job = options.job.name();
    match setting {
        None => format!("{job}, {}", plain_threads(workers.into())),
        Some(Setting { model, clients, workers, shards }) => format!(
            "{job} {model}, {clients} clients x {workers} workers, {} shards",
            shards.count(clients * workers)
        ),
    }
}

/// What all runs have in common.
pub(super) fn in_words(options: &ScalingOptions) -> String {
    let (data, epochs) = defaults(options);
    let size = match options.job {
        Job::Mf => format!("--rank {}", options.rank),
        Job::Lda => format!("--topics {}", options.topics),
    };
    let rounds = match options.rounds {
        1 => "one round".into(),
        rounds => format!("medians of {rounds} rounds"),
    };
    let copies = if options.reads.copies { " --copies" } else { "" };
    format!(
        "{} --generate {data} {size} --clocks-per-epoch {} --epochs {epochs} --seed {}{copies}, {rounds}",
        options.job.name(),
        options.clocks_per_epoch,
        options.seed
    )
}

/// The data and the passes over it.
fn defaults(options: &ScalingOptions) -> (String, u32) {
    let (data, epochs) = match options.job {
        Job::Mf => ("2000x1000:200000", 300),
        Job::Lda => ("5000x10000:1000000", 10),
    };
    (options.generate.clone().unwrap_or_else(|| data.into()), options.epochs.unwrap_or(epochs))
}

/// The command line of the job, as a user would write it.
pub(super) fn arguments(options: &ScalingOptions, workers: u16, setting: Option<&Setting>) -> Vec<String> {
    let (data, epochs) = defaults(options);
    let mut arguments = vec![
        format!("--generate={data}"),
        format!("--epochs={epochs}"),
        format!("--clocks-per-epoch={}", options.clocks_per_epoch),
        format!("--seed={}", options.seed),
        "--quiet".into(),
    ];
    arguments.push(match options.job {
        Job::Mf => format!("--rank={}", options.rank),
        Job::Lda => format!("--topics={}", options.topics),
    });
    match setting {
        None => {
            arguments.extend(["--no-server".into(), "--clients=1".into(), format!("--workers={workers}")])
        }
        Some(setting) => {
            let shards = setting.shards.count(workers);
            arguments.push(format!("--model={}", setting.model));
            if matches!(setting.model, ModelName::Ssp | ModelName::Essp) {
                arguments.push(format!("--staleness={}", options.staleness));
            }
            arguments.push(format!("--clients={}", setting.clients));
            arguments.push(format!("--workers={}", setting.workers));
            arguments.push(format!("--shards={shards}"));
            arguments.push(format!("--memory={}", options.memory));
            arguments.extend(options.reads.copies.then(|| "--copies".into()));
            arguments.push(format!("--read-lanes={}", options.reads.read_lanes));
        }
    }
    arguments
}

/// Options of a job from its command line.
pub(super) fn parsed<O: Args>(name: &'static str, arguments: &[String]) -> Result<O> {
    let command = O::augment_args(clap::Command::new(name).no_binary_name(true));
    Ok(O::from_arg_matches(&command.try_get_matches_from(arguments)?)?)
}

pub(super) fn title(options: &ScalingOptions, model: ModelName) -> String {
    match model {
        ModelName::Ssp | ModelName::Essp => format!("{model}({})", options.staleness),
        _ => model.to_string(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::mf::MfOptions;

    pub fn options(arguments: &[&str]) -> ScalingOptions {
        parsed("scaling", &arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
            .unwrap()
    }

    #[test]
    fn workers_double_up_to_the_most() {
        assert_eq!(steps(1), [1]);
        assert_eq!(steps(2), [1, 2]);
        assert_eq!(steps(6), [1, 2, 4, 6]);
        assert_eq!(steps(8), [1, 2, 4, 8]);
    }

    #[test]
    fn settings_are_models_times_shards_times_shapes() {
        let options = options(&["--models=essp,ssp", "--shards=1,auto"]);
        assert_eq!(settings_of(&options, 1).len(), 4);
        let settings = settings_of(&options, 8);
        assert_eq!(settings.len(), 8);
        assert!(settings.iter().all(|s| s.clients * s.workers == 8));
        let shards: Vec<u32> = settings.iter().map(|s| s.shards.count(8)).collect();
        assert_eq!(shards, [1, 1, 4, 4, 1, 1, 4, 4]);
    }

    #[test]
    fn the_jobs_understand_their_command_lines() {
        let options = options(&["--models=essp,bsp", "--epochs=7", "--copies"]);
        for setting in settings_of(&options, 2).iter().map(Some).chain([None]) {
            let arguments = arguments(&options, 2, setting);
            let mf: MfOptions = parsed("mf", &arguments).unwrap();
            mf.validate().unwrap();
            assert_eq!((mf.job.all_workers(), mf.job.epochs, mf.rank), (2, 7, 32));
            assert_eq!(mf.job.no_server, setting.is_none());
            assert_eq!(mf.job.reads.copies, setting.is_some());
        }
    }
}
