//! Adding a batch's values to rows. Each section takes one pass. The element type and the kind of the section
//! are decided before its first row.
//!
//! Values come from two places. Only the first is the shard's own:
//!
//! - *In the message.* The receive buffer belongs to the shard until it is given back. All values were
//!   checked before any is added.
//! - *In the client's memory.* The client can change it at any time. So a piece is copied to memory of the
//!   shard's own, checked there, and added from there. Values that are not finite are left out. The client is
//!   told, and its connection is ended. What decides where values go (table, rows, columns, lengths) was
//!   copied before it was checked. So such a client spoils only what it may write anyway.
//!
//! **One image, one rewrite.** A batch names each image at most once. So an image has the batch's LSN exactly
//! if it contains all that the batch has for it. A reader concludes just that from the LSN. (A client that
//! names an image twice deceives itself, about its own updates.)
//!
//! A rewrite is done under the image's sequence lock, and gives the image the next version with the batch's
//! LSN. If the table is sealed, the rewrite also renews the check, within the lock. Checks could be renewed
//! once a turn instead. But then a READ between the rewrite and that moment would find a check that does not
//! fit, and would try again, for as long as a turn lasts.
//!
//! A stored row may overflow when two finite values are added. That is the sum, and it is not refused.

use fervor_protocol::{
    Element, ElementType,
    batch::{Section, Source, Target},
    limits::ROW_HEADER,
    mutants::{Mutant, mutant, pause},
    row::{Seal, Version},
    wide,
};
use fervor_verbs::Exclusive;
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

use super::{
    bitmap::Bitmap,
    region::Region,
    table::{Holders, Sealing, Table},
};

/// Bytes of a piece that is copied from a client's memory at a time, unless a row is longer.
const PIECE: usize = 16 << 10;

/// Memory of the shard's own that values are copied to. Words, so that every element is aligned.
#[derive(Debug, Default)]
pub struct Scratch(Vec<u64>);

impl Scratch {
    fn elements<E: Element + KnownLayout>(&mut self, count: usize) -> &mut [E] {
        let words = (count * size_of::<E>()).div_ceil(8);
        if self.0.len() < words {
            self.0.resize(words, 0);
        }
        let bytes = &mut self.0.as_mut_bytes()[..count * size_of::<E>()];
        <[E]>::mut_from_bytes(bytes).expect("words are aligned for every element")
    }
}

/// Where the values of a section are.
#[derive(Debug)]
pub enum Values<'a, S: ?Sized> {
    /// In the message, checked.
    Message(&'a [u8]),
    /// In the client's memory.
    Slabs(&'a S),
}

impl<S: Source + ?Sized> Values<'_, S> {
    fn read(&self, at: u64, into: &mut [u8]) {
        match self {
            Self::Message(message) => message.read(at, into),
            Self::Slabs(slabs) => slabs.read(at, into),
        }
    }
}

/// A value of a reference is not finite: of this row, by its index in the shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite(pub u32);

/// Adds a section's values to the rows of `table`, at `lsn`.
///
/// # Errors
/// The first row of which a value is not finite. All but such are added.
pub fn section<S: Source + ?Sized>(
    region: &mut Region,
    table: &mut Table,
    section: &Section<'_>,
    values: &Values<'_, S>,
    lsn: u64,
    scratch: &mut Scratch,
) -> Result<(), NotFinite> {
    match table.schema.element {
        ElementType::F32 => typed::<f32, S>(region, table, section, values, lsn, scratch),
        ElementType::F64 => typed::<f64, S>(region, table, section, values, lsn, scratch),
        ElementType::I32 => typed::<i32, S>(region, table, section, values, lsn, scratch),
        ElementType::I64 => typed::<i64, S>(region, table, section, values, lsn, scratch),
    }
}

