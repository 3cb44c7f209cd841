//! A model opened for prediction: functions, plans for the input shapes seen, workspaces for the threads that run.

use crate::Error;
use crate::array::{Array, OwnedArray};
use crate::explain::Explanation;
use crate::graph::Graph;
use crate::layout::Shape;
use crate::lower::{LowerOptions, lower};
use crate::passes;
use crate::plan::Plan;
use crate::run::{Observer, RunOptions, Workspace};
use crate::state::{State, StateBuffer};
use candle_coreml_kernels::Pool;
use candle_coreml_mil::{self as mil, Dim, ValueType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Arithmetic of a prediction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Numerics {
    /// Everything computed in 32-bit floats; fp16 only where outputs are given.
    #[default]
    Default,
    /// Results of fp16 operations rounded to fp16, each one; no operations merged.
    Faithful,
    /// As `Default`, with bf16 matrix units where the machine has them.
    Fast,
}

/// How a model is opened.
#[derive(Clone)]
pub struct Options {
    /// Arithmetic.
    pub numerics: Numerics,
    /// Merge and rewrite operations; results stay within their tolerance.
    pub passes: bool,
    /// Give fp16 outputs as 32-bit floats, not rounded: for models that feed each other.
    pub wide_outputs: bool,
    /// Threads; the process's shared pool when absent.
    pub pool: Option<Arc<Pool>>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let threads = self.pool.as_ref().map(|p| p.threads());
        f.debug_struct("Options")
            .field("numerics", &self.numerics)
            .field("passes", &self.passes)
            .field("wide_outputs", &self.wide_outputs)
            .field("threads", &threads)
            .finish()
    }
}

impl Default for Options {
    fn default() -> Self {
        Options {
            numerics: Numerics::Default,
            passes: true,
            wide_outputs: false,
            pool: None,
        }
    }
}

/// An ML Program opened for prediction. Cheap to clone, shared between threads; all functions share the file's weights.
#[derive(Clone)]
pub struct Model {
    shared: Arc<Shared>,
    function: usize,
}

struct Shared {
    file: Arc<mil::Model>,
    options: Options,
    pool: Arc<Pool>,
    plans: Mutex<HashMap<PlanKey, Arc<Ready>>>,
}

type PlanKey = (usize, Vec<Shape>);

/// A plan and the workspaces of runs that ended.
struct Ready {
    plan: Plan,
    idle: Mutex<Vec<Workspace>>,
}

/// Plans kept for different input shapes; beyond that the cache starts anew.
const PLANS_KEPT: usize = 64;

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("name", &self.shared.file.name())
            .field("function", &self.name())
            .finish()
    }
}

impl Model {
    /// Opens `function` of a file, its default function when `None`.
    ///
    /// # Errors
    /// When the file holds no ML Program, has no such function, or uses operations that are missing ([`Error::Unsupported`]
    /// lists all of them).
    pub fn load(file: Arc<mil::Model>, function: Option<&str>, options: Options) -> Result<Model, Error> {
        let Some(program) = file.program() else {
            let kind = match &file.description().kind {
                mil::ModelKind::Other(kind) => kind.clone(),
                mil::ModelKind::Program => "program without operations".into(),
            };
            return Err(Error::NotAProgram { kind });
        };
        let default = file.description().default_function.as_str();
        let name = function.unwrap_or(if default.is_empty() { "main" } else { default });
        let function = find(program, name)?;
        let pool = options.pool.clone().unwrap_or_else(Pool::shared);
        let shared = Shared {
            file,
            options,
            pool,
            plans: Mutex::default(),
        };
        let model = Model {
            shared: Arc::new(shared),
            function,
        };
        model.prepare()?;
        Ok(model)
    }

    /// The same file with another function.
    ///
    /// # Errors
    /// When there is no such function or it cannot be lowered.
    pub fn with_function(&self, name: &str) -> Result<Model, Error> {
        let function = find(self.program(), name)?;
        let model = Model {
            shared: self.shared.clone(),
            function,
        };
        model.prepare()?;
        Ok(model)
    }

    /// Name of the function.
    pub fn name(&self) -> &str {
        &self.function().name
    }

    /// The file.
    pub fn file(&self) -> &Arc<mil::Model> {
        &self.shared.file
    }

    fn program(&self) -> &mil::Program {
        self.shared
            .file
            .program()
            .expect("checked when the model was loaded")
    }

