//! Histograms as HdrHistogram interval logs (V2), and as curves of percentiles.

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use hdrhistogram::{
    Histogram,
    serialization::{
        Deserializer, V2DeflateSerializer,
        interval_log::{IntervalLogIterator, IntervalLogWriterBuilder, LogEntry, Tag},
    },
};

use crate::figures::{Axis, Curve, rising_curves};

/// A histogram of nanoseconds with a name.
#[derive(Debug, Clone)]
pub struct Recording {
    /// `op-size`, the tag in a log; in a picture of several runs, after the name of the log.
    pub name: String,
    /// The samples.
    pub histogram: Histogram<u64>,
    /// How long all of them took together.
    pub length: Duration,
}

/// Writes an interval for each of the `recordings`, with its name as the tag.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, recordings: &[Recording]) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let mut file = BufWriter::new(File::create(path).with_context(failed)?);
    let mut serializer = V2DeflateSerializer::new();
    {
        let mut log = IntervalLogWriterBuilder::new()
            .add_comment("latencies in nanoseconds, by fervor-bench latency")
            .with_start_time(SystemTime::now())
            .with_max_value_divisor(1e6)
            .begin_log_with(&mut file, &mut serializer)
            .with_context(failed)?;
        for Recording { name, histogram, length } in recordings {
            let tag = Tag::new(name).context("the tag has no forbidden character")?;
            log.write_histogram(histogram, Duration::ZERO, *length, Some(tag))
                .map_err(|error| anyhow!("{error:?}"))
                .with_context(failed)?;
        }
    }
    file.flush().with_context(failed)
}

/// Reads a log. Intervals of one tag are added up; those without a tag are called `all`.
///
/// # Errors
/// When the file cannot be read, is no such log, or has no interval.
pub fn read(path: &Path) -> Result<Vec<Recording>> {
    let file = || format!("{}", path.display());
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut all: Vec<Recording> = Vec::new();
    for entry in IntervalLogIterator::new(&text) {
        let entry =
            entry.map_err(|error| anyhow!("it is no HdrHistogram log (V2): {error:?}")).with_context(file)?;
        let LogEntry::Interval(interval) = entry else { continue };
        let name = interval.tag().map_or("all", |tag| tag.as_str()).to_owned();
        let packed = BASE64_STANDARD.decode(interval.encoded_histogram()).with_context(file)?;
        let histogram: Histogram<u64> = Deserializer::new()
            .deserialize(&mut packed.as_slice())
            .map_err(|error| anyhow!("a histogram in it is broken: {error:?}"))
            .with_context(file)?;
        match all.iter_mut().find(|recording| recording.name == name) {
            Some(recording) => {
                recording
                    .histogram
                    .add(&histogram)
                    .map_err(|error| anyhow!("{error:?}"))
                    .with_context(file)?;
                recording.length += interval.duration();
            }
            None => all.push(Recording { name, histogram, length: interval.duration() }),
        }
    }
    ensure!(
        !all.is_empty(),
        "{} has no interval: write it with `fervor-bench latency --hlog`",
        path.display()
    );
    Ok(all)
}

/// As [`read`], with the name of the file before those of the recordings.
///
/// # Errors
/// As [`read`].
pub fn read_named(path: &Path) -> Result<Vec<Recording>> {
    let file = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let recordings = read(path)?.into_iter();
    Ok(recordings.map(|r| Recording { name: format!("{file}: {}", r.name), ..r }).collect())
}

/// The latencies against the percentiles, a curve for each recording.
///
/// # Errors
/// When there is nothing to draw.
pub fn draw(recordings: &[Recording]) -> Result<String> {
    // Points from 0 % on, eight for each further nine.
    let curve = |recording: &Recording| {
        let count = recording.histogram.len().max(1) as f64;
        let slower =
            (0..).map(|step| 10f64.powf(f64::from(step) / 8.0)).take_while(move |slower| *slower <= count);
        let points = slower.map(|slower| {
            let latency = recording.histogram.value_at_quantile(1.0 - 1.0 / slower);
            (slower, latency as f64 / 1e3)
        });
        Curve::new(recording.name.clone(), points)
    };
    let slower = "one operation in so many is slower (10: 90 %, 100: 99 %, 1000: 99.9 %)";
    let all: Vec<Curve> = recordings.iter().map(curve).collect();
    rising_curves(Axis::logarithmic(slower), Axis::logarithmic("latency [µs]"), &all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::latency::ops;

    fn recording(name: &str, values: impl Iterator<Item = u64>) -> Recording {
        let mut histogram = ops::histogram();
        values.for_each(|value| histogram.record(value).unwrap());
        Recording { name: name.into(), histogram, length: Duration::from_secs(1) }
    }

    #[test]
    fn a_log_is_read_as_it_was_written() {
        let path = std::env::temp_dir().join(format!("fervor-hlog-{}.hlog", std::process::id()));
        let all = [recording("hit-64", 1..=1000), recording("miss-64", (1..=1000).map(|n| 10 * n))];
        write(&path, &all).unwrap();
        let found = read(&path).unwrap();
        let names: Vec<&str> = found.iter().map(|recording| &*recording.name).collect();
        assert_eq!(names, ["hit-64", "miss-64"]);
        for (found, written) in found.iter().zip(&all) {
            assert_eq!(found.histogram, written.histogram);
            assert_eq!(found.length, written.length);
        }
        assert!(read_named(&path).unwrap()[0].name.ends_with(": hit-64"));

        fs::write(&path, "no log").unwrap();
        assert!(format!("{:#}", read(&path).unwrap_err()).contains("no HdrHistogram log"));
        fs::write(&path, "#[only a comment]\n").unwrap();
        assert!(format!("{:#}", read(&path).unwrap_err()).contains("has no interval"));
        fs::remove_file(&path).unwrap();
        assert!(format!("{:#}", read(&path).unwrap_err()).contains("cannot read"));
    }

    #[test]
    fn several_runs_are_one_picture() {
        let svg = draw(&[recording("a: hit-64", 1..=1000), recording("b: hit-64", 5..=5000)]).unwrap();
        assert!(svg.contains("a: hit-64") && svg.contains("b: hit-64") && svg.contains("99.9 %"));
        assert!(draw(&[]).is_err());
    }
}
