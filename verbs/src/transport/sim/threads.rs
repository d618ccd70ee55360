//! Simulated threads: real threads of the system, of which one runs at a time.
//!
//! The one that runs holds the *baton*. At a scheduling point it locks the [`World`], says when it wants to go
//! on, and lets events happen, in its own stack, until it is some thread's turn: if that is another one,
//! it hands the baton over and sleeps. So between two scheduling points a thread runs alone, nothing depends
//! on the system's scheduler, and a thread whose turn comes next again costs no switch.
//!
//! | field | written by | read by |
//! |---|---|---|
//! | [`Baton::mine`] | who hands over (release) | its thread (acquire) |
//! | [`World`] | the thread with the baton, under the lock | the same |
//!
//! A thread that is killed (its node died, or the simulation is over) unwinds from its scheduling point, with
//! a private payload, so that it frees what it holds. What it does meanwhile has no effect: its node is dead.

use std::{
    any::Any,
    cell::RefCell,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use super::world::{Event, World};

/// Scheduling points that a dying thread may pass before it is given up, and left asleep for ever.
const LAST_WORDS: u32 = 1_000_000;

/// What a killed thread unwinds with.
struct Killed;

/// What a simulation's objects share.
#[derive(Debug)]
pub(super) struct Shared {
    world: Mutex<World>,
    /// Of the thread that called `run`.
    main: Baton,
    /// The processor that all threads run on.
    core: Option<usize>,
}

/// The right to run, and how it reaches one thread.
#[derive(Debug, Default)]
pub(super) struct Baton {
    mine: AtomicBool,
    killed: AtomicBool,
    last_words: AtomicU32,
    thread: OnceLock<std::thread::Thread>,
}

impl Baton {
    fn pass(&self) {
        self.mine.store(true, Ordering::Release);
        self.thread.get().expect("a thread that can be run has a handle").unpark();
    }

    fn wait(&self) {
        while !self.mine.swap(false, Ordering::Acquire) {
            std::thread::park();
        }
    }

    pub(super) fn kill(&self) {
        self.killed.store(true, Ordering::Release);
    }
}

/// What a thread waits in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    Relax,
    Compute,
    View,
    Endpoint(usize),
    Signal,
    Accept,
    Connect,
    Join(usize),
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wait::Relax => f.write_str("Runtime::relax"),
            Wait::View => f.write_str("a call of a View"),
            Wait::Compute => f.write_str("Node::compute"),
            Wait::Endpoint(endpoint) => write!(f, "Endpoint::wait of endpoint {endpoint}"),
            Wait::Signal => f.write_str("Signal::wait"),
            Wait::Accept => f.write_str("Listener::accept"),
            Wait::Connect => f.write_str("Transport::connect"),
            Wait::Join(thread) => write!(f, "Thread::join of thread {thread}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Running,
    Waiting(Wait),
    Ended { panicked: bool },
}

/// A thread as the world knows it.
#[derive(Debug)]
pub(super) struct ThreadState {
    pub(super) name: String,
    pub(super) node: usize,
    pub(super) state: State,
    /// Counts its turns: a wake-up for an earlier one is void.
    pub(super) turn: u64,
    pub(super) baton: Arc<Baton>,
    /// The simulation ends with the last of these.
    pub(super) root: bool,
    pub(super) joiners: Vec<usize>,
    /// Whether somebody was told how it ended.
    pub(super) joined: bool,
    /// In a simulation of time: the endpoints that it has polled since its last `relax`.
    pub(super) polled: Vec<usize>,
    /// In a simulation of time: until when it pays for its calls, and when it goes on unless woken before.
    pub(super) busy_until: u64,
    pub(super) wakes_at: u64,
}

impl ThreadState {
    /// Whether it has been killed, and is on its way out.
    pub(super) fn dying(&self) -> bool {
        self.baton.killed.load(Ordering::Acquire)
    }
}

/// Whose turn it is.
pub(super) enum Next {
    Thread(usize),
    /// All roots have ended, or something failed: the one who called `run` goes on.
    Over,
}

/// A simulated thread, to itself.
struct Current {
    shared: Arc<Shared>,
    thread: usize,
}

thread_local! {
    /// The simulated thread that this thread is.
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

impl Shared {
    pub(super) fn new(world: World, core: Option<usize>) -> Arc<Self> {
        Arc::new(Self { world: Mutex::new(world), main: Baton::default(), core })
    }

    /// The world. Nothing that locks it again may be dropped while it is held.
    pub(super) fn lock(&self) -> MutexGuard<'_, World> {
        // Only a failed assertion of this module poisons it; then the simulation has failed anyway.
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the running thread.
    ///
    /// # Panics
    /// When the caller is no thread of this simulation.
    pub(super) fn current(self: &Arc<Self>) -> usize {
        CURRENT.with_borrow(|current| match current {
            Some(Current { shared, thread }) if Arc::ptr_eq(shared, self) => *thread,
            _ => panic!("only a thread of the simulation can wait in it: start it with Sim::spawn"),
        })
    }

    /// The running thread waits in `wait` for at most `timeout` ns, or until it is woken.
    pub(super) fn block(
        self: &Arc<Self>,
        mut world: MutexGuard<'_, World>,
        wait: Wait,
        timeout: Option<u64>,
    ) {
        let me = self.current();
        let baton = Arc::clone(&world.threads[me].baton);
        if baton.killed.load(Ordering::Acquire) {
            drop(world);
            return die(&baton);
        }
        let lag = world.take_lag();
        let now = world.now;
        let node = world.threads[me].node;
        if let Some(traffic) = &mut world.traffic {
            traffic.worked(node, lag);
        }
        let thread = &mut world.threads[me];
        thread.state = State::Waiting(wait);
        (thread.busy_until, thread.wakes_at) = (now + lag, u64::MAX);
        let turn = thread.turn;
        // A timeout longer than the whole run is none: a deadlock is to be called one.
        if let Some(delay) =
            timeout.map(|timeout| lag.saturating_add(timeout)).filter(|&d| world.within_limit(d))
        {
            world.threads[me].wakes_at = now + delay;
            world.schedule(delay, Event::Wake { thread: me, turn });
        }
        self.hand_over(world, Some((me, &baton)));
        if baton.killed.load(Ordering::Acquire) {
            die(&baton);
        }
    }

    /// Lets the next thread run, and returns when it is the turn of `me` again (at once, if there is none).
    fn hand_over(&self, mut world: MutexGuard<'_, World>, me: Option<(usize, &Baton)>) {
        match world.next() {
            Next::Thread(thread) if me.is_some_and(|(me, _)| me == thread) => return,
            Next::Thread(thread) => {
                let baton = Arc::clone(&world.threads[thread].baton);
                drop(world);
                baton.pass();
            }
            Next::Over => {
                drop(world);
                self.main.pass();
            }
        }
        if let Some((_, baton)) = me {
            baton.wait();
        }
    }

    /// Makes a thread; it runs when its turn comes.
    pub(super) fn spawn(
        self: &Arc<Self>,
        node: usize,
        name: &str,
        root: bool,
        body: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<usize> {
        let mut world = self.lock();
        let thread = world.threads.len();
        let baton = Arc::new(Baton::default());
        let (shared, own) = (Arc::clone(self), Arc::clone(&baton));
        // The name that a panic message shows.
        let full_name = format!("{}/{name}", world.nodes[node].name);
        let prelude = world.nodes[node].prelude.clone();
        let handle = std::thread::Builder::new().name(full_name.clone()).spawn(move || {
            if let Some(id) = shared.core {
                core_affinity::set_for_current(core_affinity::CoreId { id });
            }
            own.wait();
            CURRENT.set(Some(Current { shared: Arc::clone(&shared), thread }));
            let result = catch_unwind(AssertUnwindSafe(move || {
                if !own.killed.load(Ordering::Acquire) {
                    prelude.0.iter().for_each(|prelude| prelude());
                    body();
                }
            }));
            CURRENT.set(None);
            shared.ended(thread, result.err());
        })?;
        baton.thread.set(handle.thread().clone()).expect("set once, here");
        world.threads.push(ThreadState {
            name: full_name,
            node,
            state: State::Waiting(Wait::Relax),
            turn: 0,
            baton,
            root,
            joiners: Vec::new(),
            joined: false,
            polled: Vec::new(),
            busy_until: 0,
            wakes_at: u64::MAX,
        });
        world.roots += usize::from(root);
        let delay = world.thread_delay(1_000);
        world.schedule(delay, Event::Wake { thread, turn: 0 });
        Ok(thread)
    }

    /// The end of a thread: whoever waits for it goes on, and the baton goes to the next.
    fn ended(&self, thread: usize, panic: Option<Box<dyn Any + Send>>) {
        let panic = panic.filter(|payload| !payload.is::<Killed>());
        let message = panic.as_deref().map(message);
        // Dropping a payload runs code of others: not under the lock.
        drop(panic);
        let mut world = self.lock();
        world.ended(thread, message);
        if world.stopping {
            drop(world);
            self.main.pass();
        } else {
            self.hand_over(world, None);
        }
    }

    /// Runs until all roots have ended, then ends all other threads.
    pub(super) fn run(&self) {
        let _ = self.main.thread.set(std::thread::current());
        let mut world = self.lock();
        assert!(!world.stopping, "a simulation runs once");
        world.take_lag();
        if let Next::Thread(thread) = world.next() {
            let baton = Arc::clone(&world.threads[thread].baton);
            drop(world);
            baton.pass();
            self.main.wait();
            world = self.lock();
        }
        world.stopping = true;
        // Threads started by dying ones come behind.
        let mut thread = 0;
        while thread < world.threads.len() {
            let state = &world.threads[thread];
            if !matches!(state.state, State::Ended { .. }) {
                let baton = Arc::clone(&state.baton);
                drop(world);
                baton.kill();
                baton.pass();
                self.main.wait();
                world = self.lock();
            }
            thread += 1;
        }
    }

    /// Gives up a dying thread that goes on and on: it sleeps for ever, and others run.
    fn give_up(&self, thread: usize) -> ! {
        self.ended(thread, None);
        loop {
            std::thread::park();
        }
    }
}

/// A scheduling point of a thread that has been killed: it unwinds, or goes on unwinding.
fn die(baton: &Baton) {
    if baton.last_words.fetch_add(1, Ordering::Relaxed) > LAST_WORDS {
        let current = CURRENT.take().expect("a simulated thread");
        current.shared.give_up(current.thread);
    }
    if !std::thread::panicking() {
        resume_unwind(Box::new(Killed));
    }
}

/// The words of a panic.
fn message(payload: &(dyn Any + Send)) -> String {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "a panic without words".to_owned(),
    }
}
