//! What the user sees while memory is touched: nothing, if that takes a moment, as it does for a few GiB.
//!
//! On a terminal it is a line that changes; elsewhere a line every few seconds, for a log.

use std::{
    io::{IsTerminal, Write as _},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use fervor_server::Progress;

/// What is over before this is not shown.
const MOMENT: Duration = Duration::from_secs(1);
/// How often there is a line, on a terminal and elsewhere.
const ON_TERMINAL: Duration = Duration::from_millis(200);
const IN_LOG: Duration = Duration::from_secs(5);

/// Shows on stderr how far it has come.
pub struct Shown {
    start: Instant,
    terminal: bool,
    lines: Mutex<Lines>,
}

impl Shown {
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let lines = Mutex::new(Lines::new(if terminal { ON_TERMINAL } else { IN_LOG }));
        Self { start: Instant::now(), terminal, lines }
    }

    /// By whichever thread, after each piece.
    pub fn show(&self, progress: Progress) {
        // Every change of it is one assignment.
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(line) = lines.at(self.start.elapsed(), progress) else { return };
        let mut stderr = std::io::stderr().lock();
        // Whether anybody reads it is not for the server to care about.
        let _ = match (self.terminal, progress.touched < progress.total) {
            (true, true) => write!(stderr, "\r{line}"),
            (true, false) => writeln!(stderr, "\r{line}"),
            (false, _) => writeln!(stderr, "{line}"),
        };
        let _ = stderr.flush();
    }
}

/// Which lines there are, and when.
struct Lines {
    every: Duration,
    next: Duration,
}

impl Lines {
    fn new(every: Duration) -> Self {
        Self { every, next: MOMENT }
    }

    /// The line to show at this time since the start, if there is one: now and then, and at the end if there was one before.
    fn at(&mut self, now: Duration, progress: Progress) -> Option<String> {
        let shown_before = self.next > MOMENT;
        let over = progress.touched >= progress.total;
        if !(now >= self.next || over && shown_before) {
            return None;
        }
        self.next = now + self.every;
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let rate = gib(progress.touched) / now.as_secs_f64();
        Some(format!(
            "fervor-server: touched {:.1} of {:.1} GiB of memory, {rate:.1} GiB/s",
            gib(progress.touched),
            gib(progress.total)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lines: &mut Lines, ms: u64, gib: usize) -> Option<String> {
        lines.at(Duration::from_millis(ms), Progress { touched: gib << 30, total: 8 << 30 })
    }

    #[test]
    fn what_takes_a_moment_is_not_shown() {
        let mut lines = Lines::new(IN_LOG);
        assert_eq!(at(&mut lines, 500, 4), None);
        assert_eq!(at(&mut lines, 999, 8), None);
    }

    #[test]
    fn what_takes_long_has_a_line_now_and_then_and_one_at_the_end() {
        let mut lines = Lines::new(IN_LOG);
        let first = at(&mut lines, 2000, 1).unwrap();
        assert_eq!(first, "fervor-server: touched 1.0 of 8.0 GiB of memory, 0.5 GiB/s");
        assert_eq!(at(&mut lines, 6999, 3), None);
        assert!(at(&mut lines, 7000, 4).unwrap().contains("4.0 of 8.0"));
        assert!(at(&mut lines, 7100, 8).unwrap().contains("8.0 of 8.0"));
    }
}
