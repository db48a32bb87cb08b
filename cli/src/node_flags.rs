//! What the command line says about a node, for `join` and `daemon`.

use std::{ffi::OsString, fmt, net::SocketAddr};

use anyhow::Context as _;
use clap::Args;
use p2pit_node::{
    config::{CpuCount, MemorySize, NodeName, PartialSettings, PeerAddress, Settings},
    gpu::GpuOption,
    home::{Home, write_atomic},
};

use crate::problem::Problem;

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "What this machine offers, and how it is reached")]
pub(crate) struct NodeFlags {
    /// The node's short name [default: the host name]
    #[arg(long, value_name = "NAME")]
    name: Option<NodeName>,
    /// GPUs to offer: `auto`, `none`, or simulated ones such as `sim:2xv100,1xgtx1070`
    #[arg(long, value_name = "GPUS")]
    gpus: Option<GpuOption>,
    /// Cores to offer [default: all]
    #[arg(long, value_name = "N")]
    cpus: Option<CpuCount>,
    /// Main memory to offer, such as `64g` [default: all]
    #[arg(long, value_name = "SIZE")]
    memory: Option<MemorySize>,
    /// Where to listen; port 0 is any. Data travels on the port above, or on any as well
    #[arg(long, value_name = "IP:PORT", value_parser = parse_listen)]
    listen: Option<SocketAddr>,
    /// A node to try besides those known from before; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    peer: Vec<PeerAddress>,
    /// Neither look for nodes on the local network nor be found there
    #[arg(long)]
    no_mdns: bool,
    /// Offer nothing: a node for submitting only
    #[arg(long)]
    client: bool,
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        "expected an IP address and a port, such as `0.0.0.0:4001` or `[::1]:4001`".to_owned()
    })
}

impl NodeFlags {
    /// Whether anything was said.
    pub(crate) fn is_empty(&self) -> bool {
        self.to_args().is_empty()
    }

    /// With what the environment and the home's configuration say.
    pub(crate) fn resolve(&self, home: &Home) -> anyhow::Result<Settings> {
        let settings = || {
            let env = PartialSettings::from_env(|name| std::env::var_os(name))?;
            let file = PartialSettings::from_file(&home.config_file())?;
            Settings::resolve(self.to_settings(), env, file)
        };
        settings().map_err(|e| Problem::request(format!("{:#}", anyhow::Error::from(e))).into())
    }

    /// Writes the flags down for later starts of this home, unless it has a configuration;
    /// whether it did.
    pub(crate) fn remember(&self, home: &Home) -> anyhow::Result<bool> {
        let path = home.config_file();
        let lines = self.to_yaml();
        if lines.is_empty() || path.exists() {
            return Ok(false);
        }
        let text = format!("# As given to `p2pit join`; yours to edit.\n{lines}");
        write_atomic(&path, text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(true)
    }

    /// The same again for another command line.
    pub(crate) fn to_args(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        let mut option = |name: &str, value: &dyn fmt::Display| {
            args.extend([OsString::from(name), OsString::from(value.to_string())]);
        };
        if let Some(name) = &self.name {
            option("--name", name);
        }
        if let Some(gpus) = &self.gpus {
            option("--gpus", gpus);
        }
        if let Some(cpus) = &self.cpus {
            option("--cpus", cpus);
        }
        if let Some(memory) = &self.memory {
            option("--memory", memory);
        }
        if let Some(listen) = &self.listen {
            option("--listen", listen);
        }
        for peer in &self.peer {
            option("--peer", peer);
        }
        let switches = [("--no-mdns", self.no_mdns), ("--client", self.client)];
        args.extend(switches.iter().filter(|(_, on)| *on).map(|(name, _)| OsString::from(*name)));
        args
    }

    fn to_settings(&self) -> PartialSettings {
        PartialSettings {
            name: self.name.clone(),
            gpus: self.gpus.clone(),
            cpus: self.cpus,
            memory: self.memory,
            listen: self.listen,
            peers: (!self.peer.is_empty()).then(|| self.peer.clone()),
            mdns: self.no_mdns.then_some(false),
            client: self.client.then_some(true),
            ..PartialSettings::default()
        }
    }

    fn to_yaml(&self) -> String {
        let mut lines = String::new();
        let mut line = |key: &str, value: String| lines.push_str(&format!("{key}: {value}\n"));
        // None of these texts has a character that would have to be escaped in quotes.
        let quoted = |text: &dyn fmt::Display| format!("\"{text}\"");
        if let Some(name) = &self.name {
            line("name", quoted(name));
        }
        if let Some(gpus) = &self.gpus {
            line("gpus", quoted(gpus));
        }
        if let Some(cpus) = &self.cpus {
            line("cpus", cpus.to_string());
        }
        if let Some(memory) = &self.memory {
            line("memory", quoted(memory));
        }
        if let Some(listen) = &self.listen {
            line("listen", quoted(listen));
        }
        if !self.peer.is_empty() {
            let peers: Vec<String> = self.peer.iter().map(|peer| quoted(peer)).collect();
            line("peers", format!("[{}]", peers.join(", ")));
        }
        if self.no_mdns {
            line("mdns", "false".to_owned());
        }
        if self.client {
            line("client", "true".to_owned());
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        flags: NodeFlags,
    }

    fn flags(line: &str) -> NodeFlags {
        Line::parse_from(format!("x {line}").split_whitespace()).flags
    }

    const EVERYTHING: &str = "--name lab-1 --gpus sim:2xv100 --cpus 4 --memory 8g \
                              --listen [::1]:0 --peer a:1 --peer [::1]:2 --no-mdns --client";

    #[test]
    fn flags_come_back_from_the_arguments_made_of_them() {
        let given = flags(EVERYTHING);
        let again =
            Line::try_parse_from(std::iter::once(OsString::from("x")).chain(given.to_args()))
                .unwrap()
                .flags;
        assert_eq!(again.to_settings(), given.to_settings());
        assert!(NodeFlags::default().to_args().is_empty());
    }

    #[test]
    fn flags_are_written_down_once_and_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&directory.path().join("home")).unwrap();
        let given = flags(EVERYTHING);
        assert!(given.remember(&home).unwrap());
        let file = PartialSettings::from_file(&home.config_file()).unwrap();
        assert_eq!(file, given.to_settings());
        assert!(!flags("--cpus 2").remember(&home).unwrap(), "it is the user's from now on");
        assert_eq!(PartialSettings::from_file(&home.config_file()).unwrap(), file);
    }

    #[test]
    fn without_flags_nothing_is_written_down() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&directory.path().join("home")).unwrap();
        assert!(!NodeFlags::default().remember(&home).unwrap());
        assert!(!home.config_file().exists());
    }
}
