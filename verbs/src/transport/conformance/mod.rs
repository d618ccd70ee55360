//! The conformance suite: the contract as tests, written once, run for every provider.
//!
//! A *case* is a function over a [`Rig`]: what a provider needs to be tested (two hosts, addresses, and a way
//! to kill a process). [`conformance!`](crate::conformance) makes one `#[test]` of each case; [`cases`] gives
//! them as a list, for a program that runs them all (inside a virtual machine, say).
//!
//! ```text
//! mod tests {
//!     struct ShmRig { … }
//!     impl Rig for ShmRig { … }
//!     crate::conformance!(ShmRig);       // payloads_read, payloads_write, … and `victim`
//! }
//! ```
//!
//! **Who runs where.** A case runs in one thread, which holds the endpoints of both hosts and polls them in
//! turn (`pair::Pair`); other threads, started by [`Runtime::spawn`](crate::transport::Runtime::spawn), accept connections, race with
//! the NIC, or wait for signals. So the suite also runs where only one thread runs at a time. Every wait has
//! a limit by [`Runtime::now`](crate::transport::Runtime::now), so a case that cannot end fails and says what it waited for.
//!
//! **Process death** is the one thing that a thread cannot do to itself: [`Rig::start`] starts a *victim*
//! ([`victim()`]) in a process (or a simulated node) of its own, [`Rig::kill`] ends it abruptly, [`Rig::stop`]
//! stops it for a while. [`VictimProcess`] does that for providers of real processes: it runs the test program again.
//! A case that counts what the whole process has, or that cuts its network, runs in a process of its own, too ([`Apart`]).
//! [`ProcessRig`] is the rig of all providers of real processes.
//!
//! # What proves what
//!
//! | of the [contract](crate::transport) | cases |
//! |---|---|
//! | memory rule 1: words are whole | `order_words_…`: read and written, from and into odd places, in lists that cut them |
//! | rules 2 and 3: what a completion proves | `order_writes_are_visible_…`, `order_a_completed_read_…`, `order_the_last_write_wins` |
//! | rule 4: READs in flight together | gives no promise; `sim::tests::weakness` shows that the simulation keeps none |
//! | rule 5: what did not complete | `faults_outstanding_…`, `faults_dead_…`, `faults_a_network_…` |
//! | rule 6: who learns of a post sees what was written before | `order_a_third_party_…`; by a view `views_show_what_a_message_announced` |
//! | rule 7: views | `views_…` |
//! | work requests: order, queues, signals | `queues_…`, `order_messages_…` |
//! | buffers, receiving | `payloads_…`, `queues_receive_…`, `queues_late_…`, `queues_immediates_…`, `queues_a_sender_seconds_ahead_…`, `holdings_killed_senders_…` |
//! | remote access | `rights_…`, `payloads_beyond_4_gib`, `views_bounds_and_rights` |
//! | errors and ends | `faults_…`: disconnects, drops, deaths, processes that are stopped, a network that is gone for a second |
//! | threads and time | `threads_…`; that a case ends at all |
//! | connecting | `handshake_…`: data, refusals, addresses, peers who stop half-way |
//! | nothing is kept of what is over | `holdings_…`: memory, descriptors, queue pairs, receive buffers |
//!
//! Cases run on networks that behave. `tests/rdma.rs` runs those that break no connection on one that loses, doubles and reorders
//! packets, too.
//!
//! **Not here** is what peers can do who do not keep to a provider's protocol: that is tested beside its wire format. Hostile
//! rings, bells, descriptors, files: `shm/tests`. Frames and openings: `tcp/tests.rs`. Offers: `tests/rdma_connect.rs`.
//! Sessions, tokens, keys: `any/tests.rs`. Any bytes at all: `src/fuzz.rs`.

use std::sync::Arc;

use crate::{address::Address, transport::Transport};

mod absent;
mod apart;
mod faults;
mod handshake;
mod holdings;
mod order;
pub(crate) mod pair;
mod payloads;
mod posts;
mod process_rig;
mod queues;
mod race;
mod rights;
mod threads;
mod victim;
mod views;

