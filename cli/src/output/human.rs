//! Tables and lines for people.

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use p2pit_node::api::types::{Checkup, Finding, GpuReading, NodeInfo, Severity, Space, UserInfo};
use p2pit_protocol::{
    inventory::Gpu,
    job::{Command, Outcome, Policy, RankState, Source, State},
    message::GpuState,
    steward::survives as pool_survives,
};

use super::{Format, bytes, duration_s, iso8601, plain, text::line};
use crate::view::{
    Copies, File, FileKind, Job, Jobs, MeAndNode, Node, NodeGpu, Overview, Plan, Rank, Recovery,
    Submission, Wait, gpu_summary, survived_losses,
};

/// Characters of a title in a table.
const TITLE_CHARS_MAX: usize = 40;
/// Characters of a request in a table.
const REQUEST_CHARS_MAX: usize = 40;

#[derive(Debug)]
pub(super) struct Human {
    pub(super) colour: bool,
}

impl Format for Human {
    fn me(&self, MeAndNode { me, user_id, user, eligible }: &MeAndNode) -> String {
        let mut fields = Fields::default();
        match user {
            Some(user) => fields.add("User", user_text(user)),
            None => fields.add("User", "not of this pool".to_owned()),
        }
        fields.add("Key", user_id.to_string());
        let client = if me.client { ", offers nothing" } else { "" };
        let name = if me.name.is_empty() { "none yet" } else { &me.name };
        fields.add("Node", format!("{name}{client}"));
        fields.add("Node id", me.node.to_string());
        match &me.pool {
            Some(pool) => fields.add(
                "Pool",
                format!(
                    "{} ({}, {})",
                    pool.name,
                    count(pool.nodes, "node"),
                    count(pool.users, "user")
                ),
            ),
            None => fields.add("Pool", "none".to_owned()),
        }
        if let Some(eligible) = eligible {
            fields.add("Survives", survives(*eligible));
        }
        fields.add("Connected", count(me.connected, "node"));
        fields.add("GPUs", gpu_summary(&me.capacity.gpus));
        fields.add("CPU", count(me.capacity.cpu_cores as usize, "core"));
        fields.add("Memory", bytes(me.capacity.ram_mib << 20));
        fields.add("Runs jobs of", runs_jobs_of(me.owner_only.as_deref()));
        fields.add("Isolation", me.isolation.clone());
        fields.add("Listens on", addresses(&me.control));
        fields.add("Data on", addresses(&me.data));
        fields.add("Disk", disk_text(&me.space));
        fields.add("Home", me.home.clone());
        fields.add("Daemon", format!("process {}, version {}", me.pid, me.version));
        for text in me.locked_gpus.iter().chain(&me.warnings) {
            fields.add("Warning", text.clone());
        }
        fields.text()
    }

    fn nodes(&self, nodes: &[NodeInfo]) -> String {
        let mut table = self.table(&["NODE", "OWNER", "STATE", "GPUS", "FREE", "CPU", "RAM"]);
        for info in nodes {
            let is_free = |gpu: &&Gpu| info.not_free.iter().all(|(uuid, _)| *uuid != gpu.uuid);
            let free = info.capacity.gpus.iter().filter(is_free).count();
            let mut notes: Vec<String> = Vec::new();
            if info.client {
                notes.push("client".to_owned());
            } else if info.away {
                notes.push("offers nothing now".to_owned());
            } else if info.owner_only.is_some() {
                notes.push("owner's jobs only".to_owned());
            }
            if info.full && !info.client {
                notes.push("disk full".to_owned());
            }
            let is_known = info.advert_age_s.is_some() && !info.client;
            // What is known of it is as old as that.
            if let Some(age) = info.advert_age_s.filter(|_| info.reach == "offline") {
                notes.push(format!("as of {} ago", duration_s(age)));
            }
            let state = match notes.is_empty() {
                true => info.reach.clone(),
                false => format!("{} ({})", info.reach, notes.join(", ")),
            };
            let known = |text: String| if is_known { text } else { "-".to_owned() };
            table.add_row(vec![
                Cell::new(plain(&info.name)),
                Cell::new(plain(&info.owner_name)),
                self.state_cell(&state, reach_colour(&info.reach)),
                Cell::new(known(gpu_summary(&info.capacity.gpus))),
                Cell::new(known(free.to_string())),
                Cell::new(known(format!("{}/{}", info.free_cpu_cores, info.capacity.cpu_cores))),
                Cell::new(known(format!(
                    "{}/{}",
                    gib(info.free_ram_mib),
                    bytes(info.capacity.ram_mib << 20)
                ))),
            ]);
        }
        trimmed(&table)
    }

