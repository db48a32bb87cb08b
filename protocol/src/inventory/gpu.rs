//! GPUs as the pool sees them: what there is, what it is called, what is left of it.

use core::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::request::{Grant, MODEL_CHARS_MAX, is_model_name};

/// The driver's UUID of a GPU or MIG instance (`GPU-…`, `MIG-…`; simulated ones `SIM-…`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpuUuid(pub String);

impl fmt::Display for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One GPU or MIG instance that can be given to one process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Gpu {
    /// The driver's id.
    pub uuid: GpuUuid,
    /// Short name used in requests, such as `v100`.
    pub model: String,
    /// The driver's name, such as `Tesla V100-SXM2-32GB`.
    pub full_name: String,
    /// Total memory.
    pub memory_bytes: u64,
    /// Not a real device: nothing computes on it.
    pub simulated: bool,
}

/// What a machine has, or has left: the same shape for both.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// GPUs, by UUID order.
    pub gpus: Vec<Gpu>,
    /// CPU cores.
    pub cpu_cores: u32,
    /// Main memory in MiB.
    pub ram_mib: u64,
}

impl Capacity {
    /// A machine with these; GPUs are put in order, and a UUID counts once.
    #[must_use]
    pub fn new(mut gpus: Vec<Gpu>, cpu_cores: u32, ram_mib: u64) -> Self {
        gpus.sort_by(|a, b| a.uuid.cmp(&b.uuid));
        gpus.dedup_by(|a, b| a.uuid == b.uuid);
        Self { gpus, cpu_cores, ram_mib }
    }

    /// Whether everything in `grant` is here.
    #[must_use]
    pub fn has(&self, grant: &Grant) -> bool {
        let has_gpu = |(i, uuid): (usize, &GpuUuid)| {
            self.gpus.iter().any(|gpu| gpu.uuid == *uuid) && !grant.gpus[..i].contains(uuid)
        };
        grant.cpu_cores <= self.cpu_cores
            && grant.ram_mib <= self.ram_mib
            && grant.gpus.iter().enumerate().all(has_gpu)
    }

    /// Takes `grant` out, all of it or, where something is not here, nothing; which of
    /// the two it was.
    #[must_use]
    pub fn take(&mut self, grant: &Grant) -> bool {
        let has_all = self.has(grant);
        if has_all {
            *self = self.without(grant);
        }
        has_all
    }

    /// What is left without `grant`, of which what is not here counts for nothing.
    #[must_use]
    pub fn without(&self, grant: &Grant) -> Self {
        let is_left = |gpu: &&Gpu| !grant.gpus.contains(&gpu.uuid);
        Self {
            gpus: self.gpus.iter().filter(is_left).cloned().collect(),
            cpu_cores: self.cpu_cores.saturating_sub(grant.cpu_cores),
            ram_mib: self.ram_mib.saturating_sub(grant.ram_mib),
        }
    }

    /// Puts back what was taken of a machine that has `total`, and never more than that:
    /// a GPU that the machine lost meanwhile stays away.
    pub fn give_back(&mut self, grant: &Grant, total: &Self) {
        let returned = total.gpus.iter().filter(|gpu| grant.gpus.contains(&gpu.uuid)).cloned();
        let gpus = core::mem::take(&mut self.gpus).into_iter().chain(returned).collect();
        *self = Self::new(
            gpus,
            self.cpu_cores.saturating_add(grant.cpu_cores).min(total.cpu_cores),
            self.ram_mib.saturating_add(grant.ram_mib).min(total.ram_mib),
        );
    }
}

/// The name that requests use for a GPU which the driver calls `full`:
/// `Tesla V100-SXM2-32GB` is `v100`, `NVIDIA GeForce RTX 2080 Ti` is `rtx2080ti`.
///
/// Makers and product lines, form factors and memory sizes are left out, the rest is
/// joined in lower case. Always a name that the request grammar takes for a model.
#[must_use]
pub fn short_name(full: &str) -> String {
    let full: String = full.chars().take(FULL_NAME_CHARS_MAX).collect();
    let full = full.to_ascii_lowercase();
    match full.split_once(" mig ") {
        Some((parent, profile)) => mig_name(&product_name(parent), profile),
        None => product_name(&full),
    }
}

