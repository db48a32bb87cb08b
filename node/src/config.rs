//! Settings: command line over environment over `config.yaml` over default.
//!
//! Each source gives a [`PartialSettings`]; [`Settings::resolve`] merges them. Texts
//! are checked where they are read, so an error names the line, the variable or the
//! option; bounds are part of the messages.

pub mod env;
mod machine;
mod units;

use std::{
    ffi::OsString,
    fmt,
    io::{self, Read as _},
    marker::PhantomData,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use p2pit_protocol::record::KEEP_MS;
use serde::{Deserialize, Deserializer, de};
use thiserror::Error;

use crate::gpu::{GpuOption, READ_EVERY_MAX, READ_EVERY_MIN};

pub use self::{
    machine::machine_resources,
    units::{MemorySize, ParseUnitError, Period, Rate},
};

/// What a daemon runs by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The node's short name. Default: the machine's host name.
    pub name: NodeName,
    /// The GPUs to offer. Default: `auto`, what NVML finds.
    pub gpus: GpuOption,
    /// Cores to offer. Default: all that this process may use.
    pub cpus: u32,
    /// Main memory to offer, in MiB. Default: all of the machine.
    pub memory_mib: u64,
    /// Where to listen; port 0 takes the ports of the last run, or any. Default:
    /// `0.0.0.0:0`.
    pub listen: SocketAddr,
    /// Nodes to try besides those known from before. Default: none.
    pub peers: Vec<PeerAddress>,
    /// Whether to look for the pool on the local network and to be found there.
    /// Default: yes.
    pub mdns: bool,
    /// Whether to take part without offering anything. Default: no.
    pub client: bool,
    /// How often GPUs are read. Default: 3 s.
    pub gpu_read_every: Duration,
    /// How long a client node that a command started waits for the next command.
    /// Default: 10 min.
    pub client_idle: Duration,
    /// How fast blobs may be sent to other nodes, all transfers together. Default: no limit.
    pub upload: Option<Rate>,
    /// How fast blobs may be fetched from other nodes. Default: no limit.
    pub download: Option<Rate>,
    /// Bytes of disk that p2pit may take on this machine: blobs, copies and directories of jobs
    /// together. Default: whatever leaves 5 % of the file system free, at most 5 GiB.
    pub storage: Option<u64>,
    /// How long what a finished job left stays here. Default: 30 days, for as long as its
    /// record is kept.
    pub keep_done: Duration,
    /// How long what nobody needs any more can be had back. Default: 24 h.
    pub trash: Duration,
    /// What is logged, as `tracing` filter directives. Default: `info`.
    pub log: String,
}

/// What one source says about the settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "settings as `key: value` lines")]
pub struct PartialSettings {
    #[serde(deserialize_with = "text")]
    pub name: Option<NodeName>,
    #[serde(deserialize_with = "text")]
    pub gpus: Option<GpuOption>,
    #[serde(deserialize_with = "text")]
    pub cpus: Option<CpuCount>,
    #[serde(deserialize_with = "text")]
    pub memory: Option<MemorySize>,
    #[serde(deserialize_with = "address")]
    pub listen: Option<SocketAddr>,
    #[serde(deserialize_with = "texts")]
    pub peers: Option<Vec<PeerAddress>>,
    pub mdns: Option<bool>,
    pub client: Option<bool>,
    #[serde(deserialize_with = "text")]
    pub gpu_read_every: Option<Period>,
    #[serde(deserialize_with = "text")]
    pub client_idle: Option<Period>,
    #[serde(deserialize_with = "text")]
    pub upload: Option<Rate>,
    #[serde(deserialize_with = "text")]
    pub download: Option<Rate>,
    #[serde(deserialize_with = "text")]
    pub storage: Option<MemorySize>,
    #[serde(deserialize_with = "text")]
    pub keep_done: Option<Period>,
    #[serde(deserialize_with = "text")]
    pub trash: Option<Period>,
    pub log: Option<String>,
}

