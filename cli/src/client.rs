//! The daemon's API over its unix socket: HTTP/1.1 with JSON, streams of lines and of bytes.
//!
//! A connection carries one exchange at a time, so concurrent calls open several; those
//! that are done wait here for the next call.

use std::{
    io,
    marker::PhantomData,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use futures::stream;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use p2pit_node::transfer::{
    Pace,
    exchange::{self, Ask, CHUNK_BYTES_MAX, SendError, Source},
};
use p2pit_node::{api::types::ApiError, home::Home};
use p2pit_protocol::BlobId;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    net::UnixStream,
    time::timeout,
};

use crate::problem::Problem;

/// Longest answer that is not a stream: the manifests of all ranks of one node in base64,
/// which the daemon bounds by as much.
const ANSWER_BYTES_MAX: usize = 512 << 20;
/// Longest value in a stream of lines: a job of a thousand ranks has one megabyte.
const LINE_BYTES_MAX: usize = 64 << 20;
/// Content on the way between the API and the disk.
const PIPE_BYTES: usize = 2 * CHUNK_BYTES_MAX;
/// The daemon answers at once, unless it looks around on the local network for seconds, or
/// the machine has much else to do.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// Text of an error that is not the API's own.
const ERROR_CHARS_MAX: usize = 300;

type Body = BoxBody<Bytes, io::Error>;
type Sender = SendRequest<Body>;

/// A daemon that answers.
#[derive(Debug)]
pub(crate) struct Client {
    home: Home,
    pid: Option<u32>,
    idle: Mutex<Vec<Sender>>,
}

impl Client {
    /// The daemon of `home`; `None` where none runs.
    pub(crate) async fn connect(home: &Home) -> anyhow::Result<Option<Self>> {
        let Some((sender, pid)) = open(home).await? else { return Ok(None) };
        Ok(Some(Self { home: home.clone(), pid, idle: Mutex::new(vec![sender]) }))
    }

