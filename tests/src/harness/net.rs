//! The router in the middle, and what is wrong with the lines to it.
//!
//! Each machine has a network of its own, `10.77.N.0/24`: the machine is `.2`, the router `.1`.
//! What travels from one machine to another is forwarded by the router, where rules drop it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::Ipv4Addr,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use super::machine::{Holder, Rights, Setup};

/// The table of the rules, for `nft`.
const TABLE: &str = "inet p2pit";
/// A burst that passes a slowed line at once, and the longest that a packet waits there.
const BURST: &str = "64kb";
const PATIENCE: &str = "400ms";
/// Of the lines' ends at the router.
const LINE: &str = "line";
/// What the relay's device is named, beside the lines.
pub(super) const DETOUR: &str = "detour";
/// The routing table that leads there.
const DETOUR_TABLE: &str = "77";

/// The n-th machine's address, from 1.
pub(super) fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, n, 2)
}

#[derive(Debug)]
pub(super) struct Router {
    pub(super) holder: Holder,
    faults: Mutex<Faults>,
    /// The line of each machine: as many as it had starts, since the last one's end may not be
    /// gone yet.
    lines: BTreeMap<Ipv4Addr, u32>,
}

/// What the rules say.
#[derive(Debug, Default)]
struct Faults {
    /// From, to.
    cut: BTreeSet<(Ipv4Addr, Ipv4Addr)>,
    /// Packets of 1000 that are lost on the way to and from a machine.
    lost: BTreeMap<Ipv4Addr, u32>,
}

impl Router {
    pub(super) fn new(rights: Rights) -> Result<Self, String> {
        let script = "echo 1 > /proc/sys/net/ipv4/ip_forward\n\
                      echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter\n\
                      echo 0 > /proc/sys/net/ipv4/conf/default/rp_filter";
        let setup = Setup { script: script.to_owned(), uptime_s: None };
        let holder = Holder::start(rights, None, &setup)?;
        let router = Self { holder, faults: Mutex::default(), lines: BTreeMap::new() };
        router.apply(&Faults::default())?;
        Ok(router)
    }

    /// Lays a line to a machine that was just switched on.
    pub(super) fn connect(&mut self, machine: &Holder, at: Ipv4Addr) -> Result<(), String> {
        let count = self.lines.entry(at).or_default();
        *count += 1;
        let line = self.line(at);
        let (gateway, pid) = (gateway(at), machine.pid().to_string());
        let add = ["ip", "link", "add", &line, "type", "veth", "peer", "name", "eth0"];
        done(self.holder.command(add[0]).args(&add[1..]).args(["netns", &pid]))?;
        let near = format!("{gateway}/24");
        for words in [
            ["ip", "address", "add", &near, "dev", &line].as_slice(),
            &["ip", "link", "set", &line, "up"],
        ] {
            done(self.holder.command(words[0]).args(&words[1..]))?;
        }
        let (far, gateway) = (format!("{at}/24"), gateway.to_string());
        for words in [
            ["ip", "address", "add", &far, "dev", "eth0"].as_slice(),
            &["ip", "link", "set", "eth0", "up"],
            &["ip", "route", "add", "default", "via", &gateway],
        ] {
            done(machine.command(words[0]).args(&words[1..]))?;
        }
        Ok(())
    }

    /// The line of a machine that is going out: its far end goes with the machine.
    pub(super) fn disconnect(&self, at: Ipv4Addr) {
        // Fails where the kernel was faster.
        let _ = done(self.holder.command("ip").args(["link", "delete", &self.line(at)]));
    }

    pub(super) fn line(&self, at: Ipv4Addr) -> String {
        let count = self.lines.get(&at).copied().unwrap_or_default();
        format!("{LINE}{}.{count}", at.octets()[2])
    }

    pub(super) fn cut(&self, pairs: impl IntoIterator<Item = (Ipv4Addr, Ipv4Addr)>) {
        self.change(|faults| faults.cut.extend(pairs));
    }

    /// So many packets of 1000.
    pub(super) fn lose(&self, at: Ipv4Addr, per_mille: u32) {
        self.change(|faults| {
            faults.lost.insert(at, per_mille);
        });
    }

    /// What is cut or lost to and from a machine is so no longer.
    pub(super) fn heal_one(&self, at: Ipv4Addr) {
        self.change(|faults| {
            faults.cut.retain(|(from, to)| *from != at && *to != at);
            faults.lost.remove(&at);
        });
    }

    /// All rules go.
    pub(super) fn heal(&self) {
        self.change(|faults| *faults = Faults::default());
    }