#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("the configuration {} cannot be read", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the configuration {} is larger than the {CONFIG_BYTES_MAX} bytes allowed",
        .path.display()
    )]
    TooLarge { path: PathBuf },
    /// The reason names the key and the line.
    #[error("the configuration {}: {reason}", .path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error("the environment variable {variable}: {reason}")]
    Variable { variable: &'static str, reason: String },
    /// A value that is well-formed but out of its bounds.
    #[error("`{key}` is {value}; it must be {bounds}")]
    OutOfBounds { key: &'static str, value: String, bounds: String },
}

impl PartialSettings {
    /// The file at `path`; nothing where there is none.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Io { path: path.to_owned(), source };
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(failed(e)),
        };
        let mut text = String::new();
        file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > CONFIG_BYTES_MAX {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        Self::from_yaml(&text)
            .map_err(|reason| ConfigError::Malformed { path: path.to_owned(), reason })
    }

    fn from_yaml(text: &str) -> Result<Self, String> {
        // An empty file, or one of comments only, is the value null.
        let settings: Option<Self> = serde_yaml::from_str(text).map_err(|e| e.to_string())?;
        Ok(settings.unwrap_or_default())
    }

    /// The variables of [`mod@env`], as `lookup` gives them.
    pub fn from_env(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        let variables = Variables { lookup };
        Ok(Self {
            name: variables.parsed(env::NAME)?,
            gpus: variables.parsed(env::GPUS)?,
            cpus: variables.parsed(env::CPUS)?,
            memory: variables.parsed(env::MEMORY)?,
            listen: variables.parsed::<Address>(env::LISTEN)?.map(|address| address.0),
            peers: variables.list(env::PEERS)?,
            mdns: variables.parsed::<Switch>(env::MDNS)?.map(|switch| switch.0),
            log: variables.text(env::LOG)?,
            ..Self::default()
        })
    }

    fn or(self, other: Self) -> Self {
        Self {
            name: self.name.or(other.name),
            gpus: self.gpus.or(other.gpus),
            cpus: self.cpus.or(other.cpus),
            memory: self.memory.or(other.memory),
            listen: self.listen.or(other.listen),
            peers: self.peers.or(other.peers),
            mdns: self.mdns.or(other.mdns),
            client: self.client.or(other.client),
            gpu_read_every: self.gpu_read_every.or(other.gpu_read_every),
            client_idle: self.client_idle.or(other.client_idle),
            upload: self.upload.or(other.upload),
            download: self.download.or(other.download),
            storage: self.storage.or(other.storage),
            keep_done: self.keep_done.or(other.keep_done),
            trash: self.trash.or(other.trash),
            log: self.log.or(other.log),
        }
    }
}

impl Settings {
    /// Merges the sources, first over second over third over default, and checks bounds.
    pub fn resolve(
        flags: PartialSettings,
        env: PartialSettings,
        file: PartialSettings,
    ) -> Result<Self, ConfigError> {
        let given = flags.or(env).or(file);
        let (machine_cores, machine_mib) = machine_resources();
        let memory_mib = match given.memory {
            Some(size) => within("memory", size, MEMORY_MIN..=MEMORY_MAX)?.mib(),
            None => machine_mib,
        };
        let peers = given.peers.unwrap_or_default();
        if peers.len() > PEERS_MAX {
            return Err(ConfigError::OutOfBounds {
                key: "peers",
                value: format!("a list of {}", peers.len()),
                bounds: format!("at most {PEERS_MAX} addresses"),
            });
        }
        let period = |key, period: Option<Period>, default: Duration, bounds: (_, _)| {
            within(key, period.unwrap_or(Period(default)), Period(bounds.0)..=Period(bounds.1))
                .map(|period| period.0)
        };
        let storage = given.storage.map(|size| within("storage", size, STORAGE_MIN..=STORAGE_MAX));
        let rate = |key, rate: Option<Rate>| {
            rate.map(|rate| within(key, rate, RATE_MIN..=RATE_MAX)).transpose()
        };
        Ok(Self {
            name: given.name.unwrap_or_else(NodeName::of_machine),
            gpus: given.gpus.unwrap_or_default(),
            cpus: match given.cpus {
                Some(cpus) => within("cpus", cpus, CpuCount(1)..=CpuCount(CPUS_MAX))?.0,
                None => machine_cores,
            },
            memory_mib,
            listen: given.listen.unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))),
            peers,
            mdns: given.mdns.unwrap_or(true),
            client: given.client.unwrap_or(false),
            gpu_read_every: period(
                "gpu_read_every",
                given.gpu_read_every,
                GPU_READ_EVERY,
                (READ_EVERY_MIN, READ_EVERY_MAX),
            )?,
            client_idle: period(
                "client_idle",
                given.client_idle,
                CLIENT_IDLE,
                (CLIENT_IDLE_MIN, CLIENT_IDLE_MAX),
            )?,
            upload: rate("upload", given.upload)?,
            download: rate("download", given.download)?,
            storage: storage.transpose()?.map(|size| size.0),
            keep_done: period("keep_done", given.keep_done, KEEP_DONE, (KEEP_DONE_MIN, KEEP_DONE))?,
            trash: period("trash", given.trash, TRASH, (Duration::ZERO, TRASH_MAX))?,
            log: given.log.unwrap_or_else(|| "info".to_owned()),
        })
    }
}

