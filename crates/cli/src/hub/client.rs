//! Requests to the hub: the token, redirects, what is tried again and what is final.

use std::time::Duration;

use serde::Deserialize;
use ureq::http::{Response, StatusCode, Uri};
use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, Body};

use super::name::{Name, is_commit, is_hex};
use super::settings::Settings;
use crate::failure::Failure;

/// A list of files larger than this is refused.
const LIST_LIMIT_BYTES: u64 = 64 << 20;
const MOST_REDIRECTS: usize = 8;
/// Longest pause a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Why a request gave nothing.
pub enum Trouble {
    /// It may work later; after a pause where the server asks for one.
    Later(String, Option<Duration>),
    /// The part of the file that is here does not fit what the server has.
    StartOver,
    Final(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Trouble::Final(failure)
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        Trouble::Final(error.into())
    }
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Path in the repository, checked to stay inside a folder.
    pub path: String,
    pub size: u64,
    pub hash: Hash,
}

/// What the content of a file must give; the hexadecimal digits name it in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hash {
    /// Of large files.
    Sha256(String),
    /// Of small files, as git names them: over `blob SIZE`, a zero, and the content.
    GitSha1(String),
}

impl Hash {
    pub fn digits(&self) -> &str {
        match self {
            Hash::Sha256(digits) | Hash::GitSha1(digits) => digits,
        }
    }
}

/// What a repository holds at one commit.
#[derive(Debug)]
pub struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

pub struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
}

impl<'a> Client<'a> {
    pub fn new(settings: &'a Settings) -> Self {
        // On Apple systems and Windows the system's TLS, which needs no C code to build.
        let provider = match cfg!(any(target_vendor = "apple", windows)) {
            true => TlsProvider::NativeTls,
            false => TlsProvider::Rustls,
        };
        let tls = TlsConfig::builder()
            .provider(provider)
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .user_agent(concat!("candle-coreml/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(settings.timeout))
            .timeout_per_read(Some(settings.timeout))
            .build()
            .new_agent();
        Client { agent, settings }
    }

    /// The files of a model at its revision.
    pub fn listing(&self, name: &Name) -> Result<Listing, Trouble> {
        let url = format!(
            "{}/api/models/{}/revision/{}?blobs=true",
            self.settings.endpoint,
            name.repository(),
            name.revision.replace('/', "%2F")
        );
        let mut response = self.get(&url, 0, name)?;
        let text = response
            .body_mut()
            .with_config()
            .limit(LIST_LIMIT_BYTES)
            .read_to_string();
        let text = text.map_err(|e| Trouble::Later(format!("{}: {e}", shown(&url)), None))?;
        let reason = |e: String| Failure::new(format!("{name}: the hub's list of files: {e}"));
        let model: Model = serde_json::from_str(&text).map_err(|e| reason(e.to_string()))?;
        Ok(model.checked().map_err(reason)?)
    }

    /// The content of a file from byte `from` on.
    pub fn file(
        &self,
        name: &Name,
        commit: &str,
        file: &RemoteFile,
        from: u64,
    ) -> Result<Response<Body>, Trouble> {
        let path: Vec<String> = file.path.split('/').map(escaped).collect();
        let url = format!(
            "{}/{}/resolve/{commit}/{}",
            self.settings.endpoint,
            name.repository(),
            path.join("/")
        );
        self.get(&url, from, name)
    }

    /// Follows redirects itself: the token goes to the hub alone, and https is never left.
    fn get(&self, url: &str, from: u64, name: &Name) -> Result<Response<Body>, Trouble> {
        let mut url = url.to_owned();
        for _ in 0..MOST_REDIRECTS {
            let mut request = self.agent.get(&url);
            if let Some(token) = self.settings.token.as_deref().filter(|_| self.is_hub(&url)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|e| failed(&url, &e))?;
            if !response.status().is_redirection() {
                return self.judged(response, &url, name);
            }
            let target = response.headers().get("location").and_then(|l| l.to_str().ok());
            url = joined(&url, target.unwrap_or_default()).map_err(Failure::new)?;
        }
        Err(Failure::new(format!("{}: more than {MOST_REDIRECTS} redirects", shown(&url))).into())
    }

    fn is_hub(&self, url: &str) -> bool {
        origin(url).is_some_and(|o| Some(o) == origin(&self.settings.endpoint))
    }

    /// Tells answers from refusals.
    fn judged(&self, response: Response<Body>, url: &str, name: &Name) -> Result<Response<Body>, Trouble> {
        let status = response.status();
        let header = |key: &str| response.headers().get(key).and_then(|v| v.to_str().ok());
        let token = match self.settings.token {
            Some(_) => "a token was sent",
            None => "no token was sent: set HF_TOKEN, or log in with the hub's own tool",
        };
        let place = shown(url);
        let refused = |what: String| Err(Trouble::Final(Failure::new(what)));
        match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            StatusCode::RANGE_NOT_SATISFIABLE => Err(Trouble::StartOver),
            StatusCode::UNAUTHORIZED => refused(format!(
                "{name}: the hub wants to know who asks (401): there is no such model, or it is private; {token}"
            )),
            StatusCode::FORBIDDEN => refused(format!(
                "{name}: the hub refuses (403): the model may ask for consent on its page first; {token}"
            )),
            StatusCode::NOT_FOUND => refused(match header("x-error-code") {
                Some("RevisionNotFound") => format!("{name}: the model has no revision {:?}", name.revision),
                _ => format!("{name}: not found on the hub (404, {place})"),
            }),
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
                let pause = header("retry-after")
                    .and_then(|s| s.trim().parse().ok())
                    .map(Duration::from_secs);
                Err(Trouble::Later(
                    format!("{place}: {status}"),
                    pause.map(|p| p.min(LONGEST_PAUSE)),
                ))
            }
            status if status.is_server_error() => {
                let pause = header("retry-after")
                    .and_then(|s| s.trim().parse().ok())
                    .map(Duration::from_secs);
                Err(Trouble::Later(
                    format!("{place}: {status}"),
                    pause.map(|p| p.min(LONGEST_PAUSE)),
                ))
            }
            status => refused(format!("{place}: {status}")),
        }
    }
}