pub use apart::{Apart, Holdings};
pub use posts::Posts;
pub use process_rig::{ProcessRig, Subject, loopback};
pub use victim::{Role, VictimProcess, victim, victim_main};

/// One of the two hosts of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that connects.
    Client,
    /// The one that listens.
    Server,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }
}

/// How much a case does: less where the provider is slow.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Rounds of a case that looks for a rare event.
    pub rounds: u32,
    /// Operations in flight together over all connections.
    pub in_flight: usize,
    /// Connections made and ended, one after the other, of which nothing must be left.
    pub connects: u32,
    /// Senders that are killed.
    pub deaths: usize,
    /// Bytes of the messages in the midst of which they are.
    pub message: usize,
}

impl Default for Effort {
    fn default() -> Self {
        Self { rounds: 300, in_flight: 10_000, connects: 400, deaths: 64, message: 256 << 10 }
    }
}

/// What a provider gives to be tested. Made anew for each case.
pub trait Rig: Sized + Send + Sync + 'static {
    /// The provider.
    type Transport: Transport;
    /// A process, or what stands for one, that can be killed.
    type Victim: Send;

    /// How often each case runs: once, or once per seed.
    fn repeats() -> u64 {
        1
    }

    /// A rig for the case of this name; `repeat` counts from 0 to [`Rig::repeats`].
    fn new(case: &'static str, repeat: u64) -> Self;

    /// Runs the case. Providers whose threads are special start one here, and wait for it.
    fn run(&self, body: Box<dyn FnOnce() + Send>) {
        body();
    }

    /// The transport of a host; both may be clones of one.
    fn host(&self, side: Side) -> Self::Transport;

    /// An address for the server host where nobody listens: the same for the same number, another one for
    /// another number or another rig that lives. Complete: the port is not 0.
    fn address(&self, number: u32) -> Address;

    /// How the client host names a listener's address.
    fn dial(&self, listening: &Address) -> Address {
        listening.clone()
    }

    /// Whether the hosts have views of each other's memory, and of a victim's: whether they must, or must not.
    fn views(&self) -> bool;

    /// How much to do.
    fn effort(&self) -> Effort {
        Effort::default()
    }

    /// Starts a victim, which runs [`victim()`] until it is killed: on the client's host if it connects to
    /// `address`, on the server's host if it listens there.
    fn start(&self, role: Role, address: &Address) -> Self::Victim;

    /// Kills the victim as abruptly as the provider knows (SIGKILL), and returns when it is dead.
    fn kill(&self, victim: Self::Victim);

    /// Stops the victim (SIGSTOP), and returns when it runs no more. `false`: this provider's cannot be stopped.
    fn stop(&self, victim: &Self::Victim) -> bool;

    /// Lets a victim that was stopped go on.
    fn resume(&self, victim: &Self::Victim);

    /// Somebody who has gone `step` steps into a handshake with the listener at `address` (as the client's host names it) and then
    /// says nothing more, until what is returned is dropped. `None`: a handshake has no more steps. One of a simulation has none:
    /// it is a single event.
    fn stalled(&self, address: &Address, step: usize) -> Option<Box<dyn Send>>;

    /// Cuts the network between the hosts, until what is returned is dropped: whatever is sent meanwhile is lost. `None`: there is no
    /// network, or no way to cut it.
    fn cut(&self) -> Option<Box<dyn Send>>;

    /// What the two hosts hold now.
    fn holdings(&self) -> Holdings;

    /// Where the case of this name has to run.
    fn apart(_case: &str) -> Apart {
        Apart::Not
    }
}

/// A case of the suite.
#[derive(Debug)]
pub struct Case<R> {
    /// Its name: the name of the `#[test]`, and what [`run`] takes.
    pub name: &'static str,
    body: fn(&R),
}

impl<R: Rig> Case<R> {
    /// Runs it once, in a thread that the rig's provider knows.
    pub fn run(&self, rig: &R) {
        (self.body)(rig);
    }
}