    fn function(&self) -> &mil::Function {
        &self.program().functions[self.function]
    }

    /// Lowers the function for its default shapes, so that what is unsupported fails here.
    fn prepare(&self) -> Result<(), Error> {
        let shapes = self.default_shapes();
        match shapes {
            Some(shapes) => self.ready(shapes).map(|_| ()),
            None => {
                let missing = crate::lower::missing_ops(&self.function().body);
                if missing.is_empty() {
                    return Ok(());
                }
                Err(Error::Unsupported {
                    ops: missing.into_keys().collect(),
                })
            }
        }
    }

    /// Shapes of all inputs by declaration or default, in the order of the function's parameters; `None` where the file gives
    /// none.
    pub fn default_shapes(&self) -> Option<Vec<Shape>> {
        let description = self.shared.file.description();
        let named = description.functions.iter().find(|f| f.name == self.name());
        self.tensor_inputs()
            .map(|input| {
                let fixed = input.ty.tensor().and_then(|t| t.fixed_shape());
                let default = named.and_then(|f| f.inputs.iter().find(|i| i.name == input.name));
                let default = default.and_then(|f| match &f.ty {
                    mil::FeatureType::MultiArray(a) if !a.shape.is_empty() => Some(a.shape.clone()),
                    _ => None,
                });
                fixed.or(default).map(Into::into)
            })
            .collect()
    }

    fn tensor_inputs(&self) -> impl Iterator<Item = &mil::NamedType> {
        self.function()
            .inputs
            .iter()
            .filter(|i| !matches!(i.ty, ValueType::State(_)))
    }

    /// A new state for this function, zeroed. Without states in the function it is empty.
    pub fn make_state(&self) -> State {
        let declared: Vec<_> = self
            .function()
            .inputs
            .iter()
            .filter(|i| matches!(i.ty, ValueType::State(_)))
            .filter_map(|i| {
                i.ty.tensor()
                    .and_then(|t| Some((i.name.clone(), t.dtype, t.fixed_shape()?.into())))
            })
            .collect();
        State::new(&declared)
    }

    /// The graph for the given input shapes, for reports; passes applied as the model was opened.
    ///
    /// # Errors
    /// As for predictions with inputs of these shapes.
    pub fn graph(&self, shapes: &[Shape]) -> Result<Graph, Error> {
        let inputs: HashMap<&str, Shape> = self
            .tensor_inputs()
            .map(|i| i.name.as_str())
            .zip(shapes.iter().cloned())
            .collect();
        let faithful = self.shared.options.numerics == Numerics::Faithful;
        let options = LowerOptions {
            faithful,
            pool: self.shared.pool.clone(),
        };
        let graph = lower(&self.shared.file, self.function(), &inputs, &options)?;
        Ok(if self.shared.options.passes && !faithful {
            passes::optimize(graph)
        } else {
            passes::clean(graph)
        })
    }

    /// The plan for the default shapes, step by step.
    ///
    /// # Errors
    /// When an input has no default shape, or as for predictions.
    pub fn explain(&self) -> Result<Explanation, Error> {
        let shapes = self.default_shapes().ok_or_else(|| Error::Value {
            what: "input",
            name: self.name().into(),
            message: "the shapes are flexible and the file gives no default".into(),
        })?;
        Ok(Explanation::of(self.name(), &self.ready(shapes)?.plan))
    }

