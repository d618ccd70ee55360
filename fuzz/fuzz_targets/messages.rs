//! The other decoders take any bytes: handshakes, slot records, opened tables, refusals. No panic; and what is accepted is
//! what its encoder writes.

#![no_main]

use fervor_protocol::{
    ack::{Immediate, Told},
    wire::{self, Hello, Kind, MemoryHeader, MessageHeader, OpenTable, Refusal, ReleaseHeader, Welcome},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&which, data)) = data.split_first() else { return };
    match which % 5 {
        0 => {
            if let Err(refusal) = Hello::parse(data) {
                assert_eq!(Refusal::parse(&refusal.encode()), refusal);
                assert!(refusal.encode().len() <= 128, "it fits the private data of a refusal");
            }
        }
        1 => drop(Welcome::parse(data)),
        2 => drop(Refusal::parse(data)),
        3 => {
            let Ok(header) = MessageHeader::parse(data) else { return };
            if let Ok(records) = wire::slot_records(&header, data) {
                assert_eq!(records.len(), header.records as usize);
            }
            if let Ok(open) = OpenTable::decode(data) {
                open.schema.check().expect("a decoded schema is a possible one");
                assert!(open.shard < open.shards);
                let again = wire::reply(Kind::CreateTable, 1, &open.encode());
                assert_eq!(OpenTable::decode(&again), Ok(open));
            }
            let _ = wire::body::<MemoryHeader>(data, "memory");
            let _ = wire::body::<ReleaseHeader>(data, "release");
        }
        _ => {
            let Some((bits, rest)) = data.split_first_chunk::<4>() else { return };
            let Some((last, _)) = rest.split_first_chunk::<8>() else { return };
            let last = u64::from_le_bytes(*last) >> 8;
            let told = Told { round: last, closed: last, visible: last };
            if let Ok(Immediate::Round(n) | Immediate::Closed(n) | Immediate::Visible(n)) =
                Immediate::decode(u32::from_le_bytes(*bits), &told)
            {
                assert!(n >= last && n - last < 1 << 30);
            }
        }
    }
});
