//! Tests that cannot pass off the Mac, or anywhere, and why.

/// Tests that cannot pass off the Mac, or anywhere: parts of the name, of the reason, and why.
pub struct Exception {
    pub words: &'static [&'static str],
    pub reason: &'static str,
    pub why: &'static str,
}

impl Exception {
    pub fn fits(&self, test: &str, reason: &str) -> bool {
        reason.contains(self.reason) && self.words.iter().all(|w| test.contains(w))
    }
}

const UNEQUAL: &str = "Not equal to tolerance";

pub const EXCEPTIONS: &[Exception] = &[
    Exception {
        words: &["test_recurrent.py", "precision='fp32'", "float16"],
        reason: UNEQUAL,
        why: "the expectation is computed from weights before they are rounded to the float16 of the program, and compared \
              at 1e-4; neither rounding every result nor computing in 32 bits throughout meets it",
    },
    Exception {
        words: &["test_conv.py", "precision='fp32'", "float16"],
        reason: UNEQUAL,
        why: "the expectation is computed from weights and inputs before they are rounded to the float16 of the program: a \
              unit in the last place of float16 is more than the tolerance",
    },
    Exception {
        words: &["test_normalization.py", "precision='fp32'", "float16"],
        reason: UNEQUAL,
        why: "the expectation has more than float16, or sums in float16; a unit in the last place is more than the tolerance",
    },
    Exception {
        words: &["test_image_resizing.py", "precision='fp32'", "float16"],
        reason: UNEQUAL,
        why: "the expectation is computed from coordinates before they are rounded to the float16 of the program",
    },
    Exception {
        words: &["test_image_resizing.py", "TestCropResize", "precision='fp32'"],
        reason: "0.0009",
        why: "7.899 is written where interpolation gives 7.9: a float16 of 7.898 was read off",
    },
    Exception {
        words: &["test_compression.py", "precision='fp32'", "lut_dtype=fp16"],
        reason: UNEQUAL,
        why: "the program adds in float32, the expectation is added by numpy in float16 and rounded",
    },
];
