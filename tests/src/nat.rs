//! An internet in miniature: a public segment, and networks behind NATs on it.
//!
//! Each machine and each router is a network namespace. The public segment is
//! `198.51.100.0/24`; the n-th network behind a NAT is `192.168.n.0/24`, and the router lets
//! nothing in that was not asked for. Only root may lay it out. Dropped, it is gone; what runs
//! in it must have been ended before, so it is to be declared before the pool.

use std::{
    io::Write as _,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{
    Ended, Node, Running,
    require::{has_internets, is_root},
};

/// The switch of the public segment.
const SWITCH: &str = "hub";
/// The end of a line that faces the public segment.
const WAN: &str = "wan";
/// The end of a line that faces the network behind a NAT.
const LAN: &str = "lan";

/// What a router does with the port that a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// It keeps the port where it can: so all see the same.
    Keeps,
    /// Another one for each connection: symmetric.
    Random,
}

/// The public segment, and whatever is on it.
#[derive(Debug)]
pub struct Internet {
    prefix: String,
    names: Vec<String>,
    hosts: u8,
}

/// A machine's place in it.
#[derive(Debug, Clone)]
pub struct Site {
    /// Its namespace, and that of its router.
    space: String,
    router: Option<String>,
    address: String,
}

impl Internet {
    /// An empty one; `None`, and says so, where this user may not.
    #[must_use]
    pub fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !is_root() || !has_internets() {
            return None;
        }
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("reach{}-{n}-", std::process::id());
        let mut internet = Self { prefix, names: Vec::new(), hosts: 0 };
        let hub = internet.space(SWITCH);
        ip(&hub, "link add br0 type bridge");
        ip(&hub, "link set br0 up");
        Some(internet)
    }

    /// A machine that all others can dial.
    #[must_use]
    pub fn public(&mut self, name: &str) -> Site {
        let space = self.space(name);
        let address = self.attach(&space);
        Site { space, router: None, address }
    }

    /// A machine alone behind a router of its own.
    #[must_use]
    pub fn behind(&mut self, name: &str, nat: Nat) -> Site {
        let router = self.space(&format!("{name}-r"));
        let outside = self.attach(&router);
        let space = self.space(name);
        let net = format!("192.168.{}", self.hosts);
        ip(&router, &format!("link add {LAN} type veth peer name eth0 netns {space}"));
        ip(&router, &format!("address add {net}.1/24 dev {LAN}"));
        ip(&router, &format!("link set {LAN} up"));
        ip(&space, &format!("address add {net}.2/24 dev eth0"));
        ip(&space, "link set eth0 up");
        ip(&space, &format!("route add default via {net}.1"));
        done(inside(&router, "sysctl").args(["-qw", "net.ipv4.ip_forward=1"]), "");
        let masquerade = match nat {
            Nat::Keeps => "masquerade",
            Nat::Random => "masquerade random,fully-random",
        };
        nft(
            &router,
            &format!(
                "table ip nat {{\n\
                 chain out {{\n\
                 type nat hook postrouting priority srcnat\n\
                 oifname {WAN} {masquerade}\n\
                 }}\n\
                 }}\n\
                 table ip filter {{\n\
                 chain here {{\n\
                 type filter hook input priority 0\n\
                 iifname {WAN} ct state new drop\n\
                 }}\n\
                 chain through {{\n\
                 type filter hook forward priority 0\n\
                 iifname {WAN} ct state new drop\n\
                 }}\n\
                 }}"
            ),
        );
        Site { space, router: Some(router), address: outside }
    }

    fn space(&mut self, name: &str) -> String {
        let space = format!("{}{name}", self.prefix);
        done(Command::new("ip").args(["netns", "add", &space]), "");
        self.names.push(space.clone());
        ip(&space, "link set lo up");
        space
    }

    /// A line from a namespace to the switch, and the address at its end.
    fn attach(&mut self, space: &str) -> String {
        self.hosts += 1;
        let hub = format!("{}{SWITCH}", self.prefix);
        let (line, address) = (format!("v{}", self.hosts), format!("198.51.100.{}", self.hosts));
        ip(&hub, &format!("link add {line} type veth peer name {WAN} netns {space}"));
        ip(&hub, &format!("link set {line} master br0 up"));
        ip(space, &format!("address add {address}/24 dev {WAN}"));
        ip(space, &format!("link set {WAN} up"));
        address
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        for name in &self.names {
            // The lines go with their ends.
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

impl Site {
    /// At which others see it.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Joins the pool of a ticket, or founds one, with a daemon at this place.
    #[track_caller]
    #[must_use]
    pub fn join(&self, node: &Node, ticket: Option<&str>, flags: &[&str]) -> Ended {
        let mut args = vec!["join"];
        args.extend(ticket);
        args.extend(["--detach", "--name", node.name(), "--no-mdns"]);
        args.extend(["--listen", "0.0.0.0:0", "--user-name", "anna"]);
        args.extend(flags);
        self.run(node, &args)
    }

    /// Starts the daemon again.
    #[track_caller]
    pub fn restart(&self, node: &Node) {
        self.run(node, &["join", "--detach"]).ended(0);
    }

    fn run(&self, node: &Node, args: &[&str]) -> Ended {
        let bare = node.command();
        let mut command = inside(&self.space, &bare.get_program().to_string_lossy());
        command.args(bare.get_args()).args(args).env_clear();
        command.envs(bare.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if let Some(dir) = bare.get_current_dir() {
            command.current_dir(dir);
        }
        Running::start(command, &node.home().with_file_name("output")).end()
    }

    /// From now on the router drops all UDP.
    ///
    /// # Panics
    /// Where there is no router.
    pub fn block_udp(&self) {
        let router = self.router.as_ref().expect("behind a router");
        nft(router, "add rule ip filter through meta l4proto udp drop");
    }

    /// The machine is carried to another network: its address is another one, and what it had
    /// before is nobody's.
    pub fn move_to(&mut self, address: &str) {
        ip(&self.space, &format!("address del {}/24 dev {WAN}", self.address));
        ip(&self.space, &format!("address add {address}/24 dev {WAN}"));
        self.address = address.to_owned();
    }
}

fn ip(space: &str, words: &str) {
    done(Command::new("ip").args(["-n", space]).args(words.split(' ')), "");
}

fn nft(space: &str, rules: &str) {
    done(inside(space, "nft").args(["-f", "-"]), rules);
}

fn inside(space: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{space}")).arg(program);
    command
}

/// Runs a command that must succeed.
fn done(command: &mut Command, input: &str) {
    let line = format!("{command:?}");
    let mut run = || {
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let ended = run().unwrap_or_else(|e| panic!("{line} cannot be run: {e}"));
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{line} failed: {said}");
}
