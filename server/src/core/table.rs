//! One table's part in a shard: where its images are, who has it open, and who is to be told when they
//! change.
//!
//! | how a client reads | what the shard keeps for it |
//! |---|---|
//! | in place | nothing: the client looks at the images themselves |
//! | by READ | the images are *sealed*: their checks are kept |
//! | from slots | sealed images; an entry in [`Holders::slots`] for each image that the client has subscribed to |
//! | from a mirror | sealed images; a [`Mirror`] with a set of the images that the client is *owed* |
//!
//! **Dirty and owed.** An image that changes is marked *dirty* while anybody holds copies. A round takes the
//! dirty images in runs of adjacent ones, and pushes each run to all holders. A client that cannot take a run
//! now is *owed* it. A set has an image once, however often the image changed. So what is owed is bounded. It
//! is pushed later, with the contents that it has by then.
//!
//! **Sealing.** A table needs no checks while only clients on this host have it open. When the first other
//! client opens it, the shard begins to keep checks. It makes those of the images written before a piece at a
//! time, and answers the client when all images have one. An image that was never written is zero, and valid
//! as it is.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
};

use fervor_protocol::{
    Schema,
    batch::Shape,
    limits::ROW_HEADER,
    mutants::{Mutant, mutant},
    route::Router,
    row::{Header, Layout, Seal},
    wire::{Hold, OpenTable},
};

use zerocopy::FromBytes;

use super::{bitmap::Bitmap, id::ClientId, ledger::Ledger, ranking::Continuous};

/// Bytes that a subscription to an image is taken to need: its entry in the tree, and one in the client's queue.
pub const SUBSCRIPTION_BYTES: usize = 96;

/// A client's copy of all images of a table.
#[derive(Debug)]
pub struct Mirror {
    pub client: ClientId,
    /// Where it begins in the client's region.
    pub base: u64,
    pub owed: Bitmap,
    /// What is owed is pushed from here on, round and round.
    pub cursor: u64,
}

/// Who holds copies of a table, and what has changed since they were pushed.
#[derive(Debug)]
pub struct Holders {
    pub dirty: Bitmap,
    /// The dirty images by how much they have changed, if they are pushed between rounds.
    pub continuous: Option<Continuous>,
    /// In the order of the clients.
    pub mirrors: Vec<Mirror>,
    /// Byte offset of the slot that a client has subscribed for an image.
    pub slots: BTreeMap<(u64, ClientId), u64>,
}

impl Holders {
    /// The mirror of a client.
    pub fn mirror(&mut self, client: ClientId) -> Option<&mut Mirror> {
        let index = self.mirrors.binary_search_by_key(&client, |mirror| mirror.client).ok()?;
        Some(&mut self.mirrors[index])
    }

    /// These images are clean.
    pub fn clean(&mut self, images: Range<u64>) {
        if let Some(continuous) = &mut self.continuous {
            images.clone().for_each(|image| continuous.remove(image));
        }
        self.dirty.remove_range(images);
    }
}

/// How far the images' checks are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealing {
    /// Nobody needs them.
    No,
    /// Of the images below this one, and of those that change.
    Below(u64),
    /// Of all.
    Yes,
}

/// A client that has the table open.
#[derive(Debug, Clone, Copy)]
pub struct Opener {
    pub hold: Hold,
    /// How often.
    pub times: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Table {
    pub schema: Schema,
    /// Number of this shard among those of the job, and theirs.
    pub part: (u32, u32),
    pub layout: Layout,
    /// Byte offset of the first image.
    pub offset: usize,
    pub images: u64,
    pub seal: Seal,
    pub sealing: Sealing,
    /// The images that are not zero.
    pub written: Bitmap,
    pub holders: Option<Holders>,
    pub openers: BTreeMap<ClientId, Opener>,
    /// Opens that have not been answered: client, and sequence of its message.
    pub waiting: Vec<(ClientId, u64)>,
}

/// Bytes of the images of a shard's part of a table, and their number.
pub fn extent(open: &OpenTable) -> (u128, u64) {
    let layout = open.schema.layout();
    let images =
        layout.images(Router::new(open.shards as usize).rows_in(open.shard as usize, open.schema.rows));
    (u128::from(images) * layout.stride() as u128, images)
}

impl Table {
    /// Whose images begin at `offset`.
    pub fn new(open: &OpenTable, offset: usize) -> Self {
        let schema = open.schema.clone();
        let layout = schema.layout();
        let rows = Router::new(open.shards as usize).rows_in(open.shard as usize, schema.rows);
        let images = layout.images(rows);
        Self {
            part: (open.shard, open.shards),
            layout,
            offset,

            images,
            seal: Seal::new(layout.image_bytes()),
            sealing: Sealing::No,
            written: Bitmap::new(images),
            holders: None,
            openers: BTreeMap::new(),
            waiting: Vec::new(),
            schema,
        }
    }

