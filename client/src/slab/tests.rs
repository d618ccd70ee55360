//! Slabs: sums of updates, what is named of them, and how far they have come.

use fervor_protocol::{
    ElementType,
    batch::{Batch, BatchWriter, Shape, Source, Target},
    wire::{Kind, MessageHeader},
};
use fervor_verbs::Exclusive;
use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

fn row(slab: &Slab<f32>, row: u32, width: usize) -> Vec<f32> {
    let mut copy = vec![0.0; width];
    slab.add_to(row, 0, &mut copy);
    copy
}

#[test]
fn updates_of_a_row_add_up_whatever_their_form() {
    let mut slab = Slab::<f32>::new(100, 4, None);
    assert!(slab.is_empty());
    assert!(slab.add(7, &[1.0; 4], true) && slab.add(7, &[1.0; 4], true));
    assert!(slab.add_at(7, &[(1, 5.0)], true));
    assert!(slab.add_at(9, &[(3, 2.0)], true) && slab.add_at(9, &[(3, 1.0)], true));
    assert_eq!(slab.cells(0), (9, &[(3, 2.0), (3, 1.0)][..]));
    assert_eq!(
        (row(&slab, 7, 4), row(&slab, 9, 4), row(&slab, 8, 4)),
        (vec![2.0, 7.0, 2.0, 2.0], vec![0.0, 0.0, 0.0, 3.0], vec![0.0; 4])
    );
    // Past half the width, and by a whole row, it is a whole row.
    assert!(slab.add_at(9, &[(0, 1.0)], true));
    assert_eq!((slab.rows(), slab.cells(0).1.len()), (2, 0));
    assert_eq!(row(&slab, 9, 4), [1.0, 0.0, 0.0, 3.0]);
    slab.reset();
    assert!(slab.is_empty() && slab.find(7) == 0 && slab.find(9) == 0);
}

#[test]
fn cells_of_few_columns_stay_few() {
    let mut slab = Slab::<f64>::new(10, 1000, None);
    for i in 0..20_000u32 {
        assert!(slab.add_at(3, &[(i % 7, 1.0)], true));
    }
    let (_, pairs) = slab.cells(0);
    assert!(pairs.len() <= 2 * FEW_CELLS, "{} pairs for 7 columns", pairs.len());
    let mut copy = vec![0.0; 1000];
    slab.add_to(3, 0, &mut copy);
    assert_eq!((copy[0], copy.iter().sum::<f64>()), (2858.0, 20_000.0));
}

#[test]
fn a_sum_that_is_not_finite_is_refused_and_changes_nothing() {
    let mut slab = Slab::<f32>::new(10, 4, None);
    assert!(slab.add(1, &[3e38, 0.0, 0.0, 0.0], true));
    assert!(!slab.add(1, &[3e38, 1.0, 1.0, 1.0], true));
    assert!(!slab.add_at(1, &[(2, 1.0), (0, 3e38)], true));
    assert!(!slab.add_at(1, &[(3, 2e38), (3, 2e38)], true));
    assert_eq!(row(&slab, 1, 4), [3e38, 0.0, 0.0, 0.0]);
    assert!(slab.add_at(2, &[(0, 3e38)], true) && !slab.add_at(2, &[(0, 3e38)], true));
    assert!(slab.add_at(2, &[(0, -3e38)], true));
    assert_eq!(row(&slab, 2, 4)[0], 0.0);
    assert!(
        slab.add(3, &[3e38; 4], false) && slab.add(3, &[3e38; 4], false),
        "where the table takes infinity"
    );
    let mut fresh = Slab::<f32>::new(10, 4, None);
    assert!(!fresh.add(1, &[f32::NAN; 4], true) && !fresh.add_small(2, 1, &[f32::NAN], true));
    assert!(!fresh.add_at(3, &[(0, 2e38), (0, 2e38)], true));
    assert!(fresh.is_empty(), "nothing is to be sent");
}

/// Memory that a server sees: all pieces, as bytes.
struct Seen<'a>(&'a Slab<f32>);

impl Source for Seen<'_> {
    fn len(&self) -> u64 {
        4 * PIECE_BYTES as u64
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        let block = self.0.blocks.iter().chain(&self.0.encoded).find(|block| {
            block.offset().is_some_and(|offset| offset <= at && at < offset + PIECE_BYTES as u64)
        });
        let block = block.expect("a block is there");
        let at = (at - block.offset().unwrap()) as usize;
        into.copy_from_slice(&block.bytes()[at..at + into.len()]);
    }
}

