//! `counts apply|sealed|push ROUNDS [CLIENTS]`: a hot path of the server, for `valgrind --tool=callgrind`. See `counts.rs`.

#![forbid(unsafe_code)]

use fervor_server::counts::{Copies, apply, push};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse().ok());
    let rounds = number(1).expect("how many rounds");
    match arguments[0].as_str() {
        "apply" => apply(Copies::None, rounds),
        "sealed" => apply(Copies::Sealed, rounds),
        "push" => push(number(2).unwrap_or(1) as u32, rounds).expect("it runs"),
        other => panic!("{other}: apply, sealed or push"),
    }
}
