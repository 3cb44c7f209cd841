//! The calls to CoreML.framework.
//!
//! Only the generated methods of `objc2-core-ml` are used: selectors and encodings are the bindings' concern. Each entry
//! runs in an autorelease pool and turns a thrown Objective-C exception into an error ([`call`]).

mod array;
mod call;
mod compile;
mod describe;
mod devices;
mod frame;
mod image;
mod load;
mod model;
mod plan;
mod state;
mod system;
mod value;
mod wait;

pub use compile::{compile, compiled, default_cache_folder, function_names};
pub use devices::devices;
pub use model::{Model, Outputs};
pub use plan::compute_plan;
pub use state::State;
#[cfg(not(target_vendor = "apple"))]
pub use system::pretend;
pub use system::{build, system};
