//! The thread that sleeps on the completion channel of a rail, for a polling thread that sleeps elsewhere.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::transport::{Attach, Signal, host::HostSignal, rdma::RdmaAttach};

/// The thread that sleeps on a completion channel for a polling thread that sleeps elsewhere.
pub(super) struct Watcher {
    attach: RdmaAttach,
    orders: HostSignal,
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watcher {
    pub(super) fn start(attach: RdmaAttach, wake: impl Fn() + Send + 'static) -> Self {
        let (orders, ended) = (HostSignal::new(), Arc::new(AtomicBool::new(false)));
        let (sleeper, heard, stop) = (attach.clone(), orders.clone(), ended.clone());
        let body = move || {
            let mut seen = 0;
            while !stop.load(Ordering::SeqCst) {
                // Each order is one arming of the channel.
                heard.wait(seen, Duration::from_secs(3600));
                let now = heard.epoch();
                if now == seen || stop.load(Ordering::SeqCst) {
                    continue;
                }
                seen = now;
                sleeper.sleep(Duration::from_secs(3600));
                wake();
            }
        };
        let thread = std::thread::Builder::new().name("fervor-watch-rdma".to_owned()).spawn(body);
        Self {
            attach,
            orders,
            ended,
            thread: Some(thread.expect("the system has a thread for each endpoint")),
        }
    }

    /// The queue has been armed.
    pub(super) fn watch(&self) {
        self.orders.notify();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        self.orders.notify();
        self.attach.wake();
        if let Some(thread) = self.thread.take() {
            // It says why it panicked.
            let _ = thread.join();
        }
    }
}
