//! The system this runs on.

use crate::options::OsVersion;

/// The version of the system.
#[cfg(target_vendor = "apple")]
pub fn system() -> OsVersion {
    let version = objc2_foundation::NSProcessInfo::processInfo().operatingSystemVersion();
    let number = |n: isize| u32::try_from(n).unwrap_or(0);
    OsVersion {
        mac: cfg!(target_os = "macos"),
        major: number(version.majorVersion),
        minor: number(version.minorVersion),
    }
}

/// The version with the build, which compiled models depend on.
pub fn build() -> String {
    objc2::rc::autoreleasepool(|_| {
        let info = objc2_foundation::NSProcessInfo::processInfo();
        format!("{} {}", system(), info.operatingSystemVersionString())
    })
}

/// The version that is played off Apple systems, as 256 * major + minor.
#[cfg(not(target_vendor = "apple"))]
static PRETENDED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(26 << 8);

/// The version that is played.
#[cfg(not(target_vendor = "apple"))]
pub fn system() -> OsVersion {
    let version = PRETENDED.load(std::sync::atomic::Ordering::Relaxed);
    OsVersion {
        mac: true,
        major: version >> 8,
        minor: version & 0xff,
    }
}

/// Plays another version of macOS from now on, in the whole process.
#[cfg(not(target_vendor = "apple"))]
pub fn pretend(major: u32, minor: u32) {
    PRETENDED.store(major << 8 | minor & 0xff, std::sync::atomic::Ordering::Relaxed);
}
