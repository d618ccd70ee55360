//! Making the shards of a server: memory, registration, endpoint.
//!
//! **Touched or not.** A server that serves a job has all its rows touched before the first request ([`Config::touch`]). A thread for each
//! shard does what there is to do for it, on the processor that will poll it, so that queues and buffers come from its NUMA node.
//! It has helpers to touch the rows. All shards are made at once, and a registration, which pins pages that are
//! there, goes on beside others. The polling threads start when all of it is done, and register nothing.
//!
//! Without `touch`, shards are made one after the other by the calling thread, and pages are taken as rows are written: for tests, whose
//! servers use little of what they have, and for simulations.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
};

use fervor_verbs::{
    Error, Exclusive,
    memory::{HugePage, MemoryOptions, Nodes, Pages, Shortage, Touch},
    transport::{Endpoint as _, Export, Thread as _, Transport},
};

use crate::{
    Config, ServerError,
    accept::Door,
    core::ShardCore,
    placement::{Placement, ShardPlacement},
    poller::Poller,
    posting::Posting,
    reach::Reaches,
    share::Share,
    staging::Staging,
};

/// How far a server has come that takes its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of rows that have been touched.
    pub touched: usize,
    /// Bytes of rows.
    pub total: usize,
}

/// Is told, by whichever thread.
pub type Watch = Arc<dyn Fn(Progress) + Send + Sync>;

/// A shard that has not begun.
pub struct Made<T: Transport> {
    pub poller: Poller<T>,
    pub door: Door<T>,
    /// What its memory lies on, and how large it is.
    page: Option<HugePage>,
    bytes: usize,
    /// The huge pages that it was to lie on, and does not.
    shortage: Option<Shortage>,
    /// Bytes on each NUMA node.
    spread: Vec<(usize, usize)>,
}

/// Makes all shards, and notes in `placement` what has come of it.
///
/// # Errors
/// Memory that cannot be had or pinned; a processor that this process may not use.
pub fn shards<T: Transport>(
    transport: &T,
    config: &Config,
    placement: &mut Placement,
    watch: &Watch,
) -> Result<Vec<Made<T>>, ServerError> {
    let mut made = if config.touch {
        all_at_once(transport, config, placement, watch)?
    } else {
        let one = |number| make(transport, config, number, None);
        (0..placement.shards.len()).map(one).collect::<Result<Vec<_>, _>>()?
    };
    for (place, shard) in placement.shards.iter_mut().zip(&mut made) {
        (place.page, place.bytes) = (shard.page, shard.bytes);
        let on_others = shard.spread.iter().filter(|(node, _)| place.node.is_some_and(|own| own != *node));
        place.elsewhere = on_others.map(|(_, bytes)| bytes).sum();
        if let Some(met) = shard.shortage.take() {
            // What was expected is of all shards. What the system said is said once.
            let said = met.said.clone();
            placement.shortage.get_or_insert(met).said = said;
        }
    }
    Ok(made)
}

/// Each shard by a thread on the processor that will poll it.
fn all_at_once<T: Transport>(
    transport: &T,
    config: &Config,
    placement: &Placement,
    watch: &Watch,
) -> Result<Vec<Made<T>>, ServerError> {
    let counted = Arc::new(Counted {
        total: placement.shards.iter().map(|shard| shard.bytes).sum(),
        touched: AtomicUsize::new(0),
        watch: watch.clone(),
    });
    let start = |(number, place): (usize, &ShardPlacement)| {
        let result = Arc::new(Mutex::new(None));
        let core = place.core;
        let body = {
            let (transport, config, place) = (transport.clone(), config.clone(), place.clone());
            let (counted, result) = (counted.clone(), result.clone());
            move || {
                let made = make(&transport, &config, number, Some((&place, &*counted)));
                *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
            }
        };
        let thread = transport.spawn(&format!("fervor-start-{number}"), core, body);
        thread.map(|thread| (thread, result))
    };
    let threads: Vec<_> = placement.shards.iter().enumerate().map(start).collect();
    // All of them are waited for, and the first error counts.
    let ends: Vec<Result<Made<T>, ServerError>> = threads
        .into_iter()
        .map(|started| {
            let (thread, result) = started?;
            assert!(thread.join(), "a thread that makes a shard has panicked");
            let made = result.lock().unwrap_or_else(PoisonError::into_inner).take();
            made.expect("a thread that has not panicked has left its result")
        })
        .collect();
    ends.into_iter().collect()
}

