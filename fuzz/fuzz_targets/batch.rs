//! A batch of any bytes is refused as a whole or can be applied: no panic, nothing outside a row.
//!
//! The tables are one of each element type, with `non_finite` on and off; a record names one by its number. What the
//! checks accept is applied to rows of exactly the shape that was checked, and then has to come out the same when
//! it is written again.

#![no_main]

use fervor_protocol::{
    Element, ElementType,
    batch::{Batch, BatchWriter, Shape, Update},
    pending::Delta,
    wire::MessageHeader,
};
use libfuzzer_sys::fuzz_target;

const ROWS: u64 = 4;
const WIDTH: u32 = 9;
const TYPES: [ElementType; 4] = [ElementType::F32, ElementType::F64, ElementType::I32, ElementType::I64];

fn shape(table: u32) -> Option<Shape> {
    let element = *TYPES.get(table as usize / 2)?;
    Some(Shape { element, rows: ROWS, width: WIDTH, non_finite: table % 2 == 1 })
}

/// Applies the update to a row, and again after it went through the writer: both come to the same.
fn apply<E: Element>(table: u32, row: u64, update: &Update<'_>, non_finite: bool) {
    let mut once = [E::default(); WIDTH as usize];
    update.apply(&mut once);
    let values = |bytes: &[u8]| -> Vec<E> {
        bytes.chunks_exact(size_of::<E>()).map(|chunk| E::read_from_bytes(chunk).unwrap()).collect()
    };
    let delta = match update {
        Update::Dense { start, values: bytes } => Delta::Dense { start: *start, values: values(bytes) },
        Update::Sparse { columns, values: bytes } => {
            let columns = columns.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().unwrap()));
            Delta::Sparse(columns.zip(values(bytes)).collect())
        }
    };
    let elements = match &delta {
        Delta::Dense { values, .. } => values.len(),
        Delta::Sparse(pairs) => pairs.len(),
    };
    let mut buffer = vec![0; 64 << 10];
    let mut writer = BatchWriter::new(&mut buffer);
    assert_eq!(writer.push(table, row, &delta), elements);
    let length = writer.finish(1, 0, 1, None);
    let header = MessageHeader::parse(&buffer[..length]).unwrap();
    let batch = Batch::parse(&header, &buffer[..length]).unwrap();
    batch.check(shape).expect("what was accepted once is accepted again");
    let mut twice = [E::default(); WIDTH as usize];
    for record in batch.records(|table| shape(table).unwrap().element.size()) {
        assert_eq!((record.table, record.row), (table, row));
        record.update.apply(&mut twice);
    }
    // NaN is not equal to itself: its bytes are.
    let bytes = |row: &[E]| row.iter().flat_map(|e| e.as_bytes().to_vec()).collect::<Vec<u8>>();
    assert!(bytes(&once) == bytes(&twice) || non_finite);
}

fuzz_target!(|message: &[u8]| {
    let Ok(header) = MessageHeader::parse(message) else { return };
    let Ok(batch) = Batch::parse(&header, message) else { return };
    if batch.check(shape).is_err() {
        return;
    }
    for record in batch.records(|table| shape(table).unwrap().element.size()) {
        let Shape { element, non_finite, .. } = shape(record.table).unwrap();
        assert!(record.row < ROWS);
        match element {
            ElementType::F32 => apply::<f32>(record.table, record.row, &record.update, non_finite),
            ElementType::F64 => apply::<f64>(record.table, record.row, &record.update, non_finite),
            ElementType::I32 => apply::<i32>(record.table, record.row, &record.update, non_finite),
            ElementType::I64 => apply::<i64>(record.table, record.row, &record.update, non_finite),
        }
    }
});
