//! Slurm: one controller and a few nodes on this machine, as many and as large as ours.
//!
//! Only as root in a network of its own, because Slurm's ports are fixed and its daemons
//! end with the bench. The GPUs are plain files: Slurm only looks whether they are there.

use std::{
    fmt::Write as _,
    fs::{self, File, Permissions},
    net::{Ipv4Addr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use p2pit_tests::{SOON, wait_until};

use crate::{
    table::{Absent, timed},
    world,
};

const PACKAGES: &str = "munge slurmctld slurmd slurm-client";
const PROGRAMS: [&str; 7] = ["munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo", "squeue"];

const CONTROLLER_PORT: u16 = 16817;
const NODE_PORTS: u16 = 17000;
/// Daemons that are no nodes: munge and the controller.
const SERVERS: usize = 2;
const KEY_BYTES: usize = 1024;
/// Commands that submit at the same time. With more, they only wait for each other.
const LANES: usize = 8;
const BURST_WITHIN: Duration = Duration::from_secs(300);
/// Seldom enough to cost little of a burst's time, which is seconds.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const CPUS_PER_NODE: usize = 4;

/// How the controller is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Setup {
    /// As it comes.
    Default,
    /// For many short jobs: it schedules at every submission and end.
    Tuned,
}

/// A cluster that takes jobs; ended when dropped.
pub(crate) struct Slurm {
    dir: PathBuf,
    /// Munge, the controller, and the nodes.
    daemons: Vec<Daemon>,
}

impl Slurm {
    pub(crate) fn is_there() -> Result<(), Absent> {
        if PROGRAMS.iter().any(|name| world::program(name).is_none()) {
            return Err(Absent::NotInstalled(PACKAGES));
        }
        if world::is_own() { Ok(()) } else { Err(Absent::NeedsRoot) }
    }

    /// With what it keeps in `dir`, which is made.
    pub(crate) fn start(dir: &Path, nodes: usize, setup: Setup) -> Result<Self> {
        fs::create_dir_all(dir.join("state"))?;
        // Others than root look for the socket of munge in there.
        fs::set_permissions(dir, Permissions::from_mode(0o711))?;
        fs::write(dir.join("gpu0"), "")?;
        fs::write(dir.join("job"), "#!/bin/sh\nexec true\n")?;
        fs::write(dir.join("slurm.conf"), configuration(dir, nodes, setup)?)?;
        let mut gres = String::new();
        for n in 1..=nodes {
            writeln!(gres, "NodeName=n{n} Name=gpu Count=1 File={}", dir.join("gpu0").display())?;
        }
        fs::write(dir.join("gres.conf"), gres)?;

        let munge = munge(dir)?;
        let mut slurm = Self { dir: dir.to_owned(), daemons: vec![munge] };
        slurm.daemon("slurmctld", &["-D", "-i"], "controller")?;
        slurm.until("the controller answers", |slurm| slurm.idle_nodes().is_ok());
        for n in 1..=nodes {
            slurm.node(n)?;
        }
        slurm.until("all nodes are idle", |slurm| slurm.idle_nodes().is_ok_and(|it| it == nodes));
        Ok(slurm)
    }

    /// The time of a whole `srun` of `true`, with these arguments.
    pub(crate) fn run(&self, args: &[&str]) -> Result<Duration> {
        Ok(timed(self.command("srun").args(args).arg("true"))?.0)
    }

    /// Seconds from the first submission of many jobs of one process to the end of the last.
    pub(crate) fn burst(&self, jobs: usize) -> Result<f64> {
        let start = Instant::now();
        let submit = |lane: usize| {
            (lane..jobs).step_by(LANES).try_for_each(|_| {
                let mut command = self.command("sbatch");
                timed(command.args(["-Q", "-o", "/dev/null"]).arg(self.dir.join("job"))).map(drop)
            })
        };
        thread::scope(|scope| {
            let lanes: Vec<_> = (0..LANES).map(|lane| scope.spawn(move || submit(lane))).collect();
            lanes.into_iter().try_for_each(|lane| {
                lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        loop {
            let (_, waiting) = timed(self.command("squeue").args(["-h", "-o", "%i"]))?;
            if waiting.trim().is_empty() {
                return Ok(start.elapsed().as_secs_f64());
            }
            ensure!(start.elapsed() < BURST_WITHIN, "Slurm does not end its jobs");
            thread::sleep(LOOK_EVERY);
        }
    }

    /// From the start of the last node's daemon until it can be spoken to.
    pub(crate) fn restart_node(&mut self) -> Result<Duration> {
        let n = self.daemons.len() - SERVERS;
        drop(self.daemons.pop());
        let start = Instant::now();
        self.node(n)?;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, node_port(n)?)).is_err() {
            ensure!(start.elapsed() < SOON, "slurmd does not listen");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(start.elapsed())
    }

    /// The processes of the controller and of one node.
    pub(crate) fn pids(&self) -> [u32; 2] {
        let pid = |name: &str| {
            let daemon = self.daemons.iter().find(|daemon| daemon.name == name);
            daemon.map_or(0, |daemon| daemon.child.id())
        };
        [pid("controller"), pid("n1")]
    }

    fn idle_nodes(&self) -> Result<usize> {
        let (_, printed) =
            timed(self.command("sinfo").args(["-h", "-N", "-t", "idle", "-o", "%N"]))?;
        Ok(printed.lines().count())
    }

    fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        wait_until(what, SOON, || is_so(self).then_some(()));
    }

    fn node(&mut self, n: usize) -> Result<()> {
        let name = format!("n{n}");
        self.daemon("slurmd", &["-D", "-N", &name], &name)
    }

    fn daemon(&mut self, program: &str, args: &[&str], name: &str) -> Result<()> {
        let mut command = self.command(program);
        command.args(args).arg("-f").arg(self.dir.join("slurm.conf"));
        self.daemons.push(Daemon::start(command, &self.dir, name)?);
        Ok(())
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(world::program(name).unwrap_or_else(|| name.into()));
        command.env("SLURM_CONF", self.dir.join("slurm.conf")).current_dir(&self.dir);
        command
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        // The nodes before the controller, all before munge.
        while self.daemons.pop().is_some() {}
    }
}

/// Ended when dropped.
struct Daemon {
    name: String,
    child: Child,
}

impl Daemon {
    fn start(mut command: Command, dir: &Path, name: &str) -> Result<Self> {
        let log = File::create(dir.join(format!("{name}.out")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Does nothing to one that has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What Slurm's daemons prove to each other with who they are.
fn munge(dir: &Path) -> Result<Daemon> {
    let key = dir.join("munge.key");
    fs::write(&key, vec![7; KEY_BYTES])?;
    fs::set_permissions(&key, Permissions::from_mode(0o600))?;
    let mut command = Command::new(world::program("munged").unwrap_or_else(|| "munged".into()));
    command.args(["-F", "--force"]);
    for (option, file) in [
        ("--key-file", "munge.key"),
        ("--socket", "munge.socket"),
        ("--pid-file", "munge.pid"),
        ("--seed-file", "munge.seed"),
        ("--log-file", "munge.log"),
    ] {
        command.arg(format!("{option}={}", dir.join(file).display()));
    }
    let munge = Daemon::start(command, dir, "munge")?;
    let socket = dir.join("munge.socket");
    wait_until("munge listens", SOON, || socket.exists().then_some(()));
    Ok(munge)
}

fn node_port(n: usize) -> Result<u16> {
    Ok(NODE_PORTS + u16::try_from(n)?)
}

fn configuration(dir: &Path, nodes: usize, setup: Setup) -> Result<String> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host = host.split('.').next().unwrap_or_default();
    let at = |name: &str| dir.join(name).display().to_string();
    let mut text = format!(
        "ClusterName=bench\n\
         SlurmctldHost=localhost(127.0.0.1)\n\
         SlurmctldPort={CONTROLLER_PORT}\n\
         SlurmUser=root\n\
         SlurmdUser=root\n\
         AuthType=auth/munge\n\
         AuthInfo=socket={}\n\
         SlurmctldPidFile={}\n\
         SlurmctldLogFile={}\n\
         StateSaveLocation={}\n\
         SlurmdPidFile={}\n\
         SlurmdLogFile={}\n\
         SlurmdSpoolDir={}\n\
         MpiDefault=none\n\
         ProctrackType=proctrack/pgid\n\
         TaskPlugin=task/none\n\
         ReturnToService=2\n\
         SelectType=select/cons_tres\n\
         SelectTypeParameters=CR_Core\n\
         JobAcctGatherType=jobacct_gather/none\n\
         AccountingStorageType=accounting_storage/none\n\
         GresTypes=gpu\n\
         SlurmdParameters=config_overrides\n",
        at("munge.socket"),
        at("controller.pid"),
        at("controller.log"),
        at("state"),
        at("%n.pid"),
        at("%n.log"),
        at("spool.%n"),
    );
    if setup == Setup::Tuned {
        text.push_str(
            "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1\n",
        );
    }
    for n in 1..=nodes {
        let port = node_port(n)?;
        writeln!(
            text,
            "NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} \
             CPUs={CPUS_PER_NODE} RealMemory=1000 Gres=gpu:1 State=UNKNOWN"
        )?;
    }
    text.push_str("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n");
    Ok(text)
}