/// The name of a MIG instance: `mig_name("a100", "1g.5gb")` is `a100.1g.5gb`.
///
/// Always a name that the request grammar takes for a model.
#[must_use]
pub fn mig_name(parent_short: &str, profile: &str) -> String {
    let clean = |text: &str, chars_max: usize| {
        let kept = |c: char| if is_name_char(c) { c } else { '-' };
        let text: String = text.to_ascii_lowercase().chars().map(kept).take(chars_max).collect();
        text.trim_matches(['-', '.']).to_owned()
    };
    let (parent, profile) = (clean(parent_short, 20), clean(profile, MODEL_CHARS_MAX - 21));
    let or = |text: String, other: &str| if text.is_empty() { other.to_owned() } else { text };
    format!("{}.{}", or(parent, UNKNOWN_NAME), or(profile, "mig"))
}

/// Characters of a driver's name that are looked at: NVML's own limit is 96.
const FULL_NAME_CHARS_MAX: usize = 128;

/// What a GPU is called whose name says nothing.
const UNKNOWN_NAME: &str = "unknown";

/// Words that tell no two models apart.
const NOISE: [&str; 28] = [
    "nvidia",
    "corporation",
    "tesla",
    "geforce",
    "quadro",
    "grid",
    "graphics",
    "gpu",
    "generation",
    "edition",
    "device",
    "amd",
    "ati",
    "radeon",
    "instinct",
    "intel",
    "with",
    "design",
    "workstation",
    "server",
    "blackwell",
    "nvgpu",
    "hbm2",
    "hbm2e",
    "hbm3",
    "hbm3e",
    "r",
    "tm",
];

/// Form factors: what follows them describes the board, not the model.
const FORM_FACTORS: [&str; 10] =
    ["pcie", "nvl", "fhhl", "dgxs", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6"];

/// The short name of a lower-case `full` without a MIG profile.
fn product_name(full: &str) -> String {
    let words: Vec<&str> = words(full).collect();
    let mut name = String::new();
    for (i, word) in words.iter().enumerate() {
        let next = words.get(i + 1).copied().unwrap_or_default();
        if FORM_FACTORS.contains(word) && !name.is_empty() {
            break;
        }
        let is_noise = NOISE.contains(word)
            || (is_memory_size(word) && !name.is_empty())
            || (*word == "rtx" && is_ampere_workstation(next))
            || (*word == "gtx" && next == "titan");
        if !is_noise {
            let digits_meet = name.ends_with(|c: char| c.is_ascii_digit())
                && word.starts_with(|c: char| c.is_ascii_digit());
            name.push_str(if digits_meet { "-" } else { "" });
            name.push_str(word);
        }
    }
    if name.is_empty() {
        name = words.join("-");
    }
    as_model_name(&name)
}

/// `lower`, made of name characters only, cut and altered until it is a model name.
fn as_model_name(lower: &str) -> String {
    let cut: String = lower.chars().take(MODEL_CHARS_MAX).collect();
    let name = cut.trim_matches(['-', '.']);
    match (name.is_empty(), is_model_name(name)) {
        (true, _) => UNKNOWN_NAME.to_owned(),
        (_, true) => name.to_owned(),
        // `gpu`, `cpu` or `ram`: the only names in these characters that are no model.
        (_, false) => format!("{name}-device"),
    }
}

fn words(full: &str) -> impl Iterator<Item = &str> {
    full.split(|c: char| !is_name_char(c) || c == '-')
        .map(|word| word.trim_matches('.'))
        .filter(|word| !word.is_empty())
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '.'
}

/// `80gb`, `144g`.
fn is_memory_size(word: &str) -> bool {
    let unit = word.trim_start_matches(|c: char| c.is_ascii_digit());
    unit.len() < word.len() && ["g", "gb", "gib"].contains(&unit)
}

/// `a6000`, which is sold as `RTX A6000`.
fn is_ampere_workstation(word: &str) -> bool {
    word.strip_prefix('a')
        .is_some_and(|number| number.len() >= 3 && number.bytes().all(|b| b.is_ascii_digit()))
}

/// The most GPUs that one node simulates.
pub const SIMULATED_GPUS_MAX: usize = 64;

/// Why a text does not name simulated GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseSimulatedError {
    /// Not a count, `x` and a model.
    #[error("`{0}` does not name simulated GPUs; expected such as `2xv100`")]
    Malformed(String),
    /// A count of nothing.
    #[error("a count of 0 in `{0}`")]
    Zero(String),
    /// More than a node simulates.
    #[error("more than {SIMULATED_GPUS_MAX} simulated GPUs")]
    TooMany,
}

