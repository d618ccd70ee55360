//! The network between the two devices, made worse for a while; and another one beside it.

use std::{path::Path, process::Command};

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

/// Another pair of devices, rxe2 (10.8.0.1) and rxe3 (10.8.0.2), until this is dropped.
pub struct Second;

impl Second {
    pub fn up() -> Self {
        let second = Self;
        Self::make("up").expect("make the second pair of devices");
        second
    }

    /// Takes the link between them down, as if a port or a switch had died.
    pub fn take_down(&self) {
        let status = Command::new("ip").args(["link", "set", "v2", "down"]).status().expect("run ip");
        assert!(status.success(), "ip link set v2 down: {status}");
    }

    /// Loses all that is sent by it, though its ports stay up.
    pub fn silence(&self) {
        for end in ["v2", "v3"] {
            tc(&["qdisc", "replace", "dev", end, "root", "netem", "loss", "100%"]);
        }
    }

    fn make(what: &str) -> Result<(), String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/soft-roce-net");
        let output =
            Command::new(script).args(["second", what]).output().map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        if let Err(error) = Self::make("down") {
            eprintln!("the second pair of devices stays: {error}");
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
