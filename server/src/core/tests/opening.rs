//! Opening, sealing and freeing tables; bounds of bookkeeping.

use super::*;

/// Number and offset of the table of the one answer that came.
fn opened(world: &mut World) -> TableReply {
    let answers = world.answers();
    assert!(answers.len() == 1 && answers[0].1 == Kind::Table as u8, "{answers:?}");
    TableReply::read_from_bytes(&answers[0].2).unwrap()
}

#[test]
fn a_table_joins_or_says_why_not() {
    let mut world = World::new(8192);
    world.join(1);
    world.open(0, &essp("a", 10), Hold::Slots).unwrap();
    let first = opened(&mut world);
    assert_eq!((first.table, first.offset as usize), (0, region_header(4)));
    world.open(0, &essp("a", 10), Hold::Slots).unwrap();
    assert_eq!(opened(&mut world), first);
    world.open(0, &essp("a", 11), Hold::Slots).unwrap();
    let text = world.refusal();
    assert!(text.contains("10 rows") && text.contains("11 rows"), "{text}");
    let open = OpenTable { schema: essp("a", 10), shard: 0, shards: 2, hold: Hold::Slots };
    world.say(0, Kind::CreateTable, 0, &open.encode()).unwrap();
    assert!(world.refusal().contains("same servers"));
    world.open(0, &essp("b", 1 << 20), Hold::Slots).unwrap();
    let text = world.refusal();
    assert!(text.contains("83886080 bytes") && text.contains("--memory"), "{text}");
    world.open(0, &schema("w", ElementType::I32, 1, 600, Model::Bsp), Hold::Slots).unwrap();
    assert!(world.refusal().contains("--staging"));
    world.open(0, &essp("a", 10), Hold::InPlace).unwrap();
    assert!(world.refusal().contains("another way"));
    world.open(0, &schema("s", ElementType::I32, 1, 6, Model::Bsp), Hold::Mirror(0)).unwrap();
    assert!(world.refusal().contains("not pushed"));
    for base in [8, 4096 - 80 * 10 + 16, u64::MAX - 15] {
        let fault = world.open(0, &essp("a", 10), Hold::Mirror(base)).unwrap_err().to_string();
        assert!(fault.contains("outside the client's region"), "{fault}");
    }
}

#[test]
fn a_refused_table_leaves_nothing_and_an_open_taken_back_frees_its_memory() {
    let mut world = World::new(8192);
    world.join(2);
    let (free, used) = (world.core.region.free(), world.core.ledger.used());
    world.open(0, &essp("a", 10), Hold::Mirror(0)).unwrap();
    let table = opened(&mut world).table;
    world.open(1, &essp("a", 10), Hold::Slots).unwrap();
    opened(&mut world);
    assert!(world.core.region.free() < free && world.core.ledger.used() > used);
    let release = ReleaseHeader { table, reserved: 0 };
    let effects = world.say(0, Kind::Release, 0, release.as_bytes()).unwrap();
    assert_eq!((effects.slots, effects.closed), (vec![SlotEffect::StopTable(0)], true));
    let fault = world.say(0, Kind::Release, 0, release.as_bytes()).unwrap_err().to_string();
    assert!(fault.contains("has not open"), "{fault}");
    world.say(1, Kind::Release, 0, release.as_bytes()).unwrap();
    assert_eq!((world.core.region.free(), world.core.ledger.used()), (free, used));
    // The name is free for another schema. A table that was changed stays.
    world.open(0, &essp("a", 11), Hold::Slots).unwrap();
    assert_eq!(opened(&mut world).table, 0);
    world.add(0, None, &[10], 1).unwrap();
    world.say(0, Kind::Leave, 0, &[]).unwrap();
    world.open(1, &essp("a", 10), Hold::Slots).unwrap();
    assert!(world.refusal().contains("11 rows"));
    world.open(1, &essp("a", 11), Hold::Slots).unwrap();
    opened(&mut world);
    assert_eq!(world.value(10), 1);
}

#[test]
fn a_table_is_sealed_a_piece_at_a_time_and_then_answered() {
    let mut world = World::new(1 << 16);
    world.join(2);
    let table = essp("t", 400);
    world.open(0, &table, Hold::InPlace).unwrap();
    opened(&mut world);
    for row in (0..400).step_by(2) {
        world.add(0, None, &[row], 7).unwrap();
    }
    let seal = Seal::new(64);
    let whole = |world: &World, row| {
        let (header, data) = world.image(0, row);
        seal.verify(&header, &data)
    };
    assert!(!whole(&world, 2) && whole(&world, 3), "nobody needs checks but of what is zero");
    world.open(1, &table, Hold::Slots).unwrap();
    let mut turns = 0;
    while world.core.seal_some(800) {
        turns += 1;
        world.add(0, None, &[398], 1).unwrap();
        assert!(whole(&world, 398), "what changes meanwhile keeps its check");
        assert!(turns >= 20 || world.answers().is_empty());
    }
    assert!((20..24).contains(&turns), "{turns}");
    opened(&mut world);
    assert!((0..400).all(|row| whole(&world, row)));
    world.open(1, &table, Hold::Slots).unwrap();
    opened(&mut world);
}

