//! The elementwise operations and their scalar definitions, which the vector forms are tested against.

/// Functions of one `f32`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)] // the parameters carry MIL's names and are defined by the formula of their row
pub enum Unary {
    /// `|x|`
    Abs,
    Acos,
    Acosh,
    Asin,
    Asinh,
    Atan,
    Atanh,
    Ceil,
    /// `min(max(x, lo), hi)`
    Clip {
        lo: f32,
        hi: f32,
    },
    /// `min(max(x, 0) + alpha * min(x, 0), beta)`
    ClampedRelu {
        alpha: f32,
        beta: f32,
    },
    Cos,
    Cosh,
    /// `x` for `x > 0`, else `alpha * (exp(x) - 1)`
    Elu {
        alpha: f32,
    },
    Erf,
    Exp,
    Exp2,
    Floor,
    /// `x * 0.5 * (1 + erf(x / sqrt(2)))`
    GeluExact,
    /// `x * 0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`
    GeluTanh,
    /// `x * sigmoid(1.702 * x)`
    GeluSigmoid,
    /// `x * min(max(alpha * x + beta, 0), 1)` for `x >= from`, else 0
    HardSwish {
        from: f32,
        alpha: f32,
        beta: f32,
    },
    /// The value itself.
    Identity,
    /// `1 / (x + eps)`
    Inverse {
        eps: f32,
    },
    /// `x` for `x > 0`, else `alpha * x`
    LeakyRelu {
        alpha: f32,
    },
    /// `alpha * x + beta`
    LinearActivation {
        alpha: f32,
        beta: f32,
    },
    /// `ln(x + eps)`
    Log {
        eps: f32,
    },
    /// `1 - x` for 0 and 1: 1 where `x` is 0, else 0
    LogicalNot,
    Neg,
    /// `max(x, 0)`
    Relu,
    /// `min(max(x, 0), 6)`
    Relu6,
    /// To the nearest integer, halves to the even one.
    Round,
    /// `1 / sqrt(x + eps)`
    Rsqrt {
        eps: f32,
    },
    /// `alpha * tanh(beta * x)`
    ScaledTanh {
        alpha: f32,
        beta: f32,
    },
    Sigmoid,
    /// `min(max(alpha * x + beta, 0), 1)`
    SigmoidHard {
        alpha: f32,
        beta: f32,
    },
    /// -1, 0 or 1; NaN stays.
    Sign,
    /// `x * sigmoid(x)`
    Silu,
    Sin,
    Sinh,
    /// `ln(1 + exp(x))`
    Softplus,
    /// `x / (1 + |x|)`
    Softsign,
    Sqrt,
    Square,
    Tan,
    Tanh,
    /// `max(x, alpha)`
    Threshold {
        alpha: f32,
    },
    /// `x` for `x >= alpha`, else 0
    ThresholdedRelu {
        alpha: f32,
    },
}

impl Unary {
    /// The value for one `x`, by the standard library's functions.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Unary::Abs => x.abs(),
            Unary::Acos => x.acos(),
            Unary::Acosh => x.acosh(),
            Unary::Asin => x.asin(),
            Unary::Asinh => x.asinh(),
            Unary::Atan => x.atan(),
            Unary::Atanh => x.atanh(),
            Unary::Ceil => x.ceil(),
            Unary::Clip { lo, hi } => x.max(lo).min(hi),
            Unary::ClampedRelu { alpha, beta } => (x.max(0.0) + alpha * x.min(0.0)).min(beta),
            Unary::Cos => x.cos(),
            Unary::Cosh => x.cosh(),
            Unary::Elu { alpha } => x.max(0.0) + alpha * x.min(0.0).exp_m1(),
            Unary::Erf => erf(x),
            Unary::Exp => x.exp(),
            Unary::Exp2 => x.exp2(),
            Unary::Floor => x.floor(),
            Unary::GeluExact => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
            Unary::GeluTanh => 0.5 * x * (1.0 + (GELU_SLOPE * (x + GELU_CUBIC * x * x * x)).tanh()),
            Unary::GeluSigmoid => x * sigmoid(GELU_SIGMOID * x),
            Unary::HardSwish { from, .. } if x < from => 0.0,
            Unary::HardSwish { alpha, beta, .. } => x * (alpha * x + beta).clamp(0.0, 1.0),
            Unary::Identity => x,
            Unary::Inverse { eps } => 1.0 / (x + eps),
            Unary::LeakyRelu { alpha } => x.max(0.0) + alpha * x.min(0.0),
            Unary::LinearActivation { alpha, beta } => alpha * x + beta,
            Unary::Log { eps } => (x + eps).ln(),
            Unary::LogicalNot => f32::from(x == 0.0),
            Unary::Neg => -x,
            Unary::Relu => x.max(0.0),
            Unary::Relu6 => x.clamp(0.0, 6.0),
            Unary::Round => x.round_ties_even(),
            Unary::Rsqrt { eps } => 1.0 / (x + eps).sqrt(),
            Unary::ScaledTanh { alpha, beta } => alpha * (beta * x).tanh(),
            Unary::Sigmoid => sigmoid(x),
            Unary::SigmoidHard { alpha, beta } => (alpha * x + beta).clamp(0.0, 1.0),
            Unary::Sign if x == 0.0 || x.is_nan() => x,
            Unary::Sign => x.signum(),
            Unary::Silu => x * sigmoid(x),
            Unary::Sin => x.sin(),
            Unary::Sinh => x.sinh(),
            Unary::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
            Unary::Softsign => x / (1.0 + x.abs()),
            Unary::Sqrt => x.sqrt(),
            Unary::Square => x * x,
            Unary::Tan => x.tan(),
            Unary::Tanh => x.tanh(),
            Unary::Threshold { alpha } => x.max(alpha),
            Unary::ThresholdedRelu { alpha } => {
                if x >= alpha {
                    x
                } else {
                    0.0
                }
            }
        }
    }
}

