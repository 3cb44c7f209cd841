//! Core ML's plan of which operation runs where.

use super::call::{call, core_ml, url};
use super::devices::device;
use super::load::configuration;
use super::wait::question;
use crate::error::Error;
use crate::options::{LoadOptions, OsVersion, Part};
use crate::plan::{ComputePlan, PlannedOperation};
use block2::RcBlock;
use objc2::rc::Retained;
use objc2_core_ml::{
    MLComputePlan, MLComputePlanDeviceUsage, MLModelStructure, MLModelStructureProgramBlock,
    MLModelStructureProgramOperation,
};
use objc2_foundation::{NSArray, NSError, NSString};
use std::path::Path;

/// Deepest nesting of blocks and pipelines that is followed.
const MAX_DEPTH: usize = 32;

/// The plan for a compiled model with these options.
///
/// # Errors
/// [`Error::System`] before macOS 14.4 and iOS 17.4, and what Core ML says.
pub fn compute_plan(
    compiled: &Path,
    options: &LoadOptions,
    functions: usize,
    system: OsVersion,
) -> Result<ComputePlan, Error> {
    system.check(Part::ComputePlan)?;
    let settings = options.settings(system, functions)?;
    let what = format!("planning {}", compiled.display());
    call(&what, || {
        let (url, configuration) = (url(compiled)?, configuration(&settings));
        let (answer, question) = question::<MLComputePlan>();
        let handler = RcBlock::new(move |plan: *mut MLComputePlan, error: *mut NSError| {
            // SAFETY: Core ML gives valid objects or nil.
            unsafe { answer.give(plan, error) };
        });
        // SAFETY: The block owns what it uses, and may be called on any thread.
        unsafe {
            MLComputePlan::loadContentsOfURL_configuration_completionHandler(&url, &configuration, &handler);
        }
        drop(handler);
        let plan = question.answer(&what, core_ml(&what))?;
        let mut operations = Vec::new();
        // SAFETY: A plain getter.
        structure(
            &plan,
            &*unsafe { plan.modelStructure() },
            "main",
            0,
            &mut operations,
        );
        Ok(ComputePlan { operations })
    })
}

fn structure(
    plan: &MLComputePlan,
    of: &MLModelStructure,
    name: &str,
    depth: usize,
    into: &mut Vec<PlannedOperation>,
) {
    if depth > MAX_DEPTH {
        return;
    }
    // SAFETY: A plain getter.
    if let Some(program) = unsafe { of.program() } {
        // SAFETY: A plain getter.
        let (names, functions) = unsafe { program.functions() }.to_vecs();
        for (name, function) in names.iter().zip(&functions) {
            // SAFETY: A plain getter.
            block(
                plan,
                &*unsafe { function.block() },
                &name.to_string(),
                depth,
                into,
            );
        }
    }
    // SAFETY: A plain getter.
    if let Some(network) = unsafe { of.neuralNetwork() } {
        // SAFETY: A plain getter.
        for layer in unsafe { network.layers() } {
            // SAFETY: A layer of the plan's own structure.
            let usage = unsafe { plan.computeDeviceUsageForNeuralNetworkLayer(&layer) };
            // SAFETY: Plain getters.
            let (operator, outputs) = unsafe { (layer.r#type(), layer.outputNames()) };
            into.push(planned(name, &operator, strings(&outputs), usage, None));
        }
    }
    // SAFETY: A plain getter.
    if let Some(pipeline) = unsafe { of.pipeline() } {
        // SAFETY: Plain getters.
        let (names, models) = unsafe { (pipeline.subModelNames(), pipeline.subModels()) };
        for (name, model) in names.iter().zip(models.iter()) {
            structure(plan, &model, &name.to_string(), depth + 1, into);
        }
    }
}

fn block(
    plan: &MLComputePlan,
    of: &MLModelStructureProgramBlock,
    function: &str,
    depth: usize,
    into: &mut Vec<PlannedOperation>,
) {
    if depth > MAX_DEPTH {
        return;
    }
    // SAFETY: A plain getter.
    for operation in unsafe { of.operations() } {
        into.push(one(plan, &operation, function));
        // SAFETY: A plain getter.
        for inner in unsafe { operation.blocks() } {
            block(plan, &inner, function, depth + 1, into);
        }
    }
}

fn one(
    plan: &MLComputePlan,
    operation: &MLModelStructureProgramOperation,
    function: &str,
) -> PlannedOperation {
    // SAFETY: An operation of the plan's own structure.
    let usage = unsafe { plan.computeDeviceUsageForMLProgramOperation(operation) };
    // SAFETY: An operation of the plan's own structure.
    let cost = unsafe { plan.estimatedCostOfMLProgramOperation(operation) };
    // SAFETY: A plain getter.
    let cost = cost.map(|c| unsafe { c.weight() });
    // SAFETY: A plain getter.
    let outputs = unsafe { operation.outputs() };
    // SAFETY: A plain getter.
    let outputs = outputs.iter().map(|o| unsafe { o.name() }.to_string()).collect();
    // SAFETY: A plain getter.
    planned(
        function,
        &*unsafe { operation.operatorName() },
        outputs,
        usage,
        cost,
    )
}

fn planned(
    function: &str,
    operator: &NSString,
    outputs: Vec<String>,
    usage: Option<Retained<MLComputePlanDeviceUsage>>,
    cost: Option<f64>,
) -> PlannedOperation {
    PlannedOperation {
        function: function.to_string(),
        operator: operator.to_string(),
        outputs,
        // SAFETY: A plain getter.
        preferred: usage
            .as_ref()
            .map(|u| device(&*unsafe { u.preferredComputeDevice() })),
        supported: usage.map_or(Vec::new(), |u| {
            // SAFETY: A plain getter.
            unsafe { u.supportedComputeDevices() }
                .iter()
                .map(|d| device(&d))
                .collect()
        }),
        cost,
    }
}

fn strings(texts: &NSArray<NSString>) -> Vec<String> {
    texts.iter().map(|t| t.to_string()).collect()
}
