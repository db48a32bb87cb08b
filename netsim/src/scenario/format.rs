//! What stands in a scenario file, as serde reads it. Unknown fields are refused, with
//! their line.

use core::{fmt, marker::PhantomData, str::FromStr};
use std::collections::BTreeMap;

use p2pit_protocol::{
    job::{Policy, State},
    request::Request,
};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

/// A whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// What it is about, in a sentence.
    pub story: String,
    /// Values to play it with, by the name that stands in `<…>` elsewhere.
    #[serde(default)]
    pub sweep: BTreeMap<String, Vec<String>>,
    /// Machines and people.
    pub pool: Pool,
    /// Links.
    #[serde(default)]
    pub network: Network,
    /// Jobs by name.
    pub jobs: BTreeMap<String, Job>,
    /// What happens, in this order.
    pub steps: Vec<Step>,
}

/// Machines and people.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Pool {
    /// The GPUs of each node, such as `2xv100,1xgtx1070`: `n0` is the first.
    pub nodes: Vec<String>,
    /// Machines that only submit: the first is `cN` for N nodes.
    #[serde(default = "one")]
    pub clients: usize,
    /// People, to whom the machines belong in turn.
    #[serde(default = "one")]
    pub users: usize,
}

/// Links, all alike but for their spread.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Network {
    /// Least time a message takes; 1 ms.
    pub latency: Option<Span>,
    /// Most that one link adds to that, always; 4 ms.
    pub spread: Option<Span>,
    /// Most that one message is late; 3 ms.
    pub jitter: Option<Span>,
    /// Of a thousand messages, how many are lost; none.
    pub loss_permille: u64,
    /// Of a thousand messages, how many come twice; none.
    pub duplicate_permille: u64,
    /// Of a thousand pieces of gossip, how many miss a node; none.
    pub gossip_loss_permille: u64,
}

/// A job.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Job {
    /// The machine it is submitted at.
    pub from: String,
    /// What it asks for.
    pub request: Parsed<Request>,
    /// Whose it is; the founder's.
    #[serde(default)]
    pub user: usize,
    /// How long each process runs; without it, until it is stopped.
    pub run: Option<Span>,
    /// How long preparing takes at most; 300 ms.
    pub prepare: Option<Span>,
    /// From SIGTERM to SIGKILL; 5 s.
    pub grace: Option<Span>,
    /// Its processes ignore SIGTERM.
    #[serde(default)]
    pub deaf: bool,
    /// Attempts after the first; none.
    #[serde(default)]
    pub retries: u32,
    /// What becomes of a process that is cut off; by the number of retries.
    pub policy: Option<Parsed<PolicyName>>,
    /// How long the node of a rank may be silent before the rank is lost; 24 hours.
    pub lost_after: Option<Span>,
    /// How often `keep/` is copied off its node; every minute.
    pub keep_every: Option<Span>,
    /// Its first keepers, the steward first; those its submitter's node proposes.
    pub keepers: Option<Vec<String>>,
}

/// One thing that happens: when, and exactly one thing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Step {
    /// This long after the beginning of the story.
    pub at: Option<Span>,
    /// This long after the step before, or after `when` came true.
    pub after: Option<Span>,
    /// As soon as this is so.
    pub when: Option<Condition>,

    /// A job is submitted.
    pub submit: Option<String>,
    /// The owner of a job stops it.
    pub stop: Option<String>,
    /// The owner of a job gives up what it left.
    pub remove: Option<String>,
    /// The owner of a job takes that back.
    pub restore: Option<String>,
    /// There is no room for copies.
    pub no_room: Option<Deed>,
    /// Copies on the disk go bad.
    pub lose_copies: Option<Deed>,
    /// The daemon dies; processes live on.
    pub crash: Option<Deed>,
    /// The machine dies with everything that runs on it, and keeps its disk.
    pub reboot: Option<Deed>,
    /// The daemon hands over what it drives, and the machine is switched off.
    pub leave: Option<Deed>,
    /// What is down comes back now.
    pub start: Option<Deed>,
    /// The machine dies and comes back without its disk's content.
    pub empty_disk: Option<Deed>,
    /// The disk's content is put aside.
    pub backup: Option<Deed>,
    /// The machine dies and comes back with what was put aside.
    pub restored_disk: Option<Deed>,
    /// The machine dies and comes back with a copy of another's disk.
    pub cloned_disk: Option<Deed>,
    /// The machine sleeps: nothing runs, the boot clock goes on.
    pub suspend: Option<Deed>,
    /// The daemon gets no turn; processes run on.
    pub pause: Option<Deed>,
    /// The clocks of a machine go wrong.
    pub clock: Option<Deed>,
    /// Links carry nothing.
    pub cut: Option<Cut>,
    /// Some messages are lost.
    pub lose: Option<Lose>,
    /// Every fault ends, and machines that are down come back.
    pub heal: Option<Everything>,
    /// This must be so.
    pub expect: Option<Condition>,
}

