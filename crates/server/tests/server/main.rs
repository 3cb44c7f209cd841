//! The server over loopback, on the demo model.

// Helpers of tests are not seen as tests by the lint.
#![allow(clippy::unwrap_used)]

mod load;
mod routes;
mod served;
