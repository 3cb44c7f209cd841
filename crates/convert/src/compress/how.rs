//! How a weight is stored: the forms, their words on a command line, and which weights they fit.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// How a weight is stored.
///
/// Written as one word, which [`FromStr`] reads and [`fmt::Display`] writes: `none`, `palette:4`, `palette:4:group=8`,
/// `palette:3:vector=2:table=int8`, `int8`, `int4:block=32`, `sparse:0.5`, `sparse:0.5+palette:4`, `sparse:0.5+int8`.
///
/// ```
/// use candle_coreml_convert::{Compression, Palette};
///
/// let how: Compression = "palette:4:group=8".parse()?;
/// assert_eq!(how, Compression::Palette(Palette { bits: 4, group: Some(8), ..Palette::default() }));
/// assert_eq!(how.to_string(), "palette:4:group=8");
/// # Ok::<(), candle_coreml_convert::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Compression {
    /// Floats as they are.
    #[default]
    None,
    /// Indices into tables.
    Palette(Palette),
    /// Integers times a scale: one an output channel, or one a block of inputs.
    Linear {
        /// 4 or 8.
        bits: u32,
        /// Inputs that share a scale; `None` for a whole channel.
        block: Option<usize>,
    },
    /// Zeros left out.
    Sparse {
        /// Share of the values, the smallest ones, that become 0; from 0 to 1.
        zeros: f32,
        /// How the values that stay are stored.
        kept: Kept,
    },
}

/// Indices into tables of 2^`bits` entries that make the squared error least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Palette {
    /// 1, 2, 3, 4, 6 or 8.
    pub bits: u32,
    /// Output channels that share a table; `None` for one table.
    pub group: Option<usize>,
    /// Output channels that one index stands for: entries are vectors of that many numbers.
    pub vector: usize,
    /// How the entries of the tables are stored.
    pub table: Table,
    /// Where the clustering of vectors starts. Numbers (`vector` 1) are clustered exactly and need no seed.
    pub seed: u64,
}

impl Default for Palette {
    fn default() -> Self {
        Palette {
            bits: 4,
            group: None,
            vector: 1,
            table: Table::Half,
            seed: 0,
        }
    }
}

/// How the entries of a palette are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Table {
    /// 16-bit floats.
    #[default]
    Half,
    /// 8-bit integers times one scale.
    Int8,
}

/// How the values that a sparse weight keeps are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kept {
    /// 16-bit floats.
    #[default]
    Half,
    /// Indices of that many bits into one table.
    Palette {
        /// 1, 2, 3, 4, 6 or 8.
        bits: u32,
        /// How the entries are stored.
        table: Table,
    },
    /// Integers times a scale for each output channel.
    Linear {
        /// 4 or 8.
        bits: u32,
    },
}

const PALETTE_BITS: [u32; 6] = [1, 2, 3, 4, 6, 8];

impl Compression {
    /// A palette with one table, or one for each group of output channels.
    pub fn palette(bits: u32, group: Option<usize>) -> Self {
        Compression::Palette(Palette {
            bits,
            group,
            ..Palette::default()
        })
    }

    /// Says what is wrong with the numbers in it, whatever the weight.
    ///
    /// # Errors
    /// [`Error::Option`] with what is allowed.
    pub fn check(&self) -> Result<()> {
        let wrong = |problem: String| {
            Err(Error::Option {
                option: "compression",
                problem,
            })
        };
        let palette = |bits: u32| match PALETTE_BITS.contains(&bits) {
            true => Ok(()),
            false => wrong(format!(
                "palettes of {bits} bits; 1, 2, 3, 4, 6 and 8 are allowed"
            )),
        };
        let linear = |bits: u32| match bits {
            4 | 8 => Ok(()),
            _ => wrong(format!("integers of {bits} bits; 4 and 8 are allowed")),
        };
        match *self {
            Compression::None => Ok(()),
            Compression::Palette(p) => {
                palette(p.bits)?;
                match (p.vector, p.group) {
                    (0, _) | (_, Some(0)) => wrong("groups and vectors of no channels".to_owned()),
                    (v, Some(g)) if g % v != 0 => {
                        wrong(format!("vectors of {v} channels do not divide groups of {g}"))
                    }
                    _ => Ok(()),
                }
            }
            Compression::Linear { block: Some(0), .. } => wrong("blocks of no inputs".to_owned()),
            Compression::Linear { bits, .. } => linear(bits),
            Compression::Sparse { zeros, kept } => {
                if !(0.0..1.0).contains(&zeros) {
                    return wrong(format!("a share of {zeros} zeros; 0 to below 1 is allowed"));
                }
                match kept {
                    Kept::Half => Ok(()),
                    Kept::Palette { bits, .. } => palette(bits),
                    Kept::Linear { bits } => linear(bits),
                }
            }
        }
    }

