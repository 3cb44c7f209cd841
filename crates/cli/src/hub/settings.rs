//! Where the hub and its cache are, and the token: what the environment says, as for the hub's own tools.

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use crate::failure::Failure;

/// The hub unless `HF_ENDPOINT` names another.
const HUB: &str = "https://huggingface.co";
/// How long nothing may come before a connection counts as lost.
const USUAL_TIMEOUT: Duration = Duration::from_secs(10);

pub struct Settings {
    /// Without a slash at its end.
    pub endpoint: String,
    /// The folder with a folder for each model.
    pub cache: PathBuf,
    pub token: Option<String>,
    pub offline: bool,
    pub timeout: Duration,
}

impl Settings {
    /// `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE` and
    /// `HF_HUB_DOWNLOAD_TIMEOUT` (seconds).
    pub fn from_environment(offline: bool) -> Result<Self, Failure> {
        Self::of(
            &|key| env::var(key).ok().filter(|text| !text.is_empty()),
            env::home_dir(),
            offline,
        )
    }

    fn of(
        get: &dyn Fn(&str) -> Option<String>,
        user: Option<PathBuf>,
        offline: bool,
    ) -> Result<Self, Failure> {
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(Failure::usage(format!(
                "HF_ENDPOINT is {endpoint:?}, allowed: an address that begins with https:// or http://"
            )));
        }
        let home = get("HF_HOME").map(PathBuf::from).or_else(|| {
            let caches = get("XDG_CACHE_HOME").map(PathBuf::from);
            Some(caches.or_else(|| Some(user?.join(".cache")))?.join("huggingface"))
        });
        let cache = get("HF_HUB_CACHE")
            .or_else(|| get("HUGGINGFACE_HUB_CACHE"))
            .map(PathBuf::from);
        let cache = cache.or_else(|| Some(home.as_ref()?.join("hub")));
        let cache = cache.ok_or_else(|| {
            Failure::new("no folder for models: neither HF_HOME nor a home folder is known")
        })?;
        let yes = |key: &str| {
            let text = get(key).unwrap_or_default().to_lowercase();
            matches!(text.as_str(), "1" | "true" | "yes" | "on")
        };
        let written = get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN"));
        let token = written.or_else(|| {
            let file = get("HF_TOKEN_PATH").map(PathBuf::from);
            let file = file.or_else(|| Some(home.as_ref()?.join("token")))?;
            std::fs::read_to_string(file)
                .ok()
                .filter(|_| !yes("HF_HUB_DISABLE_IMPLICIT_TOKEN"))
        });
        let token = token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        if token
            .as_ref()
            .is_some_and(|t| !t.bytes().all(|b| b.is_ascii_graphic()))
        {
            return Err(Failure::usage(
                "the token has characters that no token has (HF_TOKEN or the token file)",
            ));
        }
        let timeout = match get("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => USUAL_TIMEOUT,
            Some(text) => {
                let seconds = text.parse::<u64>().ok().filter(|&s| s > 0);
                Duration::from_secs(seconds.ok_or_else(|| {
                    Failure::usage(format!(
                        "HF_HUB_DOWNLOAD_TIMEOUT is {text:?}, allowed: whole seconds from 1 on"
                    ))
                })?)
            }
        };
        Ok(Settings {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            token,
            offline: offline || yes("HF_HUB_OFFLINE"),
            timeout,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(set: &[(&str, &str)]) -> Result<Settings, Failure> {
        let get = |key: &str| set.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned());
        Settings::of(&get, Some(PathBuf::from("/home/me")), false)
    }

    #[test]
    fn the_usual_places_are_those_of_the_hubs_tools() {
        let plain = settings(&[]).unwrap();
        assert_eq!(
            (plain.endpoint.as_str(), plain.offline, plain.token),
            (HUB, false, None)
        );
        for (set, cache) in [
            (&[][..], "/home/me/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")], "/h/hub"),
            (&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
        ] {
            assert_eq!(settings(set).unwrap().cache, PathBuf::from(cache), "{set:?}");
        }
        let set = [
            ("HF_ENDPOINT", "http://mirror:8080/"),
            ("HF_HUB_OFFLINE", "True"),
            ("HF_TOKEN", " hf_x\n"),
        ];
        let found = settings(&set).unwrap();
        assert_eq!(
            (found.endpoint.as_str(), found.offline),
            ("http://mirror:8080", true)
        );
        assert_eq!(found.token.as_deref(), Some("hf_x"));
    }

    #[test]
    fn the_token_file_is_read_unless_that_is_forbidden() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        assert_eq!(
            settings(&[("HF_HOME", home)]).unwrap().token.as_deref(),
            Some("hf_file")
        );
        let forbidden = [("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
        assert_eq!(settings(&forbidden).unwrap().token, None);
    }

    #[test]
    fn settings_that_cannot_be_meant_are_refused() {
        for set in [
            ("HF_ENDPOINT", "mirror"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0"),
            ("HF_TOKEN", "a\nb"),
        ] {
            let error = settings(&[set]).err().map(|e| e.message().to_owned());
            assert!(error.is_some_and(|e| e.contains(set.0)), "{set:?}");
        }
    }
}
