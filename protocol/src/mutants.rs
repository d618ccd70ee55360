//! Deliberate protocol bugs, for `ci/mutants`: the proof that the checker checks.
//!
//! Each breaks one invariant in one place, which says so: `if mutant(Mutant::X)`. Without the feature `mutants` that is
//! a constant `false` and nothing is compiled for it; with the feature nothing is active until a test switches one on with
//! `activate`. [`CATALOGUE`] is the list of all: what each breaks, and where.
//!
//! **Where threads may come between.** In the simulator threads switch at calls of the transport only. The client's threads
//! share memory between two of those, so their code says [`pause`] where another thread may do anything meanwhile and no
//! lock is held. It does nothing but with the feature, on a thread that has said with `on_pause` what is to happen.

/// A deliberate bug. See [`CATALOGUE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The catalogue says it.
pub enum Mutant {
    TrustLateClock,
    SlotNotCleared,
    PushFromLiveMemory,
    InclusionByArrival,
    InclusionStrict,
    UnknownIsNo,
    RoundWordUntagged,
    ReplayApplied,
    GapAccepted,
    GenerationIgnored,
    SlotReusedEarly,
    RoundByPlainWrite,
    RoundBeforeQueue,
    PushDropped,
    ChecksumIgnored,
    SnapshotUnchecked,
    LockNotTaken,
    AnnouncedLate,
    ClockWordEarly,
    DeadStays,
    BatchByHalves,
    HalvesAtTwoLsns,
    AcknowledgedBeforeApplied,
    DirtyForgotten,
    RunCutShort,
    MirrorUnfilled,
    FloorForgotten,
    SlabDroppedEarly,
    KnownBeforeAcknowledged,
    SlabReusedEarly,
    WishesOutOfOrder,
    ClockEndsEarly,
    JoinAtHandshake,
    VisibleOnWrite,
    BoundIgnored,
    QueuedUnproved,
    RankingForgotten,
    CopyTooOld,
    ReadAfterLoss,
    AskIgnored,
    ResentTwice,
    CopiesNotOwedAgain,
    AnswersBeforeRefill,
    CompletionForAll,
    ObserverCounted,
}

/// What a mutant is.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Which.
    pub mutant: Mutant,
    /// Its name on the command line.
    pub name: &'static str,
    /// The invariant that it breaks; numbers are those of `ARCHITECTURE.md`.
    pub breaks: &'static str,
    /// What it does, and where.
    pub how: &'static str,
}

macro_rules! catalogue {
    ($($mutant:ident $name:literal $breaks:literal $how:literal)*) => {
        /// All mutants.
        pub const CATALOGUE: &[Entry] =
            &[$(Entry { mutant: Mutant::$mutant, name: $name, breaks: $breaks, how: $how }),*];
    };
}

