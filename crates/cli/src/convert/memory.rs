//! How much memory this process holds.

/// Bytes of physical memory held now, and the most so far. Known on Linux only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub now: u64,
    pub most: u64,
}

/// What the system says about this process.
pub fn now() -> Option<Memory> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn parse(status: &str) -> Option<Memory> {
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line
            .trim_start_matches(':')
            .trim()
            .strip_suffix(" kB")?
            .parse()
            .ok()?;
        kib.checked_mul(1024)
    };
    Some(Memory {
        now: field("VmRSS")?,
        most: field("VmHWM")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_lines_are_found_and_anything_else_is_nothing() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let expected = Memory {
            now: 1 << 20,
            most: 2 << 20,
        };
        assert_eq!(parse(status), Some(expected));
        assert_eq!(parse("VmRSS:\t1 kB\n"), None);
        assert_eq!(parse("VmHWM:\tmuch\nVmRSS:\t1 kB\n"), None);
    }
}
