//! A batch of any bytes is refused as a whole or can be applied: no panic, nothing outside a row.
//!
//! The tables are one of each element type, with `non_finite` on and off; a section names one by its number. The input is a message,
//! or (by reference) a message of so many bytes and then the memory that it names. What the checks accept is looked at element by
//! element, at exactly the places that were checked.

#![no_main]

use fervor_protocol::{
    ElementType,
    batch::{Batch, Shape, Target, finite},
    wire::{Kind, MessageHeader},
};
use libfuzzer_sys::fuzz_target;

const ROWS: u64 = 4;
const WIDTH: u32 = 9;
const TYPES: [ElementType; 4] = [ElementType::F32, ElementType::F64, ElementType::I32, ElementType::I64];

fn shape(table: u32) -> Option<Shape> {
    let element = *TYPES.get(table as usize / 2)?;
    Some(Shape { element, rows: ROWS, width: WIDTH, non_finite: table % 2 == 1 })
}

fuzz_target!(|data: &[u8]| {
    let Some((&length, data)) = data.split_first() else { return };
    let Ok(header) = MessageHeader::parse(data) else { return };
    let by_reference = header.kind == Kind::Reference as u8;
    let (message, slabs) =
        if by_reference { data.split_at(usize::from(length).min(data.len())) } else { (data, &[][..]) };
    let Ok(header) = MessageHeader::parse(message) else { return };
    let mut batch = Batch::default();
    if batch.read(&header, message, Some(slabs), shape).is_err() {
        return;
    }
    let source = if by_reference { slabs } else { message };
    for section in batch.sections() {
        let Shape { element, non_finite, .. } = shape(section.table).expect("the table was looked up");
        let size = element.size();
        let elements = match section.target {
            Target::Rows(rows) => {
                assert!(rows.iter().all(|row| u64::from(*row) < ROWS));
                rows.len() * WIDTH as usize
            }
            Target::Cells { rows, counts, columns } => {
                assert!(rows.iter().all(|row| u64::from(*row) < ROWS));
                assert!(columns.iter().all(|column| *column < WIDTH));
                assert_eq!(counts.iter().map(|count| *count as usize).sum::<usize>(), columns.len());
                columns.len()
            }
            Target::Part { row, start, count } => {
                assert!(u64::from(row) < ROWS && start + count <= WIDTH);
                count as usize
            }
        };
        let at = section.values_at as usize;
        let values = &source[at..at + elements * size];
        assert!(at.is_multiple_of(8), "values are aligned in the message");
        assert!(by_reference || non_finite || finite(element, values));
    }
});
