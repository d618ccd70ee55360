//! NUMA nodes: which processors and which memory are near each other.

use std::{fs, path::Path};

use rustix::thread::{CpuSet, sched_getaffinity};

use super::Memory;
use crate::devices;

const SYSFS: &str = "/sys/devices/system/node";

/// The NUMA nodes of a machine that have processors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nodes(Vec<(usize, Vec<usize>)>);

impl Nodes {
    /// Nodes with these numbers and processors.
    pub fn new(nodes: impl IntoIterator<Item = (usize, Vec<usize>)>) -> Self {
        Self(nodes.into_iter().collect())
    }

    /// Those of this machine. None, if its kernel knows of no nodes.
    pub fn this() -> Self {
        Self::in_folder(Path::new(SYSFS))
    }

    fn in_folder(sysfs: &Path) -> Self {
        let mut nodes: Vec<_> = fs::read_dir(sysfs)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
                let cores = fs::read_to_string(entry.path().join("cpulist")).ok()?;
                Some((number, devices::cores(cores.trim())))
            })
            .filter(|(_, cores)| !cores.is_empty())
            .collect();
        nodes.sort_unstable();
        Self(nodes)
    }

    /// Whether it makes a difference where memory lies.
    pub fn several(&self) -> bool {
        self.0.len() > 1
    }

    /// The node of a processor.
    pub fn of_core(&self, core: usize) -> Option<usize> {
        self.0.iter().find(|(_, cores)| cores.contains(&core)).map(|(number, _)| *number)
    }

    /// The processors of a node.
    pub fn cores(&self, node: usize) -> &[usize] {
        self.0.iter().find(|(number, _)| *number == node).map_or(&[], |(_, cores)| cores)
    }
}

/// The processors that the calling thread may use.
pub fn allowed_cores() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else { return Vec::new() };
    (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
}

/// Bytes of a memory on each node, as far as it has been touched through this mapping; empty if the kernel does not say. It takes a look
/// at each page.
pub(super) fn spread(memory: &Memory) -> Vec<(usize, usize)> {
    let text = fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
    spread_in(&text, memory.as_ptr().addr())
}

/// `7f00a0000000 default file=/memfd:rows dirty=3 N0=1 N1=2 kernelpagesize_kB=4`
fn spread_in(text: &str, address: usize) -> Vec<(usize, usize)> {
    let line = text.lines().find_map(|line| {
        let (start, rest) = line.split_once(' ')?;
        (usize::from_str_radix(start, 16) == Ok(address)).then_some(rest)
    });
    let words = || line.unwrap_or_default().split(' ').filter_map(|word| word.split_once('='));
    let page =
        words().find_map(|(name, value)| (name == "kernelpagesize_kB").then(|| value.parse::<usize>()));
    let Some(Ok(page)) = page else { return Vec::new() };
    let on = |(name, value): (&str, &str)| {
        let node = name.strip_prefix('N')?.parse().ok()?;
        Some((node, value.parse::<usize>().ok()? * (page << 10)))
    };
    words().filter_map(on).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MemoryOptions, Pages, Touch};

    #[test]
    fn nodes_with_processors_are_known() {
        let sysfs = std::env::temp_dir().join(format!("fervor-nodes-{}", std::process::id()));
        for (node, cores) in [("node1", "2-3,6\n"), ("node0", "0-1\n"), ("node7", "\n"), ("has_cpu", "0-1\n")]
        {
            fs::create_dir_all(sysfs.join(node)).unwrap();
            fs::write(sysfs.join(node).join("cpulist"), cores).unwrap();
        }
        let nodes = Nodes::in_folder(&sysfs);
        assert_eq!(nodes, Nodes(vec![(0, vec![0, 1]), (1, vec![2, 3, 6])]));
        assert_eq!((nodes.of_core(6), nodes.of_core(4), nodes.several()), (Some(1), None, true));
        assert_eq!((nodes.cores(1), nodes.cores(7)), (&[2, 3, 6][..], &[][..]));
        fs::remove_dir_all(sysfs).unwrap();
    }

    #[test]
    fn a_line_of_numa_maps_says_where_pages_lie() {
        let text = "7f0000000000 default anon=1 N0=1 kernelpagesize_kB=4\n\
                    7f0000400000 default file=/memfd:rows\\040(deleted) huge dirty=5 N0=2 N3=3 kernelpagesize_kB=2048\n";
        assert_eq!(spread_in(text, 0x7f00_0040_0000), [(0, 4 << 20), (3, 6 << 20)]);
        assert_eq!(spread_in(text, 0x7f00_0040_1000), []);
    }

    #[test]
    fn touched_memory_lies_on_some_node() {
        let nodes = Nodes::this();
        let Some(&core) = allowed_cores().first() else { panic!("this thread may use no processor") };
        let touch = Touch { threads: 1.try_into().unwrap(), cores: &[core], progress: &|_| () };
        let options = MemoryOptions { pages: Pages::Ordinary, touch: Some(touch) };
        let memory = Memory::with("test-spread", 1 << 20, &options).unwrap();
        let spread = memory.spread();
        match nodes.of_core(core) {
            Some(node) if Path::new("/proc/self/numa_maps").exists() => assert_eq!(spread, [(node, 1 << 20)]),
            _ => assert_eq!(spread, []),
        }
    }
}
