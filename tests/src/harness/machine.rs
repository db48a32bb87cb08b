//! Namespaces that belong together, held by a process: a machine, or the router between them.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use crate::Process;

/// What the first process of a machine does: it says that the machine is up, and waits for the
/// end of its input. Bash, because it buries whatever else ends there.
const INIT: &str = "echo up; while read -r _; do :; done";
/// A user of a world in a user namespace, as daemons see it. Root there could do less than
/// root expects.
const ORDINARY_USER: &str = "1000";

/// Where machines have the directory that all of them and the test share. Jobs may only read
/// there, as on all of their machine; a FIFO takes what they write.
const SHARED_AT: &str = "/mnt";

/// How namespaces can be had here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rights {
    Root,
    /// In a user namespace of the world.
    OwnUsers,
}

/// A process that holds namespaces. Dropped, all that runs in them is gone when this returns.
#[derive(Debug)]
pub(super) struct Holder {
    child: Child,
    rights: Rights,
    has_time: bool,
}

/// What to put into namespaces before anything else runs there.
#[derive(Debug, Default)]
pub(super) struct Setup {
    /// Lines of a shell script.
    pub script: String,
    /// What the boot clock shall show at first, in seconds; `None`: what it shows outside.
    pub uptime_s: Option<u64>,
}

