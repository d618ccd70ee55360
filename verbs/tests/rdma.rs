//! smoke
use std::time::{Duration, Instant};

use fervor_verbs::{
    Memory,
    transport::{rdma::Rdma, *},
};

fn poll_until<E: Endpoint>(e: &mut E, what: &str, mut f: impl FnMut(&Completion) -> bool) -> Vec<Completion> {
    let start = Instant::now();
    let mut got = Vec::new();
    let mut all = Vec::new();
    loop {
        e.poll(&mut got);
        let done = got.iter().any(&mut f);
        all.append(&mut got);
        if done {
            return all;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{what}: {all:?}");
    }
}

#[test]
fn smoke() {
    let server = Rdma::on_device("rxe1").unwrap();
    let client = Rdma::on_device("rxe0").unwrap();
    let mut listener = server.listen(&"rdma://10.7.0.2:0".parse().unwrap()).unwrap();
    println!("{}", listener.address());
    let mut se = server.endpoint(&EndpointConfig::default()).unwrap();
    let mut ce = client.endpoint(&EndpointConfig::default()).unwrap();
    let sm = Memory::new("s", 1 << 20).unwrap();
    let cm = Memory::new("c", 1 << 20).unwrap();
    let sr = server.register(&sm, Access::RemoteWrite).unwrap();
    let cr = client.register(&cm, Access::Local).unwrap();
    let address = format!("{}?from=10.7.0.1", listener.address()).parse().unwrap();
    let attach = ce.attach();
    let c2 = client.clone();
    let t =
        std::thread::spawn(move || c2.connect(&attach, &address, b"hello", Duration::from_secs(5)).unwrap());
    let request = listener.accept(Duration::from_secs(5)).unwrap().unwrap();
    assert_eq!(request.private_data(), b"hello");
    let sc = request.accept(&se.attach(), b"welcome").unwrap();
    let (mut cc, reply) = t.join().unwrap();
    assert_eq!(reply, b"welcome");
    println!("{sc:?} {cc:?}");
    cc.send(Payload::Inline(b"abc"), Some(0x01020304), Some(7)).unwrap();
    cc.ring().unwrap();
    poll_until(&mut ce, "send", |c| matches!(c, Completion::Work { id: 7, result: Ok(()), .. }));
    let all = poll_until(&mut se, "recv", |c| matches!(c, Completion::Received { .. }));
    for c in all {
        if let Completion::Received { buffer, immediate, .. } = c {
            assert_eq!(se.message(&buffer), b"abc");
            assert_eq!(immediate, Some(0x01020304));
            se.release(buffer);
        }
    }
    cm.write(0, b"written");
    cc.write(
        Payload::Gather(&[Sge { region: &cr, offset: 0, length: 7 }]),
        sr.remote().at(100),
        Some(9),
        None,
    )
    .unwrap();
    cc.read(&[Sge { region: &cr, offset: 1000, length: 70000 }], sr.remote().at(100), Some(8)).unwrap();
    cc.ring().unwrap();
    poll_until(&mut ce, "read", |c| matches!(c, Completion::Work { id: 8, result: Ok(()), .. }));
    poll_until(&mut se, "imm", |c| matches!(c, Completion::WriteImmediate { immediate: 9, .. }));
    let mut b = [0; 7];
    cm.read(1000, &mut b);
    assert_eq!(&b, b"written");
    let mut times = Vec::new();
    for _ in 0..2000 {
        let t0 = Instant::now();
        cc.read(&[Sge { region: &cr, offset: 1000, length: 64 }], sr.remote().at(0), Some(8)).unwrap();
        cc.ring().unwrap();
        let mut v = Vec::new();
        while ce.poll(&mut v) == 0 {}
        times.push(t0.elapsed());
    }
    times.sort();
    println!("read 64: p50 {:?} p99 {:?}", times[1000], times[1980]);
    std::thread::sleep(Duration::from_millis(1500));
    // wait wakes on a message
    let t = std::thread::spawn(move || {
        let mut v = Vec::new();
        let t0 = Instant::now();
        loop {
            se.wait(Duration::from_secs(5));
            se.poll(&mut v);
            if v.iter().any(|c| matches!(c, Completion::Disconnected { .. })) {
                break;
            }
            assert!(t0.elapsed() < Duration::from_secs(8));
        }
        println!("server saw {v:?}");
    });
    std::thread::sleep(Duration::from_millis(300));
    cc.send(Payload::Inline(b"abc"), None, Some(7)).unwrap();
    cc.ring().unwrap();
    poll_until(&mut ce, "send", |c| matches!(c, Completion::Work { id: 7, result: Ok(()), .. }));
    // bad access
    cc.read(&[Sge { region: &cr, offset: 1000, length: 64 }], sr.remote().at(1 << 20), Some(11)).unwrap();
    cc.read(&[Sge { region: &cr, offset: 1000, length: 64 }], sr.remote().at(0), Some(12)).unwrap();
    cc.ring().unwrap();
    println!("{:?}", poll_until(&mut ce, "bad", |c| matches!(c, Completion::Disconnected { .. })));
    t.join().unwrap();
    drop(sc);
}