/// What is done to machines.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Deed {
    /// This machine.
    pub node: Option<String>,
    /// These machines.
    pub nodes: Option<Vec<Side>>,
    /// Whoever drives this job now.
    pub steward_of: Option<String>,
    /// A keeper of this job that does not drive it.
    pub keeper_of: Option<String>,
    /// The machine this job was submitted at.
    pub submitter_of: Option<String>,
    /// The node of a rank of this job.
    pub worker_of: Option<String>,
    /// Which of several, from 0: of `keeper-of` and `worker-of`.
    pub nth: usize,
    /// How long it lasts; until the story heals.
    #[serde(rename = "for")]
    pub lasts: Option<Span>,
    /// Of `cloned-disk`: whose disk.
    pub of: Option<String>,
    /// Of `clock`: how much the boot clock is fast, in parts per million; negative: slow.
    pub rate_ppm: Option<i64>,
    /// Of `clock`: how far the wall clock is put forward.
    pub forward: Option<Span>,
    /// Of `clock`: how far the wall clock is put back.
    pub back: Option<Span>,
    /// Of `clock`: how far the boot clock is put forward.
    pub boot_forward: Option<Span>,
    /// Of `clock`: how far the boot clock is put back.
    pub boot_back: Option<Span>,
}

/// A cut between two sides.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Cut {
    /// One side.
    pub from: Vec<Side>,
    /// The other; everybody else where it is left out.
    pub to: Option<Vec<Side>>,
    /// Only what goes from the first side to the other is lost.
    #[serde(default)]
    pub one_way: bool,
    /// How long.
    #[serde(rename = "for")]
    pub lasts: Span,
}

/// Messages that are lost.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Lose {
    /// Their names, such as `inited`.
    pub messages: Vec<Parsed<MessageName>>,
    /// Only those about this job.
    pub job: Option<String>,
    /// Only those to these machines.
    pub to: Option<Vec<Side>>,
    /// How long.
    #[serde(rename = "for")]
    pub lasts: Span,
}

