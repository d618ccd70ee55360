//! Adding: all element types and kinds of sections, from messages and from clients' memory, against plain vectors.

use std::cell::Cell;

use proptest::prelude::*;
use zerocopy::KnownLayout;

use super::*;

/// Memory of a client that puts `after` in the place of what it holds when it is read for the `at`-th time.
struct Changing {
    before: Vec<u8>,
    after: Vec<u8>,
    at: usize,
    reads: Cell<usize>,
}

impl Source for Changing {
    fn len(&self) -> u64 {
        self.before.len() as u64
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        let reads = self.reads.replace(self.reads.get() + 1);
        let bytes = if reads < self.at { &self.before } else { &self.after };
        bytes[..].read(at, into);
    }
}

/// A section of a reference, and the bytes of its body, which begins at byte `at`.
fn referred<E: Element>(
    table: TableId,
    kind: u32,
    lists: [&[u32]; 3],
    total: u32,
    values: &[E],
    at: usize,
) -> (SectionHeader, Vec<u8>) {
    let mut body: Vec<u8> = lists.iter().flat_map(|list| list.as_bytes().to_vec()).collect();
    body.resize(body.len().next_multiple_of(8), 0);
    let values_at = (at + body.len()) as u64;
    body.extend(values.as_bytes());
    let count = if kind == fervor_protocol::batch::PART { values.len() } else { lists[0].len() };
    let header = SectionHeader { table, kind, count: count as u32, total, rows_at: at as u64, values_at };
    body.resize(body.len().next_multiple_of(8), 0);
    (header, body)
}

impl World {
    fn refer<S: Source>(&mut self, section: SectionHeader, slabs: &S) -> Result<u64, Fault> {
        let mut buffer = vec![0; 256];
        let mut writer = BatchWriter::new(&mut buffer);
        writer.refer(section);
        let (sequence, batch) = (self.sequences[0] + 1, self.batches[0] + 1);
        let length = writer.finish(Kind::Reference, sequence, 0, batch, None);
        let effects = self.core.handle(ClientId(0), &buffer[..length], Some(slabs))?;
        self.sequences[0] += 1;
        self.batches[0] += 1;
        Ok(effects.lsn)
    }
}

#[derive(Debug, Clone)]
enum Update {
    Rows(Vec<u32>),
    Cells(Vec<(u32, Vec<u32>)>),
    Part(u32, u32, u32),
}

const ROWS: u32 = 11;

/// Updates of images and columns that are yet to be brought into their ranges.
fn updates() -> impl Strategy<Value = Update> {
    let cells = proptest::collection::vec((0..ROWS, proptest::collection::vec(any::<u32>(), 0..5)), 0..5);
    prop_oneof![
        proptest::collection::vec(0..ROWS, 0..9).prop_map(Update::Rows),
        cells.prop_map(Update::Cells),
        (0..ROWS, any::<u32>(), any::<u32>()).prop_map(|(image, a, b)| Update::Part(image, a, b)),
    ]
}

impl Update {
    /// The same, of a table of so many images of so many elements.
    fn within(&self, images: u32, width: u32) -> Self {
        match self {
            Self::Rows(rows) => Self::Rows(rows.iter().map(|row| row % images).collect()),
            Self::Cells(cells) => {
                let cell = |(row, columns): &(u32, Vec<u32>)| {
                    (row % images, columns.iter().map(|column| column % width).collect())
                };
                Self::Cells(cells.iter().map(cell).collect())
            }
            Self::Part(row, a, b) => {
                let (a, b) = (a % width, b % width);
                Self::Part(row % images, a.min(b), a.max(b) + 1 - a.min(b))
            }
        }
    }
}

/// Applies updates in every way that there is; the images are as plain vectors are.
fn check<E: Element + KnownLayout + From<i8>>(
    width: u32,
    sealed: bool,
    updates: &[(Update, bool)],
) -> Result<(), TestCaseError> {
    let mut world = World::new(1 << 16);
    world.join(1);
    let hold = if sealed { Hold::Slots } else { Hold::InPlace };
    let table = schema("t", E::TYPE, ROWS.into(), width, Model::Essp { staleness: 0 });
    world.open(0, &table, hold).unwrap();
    let layout = table.layout();
    let (images, width) = (layout.images(ROWS.into()) as u32, layout.image_bytes() / size_of::<E>());
    let mut model = vec![vec![E::default(); width]; images as usize];
    let mut next = 0i8;
    let mut value = || {
        next = (next + 7) % 100;
        E::from(next)
    };
    for (update, by_reference) in updates {
        let update = update.within(images, width as u32);
        let (kind, lists, total, values): (u32, [Vec<u32>; 3], u32, Vec<E>) = match &update {
            Update::Rows(rows) => {
                let values: Vec<E> = (0..rows.len() * width).map(|_| value()).collect();
                for (row, values) in rows.iter().zip(values.chunks(width)) {
                    E::add_all(&mut model[*row as usize], values);
                }
                (1, [rows.clone(), vec![], vec![]], 0, values)
            }
            Update::Cells(cells) => {
                let columns: Vec<u32> = cells.iter().flat_map(|cell| cell.1.clone()).collect();
                let mut values = Vec::new();
                for (row, columns) in cells {
                    for column in columns {
                        let at = &mut model[*row as usize][*column as usize];
                        values.push(value());
                        *at = at.plus(values[values.len() - 1]);
                    }
                }
                let rows = cells.iter().map(|cell| cell.0).collect();
                let counts = cells.iter().map(|cell| cell.1.len() as u32).collect();
                let total = columns.len() as u32;
                (2, [rows, counts, columns], total, values)
            }
            Update::Part(row, start, count) => {
                let values: Vec<E> = (0..*count).map(|_| value()).collect();
                E::add_all(&mut model[*row as usize][*start as usize..(start + count) as usize], &values);
                (3, [vec![*row], vec![], vec![]], *start, values)
            }
        };
        if *by_reference {
            let (section, body) = referred(0, kind, [&lists[0], &lists[1], &lists[2]], total, &values, 16);
            let slabs = [vec![0; 16], body].concat();
            let slabs = Changing { after: slabs.clone(), before: slabs, at: 0, reads: Cell::new(0) };
            world.refer(section, &slabs).unwrap();
        } else {
            let fill = |writer: &mut BatchWriter<'_>| match kind {
                1 => writer.rows(0, &lists[0], width * size_of::<E>()).copy_from_slice(values.as_bytes()),
                2 => writer.cells(0, &lists[0], &lists[1], &lists[2], &values),
                _ => writer.part(0, lists[0][0], total, values.len(), values.as_bytes()),
            };
            world.batch(0, None, fill).unwrap();
        }
    }
    for image in 0..u64::from(images) {
        let (header, data) = world.image(0, image);
        prop_assert_eq!(<[E]>::ref_from_bytes(&data).unwrap(), &model[image as usize][..], "image {}", image);
        prop_assert!(!header.version.is_busy());
        prop_assert!(!sealed || Seal::new(layout.image_bytes()).verify(&header, &data));
    }
    Ok(())
}

