//! Where each shard runs, and where its memory lies: expected before a server starts, and as it came after.
//!
//! A shard's memory is taken on the NUMA node of the processor that polls it, on the pages that were asked for. Where there are too few
//! huge pages a shard gets ordinary ones, and where a node is full the kernel takes another. Neither is an error; both are
//! said ([`Placement::warnings`]).

use std::fmt;

use fervor_verbs::memory::{HugePage, Nodes, Pages, Shortage, allowed_cores};

use crate::Config;

/// Most threads that touch the memory of one shard: a node's memory is not cleared faster by more.
const MOST_THREADS: usize = 16;

/// Where one shard runs, and where its rows lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlacement {
    /// The processor that its polling thread is pinned to, if any.
    pub core: Option<usize>,
    /// The NUMA node of that processor.
    pub node: Option<usize>,
    /// Bytes of the region of its rows.
    pub bytes: usize,
    /// The huge pages that it lies on. `None`: ordinary ones.
    pub page: Option<HugePage>,
    /// The completion vector of its queue, modulo their number.
    pub vector: usize,
    /// Processors whose threads touch the memory. None: any.
    pub touching: Vec<usize>,
    /// How many these are.
    pub threads: usize,
    /// Bytes on other nodes than its own. 0, where the kernel does not say.
    pub elsewhere: usize,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// By number.
    pub shards: Vec<ShardPlacement>,
    /// The huge pages that were asked for, and are not all there.
    pub shortage: Option<Shortage>,
    /// Completion vectors of each device.
    vectors: Vec<usize>,
}

impl Placement {
    /// What is to be expected of a server with this configuration on this machine, as it is now.
    pub fn of(config: &Config) -> Self {
        Self::on(config, &Nodes::this(), &allowed_cores(), |page| page.pool().map_or(0, |pool| pool.free))
    }

    fn on(config: &Config, nodes: &Nodes, allowed: &[usize], free: impl Fn(HugePage) -> usize) -> Self {
        let node_of = |core: &Option<usize>| core.and_then(|core| nodes.of_core(core));
        let ordinary = config.region_bytes(None);
        let huge = config.pages.huge(ordinary);
        let on_huge = config.region_bytes(huge);
        let mut left = huge.map(|page| (page, free(page)));
        let mut place = |(shard, core): (usize, &Option<usize>)| {
            let node = node_of(core);
            let beside = config.cores.iter().filter(|other| node_of(other) == node).count();
            let near: Vec<_> = node.map_or_else(Vec::new, |node| nodes.cores(node).to_vec());
            // Where a process may not use the processors of the node (isolated ones, say), the shard's own remains: it is pinned there.
            let mut touching: Vec<_> = near.into_iter().filter(|core| allowed.contains(core)).collect();
            if touching.is_empty() {
                touching.extend(core);
            }
            let hands = if touching.is_empty() { allowed.len() } else { touching.len() };
            let page = left.as_mut().and_then(|(page, free)| {
                *free = free.checked_sub(page.count(on_huge))?;
                Some(*page)
            });
            let bytes = if page.is_some() { on_huge } else { ordinary };
            let threads = (hands / beside.max(1)).clamp(1, MOST_THREADS);
            ShardPlacement { core: *core, node, bytes, page, vector: shard, touching, threads, elsewhere: 0 }
        };
        let shards: Vec<_> = config.cores.iter().enumerate().map(&mut place).collect();
        let shortage = match config.pages {
            Pages::Huge(page) => Shortage::expected(page, shards.len() * page.count(on_huge)),
            _ => None,
        };
        Self { shards, shortage, vectors: Vec::new() }
    }

    /// On devices with so many completion vectors each.
    #[must_use]
    pub fn with_vectors(self, vectors: Vec<usize>) -> Self {
        Self { vectors, ..self }
    }

    /// Bytes on huge pages, which a machine does not count as available memory.
    pub fn huge_bytes(&self) -> usize {
        let on_huge =
            self.shards.iter().filter_map(|shard| Some(shard.page?.count(shard.bytes) * shard.page?.bytes()));
        on_huge.sum()
    }

    /// What is not as it was asked for, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let without: Vec<_> =
            (0..self.shards.len()).filter(|shard| self.shards[*shard].page.is_none()).collect();
        if let Some(shortage) = &self.shortage
            && !without.is_empty()
        {
            let verb = if without.len() == 1 { "lies" } else { "lie" };
            warnings.push(format!("{shortage}; {} {verb} on ordinary pages", names(&without)));
        }
        for (number, shard) in self.shards.iter().enumerate() {
            if let (Some(node), 1..) = (shard.node, shard.elsewhere) {
                warnings.push(format!(
                    "{} of the {} of shard {number} lie on other NUMA nodes than node {node}, where it is polled: that node had too \
                     little free memory (`numactl --hardware` shows it)",
                    size(shard.elsewhere),
                    size(shard.bytes)
                ));
            }
        }
        warnings
    }
}

/// `shard 3`, or `shards 0, 1 and 3`.
fn names(shards: &[usize]) -> String {
    let numbers: Vec<_> = shards.iter().map(ToString::to_string).collect();
    match numbers.split_last() {
        Some((last, [])) => format!("shard {last}"),
        Some((last, others)) => format!("shards {} and {last}", others.join(", ")),
        None => String::new(),
    }
}

