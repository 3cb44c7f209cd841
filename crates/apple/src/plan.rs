//! Which operation runs where and at what cost, as Core ML plans it: data, and its table.

use std::fmt;

/// A processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ComputeDevice {
    /// The processor cores.
    Cpu,
    /// A graphics processor.
    Gpu,
    /// The Neural Engine.
    NeuralEngine {
        /// Its number of cores.
        cores: usize,
    },
    /// One this version has no name for.
    Other,
}

/// The plan of a model for one configuration.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ComputePlan {
    /// Operations in the order of the program; of a neural network its layers.
    pub operations: Vec<PlannedOperation>,
}

/// One operation of a [`ComputePlan`].
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedOperation {
    /// The function it is in, `main` mostly; of a pipeline the sub-model.
    pub function: String,
    /// The operator: `ios18.linear`; of a layer its type.
    pub operator: String,
    /// Names of its results.
    pub outputs: Vec<String>,
    /// Where it is to run; constants have none.
    pub preferred: Option<ComputeDevice>,
    /// Where it could run.
    pub supported: Vec<ComputeDevice>,
    /// Its share of the whole cost, 0 to 1, where Core ML estimates one.
    pub cost: Option<f64>,
}

impl ComputeDevice {
    fn short(self) -> &'static str {
        match self {
            ComputeDevice::Cpu => "CPU",
            ComputeDevice::Gpu => "GPU",
            ComputeDevice::NeuralEngine { .. } => "Neural Engine",
            ComputeDevice::Other => "other",
        }
    }
}

impl fmt::Display for ComputeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ComputeDevice::NeuralEngine { cores } => write!(f, "Neural Engine ({cores} cores)"),
            other => f.write_str(other.short()),
        }
    }
}

/// One device of a [`ComputePlan::summary`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceShare {
    /// The device.
    pub device: ComputeDevice,
    /// How many operations are to run there.
    pub operations: usize,
    /// Their share of the cost, 0 to 1.
    pub cost: f64,
}

impl ComputePlan {
    /// Operations and cost by device, most expensive first. Constants count nowhere.
    pub fn summary(&self) -> Vec<DeviceShare> {
        let mut shares: Vec<DeviceShare> = Vec::new();
        for operation in &self.operations {
            let Some(device) = operation.preferred else {
                continue;
            };
            let at = shares.iter().position(|s| s.device == device).unwrap_or_else(|| {
                shares.push(DeviceShare {
                    device,
                    operations: 0,
                    cost: 0.0,
                });
                shares.len() - 1
            });
            shares[at].operations += 1;
            shares[at].cost += operation.cost.unwrap_or(0.0);
        }
        shares.sort_by(|a, b| b.cost.total_cmp(&a.cost).then(b.operations.cmp(&a.operations)));
        shares
    }
}

/// A line for each operation that runs, then the summary.
impl fmt::Display for ComputePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for operation in self.operations.iter().filter(|o| o.preferred.is_some()) {
            let device = operation.preferred.map_or("", ComputeDevice::short);
            let cost = operation
                .cost
                .map_or(String::new(), |c| format!("{:.2}%", 100.0 * c));
            let could: Vec<_> = operation.supported.iter().map(|d| d.short()).collect();
            let outputs = operation.outputs.join(", ");
            let (function, operator) = (&operation.function, &operation.operator);
            writeln!(
                f,
                "{device:<14}{cost:>8}  {function}  {operator}  {outputs}  (could: {})",
                could.join(", ")
            )?;
        }
        for share in self.summary() {
            writeln!(
                f,
                "{}: {} operations, {:.1}% of the cost",
                share.device,
                share.operations,
                100.0 * share.cost
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_prints_what_runs_where_and_the_share_of_each_device() {
        let engine = ComputeDevice::NeuralEngine { cores: 16 };
        let operation = |operator: &str, preferred, cost| PlannedOperation {
            function: "main".into(),
            operator: operator.into(),
            outputs: vec![format!("{operator}_0")],
            preferred,
            supported: preferred.into_iter().chain([ComputeDevice::Cpu]).collect(),
            cost,
        };
        let plan = ComputePlan {
            operations: vec![
                operation("const", None, None),
                operation("gather", Some(ComputeDevice::Cpu), Some(0.125)),
                operation("conv", Some(engine), Some(0.5)),
                operation("linear", Some(engine), Some(0.375)),
            ],
        };
        let text = plan.to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            "CPU             12.50%  main  gather  gather_0  (could: CPU, CPU)"
        );
        assert_eq!(
            lines[3],
            "Neural Engine (16 cores): 2 operations, 87.5% of the cost"
        );
        assert_eq!(lines[4], "CPU: 1 operations, 12.5% of the cost");
        assert_eq!(lines.len(), 5);
    }
}
