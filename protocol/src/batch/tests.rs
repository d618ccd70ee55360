//! Batches: what is written is read, and what is wrong is refused with its name and value.

use proptest::prelude::*;

use super::*;

const SHAPE: Shape = Shape { element: ElementType::F32, images: 10, width: 8, non_finite: false };

fn shape(table: u32) -> Option<Shape> {
    (table == 3).then_some(SHAPE)
}

fn read(message: &[u8]) -> Result<Batch, Fault> {
    let header = MessageHeader::parse(message)?;
    let mut batch = Batch::default();
    batch.read::<[u8]>(&header, message, None, shape)?;
    Ok(batch)
}

fn message(fill: impl FnOnce(&mut BatchWriter<'_>)) -> Vec<u8> {
    let mut buffer = vec![0xaa; 1024];
    let mut writer = BatchWriter::new(&mut buffer);
    fill(&mut writer);
    let length = writer.finish(Kind::Batch, 1, 0, 1, Some(4));
    buffer.truncate(length);
    buffer
}

fn rows(table: u32, rows: &[u32], value: f32) -> Vec<u8> {
    message(|writer| writer.rows(table, rows, 32).copy_from_slice(vec![value; 8 * rows.len()].as_bytes()))
}

#[test]
fn what_was_written_is_read() {
    let message = message(|writer| {
        writer.rows(3, &[9, 1, 2], 32).copy_from_slice([1.0f32; 24].as_bytes());
        writer.cells(3, &[5, 6], &[1, 2], &[7, 0, 3], &[1.0f32, 2.0, 3.0]);
        writer.part(3, 4, 6, 2, [8.0f32, 9.0].as_bytes());
        assert_eq!(writer.sections(), 3);
    });
    let batch = read(&message).unwrap();
    assert_eq!((batch.number(), batch.clock()), (1, Some(4)));
    let sections: Vec<_> = batch.sections().collect();
    assert_eq!(sections[0].target, Target::Rows(&[9, 1, 2]));
    let cells = Target::Cells { rows: &[5, 6], counts: &[1, 2], columns: &[7, 0, 3] };
    assert_eq!(sections[1].target, cells);
    assert_eq!(sections[2].target, Target::Part { row: 4, start: 6, count: 2 });
    let at = sections[1].values_at as usize;
    assert_eq!(message[at..at + 12], *[1.0f32, 2.0, 3.0].as_bytes());
}

#[test]
fn a_bad_field_is_named_with_its_value() {
    let cases = [
        (rows(3, &[1, 10], 1.0), "row = 10"),
        (rows(4, &[1], 1.0), "table = 4"),
        (rows(3, &[1], f32::NAN), "NaN or infinity"),
        (message(|w| w.part(3, 1, 7, 2, [1.0f32; 2].as_bytes())), "start + count = 9"),
        (message(|w| w.cells(3, &[1], &[2], &[1, 8], &[1.0f32; 2])), "column = 8"),
        (message(|w| w.cells(3, &[1], &[1], &[1, 2], &[1.0f32; 2])), "total = 2"),
    ];
    for (message, expected) in cases {
        let error = read(&message).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not say {expected}");
    }
}

#[test]
fn a_value_that_is_no_number_is_found_in_its_row() {
    let bad = |fill: &dyn Fn(&mut BatchWriter<'_>)| match read(&message(|writer| fill(writer))).unwrap_err() {
        Fault::Table { table: 3, fault } => *fault,
        other => panic!("{other}"),
    };
    let mut values = [1.0f32; 24];
    values[16] = f32::INFINITY;
    let rows = bad(&|writer| writer.rows(3, &[9, 1, 2], 32).copy_from_slice(values.as_bytes()));
    assert_eq!(rows, Fault::NotFinite { row: 2 });
    for (at, row) in [(0, 5), (1, 6), (2, 6)] {
        let mut values = [1.0f32; 3];
        values[at] = f32::NAN;
        let cells = bad(&|writer| writer.cells(3, &[5, 4, 6], &[1, 0, 2], &[7, 0, 3], &values));
        assert_eq!(cells, Fault::NotFinite { row });
    }
    let part = bad(&|writer| writer.part(3, 4, 6, 2, [8.0f32, f32::NAN].as_bytes()));
    assert_eq!(part, Fault::NotFinite { row: 4 });
}

#[test]
fn a_section_that_ends_before_it_begins_is_refused() {
    // Its values would be those of the headers, and what follows would be the section itself, again and again.
    let mut message = rows(3, &[1], 1.0);
    let values_at = HEADERS + std::mem::offset_of!(SectionHeader, values_at);
    message[values_at..values_at + 8].copy_from_slice(&8u64.to_le_bytes());
    message[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = read(&message).unwrap_err().to_string();
    assert!(error.contains("values_at = 8"), "{error}");
}

#[test]
fn a_message_that_is_cut_or_goes_on_is_refused() {
    let whole = rows(3, &[1, 2], 1.0);
    for length in 0..whole.len() {
        assert!(read(&whole[..length]).is_err(), "{length}");
    }
    let longer = [whole, vec![0; 8]].concat();
    assert_eq!(read(&longer).unwrap_err(), Fault::Trailing { bytes: 8 });
}

#[test]
fn a_reference_is_checked_against_the_memory_that_was_named() {
    let mut slabs = vec![0u8; 256];
    slabs[64..72].copy_from_slice([3u32, 9].as_bytes());
    let good = SectionHeader { table: 3, kind: ROWS, count: 2, total: 0, rows_at: 64, values_at: 128 };
    let refer = |section: SectionHeader| {
        let mut buffer = vec![0; 256];
        let mut writer = BatchWriter::new(&mut buffer);
        assert!(writer.has_room_to_refer());
        writer.refer(section);
        let length = writer.finish(Kind::Reference, 1, 0, 1, None);
        buffer.truncate(length);
        buffer
    };
    let read = |section, slabs: Option<&[u8]>| {
        let message = refer(section);
        let mut batch = Batch::default();
        let header = MessageHeader::parse(&message).unwrap();
        batch.read(&header, &message, slabs, shape).map(|()| batch)
    };
    let batch = read(good, Some(&slabs)).unwrap();
    let section = batch.sections().next().unwrap();
    assert_eq!((section.target, section.values_at), (Target::Rows(&[3, 9]), 128));
    assert!(read(good, None).unwrap_err().to_string().contains("named no memory"));
    let bad = [
        SectionHeader { values_at: 200, ..good },
        SectionHeader { values_at: u64::MAX - 7, ..good },
        SectionHeader { rows_at: 252, ..good },
        SectionHeader { rows_at: 68, ..good },
        SectionHeader { count: u32::MAX, ..good },
    ];
    for section in bad {
        assert!(read(section, Some(&slabs)).is_err(), "{section:?}");
    }
}

#[test]
fn what_a_writer_says_it_has_room_for_fits() {
    for bytes in (96..400).step_by(8) {
        let mut buffer = vec![0; bytes];
        let mut writer = BatchWriter::new(&mut buffer);
        let most = writer.room_for_rows(12);
        let all: Vec<u32> = (0..most as u32).collect();
        if most > 0 {
            writer.rows(0, &all, 12);
        }
        let part = writer.room_for_part(4);
        if part > 0 {
            writer.part(0, 0, 0, part, &vec![0; part * 4]);
        }
        assert!(writer.finish(Kind::Batch, 1, 0, 1, None) <= bytes);
        let mut buffer = vec![0; bytes];
        let mut writer = BatchWriter::new(&mut buffer);
        let cells = (1..).take_while(|cells| writer.has_room_for_cells(1, *cells, 4)).last().unwrap_or(0);
        writer.cells(0, &[0], &[cells as u32], &vec![0; cells], &vec![0.0f32; cells]);
        assert!(writer.finish(Kind::Batch, 1, 0, 1, None) <= bytes);
    }
}

proptest! {
    #[test]
    fn whatever_comes_is_refused_or_in_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..120, with: u8) {
        let _ = read(&bytes);
        let mut near = message(|writer| {
            writer.rows(3, &[1, 2], 32);
            writer.cells(3, &[5], &[1], &[7], &[1.0f32]);
        });
        let place = at % near.len();
        near[place] = with;
        if let Ok(batch) = read(&near) {
            for section in batch.sections() {
                let rows = match section.target {
                    Target::Rows(rows) | Target::Cells { rows, .. } => rows.to_vec(),
                    Target::Part { row, .. } => vec![row],
                };
                prop_assert!(rows.iter().all(|row| u64::from(*row) < SHAPE.images));
                prop_assert!(section.values_at as usize <= near.len());
            }
        }
    }
}
