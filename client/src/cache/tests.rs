//! Slots: who gets one, when it is free again, and what the shard is told.

use fervor_protocol::row::Version;

use super::*;
use crate::lock::lock;

struct Enough<'a>(&'a AtomicBool);

impl Drop for Enough<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn cache(slots: usize, images: u64) -> Cache {
    assert_eq!(Cache::fit(slots, images), slots);
    Cache::new(Memory::new("test", slots * 64).unwrap(), 0, 64, slots, images)
}

const STAMP: Stamp = Stamp { clock: 0, as_of: 0 };

#[test]
fn a_cache_uses_whole_sets_and_one_slot_for_each_image_if_there_are_enough() {
    assert_eq!([3, 8, 20, 100, 1000].map(|slots| Cache::fit(slots, 100)), [3, 8, 16, 100, 100]);
    let whole = cache(100, 100);
    for image in 0..100 {
        assert_eq!(whole.set(image), image as u32..image as u32 + 1);
    }
    let part = cache(24, 1 << 32);
    let mut sets = [0; 3];
    for image in 0..3000 {
        sets[part.set(image).start as usize / WAYS] += 1;
    }
    assert!(sets.iter().all(|count| *count > 800), "neighbours are spread: {sets:?}");
}

#[test]
fn a_subscribed_slot_is_not_free_before_it_is_closed() {
    let cache = cache(2, 10);
    let wishes = Mutex::new(Vec::new());
    let take = |image| {
        let tell = |slot, image, wish| lock(&wishes).push((slot, image, wish));
        let taken = cache.take(image, State::Subscribed, STAMP, tell);
        (taken, lock(&wishes).drain(..).collect::<Vec<_>>())
    };
    assert_eq!(take(1), (Taken::New(0), vec![(0, 1, SUBSCRIBE)]));
    assert_eq!(take(1), (Taken::Present(0), vec![]));
    assert_eq!(take(2), (Taken::New(1), vec![(1, 2, SUBSCRIBE)]));
    let (slot, word) = cache.find(1).unwrap();
    assert_eq!(take(3), (Taken::None, vec![(0, 1, UNSUBSCRIBE)]), "a slot to give up");
    assert!(!cache.unchanged(slot, word), "a reader of the slot notices");
    assert_eq!(cache.find(1), None);
    assert_eq!(take(3), (Taken::None, vec![]), "one that is on its way out is enough");
    assert_eq!(take(1), (Taken::None, vec![]), "its old image has no right to it");
    cache.closed(0);
    assert_eq!(take(3), (Taken::New(0), vec![(0, 3, SUBSCRIBE)]));
}

/// Workers that take slots from each other, and a shard that closes what they give up: its view of a slot, as the
/// wishes tell it one after the other, never contradicts itself.
#[test]
fn the_shard_is_told_in_the_order_of_what_happened() {
    const IMAGES: u64 = 12;
    let cache = cache(8, IMAGES);
    let wishes = Mutex::new(Vec::new());
    let enough = AtomicBool::new(false);
    let take = |worker: u64| {
        let mut random = worker;
        while !enough.load(Ordering::Relaxed) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let image = (random >> 33) % IMAGES;
            let tell = |slot, image, wish| lock(&wishes).push((slot, image, wish));
            if cache.take(image, State::Subscribed, STAMP, tell) == Taken::None {
                std::thread::yield_now();
            }
        }
    };
    let mut held: [Option<u64>; 8] = [None; 8];
    let mut taken = 0;
    std::thread::scope(|scope| {
        for worker in [1, 2, 3] {
            let take = &take;
            scope.spawn(move || take(worker));
        }
        // The others end with the test, however it ends.
        let _enough = Enough(&enough);
        while taken < 5000 {
            let told = std::mem::take(&mut *lock(&wishes));
            for (slot, image, wish) in told {
                let before = held[slot as usize];
                match wish {
                    SUBSCRIBE => {
                        assert_eq!(before, None, "slot {slot} is taken for image {image}");
                        assert!(!held.contains(&Some(image)), "image {image} is subscribed already");
                        held[slot as usize] = Some(image);
                        taken += 1;
                    }
                    _ => {
                        assert_eq!((wish, before), (UNSUBSCRIBE, Some(image)), "slot {slot} is given up");
                        held[slot as usize] = None;
                        cache.closed(slot);
                    }
                }
            }
        }
    });
}

#[test]
fn local_copies_are_replaced_at_once_the_unused_first() {
    let cache = cache(2, 10);
    let header = |lsn| Header { version: Version::new(lsn), check: 0 };
    for image in [1, 2] {
        cache.install(image, &header(image), &[image as u8; 32], Stamp { clock: image, as_of: 7 });
    }
    let (slot, word) = cache.find(1).unwrap();
    let mut data = [0; 32];
    assert_eq!((cache.copy(slot, &mut data).version.lsn(), data), (1, [1; 32]));
    assert_eq!(cache.stamp(slot), Stamp { clock: 1, as_of: 7 });
    assert!(cache.unchanged(slot, word), "this marks it as used");
    cache.install(3, &header(3), &[3; 32], STAMP);
    assert!(cache.find(1).is_some() && cache.find(2).is_none() && cache.find(3).is_some());
}

#[test]
fn a_slot_that_is_asked_for_is_not_readable_until_it_is_answered() {
    let cache = cache(4, 10);
    let mut told = Vec::new();
    let Taken::New(slot) =
        cache.take(5, State::Asked, STAMP, |slot, image, wish| told.push((slot, image, wish)))
    else {
        panic!("there are free slots")
    };
    assert_eq!(told, [(slot, 5, PUSH_ONCE)]);
    assert_eq!(cache.find(5), None);
    cache.answered(slot, 5);
    assert!(cache.find(5).is_some());
    assert!(cache.ask_again(slot, 5, STAMP) && !cache.ask_again(slot, 5, STAMP), "one asker at a time");
}