    /// The daemon's process, as the kernel knows it, which needs no answer; `None` where it is
    /// not known, as that of another PID namespace.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// What the daemon knows without asking anybody.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let answer = timeout(ANSWER_WITHIN, self.exchange(Method::GET, path, empty())).await;
        answer.unwrap_or_else(|_| {
            let (home, seconds) = (self.home.path().display(), ANSWER_WITHIN.as_secs());
            let message = format!("the daemon of {home} has not answered for {seconds} s");
            Err(Problem::broken(message)
                .hint(
                    "end its process, which `pgrep -af p2pit` shows (its jobs go on), and start \
                     it again with `p2pit join --detach`",
                )
                .into())
        })
    }

    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.exchange(Method::POST, path, json(body)?).await
    }

    /// Posts nothing and takes the answer for granted.
    pub(crate) async fn post_empty(&self, path: &str) -> anyhow::Result<()> {
        self.exchange::<serde_json::Value>(Method::POST, path, empty()).await.map(drop)
    }

    /// The values that the daemon answers with, as they come.
    pub(crate) async fn post_lines<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<Lines<T>> {
        let bytes = self.post_bytes(path, body).await?;
        Ok(Lines { bytes, buffer: BytesMut::new(), searched: 0, value: PhantomData })
    }

    /// The bytes that the daemon answers with, as they come.
    pub(crate) async fn post_bytes(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<ByteStream> {
        let (response, _sender) = self.send(Method::POST, path, json(body)?).await?;
        Ok(ByteStream { body: response.into_body() })
    }

    /// Posts the blobs of `ids` in the format of [`exchange`].
    pub(crate) async fn post_blobs<T: DeserializeOwned>(
        &self,
        path: &str,
        source: Arc<dyn Source>,
        ids: Vec<BlobId>,
        on_bytes: impl FnMut(u64),
    ) -> anyhow::Result<T> {
        let (mut writer, reader) = tokio::io::duplex(PIPE_BYTES);
        let asks = ids.into_iter().map(Ask::whole).collect();
        // The writer goes with it: its end is the body's.
        let sending = async move {
            let pace = Pace::unlimited();
            exchange::send_blobs(source, asks, &mut writer, &pace, on_bytes).await
        };
        let posting = self.exchange(Method::POST, path, piped(reader));
        let mut posting = std::pin::pin!(posting);
        tokio::select! {
            // An answer before the end is a refusal: the rest is not wanted.
            posted = &mut posting => posted,
            sent = sending => match sent {
                // Where the daemon stopped reading, it says why.
                Ok(_) | Err(SendError::Stream(_)) => posting.await,
                Err(reason) => Err(reason.into()),
            },
        }
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Body,
    ) -> anyhow::Result<T> {
        let (response, sender) = self.send(method, path, body).await?;
        let bytes = collect(response.into_body()).await?;
        self.idle().push(sender);
        serde_json::from_slice(&bytes)
            .with_context(|| format!("the daemon's answer to {path} cannot be read"))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Body,
    ) -> anyhow::Result<(Response<Incoming>, Sender)> {
        let mut sender = self.sender().await?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "p2pit")
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .context("the request cannot be built")?;
        let response = sender.send_request(request).await.map_err(|_| self.ended())?;
        if response.status().is_success() {
            return Ok((response, sender));
        }
        let status = response.status();
        let bytes = collect(response.into_body()).await?;
        Err(refusal(status, path, &bytes).into())
    }

    async fn sender(&self) -> anyhow::Result<Sender> {
        loop {
            let Some(mut sender) = self.idle().pop() else { break };
            if sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let opened = open(&self.home).await?.ok_or_else(|| self.ended())?;
        Ok(opened.0)
    }

    fn ended(&self) -> Problem {
        Problem::broken(format!("the daemon of {} has ended meanwhile", self.home.path().display()))
            .hint("`p2pit join --detach` starts it again; its jobs go on")
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Sender>> {
        // Whole between any two of its statements.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Values of a stream of lines.
#[derive(Debug)]
pub(crate) struct Lines<T> {
    bytes: ByteStream,
    buffer: BytesMut,
    /// Bytes of the buffer without a line's end.
    searched: usize,
    value: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// The next value; `None` at the end.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<T>> {
        loop {
            if let Some(at) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.searched + at + 1);
                self.searched = 0;
                return parse(&line).map(Some);
            }
            self.searched = self.buffer.len();
            if self.searched > LINE_BYTES_MAX {
                return Err(Problem::broken("the daemon sends a line without end").into());
            }
            match self.bytes.next().await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Problem::broken("the daemon's answer broke off").into()),
            }
        }
    }
}

/// Bytes of an answer.
#[derive(Debug)]
pub(crate) struct ByteStream {
    body: Incoming,
}