/// Counts what has been touched, for all shards.
struct Counted {
    total: usize,
    touched: AtomicUsize,
    watch: Watch,
}

impl Counted {
    fn add(&self, bytes: usize) {
        let touched = self.touched.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.watch)(Progress { touched, total: self.total });
    }
}

/// Makes one shard, and touches its rows if `touching` says how.
fn make<T: Transport>(
    transport: &T,
    config: &Config,
    shard: usize,
    touching: Option<(&ShardPlacement, &Counted)>,
) -> Result<Made<T>, ServerError> {
    let (rows, shortage) = rows(config, shard, touching)?;
    let export: Arc<dyn Export> = Arc::new(transport.export(&rows)?);
    let reaches = Arc::new(Reaches::new(export.clone()));
    let endpoint = transport.endpoint(&config.endpoint(shard))?;
    let staging = Staging::new(transport, config.staging)?;
    let share = Arc::new(Share {
        clock: AtomicU64::new(config.origin.clock),
        stop: AtomicBool::new(false),
        clients: AtomicUsize::new(0),
        lanes: AtomicUsize::new(0),
        credits: config.credits,
        lease: config.lease,
        resumptions: AtomicU64::new(0),
    });
    let (post, mail) = mpsc::channel();
    let door = Door {
        attach: endpoint.attach(),
        post,
        share: share.clone(),
        region: export.remote(),
        reaches: reaches.clone(),
    };
    // It takes a look at each page.
    let several = touching.is_some_and(|(place, _)| place.node.is_some()) && Nodes::this().several();
    let spread = if several { rows.spread() } else { Vec::new() };
    let (page, bytes) = (rows.huge_page(), rows.len());
    let poller = Poller::new(
        transport.clone(),
        endpoint,
        mail,
        ShardCore::new(rows, config.origin, config.limits()).with_reaches(reaches),
        Posting::new(staging, config.quota()),
        share,
        export,
    );
    Ok(Made { poller, door, page, bytes, shortage, spread })
}

/// The memory of a shard's rows: on ordinary pages, where the huge ones that were asked for are not there.
fn rows(
    config: &Config,
    shard: usize,
    touching: Option<(&ShardPlacement, &Counted)>,
) -> Result<(Exclusive, Option<Shortage>), Error> {
    let take = |pages: Pages| {
        let bytes = config.region_bytes(pages.huge(config.region_bytes(None)));
        let mine = AtomicUsize::new(0);
        let progress = |bytes| {
            mine.fetch_add(bytes, Ordering::Relaxed);
            if let Some((_, counted)) = touching {
                counted.add(bytes);
            }
        };
        let touch = touching.map(|(place, _)| Touch {
            threads: NonZeroUsize::new(place.threads).unwrap_or(NonZeroUsize::MIN),
            cores: &place.touching,
            progress: &progress,
        });
        let name = format!("fervor-rows-{shard}");
        let taken = Exclusive::with(&name, bytes, &MemoryOptions { pages, touch });
        if let (Err(_), Some((_, counted))) = (&taken, touching) {
            // What had been touched is gone.
            counted.touched.fetch_sub(mine.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        taken
    };
    match take(config.pages) {
        Err(Error::HugePages(shortage)) => Ok((take(Pages::Ordinary)?, Some(shortage))),
        taken => Ok((taken?, None)),
    }
}
