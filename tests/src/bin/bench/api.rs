//! The daemon's API, spoken without a runtime.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use anyhow::{Context as _, Result, ensure};
use p2pit_node::home::Home;
use serde::{Serialize, de::DeserializeOwned};

pub(crate) fn get<T: DeserializeOwned>(home: &Home, path: &str) -> Result<T> {
    let answer = send(home, "GET", path, &[])?;
    serde_json::from_str(&answer).with_context(|| format!("the answer to {path}: {answer}"))
}

pub(crate) fn exchange<T: DeserializeOwned>(
    home: &Home,
    path: &str,
    body: &impl Serialize,
) -> Result<T> {
    let answer = post(home, path, body)?;
    serde_json::from_str(&answer).with_context(|| format!("the answer to {path}: {answer}"))
}

pub(crate) fn post(home: &Home, path: &str, body: &impl Serialize) -> Result<String> {
    send(home, "POST", path, &serde_json::to_vec(body)?)
}

/// One exchange on a connection of its own. In HTTP/1.0 an answer ends where the
/// connection does.
fn send(home: &Home, method: &str, path: &str, body: &[u8]) -> Result<String> {
    let socket = home.api_socket()?;
    let mut stream = UnixStream::connect(socket.usable()).context("no daemon answers")?;
    let head = format!(
        "{method} {path} HTTP/1.0\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no end of head")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    ensure!(status == "200", "{method} {path} was answered with {status}: {body}");
    Ok(body.to_owned())
}
