//! Recurrent layers over sequences.

use crate::elementwise::Unary;
use crate::linear::{Epilogue, linear};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut};
use crate::weights::Weights;

/// The four parts of an LSTM's gate vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// What of the candidate enters the cell.
    Input,
    /// What of the cell stays.
    Forget,
    /// What of the cell is shown.
    Output,
    /// The candidate.
    Cell,
}

/// One direction of an LSTM of hidden size H over inputs of size I.
#[derive(Debug, Clone, Copy)]
pub struct Lstm<'a> {
    /// `[4 H, I]`.
    pub input: &'a Weights,
    /// `[4 H, H]`.
    pub hidden: &'a Weights,
    /// `4 H` values.
    pub bias: Option<&'a [f32]>,
    /// Which gate each quarter of the rows computes.
    pub order: [Gate; 4],
    /// Of the input, forget and output gates.
    pub gates: Unary,
    /// Of the candidate.
    pub cell: Unary,
    /// Of the cell before it is shown.
    pub output: Unary,
    /// Limits the cell to `-clip..clip`.
    pub clip: Option<f32>,
    /// Weights of the cell in the input, forget and output gate, H values each.
    pub peephole: Option<[&'a [f32]; 3]>,
    /// How the sequence is walked.
    pub walk: Walk,
}

/// How a recurrent layer walks its sequence, and where its outputs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// From the first step to the last.
    Forward,
    /// From the last step to the first; the first output is that of the last step.
    Reverse,
    /// From the last step to the first; outputs stand where their inputs are, as in the second half of a layer that goes
    /// both ways.
    Backward,
}

impl Walk {
    /// Of `steps` steps: where the input of number `step` is, and where its output goes.
    pub fn places(self, step: usize, steps: usize) -> (usize, usize) {
        match self {
            Walk::Forward => (step, step),
            Walk::Reverse => (steps - 1 - step, step),
            Walk::Backward => (steps - 1 - step, steps - 1 - step),
        }
    }
}

/// Runs `layer` over `x` `[T, B, I]` (steps, batch, input) from the state in `hidden` and `cell` (`[B, H]` dense),
/// leaves the last state there, and writes every step's hidden state to `y` `[T, B, H]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn lstm(
    pool: &Pool,
    x: View<'_, f32>,
    layer: &Lstm<'_>,
    (hidden, cell): (&mut [f32], &mut [f32]),
    mut y: ViewMut<'_, f32>,
    scratch: &mut Scratch,
) {
    let &[steps, batch, _] = x.shape() else {
        panic!("lstm takes rank 3")
    };
    let size = layer.hidden.cols();
    assert_eq!(y.shape(), [steps, batch, size], "lstm: output shape");
    assert!(
        hidden.len() == batch * size && cell.len() == hidden.len(),
        "lstm: state size"
    );
    let wide = 4 * size;
    let mut gates = vec![0.0; steps * batch * wide];
    project(pool, x, layer, &mut gates, scratch);
    let mut update = vec![0.0; batch * wide];
    let ys = [y.strides()[0], y.strides()[1], y.strides()[2]];
    for step in 0..steps {
        let (t, place) = layer.walk.places(step, steps);
        let shapes = ([batch, size], [batch, wide]);
        let strides = ([size as isize, 1], [wide as isize, 1]);
        let before = View::new(hidden, 0, &shapes.0, &strides.0).expect("a dense view of the state");
        let out =
            ViewMut::new(&mut update, 0, &shapes.1, &strides.1).expect("a dense view of its own buffer");
        linear(pool, before, layer.hidden, out, &Epilogue::default(), scratch);
        for b in 0..batch {
            let row = &gates[(t * batch + b) * wide..(t * batch + b + 1) * wide];
            let (hidden, cell) = (
                &mut hidden[b * size..(b + 1) * size],
                &mut cell[b * size..(b + 1) * size],
            );
            layer.step(row, &update[b * wide..(b + 1) * wide], hidden, cell);
            for (i, value) in hidden.iter().enumerate() {
                let at = place as isize * ys[0] + b as isize * ys[1] + i as isize * ys[2];
                // SAFETY: inside the shape `[steps, batch, size]` of `y`, checked above.
                unsafe { *y.ptr().wrapping_offset(at) = *value };
            }
        }
    }
}