    fn node(&self, node: &Node) -> String {
        let info = &node.info;
        let mut fields = Fields::default();
        fields.add("Node", info.name.clone());
        fields.add("Node id", info.node.to_string());
        fields.add("Owner", info.owner_name.clone());
        let client = match (info.client, info.away) {
            (true, _) => ", a client that offers nothing",
            (false, true) => ", offers nothing now: a command has started it for itself",
            (false, false) => "",
        };
        let age = match info.advert_age_s {
            Some(age) if info.reach == "offline" => format!(", last heard {} ago", duration_s(age)),
            _ => String::new(),
        };
        fields.add("State", format!("{}{client}{age}", info.reach));
        fields.add("Runs jobs of", runs_jobs_of(info.owner_only.as_deref()));
        fields.add("Isolation", node.isolation.clone());
        match &node.live {
            Some(live) => {
                let (cores, cores_free) = live.cpu_cores;
                let (ram, ram_free) = live.ram_mib;
                fields
                    .add("CPU", format!("{cores_free} of {} free", count(cores as usize, "core")));
                let ram = bytes(ram << 20);
                fields.add("Memory", format!("{} of {ram} free", bytes(ram_free << 20)));
                if !live.holds.is_empty() {
                    fields.add("Held for", live.holds.join(", "));
                }
                if live.standing > 0 {
                    fields.add("Waiting", count(live.standing, "standing call"));
                }
            }
            None => fields.add(
                "Not asked",
                node.error.clone().unwrap_or_else(|| "it cannot be reached".to_owned()),
            ),
        }
        match &node.space {
            Some(space) => fields.add("Disk", disk_text(space)),
            None if info.full => fields.add("Disk", "full".to_owned()),
            None => {}
        }
        fields.add("Listens on", addresses(&info.control));
        fields.add("Data on", addresses(&info.data));
        let mut text = fields.text();
        text.push_str("GPUs:\n");
        if node.gpus.is_empty() {
            text.push_str("  none\n");
        }
        for (index, gpu) in node.gpus.iter().enumerate() {
            text.push_str(&gpu_text(index, gpu));
        }
        text
    }

    fn users(&self, users: &[UserInfo]) -> String {
        let mut table = self.table(&["USER", "FULL NAME", "E-MAIL", "ROLE"]);
        for user in users {
            let or_dash = |text: &Option<String>| text.as_deref().map_or("-".to_owned(), plain);
            table.add_row(vec![
                plain(&user.name),
                or_dash(&user.full_name),
                or_dash(&user.email),
                if user.admin { "admin" } else { "user" }.to_owned(),
            ]);
        }
        trimmed(&table)
    }

    fn status(&self, Overview { jobs, eligible, full }: &Overview) -> String {
        let mut text = self.jobs(jobs);
        if pool_survives(*eligible) == 0 {
            let there = match eligible {
                0 => "none can be reached".to_owned(),
                1 => "one can be reached".to_owned(),
                n => format!("{n} can be reached"),
            };
            text.push_str(&format!(
                "\nThis pool survives no loss of a node: it takes three that keep its jobs, and \
                 {there}.\n"
            ));
        }
        if !full.is_empty() {
            text.push_str(&format!(
                "\nNo room for more content on {}: `p2pit show node:NAME` says what takes it, \
                 `p2pit rm` removes what finished jobs left.\n",
                plain(&full.join(", "))
            ));
        }
        text
    }

