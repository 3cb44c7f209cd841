//! `pull`, `list`, `rm` and names of models, against a server that behaves like the hub, faults included.

#![cfg(feature = "hub")]
// Helpers of tests are not seen as tests by the lint.
#![allow(clippy::unwrap_used)]

#[path = "hub/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use server::{COMMIT, Fault, Hub, hash};

const WEIGHTS: &str = "ranged.mlpackage/Data/com.apple.CoreML/weights/weight.bin";

struct Place {
    hub: Hub,
    home: tempfile::TempDir,
    encoder: PathBuf,
}

impl Place {
    /// A hub with a small text encoder, and files that no model needs.
    fn new() -> Self {
        let encoder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/testdata/encoders/ranged");
        let mut files = BTreeMap::new();
        collect(&encoder, &encoder, &mut files);
        files.remove("golden.json");
        files.insert("README.md".to_owned(), b"# A model".to_vec());
        files.insert("onnx/model.onnx".to_owned(), vec![7; 3000]);
        Place {
            hub: Hub::start(files),
            home: tempfile::tempdir().unwrap(),
            encoder,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_candle-coreml"));
        for key in [
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_OFFLINE",
        ] {
            command.env_remove(key);
        }
        for key in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(key);
        }
        command
            .args(args)
            .env("HF_ENDPOINT", &self.hub.address)
            .env("HF_HOME", self.home.path())
            .env("HF_HUB_DOWNLOAD_TIMEOUT", "2")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn pull(&self) -> Output {
        self.run(&["pull", "org/name"])
    }

    fn model(&self) -> PathBuf {
        self.home.path().join("hub/models--org--name")
    }

    fn snapshot(&self) -> PathBuf {
        self.model().join("snapshots").join(COMMIT)
    }

    fn list(&self) -> Vec<Value> {
        serde_json::from_str(&stdout(&self.run(&["list", "--json"]))).unwrap()
    }

    /// How many requests there were for the weights, and from which byte.
    fn ranges(&self) -> Vec<String> {
        let weights = self
            .hub
            .seen()
            .into_iter()
            .filter(|r| r.path.ends_with("weight.bin"));
        weights
            .map(|r| r.headers.get("range").cloned().unwrap_or_default())
            .collect()
    }

    /// The files are those of the repository, byte for byte, and no others.
    fn assert_whole(&self, why: &str) {
        let mut found = BTreeMap::new();
        collect(&self.snapshot(), &self.snapshot(), &mut found);
        let mut expected = BTreeMap::new();
        collect(&self.encoder, &self.encoder, &mut expected);
        expected.remove("golden.json");
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>(),
            "{why}"
        );
        assert!(found == expected, "{why}: contents differ");
        assert_eq!(
            fs::read_to_string(self.model().join("refs/main")).unwrap(),
            COMMIT,
            "{why}"
        );
        let list = self.list();
        assert_eq!(
            (list.len(), &list[0]["complete"]),
            (1, &Value::Bool(true)),
            "{why}"
        );
    }

    /// Nothing that was fetched is taken for a model.
    fn assert_no_model(&self, why: &str) {
        let found = self.run(&["embed", "org/name", "--text", "a", "--offline"]);
        assert!(!found.status.success(), "{why}");
        assert!(
            stderr(&found).contains("not on this machine"),
            "{why}: {}",
            stderr(&found)
        );
        assert!(!self.model().join("refs/main").exists(), "{why}");
        assert!(self.list().iter().all(|row| row["complete"] == false), "{why}");
    }
}

fn collect(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, files);
            continue;
        }
        let name = path
            .strip_prefix(root)
            .unwrap()
            .to_str()
            .unwrap()
            .replace('\\', "/");
        files.insert(name, fs::read(&path).unwrap());
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_model_is_pulled_used_by_name_listed_and_removed() {
    let place = Place::new();
    let folder = stdout(&place.pull());
    assert_eq!(Path::new(folder.trim()), place.snapshot());
    place.assert_whole("pulled");
    place.hub.seen();
    // By name, without a request.
    let by_name = stdout(&place.run(&["embed", "org/name", "--text", "the cat"]));
    let by_path = stdout(&place.run(&["embed", place.encoder.to_str().unwrap(), "--text", "the cat"]));
    assert_eq!(by_name, by_path);
    assert!(stdout(&place.run(&["ops", "org/name"])).contains("layer_norm"));
    assert!(place.hub.seen().is_empty());
    // Pulled again: one question, no file.
    stdout(&place.pull());
    assert_eq!(place.hub.seen().len(), 1);
    let freed = place.run(&["rm", "org/name"]);
    assert!(freed.status.success(), "{}", stderr(&freed));
    assert!(!place.model().exists());
    assert!(place.list().is_empty());
    let again = place.run(&["rm", "org/name"]);
    assert!(!again.status.success() && stderr(&again).contains("not on this machine"));
}