pub(crate) const GELU_SLOPE: f32 = 0.797_884_6;
pub(crate) const GELU_CUBIC: f32 = 0.044_715;
pub(crate) const GELU_SIGMOID: f32 = 1.702;

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The error function by its Maclaurin series or, further out, the continued fraction of its complement.
fn erf(x: f32) -> f32 {
    let a = f64::from(x).abs();
    let value = if a.is_nan() {
        return x;
    } else if a < 2.5 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-17 {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else if a > 6.0 {
        1.0
    } else {
        let fraction = (1..60).rev().fold(a, |tail, n| a + f64::from(n) / 2.0 / tail);
        1.0 - (-a * a).exp() / fraction * std::f64::consts::FRAC_2_SQRT_PI / 2.0
    };
    (value as f32).copysign(x)
}

/// Functions of two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`
    Div,
    /// The largest integer not above `a / b`.
    FloorDiv,
    /// `a - b * floor(a / b)`: the sign follows `b`.
    Mod,
    /// `a` to the power `b`.
    Pow,
    /// The greater one.
    Max,
    /// The lesser one.
    Min,
    /// `(a - b)` squared.
    SquaredDifference,
}

impl Binary {
    /// The value for one pair.
    pub fn apply(self, a: f32, b: f32) -> f32 {
        match self {
            Binary::Add => a + b,
            Binary::Sub => a - b,
            Binary::Mul => a * b,
            Binary::Div => a / b,
            Binary::FloorDiv => (a / b).floor(),
            Binary::Mod => a - b * (a / b).floor(),
            Binary::Pow => a.powf(b),
            Binary::Max => a.max(b),
            Binary::Min => a.min(b),
            Binary::SquaredDifference => (a - b) * (a - b),
        }
    }

    /// The value for one pair of integers, wrapping at the ends of the range; a division by zero gives 0.
    pub fn apply_i32(self, a: i32, b: i32) -> i32 {
        match self {
            Binary::Add => a.wrapping_add(b),
            Binary::Sub => a.wrapping_sub(b),
            Binary::Mul => a.wrapping_mul(b),
            Binary::Div if b == 0 => 0,
            Binary::Div => a.wrapping_div(b),
            Binary::FloorDiv | Binary::Mod if b == 0 => 0,
            Binary::FloorDiv => {
                let quotient = a.wrapping_div(b);
                if a.wrapping_rem(b) != 0 && (a < 0) != (b < 0) {
                    quotient - 1
                } else {
                    quotient
                }
            }
            Binary::Mod => {
                let rest = a.wrapping_rem(b);
                if rest != 0 && (rest < 0) != (b < 0) {
                    rest + b
                } else {
                    rest
                }
            }
            Binary::Pow => pow_i32(a, b),
            Binary::Max => a.max(b),
            Binary::Min => a.min(b),
            Binary::SquaredDifference => a.wrapping_sub(b).wrapping_mul(a.wrapping_sub(b)),
        }
    }
}

fn pow_i32(base: i32, exponent: i32) -> i32 {
    match (u32::try_from(exponent), base) {
        (Ok(exponent), _) => base.wrapping_pow(exponent),
        (_, 1) => 1,
        (_, -1) => 1 - 2 * (exponent & 1),
        _ => 0,
    }
}

/// Comparisons; the result is 1 where they hold and 0 elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// `a == b`
    Eq,
    /// `a != b`
    Ne,
    /// `a < b`
    Lt,
    /// `a <= b`
    Le,
    /// `a > b`
    Gt,
    /// `a >= b`
    Ge,
}

impl Compare {
    /// Whether the comparison holds.
    pub fn apply<T: PartialOrd>(self, a: T, b: T) -> bool {
        match self {
            Compare::Eq => a == b,
            Compare::Ne => a != b,
            Compare::Lt => a < b,
            Compare::Le => a <= b,
            Compare::Gt => a > b,
            Compare::Ge => a >= b,
        }
    }
}

/// Logic on integers taken as false (0) or true (anything else).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logical {
    /// Both.
    And,
    /// At least one.
    Or,
    /// Exactly one.
    Xor,
}

impl Logical {
    /// The value for one pair.
    pub fn apply(self, a: i32, b: i32) -> bool {
        match self {
            Logical::And => (a != 0) & (b != 0),
            Logical::Or => (a != 0) | (b != 0),
            Logical::Xor => (a != 0) ^ (b != 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_has_its_known_values() {
        let cases = [
            (0.0, 0.0),
            (0.5, 0.520_499_9),
            (1.0, 0.842_700_8),
            (2.0, 0.995_322_3),
            (3.0, 0.999_977_9),
        ];
        for (x, expected) in cases {
            assert!((erf(x) - expected).abs() < 1e-7, "{x}: {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
    }

    #[test]
    fn integer_division_floors_and_survives_its_edges() {
        let cases = [
            (7, 2, 3, 1),
            (-7, 2, -4, 1),
            (7, -2, -4, -1),
            (-7, -2, 3, -1),
            (5, 0, 0, 0),
            (i32::MIN, -1, i32::MIN, 0),
        ];
        for (a, b, quotient, rest) in cases {
            assert_eq!(Binary::FloorDiv.apply_i32(a, b), quotient, "{a} // {b}");
            assert_eq!(Binary::Mod.apply_i32(a, b), rest, "{a} % {b}");
        }
    }
}