    /// True when a weight of this shape can be stored so; others stay as they are.
    pub fn fits(&self, shape: &[usize]) -> bool {
        let divides = |n: usize, at: usize| shape.get(at).is_some_and(|size| n > 0 && size % n == 0);
        shape.len() >= 2
            && match *self {
                Compression::Palette(p) => p.group.is_none_or(|n| divides(n, 0)) && divides(p.vector, 0),
                Compression::Linear { block, .. } => block.is_none_or(|n| divides(n, 1)),
                Compression::None | Compression::Sparse { .. } => true,
            }
    }

    /// The same with one table where groups do not divide a weight, and numbers where vectors do not.
    pub(crate) fn relaxed(&self, shape: &[usize]) -> Self {
        let without = |group: Option<usize>, vector: usize| match *self {
            Compression::Palette(p) => Compression::Palette(Palette { group, vector, ..p }),
            other => other,
        };
        let (group, vector) = match *self {
            Compression::Palette(p) => (p.group, p.vector),
            Compression::Linear { bits, .. } if !self.fits(shape) => {
                return Compression::Linear { bits, block: None };
            }
            _ => return *self,
        };
        let tries = [(group, vector), (group, 1), (None, vector), (None, 1)];
        let tries = tries.into_iter().map(|(g, v)| without(g, v));
        tries
            .into_iter()
            .find(|how| how.fits(shape) && how.check().is_ok())
            .unwrap_or(Compression::None)
    }

    /// Bits of a palette, what `_lutN` in file names says.
    pub fn palette_bits(&self) -> Option<u32> {
        match *self {
            Compression::Palette(p) => Some(p.bits),
            _ => None,
        }
    }

    /// Bytes that `count` values take, tables and scales not counted.
    pub fn estimated_bytes(&self, count: u64) -> u64 {
        match *self {
            Compression::None => count * 2,
            Compression::Palette(p) => (count * u64::from(p.bits)).div_ceil(8 * p.vector.max(1) as u64),
            Compression::Linear { bits, .. } => (count * u64::from(bits)).div_ceil(8),
            Compression::Sparse { zeros, kept } => {
                let stay = (count as f64 * f64::from(1.0 - zeros)) as u64;
                let bits = match kept {
                    Kept::Half => 16,
                    Kept::Palette { bits, .. } | Kept::Linear { bits } => bits,
                };
                count.div_ceil(8) + (stay * u64::from(bits)).div_ceil(8)
            }
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Table::Half => Ok(()),
            Table::Int8 => f.write_str(":table=int8"),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Compression::None => f.write_str("none"),
            Compression::Palette(p) => {
                write!(f, "palette:{}", p.bits)?;
                if let Some(group) = p.group {
                    write!(f, ":group={group}")?;
                }
                if p.vector != 1 {
                    write!(f, ":vector={}", p.vector)?;
                }
                write!(f, "{}", p.table)?;
                match p.seed {
                    0 => Ok(()),
                    seed => write!(f, ":seed={seed}"),
                }
            }
            Compression::Linear { bits, block: None } => write!(f, "int{bits}"),
            Compression::Linear {
                bits,
                block: Some(block),
            } => write!(f, "int{bits}:block={block}"),
            Compression::Sparse { zeros, kept } => {
                write!(f, "sparse:{zeros}")?;
                match kept {
                    Kept::Half => Ok(()),
                    Kept::Palette { bits, table } => write!(f, "+palette:{bits}{table}"),
                    Kept::Linear { bits } => write!(f, "+int{bits}"),
                }
            }
        }
    }
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let how = parse(text).ok_or_else(|| Error::Option {
            option: "compression",
            problem: format!(
                "{text:?}; none, palette:BITS[:group=N][:vector=N][:table=int8][:seed=N], int8, int4[:block=N] and \
                 sparse:SHARE[+palette:BITS[:table=int8] | +int8 | +int4] are understood"
            ),
        })?;
        how.check()?;
        Ok(how)
    }
}