/// What can be so of a job or a machine. All that is given must be so at one time.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Condition {
    /// The job the following is about.
    pub job: Option<String>,
    /// Its submitter was told `submitted`.
    pub submitted: Option<bool>,
    /// It came to its end.
    pub ended: Option<bool>,
    /// It is in this state.
    pub state: Option<Parsed<StateName>>,
    /// It ended this way.
    pub outcome: Option<Parsed<OutcomeName>>,
    /// Its current attempt.
    pub attempt: Option<u32>,
    /// Its last attempt's number is at most this.
    pub attempts_at_most: Option<u32>,
    /// So many of its processes exist now.
    pub processes: Option<usize>,
    /// Each of its ranks was run so often, counting what still runs.
    pub executions: Option<usize>,
    /// So many of its processes were ended by their lease.
    pub lease_endings: Option<usize>,
    /// A rank ran again only after the lease of the process before had surely ended.
    pub leases_kept: Option<bool>,
    /// It was driven by so many stewards or more.
    pub term_at_least: Option<u64>,
    /// It was driven by at most so many stewards.
    pub term_at_most: Option<u64>,
    /// Its keepers changed so often or more.
    pub epoch_at_least: Option<u32>,
    /// So many nodes keep its record.
    pub keepers: Option<usize>,
    /// It is driven by this machine.
    pub steward: Option<Side>,
    /// It is not driven by this machine.
    pub steward_not: Option<Side>,
    /// It is not kept by this machine.
    pub keeper_not: Option<Side>,
    /// Its submission was tried so often or more.
    pub submissions_at_least: Option<u64>,
    /// So many jobs came of its submissions.
    pub copies: Option<usize>,
    /// What each of its ranks left is on so many disks or more.
    pub disks_at_least: Option<usize>,
    /// The next attempt begins with a copy of `keep/` that was made while the one before ran.
    pub saved: Option<bool>,
    /// What it left was given up.
    pub removed: Option<bool>,
    /// Every keeper knows that.
    pub removed_everywhere: Option<bool>,
    /// The record says that not all it left could be copied.
    pub not_copied: Option<bool>,

    /// A message about the job.
    pub message: Option<Parsed<MessageName>>,
    /// When of it: `before` it leaves (it does not), `sent`, or `delivered`.
    pub moment: Option<Parsed<Moment>>,
    /// The how manieth such message, from 1.
    pub nth: Option<u64>,
    /// Only of this sender.
    pub from: Option<Side>,
    /// Only to this receiver.
    pub to: Option<Side>,

    /// The machine the following is about.
    pub node: Option<Side>,
    /// Its daemon runs.
    pub up: Option<bool>,
    /// It has another store than at the beginning of the story.
    pub new_store: Option<bool>,

    /// How long this may take to come true.
    pub within: Option<Span>,
    /// How long it must stay true.
    #[serde(rename = "for")]
    pub stays: Option<Span>,
}

/// A machine: by its name, or `{steward-of: a}` and the like.
#[derive(Debug, Clone)]
pub struct Side(pub Box<Deed>);

/// The word `all` or `true`.
#[derive(Debug, Clone, Copy)]
pub struct Everything;

/// A time such as `10s` or `2m`, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub u64);

/// A text that has to be read further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parsed<T>(pub T);

/// A state, by the name it is shown with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateName(pub State);

/// A policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyName(pub Policy);

/// How a job may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutcomeName {
    /// Every process exited with 0.
    Succeeded,
    /// One did not.
    Failed,
    /// Somebody stopped it.
    Stopped,
    /// By its time limit.
    TimedOut,
    /// What became of it is not known.
    Lost,
}

/// A direct message's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageName(pub &'static str);

/// A moment in the life of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It is about to leave, and is lost.
    Before,
    /// It is on its way.
    Sent,
    /// Its receiver took it in.
    Delivered,
}

/// What an `accept` is called here whose value seals its epoch.
pub const SEAL: &str = "seal";

/// Every message that goes from one node to another, as
/// [`p2pit_protocol::message::Message::name`] calls it, and [`SEAL`].
pub const MESSAGES: [&str; 46] = [
    SEAL,
    "init",
    "inited",
    "init-refused",
    "prepare",
    "promise",
    "accept",
    "accepted",
    "nack",
    "not-init",
    "moved",
    "install",
    "installed",
    "renew",
    "renewed",
    "look",
    "seen",
    "adopt",
    "adopted",
    "ask-lease",
    "lease",
    "call",
    "bid",
    "pin",
    "pinned",
    "pin-refused",
    "holds-lost",
    "release",
    "commit",
    "committed",
    "commit-refused",
    "withdraw",
    "elsewhere",
    "start",
    "stop",
    "ask",
    "report",
    "end-recorded",
    "save",
    "save-held",
    "ask-copies",
    "copies",
    "soft",
    "reconcile",
    "reconciled",
    "want",
];

const STATES: [State; 8] = [
    State::New,
    State::Waiting,
    State::Preparing,
    State::Starting,
    State::Running,
    State::Stopping,
    State::Cleaning,
    State::Done,
];

const fn one() -> usize {
    1
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let span = humantime::parse_duration(text)
            .map_err(|_| format!("`{text}` is no time: write one such as `10s` or `2m`"))?;
        u64::try_from(span.as_millis()).map(Self).map_err(|_| format!("`{text}` is too long"))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(core::time::Duration::from_millis(self.0)).fmt(f)
    }
}

