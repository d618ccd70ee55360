//! A post that is refused has done nothing.

use super::*;

#[test]
fn a_post_that_comes_when_the_end_is_being_reported_does_nothing() {
    type Post = fn(&mut Side) -> Result<(), PostError>;
    let posts: [Post; 5] = [
        |s| s.connection.send(Payload::Inline(b"late"), None, Some(1)),
        |s| s.connection.send(Payload::Gather(&piece(&s.region, 0, 64)), Some(2), None),
        |s| s.connection.write(Payload::Inline(&[1; 8]), s.remote.at(0), None, Some(1)),
        |s| s.connection.write(Payload::Inline(&[1; 8]), s.remote.at(0), Some(3), Some(1)),
        |s| s.connection.read(&piece(&s.region, 0, 8), s.remote.at(8), Some(1)),
    ];
    for (number, post) in posts.into_iter().enumerate() {
        let (mut a, mut b) = pair(&EndpointConfig::default());
        b.region.memory().store(8, 8);
        a.region.memory().store(0, 7);
        // The posting thread has not seen why: the polling thread gets there first.
        assert!(a.connection.report_end());
        assert_eq!(post(&mut a), Err(PostError::Disconnected), "post {number}");
        assert_eq!(
            (a.region.memory().load(0), b.region.memory().load(0)),
            (7, 0),
            "post {number} did something"
        );
        a.connection.ring().unwrap();
        assert!(b.silent(), "post {number} was seen");
        a.connection.disconnect();
        assert_eq!(b.disconnected(), WorkError::Disconnected);
        assert!(b.silent() && b.region.memory().load(0) == 0);
    }
}

#[test]
fn a_ring_for_what_was_posted_before_the_end_says_that_the_connection_is_over() {
    let (mut a, _b) = pair(&EndpointConfig::default());
    a.connection.write(Payload::Inline(&[1; 8]), a.remote.at(0), None, Some(1)).unwrap();
    a.connection.disconnect();
    assert_eq!(a.work().0, 1);
    assert_eq!(a.disconnected(), WorkError::Disconnected);
    assert_eq!(a.connection.ring(), Err(PostError::Disconnected));
}

#[test]
fn a_region_of_a_refused_post_is_not_kept() {
    let (mut a, _b) = pair(&EndpointConfig { send_depth: 1, ..EndpointConfig::default() });
    a.connection.write(Payload::Inline(&[1; 8]), a.remote.at(0), None, None).unwrap();
    let offers = |a: &Side| a.transport.0.registry.offers().unwrap().len();
    let before = offers(&a);
    let other = a.transport.register(&Memory::new("other", 64).unwrap(), Access::RemoteWrite).unwrap();
    let payload = piece(&other, 0, 8);
    let remote = a.remote.at(0);
    assert_eq!(a.connection.write(Payload::Gather(&payload), remote, None, None), Err(PostError::Full));
    assert_eq!(a.connection.send(Payload::Gather(&payload), None, None), Err(PostError::Full));
    assert_eq!(a.connection.read(&payload, remote, None), Err(PostError::Full));
    drop(other);
    assert_eq!(offers(&a), before, "its registration has ended");
}

/// The posting thread counts what was taken, while another polls, and the peer leaves.
#[test]
fn what_was_refused_is_never_seen_while_the_peer_leaves() {
    for round in 0..200 {
        let (a, mut b) = pair(&EndpointConfig { send_depth: 4096, ..EndpointConfig::default() });
        let Side { endpoint: mut own, connection: mut to_b, remote, .. } = a;
        let poster = std::thread::spawn(move || {
            let (mut written, mut sent) = (0_u64, 0_u64);
            loop {
                match to_b.write(Payload::Inline(&(written + 1).to_ne_bytes()), remote.at(0), None, None) {
                    Ok(()) => written += 1,
                    Err(PostError::Full) => {}
                    Err(PostError::Disconnected) => break,
                }
                match to_b.send(Payload::Inline(&(sent + 1).to_ne_bytes()), None, None) {
                    Ok(()) => sent += 1,
                    Err(PostError::Full) => {}
                    Err(PostError::Disconnected) => break,
                }
                let _ = to_b.ring();
            }
            (written, sent)
        });
        let poller = std::thread::spawn(move || {
            let mut some = Vec::new();
            while !matches!(some.last(), Some(Completion::Disconnected { .. })) {
                own.poll(&mut some);
            }
        });
        for _ in 0..round {
            std::hint::spin_loop();
        }
        b.connection.disconnect();
        let mut last = 0;
        loop {
            match b.next() {
                Completion::Received { buffer, .. } => {
                    let bytes = b.endpoint.message(&buffer).try_into().unwrap();
                    let number = u64::from_ne_bytes(bytes);
                    assert_eq!(number, last + 1);
                    last = number;
                    b.endpoint.release(buffer);
                }
                Completion::Disconnected { .. } => break,
                other => panic!("{other:?}"),
            }
        }
        let at_the_end = b.region.memory().load(0);
        let (written, sent) = poster.join().unwrap();
        poller.join().unwrap();
        assert!(last <= sent, "message {last} was seen, and {sent} were taken");
        assert!(at_the_end <= written, "WRITE {at_the_end} was seen, and {written} were taken");
        assert_eq!(b.region.memory().load(0), at_the_end, "a WRITE after the end");
    }
}