fn typed<E: Element + KnownLayout, S: Source + ?Sized>(
    region: &mut Region,
    table: &mut Table,
    section: &Section<'_>,
    values: &Values<'_, S>,
    lsn: u64,
    scratch: &mut Scratch,
) -> Result<(), NotFinite> {
    let at = section.values_at;
    let check = !table.schema.non_finite;
    let mut pieces = Pieces { values, scratch, check, bad: None };
    let mut writer = Writer::new(region, table, lsn);
    match section.target {
        Target::Rows(rows) => {
            let width = writer.place.image_bytes / size_of::<E>();
            pieces.each::<E>(
                at,
                rows.len(),
                width,
                |first| rows[first],
                |first, values| {
                    writer.add_images(&rows[first..first + values.len() / width], values);
                },
            );
        }
        Target::Cells { rows, counts, columns } => {
            let mut start = 0;
            for (row, count) in rows.iter().zip(counts) {
                let columns = &columns[start..start + *count as usize];
                let at = at + (start * size_of::<E>()) as u64;
                // All of a row's at once: between two rewrites somebody would take one for both.
                if !columns.is_empty() {
                    pieces.each::<E>(
                        at,
                        1,
                        columns.len(),
                        |_| *row,
                        |_, values| {
                            writer.add_cells(*row, columns, values);
                        },
                    );
                }
                start += columns.len();
            }
        }
        Target::Part { row, start, count } => {
            if count > 0 {
                pieces.each::<E>(
                    at,
                    1,
                    count as usize,
                    |_| row,
                    |_, values| {
                        writer.add_part(row, start as usize, values);
                    },
                );
            }
        }
    }
    pieces.bad.map_or(Ok(()), |row| Err(NotFinite(row)))
}

/// Gives out the values of sections, in pieces that may be added.
struct Pieces<'a, S: ?Sized> {
    values: &'a Values<'a, S>,
    scratch: &'a mut Scratch,
    /// Whether values must be finite.
    check: bool,
    /// The first row with a value that is not.
    bad: Option<u32>,
}

impl<S: Source + ?Sized> Pieces<'_, S> {
    /// Calls `add` with pieces of `count` units of `width` elements that begin at byte `at`: number of the first unit, and the
    /// values. A unit is all that a section has for an image: it is added in one rewrite. A piece of the client's memory that is not finite comes unit by unit, without those that are not.
    fn each<E: Element + KnownLayout>(
        &mut self,
        at: u64,
        count: usize,
        width: usize,
        row: impl Fn(usize) -> u32,
        mut add: impl FnMut(usize, &[E]),
    ) {
        let unit = width * size_of::<E>();
        if let Values::Message(message) = self.values
            && let Ok(values) = <[E]>::ref_from_bytes(&message[at as usize..at as usize + count * unit])
        {
            return add(0, values);
        }
        let check = self.check && matches!(self.values, Values::Slabs(_));
        let most = (PIECE / unit).max(1);
        for first in (0..count).step_by(most) {
            let piece = self.scratch.elements::<E>(most.min(count - first) * width);
            self.values.read(at + (first * unit) as u64, piece.as_mut_bytes());
            if !check || E::all_finite(piece) {
                add(first, piece);
                continue;
            }
            for (index, values) in piece.chunks_exact(width).enumerate() {
                if E::all_finite(values) {
                    add(first + index, values);
                } else {
                    self.bad = self.bad.or(Some(row(first + index)));
                }
            }
        }
    }
}

/// Changes images of one table, all at one LSN.
struct Writer<'a> {
    memory: &'a mut Exclusive,
    place: Place,
    /// The version of the first rewrite at the batch's LSN.
    first: Version,
    /// Makes the checks, if the table is sealed.
    seal: Option<Seal>,
    written: &'a mut Bitmap,
    holders: Option<&'a mut Holders>,
}

/// Where the images of a table are.
#[derive(Debug, Clone, Copy)]
struct Place {
    offset: usize,
    stride: usize,
    image_bytes: usize,
}

impl<'a> Writer<'a> {
    fn new(region: &'a mut Region, table: &'a mut Table, lsn: u64) -> Self {
        let (layout, offset) = (table.layout, table.offset);
        Self {
            memory: region.memory(),
            place: Place { offset, stride: layout.stride(), image_bytes: layout.image_bytes() },
            first: Version::new(lsn),
            seal: (table.sealing != Sealing::No).then_some(table.seal),
            written: &mut table.written,
            holders: table.holders.as_mut(),
        }
    }

    /// Adds `values`, an image's for each of `images`.
    fn add_images<E: Element + KnownLayout>(&mut self, images: &[u32], values: &[E]) {
        let new = add_whole(self.memory, self.place, self.first, self.seal, images, values);
        self.mark(images, values, new);
    }

