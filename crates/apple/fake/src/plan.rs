//! MLComputePlan with what it is made of, and the compute devices.
//!
//! What the plan says is made up: operations with blocks inside run on the CPU, constants nowhere, everything else on the Neural
//! Engine.

use crate::Live;
use block2::DynBlock;
use candle_coreml_mil::{Block, Function, Model, Operation, Program};
use objc2::rc::Retained;
use objc2::runtime::{NSObject, ProtocolObject};
use objc2::{DefinedClass, define_class};
use objc2_core_ml::{
    MLComputeDeviceProtocol, MLComputePlan, MLComputePlanCost, MLComputePlanDeviceUsage,
    MLModelConfiguration, MLModelStructure, MLModelStructureNeuralNetwork, MLModelStructurePipeline,
    MLModelStructureProgram, MLModelStructureProgramBlock, MLModelStructureProgramFunction,
    MLModelStructureProgramNamedValueType, MLModelStructureProgramOperation,
};
use objc2_foundation::{NSArray, NSDictionary, NSError, NSInteger, NSString, NSURL};

/// Cores of the stand-in's Neural Engine.
pub const CORES: usize = 16;

type Device = ProtocolObject<dyn MLComputeDeviceProtocol>;

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLCPUComputeDevice"]
    #[ivars = ((), Live)]
    pub struct FakeCpu;
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLNeuralEngineComputeDevice"]
    #[ivars = ((), Live)]
    pub struct FakeNeuralEngine;

    impl FakeNeuralEngine {
        #[unsafe(method(totalCoreCount))]
        fn cores(&self) -> NSInteger {
            CORES as NSInteger
        }
    }
);

/// The CPU, and with `engine` the Neural Engine.
pub fn devices(engine: bool) -> Retained<NSArray<Device>> {
    let cpu: Retained<Device> = made!(FakeCpu, ());
    let mut list = vec![cpu];
    if engine {
        list.push(made!(FakeNeuralEngine, ()));
    }
    NSArray::from_retained_slice(&list)
}

fn is_constant(operation: &Operation) -> bool {
    operation.op_type == "const"
}

