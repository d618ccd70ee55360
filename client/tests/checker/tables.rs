//! What a seed makes of a job's tables.

use fervor_client::{ElementType, Model};

use super::plan::{HOT, Kind};
use crate::support::Random;

/// A table of a job.
#[derive(Debug)]
pub struct TablePlan {
    pub name: String,
    pub model: Model,
    pub element: ElementType,
    pub rows: u64,
    /// Columns of each lane.
    pub each: usize,
    /// From one column that is somebody's to the next one; those between are nobody's and stay zero.
    pub spacing: usize,
    pub slots: usize,
    /// Bytes per second of continuous pushes.
    pub continuous: u64,
}

impl TablePlan {
    /// Whether the server pushes changed rows.
    pub fn pushed(&self) -> bool {
        self.model.eager() || self.continuous > 0
    }
}

/// The tables of a job of this kind.
pub fn tables(kind: Kind, lanes: usize, random: &mut Random) -> Vec<TablePlan> {
    let most = match kind {
        Kind::Few => 4,
        Kind::Wide | Kind::Busy => 2,
        Kind::Storm | Kind::Churn | Kind::Crowd => 1,
        Kind::Behind => 2,
    };
    let count = if kind == Kind::Behind { 2 } else { random.among(1..=most) };
    (0..count)
        .map(|number| {
            let element = [ElementType::F32, ElementType::F64, ElementType::I32, ElementType::I64]
                [random.among(0..=3) as usize];
            // An image in one cache line lands at once.
            let element = if kind == Kind::Churn { ElementType::I32 } else { element };
            let staleness = random.among(0..=3) as u32;
            let model = match random.among(0..=9) {
                0 => Model::Bsp,
                1..=3 => Model::Ssp { staleness },
                4 => Model::Async,
                5 => Model::Vap { v0: random.among(5..=60) as f32 },
                _ => Model::Essp { staleness },
            };
            let wide = kind == Kind::Wide && number == 0;
            // A wide row has more than 64 KiB: its dense updates take several messages.
            let least = (66 << 10) / element.size() / lanes + 1;
            let rows = match kind {
                Kind::Wide => random.among(1..=3),
                Kind::Busy => random.among(6..=20),
                Kind::Churn => random.among(5..=9),
                Kind::Crowd => random.among(150..=400),
                Kind::Behind if number == 0 => random.among(150..=200),
                Kind::Behind => random.among(1..=HOT + 1),
                Kind::Few => random.among(1..=40),
                Kind::Storm => 1,
            };
            let (model, each, spacing) = match kind {
                // Rows that are long enough to be torn: 16 KiB to 64 KiB, of which little is somebody's.
                Kind::Storm => {
                    let loose = [Model::Async, Model::Ssp { staleness: 100 }, Model::Essp { staleness: 100 }];
                    let model = if random.one_in(4) { model } else { loose[random.among(0..=2) as usize] };
                    let bytes = (random.among(1..=4) as usize) << 14;
                    (model, 4, bytes / element.size() / lanes / 4)
                }
                // With a staleness of at least 1 everybody works on while a round is pushed. The rows of both tables are equally
                // long: when the quota has no room for one more row of a round, it has none for one with a value bound.
                Kind::Behind => {
                    let model = match number {
                        0 => Model::Essp { staleness: staleness.max(1) },
                        _ => Model::Vap { v0: random.among(5..=30) as f32 },
                    };
                    (model, 1, 1024 / element.size() / lanes)
                }
                // A bound that two updates of one of the last rows exceed.
                Kind::Crowd if random.one_in(4) => (Model::Vap { v0: random.among(500..=4000) as f32 }, 1, 1),
                // Rows that are too long to share an image, and short enough for one cache line.
                Kind::Churn => (Model::Essp { staleness }, 1, 9usize.div_ceil(lanes)),
                Kind::Crowd => (Model::Essp { staleness }, 1, 1),
                _ if wide => (model, least, 1),
                _ => (model, random.among(1..=6) as usize, 1),
            };
            let slots = match kind {
                Kind::Churn => 4,
                Kind::Crowd | Kind::Behind => rows.max(4),
                Kind::Busy => random.among(4..=9),
                Kind::Few | Kind::Wide | Kind::Storm => random.among(4..=rows.max(4) + 2),
            };
            let slots = slots as usize;
            let often = kind == Kind::Crowd && random.one_in(2);
            let continuous = match model {
                // What is pushed before the round does not hold anything up in it.
                Model::Essp { .. } if kind == Kind::Behind => 0,
                Model::Essp { .. } if often => u64::MAX,
                Model::Essp { .. } | Model::Async if random.one_in(3) => {
                    [1_000_000, 50_000_000, 2_000_000_000, u64::MAX][random.among(0..=3) as usize]
                }
                _ => 0,
            };
            TablePlan {
                name: format!("table-{number}"),
                model,
                element,
                rows,
                each,
                spacing,
                slots,
                continuous,
            }
        })
        .collect()
}