impl ByteStream {
    /// The next bytes; `None` at the proper end.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Bytes>> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.context("the daemon's answer broke off")?;
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// Hands everything to `writer`, for a reader at its other end; stops quietly where
    /// that reader does.
    pub(crate) async fn pump(mut self, mut writer: DuplexStream) -> anyhow::Result<()> {
        while let Some(bytes) = self.next().await? {
            if writer.write_all(&bytes).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// A pipe from [`ByteStream::pump`] to a reader.
pub(crate) fn pipe() -> (DuplexStream, DuplexStream) {
    tokio::io::duplex(PIPE_BYTES)
}

async fn open(home: &Home) -> anyhow::Result<Option<(Sender, Option<u32>)>> {
    let socket = home.api_socket().context("the home's socket cannot be named")?;
    let stream = match UnixStream::connect(socket.usable()).await {
        Ok(stream) => stream,
        Err(e)
            if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
        {
            return Ok(None);
        }
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            let message =
                format!("the daemon's socket {} is another user's", socket.file().display());
            return Err(Problem::request(message)
                .hint("`--home DIR` names a home of your own")
                .into());
        }
        Err(e) => {
            return Err(e).with_context(|| format!("cannot reach {}", socket.file().display()));
        }
    };
    let listener = stream.peer_cred().context("the daemon's socket does not say whose it is")?;
    let pid = listener.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0);
    let (sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .context("the daemon does not speak to this command")?;
    // What breaks the connection is met by whoever waits for an answer on it.
    tokio::spawn(connection);
    Ok(Some((sender, pid)))
}

async fn collect(body: Incoming) -> anyhow::Result<Bytes> {
    let collected = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
    let collected = collected
        .map_err(|e| anyhow::Error::msg(e.to_string()).context("the daemon's answer broke off"))?;
    Ok(collected.to_bytes())
}

fn refusal(status: StatusCode, path: &str, bytes: &[u8]) -> Problem {
    match serde_json::from_slice::<ApiError>(bytes) {
        Ok(error) => error.into(),
        Err(_) => {
            let text: String =
                String::from_utf8_lossy(bytes).chars().take(ERROR_CHARS_MAX).collect();
            Problem::broken(format!("the daemon answers {path} with {status}: {}", text.trim()))
                .hint("daemon and command may be of different versions: restart the daemon")
        }
    }
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(line).context("the daemon's answer cannot be read")
}

fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed()
}

fn json(value: &impl Serialize) -> anyhow::Result<Body> {
    let bytes = serde_json::to_vec(value).context("the request cannot be written")?;
    Ok(Full::from(bytes).map_err(|never| match never {}).boxed())
}

fn piped(reader: DuplexStream) -> Body {
    let chunks = stream::try_unfold(reader, |mut reader| async {
        let mut buffer = BytesMut::with_capacity(CHUNK_BYTES_MAX);
        let read = reader.read_buf(&mut buffer).await?;
        Ok((read > 0).then(|| (Frame::data(buffer.freeze()), reader)))
    });
    StreamBody::new(Box::pin(chunks)).boxed()
}

#[cfg(test)]
mod tests {
    use p2pit_node::transfer::BlobStore;
    use p2pit_protocol::PeerId;
    use tokio::{
        io::{AsyncBufReadExt as _, BufReader},
        net::UnixListener,
    };

    use super::*;