proptest! {
    #[test]
    fn all_ways_to_add_are_one(
        width in 1u32..70, sealed: bool, steps in proptest::collection::vec((updates(), any::<bool>()), 1..12), kind in 0u8..4,
    ) {
        match kind {
            0 => check::<f32>(width, sealed, &steps)?,
            1 => check::<f64>(width, sealed, &steps)?,
            2 => check::<i32>(width, sealed, &steps)?,
            _ => check::<i64>(width, sealed, &steps)?,
        }
    }
}

/// A client that changes its slab at the `at`-th look: it spoils its own rows, and is put out.
#[test]
fn a_client_that_writes_while_it_is_read_spoils_its_own_rows_and_nothing_else() {
    const WIDTH: usize = 16;
    for at in 0..4 {
        let mut world = World::new(1 << 16);
        world.join(1);
        let table = schema("t", ElementType::F32, 4096, WIDTH as u32, Model::Bsp);
        world.open(0, &schema("other", ElementType::F32, 8, WIDTH as u32, Model::Bsp), Hold::Slots).unwrap();
        let mut table = table;
        table.rows = 500;
        world.open(0, &table, Hold::Slots).unwrap();
        // 300 rows: two pieces.
        let rows: Vec<u32> = (0..300).collect();
        let body = |rows: &[u32], values: &[f32]| {
            referred(1, fervor_protocol::batch::ROWS, [rows, &[], &[]], 0, values, 0)
        };
        let (section, before) = body(&rows, &[1.0; 300 * WIDTH]);
        let other: Vec<u32> = rows.iter().map(|row| row + 1_000_000).collect();
        let mut values = [2.0; 300 * WIDTH];
        (values[5 * WIDTH + 1], values[290 * WIDTH]) = (f32::NAN, f32::INFINITY);
        let (_, after) = body(&other, &values);
        let slabs = Changing { before, after, at, reads: Cell::new(0) };
        let result = world.refer(section, &slabs);
        let value = |world: &World, row| f32::read_from_prefix(&world.image(1, row).1).unwrap().0;
        match at {
            0 => {
                assert!(result.unwrap_err().to_string().contains("row = 1000299"));
                assert!((0..500).all(|row| value(&world, row) == 0.0));
            }
            1 => {
                let fault = result.unwrap_err().to_string();
                assert_eq!(fault, "table `t`: NaN or infinity in an update of row 5");
                assert_eq!([4, 5, 6, 290, 299].map(|row| value(&world, row)), [2.0, 0.0, 2.0, 0.0, 2.0]);
            }
            2 => {
                let fault = result.unwrap_err().to_string();
                assert_eq!(fault, "table `t`: NaN or infinity in an update of row 290");
                assert_eq!([5, 255, 256, 290, 299].map(|row| value(&world, row)), [1.0, 1.0, 2.0, 0.0, 2.0]);
            }
            _ => {
                assert_eq!(result, Ok(1));
                assert!((0..300).all(|row| value(&world, row) == 1.0));
            }
        }
        assert!((300..500).all(|row| value(&world, row) == 0.0));
        assert!((0..8).all(|row| world.image(0, row).0 == Header::new_zeroed()));
    }
}

#[test]
fn finite_values_may_add_up_to_infinity() {
    let mut world = World::new(4096);
    world.join(1);
    world.open(0, &schema("t", ElementType::F32, 3, 16, Model::Bsp), Hold::Slots).unwrap();
    for _ in 0..2 {
        let add = |writer: &mut BatchWriter<'_>| writer.part(0, 1, 1, 1, 3e38f32.as_bytes());
        world.batch(0, None, add).unwrap();
    }
    let (_, data) = world.image(0, 1);
    assert_eq!(<[f32]>::ref_from_bytes(&data[..12]).unwrap(), [0.0, f32::INFINITY, 0.0]);
    let bad = |writer: &mut BatchWriter<'_>| writer.part(0, 2, 0, 1, f32::NAN.as_bytes());
    let fault = world.batch(0, None, bad).unwrap_err().to_string();
    assert_eq!(fault, "table `t`: NaN or infinity in an update of row 2");
}
