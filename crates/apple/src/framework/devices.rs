//! Processors, as Core ML lists them.

use super::call::call;
use crate::error::Error;
use crate::options::{OsVersion, Part};
use crate::plan::ComputeDevice;
use objc2::runtime::{AnyObject, ProtocolObject};
use objc2_core_ml::{MLCPUComputeDevice, MLComputeDeviceProtocol, MLModel, MLNeuralEngineComputeDevice};

/// The processors Core ML can use here.
///
/// # Errors
/// [`Error::System`] before macOS 14 and iOS 17.
pub fn devices(system: OsVersion) -> Result<Vec<ComputeDevice>, Error> {
    system.check(Part::Devices)?;
    call("listing compute devices", || {
        // SAFETY: The system has the method.
        let devices = unsafe { MLModel::availableComputeDevices() };
        Ok(devices.iter().map(|d| device(&d)).collect())
    })
}

pub(super) fn device(device: &ProtocolObject<dyn MLComputeDeviceProtocol>) -> ComputeDevice {
    let object: &AnyObject = device.as_ref();
    if let Some(engine) = object.downcast_ref::<MLNeuralEngineComputeDevice>() {
        // SAFETY: A plain getter.
        let cores = unsafe { engine.totalCoreCount() };
        return ComputeDevice::NeuralEngine {
            cores: usize::try_from(cores).unwrap_or(0),
        };
    }
    if object.downcast_ref::<MLCPUComputeDevice>().is_some() {
        return ComputeDevice::Cpu;
    }
    #[cfg(target_vendor = "apple")]
    if object
        .downcast_ref::<objc2_core_ml::MLGPUComputeDevice>()
        .is_some()
    {
        return ComputeDevice::Gpu;
    }
    ComputeDevice::Other
}
