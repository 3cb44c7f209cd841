//! Two processes that compile the same model at once.

mod common;

use candle_coreml_apple::framework;
use common::{Folder, ONE, model, start};
use std::process::Command;

#[test]
fn two_processes_compile_at_once_and_find_one_whole_entry() {
    let _one = start();
    if let Some(folder) = std::env::var_os("FAKE_CHILD_FOLDER") {
        let folder = std::path::PathBuf::from(folder);
        let compiled = framework::compiled(&folder.join("one.mlpackage"), &folder.join("cache")).unwrap();
        assert_eq!(std::fs::read_to_string(compiled.join("model.mil")).unwrap(), ONE);
        return;
    }
    let folder = Folder::new("processes");
    model(&folder, "one.mlpackage", ONE);
    let child = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env("FAKE_CHILD_FOLDER", &folder.0).spawn().unwrap()
    };
    let children = [child(), child(), child()];
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(std::fs::read_dir(folder.0.join("cache")).unwrap().count(), 1);
}
