//! Compiling models, and what a compiled model says about its functions.

use super::call::{call, core_ml, url};
use super::system::build;
use super::wait::question;
use crate::cache::Cache;
use crate::error::Error;
use crate::options::{OsVersion, Part};
use block2::RcBlock;
use objc2_core_ml::{MLModel, MLModelAsset};
use objc2_foundation::{
    NSArray, NSError, NSSearchPathDirectory, NSSearchPathDomainMask, NSSearchPathForDirectoriesInDomains,
    NSString, NSURL,
};
use std::path::{Path, PathBuf};

/// The compiled form of a model: a `.mlmodelc` itself, of others the entry of the cache in `folder`, compiled when it is
/// not there.
///
/// # Errors
/// [`Error::Io`], and what Core ML says about a model it cannot compile.
pub fn compiled(source: &Path, folder: &Path) -> Result<PathBuf, Error> {
    let is_compiled = source.extension().is_some_and(|e| e == "mlmodelc");
    if is_compiled && source.is_dir() {
        return Ok(source.to_path_buf());
    }
    Cache::new(folder, build()).get(source, compile)
}

/// The folder for compiled models in the user's caches.
pub fn default_cache_folder() -> PathBuf {
    let folder = call("the folder for caches", || {
        let found = NSSearchPathForDirectoriesInDomains(
            NSSearchPathDirectory::CachesDirectory,
            NSSearchPathDomainMask::UserDomainMask,
            true,
        );
        Ok(found.iter().next().map(|f| PathBuf::from(f.to_string())))
    });
    let folder = folder.ok().flatten();
    folder.unwrap_or_else(std::env::temp_dir).join("candle-coreml")
}

/// Compiles a `.mlpackage` or `.mlmodel` into the system's temporary folder; gives the `.mlmodelc` there.
///
/// # Errors
/// What Core ML says.
pub fn compile(source: &Path) -> Result<PathBuf, Error> {
    let what = format!("compiling {}", source.display());
    call(&what, || {
        let url = url(source)?;
        let (answer, question) = question::<NSURL>();
        let handler = RcBlock::new(move |compiled: *mut NSURL, error: *mut NSError| {
            // SAFETY: Core ML gives valid objects or nil.
            unsafe { answer.give(compiled, error) };
        });
        // SAFETY: The block owns what it uses, and may be called on any thread.
        unsafe { MLModel::compileModelAtURL_completionHandler(&url, &handler) };
        drop(handler);
        let compiled = question.answer(&what, core_ml(&what))?;
        compiled
            .path()
            .map(|p| PathBuf::from(p.to_string()))
            .ok_or_else(|| Error::Silent {
                what: what.clone(),
                problem: "Core ML gave no path on disk".to_string(),
            })
    })
}

/// The names of a compiled model's functions, as Core ML reads them.
///
/// # Errors
/// [`Error::System`] before macOS 15 and iOS 18, and what Core ML says.
pub fn function_names(compiled: &Path, system: OsVersion) -> Result<Vec<String>, Error> {
    system.check(Part::FunctionNames)?;
    let what = format!("reading the functions of {}", compiled.display());
    call(&what, || {
        let url = url(compiled)?;
        // SAFETY: The URL is valid, which is all the method asks for.
        let asset = unsafe { MLModelAsset::modelAssetWithURL_error(&url) }.map_err(core_ml(&what))?;
        let (answer, question) = question::<NSArray<NSString>>();
        let handler = RcBlock::new(move |names: *mut NSArray<NSString>, error: *mut NSError| {
            // SAFETY: Core ML gives valid objects or nil.
            unsafe { answer.give(names, error) };
        });
        // SAFETY: The block owns what it uses, and may be called on any thread.
        unsafe { asset.functionNamesWithCompletionHandler(&handler) };
        drop(handler);
        let names = question.answer(&what, core_ml(&what))?;
        Ok(names.iter().map(|n| n.to_string()).collect())
    })
}