#[test]
fn a_name_that_is_not_here_is_fetched_where_a_path_is_taken() {
    let place = Place::new();
    let found = place.run(&["embed", "org/name@v1", "--text", "the cat"]);
    stdout(&found);
    assert_eq!(fs::read_to_string(place.model().join("refs/v1")).unwrap(), COMMIT);
    for (args, words) in [
        (
            &["embed", "nowhere/model.mlpackage", "--text", "a"][..],
            "nowhere/model.mlpackage",
        ),
        (&["embed", "org/other", "--text", "a"], "404"),
        (&["pull", "name"], "ORG/NAME"),
        (&["pull", "org/name@v9"], "404"),
        (&["pull", "org/name", "--folder", "lut9"], "lut9"),
        (&["pull", "org/name", "--checkpoint"], "no weights"),
    ] {
        let output = place.run(args);
        assert!(!output.status.success(), "{args:?}");
        assert!(stderr(&output).contains(words), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn a_server_serves_models_of_the_hub_under_their_names() {
    let place = Place::new();
    let mut serve = place
        .command(&[
            "serve",
            "org/name",
            "small=org/name@main",
            "--port",
            "0",
            "--quiet",
        ])
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(serve.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    serve.kill().unwrap();
    serve.wait().unwrap();
    assert!(line.ends_with(" serves org/name, small\n"), "{line}");
    place.assert_whole("serve");
}

#[test]
fn a_pinned_revision_asks_for_that_commit_and_leaves_no_ref() {
    let place = Place::new();
    let name = format!("org/name@{COMMIT}");
    stdout(&place.run(&["pull", &name]));
    assert!(place.hub.seen().iter().all(|r| r.path.contains(COMMIT)));
    assert!(!place.model().join("refs").exists());
    stdout(&place.run(&["embed", &name, "--text", "a", "--offline"]));
    stdout(&place.run(&["pull", "org/name@refs/pr/1"]));
    assert!(place.model().join("refs/refs/pr/1").exists());
    // The same commit under another name: no file is fetched twice.
    assert_eq!(place.ranges(), Vec::<String>::new());
}

#[test]
fn what_was_cut_goes_on_where_it_stopped() {
    let size = fs::metadata(Place::new().encoder.join(WEIGHTS)).unwrap().len();
    let silent = Fault::Silent(Duration::from_secs(4));
    let rows: [(&str, Vec<Fault>, Vec<String>); 7] = [
        (
            "cut",
            vec![Fault::CutAfter(5000)],
            vec![String::new(), "bytes=5000-".to_owned()],
        ),
        (
            "cut twice",
            vec![Fault::CutAfter(5000), Fault::CutAfter(100)],
            vec![String::new(), "bytes=5000-".to_owned(), "bytes=5100-".to_owned()],
        ),
        (
            "cut before the first byte of the last one",
            vec![Fault::CutAfter(usize::try_from(size).unwrap() - 1)],
            vec![String::new(), format!("bytes={}-", size - 1)],
        ),
        (
            "no ranges",
            vec![Fault::CutAfter(5000), Fault::WholeFile],
            vec![String::new(), "bytes=5000-".to_owned()],
        ),
        (
            "busy",
            vec![Fault::Status(503, &[]), Fault::Status(500, &[])],
            vec![String::new(); 3],
        ),
        ("silent", vec![silent], vec![String::new(); 2]),
        (
            "other bytes once",
            vec![Fault::OtherBytes],
            vec![String::new(); 2],
        ),
    ];
    for (why, faults, ranges) in rows {
        let place = Place::new();
        place.hub.fault("weight.bin", &faults);
        stdout(&place.pull());
        assert_eq!(place.ranges(), ranges, "{why}");
        place.assert_whole(why);
    }
}

#[test]
fn what_an_earlier_run_left_is_used_and_never_trusted() {
    let weights = fs::read(Place::new().encoder.join(WEIGHTS)).unwrap();
    let mut wrong = weights[..5000].to_vec();
    wrong[17] ^= 1;
    for (why, left, ranges) in [
        ("a part", weights[..5000].to_vec(), vec!["bytes=5000-"]),
        ("all of it", weights.clone(), vec![]),
        ("a wrong part", wrong, vec!["bytes=5000-", ""]),
        ("too much", vec![0; weights.len() + 1], vec![""]),
    ] {
        let place = Place::new();
        let blobs = place.model().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", hash(&weights))), left).unwrap();
        place.assert_no_model(why);
        stdout(&place.pull());
        assert_eq!(place.ranges(), ranges, "{why}");
        place.assert_whole(why);
    }
}

#[test]
fn an_interrupted_download_is_no_model_and_goes_on() {
    let place = Place::new();
    let long = Fault::Silent(Duration::from_secs(60));
    place.hub.fault("weight.bin", &[Fault::CutAfter(5000), long]);
    let mut child = place
        .command(&["pull", "org/name"])
        .env("HF_HUB_DOWNLOAD_TIMEOUT", "60")
        .spawn()
        .unwrap();
    let weights = fs::read(place.encoder.join(WEIGHTS)).unwrap();
    let part = place
        .model()
        .join("blobs")
        .join(format!("{}.incomplete", hash(&weights)));
    let start = Instant::now();
    while fs::metadata(&part).map_or(0, |m| m.len()) < 5000 {
        assert!(start.elapsed() < Duration::from_secs(30), "nothing came");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    place.assert_no_model("killed");
    let list = place.list();
    assert_eq!((list.len(), list[0]["complete"].as_bool()), (1, Some(false)));
    assert!(list[0]["bytes_here"].as_u64().unwrap() >= 5000);
    place.hub.fault("weight.bin", &[]);
    place.hub.seen();
    stdout(&place.run(&["embed", "org/name", "--text", "a"]));
    assert_eq!(place.ranges(), ["bytes=5000-"]);
    place.assert_whole("gone on");
}

#[test]
fn what_the_hub_refuses_is_final_and_says_why() {
    let forever = |fault: Fault| vec![fault; 20];
    for (why, path, faults, words) in [
        ("401", "/main", vec![Fault::Status(401, &[])], "no token was sent"),
        ("403", "weight.bin", vec![Fault::Status(403, &[])], "consent"),
        (
            "404",
            "/main",
            vec![Fault::Status(404, &[("X-Error-Code", "RevisionNotFound")])],
            "no revision \"main\"",
        ),
        ("418", "/main", vec![Fault::Status(418, &[])], "418"),
        (
            "down",
            "/main",
            forever(Fault::Status(502, &[])),
            "given up after 6 attempts",
        ),
        (
            "cut at once",
            "weight.bin",
            forever(Fault::CutAfter(0)),
            "given up",
        ),
        (
            "wrong hash",
            "weight.bin",
            forever(Fault::OtherBytes),
            "another content",
        ),
        (
            "wrong hash of a small file",
            "/config.json",
            forever(Fault::OtherBytes),
            "another content",
        ),
        (
            "wrong size",
            "weight.bin",
            forever(Fault::Longer),
            "the hub's list says",
        ),
        ("round and round", "weight.bin", vec![], "redirects"),
    ] {
        let place = Place::new();
        let faults = match why {
            "round and round" => forever(Fault::Redirect(place.hub.address.clone())),
            _ => faults,
        };
        place.hub.fault(path, &faults);
        let output = place.pull();
        assert_eq!(output.status.code(), Some(1), "{why}");
        assert!(stderr(&output).contains(words), "{why}: {}", stderr(&output));
        place.assert_no_model(why);
    }
}

#[test]
fn a_server_that_asks_to_wait_is_waited_for() {
    let place = Place::new();
    place
        .hub
        .fault("/main", &[Fault::Status(429, &[("Retry-After", "2")])]);
    let start = Instant::now();
    stdout(&place.pull());
    assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
    place.assert_whole("waited");
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let place = Place::new();
    let store = Hub::start(BTreeMap::new());
    store.put(WEIGHTS, &fs::read(place.encoder.join(WEIGHTS)).unwrap());
    place.hub.require("hf_secret");
    place
        .hub
        .fault("weight.bin", &[Fault::Redirect(store.address.clone())]);
    let without = place.pull();
    assert!(stderr(&without).contains("401"), "{}", stderr(&without));
    place.hub.seen();
    let with = place
        .command(&["pull", "org/name"])
        .env("HF_TOKEN", "hf_secret")
        .output()
        .unwrap();
    stdout(&with);
    assert!(
        place
            .hub
            .seen()
            .iter()
            .all(|r| r.headers.contains_key("authorization"))
    );
    let elsewhere = store.seen();
    assert_eq!(elsewhere.len(), 1);
    assert!(!elsewhere[0].headers.contains_key("authorization"));
    place.assert_whole("redirected");
    // From the file where the hub's own tool keeps it.
    let other = Place::new();
    other.hub.require("hf_file");
    fs::write(other.home.path().join("token"), "hf_file\n").unwrap();
    stdout(&other.pull());
}

#[test]
fn without_the_network_only_what_is_here_is_used() {
    let place = Place::new();
    for args in [
        &["embed", "org/name", "--text", "a", "--offline"][..],
        &["--offline", "pull", "org/name"],
    ] {
        let output = place.run(args);
        assert!(
            stderr(&output).contains("not on this machine"),
            "{args:?}: {}",
            stderr(&output)
        );
    }
    let output = place
        .command(&["pull", "org/name"])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(place.hub.seen().is_empty());
    stdout(&place.pull());
    place.hub.seen();
    let folder = stdout(
        &place
            .command(&["pull", "org/name"])
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap(),
    );
    assert_eq!(Path::new(folder.trim()), place.snapshot());
    assert!(place.hub.seen().is_empty());
    // A file that is gone makes it no model.
    fs::remove_file(place.snapshot().join("config.json")).unwrap();
    assert!(
        !place
            .run(&["embed", "org/name", "--text", "a", "--offline"])
            .status
            .success()
    );
    stdout(&place.run(&["embed", "org/name", "--text", "a"]));
    place.assert_whole("mended");
}

#[test]
fn two_processes_fetch_every_file_once() {
    let place = Place::new();
    place
        .hub
        .fault("weight.bin", &[Fault::Silent(Duration::from_secs(1))]);
    let children = [(); 2].map(|()| place.command(&["pull", "org/name"]).spawn().unwrap());
    for child in children {
        stdout(&child.wait_with_output().unwrap());
    }
    assert_eq!(place.ranges().len(), 1);
    place.assert_whole("at once");
}

#[test]
fn what_other_programs_keep_in_the_cache_is_used_and_stays() {
    let place = Place::new();
    let weights = fs::read(place.encoder.join(WEIGHTS)).unwrap();
    let blob = place.model().join("blobs").join(hash(&weights));
    let theirs = place
        .model()
        .join("snapshots")
        .join("f".repeat(40))
        .join("weights.bin");
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::create_dir_all(theirs.parent().unwrap()).unwrap();
    fs::write(&blob, &weights).unwrap();
    fs::write(&theirs, "theirs").unwrap();
    #[cfg(unix)]
    {
        fs::remove_file(&theirs).unwrap();
        std::os::unix::fs::symlink(Path::new("../../blobs").join(hash(&weights)), &theirs).unwrap();
    }
    stdout(&place.pull());
    assert_eq!(place.ranges(), Vec::<String>::new());
    place.run(&["rm", "org/name@main"]);
    assert!(theirs.exists());
    assert!(!place.snapshot().exists() && !place.model().join("refs/main").exists());
    assert!(place.list().is_empty());
    #[cfg(unix)]
    assert!(blob.exists(), "another snapshot links to it");
}

#[test]
fn a_dry_run_names_the_files_and_fetches_none() {
    let place = Place::new();
    let text = stdout(&place.run(&["pull", "org/name", "--dry-run"]));
    assert!(
        text.contains("weight.bin") && text.contains("1_Pooling/config.json"),
        "{text}"
    );
    assert!(!text.contains("onnx") && !text.contains("README"), "{text}");
    assert_eq!(place.hub.seen().len(), 1);
    assert!(!place.model().exists());
}