/// The GPUs that `2xv100,1xgtx1070` asks a node to simulate, in that order.
///
/// Counts may be left out, case does not matter. Common models have the memory of the
/// real ones, others 16 GiB. `node` tells the UUIDs, `SIM-<node>-<index>`, of two nodes
/// apart; what could not stand in a list of UUIDs is replaced in it.
///
/// # Errors
/// [`ParseSimulatedError`] names the part that is wrong.
pub fn parse_simulated(text: &str, node: &str) -> Result<Vec<Gpu>, ParseSimulatedError> {
    let kept = |c: char| if is_name_char(c) { c } else { '-' };
    let node: String = node.chars().map(kept).take(64).collect();
    let mut gpus = Vec::new();
    for part in text.split(',') {
        let (count, model) = simulated_part(part.trim())?;
        if count > SIMULATED_GPUS_MAX - gpus.len() {
            return Err(ParseSimulatedError::TooMany);
        }
        for _ in 0..count {
            gpus.push(Gpu {
                uuid: GpuUuid(format!("SIM-{node}-{}", gpus.len())),
                full_name: format!("Simulated {}", model.to_ascii_uppercase()),
                memory_bytes: known_memory_bytes(&model).unwrap_or(16 << 30),
                model: model.clone(),
                simulated: true,
            });
        }
    }
    Ok(gpus)
}

fn simulated_part(part: &str) -> Result<(usize, String), ParseSimulatedError> {
    let shown = || part.chars().take(MODEL_CHARS_MAX).collect::<String>();
    let lower = part.to_ascii_lowercase();
    let counted = lower
        .split_once('x')
        .filter(|(digits, _)| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()));
    let (count, model) = match counted {
        // What overflows is too many as well.
        Some((digits, model)) => (digits.parse().unwrap_or(usize::MAX), model),
        None => (1, lower.as_str()),
    };
    if !is_model_name(model) {
        return Err(ParseSimulatedError::Malformed(shown()));
    }
    if count == 0 {
        return Err(ParseSimulatedError::Zero(shown()));
    }
    Ok((count, model.to_owned()))
}

/// Memory of well-known models, in GiB; of several versions the commonest, and of
/// equals the larger.
const KNOWN_MEMORY_GIB: [(&str, u64); 80] = [
    ("a10", 24),
    ("a100", 80),
    ("a16", 16),
    ("a2", 16),
    ("a2000", 12),
    ("a30", 24),
    ("a40", 48),
    ("a4000", 16),
    ("a4500", 20),
    ("a5000", 24),
    ("a6000", 48),
    ("a800", 80),
    ("b200", 180),
    ("b300", 268),
    ("gb200", 186),
    ("gh200", 96),
    ("gp100", 16),
    ("gtx1050ti", 4),
    ("gtx1060", 6),
    ("gtx1070", 8),
    ("gtx1070ti", 8),
    ("gtx1080", 8),
    ("gtx1080ti", 11),
    ("gtx1650", 4),
    ("gtx1660", 6),
    ("gtx1660super", 6),
    ("gtx1660ti", 6),
    ("gtx970", 4),
    ("gtx980", 4),
    ("gtx980ti", 6),
    ("gv100", 32),
    ("h100", 80),
    ("h20", 96),
    ("h200", 141),
    ("h800", 80),
    ("k40", 12),
    ("k80", 12),
    ("l4", 24),
    ("l40", 48),
    ("l40s", 48),
    ("m40", 24),
    ("m60", 8),
    ("p100", 16),
    ("p4", 8),
    ("p40", 24),
    ("rtx2060", 6),
    ("rtx2070", 8),
    ("rtx2080", 8),
    ("rtx2080ti", 11),
    ("rtx3050", 8),
    ("rtx3060", 12),
    ("rtx3060ti", 8),
    ("rtx3070", 8),
    ("rtx3070ti", 8),
    ("rtx3080", 10),
    ("rtx3080ti", 12),
    ("rtx3090", 24),
    ("rtx3090ti", 24),
    ("rtx4000ada", 20),
    ("rtx4060", 8),
    ("rtx4060ti", 16),
    ("rtx4070", 12),
    ("rtx4070ti", 12),
    ("rtx4080", 16),
    ("rtx4090", 24),
    ("rtx5000", 16),
    ("rtx5000ada", 32),
    ("rtx5070", 12),
    ("rtx5070ti", 16),
    ("rtx5080", 16),
    ("rtx5090", 32),
    ("rtx6000", 24),
    ("rtx6000ada", 48),
    ("rtx8000", 48),
    ("rtxpro6000", 96),
    ("t4", 16),
    ("titanrtx", 24),
    ("titanv", 12),
    ("titanxp", 12),
    ("v100", 32),
];