impl Holder {
    /// Makes namespaces; inside the user namespace of `router`, where that has one.
    ///
    /// # Errors
    /// What this machine lacks.
    pub(super) fn start(
        rights: Rights,
        router: Option<&Self>,
        setup: &Setup,
    ) -> Result<Self, String> {
        let mut words: Vec<OsString> = Vec::new();
        match (rights, router) {
            (Rights::Root, _) => words.push("unshare".into()),
            (Rights::OwnUsers, Some(router)) => {
                words.extend(router.nsenter(&["--user", "--preserve-credentials"]));
                words.push("unshare".into());
            }
            (Rights::OwnUsers, None) => {
                words.extend(["unshare", "--user", "--map-root-user"].map(Into::into));
            }
        }
        let namespaces =
            ["--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"];
        words.extend(namespaces.map(Into::into));
        if let Some(uptime_s) = setup.uptime_s {
            let offset = i64::try_from(uptime_s).unwrap_or(0) - outer_uptime_s()?;
            words.extend(["--time".into(), "--boottime".into(), offset.to_string().into()]);
        }
        let script = format!("set -e\nip link set lo up\n{}\n{INIT}", setup.script);
        words.extend(["bash", "-c", &script].map(Into::into));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| format!("cannot start unshare: {e}"))?;
        let mut said = String::new();
        if let Some(stdout) = child.stdout.take() {
            // Ends also where the process does.
            let _ = BufReader::new(stdout).read_line(&mut said);
        }
        let holder = Self { child, rights, has_time: setup.uptime_s.is_some() };
        if said == "up\n" { Ok(holder) } else { Err(holder.complaint()) }
    }

    /// What it said before it ended.
    fn complaint(mut self) -> String {
        drop(self.child.stdin.take());
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        format!("no namespaces: {}", text.trim())
    }

    /// The process whose network and mount namespace are meant.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A command that runs inside, with the rights to change it.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut words = self.nsenter(&["--net", "--mount"]);
        if self.rights == Rights::OwnUsers {
            words.splice(1..1, ["--user", "--preserve-credentials"].map(Into::into));
        }
        words.push(program.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    }

    /// The words before a command that runs inside as a user's would.
    fn entry(&self, dir: &Path) -> Vec<OsString> {
        let pid = self.child.id();
        let mut options = vec!["--net".to_owned(), "--mount".to_owned()];
        options.push(format!("--pid=/proc/{pid}/ns/pid_for_children"));
        options.push("--uts".to_owned());
        if self.has_time {
            options.push(format!("--time=/proc/{pid}/ns/time_for_children"));
        }
        if self.rights == Rights::OwnUsers {
            options.extend(["--user", "--preserve-credentials"].map(str::to_owned));
        }
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let mut words = self.nsenter(&options);
        if self.rights == Rights::OwnUsers {
            let user = format!("--map-user={ORDINARY_USER}");
            let group = format!("--map-group={ORDINARY_USER}");
            words.extend(["unshare", "--user", &user, &group, "--"].map(Into::into));
        }
        // A mount namespace is entered at its root.
        words.push("env".into());
        let mut chdir = OsString::from("--chdir=");
        chdir.push(dir);
        words.push(chdir);
        words
    }

    fn nsenter(&self, options: &[&str]) -> Vec<OsString> {
        let target = format!("--target={}", self.child.id());
        let mut words: Vec<OsString> = vec!["nsenter".into(), target.into()];
        words.extend(options.iter().map(Into::into));
        words.push("--".into());
        words
    }

    /// The processes inside, the first one left out.
    fn processes(&self) -> Vec<Process> {
        let namespace = |pid: u32, which: &str| fs::read_link(format!("/proc/{pid}/ns/{which}"));
        let Ok(inside) = namespace(self.child.id(), "pid_for_children") else { return Vec::new() };
        let pids = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let there = pids.filter(|pid| namespace(*pid, "pid").is_ok_and(|it| it == inside));
        there.filter_map(Process::of).collect()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Its first process ends with its input, and takes all others along.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Seconds on the boot clock here.
fn outer_uptime_s() -> Result<i64, String> {
    let text = fs::read_to_string("/proc/uptime").map_err(|e| format!("/proc/uptime: {e}"))?;
    let whole = text.split('.').next().and_then(|text| text.parse().ok());
    whole.ok_or_else(|| format!("/proc/uptime says {text:?}"))
}

/// Where the commands and the daemon of a node run. Empty while the machine is off.
#[derive(Debug)]
pub(crate) struct Place {
    name: String,
    address: Ipv4Addr,
    scratch: PathBuf,
    holder: Mutex<Option<Holder>>,
}

impl Place {
    pub(super) fn new(name: &str, address: Ipv4Addr, scratch: &Path) -> Self {
        let scratch = scratch.to_owned();
        Self { name: name.to_owned(), address, scratch, holder: Mutex::new(None) }
    }

    /// The machine's address in its world.
    pub(super) fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// `program` inside, with `dir` as its directory.
    ///
    /// # Panics
    /// Where the machine is off.
    pub(crate) fn command(&self, program: &Path, dir: &Path) -> Command {
        let words = self.with(|holder| holder.entry(dir));
        let words = words.unwrap_or_else(|| panic!("the machine {} is off", self.name));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(program);
        command
    }

    /// The daemon of the home, whether it answers or not.
    pub(crate) fn daemon(&self, home: &Path) -> Option<Process> {
        let is_daemon = |process: &Process| {
            let words = process.command_line();
            words.iter().any(|word| word == "daemon")
                && words.iter().any(|word| Path::new(word) == home)
        };
        self.with(|holder| holder.processes().into_iter().find(is_daemon)).flatten()
    }

    pub(super) fn with<T>(&self, what: impl FnOnce(&Holder) -> T) -> Option<T> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(what)
    }

    pub(super) fn is_on(&self) -> bool {
        self.with(|_| ()).is_some()
    }

    /// Makes the machine's namespaces, with a boot id that no other boot has, and `shared` at
    /// [`SHARED_AT`].
    pub(super) fn switch_on(
        &self,
        rights: Rights,
        router: &Holder,
        boot: u32,
        shared: &Path,
    ) -> Result<(), String> {
        let boot_id = self.scratch.join(format!("{}.boot-id", self.name));
        let [a, b, c, d] = self.address.octets();
        let id = format!("{boot:08x}-0000-4000-8000-0000{a:02x}{b:02x}{c:02x}{d:02x}\n");
        fs::write(&boot_id, id).map_err(|e| format!("{}: {e}", boot_id.display()))?;
        let script = format!(
            "hostname {}\nmount --bind {} /proc/sys/kernel/random/boot_id\n\
             mount --bind {} {SHARED_AT}",
            self.name,
            boot_id.display(),
            shared.display()
        );
        // Machines that were started at different times; one that comes back was off for long.
        let uptime_s = if boot == 1 { 1000 * u64::from(c) } else { 30 };
        let setup = Setup { script, uptime_s: Some(uptime_s) };
        let holder = Holder::start(rights, Some(router), &setup)?;
        *self.holder.lock().unwrap_or_else(PoisonError::into_inner) = Some(holder);
        Ok(())
    }

    /// Ends all that runs on the machine, at once.
    pub(super) fn switch_off(&self) {
        drop(self.holder.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
