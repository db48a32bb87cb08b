//! rsync, to its own daemon and over ssh, both on loopback.

use std::{
    fs::{self, File, Permissions},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use p2pit_tests::{SOON, wait_until};

use crate::{
    table::{Absent, timed},
    world,
};

/// Not on the path of an ordinary user.
const SSHD: &str = "/usr/sbin/sshd";
const MODULE: &str = "all";

/// Both servers; ended when dropped.
pub(crate) struct Rsync {
    dir: PathBuf,
    daemon: Result<Server, Absent>,
    sshd: Result<Server, Absent>,
}

/// Which way rsync takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Way {
    Daemon,
    Ssh,
}

impl Rsync {
    /// With what they need to write down in `dir`, into which they write what they get.
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let has_rsync = world::program("rsync").is_some();
        let daemon = match has_rsync {
            true => Ok(daemon(dir)?),
            false => Err(Absent::NotInstalled("rsync")),
        };
        let sshd = match has_rsync && Path::new(SSHD).is_file() && world::program("ssh").is_some() {
            true => Ok(sshd(dir)?),
            false => Err(Absent::NotInstalled("rsync openssh-client openssh-server")),
        };
        Ok(Self { dir: dir.to_owned(), daemon, sshd })
    }

    pub(crate) fn has(&self, way: Way) -> Result<(), Absent> {
        self.server(way).map(drop)
    }

    /// Carries a file or a directory into a directory in that of this server, made if it
    /// is not there: the time of the whole command.
    pub(crate) fn copy(&self, way: Way, from: &Path, to: &Path) -> Result<Duration> {
        let server = self.server(way).map_err(|absent| anyhow::anyhow!("rsync: {absent}"))?;
        fs::create_dir_all(to)?;
        let port = server.port;
        let mut command = Command::new("rsync");
        command.arg("-a");
        match way {
            Way::Daemon => {
                let to = to.strip_prefix(&self.dir)?.display();
                command.arg(from).arg(format!("rsync://127.0.0.1:{port}/{MODULE}/{to}/"))
            }
            Way::Ssh => {
                let key = self.dir.join("user-key");
                let ssh = format!(
                    "ssh -F /dev/null -p {port} -i {} -o StrictHostKeyChecking=no \
                     -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
                    key.display()
                );
                command.arg("-e").arg(ssh).arg(from).arg(format!("127.0.0.1:{}/", to.display()))
            }
        };
        Ok(timed(&mut command)?.0)
    }

    fn server(&self, way: Way) -> Result<&Server, Absent> {
        let server = match way {
            Way::Daemon => &self.daemon,
            Way::Ssh => &self.sshd,
        };
        server.as_ref().map_err(|absent| *absent)
    }
}

/// Ended when dropped.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Returns once it answers on its port.
    fn start(command: &mut Command, log: &Path, port: u16) -> Result<Self> {
        let log = File::create(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let name = command.get_program().display().to_string();
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let server = Self { child, port };
        wait_until(&format!("{name} answers"), SOON, || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok().then_some(())
        });
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Does nothing to one that has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn daemon(dir: &Path) -> Result<Server> {
    let port = free_port()?;
    // A daemon of root would write as `nobody`.
    let user = if world::is_root() { "uid = root\ngid = root\n" } else { "" };
    let config = dir.join("rsyncd.conf");
    fs::write(
        &config,
        format!(
            "port = {port}\naddress = 127.0.0.1\nuse chroot = no\npid file = {}\n\
             [{MODULE}]\npath = {}\nread only = no\n{user}",
            dir.join("rsyncd.pid").display(),
            dir.display(),
        ),
    )?;
    let mut command = Command::new("rsync");
    command.args(["--daemon", "--no-detach", "--config"]).arg(config);
    Server::start(&mut command, &dir.join("rsyncd.log"), port)
}

fn sshd(dir: &Path) -> Result<Server> {
    let [host_key, user_key] = ["host-key", "user-key"].map(|name| dir.join(name));
    for key in [&host_key, &user_key] {
        timed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(key))?;
    }
    let authorized = dir.join("authorized-keys");
    fs::copy(user_key.with_extension("pub"), &authorized)?;
    fs::set_permissions(&authorized, Permissions::from_mode(0o600))?;
    if world::is_root() {
        // A root's sshd does not start without; else the package's script makes it.
        fs::create_dir_all("/run/sshd")?;
    }
    let port = free_port()?;
    let mut command = Command::new(SSHD);
    command.args(["-D", "-e", "-f", "/dev/null", "-p", &port.to_string(), "-h"]).arg(host_key);
    let options = [
        "ListenAddress=127.0.0.1".to_owned(),
        format!("AuthorizedKeysFile={}", authorized.display()),
        "StrictModes=no".to_owned(),
        "PermitRootLogin=prohibit-password".to_owned(),
        "UsePAM=no".to_owned(),
        "PidFile=none".to_owned(),
    ];
    for option in &options {
        command.args(["-o", option]);
    }
    Server::start(&mut command, &dir.join("sshd.log"), port)
}

/// Free at this moment.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    ensure!(port != 0, "no port is free");
    Ok(port)
}
