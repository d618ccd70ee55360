//! Who sends: one thread at a time, and never one that waits for another.
//!
//! ```text
//! whoever put something:  news := 1;  fence;  tries the lock;  has it: news := 0, sends;  has it not: leaves
//! who has the lock:       lets go of it;  fence;  news is 1: tries the lock once more
//! ```
//!
//! **What was put is sent, by whoever has the lock.** A thread that finds the lock taken has said `news` before. Of the two fences one is
//! the first. If it is this thread's, the holder looks at `news` after it let go of the lock, and sees the 1; or the 0 that somebody
//! wrote later, who had the lock, and looked at what was put after that. If it is the holder's, this thread finds the lock free.
//!
//! **A full socket.** The kernel reports room once, to nobody in particular, and also where nobody waits: each report of bytes that have
//! come in is one of room, too. A sender that tried once, and then said that it waits, could say so after the report. So it says `full`,
//! and tries again. If that try gets nothing, the report comes after it, and so after the word: the engine sees the word, and sends (or
//! finds the lock taken, as above). If it gets something, the sender goes on itself.

use std::sync::atomic::Ordering;

use crate::memory::atomic::Word;

/// What is left after a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flush {
    /// Nothing.
    Done,
    /// The kernel takes no more now, or the connection is broken.
    Blocked,
    /// More than one call hands over.
    More,
}

/// What came of a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Try {
    /// There is nothing to send.
    Nothing,
    /// There is more than one turn may send.
    More,
    /// The socket took all that it was given, or was interrupted.
    All,
    /// It took a part.
    Part,
    /// It takes nothing now.
    Full,
    /// It takes nothing any more.
    Failed,
}

/// What threads tell each other without the lock. Each word is 0 or 1.
#[derive(Debug, Default)]
pub(super) struct Signs<W> {
    /// Something was put, and who put it may have found the lock taken.
    news: W,
    /// What is left waits for room in the socket.
    full: W,
}

impl<W: Word> Signs<W> {
    /// Has what was put sent: by this thread, with `attempt`, or by the one that has the lock. A thread that hears that there is
    /// [more](Flush::More) has this called again: part of it may have been left to it by others.
    pub(super) fn send<G>(
        &self,
        lock: impl Fn() -> Option<G>,
        mut attempt: impl FnMut(&mut G) -> Try,
    ) -> Flush {
        loop {
            self.news.store(1, Ordering::Relaxed);
            W::fence(Ordering::SeqCst);
            let Some(mut guard) = lock() else { return Flush::Done };
            // SYNC POINT: before the look at what was put.
            self.news.store(0, Ordering::Relaxed);
            let left = self.fill(|| attempt(&mut guard));
            drop(guard);
            W::fence(Ordering::SeqCst);
            // Also where the socket was full: who found the lock taken may have come with the report of room.
            if left == Flush::More || self.news.load(Ordering::Relaxed) == 0 {
                return left;
            }
        }
    }

    /// Sends until there is nothing more or the socket is full.
    fn fill(&self, mut attempt: impl FnMut() -> Try) -> Flush {
        let mut said = false;
        loop {
            match attempt() {
                Try::Nothing => return Flush::Done,
                Try::More => return Flush::More,
                Try::Failed => return Flush::Blocked,
                Try::Full if said => return Flush::Blocked,
                // SYNC POINT: before the try whose failure the kernel answers with a report.
                Try::Full | Try::Part => said = true,
                Try::All => said = false,
            }
            self.full.store(u64::from(said), Ordering::SeqCst);
        }
    }

    /// Whether somebody waits for the room that the kernel has just reported.
    pub(super) fn is_room_awaited(&self) -> bool {
        self.full.load(Ordering::SeqCst) != 0
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::{
        model::Builder,
        sync::{Arc, Mutex, atomic::AtomicU64},
        thread,
    };

    use super::*;

    /// A socket as the kernel has it: it reports room to whoever listens if a try got nothing before.
    struct Socket {
        room: u64,
        wanted: bool,
        taken: u64,
    }

    struct Model {
        signs: Signs<AtomicU64>,
        /// What was put and is not sent.
        put: Mutex<u64>,
        /// The lock of who sends: 1 is taken. (`try_lock` of the model checker's mutex never finds it taken.)
        sender: AtomicU64,
        socket: Mutex<Socket>,
    }

    struct Held<'a>(&'a AtomicU64);

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.0.store(0, Ordering::Release);
        }
    }

    impl Model {
        fn new(room: u64) -> Arc<Self> {
            Arc::new(Self {
                signs: Signs { news: AtomicU64::new(0), full: AtomicU64::new(0) },
                put: Mutex::new(0),
                sender: AtomicU64::new(0),
                socket: Mutex::new(Socket { room, wanted: false, taken: 0 }),
            })
        }

        fn put(&self, count: u64) {
            *self.put.lock().unwrap() += count;
        }

        fn flush(&self) {
            let free = || self.sender.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok();
            let lock = || free().then(|| Held(&self.sender));
            self.signs.send(lock, |_| {
                let left = *self.put.lock().unwrap();
                if left == 0 {
                    return Try::Nothing;
                }
                let mut socket = self.socket.lock().unwrap();
                let count = socket.room.min(left);
                socket.wanted |= count < left;
                socket.room -= count;
                socket.taken += count;
                *self.put.lock().unwrap() -= count;
                match count {
                    0 => Try::Full,
                    _ if count < left => Try::Part,
                    _ => Try::All,
                }
            });
        }

        /// The peer reads; the engine hears of it, if the kernel reports it.
        fn read(&self) {
            let reported = {
                let mut socket = self.socket.lock().unwrap();
                socket.room += 1;
                std::mem::take(&mut socket.wanted)
            };
            if reported && self.signs.is_room_awaited() {
                self.flush();
            }
        }

        fn all_taken(&self, count: u64) {
            assert_eq!(self.socket.lock().unwrap().taken, count, "the rest is left, and nobody sends it");
        }
    }

    fn check(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    #[test]
    fn loom_what_is_put_while_another_sends_is_sent() {
        check(|| {
            let model = Model::new(9);
            let other = thread::spawn({
                let model = model.clone();
                move || {
                    model.put(1);
                    model.flush();
                }
            });
            model.put(1);
            model.flush();
            other.join().unwrap();
            model.all_taken(2);
        });
    }

    #[test]
    fn loom_room_that_is_reported_is_used() {
        // The first try gets nothing, or a part.
        for room in [0, 1] {
            check(move || {
                let model = Model::new(room);
                let engine = thread::spawn({
                    let model = model.clone();
                    move || model.read()
                });
                model.put(room + 1);
                model.flush();
                engine.join().unwrap();
                model.all_taken(room + 1);
            });
        }
    }
}
