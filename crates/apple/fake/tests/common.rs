//! What the tests share: one at a time, a cache of their own, a small model.

#![allow(dead_code)]

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Registers the stand-ins. Switches and counts belong to the process, so tests that use them run one after another.
pub fn start() -> MutexGuard<'static, ()> {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    candle_coreml_apple_fake::install();
    guard
}

/// A folder that is removed at the end.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("candle-coreml-fake-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub const PROGRAM: &str = r#"program(1.3) {
    func main<ios18>(tensor<fp16, [2, 3]> x, tensor<fp16, [3]> y) {
        tensor<fp16, [2, 3]> sum = add(x = x, y = y);
        tensor<fp16, [3]> twice = add(x = y, y = y);
    } -> (sum, twice);
    func step<ios18>(state<tensor<fp16, [3]>> total, tensor<fp16, [3]> x) {
        tensor<fp16, [3]> before = read_state(input = total);
        tensor<fp16, [3]> after = add(x = before, y = x);
        write_state(data = after, input = total);
        tensor<fp16, [3]> result = read_state(input = total);
    } -> (result);
}"#;

pub const ONE: &str = r#"program(1.0) {
    func main<ios16>(tensor<fp32, [2, 3]> x) { tensor<fp32, [2, 3]> y = add(x = x, y = x); } -> (y);
}"#;

/// A folder with a program, by the name given.
pub fn model(folder: &Folder, name: &str, program: &str) -> PathBuf {
    let path = folder.0.join(name);
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join("model.mil"), program).unwrap();
    path
}

/// Bytes this process holds.
pub fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    4096 * text.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
}

/// Compiled models of a test go to a folder of its own.
pub fn own_caches(folder: &Folder) {
    // SAFETY: Tests of a file hold one lock, and nothing else reads the environment meanwhile.
    unsafe { std::env::set_var("HOME", &folder.0) };
}