/// An error before an answer came: of the network, mostly.
fn failed(url: &str, error: &ureq::Error) -> Trouble {
    let text = format!("{}: {error}", shown(url));
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Tls(_) => Trouble::Final(Failure::new(text)),
        _ => Trouble::Later(text, None),
    }
}

/// An address for messages: without its query, which may be signed.
fn shown(url: &str) -> &str {
    url.split('?').next().unwrap_or(url)
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_lowercase();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, uri.host()?.to_lowercase(), port))
}

/// Where a redirect leads.
fn joined(url: &str, target: &str) -> Result<String, String> {
    let wrong = || format!("{}: a redirect to {:?}", shown(url), shown(target));
    let (scheme, host, port) = origin(url).ok_or_else(wrong)?;
    let whole = match target {
        t if t.starts_with("http://") || t.starts_with("https://") => t.to_owned(),
        t if t.starts_with("//") => format!("{scheme}:{t}"),
        t if t.starts_with('/') => format!("{scheme}://{host}:{port}{t}"),
        _ => return Err(wrong()),
    };
    let (to, ..) = origin(&whole).ok_or_else(wrong)?;
    if scheme == "https" && to != "https" {
        return Err(wrong());
    }
    Ok(whole)
}

/// A word of a path as an address has it.
fn escaped(word: &str) -> String {
    let one = |b: u8| match b {
        b if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) => char::from(b).to_string(),
        b => format!("%{b:02X}"),
    };
    word.bytes().map(one).collect()
}

#[derive(Deserialize)]
struct Model {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    #[serde(alias = "oid")]
    sha256: String,
    size: u64,
}

impl Model {
    fn checked(self) -> Result<Listing, String> {
        if !is_commit(&self.sha) {
            return Err(format!("its commit is {:?}", self.sha));
        }
        let files = self.siblings.into_iter().map(Sibling::checked);
        Ok(Listing {
            commit: self.sha,
            files: files.collect::<Result<_, _>>()?,
        })
    }
}

impl Sibling {
    fn checked(self) -> Result<RemoteFile, String> {
        let path = self.rfilename;
        if !stays_inside(&path) {
            return Err(format!("a file {path:?}, which is no path inside a folder"));
        }
        let (size, hash, digits) = match (self.lfs, self.size, self.blob) {
            (Some(lfs), _, _) => (lfs.size, Hash::Sha256(lfs.sha256), 64),
            (None, Some(size), Some(id)) => (size, Hash::GitSha1(id), 40),
            _ => return Err(format!("{path:?} comes without size and hash")),
        };
        if hash.digits().len() != digits || !is_hex(hash.digits()) {
            return Err(format!("{path:?} has hash {:?}", hash.digits()));
        }
        Ok(RemoteFile { path, size, hash })
    }
}

/// True for a path that, below any folder on any system, stays in it.
pub fn stays_inside(path: &str) -> bool {
    let word = |w: &str| !w.is_empty() && w != "." && w != ".." && !w.contains(['\\', ':', '\0']);
    path.split('/').all(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_say_but_never_from_https_to_http() {
        for (url, target, expected) in [
            ("https://a/x?y", "https://b/z?s=1", Some("https://b/z?s=1")),
            ("https://a/x", "/z", Some("https://a:443/z")),
            ("http://a:81/x", "//b/z", Some("http://b/z")),
            ("http://a/x", "https://b/", Some("https://b/")),
            ("https://a/x", "http://b/", None),
            ("https://a/x", "ftp://b/", None),
            ("https://a/x", "", None),
        ] {
            assert_eq!(joined(url, target).ok().as_deref(), expected, "{url} to {target}");
        }
    }

    #[test]
    fn lists_of_files_are_checked() {
        let file = |path: &str, more: &str| {
            let text = format!(
                r#"{{"sha": "{}", "siblings": [{{"rfilename": "{path}"{more}}}]}}"#,
                "a".repeat(40)
            );
            serde_json::from_str::<Model>(&text).unwrap().checked()
        };
        let small = format!(r#", "size": 3, "blobId": "{}""#, "0".repeat(40));
        let large = format!(
            r#", "size": 3, "blobId": "x", "lfs": {{"sha256": "{}", "size": 9}}"#,
            "1".repeat(64)
        );
        assert_eq!(
            file("a/b.json", &small).unwrap().files[0].hash,
            Hash::GitSha1("0".repeat(40))
        );
        let found = &file("w.bin", &large).unwrap().files[0];
        assert_eq!((found.size, &found.hash), (9, &Hash::Sha256("1".repeat(64))));
        for (path, more) in [
            ("../x", small.as_str()),
            ("/x", &small),
            ("a//x", &small),
            ("c:x", &small),
            ("a/./x", &small),
            ("x", ""),
            ("x", r#", "size": 3, "blobId": "../../x""#),
        ] {
            assert!(file(path, more).is_err(), "{path} {more}");
        }
    }

    #[test]
    fn words_of_paths_are_escaped() {
        assert_eq!(escaped("a b+ü.json"), "a%20b%2B%C3%BC.json");
    }
}