    pub fn shape(&self) -> Shape {
        Shape {
            element: self.schema.element,
            images: self.images,
            width: self.schema.width << self.layout.rows_per_image().ilog2(),
            non_finite: self.schema.non_finite,
        }
    }

    /// Whether a round pushes all that has changed.
    pub fn in_rounds(&self) -> bool {
        self.schema.model.eager()
    }

    /// Whether it is pushed after each turn, and clients are told when that is visible.
    pub fn value_bounded(&self) -> bool {
        self.schema.model.value_bounded()
    }

    /// Bytes of its images.
    pub fn bytes(&self) -> usize {
        self.layout.offset(self.images)
    }

    /// Bytes of the shard's region with these images.
    pub fn place(&self, images: &Range<u64>) -> Range<usize> {
        self.offset + self.layout.offset(images.start)..self.offset + self.layout.offset(images.end)
    }

    /// How many images go into `bytes` bytes; at least one.
    pub fn images_in(&self, bytes: usize) -> u64 {
        (bytes / self.layout.stride()).max(1) as u64
    }

    /// Number of a row over all shards.
    pub fn row(&self, image: u64) -> u64 {
        let first = image * self.layout.rows_per_image();
        Router::new(self.part.1 as usize).row(self.part.0 as usize, first)
    }

    /// Bytes to remember what has changed.
    pub fn holders_bytes(&self) -> usize {
        let ranked = if self.schema.continuous > 0 { Continuous::bytes(self.images) } else { 0 };
        Bitmap::bytes(self.images) + ranked
    }

    /// The holders; from now on it is remembered what changes.
    pub fn make_holders(&mut self) -> &mut Holders {
        let Self { schema, images, holders, .. } = self;
        holders.get_or_insert_with(|| Holders {
            dirty: Bitmap::new(*images),
            continuous: (schema.continuous > 0).then(|| Continuous::new(*images, schema.continuous)),
            mirrors: Vec::new(),
            slots: BTreeMap::new(),
        })
    }

    /// A client wants an image pushed to its slot at `at` from now on.
    ///
    /// # Errors
    /// It is already, or there is no bookkeeping for it.
    pub fn subscribe(
        &mut self,
        image: u64,
        client: ClientId,
        at: u64,
        ledger: &mut Ledger,
    ) -> Result<(), String> {
        let name = &self.schema.name;
        if self.holders.as_ref().is_some_and(|holders| holders.slots.contains_key(&(image, client))) {
            return Err(format!("image = {image} of table `{name}` is subscribed already"));
        }
        let holders = if self.holders.is_none() { self.holders_bytes() } else { 0 };
        ledger.charge(holders + SUBSCRIPTION_BYTES, || {
            format!("a subscription to table `{name}` (let the client have fewer slots), which")
        })?;
        let holders = self.make_holders();
        holders.slots.insert((image, client), at);
        if mutant(Mutant::DirtyForgotten) {
            holders.clean(image..image + 1);
        }
        Ok(())
    }

    /// A client opens it. `false`: it has it open already, and holds it in another way.
    pub fn opened_by(&mut self, client: ClientId, hold: Hold) -> bool {
        match self.openers.entry(client) {
            Entry::Vacant(place) => {
                place.insert(Opener { hold, times: 1 });
                true
            }
            Entry::Occupied(mut opener) => {
                opener.get_mut().times += u32::from(opener.get().hold == hold);
                opener.get().hold == hold
            }
        }
    }

    /// Whether a client that has it open can be answered: what it will look at is there.
    pub fn is_ready_for(&mut self, client: ClientId) -> bool {
        let in_place = self.openers.get(&client).is_some_and(|opener| opener.hold == Hold::InPlace);
        let owed = self.holders.as_mut().and_then(|holders| holders.mirror(client));
        (in_place || self.sealing == Sealing::Yes) && owed.is_none_or(|mirror| mirror.owed.is_empty())
    }

    /// Makes the check of an image as it is.
    pub fn make_check(&self, image: &mut [u8]) {
        let (header, data) = Header::read_from_prefix(image).expect("an image begins with a header");
        let check = self.seal.check(header.version, &data[..self.layout.image_bytes()]);
        image[8..ROW_HEADER].copy_from_slice(&check.to_le_bytes());
    }

    /// Bytes from one image to the next.
    pub fn stride(&self) -> usize {
        self.layout.stride()
    }

    /// Bytes of an image on the wire.
    pub fn image_bytes(&self) -> usize {
        ROW_HEADER + self.layout.image_bytes()
    }
}
