//! Floating-point numbers of MIL text: C99 hexadecimal notation, always normalised to a leading 1.

/// The number that hexadecimal or decimal digits stand for; `None` when they do not.
///
/// Up to 16 hexadecimal digits are taken, the result is exact where `f64` can hold it.
pub(super) fn parse_float(word: &str) -> Option<f64> {
    let (negative, digits) = match word.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, word.strip_prefix('+').unwrap_or(word)),
    };
    let magnitude = match digits {
        "inf" | "infinity" => f64::INFINITY,
        "nan" => f64::NAN,
        _ => match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
            Some(hex) => parse_hex(hex)?,
            // The standard parser would also take words such as `Infinity`.
            None if digits.starts_with(|c: char| c.is_ascii_digit()) => digits.parse().ok()?,
            None => return None,
        },
    };
    Some(if negative { -magnitude } else { magnitude })
}

fn parse_hex(hex: &str) -> Option<f64> {
    let (mantissa, exponent) = match hex.split_once(['p', 'P']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (hex, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = whole.len() + fraction.len();
    if !(1..=16).contains(&digits) || whole.starts_with('+') || fraction.starts_with('+') {
        return None;
    }
    let bits = u64::from_str_radix(&format!("{whole}{fraction}"), 16).ok()?;
    let exponent = exponent.checked_sub(4 * i32::try_from(fraction.len()).ok()?)?;
    Some(scale(bits as f64, exponent))
}

/// `x * 2^exponent`, rounded once: all steps but the last stay in the normal range.
fn scale(x: f64, exponent: i32) -> f64 {
    let mut x = x;
    let mut left = exponent.clamp(-3000, 3000);
    while left > 900 {
        x *= 2f64.powi(900);
        left -= 900;
    }
    while left < -1000 {
        x *= 2f64.powi(-900);
        left += 900;
    }
    x * 2f64.powi(left)
}

/// Appends the number as Apple's compiler writes it: `0x1.8p-3`, `-0x0p+0`, `inf`.
pub(super) fn print_float(x: f64, out: &mut String) {
    use std::fmt::Write;
    let sign = if x.is_sign_negative() { "-" } else { "" };
    let written = if x.is_infinite() {
        write!(out, "{sign}inf")
    } else if x == 0.0 {
        write!(out, "{sign}0x0p+0")
    } else {
        let (fraction, exponent) = normalised(x);
        let digits = format!("{fraction:013x}");
        let digits = digits.trim_end_matches('0');
        let point = if digits.is_empty() { "" } else { "." };
        write!(out, "{sign}0x1{point}{digits}p{exponent:+}")
    };
    written.expect("writing to a string cannot fail");
}

/// The 52 bits after the leading 1, and the exponent of two, of a finite number other than zero.
fn normalised(x: f64) -> (u64, i32) {
    const FRACTION: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    let exponent = (bits >> 52 & 0x7ff) as i32;
    let fraction = bits & FRACTION;
    if exponent > 0 {
        return (fraction, exponent - 1023);
    }
    let shift = fraction.leading_zeros() as i32 - 11;
    (fraction << shift & FRACTION, -1022 - shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(x: f64) -> String {
        let mut out = String::new();
        print_float(x, &mut out);
        out
    }

    #[test]
    fn numbers_are_written_as_the_compiler_does() {
        let cases = [
            (0.0, "0x0p+0"),
            (-0.0, "-0x0p+0"),
            (1.0, "0x1p+0"),
            (-2.5, "-0x1.4p+1"),
            (2f64.powi(-24), "0x1p-24"),
            (f64::from(f32::from_bits(1)), "0x1p-149"),
            (f64::from_bits(1), "0x1p-1074"),
            (f64::from_bits(3), "0x1.8p-1073"),
            (f64::MAX, "0x1.fffffffffffffp+1023"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (x, text) in cases {
            assert_eq!(printed(x), text);
            assert_eq!(parse_float(text).map(f64::to_bits), Some(x.to_bits()), "{text}");
        }
    }

    #[test]
    fn forms_that_are_not_normalised_are_read_too() {
        for (text, x) in [
            ("0x1.010102p-8", f64::from(0x1010102) / 2f64.powi(32)),
            ("0x18p+0", 24.0),
            ("0X1.8P1", 3.0),
            ("0x.8p0", 0.5),
            ("1.5e-3", 1.5e-3),
            ("7", 7.0),
            ("0x1p+5000", f64::INFINITY),
            ("0x1p-5000", 0.0),
        ] {
            assert_eq!(parse_float(text), Some(x), "{text}");
        }
        for text in [
            "",
            "-",
            "0x",
            "0xp1",
            "0x1.p",
            "0x1pz",
            "0x+1p0",
            "0x1.+1p0",
            "0x12345678123456789p0",
            "Infinity",
            "1.2.3",
        ] {
            assert_eq!(parse_float(text), None, "{text}");
        }
    }
}