/// Operations that are not constants, those in blocks too.
fn count(block: &Block) -> usize {
    let inner = |op: &Operation| usize::from(!is_constant(op)) + op.blocks.iter().map(count).sum::<usize>();
    block.operations.iter().map(inner).sum()
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLComputePlan"]
    #[ivars = (Program, Live)]
    pub struct FakePlan;

    impl FakePlan {
        #[unsafe(method(loadContentsOfURL:configuration:completionHandler:))]
        fn load(
            url: &NSURL,
            _configuration: &MLModelConfiguration,
            handler: &DynBlock<dyn Fn(*mut MLComputePlan, *mut NSError)>,
        ) {
            let path = url.path().map(|p| p.to_string());
            let file = path.and_then(|p| Model::open(p).ok());
            match file.as_ref().and_then(Model::program) {
                Some(program) => crate::model::complete(handler, Some(made!(FakePlan, program.clone())), None),
                None => crate::model::complete(handler, None, Some(3)),
            }
        }

        #[unsafe(method_id(modelStructure))]
        fn structure(&self) -> Retained<MLModelStructure> {
            made!(FakeStructure, self.ivars().0.clone())
        }

        #[unsafe(method_id(computeDeviceUsageForMLProgramOperation:))]
        fn usage(&self, operation: &MLModelStructureProgramOperation) -> Option<Retained<MLComputePlanDeviceUsage>> {
            let operation = FakeOperation::of(operation);
            (!is_constant(operation)).then(|| made!(FakeUsage, operation.blocks.is_empty()))
        }

        #[unsafe(method_id(estimatedCostOfMLProgramOperation:))]
        fn cost(&self, operation: &MLModelStructureProgramOperation) -> Option<Retained<MLComputePlanCost>> {
            let all: usize = self.ivars().0.functions.iter().map(|f| count(&f.body)).sum();
            (!is_constant(FakeOperation::of(operation))).then(|| made!(FakeCost, 1.0 / all as f64))
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLComputePlanDeviceUsage"]
    #[ivars = (bool, Live)]
    pub struct FakeUsage;

    impl FakeUsage {
        #[unsafe(method_id(supportedComputeDevices))]
        fn supported(&self) -> Retained<NSArray<Device>> {
            devices(self.ivars().0)
        }

        #[unsafe(method_id(preferredComputeDevice))]
        fn preferred(&self) -> Retained<Device> {
            match self.ivars().0 {
                true => made!(FakeNeuralEngine, ()),
                false => made!(FakeCpu, ()),
            }
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLComputePlanCost"]
    #[ivars = (f64, Live)]
    pub struct FakeCost;

    impl FakeCost {
        #[unsafe(method(weight))]
        fn weight(&self) -> f64 {
            self.ivars().0
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelStructure"]
    #[ivars = (Program, Live)]
    pub struct FakeStructure;

    impl FakeStructure {
        #[unsafe(method_id(neuralNetwork))]
        fn network(&self) -> Option<Retained<MLModelStructureNeuralNetwork>> {
            None
        }

        #[unsafe(method_id(pipeline))]
        fn pipeline(&self) -> Option<Retained<MLModelStructurePipeline>> {
            None
        }

        #[unsafe(method_id(program))]
        fn program(&self) -> Option<Retained<MLModelStructureProgram>> {
            Some(made!(FakeProgram, self.ivars().0.clone()))
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelStructureProgram"]
    #[ivars = (Program, Live)]
    pub struct FakeProgram;

    impl FakeProgram {
        #[unsafe(method_id(functions))]
        fn functions(&self) -> Retained<NSDictionary<NSString, MLModelStructureProgramFunction>> {
            let functions = &self.ivars().0.functions;
            let names: Vec<_> = functions.iter().map(|f| NSString::from_str(&f.name)).collect();
            let names: Vec<&NSString> = names.iter().map(|n| &**n).collect();
            let made: Vec<Retained<MLModelStructureProgramFunction>> =
                functions.iter().map(|f| made!(FakeFunction, f.clone())).collect();
            NSDictionary::from_retained_objects(&names, &made)
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelStructureProgramFunction"]
    #[ivars = (Function, Live)]
    pub struct FakeFunction;

    impl FakeFunction {
        #[unsafe(method_id(block))]
        fn block(&self) -> Retained<MLModelStructureProgramBlock> {
            made!(FakeBlock, self.ivars().0.body.clone())
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelStructureProgramBlock"]
    #[ivars = (Block, Live)]
    pub struct FakeBlock;

    impl FakeBlock {
        #[unsafe(method_id(operations))]
        fn operations(&self) -> Retained<NSArray<MLModelStructureProgramOperation>> {
            let operations = &self.ivars().0.operations;
            let made: Vec<Retained<MLModelStructureProgramOperation>> =
                operations.iter().map(|op| made!(FakeOperation, op.clone())).collect();
            NSArray::from_retained_slice(&made)
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelStructureProgramOperation"]
    #[ivars = (Operation, Live)]
    pub struct FakeOperation;

    impl FakeOperation {
        #[unsafe(method_id(operatorName))]
        fn name(&self) -> Retained<NSString> {
            NSString::from_str(&format!("ios18.{}", self.ivars().0.op_type))
        }

        #[unsafe(method_id(outputs))]
        fn outputs(&self) -> Retained<NSArray<MLModelStructureProgramNamedValueType>> {
            let outputs = self.ivars().0.outputs.iter();
            let made: Vec<Retained<MLModelStructureProgramNamedValueType>> =
                outputs.map(|o| made!(FakeNamed, o.name.clone())).collect();
            NSArray::from_retained_slice(&made)
        }

        #[unsafe(method_id(blocks))]
        fn blocks(&self) -> Retained<NSArray<MLModelStructureProgramBlock>> {
            let blocks = self.ivars().0.blocks.iter();
            let made: Vec<Retained<MLModelStructureProgramBlock>> =
                blocks.map(|b| made!(FakeBlock, b.clone())).collect();
            NSArray::from_retained_slice(&made)
        }
    }
);

impl FakeOperation {
    fn of(operation: &MLModelStructureProgramOperation) -> &Operation {
        // SAFETY: The only class of that name is the one defined here.
        let this = unsafe { &*std::ptr::from_ref(operation).cast::<FakeOperation>() };
        &this.ivars().0
    }
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelStructureProgramNamedValueType"]
    #[ivars = (String, Live)]
    pub struct FakeNamed;

    impl FakeNamed {
        #[unsafe(method_id(name))]
        fn name(&self) -> Retained<NSString> {
            NSString::from_str(&self.ivars().0)
        }
    }
);

/// Registers the classes.
pub fn install() {
    use objc2::ClassType;
    let _ = (FakeCpu::class(), FakeNeuralEngine::class(), FakePlan::class());
    let _ = (FakeUsage::class(), FakeCost::class(), FakeStructure::class());
    let _ = (FakeProgram::class(), FakeFunction::class(), FakeBlock::class());
    let _ = (FakeOperation::class(), FakeNamed::class());
}
