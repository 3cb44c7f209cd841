//! The language head's outputs: one tensor of logits, several to be joined by number, or the best token itself.

use candle_core::{CpuStorage, Storage, Tensor};
use candle_coreml_mil::FunctionDescription;
use half::slice::HalfFloatSliceExt;

use super::interface;
use crate::Error;
use crate::model::Prediction;

/// Names of outputs with all logits, where there are other outputs beside them.
const WHOLE: [&str; 3] = ["logits", "output_logits", "token_scores"];

/// How a head's outputs become a prediction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Head {
    /// These outputs hold logits, joined in this order.
    Logits(Vec<String>),
    /// `idx` holds the best index inside each part and `val` its logit; part `i` starts at token `starts[i]`.
    Argmax {
        /// The output with indices.
        idx: String,
        /// The output with logits.
        val: String,
        /// First token of each part.
        starts: Vec<u32>,
    },
}

/// What a bundle says about its vocabulary.
#[derive(Debug, Clone, Default)]
pub(crate) struct Vocabulary {
    /// Number of tokens.
    pub(crate) size: Option<usize>,
    /// Tokens of each part of a split head.
    pub(crate) part_sizes: Option<Vec<usize>>,
    /// Parts of a split head.
    pub(crate) parts: Option<usize>,
    /// Tokens of the tokenizer: what is left where neither bundle nor package says a size.
    pub(crate) tokens: Option<usize>,
}

impl Head {
    /// Reads the kind of head from the package `part`.
    ///
    /// # Errors
    /// [`Error::Wiring`] naming the outputs found.
    pub(crate) fn read(
        part: &str,
        function: &FunctionDescription,
        vocabulary: &Vocabulary,
    ) -> Result<Self, Error> {
        let wrong = |what| Error::Wiring {
            part: part.to_owned(),
            function: function.name.clone(),
            what,
        };
        let has = |name: &str| function.outputs.iter().any(|o| o.name == name);
        if has("argmax_idx") && has("argmax_val") {
            let idx = function.outputs.iter().find(|o| o.name == "argmax_idx");
            // Descriptions may leave the shapes of outputs out.
            let parts = idx
                .and_then(|o| interface::array(o).ok())
                .filter(|a| !a.shape.is_empty())
                .map(|a| a.shape.iter().product())
                .or(vocabulary.part_sizes.as_ref().map(Vec::len))
                .or(vocabulary.parts)
                .unwrap_or(1);
            let starts = part_starts(parts, vocabulary).map_err(wrong)?;
            return Ok(Head::Argmax {
                idx: "argmax_idx".to_owned(),
                val: "argmax_val".to_owned(),
                starts,
            });
        }
        if let [only] = function.outputs.as_slice() {
            return Ok(Head::Logits(vec![only.name.clone()]));
        }
        if let Some(whole) = WHOLE.into_iter().find(|name| has(name)) {
            return Ok(Head::Logits(vec![whole.to_owned()]));
        }
        let numbered: Option<Vec<(usize, &str)>> =
            function.outputs.iter().map(|o| number_of(&o.name)).collect();
        let mut numbered = numbered.filter(|n| !n.is_empty()).ok_or_else(|| {
            let found = interface::names(&function.outputs);
            wrong(format!("outputs `logits1`, `logits2`, ..., or `argmax_idx` and `argmax_val`, or one output are needed, found {found}"))
        })?;
        numbered.sort_unstable();
        Ok(Head::Logits(
            numbered.into_iter().map(|(_, name)| name.to_owned()).collect(),
        ))
    }

    /// Tokens of the vocabulary: what the head at the package `part` gives, cut to what the bundle says.
    ///
    /// # Errors
    /// [`Error::Wiring`] when neither says it.
    pub(crate) fn vocabulary(
        &self,
        part: &str,
        function: &FunctionDescription,
        vocabulary: &Vocabulary,
    ) -> Result<usize, Error> {
        let given: Option<usize> = match self {
            Head::Argmax { .. } => vocabulary.part_sizes.as_ref().map(|sizes| sizes.iter().sum()),
            Head::Logits(names) => {
                let last_dim = |name: &String| {
                    let output = function.outputs.iter().find(|o| &o.name == name)?;
                    interface::array(output).ok()?.shape.last().copied()
                };
                names.iter().map(last_dim).sum()
            }
        };
        match (given, vocabulary.size, vocabulary.tokens) {
            (Some(given), Some(size), _) => Ok(given.min(size)),
            (Some(size), None, _) | (None, Some(size), _) | (None, None, Some(size)) => Ok(size),
            (None, None, None) => Err(Error::Wiring {
                part: part.to_owned(),
                function: function.name.clone(),
                what: "the size of the vocabulary is in neither the head's outputs nor config.json nor meta.yaml"
                    .to_owned(),
            }),
        }
    }