    /// Whether the cable is in.
    pub(super) fn plug(&self, at: Ipv4Addr, is_in: bool) {
        let state = if is_in { "up" } else { "down" };
        let words = ["link", "set", &self.line(at), state];
        done(self.holder.command("ip").args(words)).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Each direction of a line at this rate, in the words of `tc`; `None`: as before.
    pub(super) fn slow(&self, machine: &Holder, at: Ipv4Addr, rate: Option<&str>) {
        let line = self.line(at);
        for (holder, device) in [(&self.holder, line.as_str()), (machine, "eth0")] {
            let mut tc = holder.command("tc");
            match rate {
                None => tc.args(["qdisc", "delete", "dev", device, "root"]),
                Some(rate) => tc
                    .args(["qdisc", "replace", "dev", device, "root", "tbf", "rate", rate])
                    .args(["burst", BURST, "latency", PATIENCE]),
            };
            done(&mut tc).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// What comes from a machine goes through the relay's device first, or no longer.
    pub(super) fn detour(&self, at: Ipv4Addr, goes: bool) {
        let line = self.line(at);
        let verb = if goes { "add" } else { "delete" };
        let rule = ["rule", verb, "iif", &line, "lookup", DETOUR_TABLE];
        done(self.holder.command("ip").args(rule)).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Makes the relay's device, whose packets this process is about to carry.
    pub(super) fn make_detour(&self) -> Result<(), String> {
        for words in [
            ["tuntap", "add", DETOUR, "mode", "tun"].as_slice(),
            &["link", "set", DETOUR, "up"],
            // What is for the router itself is not carried.
            &["route", "add", "10.77.0.0/16", "dev", DETOUR, "table", DETOUR_TABLE],
        ] {
            done(self.holder.command("ip").args(words))?;
        }
        Ok(())
    }

    /// `tc netem` at the router's end of a line, where the kernel has it.
    pub(super) fn netem(&self, at: Ipv4Addr, words: &[String]) -> Result<(), String> {
        let line = self.line(at);
        done(
            self.holder
                .command("tc")
                .args(["qdisc", "replace", "dev", &line, "root", "netem"])
                .args(words),
        )
        .map(drop)
    }

    /// Packets that the rules dropped since they were last changed.
    pub(super) fn dropped(&self) -> u64 {
        let rules = self.rules();
        let counts = rules.split("packets ").skip(1);
        counts.filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// The rules with their counts, for people.
    pub(super) fn rules(&self) -> String {
        done(self.holder.command("nft").args(["list", "ruleset"])).unwrap_or_else(|e| e)
    }

    /// Lines, rates and routes, for people.
    pub(super) fn lines_now(&self) -> String {
        let asked = [["ip", "-s", "link"], ["ip", "address", "show"], ["tc", "-s", "qdisc"]];
        let said = asked.map(|words| {
            let said = done(self.holder.command(words[0]).args(&words[1..]));
            format!("# {}\n{}", words.join(" "), said.unwrap_or_else(|e| e))
        });
        said.join("\n")
    }

    fn change(&self, how: impl FnOnce(&mut Faults)) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        how(&mut faults);
        self.apply(&faults).unwrap_or_else(|e| panic!("{e}"));
    }

    /// All rules at once, in place of those that were.
    fn apply(&self, faults: &Faults) -> Result<(), String> {
        let mut text = format!("table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
        text.push_str(" chain forward {\n  type filter hook forward priority 0; policy accept;\n");
        // Judged when it leaves for a machine, once.
        text.push_str(&format!("  oifname \"{DETOUR}\" accept\n"));
        for (from, to) in &faults.cut {
            text.push_str(&format!("  ip saddr {from} ip daddr {to} counter drop\n"));
        }
        for (at, per_mille) in &faults.lost {
            for end in ["saddr", "daddr"] {
                text.push_str(&format!(
                    "  ip {end} {at} numgen random mod 1000 < {per_mille} counter drop\n"
                ));
            }
        }
        text.push_str(" }\n}\n");
        let mut nft = self.holder.command("nft");
        given(nft.args(["-f", "-"]), &text).map(drop)
    }
}

fn gateway(at: Ipv4Addr) -> Ipv4Addr {
    let [a, b, c, _] = at.octets();
    Ipv4Addr::new(a, b, c, 1)
}

/// Runs a command to its end: what it printed, or what it complained of.
pub(super) fn done(command: &mut Command) -> Result<String, String> {
    given(command, "")
}

fn given(command: &mut Command, input: &str) -> Result<String, String> {
    let line = || {
        let words = [command.get_program()].into_iter().chain(command.get_args());
        words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    };
    let line = line();
    let mut run = || {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        // Dropped, which is its end.
        child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()))?;
        child.wait_with_output()
    };
    let ended = run().map_err(|e| format!("`{line}`: {e}"))?;
    if !ended.status.success() {
        return Err(format!("`{line}`: {}", String::from_utf8_lossy(&ended.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
}