fn parse(text: &str) -> Option<Compression> {
    if let Some(rest) = text.strip_prefix("sparse:") {
        let (zeros, kept) = rest.split_once('+').unwrap_or((rest, ""));
        let kept = match kept {
            "" => Kept::Half,
            word => match parse(word)? {
                Compression::Palette(p) if p.vector == 1 && p.group.is_none() => Kept::Palette {
                    bits: p.bits,
                    table: p.table,
                },
                Compression::Linear { bits, block: None } => Kept::Linear { bits },
                _ => return None,
            },
        };
        return Some(Compression::Sparse {
            zeros: zeros.parse().ok()?,
            kept,
        });
    }
    let mut words = text.split(':');
    match words.next()? {
        "none" => words.next().is_none().then_some(Compression::None),
        "palette" => {
            let mut palette = Palette {
                bits: words.next()?.parse().ok()?,
                ..Palette::default()
            };
            for word in words {
                match word.split_once('=')? {
                    ("group", n) => palette.group = Some(n.parse().ok()?),
                    ("vector", n) => palette.vector = n.parse().ok()?,
                    ("seed", n) => palette.seed = n.parse().ok()?,
                    ("table", "int8") => palette.table = Table::Int8,
                    _ => return None,
                }
            }
            Some(Compression::Palette(palette))
        }
        integers @ ("int4" | "int8") => {
            let block = match words.next() {
                None => None,
                Some(word) => Some(word.strip_prefix("block=")?.parse().ok()?),
            };
            let bits = if integers == "int4" { 4 } else { 8 };
            words
                .next()
                .is_none()
                .then_some(Compression::Linear { bits, block })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_and_write_the_same() {
        for word in [
            "none",
            "palette:4",
            "palette:4:group=8",
            "palette:3:group=4:vector=2:table=int8:seed=9",
            "int8",
            "int4:block=32",
            "sparse:0.5",
            "sparse:0.25+palette:4",
            "sparse:0.25+palette:4:table=int8",
            "sparse:0.5+int4",
        ] {
            let how: Compression = word.parse().unwrap();
            assert_eq!(how.to_string(), word);
        }
    }

    #[test]
    fn words_with_wrong_numbers_are_refused() {
        for (word, expected) in [
            ("palette:5", "5 bits"),
            ("palette:4:group=0", "no channels"),
            ("palette:4:group=8:vector=3", "do not divide groups of 8"),
            ("int3", "understood"),
            ("int4:block=0", "no inputs"),
            ("sparse:1", "below 1"),
            ("sparse:0.5+palette:4:group=8", "understood"),
            ("pallete:4", "understood"),
        ] {
            let error = word.parse::<Compression>().unwrap_err().to_string();
            assert!(error.contains(expected), "{word}: {error}");
        }
    }

    #[test]
    fn shapes_that_groups_do_not_divide_do_not_fit() {
        let grouped = Compression::palette(4, Some(8));
        assert!(grouped.fits(&[16, 3]) && !grouped.fits(&[12, 3]) && !grouped.fits(&[16]));
        assert_eq!(grouped.relaxed(&[12, 3]), Compression::palette(4, None));
        assert_eq!(grouped.relaxed(&[12]), Compression::None);
        let blocks: Compression = "int4:block=32".parse().unwrap();
        assert!(!blocks.fits(&[8, 48, 1, 1]));
        assert_eq!(
            blocks.relaxed(&[8, 48]),
            Compression::Linear { bits: 4, block: None }
        );
        let vectors: Compression = "palette:4:group=8:vector=2".parse().unwrap();
        assert_eq!(vectors.relaxed(&[6, 3]).to_string(), "palette:4:vector=2");
        assert_eq!(vectors.relaxed(&[7, 3]).to_string(), "palette:4");
    }
}