/// The memory that a GPU called `model` has as a rule: what the name itself says
/// (`a100-80gb`, `a100.1g.5gb`), or what is known of it.
pub(crate) fn known_memory_bytes(model: &str) -> Option<u64> {
    let stated = model.rsplit(['-', '.']).next().filter(|_| model.contains(['-', '.']));
    let stated = stated.and_then(|word| word.strip_suffix("gb")?.parse::<u64>().ok());
    let known = || KNOWN_MEMORY_GIB.iter().find(|(name, _)| *name == model).map(|&(_, gib)| gib);
    // No device has a TiB yet: a larger number is not a size.
    stated.filter(|gib| (1..1024).contains(gib)).or_else(known).map(|gib| gib << 30)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::Request;

    #[test]
    fn the_drivers_names_become_the_names_people_use() {
        for (full, short) in [
            ("Tesla V100-SXM2-32GB", "v100"),
            ("Tesla V100-SXM2-32GB-LS", "v100"),
            ("Tesla V100-DGXS-32GB", "v100"),
            ("Tesla P100-PCIE-16GB", "p100"),
            ("Tesla K80", "k80"),
            ("Tesla T4", "t4"),
            ("GRID T4-16Q", "t4-16q"),
            ("NVIDIA GeForce RTX 4090", "rtx4090"),
            ("NVIDIA GeForce RTX 4090 D", "rtx4090d"),
            ("NVIDIA GeForce RTX 2080 Ti", "rtx2080ti"),
            ("NVIDIA GeForce RTX 3060 Ti", "rtx3060ti"),
            ("NVIDIA GeForce RTX 4060 Ti 16GB", "rtx4060ti"),
            ("NVIDIA GeForce RTX 3070 Laptop GPU", "rtx3070laptop"),
            ("NVIDIA GeForce RTX 2080 with Max-Q Design", "rtx2080maxq"),
            ("GeForce GTX 1070", "gtx1070"),
            ("GeForce GTX 1060 6GB", "gtx1060"),
            ("NVIDIA GeForce GTX 1660 SUPER", "gtx1660super"),
            ("GeForce GTX TITAN X", "titanx"),
            ("GeForce 940MX", "940mx"),
            ("NVIDIA H200", "h200"),
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA H100 NVL", "h100"),
            ("NVIDIA GH200 144G HBM3e", "gh200"),
            ("NVIDIA A100-SXM4-80GB", "a100"),
            ("NVIDIA A100-PCIE-40GB", "a100"),
            ("NVIDIA A100 80GB PCIe", "a100"),
            ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100.1g.5gb"),
            ("NVIDIA RTX A6000", "a6000"),
            ("NVIDIA RTX A2000 8GB Laptop GPU", "a2000laptop"),
            ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
            ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000"),
            ("Quadro RTX 8000", "rtx8000"),
            ("Quadro P4000", "p4000"),
            ("Quadro 600", "600"),
            ("TITAN Xp", "titanxp"),
            ("NVIDIA TITAN RTX", "titanrtx"),
            ("NVIDIA TITAN V", "titanv"),
            ("NVIDIA L40S", "l40s"),
            ("NVIDIA L4", "l4"),
            ("NVIDIA GB200", "gb200"),
            ("NVIDIA CMP 170HX", "cmp170hx"),
            ("AMD Radeon RX 7900 XTX", "rx7900xtx"),
            ("AMD Instinct MI250X", "mi250x"),
            ("Intel(R) Arc(TM) A770 Graphics", "arca770"),
            ("NVIDIA Graphics Device", "nvidia-graphics-device"),
            ("", "unknown"),
            ("…", "unknown"),
            ("GPU", "gpu-device"),
            ("cpu", "cpu-device"),
        ] {
            assert_eq!(short_name(full), short, "{full}");
        }
    }

    #[test]
    fn a_mig_instance_is_named_after_its_gpu_and_profile() {
        assert_eq!(mig_name("a100", "1g.5gb"), "a100.1g.5gb");
        assert_eq!(mig_name("h100", "1g.10gb+me"), "h100.1g.10gb-me");
        assert_eq!(mig_name("", ""), "unknown.mig");
    }

    #[test]
    fn simulated_gpus_are_counted_named_and_marked() {
        let gpus = parse_simulated("2xV100, gtx1070,1x3090x", "n 1").unwrap();
        let shown: Vec<_> = gpus
            .iter()
            .map(|gpu| (gpu.uuid.0.as_str(), gpu.model.as_str(), gpu.memory_bytes >> 30))
            .collect();
        assert_eq!(
            shown,
            [
                ("SIM-n-1-0", "v100", 32),
                ("SIM-n-1-1", "v100", 32),
                ("SIM-n-1-2", "gtx1070", 8),
                ("SIM-n-1-3", "3090x", 16),
            ]
        );
        assert!(gpus.iter().all(|gpu| gpu.simulated));
        assert_eq!(parse_simulated("7xa100.1g.5gb", "n").unwrap()[6].memory_bytes, 5 << 30);
    }

    #[test]
    fn what_names_no_simulated_gpus_is_refused() {
        let error = |text: &str| parse_simulated(text, "n").unwrap_err();
        for text in ["", "2x", "2xgpu", "v 100", "2xv100,", "-1xv100"] {
            assert!(matches!(error(text), ParseSimulatedError::Malformed(_)), "{text}");
        }
        assert_eq!(error("0xv100"), ParseSimulatedError::Zero("0xv100".to_owned()));
        assert_eq!(error("64xv100,t4"), ParseSimulatedError::TooMany);
        assert_eq!(error("99999999999999999999xv100"), ParseSimulatedError::TooMany);
        assert_eq!(parse_simulated("64xv100", "n").unwrap().len(), SIMULATED_GPUS_MAX);
    }

    #[test]
    fn a_grant_is_taken_whole_or_not_and_comes_back_whole() {
        let total = Capacity::new(parse_simulated("2xv100", "n").unwrap(), 8, 1024);
        let uuid = |i: usize| total.gpus[i].uuid.clone();
        let grant = Grant { gpus: vec![uuid(1)], cpu_cores: 3, ram_mib: 24 };
        let mut free = total.clone();
        assert!(free.take(&grant));
        assert_eq!((free.gpus.len(), free.cpu_cores, free.ram_mib), (1, 5, 1000));
        let left = free.clone();
        for too_much in [
            grant.clone(),
            Grant { gpus: vec![uuid(0), uuid(0)], ..Grant::default() },
            Grant { cpu_cores: 6, ..Grant::default() },
            Grant { ram_mib: 1001, ..Grant::default() },
        ] {
            assert!(!free.take(&too_much));
            assert_eq!(free, left);
        }
        free.give_back(&grant, &total);
        free.give_back(&grant, &total);
        assert_eq!(free, total);
        let without_the_lost_gpu = Capacity::new(vec![total.gpus[0].clone()], 8, 1024);
        let mut free = left;
        free.give_back(&grant, &without_the_lost_gpu);
        assert_eq!(free, without_the_lost_gpu);
    }

    proptest! {
        #[test]
        fn every_short_name_can_be_asked_for(full in ".{0,200}|[ -~]{0,80}|(nvidia|rtx|gpu|ram| |80gb|-)*") {
            assert_is_asked_for(&short_name(&full))?;
        }

        #[test]
        fn every_mig_name_can_be_asked_for(parent in ".{0,80}", profile in ".{0,80}") {
            assert_is_asked_for(&mig_name(&parent, &profile))?;
        }
    }

    fn assert_is_asked_for(name: &str) -> Result<(), TestCaseError> {
        let request = Request::parse(&format!("2:[3:{name}>=1g]"));
        let model = request.ok().and_then(|r| r.groups[0].process.gpus[0].model.clone());
        prop_assert_eq!(model.as_deref(), Some(name));
        Ok(())
    }
}
