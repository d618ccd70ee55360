//! Slabs of several workers, written into messages and applied: each update once, and told where it is.

use fervor_protocol::{
    ElementType,
    batch::{Batch, Shape, Target},
    wire::{Kind, MessageHeader},
};
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::*;
use crate::{
    merge::Merge,
    slab::{Progress, Slab},
};

const ROWS: usize = 6;

/// Writes all batches of `slabs` in messages of `message` bytes, applies them to rows of zeros, and tells after each.
fn send(
    slabs: &[Arc<dyn AnySlab>],
    width: usize,
    message: usize,
    mut each: impl FnMut(usize, &[Vec<i64>]),
) -> Vec<Vec<i64>> {
    let mut combining = Combining {
        groups: vec![Group { table: 0, slabs: slabs.to_vec(), cursor: Cursor::default() }],
        delivery: Delivery::new(1, most_batches(slabs, message) + 1),
        parts: 0,
        clock: None,
        flushed: 0,
    };
    slabs.iter().for_each(|slab| slab.goes_out(&combining.delivery, true));
    let shape =
        Shape { element: ElementType::I64, images: ROWS as u64, width: width as u32, non_finite: false };
    let mut rows = vec![vec![0i64; width]; ROWS];
    loop {
        let mut buffer = vec![0; message];
        let mut writer = BatchWriter::new(&mut buffer);
        let part = combining.parts;
        combining.parts += 1;
        let group = &mut combining.groups[0];
        let merge = Merge::<i64>::new(&group.slabs, width, 0, false);
        let all = merge.write(&mut group.cursor, &mut writer, part);
        let length = writer.finish(Kind::Batch, 1, 0, 1, None);
        let mut batch = Batch::default();
        let sent = &buffer[..length];
        batch.read::<[u8]>(&MessageHeader::parse(sent).unwrap(), sent, None, |_| Some(shape)).unwrap();
        for section in batch.sections() {
            let values = |count: usize| {
                let at = section.values_at as usize;
                <[i64]>::ref_from_bytes(&sent[at..at + 8 * count]).unwrap()
            };
            match section.target {
                Target::Rows(indices) => {
                    for (index, update) in indices.iter().zip(values(indices.len() * width).chunks(width)) {
                        rows[*index as usize].iter_mut().zip(update).for_each(|(sum, value)| *sum += value);
                    }
                }
                Target::Cells { rows: indices, counts, columns } => {
                    let mut cells = columns.iter().zip(values(columns.len()));
                    for (index, count) in indices.iter().zip(counts) {
                        for (column, value) in cells.by_ref().take(*count as usize) {
                            rows[*index as usize][*column as usize] += value;
                        }
                    }
                }
                Target::Part { row, start, count } => {
                    let update = values(count as usize);
                    let part = &mut rows[row as usize][start as usize..(start + count) as usize];
                    part.iter_mut().zip(update).for_each(|(sum, value)| *sum += value);
                }
            }
        }
        combining.delivery.acknowledged(part, part as u64 + 10);
        each(part, &rows);
        if all {
            combining.posted();
            return rows;
        }
    }
}

type Step = (usize, u32, usize, bool, i64);

fn slabs(width: usize, count: usize, steps: &[Step]) -> (Vec<Slab<i64>>, Vec<Vec<i64>>) {
    let mut slabs: Vec<_> = (0..count).map(|_| Slab::<i64>::new(ROWS as u64, width, None)).collect();
    let mut sums = vec![vec![0; width]; ROWS];
    for (slab, row, column, whole, value) in steps {
        let (slab, column) = (&mut slabs[slab % count], column % width);
        if *whole {
            slab.add(*row, &vec![*value; width], false);
            sums[*row as usize].iter_mut().for_each(|sum| *sum += value);
        } else {
            slab.add_at(*row, &[(column as u32, *value)], false);
            sums[*row as usize][column] += value;
        }
    }
    slabs.iter_mut().for_each(|slab| slab.hand_over(0));
    (slabs, sums)
}

#[test]
fn workers_that_update_the_same_rows_send_them_once() {
    let steps: Vec<Step> = (0..24).map(|i| (i, (i / 4) as u32, 0, true, 1)).collect();
    let (slabs, sums) = slabs(100, 4, &steps);
    let slabs: Vec<Arc<dyn AnySlab>> = slabs.into_iter().map(|slab| Arc::new(slab) as _).collect();
    let mut batches = 0;
    assert_eq!(send(&slabs, 100, 8192, |_, _| batches += 1), sums);
    assert_eq!(batches, 1, "six rows of 800 bytes fit a message, whoever updates them");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Of every slab and row it is told which batch carries it: before that batch nothing of it is there, after it all.
    #[test]
    fn batches_carry_each_update_once_and_say_where(
        width in 1usize..120, count in 1usize..4, message in 320usize..1500,
        steps in proptest::collection::vec((0usize..4, 0u32..ROWS as u32, 0usize..120, any::<bool>(), 1i64..9), 1..60),
    ) {
        let (slabs, sums) = slabs(width, count, &steps);
        let typed: Vec<Arc<Slab<i64>>> = slabs.into_iter().map(Arc::new).collect();
        let slabs: Vec<Arc<dyn AnySlab>> = typed.iter().map(|slab| slab.clone() as _).collect();
        // What a worker that reads the row would add to it is always what is missing.
        let rows = send(&slabs, width, message & !7, |part, rows| {
            for row in 0..ROWS as u32 {
                let mut copy = rows[row as usize].clone();
                let whole = 2 * (24 + 16 + 32 + 32) + 8 * width <= message;
                for slab in &typed {
                    let entry = slab.find(row);
                    if entry != 0 && !matches!(slab.progress(entry), Progress::Applied(lsn) if lsn <= part as u64 + 10) {
                        slab.add_entry(entry, 0, &mut copy);
                    }
                }
                assert!(!whole || copy == sums[row as usize], "row {row} after batch {part}: {copy:?}");
            }
        });
        prop_assert_eq!(rows, sums);
        prop_assert!(typed.iter().all(|slab| slab.is_empty() || slab.applied().is_some()));
    }
}