/// Bytes, for people.
fn size(bytes: usize) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or = |value: Option<usize>, text: &str| {
            value.map_or_else(|| text.to_owned(), |value| value.to_string())
        };
        write!(f, "shard   core   node         rows   pages                  vector")?;
        for (number, shard) in self.shards.iter().enumerate() {
            let pages = match shard.page {
                Some(page) => format!("{} of {page}", page.count(shard.bytes)),
                None => "ordinary".to_owned(),
            };
            let vectors: Vec<_> = self.vectors.iter().map(|all| shard.vector % (*all).max(1)).collect();
            let vector = match &*vectors {
                [] => "-".to_owned(),
                [first, others @ ..] if others.iter().all(|other| other == first) => first.to_string(),
                all => all.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
            };
            let (core, node) = (or(shard.core, "any"), or(shard.node, "any"));
            let rows = size(shard.bytes);
            write!(f, "\n{number:>5} {core:>6} {node:>6} {rows:>12}   {pages:<20} {vector:>8}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use fervor_verbs::memory::Pool;

    use super::*;

    fn config(cores: Vec<Option<usize>>, pages: Pages) -> Config {
        let config = Config::new("shm:///tmp/x".parse().expect("an address"));
        Config { memory: cores.len() * (8 << 20), cores, pages, ..config }
    }

    /// Processors 0 to 3 and 4 to 7.
    fn two_nodes() -> Nodes {
        Nodes::new([(0, vec![0, 1, 2, 3]), (1, vec![4, 5, 6, 7])])
    }

    #[test]
    fn memory_is_touched_by_the_processors_of_its_node_which_its_shards_share() {
        let allowed = [0, 1, 2, 3, 4, 5];
        let config = config(vec![Some(0), Some(1), Some(4), Some(9), None], Pages::Ordinary);
        let placement = Placement::on(&config, &two_nodes(), &allowed, |_| 0);
        let found: Vec<_> = placement
            .shards
            .iter()
            .map(|shard| (shard.node, shard.touching.clone(), shard.threads))
            .collect();
        let expected = [
            (Some(0), vec![0, 1, 2, 3], 2),
            (Some(0), vec![0, 1, 2, 3], 2),
            (Some(1), vec![4, 5], 2),
            // Of no node.
            (None, vec![9], 1),
            (None, vec![], 3),
        ];
        assert_eq!(found, expected);
        // A process that may not use the processors near its shard.
        let far = Placement::on(&config, &two_nodes(), &[4], |_| 0);
        assert_eq!((far.shards[0].touching.as_slice(), far.shards[0].threads), (&[0][..], 1));
    }

    #[test]
    fn huge_pages_are_given_out_as_long_as_there_are_some() {
        let config = config(vec![None; 3], Pages::Huge(HugePage::Mib2));
        let placement = Placement::on(&config, &Nodes::default(), &[0], |_| 9);
        let pages: Vec<_> = placement.shards.iter().map(|shard| shard.page).collect();
        assert_eq!(pages, [Some(HugePage::Mib2), Some(HugePage::Mib2), None]);
        assert_eq!(placement.huge_bytes(), 2 * (8 << 20));
        let table = placement.to_string();
        assert!(table.contains("8.0 MiB   4 of 2 MiB ") && table.contains("8.0 MiB   ordinary "), "{table}");
        let pool = Some(Pool { total: 10, free: 9 });
        let shortage = Some(Shortage { page: HugePage::Mib2, needed: 12, pool, said: None });
        let warnings = Placement { shortage, ..placement }.warnings();
        let [warning] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(warning.starts_with("huge pages of 2 MiB: 12 needed, 9 of 10 free; `echo 13 "), "{warning}");
        assert!(warning.ends_with("shard 2 lies on ordinary pages"), "{warning}");
    }

    #[test]
    fn memory_on_another_node_is_said() {
        let config = config(vec![Some(5)], Pages::Any);
        let mut placement = Placement::on(&config, &two_nodes(), &[5], |_| 0);
        assert!(placement.warnings().is_empty());
        placement.shards[0].elsewhere = 3 << 20;
        let warnings = placement.warnings();
        assert!(
            warnings.len() == 1 && warnings[0].contains("3.0 MiB of the 8.0 MiB of shard 0"),
            "{warnings:?}"
        );
    }

    #[test]
    fn vectors_go_round() {
        let config = config(vec![Some(0), Some(1), Some(2)], Pages::Any);
        let last = |vectors: &[usize]| -> Vec<String> {
            let placement = Placement::on(&config, &two_nodes(), &[0], |_| 0).with_vectors(vectors.to_vec());
            let text = placement.to_string();
            text.lines().skip(1).filter_map(|line| line.split(' ').next_back()).map(str::to_owned).collect()
        };
        assert_eq!(last(&[2]), ["0", "1", "0"]);
        // Devices that are alike share a number.
        assert_eq!(last(&[2, 2]), ["0", "1", "0"]);
        assert_eq!(last(&[2, 4]), ["0", "1", "0,2"]);
        assert_eq!(last(&[]), ["-"; 3]);
    }
}
