//! The ring's indices and the doorbell under the model checker, which tries all interleavings and all values
//! that the memory model allows a load to return:
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test -p fervor-verbs --no-default-features --release loom_
//! ```

use std::{sync::atomic::Ordering, time::Duration};

use loom::{
    cell::UnsafeCell,
    model::Builder,
    sync::{Arc, Condvar, Mutex, atomic::AtomicU64},
    thread,
};

use super::{
    bell::{self, Bell, PARKED},
    claim, gate,
    ring::{Consumer, Producer},
};

/// Interleavings with at most this many involuntary switches: enough for every known bug of this kind, and
/// few enough to end within a minute.
const SWITCHES: usize = 3;

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(SWITCHES);
    builder.check(model);
}

/// A doorbell with two groups of two leaves. The mutex and the condition variable are the kernel's futex: it compares and
/// falls asleep in one step.
#[derive(Default)]
struct Model {
    summary: AtomicU64,
    leaves: [[AtomicU64; 2]; 2],
    futex: Mutex<()>,
    woken: Condvar,
}

impl Bell for Model {
    type Word = AtomicU64;

    fn summary(&self) -> &AtomicU64 {
        &self.summary
    }

    fn leaf(&self, leaf: usize) -> &AtomicU64 {
        &self.leaves[leaf / 62][leaf % 62]
    }

    fn sleep(&self, _: Duration) {
        let guard = self.futex.lock().unwrap();
        // A futex is 32 bits: the upper half.
        if self.summary.load(Ordering::SeqCst) >> 32 == PARKED >> 32 {
            // No time-out: a wake that is lost is a deadlock, which the model checker reports.
            drop(self.woken.wait(guard).unwrap());
        }
    }

    fn wake(&self) {
        drop(self.futex.lock().unwrap());
        self.woken.notify_one();
    }
}

/// Memory that is not atomic: the model checker reports two accesses that are not ordered.
struct Cell(UnsafeCell<u64>);

// SAFETY: every access is checked by loom, which fails the test on a race.
unsafe impl Sync for Cell {}
// SAFETY: a `u64` may change threads.
unsafe impl Send for Cell {}

impl Cell {
    fn new() -> Self {
        Self(UnsafeCell::new(0))
    }
    fn set(&self, value: u64) {
        // SAFETY: loom has checked that nobody else accesses the cell now.
        self.0.with_mut(|cell| unsafe { *cell = value });
    }
    fn get(&self) -> u64 {
        // SAFETY: loom has checked that nobody writes the cell now.
        self.0.with(|cell| unsafe { *cell })
    }
}

/// Ringers of these slots write their news, ring, and the owner, which sleeps when it finds nothing, sees
/// all.
fn no_wake_is_lost(slots: &'static [u32], layers: usize) {
    check(move || {
        let bell = Arc::new(Model::default());
        let news: Arc<Vec<Cell>> = Arc::new(slots.iter().map(|_| Cell::new()).collect());
        for (number, &slot) in slots.iter().enumerate() {
            let (bell, news) = (bell.clone(), news.clone());
            thread::spawn(move || {
                news[number].set(1);
                bell::ring(&*bell, slot);
            });
        }
        let mut seen = 0;
        while seen < slots.len() {
            let mut found = false;
            bell::take(&*bell, layers, |slot| {
                let number = slots.iter().position(|&s| s == slot).expect("a slot that was rung");
                assert_eq!(news[number].get(), 1);
                found = true;
                seen += 1;
            });
            if !found {
                bell::wait(&*bell, Duration::MAX);
            }
        }
    });
}

#[test]
fn loom_one_ringer() {
    no_wake_is_lost(&[3], 1);
}

#[test]
fn loom_two_ringers_of_one_leaf() {
    no_wake_is_lost(&[0, 1], 1);
}

#[test]
fn loom_two_ringers_of_two_leaves() {
    no_wake_is_lost(&[0, 64], 1);
}

#[test]
fn loom_two_ringers_of_two_layers() {
    no_wake_is_lost(&[0, 62 * 64], 2);
}

#[test]
fn loom_a_slot_rung_twice() {
    check(|| {
        let bell = Arc::new(Model::default());
        let news = Arc::new(AtomicU64::new(0));
        let ringer = {
            let (bell, news) = (bell.clone(), news.clone());
            thread::spawn(move || {
                for value in 1..=2 {
                    news.store(value, Ordering::Relaxed);
                    bell::ring(&*bell, 0);
                }
            })
        };
        let mut seen = 0;
        while seen < 2 {
            let mut found = false;
            bell::take(&*bell, 1, |_| {
                found = true;
                seen = news.load(Ordering::Relaxed);
            });
            if !found {
                bell::wait(&*bell, Duration::MAX);
            }
        }
        ringer.join().unwrap();
    });
}

#[test]
fn loom_a_notification_ends_the_next_wait() {
    check(|| {
        let bell = Arc::new(Model::default());
        let notifier = {
            let bell = bell.clone();
            thread::spawn(move || bell::notify(&*bell))
        };
        if !bell::take(&*bell, 1, |_| panic!("nobody rang")) {
            bell::wait(&*bell, Duration::MAX);
        }
        notifier.join().unwrap();
    });
}

