//! A job on real processes over TCP whose network is cut for a second: it ends as if nothing had been.

mod common;

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use common::{Folder, bench, check_report, eventually, objectives, said};

/// The network between the clients and the server: whoever connects to it is connected to the server, and what is said is passed on.
struct Network {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Nobody gets through.
    cut: AtomicBool,
    /// Bytes passed on.
    bytes: AtomicU64,
    /// Both ends of all connections.
    streams: Mutex<Vec<TcpStream>>,
}

impl Shared {
    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = [0; 1 << 16];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..length]).is_err() {
                break;
            }
            self.bytes.fetch_add(length as u64, Ordering::Relaxed);
        }
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    }

    fn streams(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Network {
    fn new(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared::default());
        let network = Self { port, shared: shared.clone() };
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(("127.0.0.1", server)) else { return };
                // Nagle's algorithm would wait for what is not coming.
                [&near, &far].into_iter().for_each(|stream| stream.set_nodelay(true).unwrap());
                let clone = |stream: &TcpStream| stream.try_clone().unwrap();
                let mut streams = shared.streams();
                // Under the lock: who is cut off is in the list, or comes after the cut.
                if shared.cut.load(Ordering::SeqCst) {
                    continue;
                }
                streams.extend([clone(&near), clone(&far)]);
                for (from, to) in [(clone(&near), clone(&far)), (far, near)] {
                    let shared = shared.clone();
                    thread::spawn(move || shared.pass(from, to));
                }
            }
        });
        network
    }

    /// Cuts all connections, and lets nobody through until [`Network::mend`].
    fn cut(&self) {
        let mut streams = self.shared.streams();
        self.shared.cut.store(true, Ordering::SeqCst);
        streams.drain(..).for_each(|stream| _ = stream.shutdown(Shutdown::Both));
    }

    fn mend(&self) {
        self.shared.cut.store(false, Ordering::SeqCst);
    }

    /// Waits until so many more bytes have passed.
    fn wait_for(&self, more: u64) {
        let before = self.shared.bytes.load(Ordering::Relaxed);
        eventually("bytes pass", || self.shared.bytes.load(Ordering::Relaxed) >= before + more);
    }
}

/// A server, and what it says of clients that come back.
struct Server {
    child: Child,
    port: u16,
    back: Arc<AtomicU64>,
}

impl Server {
    fn start() -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_fervor-bench")).with_file_name("fervor-server");
        let mut command = Command::new(program);
        command.args(["--listen=tcp://127.0.0.1:0", "--shards=2", "--lease=20"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let ready = lines.find(|line| line.contains("ready at")).expect("it gets ready");
        let port = ready.rsplit(':').next().unwrap().parse().unwrap();
        thread::spawn(move || lines.for_each(drop));
        let back = Arc::new(AtomicU64::new(0));
        let (errors, count) = (BufReader::new(child.stderr.take().unwrap()), back.clone());
        thread::spawn(move || {
            for line in errors.lines().map_while(Result::ok) {
                count.fetch_add(line.contains("is back after").into(), Ordering::SeqCst);
                eprintln!("{line}");
            }
        });
        Self { child, port, back }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Trains on two clients with two workers each, while the network is cut twice.
fn train(model: &str, more: &[&str]) {
    let (folder, server) = (Folder::new(), Server::start());
    let network = Network::new(server.port);
    let url = format!("tcp://127.0.0.1:{}", network.port);
    let model_option = format!("--model={model}");
    let clients = ["0", "1"].map(|index| {
        let json = format!("{index}.json");
        let mut command = bench(&["mf", "--generate=400x100:20000", "--rank=16", "--clocks-per-epoch=10"]);
        command.args(["--step=0.02", "--decay=1", "--epochs=120", "--workers=2", "--clients=2", "--check"]);
        command.args([&model_option, "--server", &url, "--client-index", index]).args(more);
        command.args(["--json", &folder.file(&json)]).stdout(Stdio::piped()).stderr(Stdio::piped());
        (json, command.spawn().expect("it starts"))
    });
    // It trains: what the clients say when they start is less.
    for pause in [1000, 100] {
        network.wait_for(4 << 20);
        network.cut();
        thread::sleep(Duration::from_millis(pause));
        network.mend();
    }
    let losses = clients.map(|(json, client)| {
        let output = client.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{model}: {}", said(&output));
        let results = folder.json(&json);
        check_report(&results, model, results["staleness"].as_u64(), true);
        objectives(&results, "loss")
    });
    for losses in losses {
        assert!(losses.len() == 121 && losses[120] < 0.7 * losses[0], "{model}: {losses:?}");
    }
    // Each of two clients, at each of two shards, at least once.
    let back = server.back.load(Ordering::SeqCst);
    assert!(back >= 4, "{model}: clients came back {back} times");
}

#[test]
fn a_job_that_pushes_goes_on_after_its_network_was_cut() {
    train("essp", &["--staleness=2"]);
}

#[test]
fn a_job_that_reads_goes_on_after_its_network_was_cut() {
    train("ssp", &["--staleness=2"]);
}
