//! The least program that carries a file over QUIC: what quinn allows on this machine,
//! before identities, verification and a store.
//!
//! Two processes of this binary, each on one thread, which on two cores is quickest. The
//! receiver prints where it listens and its certificate, writes what it gets to a file,
//! and says so; then both end.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use data_encoding::HEXLOWER;
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, ServerConfig, TokioRuntime,
    TransportConfig, VarInt,
    rustls::{
        RootCertStore,
        pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    },
};
use socket2::{Domain, Socket, Type};

use crate::table::timed;

/// What fits through an Ethernet, which is quinn's own default.
pub(crate) const PACKET_BYTES: u16 = 1452;
/// As p2pit's data plane sends on loopback; half the work.
pub(crate) const LARGE_PACKET_BYTES: u16 = 6000;

/// The first word of the command line of each process.
const RECEIVE: &str = "quic-receive";
const SEND: &str = "quic-send";

const NAME: &str = "localhost";
const STREAM_WINDOW_BYTES: u32 = 32 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
const BUFFER_BYTES: usize = 1 << 20;

/// Carries `from` to `to` in packets of this size: the time of the whole sender, from its
/// start to its end, which is after the last byte was written.
pub(crate) fn copy(from: &Path, to: &Path, packet_bytes: u16) -> Result<Duration> {
    let me = std::env::current_exe()?;
    let packet = packet_bytes.to_string();
    let mut receiver = Receiver::start(Command::new(&me).args([RECEIVE, &packet]).arg(to))?;
    let mut sender = Command::new(&me);
    sender.args([SEND, &packet, &receiver.addr, &receiver.certificate]).arg(from);
    let (took, _) = timed(&mut sender)?;
    let status = receiver.child.wait()?;
    ensure!(status.success(), "the receiver of the QUIC program ended with {status}");
    Ok(took)
}

/// Killed when dropped.
struct Receiver {
    child: Child,
    addr: String,
    certificate: String,
}

impl Receiver {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let words = line.trim_end().split_once(' ');
        let (addr, certificate) = words.context("the receiver of the QUIC program is silent")?;
        let (addr, certificate) = (addr.to_owned(), certificate.to_owned());
        Ok(Self { child, addr, certificate })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Does nothing to one that has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The work of one of the two processes, where the command line asks for it.
pub(crate) fn run_as_told(words: &[String]) -> Option<Result<()>> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let bytes = |text: &str| text.parse().context("no number of bytes");
    match words[..] {
        [RECEIVE, packet, to] => Some(bytes(packet).and_then(|it| run(receive(it, to.as_ref())))),
        [SEND, packet, addr, certificate, from] => {
            Some(bytes(packet).and_then(|it| run(send(it, addr, certificate, from.as_ref()))))
        }
        _ => None,
    }
}

fn run(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

async fn receive(packet_bytes: u16, to: &Path) -> Result<()> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let certificate = made.cert.der().clone();
    let hex = HEXLOWER.encode(&certificate);
    let key = PrivatePkcs8KeyDer::from(made.key_pair.serialize_der());
    let mut config = ServerConfig::with_single_cert(vec![certificate], key.into())?;
    config.transport_config(transport(packet_bytes));
    let endpoint = endpoint(packet_bytes, Some(config))?;
    writeln!(io::stdout(), "{} {hex}", endpoint.local_addr()?)?;

    let incoming = endpoint.accept().await.context("the endpoint closed")?;
    let connection = incoming.await?;
    let (mut answer, mut stream) = connection.accept_bi().await?;
    let mut file = File::create(to)?;
    let mut gathered = Vec::with_capacity(BUFFER_BYTES);
    let mut bytes: u64 = 0;
    while let Some(chunk) = stream.read_chunk(BUFFER_BYTES, true).await? {
        bytes += chunk.bytes.len() as u64;
        if gathered.len() + chunk.bytes.len() > BUFFER_BYTES {
            file.write_all(&gathered)?;
            gathered.clear();
        }
        gathered.extend_from_slice(&chunk.bytes);
    }
    file.write_all(&gathered)?;
    answer.write_all(&bytes.to_be_bytes()).await?;
    answer.finish()?;
    connection.closed().await;
    Ok(())
}

async fn send(packet_bytes: u16, addr: &str, certificate: &str, from: &Path) -> Result<()> {
    let addr: SocketAddr = addr.parse()?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(HEXLOWER.decode(certificate.as_bytes())?))?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(transport(packet_bytes));
    let endpoint = endpoint(packet_bytes, None)?;
    let connection = endpoint.connect_with(config, addr, NAME)?.await?;
    let (mut stream, mut answer) = connection.open_bi().await?;
    let mut file = File::open(from)?;
    let mut sent: u64 = 0;
    loop {
        let mut buffer = vec![0; BUFFER_BYTES];
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        buffer.truncate(read);
        stream.write_chunk(Bytes::from(buffer)).await?;
        sent += read as u64;
    }
    stream.finish()?;
    let mut received = [0; 8];
    answer.read_exact(&mut received).await?;
    let received = u64::from_be_bytes(received);
    if received != sent {
        bail!("{received} bytes of {sent} arrived");
    }
    connection.close(VarInt::from_u32(0), b"");
    endpoint.wait_idle().await;
    Ok(())
}

fn transport(packet_bytes: u16) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(CONNECTION_WINDOW_BYTES.into());
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(packet_bytes);
    transport.mtu_discovery_config(Some(discovery));
    Arc::new(transport)
}

fn endpoint(packet_bytes: u16, server: Option<ServerConfig>) -> Result<Endpoint> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // The kernel grants what its limits allow.
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(packet_bytes)?;
    Ok(Endpoint::new(config, server, socket.into(), Arc::new(TokioRuntime))?)
}