catalogue! {
    TrustLateClock "trust-late-clock" "3 SSP guarantee"
        "a READ is trusted for the clock known when it completed (client Worker::miss_alone)"
    SlotNotCleared "slot-not-cleared" "6 slots: current only after the first push"
        "a slot keeps its old image when it is taken for another row (client Cache::take)"
    PushFromLiveMemory "push-from-live-memory" "5 a push reads stable memory"
        "staging memory is used again as soon as the WRITE is posted (server Posting::write)"
    InclusionByArrival "inclusion-by-arrival" "4 own updates count once"
        "a copy is taken to contain what is acknowledged by now (protocol inclusion::contained)"
    InclusionStrict "inclusion-strict" "4 own updates count once"
        "a copy is taken to contain batches below its LSN, not at it (protocol inclusion::contained)"
    UnknownIsNo "unknown-is-no" "4 own updates count once"
        "a copy newer than all that is acknowledged is taken to lack what is not (protocol inclusion::contained)"
    RoundWordUntagged "round-word-untagged" "4 own updates count once"
        "the LSN of a later round is taken for that of the one that was polled (protocol ack::round_lsn)"
    ReplayApplied "replay-applied" "7 exactly once"
        "a batch that comes again is applied again (server ShardCore::admit)"
    GapAccepted "gap-accepted" "7 exactly once"
        "a batch whose predecessor is missing is taken (protocol BatchNumbers::admit)"
    GenerationIgnored "generation-ignored" "6 slots"
        "a reader does not look whether a slot has changed hands meanwhile (client Cache::unchanged)"
    SlotReusedEarly "slot-reused-early" "6 slots: not reused under a WRITE"
        "a slot is free when giving it up is acknowledged, not when it is closed (client Channel::take_closed)"
    RoundByPlainWrite "round-by-plain-write" "3 SSP guarantee; transport rule 2"
        "the clock is also told by a plain WRITE, and believed (server Peer::close_round, client take_acknowledgements)"
    RoundBeforeQueue "round-before-queue" "10 back-pressure, never loss"
        "a round is closed while images of it still wait for room (server Outbound::next)"
    PushDropped "push-dropped" "10 back-pressure, never loss"
        "a push that finds no room is dropped, not owed (server Posting::defer)"
    ChecksumIgnored "checksum-ignored" "4 rows are snapshots"
        "a copy is believed whatever its checksum (protocol Seal::verify)"
    SnapshotUnchecked "snapshot-unchecked" "4 rows are snapshots; in place"
        "an image that changed while it was copied in place is believed (client Seen::copy_again)"
    LockNotTaken "lock-not-taken" "4 rows are snapshots; in place"
        "an image is rewritten without saying so first (server apply::rewrite)"
    AnnouncedLate "announced-late" "4 own updates count once; in place"
        "a batch is announced after its images have changed (server ShardCore::announce_and_apply)"
    ClockWordEarly "clock-word-early" "3 SSP guarantee; in place"
        "the clock word says a clock before the batch that ends it is applied (server ShardCore::admit)"
    DeadStays "dead-stays" "faults: the dead hold up nobody"
        "a client whose connection broke stays in the vector clock (server ShardCore::leave)"
    BatchByHalves "batch-by-halves" "8 a batch is checked as a whole first"
        "the good sections before a bad one are applied (server ShardCore::batch)"
    HalvesAtTwoLsns "halves-at-two-lsns" "4 own updates count once"
        "the second half of a batch is applied at an LSN of its own (server ShardCore::apply)"
    AcknowledgedBeforeApplied "acknowledged-before-applied" "4 own updates count once"
        "a batch is acknowledged as of the LSN before it (server ShardCore::admit)"
    DirtyForgotten "dirty-forgotten" "3 SSP guarantee"
        "an image is clean for all when one more client subscribes to it (server Table::subscribe)"
    RunCutShort "run-cut-short" "3 SSP guarantee"
        "the last image of a run is not pushed (server posting::bytes_of)"
    MirrorUnfilled "mirror-unfilled" "3 SSP guarantee"
        "a table is opened before its mirror is filled (server ShardCore::answer_waiting)"
    FloorForgotten "floor-forgotten" "4 own updates count once"
        "slabs are dropped while copies may lack them, and nothing remembers it (client ShardUpdates::retire)"
    SlabDroppedEarly "slab-dropped-early" "4 own updates count once"
        "a slab is dropped when it is acknowledged, though a copy may lack it (client ShardUpdates::retire)"
    KnownBeforeAcknowledged "known-before-acknowledged" "4 own updates count once"
        "a slab is taken to be in all copies of clocks that rose before it was acknowledged (client ShardUpdates::retire)"
    SlabReusedEarly "slab-reused-early" "7 exactly once; references"
        "a slab's memory is used again before the shard has applied it (client ShardUpdates::retire, Engine)"
    WishesOutOfOrder "wishes-out-of-order" "6 slots"
        "the shard is told about slots after the mutex is released (client Worker::take)"
    ClockEndsEarly "clock-ends-early" "3 SSP guarantee"
        "END_OF_CLOCK goes with the first of several batches (client Engine::send_combined)"
    JoinAtHandshake "join-at-handshake" "3 SSP guarantee"
        "a client begins at the clock that the handshake told (client Core::join)"
    VisibleOnWrite "visible-on-write" "VAP: visible is proved; transport rule 3"
        "the completion of a WRITE behind the pushes is taken for that of a READ (server Peer::prove)"
    BoundIgnored "bound-ignored" "VAP: the value bound"
        "an update does not wait (client Worker::admit)"
    QueuedUnproved "queued-unproved" "VAP: visible is proved"
        "a push that waits for room is not waited for (server Posting::push_run)"
    RankingForgotten "ranking-forgotten" "3 SSP guarantee"
        "an image is clean although a client could not take it between rounds (server Poller::push_ranked)"
    CopyTooOld "copy-too-old" "3 SSP guarantee"
        "a copy in the cache is used however old it is (client TableCore::look_into_slots)"
    ReadAfterLoss "read-after-loss" "4 rows are snapshots, of the row that was asked for"
        "rows are READ after a server was lost, and earlier completions are taken for theirs (client Worker::may_read)"
    AskIgnored "ask-ignored" "11 no reader starves"
        "a row that is asked for is not pushed (server ShardCore::slot)"
    ResentTwice "resent-twice" "7 exactly once; 23 resuming"
        "a client that comes back is told that its last message was not processed (server Poller::attach)"
    CopiesNotOwedAgain "copies-not-owed-again" "23 resuming"
        "what was pushed before a connection broke is taken to have arrived (server ShardCore::resume)"
    AnswersBeforeRefill "answers-before-refill" "18 a mirror is filled before it is read; 23 resuming"
        "after a resumption answers go before what is owed (server Outbound::resume)"
    CompletionForAll "completion-for-all" "22 a READ's completion goes to the worker that posted it"
        "it is also taken for that of other workers' READs into places of the same number (client Lane::poll)"
    ObserverCounted "observer-counted" "24 who only reads holds up nobody"
        "a client that only reads has an entry in the vector clock (server ShardCore::observe)"
}

/// Whether `mutant` is switched on.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn mutant(_: Mutant) -> bool {
    false
}

/// Another thread may come between here. No lock is held.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn pause() {}

#[cfg(feature = "mutants")]
mod active {
    use std::{
        cell::RefCell,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::Mutant;

    /// One more than the number of the one that is switched on; 0: none.
    static ACTIVE: AtomicUsize = AtomicUsize::new(0);

    /// Switches a mutant on, for the whole process, and all others off.
    pub fn activate(mutant: Option<Mutant>) {
        ACTIVE.store(mutant.map_or(0, |mutant| mutant as usize + 1), Ordering::SeqCst);
    }

    /// Whether `mutant` is switched on.
    pub fn mutant(mutant: Mutant) -> bool {
        ACTIVE.load(Ordering::Relaxed) == mutant as usize + 1
    }

    type Pause = Box<dyn FnMut()>;

    thread_local! {
        static PAUSE: RefCell<Option<Pause>> = const { RefCell::new(None) };
    }

    /// What `pause` does on this thread from now on.
    pub fn on_pause(pause: Pause) {
        PAUSE.set(Some(pause));
    }

    /// Another thread may come between here. No lock is held.
    pub fn pause() {
        if let Some(mut pause) = PAUSE.take() {
            pause();
            PAUSE.set(Some(pause));
        }
    }
}

#[cfg(feature = "mutants")]
pub use active::{activate, mutant, on_pause, pause};