#[test]
fn what_a_slab_names_is_what_is_in_it() {
    let pool = Pool::new(Exclusive::new("test", 4 * PIECE_BYTES).unwrap().split(PIECE_BYTES));
    let mut slab = Slab::<f32>::new(100, 8, Some(pool.clone()));
    for row in [5, 17, 99] {
        slab.add(row, &[row as f32; 8], true);
    }
    slab.add_at(40, &[(1, 0.5), (7, 0.25)], true);
    slab.add_at(41, &[(2, 0.5)], true);
    slab.hand_over(3);
    let sections = slab.references().expect("all of it is in named memory").to_vec();
    let mut buffer = vec![0; 1024];
    let mut writer = BatchWriter::new(&mut buffer);
    sections.into_iter().for_each(|section| writer.refer(section));
    let length = writer.finish(Kind::Reference, 1, 0, 1, None);
    let message = &buffer[..length];
    let shape = Shape { element: ElementType::F32, images: 100, width: 8, non_finite: false };
    let mut batch = Batch::default();
    batch
        .read(&MessageHeader::parse(message).unwrap(), message, Some(&Seen(&slab)), |_| Some(shape))
        .unwrap();
    let sections: Vec<_> = batch.sections().collect();
    assert_eq!(sections[0].target, Target::Rows(&[5, 17, 99]));
    let mut values = [0.0f32; 24];
    Seen(&slab).read(sections[0].values_at, values.as_mut_bytes());
    assert_eq!((values[0], values[8], values[23]), (5.0, 17.0, 99.0));
    assert_eq!(sections[1].target, Target::Cells { rows: &[40, 41], counts: &[2, 1], columns: &[1, 7, 2] });
    drop(slab);
    assert_eq!(pool.free.lock().unwrap().len(), 4, "all pieces came back");
}

#[test]
fn without_pieces_a_slab_uses_memory_of_its_own_and_names_nothing() {
    let pool = Pool::new(Vec::new());
    let mut slab = Slab::<f32>::new(10, 4, Some(pool));
    slab.add(1, &[1.0; 4], true);
    slab.hand_over(0);
    assert!(slab.references().is_none());
    assert_eq!(row(&slab, 1, 4), [1.0; 4]);
}

#[test]
fn a_delivery_is_applied_when_its_last_batch_is() {
    let mut slab = Slab::<f32>::new(10, 4, None);
    slab.add(1, &[1.0; 4], true);
    slab.add(2, &[1.0; 4], true);
    slab.hand_over(0);
    let (one, two) = (slab.find(1), slab.find(2));
    assert_eq!(slab.progress(one), Progress::Unsent);
    let delivery = Delivery::new(8, 5);
    slab.goes_out(&delivery, true);
    assert_eq!(slab.progress(one), Progress::Unsent, "not written into a batch yet");
    slab.goes_with(one, 0);
    slab.goes_with(two, 1);
    assert_eq!((slab.progress(one), slab.progress(two)), (Progress::Sent(8), Progress::Sent(9)));
    delivery.acknowledged(0, 30);
    assert_eq!((slab.progress(one), slab.applied()), (Progress::Applied(30), None));
    delivery.complete(2);
    assert_eq!((slab.applied(), slab.last_batch()), (None, Some(9)));
    delivery.acknowledged(1, 31);
    assert_eq!(slab.applied(), Some(31));
}

proptest! {
    #[test]
    fn a_slab_is_a_map_of_sums(width in 1usize..40, steps in proptest::collection::vec((0u32..6, 0usize..40, any::<bool>(), 1i64..9), 1..200)) {
        let mut slab = Slab::<i64>::new(6, width, None);
        let mut model = vec![vec![0i64; width]; 6];
        for (row, column, whole, value) in steps {
            let column = column % width;
            if whole {
                prop_assert!(slab.add(row, &vec![value; width], false));
                model[row as usize].iter_mut().for_each(|sum| *sum += value);
            } else {
                prop_assert!(slab.add_at(row, &[(column as u32, value)], false));
                model[row as usize][column] += value;
            }
        }
        for (row, sums) in model.iter().enumerate() {
            let mut copy = vec![0; width];
            slab.add_to(row as u32, 0, &mut copy);
            prop_assert_eq!(&copy, sums);
        }
    }
}
