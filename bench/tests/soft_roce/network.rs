//! The network between the two devices, made worse for a while.

use std::process::Command;

/// The netdevs under rxe0 and rxe1.
const ENDS: [&str; 2] = ["v0", "v1"];

/// A network that loses packets in both directions, until this is dropped.
pub struct Lossy;

impl Lossy {
    /// Loses this part of all packets.
    pub fn new(percent: u32) -> Self {
        // From here on it is taken away again, even if only one end could be made worse.
        let lossy = Self;
        for end in ENDS {
            tc(&["qdisc", "replace", "dev", end, "root", "netem", "loss", &format!("{percent}%")]);
        }
        lossy
    }

    /// How many packets were lost so far, in both directions.
    pub fn lost(&self) -> u64 {
        ENDS.iter()
            .map(|end| {
                let statistics = tc(&["-s", "qdisc", "show", "dev", end]);
                let (_, rest) = statistics.split_once("dropped ").expect("tc -s says how many were dropped");
                let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
                digits.and_then(|digits| digits.parse::<u64>().ok()).expect("a number")
            })
            .sum()
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        for end in ENDS {
            let removed = Command::new("tc").args(["qdisc", "del", "dev", end, "root"]).status();
            if !removed.as_ref().is_ok_and(|status| status.success()) {
                eprintln!("{end} stays lossy: {removed:?}");
            }
        }
    }
}

fn tc(arguments: &[&str]) -> String {
    let output =
        Command::new("tc").args(arguments).output().unwrap_or_else(|error| panic!("cannot run tc: {error}"));
    assert!(
        output.status.success(),
        "tc {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