/// A node's short name: lower-case letters, digits, `-` and `.`, at most 63, beginning
/// and ending with a letter or digit, so that it is a path component and a host name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeName(String);

impl NodeName {
    /// The machine's host name, as far as it can be a name; else `node`.
    pub fn of_machine() -> Self {
        Self::derived(&gethostname::gethostname().to_string_lossy())
    }

    fn derived(host: &str) -> Self {
        let name: String =
            host.to_ascii_lowercase().chars().filter(|c| is_name_char(*c)).take(63).collect();
        let name = name.trim_matches(['-', '.']);
        Self(if name.is_empty() { "node".to_owned() } else { name.to_owned() })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ends_well = !text.starts_with(['-', '.']) && !text.ends_with(['-', '.']);
        let fits = (1..=63).contains(&text.len());
        if fits && ends_well && text.chars().all(is_name_char) {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "`{}` is not a node name: 1 to 63 lower-case letters, digits, `-` and `.`, the first \
             and last a letter or digit",
            shortened(text)
        ))
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A number of cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuCount(pub u32);

impl FromStr for CpuCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let not_a_count = |_| format!("`{}` is not a number of cores", shortened(text));
        text.parse().map(Self).map_err(not_a_count)
    }
}

impl fmt::Display for CpuCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where another node may be found: a host name or IP address, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    pub host: String,
    pub port: u16,
}

impl FromStr for PeerAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<SocketAddr>()
            && address.port() != 0
        {
            return Ok(Self { host: address.ip().to_string(), port: address.port() });
        }
        let name = text.rsplit_once(':').and_then(|(host, port)| {
            let port = port.parse().ok().filter(|port| *port != 0)?;
            let named = (1..=253).contains(&host.len())
                && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
            named.then(|| Self { host: host.to_owned(), port })
        });
        name.ok_or_else(|| format!("`{}` is not an address like `host:4001`", shortened(text)))
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// More than a person writes; far less than would hurt.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Each is dialled at every start.
const PEERS_MAX: usize = 64;

/// Below it a transfer would be taken for a dead one.
const RATE_MIN: Rate = Rate(64 << 10);
const RATE_MAX: Rate = Rate(64 << 40);

/// Below it hardly a job fits.
const STORAGE_MIN: MemorySize = MemorySize(64 << 20);
const STORAGE_MAX: MemorySize = MemorySize(1 << 50);

/// As long as records are kept: without its record nobody finds what a job left.
const KEEP_DONE: Duration = Duration::from_millis(KEEP_MS);
const KEEP_DONE_MIN: Duration = Duration::from_secs(1);
const TRASH: Duration = Duration::from_secs(24 * 3600);
const TRASH_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