    fn job(&self, job: &Job, now_ms: u64) -> String {
        let mut fields = Fields::default();
        fields.add("Job", job.short.clone());
        fields.add("Id", job.id.to_string());
        fields.add("Title", title(job));
        fields.add("User", job.user.clone());
        fields.add("Private", yes_no(job.private));
        fields.add("Request", job.request.clone());
        if let Some(command) = &job.command {
            fields.add("Command", command_text(command));
        }
        add_source(&mut fields, &job.source);
        if let Some(continues) = job.continues {
            fields.add("Continues", continues.to_string());
        }
        fields.add("Submitted", iso8601(job.submitted_at_ms));
        let since = duration_s(now_ms.saturating_sub(job.since_ms()) / 1000);
        fields.add("State", format!("{} since {since}", job.state));
        if let Some(outcome) = &job.outcome {
            let by = job.stopped_by.as_ref().map(|user| format!(" by {user}"));
            let reason = match outcome {
                Outcome::Lost { reason } => format!(": {reason}"),
                _ => String::new(),
            };
            fields.add("Outcome", format!("{outcome}{}{reason}", by.unwrap_or_default()));
        }
        fields.add("Retries", format!("{} of {} used", job.retried, job.retries));
        fields.add("Partition", partition_text(job));
        fields.add("Copies", keep_every_text(job.keep_every_ms));
        fields.add("Kept by", job.keepers.join(", "));
        fields.add("Steward", format!("{} (term {}, epoch {})", job.steward, job.term, job.epoch));
        if job.recovered {
            let text = "its record was restored without most of its keepers: it may have missed \
                        changes";
            fields.add("Recovered", text.to_owned());
        }
        if let Some((by, at_ms)) = &job.removed {
            let at = iso8601(*at_ms);
            fields.add("Removed", format!("what it left, by {by} at {at}"));
        }
        let mut text = fields.text();
        text.push_str("History:\n");
        for change in &job.history {
            let (at, reason) = (iso8601(change.at_ms), line(&change.reason, 200));
            text.push_str(&format!("  {at}  {:<9}  {reason}\n", change.state.to_string()));
        }
        if !job.ranks.is_empty() {
            text.push_str(&format!("Processes of attempt {}:\n", job.attempt));
            for rank in &job.ranks {
                text.push_str(&rank_text(rank));
            }
            let copies: String = job.ranks.iter().map(copies_text).collect();
            if !copies.is_empty() {
                text.push_str(&format!("Copies:\n{copies}"));
            }
        }
        text
    }

    fn jobs(&self, jobs: &Jobs) -> String {
        let header = ["JOB", "S", "SINCE", "UC%", "UM%", "USER", "TITLE", "RESOURCE"];
        let mut table = self.table(&header);
        for column in [2, 3, 4] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let percent =
            |percent: Option<u32>| percent.map_or("-".to_owned(), |percent| percent.to_string());
        for job in &jobs.jobs {
            let state = match &job.outcome {
                Some(outcome) => outcome.to_string(),
                None => job.state.code().to_owned(),
            };
            let since = jobs.now_ms.saturating_sub(job.since_ms()) / 1000;
            table.add_row(vec![
                Cell::new(&job.short),
                self.state_cell(&state, job_colour(job)),
                Cell::new(duration_s(since)),
                Cell::new(percent(job.usage.compute_percent)),
                Cell::new(percent(job.usage.memory_percent)),
                Cell::new(plain(&job.user)),
                Cell::new(line(&title(job), TITLE_CHARS_MAX)),
                Cell::new(line(&job.request, REQUEST_CHARS_MAX)),
            ]);
        }
        trimmed(&table)
    }

    fn wait(&self, wait: &Wait) -> String {
        let mut text = format!("{}: {}\n", wait.state, plain(&wait.summary));
        if matches!(wait.state, State::New | State::Waiting) {
            let need = count(wait.need as usize, "process");
            text.push_str(&format!("It needs room for {need} and has it for {}.\n", wait.held));
        }
        if wait.nodes.is_empty() {
            return text;
        }
        let mut table = self.table(&["NODE", "SAYS", "BECAUSE"]);
        for node in &wait.nodes {
            let reason = if node.reason.is_empty() { "-".to_owned() } else { plain(&node.reason) };
            table.add_row(vec![plain(&node.node), node.verdict.to_owned(), reason]);
        }
        format!("{text}\n{}", trimmed(&table))
    }

