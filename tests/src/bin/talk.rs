//! The processes of a two-process job that talk to each other over TCP.
//!
//! Each finds the other by `HOST_GROUP0_PROCESS<j>`: process 1 dials process 0 at the
//! job's own port and says where it listens itself; process 0 dials back there.

use std::{
    env,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// The other process may start later.
const DIAL_WITHIN: Duration = Duration::from_secs(30);
const DIAL_AGAIN: Duration = Duration::from_millis(50);

#[expect(clippy::print_stdout, reason = "it is the log of the job")]
fn main() -> Result<()> {
    let port: u16 = var("MASTER_PORT")?.parse().context("MASTER_PORT is no port")?;
    let heard = match var("PROCESS_INDEX")?.as_str() {
        "0" => first(port)?,
        _ => second(port)?,
    };
    println!("heard: {heard}");
    Ok(())
}

fn first(port: u16) -> Result<String> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("cannot listen")?;
    let (stream, _) = listener.accept().context("nobody can come")?;
    let line = read_line(stream)?;
    let (name, port) = line.split_once(' ').context("the other says no port")?;
    let mut back = dial(1, port.parse().context("the other's port is none")?)?;
    writeln!(back, "process 0 greets {name}").context("cannot answer")?;
    Ok(format!("{name} is here"))
}

fn second(port: u16) -> Result<String> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).context("cannot listen")?;
    let mut stream = dial(0, port)?;
    let own = listener.local_addr().context("the listener has no address")?.port();
    writeln!(stream, "process-1 {own}").context("cannot speak")?;
    let (back, _) = listener.accept().context("nobody answers")?;
    read_line(back)
}

fn dial(process: u32, port: u16) -> Result<TcpStream> {
    let host = var(&format!("HOST_GROUP0_PROCESS{process}"))?;
    let deadline = Instant::now() + DIAL_WITHIN;
    loop {
        match TcpStream::connect((host.as_str(), port)) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > deadline => {
                return Err(e).with_context(|| format!("cannot reach {host}:{port}"));
            }
            Err(_) => std::thread::sleep(DIAL_AGAIN),
        }
    }
}

fn read_line(stream: TcpStream) -> Result<String> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("cannot listen to the other")?;
    Ok(line.trim_end().to_owned())
}

fn var(name: &str) -> Result<String> {
    env::var(name).with_context(|| format!("{name} is not set"))
}