    /// True for heads that give logits.
    pub(crate) fn gives_logits(&self) -> bool {
        matches!(self, Head::Logits(_))
    }

    /// Makes a prediction of the head's outputs; logits go through `buffer`, cut to `vocabulary` where that is less.
    ///
    /// # Errors
    /// [`Error::Wiring`] when an output is missing.
    pub(crate) fn predict<'a>(
        &self,
        part: &str,
        outputs: &[(String, Tensor)],
        vocabulary: usize,
        buffer: &'a mut Vec<f32>,
    ) -> Result<Prediction<'a>, Error> {
        match self {
            Head::Logits(names) => {
                buffer.clear();
                buffer.reserve(vocabulary);
                for (index, name) in names.iter().enumerate() {
                    // Packages mostly give their parts in order.
                    let in_order = outputs.get(index).filter(|(given, _)| given == name);
                    let tensor = match in_order {
                        Some((_, tensor)) => tensor,
                        None => find(part, outputs, name)?,
                    };
                    append(tensor, buffer)?;
                }
                if buffer.len() < vocabulary {
                    let what = format!("{} logits came, needed: {vocabulary}", buffer.len());
                    return Err(Error::Wiring {
                        part: part.to_owned(),
                        function: "outputs".to_owned(),
                        what,
                    });
                }
                buffer.truncate(vocabulary);
                Ok(Prediction::Logits(buffer))
            }
            Head::Argmax { idx, val, starts } => {
                buffer.clear();
                append(find(part, outputs, val)?, buffer)?;
                let indices = find(part, outputs, idx)?
                    .flatten_all()?
                    .to_dtype(candle_core::DType::I64)?;
                best_of_parts(buffer, &indices.to_vec1::<i64>()?, starts)
                    .filter(|&token| usize::try_from(token).is_ok_and(|t| t < vocabulary))
                    .map(Prediction::Token)
                    .ok_or_else(|| Error::Wiring {
                        part: part.to_owned(),
                        function: "outputs".to_owned(),
                        what: format!("`{idx}` gives no token below {vocabulary}"),
                    })
            }
        }
    }
}

/// First token of each part, from the sizes given or from equal parts.
fn part_starts(parts: usize, vocabulary: &Vocabulary) -> Result<Vec<u32>, String> {
    let sizes = match (&vocabulary.part_sizes, vocabulary.size) {
        (Some(sizes), _) if sizes.len() == parts => sizes.clone(),
        (None, Some(size)) if parts > 0 && size % parts == 0 => vec![size / parts; parts],
        (sizes, size) => {
            return Err(format!(
                "`argmax_idx` has {parts} parts; their sizes do not follow from lm_head_chunk_sizes {sizes:?} and vocab_size {size:?}"
            ));
        }
    };
    let mut next = 0u32;
    let mut starts = Vec::with_capacity(parts);
    for size in sizes {
        starts.push(next);
        let end = u32::try_from(size).ok().and_then(|size| next.checked_add(size));
        next = end.ok_or_else(|| format!("a part of {size} tokens passes the largest token id"))?;
    }
    Ok(starts)
}

/// The token of the part with the best logit, the first of equals; NaN never wins.
fn best_of_parts(values: &[f32], indices: &[i64], starts: &[u32]) -> Option<u32> {
    let mut best: Option<(f32, u32)> = None;
    for ((&value, &index), &start) in values.iter().zip(indices).zip(starts) {
        if !value.is_nan() && best.is_none_or(|(most, _)| value > most) {
            best = Some((value, start.checked_add(u32::try_from(index).ok()?)?));
        }
    }
    best.map(|(_, token)| token)
}

/// `logits12` is 12.
fn number_of(name: &str) -> Option<(usize, &str)> {
    let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    (digits.len() < name.len()).then_some(())?;
    Some((digits.parse().ok()?, name))
}

fn find<'a>(part: &str, outputs: &'a [(String, Tensor)], name: &str) -> Result<&'a Tensor, Error> {
    outputs
        .iter()
        .find(|(n, _)| n == name)
        .map(|(_, tensor)| tensor)
        .ok_or_else(|| Error::Wiring {
            part: part.to_owned(),
            function: "outputs".to_owned(),
            what: format!("the output `{name}` did not come"),
        })
}