#[test]
fn loom_nothing_is_written_behind_a_closed_gate() {
    check(|| {
        let words = Arc::new((AtomicU64::new(0), AtomicU64::new(0), Cell::new()));
        let writer = {
            let words = words.clone();
            thread::spawn(move || {
                for value in 1..=2 {
                    if gate::enter(&words.0, &words.1) {
                        words.2.set(value);
                        gate::leave(&words.0);
                    }
                }
            })
        };
        if gate::close(&words.0, &words.1) {
            // The owner's from now on: a write after this, or not ordered before it, is a race.
            words.2.set(9);
            writer.join().unwrap();
            assert_eq!(words.2.get(), 9);
        } else {
            writer.join().unwrap();
            assert!(gate::close(&words.0, &words.1), "who was inside has left");
        }
    });
}

#[test]
fn loom_a_request_executes_before_the_end_or_not_at_all() {
    check(|| {
        let words = Arc::new((AtomicU64::new(0), Cell::new()));
        let poster = {
            let words = words.clone();
            thread::spawn(move || {
                let mut number = 0;
                while number < 2 && claim::begin(&words.0, number) {
                    // What it copies, and its outcome.
                    words.1.set(number + 1);
                    claim::finish(&words.0, number);
                    number += 1;
                }
                number
            })
        };
        if claim::seal(&words.0) {
            // The owner's from now on: what executes after this, or is not ordered before it, is a race.
            let executed = claim::executed(&words.0);
            assert_eq!(words.1.get(), executed);
            words.1.set(9);
            assert_eq!(
                poster.join().unwrap(),
                executed,
                "one was refused that had executed, or taken that was not counted"
            );
            assert_eq!(words.1.get(), 9);
        } else {
            let posted = poster.join().unwrap();
            assert_eq!(
                (posted, claim::executed(&words.0)),
                (2, 2),
                "nothing was sealed, so nothing is refused"
            );
            assert!(claim::seal(&words.0), "nothing executes any more");
        }
        assert!(!claim::begin(&words.0, claim::executed(&words.0)));
    });
}

#[test]
fn loom_a_withdrawn_request_is_not_counted() {
    check(|| {
        let word = Arc::new(AtomicU64::new(0));
        let poster = {
            let word = word.clone();
            thread::spawn(move || {
                let begun = claim::begin(&*word, 0);
                if begun {
                    claim::withdraw(&*word, 0);
                }
            })
        };
        let sealed = claim::seal(&*word);
        poster.join().unwrap();
        assert!(sealed || claim::seal(&*word));
        assert_eq!(claim::executed(&*word), 0);
        assert!(!claim::begin(&*word, 0));
    });
}

/// The indices of a ring for two records of 16 bytes, and what lies in them.
struct Ring {
    tail: AtomicU64,
    head: AtomicU64,
    wanted: AtomicU64,
    records: [Cell; 2],
    bell: Model,
}

impl Ring {
    const SIZE: u64 = 16;

    fn new() -> (Arc<Self>, Producer, Consumer) {
        let ring = Self {
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            wanted: AtomicU64::new(0),
            records: [Cell::new(), Cell::new()],
            bell: Model::default(),
        };
        (Arc::new(ring), Producer::new(2 * Self::SIZE), Consumer::new(2 * Self::SIZE))
    }

    fn record(&self, index: u64) -> &Cell {
        &self.records[(index / Self::SIZE % 2) as usize]
    }

    fn push(&self, producer: &mut Producer, value: u64) -> bool {
        let Some(at) = producer.reserve(&self.head, &self.wanted, Self::SIZE).unwrap() else { return false };
        self.record(at).set(value);
        producer.publish(&self.tail, Self::SIZE);
        true
    }

    fn pop(&self, consumer: &mut Consumer) -> Option<u64> {
        if consumer.available(&self.tail).unwrap() == 0 {
            return None;
        }
        let value = self.record(consumer.head()).get();
        consumer.advance(&self.head, Self::SIZE);
        Some(value)
    }
}

const MESSAGES: u64 = 4;

#[test]
fn loom_messages_arrive_whole_and_in_order() {
    check(|| {
        let (ring, mut producer, mut consumer) = Ring::new();
        let sender = {
            let ring = ring.clone();
            thread::spawn(move || {
                for value in 1..=MESSAGES {
                    while !ring.push(&mut producer, value) {
                        thread::yield_now();
                    }
                }
            })
        };
        for expected in 1..=MESSAGES {
            let value = loop {
                match ring.pop(&mut consumer) {
                    Some(value) => break value,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(value, expected);
        }
        sender.join().unwrap();
    });
}

#[test]
fn loom_a_sender_without_room_is_rung() {
    check(|| {
        let (ring, mut producer, mut consumer) = Ring::new();
        // The ring is full from the start, so that the interesting part is not deep.
        assert!(ring.push(&mut producer, 1) && ring.push(&mut producer, 2));
        let sender = {
            let ring = ring.clone();
            thread::spawn(move || {
                // It sleeps on its bell alone: if nobody rings, this is a deadlock.
                while !ring.push(&mut producer, 3) {
                    bell::wait(&ring.bell, Duration::MAX);
                    bell::take(&ring.bell, 1, |_| ());
                }
            })
        };
        assert_eq!(ring.pop(&mut consumer), Some(1));
        if consumer.pay(&ring.wanted) {
            bell::ring(&ring.bell, 0);
        }
        sender.join().unwrap();
        assert_eq!((ring.pop(&mut consumer), ring.pop(&mut consumer)), (Some(2), Some(3)));
    });
}
