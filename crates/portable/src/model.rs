//! A model opened for prediction: functions, plans for the input shapes seen, workspaces for the threads that run.

use crate::Error;
use crate::array::{Array, OwnedArray};
use crate::explain::Explanation;
use crate::graph::Graph;
use crate::layout::Shape;
use crate::lower::{Constants, LowerOptions, Lowered, check_function, lower};
use crate::passes;
use crate::plan::Plan;
use crate::recent::Recent;
use crate::run::{Observer, RunOptions, Workspace};
use crate::staged::{Context, Runner, Staged};
use crate::state::{State, StateBuffer};
use candle_coreml_kernels::Pool;
use candle_coreml_mil::{self as mil, ValueType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Arithmetic of a prediction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Numerics {
    /// Everything computed in 32-bit floats; fp16 only where outputs are given.
    #[default]
    Default,
    /// Results of fp16 operations rounded to fp16, each one; no operations merged.
    Faithful,
    /// As `Default`, but factors of convolutions, and of linear layers with more than a few rows, are rounded to bf16 (8 bits of
    /// precision) on processors that multiply it faster (AVX-512 BF16, not Intel's; Intel's AMX). In functions with states, which are
    /// language models, linear layers with fp16 or fp32 weights multiply blocks of 8-bit integers instead where there is AVX-512 VNNI and no
    /// AMX (relative error of logits about 2e-2, a byte a weight more in memory). 32-bit weights of linear layers with few rows are rounded
    /// to fp16 (11 bits) on all processors.
    Fast,
}

/// How a model is opened.
#[derive(Clone)]
pub struct Options {
    /// Arithmetic.
    pub numerics: Numerics,
    /// Merge and rewrite operations; results stay within their tolerance.
    pub passes: bool,
    /// Every value of the program is computed by a step of its own, those that only look at the elements of others
    /// included, so that an [`Observer`] sees them; together with `passes: false`.
    pub every_value: bool,
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
            .field("every_value", &self.every_value)
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
            every_value: false,
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
    constants: Arc<Constants>,
    plans: Mutex<Recent<Ready>>,
    /// Functions that run in stages, with what was planned of them.
    staged: Mutex<HashMap<usize, Arc<Staged>>>,
    /// Workspaces of runs that ended.
    idle: Mutex<Vec<Workspace>>,
}

/// How a function runs for inputs of some shapes.
struct Ready {
    function: usize,
    shapes: Vec<Shape>,
    way: Way,
}

enum Way {
    /// As one plan.
    Whole(Plan),
    /// In stages, because an operation needs a computed value.
    Staged(Arc<Staged>),
}

/// Plans kept for different functions and input shapes.
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
            constants: Arc::default(),
            plans: Mutex::new(Recent::new(PLANS_KEPT)),
            staged: Mutex::default(),
            idle: Mutex::default(),
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

    /// The same function of the same file, opened with other options; what was read of the file is shared.
    ///
    /// # Errors
    /// When the function cannot be lowered.
    pub fn with_options(&self, options: Options) -> Result<Model, Error> {
        let shared = Shared {
            file: self.shared.file.clone(),
            pool: options.pool.clone().unwrap_or_else(|| self.shared.pool.clone()),
            options,
            constants: self.shared.constants.clone(),
            plans: Mutex::new(Recent::new(PLANS_KEPT)),
            staged: Mutex::default(),
            idle: Mutex::default(),
        };
        let model = Model {
            shared: Arc::new(shared),
            function: self.function,
        };
        model.prepare()?;
        Ok(model)
    }

    /// The options the model was opened with.
    pub fn options(&self) -> &Options {
        &self.shared.options
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
        State::new(&self.declared_states())
    }

    /// Name, type and shape of each state of the function.
    fn declared_states(&self) -> Vec<(String, mil::DType, Shape)> {
        let states = self.function().inputs.iter();
        states
            .filter(|i| matches!(i.ty, ValueType::State(_)))
            .filter_map(|i| {
                let tensor = i.ty.tensor()?;
                Some((i.name.clone(), tensor.dtype, tensor.fixed_shape()?.into()))
            })
            .collect()
    }

    /// The graph for the given input shapes, for reports; passes applied as the model was opened.
    ///
    /// # Errors
    /// As for predictions with inputs of these shapes, and when the function has no single graph because an operation
    /// needs a computed value.
    pub fn graph(&self, shapes: &[Shape]) -> Result<Graph, Error> {
        match self.lower(shapes)? {
            Lowered::Whole(graph) => Ok(self.optimize(graph)),
            Lowered::Cut(error) => Err(error),
        }
    }

    /// Number of plans kept for this function, those of its stages included.
    pub fn plans(&self) -> usize {
        let staged = lock(&self.shared.staged)
            .get(&self.function)
            .map_or(0, |s| s.plans());
        let whole = |r: &Ready| r.function == self.function && matches!(r.way, Way::Whole(_));
        staged + lock(&self.shared.plans).count(whole)
    }

    fn faithful(&self) -> bool {
        self.shared.options.numerics == Numerics::Faithful
    }

    fn lower_options(&self) -> LowerOptions {
        LowerOptions {
            faithful: self.faithful(),
            fast: self.shared.options.numerics == Numerics::Fast,
            pool: self.shared.pool.clone(),
            constants: self.shared.constants.clone(),
        }
    }

    fn lower(&self, shapes: &[Shape]) -> Result<Lowered, Error> {
        let (file, function) = (&self.shared.file, self.function());
        lower(file, function, &self.named(shapes), &self.lower_options())
    }

    fn named(&self, shapes: &[Shape]) -> HashMap<&str, Shape> {
        let names = self.tensor_inputs().map(|i| i.name.as_str());
        names.zip(shapes.iter().cloned()).collect()
    }

    fn optimize(&self, graph: Graph) -> Graph {
        if self.shared.options.passes && !self.faithful() {
            let arithmetic = self.lower_options().arithmetic(!graph.states.is_empty());
            passes::optimize(graph, arithmetic, self.shared.pool.threads())
        } else if self.shared.options.every_value {
            passes::every_value(passes::clean(graph))
        } else {
            passes::clean(graph)
        }
    }

    /// The plan for the default shapes, step by step.
    ///
    /// # Errors
    /// When an input has no default shape, when the function runs in stages, or as for predictions.
    pub fn explain(&self) -> Result<Explanation, Error> {
        let shapes = self.default_shapes().ok_or_else(|| Error::Value {
            what: "input",
            name: self.name().into(),
            message: "the shapes are flexible and the file gives no default".into(),
        })?;
        match self.lower(&shapes)? {
            Lowered::Cut(error) => Err(error),
            Lowered::Whole(graph) => {
                let graph = self.optimize(graph);
                Ok(Explanation::of(self.name(), &Plan::new(&graph)?, &graph))
            }
        }
    }

    fn ready(&self, shapes: Vec<Shape>) -> Result<Arc<Ready>, Error> {
        let wanted = |r: &Ready| r.function == self.function && r.shapes == shapes;
        if let Some(ready) = lock(&self.shared.plans).find(wanted) {
            return Ok(ready);
        }
        let way = match self.lower(&shapes)? {
            Lowered::Whole(graph) => {
                let plan = Plan::new(&self.optimize(graph))?;
                let (steps, arena_bytes) = (plan.steps.len(), plan.arena_bytes());
                tracing::debug!(function = self.name(), steps, arena_bytes, "planned");
                Way::Whole(plan)
            }
            Lowered::Cut(_) => Way::Staged(self.staged(&shapes)?),
        };
        let ready = Arc::new(Ready {
            function: self.function,
            shapes,
            way,
        });
        lock(&self.shared.plans).insert(ready.clone());
        Ok(ready)
    }

    /// The stages of the function, which is checked the first time.
    fn staged(&self, shapes: &[Shape]) -> Result<Arc<Staged>, Error> {
        if let Some(staged) = lock(&self.shared.staged).get(&self.function) {
            return Ok(staged.clone());
        }
        let (file, function) = (&self.shared.file, self.function());
        check_function(file, function, &self.named(shapes), &self.lower_options())?;
        let staged = Arc::new(Staged::new(function));
        lock(&self.shared.staged).insert(self.function, staged.clone());
        tracing::debug!(function = self.name(), "runs in stages");
        Ok(staged)
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
        let declared = self.declared_states();
        let mut none = State { buffers: Vec::new() };
        let state = match state {
            Some(s) => s,
            None if declared.is_empty() => &mut none,
            None => {
                return Err(Error::NeedsState {
                    names: declared.into_iter().map(|s| s.0).collect(),
                });
            }
        };
        let order = state.match_declared(&declared)?;
        let mut slots: Vec<Option<&mut StateBuffer>> = state.buffers.iter_mut().map(Some).collect();
        let mut states: Vec<&mut StateBuffer> = order.iter().filter_map(|&i| slots[i].take()).collect();
        let mut workspace = lock(&self.shared.idle).pop().unwrap_or_default();
        let results = match &ready.way {
            Way::Whole(plan) => self.run_plan(plan, &ordered, &mut workspace, &mut states, observer),
            Way::Staged(staged) => {
                let context = Context {
                    model: &self.shared.file,
                    function: self.function(),
                    staged,
                    options: &self.lower_options(),
                    optimize: &|graph| self.optimize(graph),
                };
                let runner = Runner::new(context, &mut workspace, &mut states, observer);
                runner.run(&ordered, self.shared.options.wide_outputs)
            }
        };
        lock(&self.shared.idle).push(workspace);
        results
    }

    fn run_plan<'o>(
        &'o self,
        plan: &Plan,
        inputs: &[Array<'_>],
        workspace: &mut Workspace,
        states: &mut [&mut StateBuffer],
        observer: Option<&'o mut dyn Observer>,
    ) -> Result<Vec<(String, OwnedArray)>, Error> {
        workspace.fit(plan);
        for (slot, value) in plan.inputs.iter().zip(inputs) {
            workspace.write_input(slot, *value)?;
        }
        let options = RunOptions {
            pool: &self.shared.pool,
            faithful: self.faithful(),
            observer,
        };
        workspace.run(plan, states, options)?;
        let mut results = Vec::with_capacity(plan.outputs.len());
        for slot in &plan.outputs {
            let wide = self.shared.options.wide_outputs && slot.dtype == mil::DType::Fp16;
            let dtype = if wide { mil::DType::Fp32 } else { slot.dtype };
            let value = workspace.read(&self.shared.pool, &slot.operand, dtype, states)?;
            results.push((slot.name.clone(), value));
        }
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
                let declared = input.ty.tensor();
                if declared.map_or(value.shape.is_empty(), |t| t.admits(value.shape)) {
                    Ok(value)
                } else {
                    let needed = declared.map(|t| t.shape.as_slice()).unwrap_or_default();
                    Err(fail(format!(
                        "shape {:?} came, {needed:?} is needed",
                        value.shape
                    )))
                }
            })
            .collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
