//! Which pages a memory lies on, and how many huge ones the machine has.
//!
//! **Huge pages** come from a pool that somebody has set aside, usually root, for each size. Linux gives out pages of it, and never makes one
//! on demand. A [`Pool`] is what sysfs says of it. Other processes take from it too, so a number read now promises nothing: who maps
//! memory finds out.
//!
//! **Ordinary pages** may be made huge by the kernel where it can (*transparent* huge pages), if the administrator allows that for
//! shared memory (`/sys/kernel/mm/transparent_hugepage/shmem_enabled` is `advise`, say). Memory that is touched when it is made asks for it.

use std::{fmt, fs, path::Path, str::FromStr};

/// What sysfs knows of the pools.
const SYSFS: &str = "/sys/kernel/mm/hugepages";

/// A size of huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HugePage {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl HugePage {
    /// Bytes of a page.
    pub fn bytes(self) -> usize {
        match self {
            Self::Mib2 => 2 << 20,
            Self::Gib1 => 1 << 30,
        }
    }

    /// Pages that hold so many bytes.
    pub fn count(self, bytes: usize) -> usize {
        bytes.div_ceil(self.bytes())
    }

    /// What the machine has of them now. `None`: it has no pages of this size.
    pub fn pool(self) -> Option<Pool> {
        self.pool_in(Path::new(SYSFS))
    }

    fn pool_in(self, sysfs: &Path) -> Option<Pool> {
        let folder = sysfs.join(self.folder());
        let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<usize>().ok();
        let promised = number("resv_hugepages")?;
        Some(Pool {
            total: number("nr_hugepages")?,
            free: number("free_hugepages")?.saturating_sub(promised),
        })
    }

    fn folder(self) -> String {
        format!("hugepages-{}kB", self.bytes() >> 10)
    }

    /// The flags of `memfd_create`: the logarithm of the size stands in its upper bits.
    pub(super) fn memfd_flags(self) -> libc::c_uint {
        libc::MFD_HUGETLB | self.bytes().trailing_zeros() << libc::MFD_HUGE_SHIFT
    }
}

impl fmt::Display for HugePage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mib2 => "2 MiB",
            Self::Gib1 => "1 GiB",
        })
    }
}

/// The huge pages of one size that the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// All of them.
    pub total: usize,
    /// Those that nobody has, and that are promised to nobody.
    pub free: usize,
}

/// Which pages a memory is to lie on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pages {
    /// Huge ones of 2 MiB if there are enough, else ordinary ones.
    #[default]
    Any,
    /// Ordinary ones.
    Ordinary,
    /// Huge ones of this size, and no others.
    Huge(HugePage),
}

impl Pages {
    /// The size of huge pages to try for a memory of so many bytes.
    pub fn huge(self, bytes: usize) -> Option<HugePage> {
        match self {
            Self::Any => (bytes >= HugePage::Mib2.bytes()).then_some(HugePage::Mib2),
            Self::Ordinary => None,
            Self::Huge(page) => Some(page),
        }
    }
}

/// `2M`, `1G`, or `none` for ordinary pages.
impl FromStr for Pages {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "2m" => Ok(Self::Huge(HugePage::Mib2)),
            "1g" => Ok(Self::Huge(HugePage::Gib1)),
            "none" => Ok(Self::Ordinary),
            _ => {
                Err(format!("`{text}` is no size of huge pages: write 2M or 1G, or none for ordinary pages"))
            }
        }
    }
}

/// Huge pages that are not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Their size.
    pub page: HugePage,
    /// How many are needed.
    pub needed: usize,
    /// What there is. `None`: the machine has no pages of this size.
    pub pool: Option<Pool>,
    /// What the system said, if it was asked.
    pub said: Option<String>,
}

impl Shortage {
    /// `needed` pages are needed; they are looked for in the pool alone. `None`: they are there.
    pub fn expected(page: HugePage, needed: usize) -> Option<Self> {
        let pool = page.pool();
        let lacks = pool.is_none_or(|pool| pool.free < needed);
        lacks.then_some(Self { page, needed, pool, said: None })
    }

    /// Mapping or touching memory of `bytes` bytes has failed, as `said`.
    pub(super) fn met(page: HugePage, bytes: usize, said: impl fmt::Display) -> Self {
        Self { page, needed: page.count(bytes), pool: page.pool(), said: Some(said.to_string()) }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page, needed, pool, said } = self;
        match pool {
            None => write!(f, "this machine has no huge pages of {page}")?,
            Some(Pool { total, free }) => {
                write!(f, "huge pages of {page}: {needed} needed, {free} of {total} free")?;
                if free < needed {
                    let enough = total + needed - free;
                    write!(
                        f,
                        "; `echo {enough} > {SYSFS}/{}/nr_hugepages` as root makes enough",
                        page.folder()
                    )?;
                }
            }
        }
        said.as_ref().map_or(Ok(()), |said| write!(f, " (the system said: {said})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_what_is_neither_taken_nor_promised() {
        let sysfs = std::env::temp_dir().join(format!("fervor-pools-{}", std::process::id()));
        let folder = sysfs.join("hugepages-1048576kB");
        fs::create_dir_all(&folder).unwrap();
        for (name, number) in [("nr_hugepages", "9\n"), ("free_hugepages", "7\n"), ("resv_hugepages", "3\n")]
        {
            fs::write(folder.join(name), number).unwrap();
        }
        assert_eq!(HugePage::Gib1.pool_in(&sysfs), Some(Pool { total: 9, free: 4 }));
        assert_eq!(HugePage::Mib2.pool_in(&sysfs), None);
        fs::remove_dir_all(sysfs).unwrap();
    }

    #[test]
    fn sizes_are_written_as_elsewhere() {
        assert_eq!("2M".parse(), Ok(Pages::Huge(HugePage::Mib2)));
        assert_eq!("1g".parse(), Ok(Pages::Huge(HugePage::Gib1)));
        assert_eq!("none".parse(), Ok(Pages::Ordinary));
        let error = "4M".parse::<Pages>().unwrap_err();
        assert!(error.contains("`4M`") && error.contains("2M or 1G"), "{error}");
    }

    #[test]
    fn a_shortage_says_how_many_there_are_and_what_makes_more() {
        let pool = Some(Pool { total: 10, free: 4 });
        let shortage = Shortage { page: HugePage::Mib2, needed: 7, pool, said: Some("no memory".into()) };
        let text = shortage.to_string();
        assert!(text.starts_with("huge pages of 2 MiB: 7 needed, 4 of 10 free; `echo 13 > "), "{text}");
        assert!(
            text.contains("/hugepages-2048kB/nr_hugepages`") && text.ends_with("said: no memory)"),
            "{text}"
        );
        let none = Shortage { page: HugePage::Gib1, needed: 1, pool: None, said: None };
        assert_eq!(none.to_string(), "this machine has no huge pages of 1 GiB");
        // Enough are free, and yet the system refuses (a limit of a container, say): more of them would not help.
        let refused = Shortage { needed: 4, ..shortage };
        assert!(!refused.to_string().contains("echo"), "{refused}");
    }
}