/// Runs the case `name`, the test of that name in `module`, with rigs of type `R`.
///
/// # Panics
/// When the provider does not keep the contract, or there is no such case.
pub fn run<R: Rig>(module: &str, name: &str) {
    if R::apart(name).runs_elsewhere(module, name) {
        return;
    }
    let case = cases::<R>().into_iter().find(|case| case.name == name);
    let case = case.unwrap_or_else(|| panic!("the suite has no case `{name}`"));
    for repeat in 0..R::repeats() {
        let rig = Arc::new(R::new(case.name, repeat));
        let inside = Arc::clone(&rig);
        let body = case.body;
        rig.run(Box::new(move || body(&inside)));
    }
}

/// All cases of the suite.
pub fn cases<R: Rig>() -> Vec<Case<R>> {
    let mut cases = crate::conformance!(@with list ());
    cases.push(Case { name: "payloads_beyond_4_gib", body: payloads::beyond_4_gib });
    cases
}

/// `conformance!(Rig)` makes one `#[test]` of each case of the conformance suite, for the
/// [`Rig`] given, and an ignored test `victim` for
/// [`VictimProcess`] to run. With `conformance!(Rig, pinned)` the case of regions beyond 4 GiB is ignored, too, unless it is run by name.
#[macro_export]
macro_rules! conformance {
    // The list of cases, each with its function: handed to the rule `$use` below.
    (@with $use:ident $args:tt) => { $crate::conformance! { @$use $args
            payloads_read = payloads::read;
            payloads_write = payloads::write;
            payloads_write_with_immediate = payloads::write_with_immediate;
            payloads_send = payloads::send;
            payloads_inline_are_copied_at_the_post = payloads::inline;
            payloads_gathered = payloads::gathered;
            payloads_read_scattered = payloads::scattered;
            payloads_read_from_an_export = payloads::export;
            payloads_of_dropped_regions_arrive = payloads::dropped_region;
            payloads_from_server_to_client = payloads::from_server_to_client;
            order_writes_are_visible_when_an_immediate_is_polled = order::immediates_close_writes;
            order_writes_are_visible_when_a_message_is_polled = order::messages_close_writes;
            order_a_completed_read_proves_earlier_writes = order::reads_prove_writes;
            order_the_last_write_wins = order::last_write_wins;
            order_messages_and_immediates_keep_theirs = order::messages_and_immediates;
            order_words_are_read_whole = order::words_are_read_whole;
            order_words_are_written_whole = order::words_are_written_whole;
            order_words_of_odd_payloads_are_whole = order::words_of_odd_payloads_are_whole;
            order_words_in_two_pieces_are_whole = order::words_in_two_pieces_are_whole;
            order_a_third_party_reads_what_it_learned_of = order::third_party;
            rights_reads_outside_are_refused = rights::reads_outside;
            rights_writes_outside_are_refused = rights::writes_outside;
            rights_reads_of_local_memory_are_refused = rights::reads_without_the_right;
            rights_writes_without_the_right_are_refused = rights::writes_without_the_right;
            rights_wrong_keys_are_refused = rights::wrong_keys;
            rights_too_long_messages_are_refused = rights::too_long_messages;
            views_bounds_and_rights = views::bounds_and_rights;
            views_show_what_was_published = views::published;
            views_show_what_a_message_announced = views::announced;
            views_snapshots_are_of_one_version = views::snapshots;
            views_outlive_their_connection = views::after_the_end;
            views_outlive_their_peer = views::after_death;
            queues_full_send_queue_refuses_and_loses_nothing = queues::full_send_queue;
            queues_shallow_end_serves_all_the_same = queues::shallow_end;
            queues_unsignalled_chains = queues::unsignalled_chains;
            queues_unsignalled_without_end = queues::unsignalled_without_end;
            queues_many_operations_in_flight = queues::many_in_flight;
            queues_receive_buffers_are_shared = queues::shared_receive_buffers;
            queues_late_release_loses_nothing = queues::late_release;
            queues_immediates_give_their_credit_back = queues::immediate_credits;
            queues_reads_beyond_the_read_depth_wait = queues::read_depth;
            queues_one_sided_operations_need_no_poller = queues::no_poller;
            queues_a_sender_seconds_ahead_loses_nothing = absent::sender_ahead;
            handshake_private_data_of_every_length = handshake::private_data;
            handshake_refusals_of_every_length = handshake::refusals;
            handshake_dropped_request_is_refused = handshake::dropped_request;
            handshake_nobody_listens = handshake::nobody_listens;
            handshake_address_in_use = handshake::address_in_use;
            handshake_wrong_provider = handshake::wrong_provider;
            handshake_nobody_accepts = handshake::nobody_accepts;
            handshake_accept_times_out = handshake::accept_times_out;
            handshake_full_endpoint_refuses = handshake::full_endpoint;
            handshake_server_posts_at_once = handshake::server_posts_at_once;
            handshake_connections_outlive_their_listener = handshake::dropped_listener;
            handshake_stalled_strangers_hold_up_nobody = race::stalled_strangers;
            handshake_many_clients_at_once = handshake::many_clients;
            handshake_several_are_made_together = handshake::together;
            handshake_several_are_all_made_or_none = handshake::all_or_none;
            faults_disconnect_is_seen_by_both = faults::disconnect;
            faults_dropped_connection_disconnects = faults::dropped_connection;
            faults_dropped_endpoint_disconnects = faults::dropped_endpoint;
            faults_completed_messages_come_before_the_end = faults::messages_before_the_end;
            faults_outstanding_operations_complete = faults::outstanding;
            faults_a_disconnect_races_with_the_first_message = race::first_message;
            faults_other_connections_go_on = faults::other_connections;
            faults_dead_client_idle = faults::dead_client_idle;
            faults_dead_client_with_operations_outstanding = faults::dead_client_busy;
            faults_dead_server_idle = faults::dead_server_idle;
            faults_dead_server_with_operations_outstanding = faults::dead_server_busy;
            faults_a_stopped_process_is_no_dead_one = absent::stopped_process;
            faults_a_network_that_is_gone_for_a_second = absent::flap;
            threads_wait_ends_when_something_arrives = threads::wait_ends_on_arrival;
            threads_wait_times_out = threads::wait_times_out;
            threads_wake_ends_a_wait = threads::wake;
            threads_signals_are_not_lost = threads::signals;
            threads_signal_wait_times_out = threads::signal_times_out;
            threads_join_tells_of_a_panic = threads::join;
            threads_time_never_goes_back = threads::time;
            threads_many_post_while_one_polls = threads::many_post;
            holdings_many_connections_leave_nothing = holdings::connects;
            holdings_killed_senders_cost_no_buffer = holdings::killed_senders;
    } };
    (@list () $($name:ident = $body:path;)*) => {
        vec![$(Case { name: stringify!($name), body: $body }),*]
    };
    (@tests ($rig:ty) $($name:ident = $body:path;)*) => {
        $(
            #[test]
            fn $name() {
                $crate::transport::conformance::run::<$rig>(module_path!(), stringify!($name));
            }
        )*

        #[test]
        #[ignore = "run by the suite, in a process to be killed"]
        fn victim() {
            $crate::transport::conformance::victim_main::<$rig>();
        }
    };
    ($rig:ty) => {
        $crate::conformance!(@with tests ($rig));

        #[test]
        fn payloads_beyond_4_gib() {
            $crate::transport::conformance::run::<$rig>(module_path!(), stringify!(payloads_beyond_4_gib));
        }
    };
    // Of a provider that pins what is registered.
    ($rig:ty, pinned) => {
        $crate::conformance!(@with tests ($rig));

        #[test]
        #[ignore = "pins more than 8 GiB: run it by name where there is so much memory, as by ci/soft-roce -m 11500"]
        fn payloads_beyond_4_gib() {
            $crate::transport::conformance::run::<$rig>(module_path!(), stringify!(payloads_beyond_4_gib));
        }
    };
}