const CPUS_MAX: u32 = 4096;
const MEMORY_MIN: MemorySize = MemorySize(64 << 20);
const MEMORY_MAX: MemorySize = MemorySize(64 << 40);

const GPU_READ_EVERY: Duration = Duration::from_secs(3);
const CLIENT_IDLE: Duration = Duration::from_secs(600);
const CLIENT_IDLE_MIN: Duration = Duration::from_secs(1);
const CLIENT_IDLE_MAX: Duration = Duration::from_secs(86_400);

fn within<T: PartialOrd + fmt::Display>(
    key: &'static str,
    value: T,
    bounds: std::ops::RangeInclusive<T>,
) -> Result<T, ConfigError> {
    if bounds.contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::OutOfBounds {
        key,
        value: value.to_string(),
        bounds: format!("from {} to {}", bounds.start(), bounds.end()),
    })
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.')
}

/// Of a text that goes into a message.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

struct Variables<F> {
    lookup: F,
}

impl<F: Fn(&str) -> Option<OsString>> Variables<F> {
    fn text(&self, variable: &'static str) -> Result<Option<String>, ConfigError> {
        match (self.lookup)(variable).filter(|value| !value.is_empty()) {
            None => Ok(None),
            Some(value) => value.into_string().map(Some).map_err(|_| ConfigError::Variable {
                variable,
                reason: "its value is not UTF-8".to_owned(),
            }),
        }
    }

    fn parsed<T: FromStr>(&self, variable: &'static str) -> Result<Option<T>, ConfigError>
    where
        T::Err: fmt::Display,
    {
        let malformed = |e: T::Err| ConfigError::Variable { variable, reason: e.to_string() };
        self.text(variable)?.map(|text| text.parse().map_err(malformed)).transpose()
    }

    fn list<T: FromStr>(&self, variable: &'static str) -> Result<Option<Vec<T>>, ConfigError>
    where
        T::Err: fmt::Display,
    {
        let malformed = |e: T::Err| ConfigError::Variable { variable, reason: e.to_string() };
        self.text(variable)?
            .map(|text| text.split(',').map(|item| item.trim().parse()).collect())
            .transpose()
            .map_err(malformed)
    }
}

/// As [`SocketAddr`], with an error that says what was expected.
struct Address(SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .map(Self)
            .map_err(|_| format!("`{}` is not an address like `0.0.0.0:4001`", shortened(text)))
    }
}

fn address<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    Ok(text::<D, Address>(from)?.map(|address| address.0))
}

struct Switch(bool);

impl FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "1" | "true" | "yes" | "on" => Ok(Self(true)),
            "0" | "false" | "no" | "off" => Ok(Self(false)),
            other => Err(format!("`{}` is neither `on` nor `off`", shortened(other))),
        }
    }
}

/// A scalar of the file, through the same parser as the command line.
fn text<'de, D: Deserializer<'de>, T: FromStr>(from: D) -> Result<Option<T>, D::Error>
where
    T::Err: fmt::Display,
{
    Ok(Option::<Parsed<T>>::deserialize(from)?.map(|parsed| parsed.0))
}

fn texts<'de, D: Deserializer<'de>, T: FromStr>(from: D) -> Result<Option<Vec<T>>, D::Error>
where
    T::Err: fmt::Display,
{
    let items = Option::<Vec<Parsed<T>>>::deserialize(from)?;
    Ok(items.map(|items| items.into_iter().map(|parsed| parsed.0).collect()))
}

/// Parsed inside the visitor: only there an error gets its key and line.
struct Parsed<T>(T);

impl<'de, T: FromStr> Deserialize<'de> for Parsed<T>
where
    T::Err: fmt::Display,
{
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ScalarVisitor(PhantomData))
    }
}

struct ScalarVisitor<T>(PhantomData<T>);