/// The part of the gates that comes from the input, for all steps at once.
fn project(pool: &Pool, x: View<'_, f32>, layer: &Lstm<'_>, gates: &mut [f32], scratch: &mut Scratch) {
    let (steps, batch, wide) = (x.shape()[0], x.shape()[1], layer.input.rows());
    assert_eq!(
        gates.len(),
        steps * batch * wide,
        "lstm: input and hidden weights"
    );
    let mut dense = vec![0.0; x.len()];
    let copy_strides = crate::strided::dense_strides(x.shape());
    let target =
        ViewMut::new(&mut dense, 0, x.shape(), &copy_strides[..3]).expect("a dense view of its own buffer");
    crate::copy::copy(pool, x, target);
    let (from, to) = ([steps * batch, x.shape()[2]], [steps * batch, wide]);
    let (from_strides, to_strides) = ([from[1] as isize, 1], [wide as isize, 1]);
    let x = View::new(&dense, 0, &from, &from_strides).expect("a dense view of its own buffer");
    let out = ViewMut::new(gates, 0, &to, &to_strides).expect("a dense view of its own buffer");
    linear(
        pool,
        x,
        layer.input,
        out,
        &Epilogue {
            bias: layer.bias,
            ..Epilogue::default()
        },
        scratch,
    );
}

impl Lstm<'_> {
    fn step(&self, from_input: &[f32], from_hidden: &[f32], hidden: &mut [f32], cell: &mut [f32]) {
        let size = hidden.len();
        let place = |gate: Gate| {
            self.order
                .iter()
                .position(|g| *g == gate)
                .expect("each gate is in the order once")
        };
        let [input, forget, output, candidate] =
            [Gate::Input, Gate::Forget, Gate::Output, Gate::Cell].map(|gate| place(gate) * size);
        for i in 0..size {
            let sum = |gate: usize| from_input[gate + i] + from_hidden[gate + i];
            let peep = |n: usize, cell: f32| self.peephole.map_or(0.0, |weights| weights[n][i] * cell);
            let enter = self.gates.apply(sum(input) + peep(0, cell[i]));
            let stay = self.gates.apply(sum(forget) + peep(1, cell[i]));
            let mut value = stay * cell[i] + enter * self.cell.apply(sum(candidate));
            if let Some(clip) = self.clip {
                value = value.max(-clip).min(clip);
            }
            cell[i] = value;
            hidden[i] = self.gates.apply(sum(output) + peep(2, value)) * self.output.apply(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_step_follows_the_equations_in_any_gate_order() {
        let rows = [0.5_f32, -0.25, 2.0, 1.0];
        let bytes = |values: &[f32]| bytemuck::cast_slice::<f32, u8>(values).to_vec().into();
        let input = Weights::from_f32(4, 1, bytes(&rows)).unwrap();
        let hidden = Weights::from_f32(4, 1, bytes(&[0.0; 4])).unwrap();
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let layer = Lstm {
            input: &input,
            hidden: &hidden,
            bias: None,
            order: [Gate::Forget, Gate::Cell, Gate::Output, Gate::Input],
            gates: Unary::Sigmoid,
            cell: Unary::Tanh,
            output: Unary::Tanh,
            clip: None,
            peephole: None,
            walk: Walk::Forward,
        };
        let (mut h, mut c, mut y) = ([0.0], [0.5], [0.0]);
        let x = View::new(&[2.0], 0, &[1, 1, 1], &[1, 1, 1]).unwrap();
        let out = ViewMut::new(&mut y, 0, &[1, 1, 1], &[1, 1, 1]).unwrap();
        lstm(
            &Pool::new(1),
            x,
            &layer,
            (&mut h, &mut c),
            out,
            &mut Scratch::new(),
        );
        let cell = sigmoid(1.0) * 0.5 + sigmoid(2.0) * (-0.5_f32).tanh();
        assert!((c[0] - cell).abs() < 1e-6 && (h[0] - sigmoid(4.0) * cell.tanh()).abs() < 1e-6);
        assert_eq!(y, h);
    }
}
