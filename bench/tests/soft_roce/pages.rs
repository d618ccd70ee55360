//! Huge pages, where somebody may set some aside.

use std::{fs, num::NonZeroUsize};

use fervor_verbs::{
    Exclusive,
    memory::{HugePage, MemoryOptions, Pages, Touch},
};

const PAGE: HugePage = HugePage::Mib2;
const SETTING: &str = "/proc/sys/vm/nr_hugepages";

fn set(pages: usize) {
    fs::write(SETTING, pages.to_string()).unwrap_or_else(|error| panic!("{SETTING}: {error}"));
}

/// Pages that are set aside until this is dropped.
struct Aside {
    before: usize,
}

impl Aside {
    fn new(more: usize) -> Self {
        let pool = PAGE.pool().expect("this kernel has huge pages");
        let aside = Self { before: pool.total };
        set(pool.total + more);
        let free = PAGE.pool().expect("they are still there").free;
        assert!(free >= more, "{free} huge pages are free, and {more} are needed");
        aside
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        set(self.before);
    }
}

#[test]
fn huge_pages_that_are_set_aside_are_taken() {
    let _aside = Aside::new(4);
    let free = || PAGE.pool().expect("they are there").free;
    let threads = NonZeroUsize::new(2).expect("it is not 0");
    for touch in [None, Some(Touch { threads, cores: &[], progress: &|_| () })] {
        let before = free();
        let touched = touch.is_some();
        let options = MemoryOptions { pages: Pages::Huge(PAGE), touch };
        let mut memory = Exclusive::with("test", PAGE.bytes() + 1, &options).expect("two pages are free");
        assert_eq!((memory.huge_page(), memory.len()), (Some(PAGE), PAGE.bytes() + 1));
        if !touched {
            memory.bytes_mut().fill(3);
        }
        assert_eq!(before - free(), 2, "of {before} pages");
        drop(memory);
        assert_eq!(free(), before, "they are given back");
    }
}