    fn checkup(&self, Checkup { findings }: &Checkup) -> String {
        let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
        let mut text = String::new();
        for Finding { check, severity, finding, hint } in findings {
            let (word, colour) = match severity {
                Severity::Ok => ("ok", "32"),
                Severity::Note => ("note", "36"),
                Severity::Warning => ("warning", "1;33"),
                Severity::Problem => ("problem", "1;31"),
            };
            let word = format!("{word:<7}");
            let word = if self.colour { format!("\x1b[{colour}m{word}\x1b[0m") } else { word };
            text.push_str(&format!("{word}  {check:<width$}  {}\n", plain(finding)));
            if let Some(hint) = hint {
                text.push_str(&format!("{:9}{:width$}  - {}\n", "", "", plain(hint)));
            }
        }
        text
    }

    fn files(&self, files: &[File]) -> String {
        let size = |file: &File| match &file.kind {
            FileKind::Dir { bytes, .. } | FileKind::File { bytes, .. } => bytes.to_string(),
            FileKind::Link { .. } => "-".to_owned(),
        };
        let width = files.iter().map(|file| size(file).len()).max().unwrap_or(0);
        let row = |file: &File| {
            let path = plain(&file.path).replace('\n', "\u{fffd}");
            let size = size(file);
            match &file.kind {
                FileKind::Dir { .. } => format!("D {size:>width$} {path}/\n"),
                FileKind::File { .. } => format!("F {size:>width$} {path}\n"),
                FileKind::Link { target } => {
                    format!("L {size:>width$} {path} -> {}\n", line(target, 200))
                }
            }
        };
        files.iter().map(row).collect()
    }

    fn plan(&self, plan: &Plan) -> String {
        let mut fields = Fields::default();
        fields.add("Title", plan.title.clone());
        fields.add("Request", plan.request.clone());
        fields.add("Processes", plan.processes.to_string());
        fields.add("Command", command_text(&plan.command));
        add_source(&mut fields, &plan.source);
        fields.add(
            "Directory",
            format!("{}, {}", count(plan.files as usize, "file"), bytes(plan.bytes)),
        );
        fields.add(
            "Not here yet",
            format!(
                "{}, {}",
                count(plan.missing_blobs as usize, "blob"),
                bytes(plan.missing_bytes)
            ),
        );
        fields.add("Kept by", plan.keepers.join(", "));
        let mut text = fields.text();
        if plan.candidates.is_empty() {
            text.push_str("No node has room now: the job would wait.\n");
            return text;
        }
        text.push_str("Would be asked of:\n");
        for (node, processes, offline_s) in &plan.candidates {
            let room = match processes {
                0 => "no room now".to_owned(),
                n => format!("room for {} now", count(*n as usize, "process")),
            };
            let room = match offline_s {
                None => room,
                Some(age) => {
                    format!("offline; {} ago, {}", duration_s(*age), room.replace(" now", ""))
                }
            };
            text.push_str(&format!("  {}: {room}\n", plain(node)));
        }
        text
    }

    /// The id alone: the rest is talk.
    fn submission(&self, submission: &Submission) -> String {
        format!("{}\n", submission.id)
    }

    /// As above.
    fn recovery(&self, recovery: &Recovery) -> String {
        format!("{}\n", recovery.id)
    }
}

impl Human {
    fn table(&self, header: &[&str]) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if self.colour {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        let bold = |text: &&str| {
            let cell = Cell::new(text);
            if self.colour { cell.add_attribute(Attribute::Bold) } else { cell }
        };
        table.set_header(header.iter().map(bold).collect::<Vec<_>>());
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        table
    }

    fn state_cell(&self, text: &str, colour: Option<Color>) -> Cell {
        let cell = Cell::new(plain(text));
        match colour.filter(|_| self.colour) {
            Some(colour) => cell.fg(colour),
            None => cell,
        }
    }
}

