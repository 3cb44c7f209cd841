//! Ctrl-C: the first asks work to stop, a second ends the program, unless that is a conversation.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use crate::failure::{Failure, INTERRUPTED};

static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Takes Ctrl-C over from the system.
pub fn install() -> Result<(), Failure> {
    ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
    })?;
    Ok(())
}

/// At Ctrl-C the folder of unfinished work is removed and the program ends.
pub fn remove_at_end(unfinished: PathBuf) -> Result<(), Failure> {
    ctrlc::set_handler(move || {
        // The work goes on meanwhile and may add a file: what is left has a name that says what it is.
        let _ = std::fs::remove_dir_all(&unfinished);
        std::process::exit(i32::from(INTERRUPTED));
    })?;
    Ok(())
}

/// As [`install`], for a program that goes on after an answer was stopped: no Ctrl-C ends it, and what else the system ends
/// programs with does so at once.
pub fn install_for_answers() -> Result<(), Failure> {
    #[cfg(unix)]
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&ASKED))?;
    #[cfg(not(unix))]
    ctrlc::set_handler(|| ASKED.store(true, Ordering::SeqCst))?;
    Ok(())
}

/// True once Ctrl-C was pressed.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Forgets a Ctrl-C that was answered.
pub fn clear() {
    ASKED.store(false, Ordering::SeqCst);
}
