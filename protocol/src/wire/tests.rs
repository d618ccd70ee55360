//! Handshakes and messages: what is encoded is decoded, and what cannot be is refused.

use super::*;
use crate::limits::VERSION;

#[test]
fn a_handshake_of_another_version_is_refused_with_both() {
    let hello = Hello::main(3).with_version(77);
    let refusal = Hello::parse(hello.as_bytes()).unwrap_err();
    assert!(refusal.0.contains("77") && refusal.0.contains(&format!("server {VERSION}")), "{refusal:?}");
    assert_eq!(Refusal::parse(&refusal.encode()), refusal);
    assert!(Hello::parse(&[1; 48]).is_err() && Hello::parse(&[]).is_err());
    assert_eq!(Hello::parse(Hello::reader(3).as_bytes()).unwrap().1, Role::Reader);
    assert!(Welcome::parse(Welcome::new().as_bytes()).is_ok() && Welcome::parse(&[0; 56]).is_err());
    let (mut hello, mut welcome) = (Hello::main(0), Welcome::new());
    (hello.observes, welcome.observes) = (2, 2);
    assert!(Hello::parse(hello.as_bytes()).unwrap_err().0.contains("observes = 2"));
    assert!(Welcome::parse(welcome.as_bytes()).unwrap_err().contains("observes = 2"));
    for (credits, bytes, text) in [(0, 4096, "0 messages"), (33, 4096, "33 messages"), (8, 8, "8 bytes")] {
        let mut welcome = Welcome::new();
        (welcome.credits, welcome.message_bytes) = (credits, bytes);
        let error = Welcome::parse(welcome.as_bytes()).unwrap_err();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn schemas_round_trip_and_bad_ones_are_refused() {
    let mut schema = Schema {
        name: "L".into(),
        element: ElementType::I64,
        rows: 7,
        width: 5,
        model: Model::Essp { staleness: 3 },
        non_finite: true,
        continuous: 1 << 40,
    };
    let message = |schema: &Schema, shard, shards, hold| {
        let open = OpenTable { schema: schema.clone(), shard, shards, hold };
        (reply(Kind::CreateTable, 1, &open.encode()), open)
    };
    for hold in [Hold::Slots, Hold::Mirror(1 << 40), Hold::InPlace] {
        let (message, open) = message(&schema, 1, 2, hold);
        assert_eq!(OpenTable::decode(&message), Ok(open));
    }
    assert!(OpenTable::decode(&message(&schema, 2, 2, Hold::Slots).0).is_err());
    let good = message(&schema, 0, 1, Hold::Slots).0;
    assert!(OpenTable::decode(&good[..40]).is_err());
    let mut held = good.clone();
    held[size_of::<MessageHeader>() + std::mem::offset_of!(TableHeader, hold)] = 3;
    assert!(OpenTable::decode(&held).unwrap_err().to_string().contains("hold = 3"));
    schema.width = 0;
    let error = OpenTable::decode(&message(&schema, 0, 1, Hold::Slots).0).unwrap_err().to_string();
    assert!(error.contains("elements, not 0"), "{error}");
}