    #[tokio::test]
    async fn without_a_daemon_there_is_nothing_to_connect_to() {
        let (_directory, home) = new_home();
        assert!(Client::connect(&home).await.unwrap().is_none());
        // A socket that outlived its daemon is none either.
        drop(UnixListener::bind(home.api_socket().unwrap().usable()).unwrap());
        assert!(Client::connect(&home).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_connection_is_used_again_and_an_error_of_the_api_stays_itself() {
        let (_directory, home) = new_home();
        let answers = vec![
            answer(200, r#"{"text":"one"}"#),
            answer(400, r#"{"error":"no job `abcd`","hint":"look","broken":false}"#),
        ];
        let served = serve(&home, answers);
        let client = Client::connect(&home).await.unwrap().unwrap();
        let value: serde_json::Value = client.get("/v1/me").await.unwrap();
        assert_eq!(value["text"], "one");
        let error = client.post::<serde_json::Value>("/v1/resolve", &1).await.unwrap_err();
        let problem = error.downcast_ref::<Problem>().unwrap();
        assert_eq!(*problem, Problem::request("no job `abcd`").hint("look"));
        assert_eq!(served.await.unwrap(), ["GET /v1/me", "POST /v1/resolve"]);
    }

    #[tokio::test]
    async fn lines_come_one_by_one_and_a_cut_is_told_from_the_end() {
        let (_directory, home) = new_home();
        serve(&home, vec![answer(200, "1\n22\n333\n4")]);
        let client = Client::connect(&home).await.unwrap().unwrap();
        let mut lines = client.post_lines::<u32>("/v1/watch", &()).await.unwrap();
        for number in [1, 22, 333] {
            assert_eq!(lines.next().await.unwrap(), Some(number));
        }
        let error = lines.next().await.unwrap_err();
        assert!(error.to_string().contains("broke off"), "{error}");
    }

    #[tokio::test]
    async fn blobs_are_posted_as_the_daemon_takes_them() {
        let (directory, home) = new_home();
        let from = BlobStore::open(&directory.path().join("from")).unwrap();
        let to = BlobStore::open(&directory.path().join("to")).unwrap();
        let content = vec![7; 3 * CHUNK_BYTES_MAX + 5];
        let id = from.put_bytes(&content).unwrap();
        let listener = UnixListener::bind(home.api_socket().unwrap().usable()).unwrap();
        let store = to.clone();
        let served = tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            read_head(&mut stream).await;
            let mut body = dechunk(&mut stream).await;
            let me = PeerId(p2pit_protocol::identity::KeyPair::from_seed(&[1; 32]).public());
            exchange::receive_any(&store, me, &mut &body.split_off(0)[..]).await.unwrap();
            stream.write_all(answer(200, "7").as_bytes()).await.unwrap();
        });
        let client = Client::connect(&home).await.unwrap().unwrap();
        let mut told = 0;
        let source = Arc::new(from.clone());
        let answer: u32 =
            client.post_blobs("/v1/blobs", source, vec![id], |bytes| told += bytes).await.unwrap();
        served.await.unwrap();
        assert_eq!((answer, told), (7, content.len() as u64));
        assert_eq!(to.read(&id, content.len()).unwrap(), content);
    }

    #[tokio::test]
    async fn what_is_refused_is_not_sent_to_its_end() {
        let (directory, home) = new_home();
        let from = BlobStore::open(&directory.path().join("from")).unwrap();
        // More than pipes and sockets hold.
        let id = from.put_bytes(&vec![7; 64 * CHUNK_BYTES_MAX]).unwrap();
        let listener = UnixListener::bind(home.api_socket().unwrap().usable()).unwrap();
        let served = tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            read_head(&mut stream).await;
            let refusal = answer(502, r#"{"error":"no room","hint":"make some","broken":true}"#);
            stream.write_all(refusal.as_bytes()).await.unwrap();
            stream
        });
        let client = Client::connect(&home).await.unwrap().unwrap();
        let posting = client.post_blobs::<u32>("/v1/blobs", Arc::new(from), vec![id], |_| {});
        let error = posting.await.unwrap_err();
        assert_eq!(
            *error.downcast_ref::<Problem>().unwrap(),
            Problem::broken("no room").hint("make some")
        );
        drop(served.await.unwrap());
    }

    fn new_home() -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&directory.path().join("home")).unwrap();
        (directory, home)
    }

    fn answer(status: u16, body: &str) -> String {
        format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    /// Answers on one connection; gives the requests' first lines.
    fn serve(home: &Home, answers: Vec<String>) -> tokio::task::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(home.api_socket().unwrap().usable()).unwrap();
        tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            let mut requests = Vec::new();
            for answer in answers {
                let (first, length) = read_head(&mut stream).await;
                stream.read_exact(&mut vec![0; length]).await.unwrap();
                requests.push(first.trim_end_matches(" HTTP/1.1").to_owned());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            requests
        })
    }

    async fn read_head(stream: &mut BufReader<UnixStream>) -> (String, usize) {
        let (mut first, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            match line.trim() {
                "" => return (first, length),
                header if first.is_empty() => first = header.to_owned(),
                header => {
                    if let Some(number) = header.strip_prefix("content-length: ") {
                        length = number.parse().unwrap();
                    }
                }
            }
        }
    }

    async fn dechunk(stream: &mut BufReader<UnixStream>) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            let length = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut chunk = vec![0; length + 2];
            stream.read_exact(&mut chunk).await.unwrap();
            if length == 0 {
                return body;
            }
            body.extend_from_slice(&chunk[..length]);
        }
    }
}
