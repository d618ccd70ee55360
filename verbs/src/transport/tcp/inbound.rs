//! What comes in on one connection, frame by frame: requests are executed, answers complete what was posted here.
//!
//! **Whole words.** The kernel delivers bytes cut anywhere. They are read into private memory, and written to a region by
//! [`Memory::write`](crate::Memory::write), up to the end of a word of the region; the few bytes behind it wait for the rest of their word.
//!
//! **Without a receive buffer** a SEND waits, and all requests behind it, as they would on a queue pair. The answers between them do
//! not: the peer may be waiting, too, and this side's requests would never complete. So requests that have to wait are *parked*, byte
//! for byte, up to [`MAX_PARKED`]; then the socket is not read until there is a buffer.

use std::sync::Arc;

use super::{
    link::{Corrupt, Event, Link},
    shared::Shared,
    wire::{FRAME, Frame, Kind, decode_refusal},
};
use crate::transport::WorkError;

/// Bytes of requests that are kept while they wait for a receive buffer.
pub(super) const MAX_PARKED: usize = 16 << 20;

/// Why nothing more is taken from a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// A request of the peer cannot be executed.
    Refuse(WorkError),
    /// The peer cannot execute a request of this side.
    Refused(WorkError),
    /// What it says makes no sense.
    Corrupt,
}

impl From<Corrupt> for Stop {
    fn from(Corrupt: Corrupt) -> Self {
        Stop::Corrupt
    }
}

/// Where the next byte belongs.
#[derive(Debug)]
enum State {
    Head,
    Write {
        key: u32,
        address: u64,
        left: usize,
        then: Option<(u32, Vec<u8>)>,
    },
    Message {
        buffer: Vec<u8>,
        filled: usize,
        length: usize,
        immediate: Option<u32>,
    },
    Reply {
        filled: usize,
        length: usize,
    },
    /// Of a request that waits.
    Park {
        left: u64,
    },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Inbound {
    state: State,
    /// Whole requests but for the last one, which may be in the middle of its payload; those before `resumed` have been executed.
    parked: Vec<u8>,
    resumed: usize,
    /// Requests wait for a receive buffer.
    waiting: bool,
    /// Something was put that the peer READs.
    pub(super) replied: bool,
}

impl Inbound {
    pub(super) fn new() -> Self {
        Self { state: State::Head, parked: Vec::new(), resumed: 0, waiting: false, replied: false }
    }

    /// Whether requests wait for a receive buffer.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Whether so much waits that the socket had better not be read.
    pub(super) fn is_full(&self) -> bool {
        self.waiting && self.parked.len() - self.resumed >= MAX_PARKED
    }

    /// Takes bytes in; how many. Those that it leaves are fewer than a head has: more must follow them.
    pub(super) fn take(
        &mut self,
        shared: &Shared,
        link: &Arc<Link>,
        bytes: &[u8],
        events: &mut Vec<Event>,
    ) -> Result<usize, Stop> {
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            let taken = match &self.state {
                State::Head => self.head(shared, link, rest, events)?,
                State::Write { .. } => self.write(shared, link, rest, events)?,
                State::Message { .. } => self.message(link, rest, events),
                State::Reply { .. } => self.reply(link, rest, events),
                State::Park { .. } => self.park(rest),
            };
            match taken {
                Some(count) => at += count,
                None => return Ok(at),
            }
        }
    }

    /// There may be a receive buffer: executes what was parked, as far as there are. Bytes that it leaves are the beginning of a word:
    /// they come before what the socket brings next.
    pub(super) fn resume(
        &mut self,
        shared: &Shared,
        link: &Arc<Link>,
        events: &mut Vec<Event>,
    ) -> Result<Vec<u8>, Stop> {
        let live = std::mem::replace(&mut self.state, State::Head);
        let parked = std::mem::take(&mut self.parked);
        let mut at = self.resumed;
        loop {
            let rest = &parked[at..];
            let taken = match &self.state {
                State::Head => {
                    let Some(head) = rest.first_chunk::<FRAME>() else { break };
                    let frame = Frame::decode(head).ok_or(Stop::Corrupt)?;
                    if !self.request(shared, link, &frame, events)? {
                        self.wait_again(live, parked, at);
                        return Ok(Vec::new());
                    }
                    Some(FRAME)
                }
                State::Write { .. } => self.write(shared, link, rest, events)?,
                _ => self.message(link, rest, events),
            };
            match taken {
                Some(count) => at += count,
                None => break,
            }
        }
        (self.resumed, self.waiting) = (0, false);
        // A request of which a part was parked is now as far as that part goes. An answer is not parked: if one is in the middle of its
        // payload, no request is.
        if let State::Reply { .. } = live {
            self.state = live;
        }
        Ok(parked[at..].to_vec())
    }

    /// The request at `at` finds no buffer: nothing else changes.
    fn wait_again(&mut self, live: State, mut parked: Vec<u8>, at: usize) {
        (self.state, self.resumed) = (live, at);
        if at > parked.len() / 2 {
            parked.drain(..at);
            self.resumed = 0;
        }
        self.parked = parked;
    }

    /// Nothing more is taken in. A receive buffer that is not full yet.
    pub(super) fn abandon(&mut self) -> Option<Vec<u8>> {
        match std::mem::replace(self, Self::new()).state {
            State::Message { buffer, .. } | State::Write { then: Some((_, buffer)), .. } => Some(buffer),
            _ => None,
        }
    }