/// Appends a tensor's elements as f32, straight from its memory where it is contiguous.
fn append(tensor: &Tensor, out: &mut Vec<f32>) -> Result<(), Error> {
    {
        let (storage, layout) = tensor.storage_and_layout();
        if let (Storage::Cpu(cpu), Some((from, to))) = (&*storage, layout.contiguous_offsets()) {
            match cpu {
                CpuStorage::F32(values) => {
                    out.extend_from_slice(&values[from..to]);
                    return Ok(());
                }
                CpuStorage::F16(values) => {
                    let start = out.len();
                    out.resize(start + (to - from), 0.0);
                    values[from..to].convert_to_f32_slice(&mut out[start..]);
                    return Ok(());
                }
                _ => {}
            }
        }
    }
    out.extend(
        tensor
            .flatten_all()?
            .to_dtype(candle_core::DType::F32)?
            .to_vec1::<f32>()?,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anemll::toy::function;
    use candle_core::{DType, Device};

    fn tensor(values: &[f32], dtype: DType) -> Tensor {
        Tensor::from_slice(values, (1, 1, values.len()), &Device::Cpu)
            .unwrap()
            .to_dtype(dtype)
            .unwrap()
    }

    #[test]
    fn split_logits_join_by_number_and_not_by_order() {
        let outputs: Vec<(String, &[usize])> = [10, 2, 1, 11]
            .map(|n| (format!("logits{n}"), &[1, 1, 2][..]))
            .to_vec();
        let borrowed: Vec<(&str, &[usize])> = outputs.iter().map(|(n, s)| (n.as_str(), *s)).collect();
        let head = Head::read("h", &function("main", &[], &borrowed), &Vocabulary::default()).unwrap();
        assert_eq!(
            head,
            Head::Logits(
                ["logits1", "logits2", "logits10", "logits11"]
                    .map(str::to_owned)
                    .to_vec()
            )
        );

        let parts = [
            ("logits10", [5., 6.]),
            ("logits2", [3., 4.]),
            ("logits1", [1., 2.]),
            ("logits11", [7., 8.]),
        ];
        for dtype in [DType::F16, DType::F32, DType::F64] {
            let given: Vec<_> = parts
                .iter()
                .map(|(n, v)| ((*n).to_owned(), tensor(v, dtype)))
                .collect();
            let mut buffer = Vec::new();
            let prediction = head.predict("h", &given, 7, &mut buffer).unwrap();
            assert_eq!(prediction, Prediction::Logits(&[1., 2., 3., 4., 5., 6., 7.]));
        }
    }

    #[test]
    fn a_single_output_of_any_name_is_logits() {
        let function = function("main", &[], &[("output_logits", &[1, 1, 3])]);
        let head = Head::read("h", &function, &Vocabulary::default()).unwrap();
        assert_eq!(head, Head::Logits(vec!["output_logits".to_owned()]));
    }

    #[test]
    fn the_best_part_gives_the_token() {
        let function = function("main", &[], &[("argmax_idx", &[3]), ("argmax_val", &[3])]);
        let uneven = Vocabulary {
            size: Some(10),
            part_sizes: Some(vec![5, 3, 2]),
            ..Vocabulary::default()
        };
        let head = Head::read("h", &function, &uneven).unwrap();
        for (values, indices, expected) in [
            ([1., 3., 2.], [4i32, 1, 0], 6),
            ([3., 3., 2.], [4, 1, 0], 4),
            ([f32::NAN, 1., 2.], [4, 1, 1], 9),
            ([f32::NEG_INFINITY; 3], [0, 0, 0], 0),
        ] {
            let idx = Tensor::from_slice(&indices, 3, &Device::Cpu).unwrap();
            let given = [
                ("argmax_val".to_owned(), tensor(&values, DType::F16)),
                ("argmax_idx".to_owned(), idx),
            ];
            let mut buffer = Vec::new();
            assert_eq!(
                head.predict("h", &given, 10, &mut buffer).unwrap(),
                Prediction::Token(expected)
            );
        }
        let even = Vocabulary {
            size: Some(12),
            ..Vocabulary::default()
        };
        let Head::Argmax { starts, .. } = Head::read("h", &function, &even).unwrap() else {
            panic!("argmax")
        };
        assert_eq!(starts, [0, 4, 8]);
    }

    #[test]
    fn heads_that_cannot_be_read_say_what_they_have() {
        let vocabulary = Vocabulary {
            size: Some(10),
            ..Vocabulary::default()
        };
        for (outputs, expected) in [
            (&[("a", &[1][..]), ("b", &[1])][..], "found `a`, `b`"),
            (&[], "found none"),
            (
                &[("argmax_idx", &[3]), ("argmax_val", &[3])],
                "`argmax_idx` has 3 parts",
            ),
        ] {
            let error = Head::read("h", &function("main", &[], outputs), &vocabulary)
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{error}");
        }
        let head = Head::Logits(vec!["l".to_owned()]);
        let missing = head
            .predict("h", &[], 1, &mut Vec::new())
            .unwrap_err()
            .to_string();
        assert!(missing.contains("`l` did not come"), "{missing}");
        let short = [("l".to_owned(), tensor(&[1.], DType::F16))];
        assert!(head.predict("h", &short, 2, &mut Vec::new()).is_err());
    }
}