/// What a submission says beside the job's id.
pub(super) fn submission_text(submission: &Submission) -> String {
    let mut fields = Fields::default();
    fields.add("Title", submission.title.clone());
    fields.add("Request", submission.request.clone());
    fields.add("Private", yes_no(submission.private));
    if let Some(continues) = submission.continues {
        fields.add("Continues", continues.to_string());
    }
    fields.add("Command", command_text(&submission.command));
    add_source(&mut fields, &submission.source);
    let (keepers, online) = (submission.keepers.len(), submission.keepers_online);
    let kept_by = match keepers.saturating_sub(online) {
        0 => count(keepers, "node"),
        1 => format!("{}, one of them offline", count(keepers, "node")),
        off => format!("{}, {off} of them offline", count(keepers, "node")),
    };
    fields.add(
        "Kept by",
        match survived_losses(keepers, online) {
            0 => format!("{kept_by}: it does not survive the loss of one"),
            n => format!("{kept_by}: it survives the loss of {n}"),
        },
    );
    fields.add(
        "Sent",
        format!(
            "{}, {} ({} there already)",
            count(submission.sent_blobs as usize, "blob"),
            bytes(submission.sent_bytes),
            submission.there_blobs
        ),
    );
    fields.text()
}

/// Lines of `label: value`, the values below one another.
#[derive(Debug, Default)]
struct Fields(Vec<(&'static str, String)>);

impl Fields {
    fn add(&mut self, label: &'static str, value: String) {
        self.0.push((label, value));
    }

    fn text(&self) -> String {
        let width = self.0.iter().map(|(label, _)| label.len() + 1).max().unwrap_or(0);
        let field = |(label, value): &(&str, String)| {
            format!("{:<width$} {}\n", format!("{label}:"), line(value, 2_000))
        };
        self.0.iter().map(field).collect()
    }
}

fn add_source(fields: &mut Fields, source: &Source) {
    let Source { remote, commit, diff_lines, untracked } = source;
    if let Some(remote) = remote {
        fields.add("Remote", remote.clone());
    }
    if let Some(commit) = commit {
        fields.add("Commit", commit.clone());
        let untracked = count(*untracked as usize, "untracked file");
        fields.add("Diff", format!("{}, {untracked}", count(*diff_lines as usize, "line")));
    }
}

fn title(job: &Job) -> String {
    if job.private && job.title.is_empty() { "(private)".to_owned() } else { plain(&job.title) }
}

fn user_text(user: &UserInfo) -> String {
    let details = [user.full_name.clone(), user.email.clone()];
    let mut details: Vec<String> = details.into_iter().flatten().collect();
    if user.admin {
        details.push("admin".to_owned());
    }
    if details.is_empty() {
        return user.name.clone();
    }
    format!("{} ({})", user.name, details.join(", "))
}

fn rank_text(rank: &Rank) -> String {
    let gpus = if rank.gpus.is_empty() { "no GPU".to_owned() } else { rank.gpus.join(", ") };
    let ending = match &rank.end {
        Some(end) => format!(", {}", end.ending),
        None => String::new(),
    };
    let note = rank.end.as_ref().and_then(|end| end.note.as_ref());
    let note = note.map(|note| format!(" ({note})")).unwrap_or_default();
    let place = format!("group {}, process {}", rank.group, rank.process);
    let text =
        format!("{} ({place}) on {}: {}{ending}{note}; {gpus}", rank.rank, rank.node, rank.state);
    format!("  {}\n", line(&text, 2_000))
}

/// Nothing where there are none.
fn copies_text(rank: &Rank) -> String {
    let Some(Copies { holders, copying, saves, cannot }) = &rank.copies else {
        return String::new();
    };
    let mut parts = Vec::new();
    if !holders.is_empty() {
        parts.push(format!("log and results on {}", holders.join(", ")));
    }
    if !copying.is_empty() {
        parts.push(format!("being copied to {}", copying.join(", ")));
    }
    if rank.end.is_none() && !saves.is_empty() {
        let saves = saves.iter().map(|(node, seq)| format!("{node} (copy {seq})"));
        parts.push(format!("keep/ on {}", saves.collect::<Vec<_>>().join(", ")));
    }
    parts.extend(cannot.iter().map(|(node, reason)| format!("{node} cannot: {reason}")));
    if parts.is_empty() {
        return String::new();
    }
    format!("  {}\n", line(&format!("{}: {}", rank.rank, parts.join("; ")), 2_000))
}

fn gpu_text(index: usize, NodeGpu { gpu, state, job, reading }: &NodeGpu) -> String {
    let simulated = if gpu.simulated { ", simulated" } else { "" };
    let state = match (state, job) {
        (_, Some(job)) => format!("used by job {job}"),
        (GpuState::Free, None) => "free".to_owned(),
        (GpuState::Used, None) => "used by a job".to_owned(),
        (GpuState::Foreign, None) => "used by a process outside the pool".to_owned(),
    };
    let memory = bytes(gpu.memory_bytes);
    let reading = reading.as_ref().map(reading_text).unwrap_or_default();
    let text = format!(
        "{index}: \"{}\" aka \"{}\" ({memory}{simulated}): {state}{reading}",
        gpu.full_name, gpu.model
    );
    format!("  {}\n     {}\n", line(&text, 2_000), plain(&gpu.uuid.0))
}

fn reading_text(reading: &GpuReading) -> String {
    let mut parts = Vec::new();
    if let Some(percent) = reading.utilisation_percent {
        parts.push(format!("{percent} % busy"));
    }
    if let Some(used) = reading.memory_used_bytes {
        parts.push(format!("{} in use", bytes(used)));
    }
    if let Some(celsius) = reading.temperature_celsius {
        parts.push(format!("{celsius} °C"));
    }
    if let Some(milliwatts) = reading.power_milliwatts {
        parts.push(format!("{} W", milliwatts / 1000));
    }
    if !reading.compute_processes.is_empty() {
        let pids: Vec<String> =
            reading.compute_processes.iter().map(|(pid, _)| pid.to_string()).collect();
        parts.push(format!("processes {}", pids.join(" ")));
    }
    if parts.is_empty() { String::new() } else { format!("; {}", parts.join(", ")) }
}

fn command_text(command: &Command) -> String {
    match command {
        Command::Script => ".compute".to_owned(),
        Command::Direct(text) => line(text, 200),
    }
}

fn keep_every_text(keep_every_ms: u64) -> String {
    match keep_every_ms {
        0 => "of keep/ only when a process has ended".to_owned(),
        every => format!("of keep/ every {} while it runs", duration_s(every / 1000)),
    }
}

/// What becomes of it when a node is cut off.
fn partition_text(job: &Job) -> String {
    let lost_after = duration_s(job.lost_after_ms / 1000);
    let policy = match job.policy {
        Policy::Restart => "restart: a process that is cut off is ended, to run elsewhere",
        Policy::Continue => "continue: a process that is cut off runs on, and is waited for",
    };
    format!("{policy}; lost after {lost_after} of silence")
}

fn survives(eligible: usize) -> String {
    match pool_survives(eligible) {
        0 => "no loss of a node".to_owned(),
        n => format!("the loss of {}", count(n, "node")),
    }
}

fn runs_jobs_of(owner_only: Option<&str>) -> String {
    match owner_only {
        None => "everybody in the pool".to_owned(),
        Some(reason) => format!("its owner only ({reason})"),
    }
}

/// What p2pit takes of a disk, and what it may.
fn disk_text(space: &Space) -> String {
    let free = format!("{} of {} free", bytes(space.disk_free), bytes(space.disk_total));
    if !space.is_counted {
        return free;
    }
    let Space { blobs, jobs, copies, trash, .. } = *space;
    let parts = [("content", blobs), ("jobs", jobs), ("copies", copies), ("trash", trash)];
    let parts = parts.iter().filter(|(_, of)| *of > 0);
    let parts: Vec<String> = parts.map(|(what, of)| format!("{what} {}", bytes(*of))).collect();
    let of = space.quota.map(|quota| format!(" of {}", bytes(quota))).unwrap_or_default();
    let full = if space.full { "; no room for more content" } else { "" };
    let parts = if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) };
    format!("{}{of} used{parts}; {free}{full}", bytes(space.used()))
}