#[test]
fn bookkeeping_is_bounded_and_comes_back() {
    let mut world = World::with(1 << 16, Origin::default(), 2000);
    world.join(2);
    world.open(0, &essp("t", 400), Hold::Slots).unwrap();
    opened(&mut world);
    world.open(1, &essp("t", 400), Hold::Slots).unwrap();
    opened(&mut world);
    let used = world.core.ledger.used();
    for round in 0..2 {
        let mut most = 0;
        let fault = loop {
            match world.slot(0, most, 0, SUBSCRIBE) {
                Ok(_) => most += 1,
                Err(fault) => break fault.to_string(),
            }
        };
        assert!((15..21).contains(&most), "{most}");
        assert!(fault.contains("which has 2000 bytes") && fault.contains("--bookkeeping"), "{fault}");
        assert_eq!(world.core.subscriptions(ClientId(0)), most as usize);
        if round == 0 {
            for image in 0..most {
                world.slot(0, image, 0, UNSUBSCRIBE).unwrap();
            }
        } else {
            world.core.leave(ClientId(0), Departure::Died);
            assert_eq!(world.core.ledger.used(), used);
        }
    }
    // A table whose set of images is too large.
    let mut world = World::with(1 << 16, Origin::default(), 60);
    world.join(1);
    world.open(0, &essp("t", 600), Hold::Slots).unwrap();
    let text = world.refusal();
    assert!(text.contains("`t`") && text.contains("--bookkeeping"), "{text}");
    assert_eq!((world.core.ledger.used(), world.core.region.free()), (0, 1 << 16));
}

#[test]
fn slots_are_checked() {
    let mut world = World::new(8192);
    world.join(2);
    world.open(0, &essp("t", 10), Hold::Slots).unwrap();
    world.open(1, &essp("t", 10), Hold::InPlace).unwrap();
    let bad = [
        (0, 10, 0, PUSH_ONCE, "image = 10, but table `t` has 10 images"),
        (0, 0, 8, PUSH_ONCE, "slot = 8 is outside"),
        (0, 0, 4096 - 64, PUSH_ONCE, "slot = 4032 is outside"),
        (0, 0, u64::MAX - 15, PUSH_ONCE, "is outside"),
        (0, 0, 0, 9, "wish = 9"),
        (1, 0, 0, PUSH_ONCE, "has not opened table 0"),
    ];
    for (client, image, at, wish, text) in bad {
        let fault = world.slot(client, image, at, wish).unwrap_err().to_string();
        assert!(fault.contains(text), "{fault}: no {text}");
    }
    let slot = Slot { table: 0, image: 3, at: 160 };
    assert_eq!(world.slot(0, 3, 160, SUBSCRIBE).unwrap().slots, [SlotEffect::Push(slot)]);
    let fault = world.slot(0, 3, 320, SUBSCRIBE).unwrap_err().to_string();
    assert!(fault.contains("image = 3 of table `t` is subscribed already"), "{fault}");
    let effects = world.slot(0, 3, 160, UNSUBSCRIBE).unwrap();
    assert_eq!((effects.slots, effects.closed), (vec![SlotEffect::Stop(slot)], true));
    let bsp = schema("b", ElementType::I32, 10, 16, Model::Bsp);
    world.open(0, &bsp, Hold::Slots).unwrap();
    let record = SlotRecord { image: 0, slot: 0, table: 1, wish: SUBSCRIBE };
    let fault = world.say(0, Kind::Slots, 1, record.as_bytes()).unwrap_err().to_string();
    assert!(fault.contains("wish = 0 of table `b`, which is not pushed"), "{fault}");
}

#[test]
fn a_client_that_comes_back_is_owed_all_that_it_holds() {
    let mut world = World::new(1 << 16);
    world.join(3);
    let schema = essp("t", 40);
    world.open(0, &schema, Hold::InPlace).unwrap();
    world.open(1, &schema, Hold::Mirror(0)).unwrap();
    world.open(2, &schema, Hold::Slots).unwrap();
    world.slot(2, 3, 160, SUBSCRIBE).unwrap();
    world.slot(2, 30, 240, SUBSCRIBE).unwrap();
    world.add(0, None, &[3, 4, 20], 1).unwrap();
    let mut table = 0;
    while world.core.take_run(Due::Round, &mut table, 1 << 16).is_some() {}
    let mirrored = ClientId(1);
    assert!(!world.core.owes(mirrored), "all was pushed");
    assert_eq!(world.core.resume(mirrored), []);
    let mut owed = Vec::new();
    while let Some((run, at)) = world.core.next_owed(mirrored, 1 << 16) {
        world.core.paid(mirrored, &run);
        owed.push((run.images, at));
    }
    assert_eq!(owed, [(3..5, 3 * 80), (20..21, 20 * 80)], "what was ever written, and no more");
    let slots = [(3, 160), (30, 240)].map(|(image, at)| Slot { table: 0, image, at });
    assert_eq!(world.core.resume(ClientId(2)), slots);
    assert_eq!((world.core.processed(ClientId(2)), world.core.processed(mirrored)), (3, 1));
    // A table that is being opened is answered when the mirror is filled again.
    while world.core.take_answer().is_some() {}
    world.core.resume(mirrored);
    world.open(1, &schema, Hold::Mirror(0)).unwrap();
    assert!(world.core.take_answer().is_none());
    while let Some((run, _)) = world.core.next_owed(mirrored, 1 << 16) {
        world.core.paid(mirrored, &run);
    }
    assert_eq!(world.core.take_answer().map(|(id, _)| id), Some(mirrored));
}