impl FromStr for StateName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let state = STATES.into_iter().find(|state| state.to_string() == text);
        state.map(Self).ok_or_else(|| no_such("state", text, STATES.map(|s| s.to_string())))
    }
}

impl FromStr for PolicyName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Policy::Restart, Policy::Continue];
        let policy = all.into_iter().find(|policy| policy.to_string() == text);
        policy.map(Self).ok_or_else(|| no_such("policy", text, all.map(|p| p.to_string())))
    }
}

impl OutcomeName {
    const ALL: [(Self, &str); 5] = [
        (Self::Succeeded, "succeeded"),
        (Self::Failed, "failed"),
        (Self::Stopped, "stopped"),
        (Self::TimedOut, "timed-out"),
        (Self::Lost, "lost"),
    ];
}

impl FromStr for OutcomeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|(_, name)| *name == text);
        let names = || Self::ALL.map(|(_, name)| name.to_owned());
        known.map(|(outcome, _)| outcome).ok_or_else(|| no_such("outcome", text, names()))
    }
}

impl fmt::Display for OutcomeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(outcome, _)| outcome == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

impl FromStr for MessageName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = MESSAGES.into_iter().find(|name| *name == text);
        name.map(Self).ok_or_else(|| no_such("message", text, MESSAGES.map(str::to_owned)))
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "before" => Ok(Self::Before),
            "sent" => Ok(Self::Sent),
            "delivered" => Ok(Self::Delivered),
            _ => Err(no_such("moment", text, ["before", "sent", "delivered"].map(str::to_owned))),
        }
    }
}

fn no_such<const N: usize>(what: &str, text: &str, known: [String; N]) -> String {
    format!("no {what} is called `{text}`; there are {}", known.join(", "))
}

// ---- reading scalars: an error bears the line it stands on ----------------------------

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text("a time such as `10s`", PhantomData))
    }
}

impl<'de> Deserialize<'de> for Parsed<Request> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text("a request such as `2:[v100]`", PhantomData))
            .map(|ReadRequest(request)| Self(request))
    }
}

macro_rules! read_by_name {
    ($($name:ty: $expected:literal;)*) => {
        $(impl<'de> Deserialize<'de> for Parsed<$name> {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_str(Text($expected, PhantomData)).map(Self)
            }
        })*
    };
}

read_by_name! {
    StateName: "a state such as `RUNNING`";
    PolicyName: "`restart` or `continue`";
    OutcomeName: "an outcome such as `succeeded`";
    MessageName: "the name of a message, such as `commit`";
    Moment: "`before`, `sent` or `delivered`";
}

struct ReadRequest(Request);

impl FromStr for ReadRequest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Request::parse(text).map(Self).map_err(|e| e.to_string())
    }
}

/// Reads a string and then what it means.
struct Text<T>(&'static str, PhantomData<T>);

impl<T: FromStr<Err = String>> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Side {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Side;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a machine such as `n0`, or a role such as `{steward-of: a}`")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Side, E> {
                let named = Deed { node: Some(name.to_owned()), ..Deed::default() };
                Ok(Side(Box::new(named)))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Side, A::Error> {
                let role = Deed::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Side(Box::new(role)))
            }
        }

        from.deserialize_any(Either)
    }
}

impl<'de> Deserialize<'de> for Everything {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Word;

        impl Visitor<'_> for Word {
            type Value = Everything;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the word `all`")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Everything, E> {
                let is_all = word == "all";
                is_all.then_some(Everything).ok_or_else(|| E::custom("only `all` can be healed"))
            }
        }

        from.deserialize_str(Word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, ms) in [("10s", 10_000), ("2m", 120_000), ("250ms", 250), ("1h 30m", 5_400_000)]
        {
            assert_eq!(text.parse(), Ok(Span(ms)));
        }
        for text in ["10", "s", "-5s", ""] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    #[test]
    fn states_and_messages_have_the_names_they_are_shown_with() {
        assert_eq!("RUNNING".parse(), Ok(StateName(State::Running)));
        assert_eq!("end-recorded".parse(), Ok(MessageName("end-recorded")));
        let unknown = "runing".parse::<StateName>().unwrap_err();
        assert!(unknown.contains("`runing`") && unknown.contains("RUNNING"), "{unknown}");
    }
}
