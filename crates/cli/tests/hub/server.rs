//! A server that behaves like the hub, with faults on request.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// What the server does with the next request for a path.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Sends this many bytes of the body and closes the connection.
    CutAfter(usize),
    /// Answers with this status and these headers.
    Status(u16, &'static [(&'static str, &'static str)]),
    /// Says nothing for this long.
    Silent(Duration),
    /// Ignores the range that is asked for.
    WholeFile,
    /// Sends other bytes, as many.
    OtherBytes,
    /// Sends more bytes than the list has.
    Longer,
    /// Leads to the same path on another server.
    Redirect(String),
}

#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub headers: HashMap<String, String>,
}

#[derive(Default)]
struct World {
    /// Path in the repository to content.
    files: BTreeMap<String, Vec<u8>>,
    faults: BTreeMap<String, Vec<Fault>>,
    seen: Vec<Request>,
    /// Who asks without it gets 401.
    token: Option<String>,
}

#[derive(Clone)]
pub struct Hub {
    pub address: String,
    world: Arc<Mutex<World>>,
}

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

impl Hub {
    /// Serves one repository, `org/name`.
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let world = World {
            files,
            ..World::default()
        };
        let hub = Hub {
            address,
            world: Arc::new(Mutex::new(world)),
        };
        let serving = hub.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hub = serving.clone();
                thread::spawn(move || hub.serve(stream));
            }
        });
        hub
    }

    /// The next requests for the path whose end this is meet these faults, one each.
    pub fn fault(&self, path: &str, faults: &[Fault]) {
        self.world
            .lock()
            .unwrap()
            .faults
            .insert(path.to_owned(), faults.to_vec());
    }

    pub fn require(&self, token: &str) {
        self.world.lock().unwrap().token = Some(token.to_owned());
    }

    pub fn put(&self, path: &str, content: &[u8]) {
        self.world
            .lock()
            .unwrap()
            .files
            .insert(path.to_owned(), content.to_vec());
    }

    /// The requests since the last call.
    pub fn seen(&self) -> Vec<Request> {
        std::mem::take(&mut self.world.lock().unwrap().seen)
    }

    fn serve(&self, mut stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap())
            .lines()
            .map_while(Result::ok);
        let first = lines.next().unwrap_or_default();
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let headers: HashMap<String, String> = lines
            .take_while(|line| !line.is_empty())
            .filter_map(|line| {
                line.split_once(": ")
                    .map(|(k, v)| (k.to_lowercase(), v.to_owned()))
            })
            .collect();
        let request = Request { path, headers };
        let (fault, answer) = {
            let mut world = self.world.lock().unwrap();
            world.seen.push(request.clone());
            let plain = request.path.split('?').next().unwrap_or_default().to_owned();
            let key = world.faults.keys().find(|key| plain.ends_with(*key)).cloned();
            let faults = key.and_then(|key| world.faults.get_mut(&key));
            let fault = faults.filter(|f| !f.is_empty()).map(|f| f.remove(0));
            (fault, answer(&world, &request))
        };
        // The client may be gone; that is its business.
        let _ = reply(&mut stream, &request, fault, answer);
    }
}

fn answer(world: &World, request: &Request) -> Result<Vec<u8>, u16> {
    let sent = request.headers.get("authorization");
    if world
        .token
        .as_ref()
        .is_some_and(|token| sent != Some(&format!("Bearer {token}")))
    {
        return Err(401);
    }
    if let Some(rest) = request.path.strip_prefix("/api/models/org/name/revision/") {
        let revision = rest.split('?').next().unwrap_or_default();
        return match revision {
            "main" | "v1" | COMMIT | "refs%2Fpr%2F1" => Ok(listing(world).to_string().into_bytes()),
            _ => Err(404),
        };
    }
    let file = request
        .path
        .strip_prefix(&format!("/org/name/resolve/{COMMIT}/"))
        .ok_or(404u16)?;
    world.files.get(file).cloned().ok_or(404)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn hash(content: &[u8]) -> String {
    match content.len() > 1000 {
        true => hex(&Sha256::digest(content)),
        false => {
            let whole = [format!("blob {}\0", content.len()).as_bytes(), content].concat();
            hex(&Sha1::digest(whole))
        }
    }
}

/// As the hub lists: large files by SHA-256, small ones as git names them.
fn listing(world: &World) -> Value {
    let files = world.files.iter().map(|(path, content)| {
        let mut file = json!({ "rfilename": path, "size": content.len(), "blobId": "0".repeat(40) });
        if content.len() > 1000 {
            file["lfs"] = json!({ "sha256": hash(content), "size": content.len(), "pointerSize": 134 });
        } else {
            file["blobId"] = json!(hash(content));
        }
        file
    });
    json!({ "id": "org/name", "sha": COMMIT, "siblings": files.collect::<Vec<_>>() })
}

fn reply(
    stream: &mut TcpStream,
    request: &Request,
    fault: Option<Fault>,
    answer: Result<Vec<u8>, u16>,
) -> std::io::Result<()> {
    let range = request
        .headers
        .get("range")
        .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let mut from: usize = range.unwrap_or(0);
    let mut cut = usize::MAX;
    let mut body = match answer {
        Ok(body) => body,
        Err(status) => return head(stream, status, &[], 0),
    };
    match fault {
        Some(Fault::Status(status, headers)) => return head(stream, status, headers, 0),
        Some(Fault::Redirect(address)) => {
            let target = format!("{address}{}", request.path);
            return head(stream, 302, &[("Location", &target)], 0);
        }
        Some(Fault::Silent(time)) => thread::sleep(time),
        Some(Fault::CutAfter(bytes)) => cut = bytes,
        Some(Fault::WholeFile) => from = 0,
        Some(Fault::OtherBytes) => body.iter_mut().for_each(|b| *b ^= 1),
        Some(Fault::Longer) => body.push(0),
        None => {}
    }
    let rest = body.get(from..).unwrap_or_default();
    if from > 0 {
        let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
        head(stream, 206, &[("Content-Range", &range)], rest.len())?;
    } else {
        head(stream, 200, &[], rest.len())?;
    }
    stream.write_all(&rest[..rest.len().min(cut)])?;
    stream.flush()
}

fn head(stream: &mut TcpStream, status: u16, headers: &[(&str, &str)], length: usize) -> std::io::Result<()> {
    let mut text = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n");
    for (key, value) in headers {
        text.push_str(&format!("{key}: {value}\r\n"));
    }
    stream.write_all(format!("{text}\r\n").as_bytes())
}
