//! A bare TCP stream over loopback: what pushes over TCP are set beside.
//!
//! One thread writes blocks of [`BLOCK`] bytes, as iperf3 does, another reads them into one buffer and forgets them. Neither looks at
//! them: what a receiver does besides, a check or a copy to where the bytes belong, is not in it.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// Bytes of a write, and of a read.
const BLOCK: usize = 128 << 10;

/// Bytes a second that arrive in `duration`.
///
/// # Errors
/// The system's.
pub fn bandwidth(duration: Duration) -> Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on loopback")?;
    let address = listener.local_addr().context("the listening socket's address")?;
    let mut sender = TcpStream::connect(address).context("connecting on loopback")?;
    let (mut receiver, _) = listener.accept().context("accepting on loopback")?;
    thread::scope(|scope| {
        let received = scope.spawn(move || -> std::io::Result<f64> {
            let mut block = vec![0; BLOCK];
            // The first bytes start the time.
            let _ = receiver.read(&mut block)?;
            let (start, mut bytes) = (Instant::now(), 0);
            while start.elapsed() < duration {
                match receiver.read(&mut block)? {
                    0 => break,
                    count => bytes += count,
                }
            }
            let rate = bytes as f64 / start.elapsed().as_secs_f64();
            // The socket is closed with this, and the sender's write fails.
            drop(receiver);
            Ok(rate)
        });
        let block = vec![1; BLOCK];
        while !received.is_finished() {
            if sender.write_all(&block).is_err() {
                break;
            }
        }
        let rate = received.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        rate.context("reading a stream over loopback")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_ends_by_itself_and_has_moved_something() {
        let rate = bandwidth(Duration::from_millis(30)).unwrap();
        assert!(rate > BLOCK as f64, "{rate}");
    }
}
