//! The canonical text of a request: it parses to the same value.

use core::fmt;

use super::{GpuNeed, Group, Process, Request};

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        separated(f, &self.groups)
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        counted(f, self.count)?;
        self.process.fmt(f)
    }
}

impl fmt::Display for Process {
    /// In brackets: GPUs as written, then cores, then memory.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = |n: Option<u32>, name| n.map(|n| format!("{n}:{name}"));
        let mut needs: Vec<String> = self.gpus.iter().map(GpuNeed::to_string).collect();
        needs.extend(amount(self.cpu_cores, "cpu"));
        needs.extend(amount(self.ram_gib, "ram"));
        f.write_str("[")?;
        separated(f, &needs)?;
        f.write_str("]")
    }
}

impl fmt::Display for GpuNeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        counted(f, self.count)?;
        f.write_str(self.model.as_deref().unwrap_or("gpu"))?;
        match self.memory_bytes_min {
            Some(bytes) => write!(f, ">={}", Size(bytes)),
            None => Ok(()),
        }
    }
}

/// Bytes as the grammar writes them: a whole number of the largest unit.
pub(super) struct Size(pub(super) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shift, unit) = match self.0.trailing_zeros() {
            _ if self.0 == 0 => (0, 'b'),
            30.. => (30, 'g'),
            20.. => (20, 'm'),
            10.. => (10, 'k'),
            _ => (0, 'b'),
        };
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

fn separated<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: &[T]) -> fmt::Result {
    for (i, item) in items.iter().enumerate() {
        f.write_str(if i == 0 { "" } else { "," })?;
        item.fmt(f)?;
    }
    Ok(())
}

fn counted(f: &mut fmt::Formatter<'_>, count: u32) -> fmt::Result {
    if count == 1 { Ok(()) } else { write!(f, "{count}:") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::{
        CPU_CORES_MAX, GROUPS_MAX, MEMORY_BYTES_MAX, MODEL_CHARS_MAX, NEEDS_MAX, RAM_GIB_MAX,
        TEXT_BYTES_MAX, generated,
    };

    proptest! {
        #[test]
        fn what_a_request_displays_parses_to_the_same_request(request in generated::request()) {
            prop_assert_eq!(request.check(), Ok(()));
            prop_assert_eq!(Request::parse(&request.to_string()), Ok(request));
        }
    }

    #[test]
    fn the_canonical_text_has_no_blanks_no_counts_of_one_and_the_largest_unit() {
        for (text, canonical) in [
            ("", "[]"),
            (" 1 : [ 1:V100 ] ", "[v100]"),
            ("2:[],4:[gtx1070,2:gtx1060]", "2:[],4:[gtx1070,2:gtx1060]"),
            ("[64:ram,cpu,2:gpu]", "[2:gpu,1:cpu,64:ram]"),
            ("[4:GPU>=24G]", "[4:gpu>=24g]"),
            ("[gpu>=2048m]", "[gpu>=2g]"),
            ("[gpu>=1536m]", "[gpu>=1536m]"),
            ("[02:3090]", "[2:3090]"),
        ] {
            assert_eq!(Request::parse(text).unwrap().to_string(), canonical);
        }
    }

    #[test]
    fn the_longest_request_within_the_bounds_still_parses() {
        let need = GpuNeed {
            count: 8,
            model: Some("m".repeat(MODEL_CHARS_MAX)),
            memory_bytes_min: Some(MEMORY_BYTES_MAX - 1),
        };
        let process = Process {
            gpus: vec![need; NEEDS_MAX],
            cpu_cores: Some(CPU_CORES_MAX),
            ram_gib: Some(RAM_GIB_MAX),
        };
        let request = Request { groups: vec![Group { count: 32, process }; GROUPS_MAX] };
        let text = request.to_string();
        assert!(text.len() < TEXT_BYTES_MAX, "{}", text.len());
        assert_eq!(Request::parse(&text), Ok(request));
    }
}
