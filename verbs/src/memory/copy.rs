//! A copy that the compiler neither sees through, nor splits, nor assumes anything of: for memory that
//! others may write meanwhile.
//!
//! On x86-64 it is SSE2 in inline assembly (every x86-64 has it): to the compiler the block may read and
//! write any memory, so it makes no assumption about the bytes; to the machine each 16-byte move touches
//! each aligned 8-byte word once, so words are read and written whole. Elsewhere, and under Miri, it is a
//! loop of volatile words and bytes.

/// Copies `len` bytes from `from` to `to`.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, and the two do not overlap. Either may be written
/// by somebody outside this program meanwhile: then the copy may be torn.
#[inline]
pub unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let blocks = len / 64;
        let halves = (len % 64) / 16;
        let done = blocks * 64 + halves * 16;
        // SAFETY: the block moves `blocks` times 64 and `halves` times 16 bytes, `done <= len` in all, from
        // and to what the caller vouches for. It uses only the registers named, and no stack.
        unsafe {
            std::arch::asm!(
                "test {blocks}, {blocks}",
                "jz 3f",
                "2:",
                "movdqu {a}, [{from}]",
                "movdqu {b}, [{from} + 16]",
                "movdqu {c}, [{from} + 32]",
                "movdqu {d}, [{from} + 48]",
                "movdqu [{to}], {a}",
                "movdqu [{to} + 16], {b}",
                "movdqu [{to} + 32], {c}",
                "movdqu [{to} + 48], {d}",
                "add {from}, 64",
                "add {to}, 64",
                "dec {blocks}",
                "jnz 2b",
                "3:",
                "test {halves}, {halves}",
                "jz 5f",
                "4:",
                "movdqu {a}, [{from}]",
                "movdqu [{to}], {a}",
                "add {from}, 16",
                "add {to}, 16",
                "dec {halves}",
                "jnz 4b",
                "5:",
                from = inout(reg) from => _,
                to = inout(reg) to => _,
                blocks = inout(reg) blocks => _,
                halves = inout(reg) halves => _,
                a = out(xmm_reg) _,
                b = out(xmm_reg) _,
                c = out(xmm_reg) _,
                d = out(xmm_reg) _,
                options(nostack),
            );
        }
        // SAFETY: `done <= len`: the rest of the same two ranges.
        unsafe { volatile(from.add(done), to.add(done), len - done) }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    // SAFETY: the caller's promise, handed on.
    unsafe {
        volatile(from, to, len)
    }
}

/// As [`copy`]: aligned words where both sides are aligned alike, bytes elsewhere.
///
/// # Safety
/// As [`copy`].
#[inline]
unsafe fn volatile(mut from: *const u8, mut to: *mut u8, mut len: usize) {
    if from.addr().is_multiple_of(8) && to.addr().is_multiple_of(8) {
        while len >= 8 {
            // SAFETY: at least 8 bytes are left on both sides, and both pointers are aligned: they were,
            // and advance by 8.
            unsafe {
                to.cast::<u64>().write_volatile(from.cast::<u64>().read_volatile());
                from = from.add(8);
                to = to.add(8);
            }
            len -= 8;
        }
    }
    for i in 0..len {
        // SAFETY: `i < len` bytes are left on both sides.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) }
    }
}