impl<T: FromStr> de::Visitor<'_> for ScalarVisitor<T>
where
    T::Err: fmt::Display,
{
    type Value = Parsed<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a whole number")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Parsed<T>, E> {
        text.parse().map(Parsed).map_err(E::custom)
    }

    /// YAML takes `cpus: 8` for a number, and `name: 17` too.
    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Parsed<T>, E> {
        self.visit_str(&number.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> PartialSettings {
        PartialSettings::from_yaml(text).unwrap()
    }

    fn resolved(file: &str) -> Result<Settings, ConfigError> {
        Settings::resolve(PartialSettings::default(), PartialSettings::default(), yaml(file))
    }

    #[test]
    fn a_file_with_everything_in_it_is_understood() {
        let settings = resolved(
            "name: gpu-box\n\
             gpus: sim:2xv100,1xgtx1070\n\
             cpus: 8\n\
             memory: 64g\n\
             listen: 127.0.0.1:4001\n\
             peers: [lab1:4001, '[::1]:4002', 10.0.0.7:4003]\n\
             mdns: false\n\
             client: true\n\
             gpu_read_every: 5s\n\
             client_idle: 2min 30s\n\
             upload: 100Mbit/s\n\
             storage: 200GiB\n\
             keep_done: 7d\n\
             trash: 12h\n\
             log: p2pit=debug\n",
        )
        .unwrap();
        assert_eq!(settings.name.as_str(), "gpu-box");
        assert_eq!(settings.gpus, GpuOption::Simulated("2xv100,1xgtx1070".to_owned()));
        assert_eq!((settings.cpus, settings.memory_mib), (8, 64 << 10));
        assert_eq!(settings.listen, "127.0.0.1:4001".parse().unwrap());
        let peers: Vec<_> = settings.peers.iter().map(ToString::to_string).collect();
        assert_eq!(peers, ["lab1:4001", "[::1]:4002", "10.0.0.7:4003"]);
        assert_eq!((settings.mdns, settings.client), (false, true));
        assert_eq!(settings.gpu_read_every, Duration::from_secs(5));
        assert_eq!(settings.client_idle, Duration::from_secs(150));
        assert_eq!((settings.upload, settings.download), (Some(Rate(12_500_000)), None));
        assert_eq!(settings.storage, Some(200 << 30));
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        assert_eq!((settings.keep_done, settings.trash), (hours(7 * 24), hours(12)));
        assert_eq!(settings.log, "p2pit=debug");
    }

    #[test]
    fn without_any_source_the_machine_is_offered_as_it_is() {
        for text in ["", "# nothing set\n"] {
            let settings = resolved(text).unwrap();
            assert_eq!((settings.cpus, settings.memory_mib), machine_resources());
            assert_eq!(settings.gpus, GpuOption::Auto);
            assert_eq!(settings.listen.to_string(), "0.0.0.0:0");
            assert!(settings.mdns && !settings.client && settings.peers.is_empty());
            assert_eq!(settings.storage, None);
            assert_eq!((settings.keep_done, settings.trash), (KEEP_DONE, TRASH));
        }
    }

    #[test]
    fn the_command_line_wins_over_the_environment_and_that_over_the_file() {
        let flags = PartialSettings { cpus: Some(CpuCount(1)), ..PartialSettings::default() };
        let env = PartialSettings::from_env(|name| match name {
            "P2PIT_CPUS" => Some("2".into()),
            "P2PIT_NAME" => Some("from-env".into()),
            "P2PIT_PEERS" => Some("a:1, b:2".into()),
            "P2PIT_MDNS" => Some("off".into()),
            "P2PIT_LISTEN" => Some("".into()),
            _ => None,
        })
        .unwrap();
        let file = yaml("{cpus: 3, name: from-file, mdns: true, listen: '127.0.0.1:7'}");
        let settings = Settings::resolve(flags, env, file).unwrap();
        assert_eq!(settings.cpus, 1);
        assert_eq!(settings.name.as_str(), "from-env");
        assert_eq!(settings.peers.len(), 2);
        assert!(!settings.mdns);
        assert_eq!(settings.listen.port(), 7);
    }

    #[test]
    fn errors_name_the_key_or_variable_and_the_line() {
        for (text, parts) in [
            ("name: a\ncpu: 8\n", vec!["unknown field `cpu`", "`cpus`", "line 2"]),
            ("name: a\nname: b\n", vec!["duplicate", "`name`"]),
            ("mdns: true\nmemory: 64\n", vec!["memory", "`64`", "unit", "line 2"]),
            ("\n\ngpus: all\n", vec!["gpus", "`all`", "`auto`", "line 3"]),
            ("name: Lab 1\n", vec!["name", "`Lab 1` is not a node name"]),
            ("gpu_read_every: fast\n", vec!["gpu_read_every", "`fast`", "`30s`"]),
            ("mdns: true\nlisten: 4001\n", vec!["listen", "`4001`", "`0.0.0.0:4001`", "line 2"]),
            ("peers: [lab1]\n", vec!["peers", "`lab1`", "`host:4001`"]),
            ("cpus: [1]\n", vec!["cpus", "a text or a whole number"]),
            ("name: [\n", vec!["line"]),
            ("client: perhaps\n", vec!["client", "a boolean", "line 1"]),
            ("storage: 200\n", vec!["storage", "`200`", "unit", "line 1"]),
            ("trash: 1\nkeep_done: long\n", vec!["trash", "`1`", "`30s`", "line 1"]),
            ("- name\n", vec!["expected settings as `key: value` lines"]),
        ] {
            let error = PartialSettings::from_yaml(text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{text:?}: {error}");
            }
        }
        let error =
            PartialSettings::from_env(|name| (name == "P2PIT_MDNS").then(|| "perhaps".into()))
                .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the environment variable P2PIT_MDNS: `perhaps` is neither `on` nor `off`"
        );
    }

    #[test]
    fn a_value_out_of_bounds_is_answered_with_the_bounds() {
        for (text, message) in [
            ("cpus: 0", "`cpus` is 0; it must be from 1 to 4096"),
            ("memory: 1m", "`memory` is 1m; it must be from 64m to 64t"),
            ("gpu_read_every: 1h", "`gpu_read_every` is 1h; it must be from 1s to 8s"),
            ("upload: 1k/s", "`upload` is 1k/s; it must be from 64k/s to 64t/s"),
            ("storage: 1m", "`storage` is 1m; it must be from 64m to 1024t"),
            (
                "keep_done: 31days",
                "`keep_done` is 1month 13h 26m 24s; it must be from 1s to 30days",
            ),
            ("trash: 40days", "`trash` is 1month 9days 13h 26m 24s; it must be from 0s to 30days"),
            ("client_idle: 0s", "`client_idle` is 0s; it must be from 1s to 1day"),
        ] {
            assert_eq!(resolved(text).unwrap_err().to_string(), message);
        }
        let many = format!("peers: [{}]", "a:1, ".repeat(65));
        let error = resolved(&many).unwrap_err().to_string();
        assert_eq!(error, "`peers` is a list of 65; it must be at most 64 addresses");
    }

    #[test]
    fn a_missing_file_says_nothing_and_an_enormous_one_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        assert_eq!(PartialSettings::from_file(&path).unwrap(), PartialSettings::default());
        std::fs::write(&path, "#".repeat(CONFIG_BYTES_MAX as usize + 1)).unwrap();
        let error = PartialSettings::from_file(&path).unwrap_err();
        assert!(matches!(error, ConfigError::TooLarge { .. }), "{error}");
        std::fs::write(&path, "cpus: many").unwrap();
        let error = PartialSettings::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("config.yaml") && error.contains("`many`"), "{error}");
    }

    #[test]
    fn a_host_name_becomes_a_node_name() {
        assert_eq!(NodeName::derived("Lab-PC_7.uni.example").as_str(), "lab-pc7.uni.example");
        assert_eq!(NodeName::derived("-._").as_str(), "node");
        let long = NodeName::derived(&"a".repeat(80));
        assert_eq!(long.as_str().parse(), Ok(long));
        for bad in ["", "-a", "a.", "A", "a/b", "..", &"a".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
    }
}