    fn ready(&self, shapes: Vec<Shape>) -> Result<Arc<Ready>, Error> {
        let key = (self.function, shapes);
        let mut plans = self.shared.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ready) = plans.get(&key) {
            return Ok(ready.clone());
        }
        let graph = self.graph(&key.1)?;
        let plan = Plan::new(&graph)?;
        tracing::debug!(
            function = self.name(),
            steps = plan.steps.len(),
            arena_bytes = plan.arena_bytes(),
            "planned"
        );
        let ready = Arc::new(Ready {
            plan,
            idle: Mutex::default(),
        });
        if plans.len() >= PLANS_KEPT {
            plans.clear();
        }
        plans.insert(key, ready.clone());
        Ok(ready)
    }

    /// Runs the function: every output by name, in the order of the function.
    ///
    /// # Errors
    /// When an input is missing, unknown or of another shape or kind, when the function has states and none is given, or
    /// when a value makes an operation impossible (an index outside a table).
    pub fn predict(
        &self,
        inputs: &[(&str, Array<'_>)],
        state: Option<&mut State>,
    ) -> Result<Vec<(String, OwnedArray)>, Error> {
        self.run(inputs, state, None)
    }

    /// As [`Model::predict`], showing every step's results to `observer`.
    ///
    /// # Errors
    /// As [`Model::predict`].
    pub fn observe<'o>(
        &'o self,
        inputs: &[(&str, Array<'_>)],
        state: Option<&mut State>,
        observer: &'o mut dyn Observer,
    ) -> Result<Vec<(String, OwnedArray)>, Error> {
        self.run(inputs, state, Some(observer))
    }

    fn run<'o>(
        &'o self,
        inputs: &[(&str, Array<'_>)],
        state: Option<&mut State>,
        observer: Option<&'o mut dyn Observer>,
    ) -> Result<Vec<(String, OwnedArray)>, Error> {
        let ordered = self.order_inputs(inputs)?;
        let ready = self.ready(ordered.iter().map(|a| a.shape.into()).collect())?;
        let plan = &ready.plan;
        let mut none = State { buffers: Vec::new() };
        let state = match state {
            Some(s) => s,
            None if plan.states.is_empty() => &mut none,
            None => {
                return Err(Error::NeedsState {
                    names: plan.states.iter().map(|s| s.0.clone()).collect(),
                });
            }
        };
        let order = state.match_declared(&plan.states)?;
        let mut slots: Vec<Option<&mut StateBuffer>> = state.buffers.iter_mut().map(Some).collect();
        let mut states: Vec<&mut StateBuffer> = order.iter().filter_map(|&i| slots[i].take()).collect();

        let idle = ready.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut workspace = idle.unwrap_or_else(|| Workspace::new(plan));
        for (slot, value) in plan.inputs.iter().zip(&ordered) {
            workspace.write_input(slot, *value)?;
        }
        let faithful = self.shared.options.numerics == Numerics::Faithful;
        let options = RunOptions {
            pool: &self.shared.pool,
            faithful,
            observer,
        };
        workspace.run(plan, &mut states, options)?;
        let mut results = Vec::with_capacity(plan.outputs.len());
        for slot in &plan.outputs {
            let wide = self.shared.options.wide_outputs && slot.dtype == mil::DType::Fp16;
            let dtype = if wide { mil::DType::Fp32 } else { slot.dtype };
            let value = workspace.read(&self.shared.pool, &slot.operand, dtype, &states)?;
            results.push((slot.name.clone(), value));
        }
        ready
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(workspace);
        Ok(results)
    }

    /// The caller's values in the order of the function's parameters, shapes checked against the declaration.
    fn order_inputs<'a>(&self, inputs: &[(&str, Array<'a>)]) -> Result<Vec<Array<'a>>, Error> {
        let names: Vec<&str> = self.tensor_inputs().map(|i| i.name.as_str()).collect();
        if let Some((name, _)) = inputs.iter().find(|(n, _)| !names.contains(n)) {
            let message = format!("there is none of that name; the inputs are: {}", names.join(", "));
            return Err(Error::Value {
                what: "input",
                name: (*name).into(),
                message,
            });
        }
        self.tensor_inputs()
            .map(|input| {
                let fail = |message: String| Error::Value {
                    what: "input",
                    name: input.name.clone(),
                    message,
                };
                let value = inputs.iter().find(|(n, _)| *n == input.name).map(|(_, a)| *a);
                let value = value.ok_or_else(|| fail("it is missing".into()))?;
                let declared = input.ty.tensor().map(|t| t.shape.as_slice()).unwrap_or_default();
                let fits = declared.len() == value.shape.len()
                    && declared
                        .iter()
                        .zip(value.shape)
                        .all(|(d, n)| *d == Dim::Unknown || *d == Dim::Fixed(*n));
                if fits {
                    Ok(value)
                } else {
                    Err(fail(format!(
                        "shape {:?} came, {declared:?} is needed",
                        value.shape
                    )))
                }
            })
            .collect()
    }
}

fn find(program: &mil::Program, name: &str) -> Result<usize, Error> {
    program
        .functions
        .iter()
        .position(|f| f.name == name)
        .ok_or_else(|| Error::NoFunction {
            name: name.into(),
            available: program.functions.iter().map(|f| f.name.clone()).collect(),
        })
}