    /// The next frame. `None`: its head is not all there.
    fn head(
        &mut self,
        shared: &Shared,
        link: &Arc<Link>,
        bytes: &[u8],
        events: &mut Vec<Event>,
    ) -> Result<Option<usize>, Stop> {
        let Some(head) = bytes.first_chunk::<FRAME>() else { return Ok(None) };
        let frame = Frame::decode(head).ok_or(Stop::Corrupt)?;
        if !frame.kind.is_request() {
            self.answer(link, &frame, events)?;
        } else if self.waiting || !self.request(shared, link, &frame, events)? {
            self.waiting = true;
            self.parked.extend_from_slice(head);
            self.state = State::Park { left: frame.payload() };
        }
        Ok(Some(FRAME))
    }

    fn answer(&mut self, link: &Arc<Link>, frame: &Frame, events: &mut Vec<Event>) -> Result<(), Stop> {
        link.acknowledged(frame.address, events)?;
        match frame.kind {
            Kind::Refused => return Err(Stop::Refused(decode_refusal(frame.key))),
            Kind::Reply if link.expects_reply(frame.length) => {
                self.state = State::Reply { filled: 0, length: frame.length as usize };
            }
            Kind::Reply => return Err(Stop::Corrupt),
            _ => {}
        }
        Ok(())
    }

    /// Begins to execute a request. `false`: it needs a receive buffer, and there is none.
    fn request(
        &mut self,
        shared: &Shared,
        link: &Arc<Link>,
        frame: &Frame,
        events: &mut Vec<Event>,
    ) -> Result<bool, Stop> {
        let find = |write: bool| {
            let Frame { key, address, length, .. } = *frame;
            if link.reach.as_ref().is_some_and(|reach| write || !reach.covers(key, address, length)) {
                return Err(Stop::Refuse(WorkError::RemoteAccess));
            }
            shared.registry.find(key, address, length, write).map_err(Stop::Refuse)
        };
        match frame.kind {
            Kind::Read => {
                let (memory, offset) = find(false)?;
                link.reply(&memory, offset, frame.length as usize)?;
                self.replied = true;
            }
            Kind::Write => {
                find(true)?;
                let then = match frame.immediate {
                    None => None,
                    Some(immediate) => match shared.take_buffer() {
                        None => return Ok(false),
                        Some(buffer) => Some((immediate, buffer)),
                    },
                };
                let (key, address, left) = (frame.key, frame.address, frame.length as usize);
                self.state = State::Write { key, address, left, then };
                self.write(shared, link, &[], events)?;
            }
            _ => {
                if frame.length > shared.config.receive_size as u64 {
                    return Err(Stop::Refuse(WorkError::RemoteInvalid));
                }
                let Some(buffer) = shared.take_buffer() else { return Ok(false) };
                let (length, immediate) = (frame.length as usize, frame.immediate);
                self.state = State::Message { buffer, filled: 0, length, immediate };
                self.message(link, &[], events);
            }
        }
        Ok(true)
    }

    /// Bytes of a WRITE. `None`: more are needed. The region is looked up for each piece: who drops it need not fear what is late.
    fn write(
        &mut self,
        shared: &Shared,
        link: &Arc<Link>,
        bytes: &[u8],
        events: &mut Vec<Event>,
    ) -> Result<Option<usize>, Stop> {
        let State::Write { key, address, left, .. } = &mut self.state else { unreachable!("seen before") };
        let (memory, offset) =
            shared.registry.find(*key, *address, *left as u64, true).map_err(Stop::Refuse)?;
        let count = if bytes.len() >= *left {
            *left
        } else {
            // Up to the end of a word.
            ((offset + bytes.len()) / 8 * 8).saturating_sub(offset)
        };
        memory.write(offset, &bytes[..count]);
        *address += count as u64;
        *left -= count;
        if *left > 0 {
            return Ok((count > 0).then_some(count));
        }
        let State::Write { then, .. } = std::mem::replace(&mut self.state, State::Head) else {
            unreachable!()
        };
        link.executed();
        if let Some((immediate, buffer)) = then {
            events.push(Event::WriteImmediate { connection: link.id, buffer, immediate });
        }
        Ok(Some(count))
    }

    fn message(&mut self, link: &Arc<Link>, bytes: &[u8], events: &mut Vec<Event>) -> Option<usize> {
        let State::Message { buffer, filled, length, immediate } = &mut self.state else {
            unreachable!("seen before")
        };
        let count = bytes.len().min(*length - *filled);
        buffer[*filled..][..count].copy_from_slice(&bytes[..count]);
        *filled += count;
        if filled < length {
            return (count > 0).then_some(count);
        }
        let (buffer, length, immediate) = (std::mem::take(buffer), *length, *immediate);
        events.push(Event::Received { connection: link.id, buffer, length, immediate });
        self.state = State::Head;
        link.executed();
        Some(count)
    }

    fn reply(&mut self, link: &Arc<Link>, bytes: &[u8], events: &mut Vec<Event>) -> Option<usize> {
        let State::Reply { filled, length } = &mut self.state else { unreachable!("seen before") };
        let count = bytes.len().min(*length - *filled);
        link.replied(*filled, &bytes[..count]);
        *filled += count;
        if filled < length {
            return (count > 0).then_some(count);
        }
        self.state = State::Head;
        link.reply_complete(events);
        Some(count)
    }

    fn park(&mut self, bytes: &[u8]) -> Option<usize> {
        let State::Park { left } = &mut self.state else { unreachable!("seen before") };
        let count = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
        self.parked.extend_from_slice(&bytes[..count]);
        *left -= count as u64;
        if *left > 0 {
            return (count > 0).then_some(count);
        }
        self.state = State::Head;
        Some(count)
    }
}