fn addresses(addresses: &[std::net::SocketAddr]) -> String {
    let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(" ") }
}

fn count(n: usize, what: &str) -> String {
    let plural = match (n, what.ends_with("ss")) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{n} {what}{plural}")
}

fn yes_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

fn gib(mib: u64) -> String {
    format!("{:.1}", mib as f64 / 1024.0)
}

fn reach_colour(reach: &str) -> Option<Color> {
    match reach {
        "self" | "online" => Some(Color::Green),
        "offline" => Some(Color::Red),
        _ => None,
    }
}

fn job_colour(job: &Job) -> Option<Color> {
    match (&job.outcome, job.state) {
        (Some(Outcome::Succeeded), _) => Some(Color::Green),
        (Some(_), _) => Some(Color::Red),
        (None, State::Running) => Some(Color::Green),
        (None, _) => {
            let ended = job.ranks.iter().any(|rank| rank.state == RankState::Ended);
            ended.then_some(Color::Yellow)
        }
    }
}

/// Without blanks at the ends of lines.
fn trimmed(table: &Table) -> String {
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{
        NodeVerdict, Usage,
        samples::{self, NOW_MS, peer},
    };

    const PLAIN: Human = Human { colour: false };

    #[test]
    fn status_is_one_line_for_a_job_in_the_promised_columns() {
        let mut running = samples::job(State::Running, None);
        running.usage = Usage { compute_percent: Some(97), memory_percent: None };
        let done = samples::job(State::Done, Some(Outcome::Failed { code: 3 }));
        let text = PLAIN.jobs(&Jobs { now_ms: NOW_MS, jobs: vec![running, done] });
        let rows: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["JOB", "S", "SINCE", "UC%", "UM%", "USER", "TITLE", "RESOURCE"]);
        assert_eq!(rows[1][1..5], ["RUN", "1m", "97", "-"]);
        assert_eq!(rows[1][6..], ["First", "light", "[v100]"]);
        assert_eq!(rows[2][1..5], ["failed(3)", "1m", "-", "-"]);
        assert!(text.lines().all(|line| line == line.trim_end()));
    }

    #[test]
    fn colour_is_there_only_when_wanted() {
        let jobs = Jobs { now_ms: NOW_MS, jobs: vec![samples::job(State::Running, None)] };
        assert!(!PLAIN.jobs(&jobs).contains('\x1b'));
        assert!(Human { colour: true }.jobs(&jobs).contains('\x1b'));
    }

    #[test]
    fn status_says_in_a_line_that_a_small_pool_survives_no_loss() {
        let jobs = Jobs { now_ms: NOW_MS, jobs: vec![samples::job(State::Running, None)] };
        let last = |eligible: usize| {
            let text = PLAIN.status(&Overview { jobs: jobs.clone(), eligible, full: Vec::new() });
            text.lines().last().unwrap().to_owned()
        };
        let said = "This pool survives no loss of a node: it takes three that keep its jobs, and";
        assert_eq!(last(1), format!("{said} one can be reached."));
        assert_eq!(last(2), format!("{said} 2 can be reached."));
        assert!(last(3).contains("First light"), "{}", last(3));
        assert_eq!(
            (survives(2).as_str(), survives(7).as_str()),
            ("no loss of a node", "the loss of 2 nodes")
        );
    }

    #[test]
    fn what_is_full_is_named_and_what_takes_room_is_told_apart() {
        let jobs = Jobs { now_ms: NOW_MS, jobs: Vec::new() };
        let full = vec!["n2".to_owned(), "n3".to_owned()];
        let text = PLAIN.status(&Overview { jobs, eligible: 3, full });
        assert!(text.contains("\nNo room for more content on n2, n3: `p2pit show node:NAME`"));
        let space = Space {
            blobs: 3 << 30,
            trash: 1 << 30,
            quota: Some(5 << 30),
            disk_free: 1 << 30,
            disk_total: 1 << 34,
            full: true,
            is_counted: true,
            ..Space::default()
        };
        let said = "4.00 GiB of 5.00 GiB used (content 3.00 GiB, trash 1.00 GiB); 1.00 GiB of \
                    16.00 GiB free; no room for more content";
        assert_eq!(disk_text(&space), said);
        let not_yet = Space { is_counted: false, ..space };
        assert_eq!(disk_text(&not_yet), "1.00 GiB of 16.00 GiB free");
        let mut node = samples::node(1, "online");
        node.full = true;
        assert!(PLAIN.nodes(&[node]).contains("online (disk full)"));
    }

    #[test]
    fn a_job_tells_its_history_and_its_processes() {
        let text = PLAIN.job(&samples::job(State::Running, None), NOW_MS);
        for part in [
            "Title:     First light\n",
            "State:     RUNNING since 1m\n",
            "  2025-06-15T15:05:10.000Z  NEW        submitted\n",
            "0 (group 0, process 0) on ",
            ": running; SIM-x-0\n",
            "Retries:   1 of 3 used\n",
            "Partition: restart: a process that is cut off is ended, to run elsewhere; \
             lost after 1d of silence\n",
            " (term 4, epoch 1)\n",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        assert!(!text.contains("Recovered"), "{text}");
        let recovered =
            Job { recovered: true, policy: Policy::Continue, ..samples::job(State::Running, None) };
        let text = PLAIN.job(&recovered, NOW_MS);
        assert!(text.contains("Recovered: its record was restored"), "{text}");
        assert!(text.contains("Partition: continue: "), "{text}");
    }

    #[test]
    fn why_lists_the_nodes_with_their_reasons() {
        let job = samples::job(State::Waiting, None);
        let text = PLAIN.wait(&Wait {
            id: job.id,
            short: job.short,
            state: State::Waiting,
            summary: "no node has room".to_owned(),
            need: 2,
            held: 1,
            nodes: vec![NodeVerdict {
                node: "lab1".to_owned(),
                node_id: peer(1),
                verdict: "declined",
                reason: "busy with abcd".to_owned(),
            }],
        });
        let said = "WAITING: no node has room\nIt needs room for 2 processes and has it for 1.\n";
        assert!(text.starts_with(said), "{text}");
        assert!(text.ends_with("lab1  declined  busy with abcd\n"), "{text}");
    }

    #[test]
    fn files_are_listed_with_kind_and_size() {
        let files = [
            File { path: "keep".to_owned(), kind: FileKind::Dir { files: 2, bytes: 1200 } },
            File {
                path: "keep/x".to_owned(),
                kind: FileKind::File { bytes: 7, executable: false },
            },
            File { path: "l".to_owned(), kind: FileKind::Link { target: "x".to_owned() } },
        ];
        assert_eq!(PLAIN.files(&files), "D 1200 keep/\nF    7 keep/x\nL    - l -> x\n");
    }

    #[test]
    fn a_submission_says_what_travelled_and_what_did_not_need_to() {
        let submission = Submission {
            id: samples::job(State::New, None).id,
            title: "t".to_owned(),
            request: "[]".to_owned(),
            private: false,
            continues: None,
            command: Command::Direct("true".to_owned()),
            source: Source {
                remote: Some("https://host/x".to_owned()),
                commit: Some("abc".to_owned()),
                diff_lines: 1,
                untracked: 0,
            },
            keepers: vec![peer(1), peer(2), peer(3)],
            keepers_online: 3,
            sent_blobs: 3,
            sent_bytes: 2048,
            there_blobs: 12,
        };
        let text = submission_text(&submission);
        for part in [
            "Command: true\n",
            "Remote:  https://host/x\n",
            "Diff:    1 line, 0 untracked files\n",
            "Kept by: 3 nodes: it survives the loss of 1\n",
            "Sent:    3 blobs, 2.00 KiB (12 there already)\n",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        let text = submission_text(&Submission { keepers_online: 2, ..submission });
        let said = "Kept by: 3 nodes, one of them offline: it does not survive the loss of one\n";
        assert!(text.contains(said), "{text}");
    }
}