    /// Adds `values` to the elements of `image` in `columns`.
    fn add_cells<E: Element + KnownLayout>(&mut self, image: u32, columns: &[u32], values: &[E]) {
        self.add_to(image, values, |data: &mut [E]| {
            for (column, value) in columns.iter().zip(values) {
                data[*column as usize] = data[*column as usize].plus(*value);
            }
        });
    }

    /// Adds `values` to the elements of `image` from column `column` on.
    fn add_part<E: Element + KnownLayout>(&mut self, image: u32, column: usize, values: &[E]) {
        self.add_to(image, values, |data| E::add_all(&mut data[column..column + values.len()], values));
    }

    /// Changes an image by `add`, which adds `values` to it.
    fn add_to<E: Element + KnownLayout>(&mut self, image: u32, values: &[E], add: impl FnOnce(&mut [E])) {
        let seal = self.seal;
        let check = |version, data: &[u8]| seal.map(|seal| seal.check(version, data));
        let new = rewrite(self.memory, self.place, image, self.first, add, check);
        self.mark(&[image], values, new);
    }

    /// Remembers that images have changed by these values, and maybe were zero before.
    fn mark<E: Element>(&mut self, images: &[u32], values: &[E], new: bool) {
        if new {
            images.iter().for_each(|image| self.written.insert(u64::from(*image)));
        }
        let Some(holders) = &mut self.holders else { return };
        images.iter().for_each(|image| holders.dirty.insert(u64::from(*image)));
        if let Some(continuous) = &mut holders.continuous {
            let width = values.len() / images.len().max(1);
            for (image, values) in images.iter().zip(values.chunks_exact(width)) {
                continuous.changed(u64::from(*image), greatest(values));
            }
        }
    }
}

wide! {
    /// Adds `values`, an image's for each of `images`, and makes their checks if there is a seal. Whether one was zero before.
    fn add_whole<E: Element + KnownLayout>(
        memory: &mut Exclusive,
        place: Place,
        first: Version,
        seal: Option<Seal>,
        images: &[u32],
        values: &[E],
    ) -> bool {
        let width = place.image_bytes / size_of::<E>();
        let pairs = images.iter().zip(values.chunks_exact(width));
        let mut new = false;
        // Two loops, so that the one without checks has room for all it needs in registers.
        if let Some(seal) = seal {
            for (image, values) in pairs {
                let add = |data: &mut [E]| E::add_all(data, values);
                new |= rewrite(memory, place, *image, first, add, |version, data| Some(seal.check(version, data)));
            }
        } else {
            for (image, values) in pairs {
                new |= rewrite(memory, place, *image, first, |data: &mut [E]| E::add_all(data, values), |_, _| None);
            }
        }
        new
    }
}

/// Changes the data of an image by `add`, under its sequence lock, and gives it its next version and the check that `check` makes. Whether
/// it was zero before.
#[inline(always)]
fn rewrite<E: Element + KnownLayout>(
    memory: &mut Exclusive,
    place: Place,
    image: u32,
    first: Version,
    add: impl FnOnce(&mut [E]),
    check: impl FnOnce(Version, &[u8]) -> Option<u64>,
) -> bool {
    let lock = place.offset + image as usize * place.stride;
    let old = memory.bytes()[lock..lock + 8].try_into().expect("8 bytes");
    let old = Version::from_bits(u64::from_le_bytes(old));
    // Most often the image is changed for the first time at this LSN.
    let version = if old < first { first } else { old.next(first.lsn()) };
    let change = |bytes: &mut [u8]| {
        let (word, data) = bytes.split_at_mut(ROW_HEADER - 8);
        add(<[E]>::mut_from_bytes(data).expect("images are aligned"));
        pause();
        if let Some(check) = check(version, data) {
            word.copy_from_slice(&check.to_le_bytes());
        }
    };
    let range = lock + 8..lock + ROW_HEADER + place.image_bytes;
    if mutant(Mutant::LockNotTaken) {
        change(&mut memory.bytes_mut()[range]);
        memory.publish(lock, version.bits());
    } else {
        memory.rewrite(lock, range, version.bits(), change);
    }
    old == Version::default()
}

/// The greatest of the values, without their signs: how far an element of a copy may be off.
fn greatest<E: Element>(values: &[E]) -> f32 {
    values.iter().fold(0.0, |greatest, value| {
        let value = value.to_f64().abs() as f32;
        if value.is_nan() { f32::INFINITY } else { value.max(greatest) }
    })
}
