//! One JSON value. Times are ISO 8601, durations in seconds, ids whole.
//!
//! What is shown is taken apart field by field, so that a new field is not forgotten.

use p2pit_node::api::types::{GpuReading, Me, NodeInfo, PoolInfo, UserInfo};
use p2pit_protocol::{
    inventory::{Capacity, Gpu},
    job::{Change, Command, Outcome, RankEnd, Source},
    message::GpuState,
    steward::survives as pool_survives,
};
use serde_json::{Value, json};

use super::{Format, iso8601};
use crate::view::{
    Copies, File, FileKind, Job, Jobs, Live, Lost, MeAndNode, Node, NodeGpu, NodeVerdict, Overview,
    Plan, Rank, Recovery, Submission, Usage, Wait, survived_losses,
};

#[derive(Debug)]
pub(super) struct Json;

impl Format for Json {
    fn me(&self, MeAndNode { me, user_id, user, eligible }: &MeAndNode) -> String {
        let Me {
            version,
            pid,
            home,
            node,
            store,
            device: _,
            name,
            owner,
            client,
            pool,
            control,
            data,
            connected,
            capacity,
            owner_only,
            isolation,
            working_for: _,
            locked_gpus,
            wall_ms,
            journal,
            warnings,
        } = me;
        let pool = pool.as_ref().map(|PoolInfo { id, name, nodes, users }| {
            let survives = eligible.map(pool_survives);
            json!({
                "id": id,
                "name": name,
                "nodes": nodes,
                "users": users,
                "survives_losses": survives,
            })
        });
        let Capacity { gpus, cpu_cores, ram_mib } = capacity;
        pretty(&json!({
            "user": user.as_ref().map(|user| &user.name),
            "user_id": user_id,
            "full_name": user.as_ref().and_then(|user| user.full_name.as_ref()),
            "email": user.as_ref().and_then(|user| user.email.as_ref()),
            "admin": user.as_ref().is_some_and(|user| user.admin),
            "node": name,
            "node_id": node,
            "owner_id": owner,
            "client": client,
            "pool": pool,
            "home": home,
            "store": store,
            "pid": pid,
            "version": version,
            "control": control,
            "data": data,
            "connected": connected,
            "gpus": gpus.iter().map(gpu).collect::<Vec<_>>(),
            "cpu_cores": cpu_cores,
            "ram_mib": ram_mib,
            "owner_only": owner_only,
            "isolation": isolation,
            "locked_gpus": locked_gpus,
            "time": iso8601(*wall_ms),
            "journal": journal,
            "warnings": warnings,
        }))
    }

    fn nodes(&self, nodes: &[NodeInfo]) -> String {
        pretty(&nodes.iter().map(node).collect())
    }

    fn node(&self, Node { info, isolation, gpus, live, error }: &Node) -> String {
        let mut value = node(info);
        value["isolation"] = json!(isolation);
        value["gpus"] = gpus
            .iter()
            .map(|NodeGpu { gpu: it, state, job, reading }| {
                let mut value = gpu(it);
                value["state"] = json!(gpu_state(*state));
                value["job"] = json!(job);
                value["reading"] = reading.as_ref().map_or(Value::Null, self::reading);
                value
            })
            .collect();
        value["live"] = live.as_ref().map_or(Value::Null, |live| {
            let Live { cpu_cores, ram_mib, holds, standing } = live;
            json!({
                "cpu_cores": cpu_cores.0,
                "cpu_cores_free": cpu_cores.1,
                "ram_mib": ram_mib.0,
                "ram_mib_free": ram_mib.1,
                "held_for": holds,
                "standing_calls": standing,
            })
        });
        value["error"] = json!(error);
        pretty(&value)
    }

    fn users(&self, users: &[UserInfo]) -> String {
        let user = |UserInfo { user, name, full_name, email, admin }: &UserInfo| {
            json!({
                "id": user,
                "name": name,
                "full_name": full_name,
                "email": email,
                "admin": admin,
            })
        };
        pretty(&users.iter().map(user).collect())
    }

    fn jobs(&self, Jobs { now_ms, jobs }: &Jobs) -> String {
        let listed = |it| {
            let mut value = job(it, *now_ms);
            // A list of jobs comes without them; `show job:ID` tells.
            value.as_object_mut().map(|fields| fields.remove("command"));
            value
        };
        pretty(&jobs.iter().map(listed).collect())
    }

    fn job(&self, it: &Job, now_ms: u64) -> String {
        pretty(&job(it, now_ms))
    }

    /// An array, so each job says how many losses it survives, and `show me` it of the pool.
    fn status(&self, Overview { jobs, eligible: _ }: &Overview) -> String {
        self.jobs(jobs)
    }

    fn wait(&self, Wait { id, short, state, summary, need, held, nodes }: &Wait) -> String {
        let verdict = |NodeVerdict { node, node_id, verdict, reason }: &NodeVerdict| json!({ "node": node, "node_id": node_id, "verdict": verdict, "reason": reason });
        pretty(&json!({
            "id": id,
            "short": short,
            "state": state.to_string(),
            "summary": summary,
            "need": need,
            "held": held,
            "nodes": nodes.iter().map(verdict).collect::<Vec<_>>(),
        }))
    }

    fn files(&self, files: &[File]) -> String {
        let file = |File { path, kind }: &File| match kind {
            FileKind::Dir { files, bytes } => {
                json!({ "path": path, "type": "dir", "files": files, "bytes": bytes })
            }
            FileKind::File { bytes, executable } => {
                json!({ "path": path, "type": "file", "bytes": bytes, "executable": executable })
            }
            FileKind::Link { target } => json!({ "path": path, "type": "link", "target": target }),
        };
        pretty(&files.iter().map(file).collect())
    }

    fn plan(&self, plan: &Plan) -> String {
        let Plan {
            title,
            request,
            processes,
            command: it,
            source: from,
            files,
            bytes,
            missing_blobs,
            missing_bytes,
            keepers,
            candidates,
        } = plan;
        let candidate = |(node, processes, offline_s): &(String, u32, Option<u64>)| json!({ "node": node, "processes": processes, "offline_s": offline_s });
        pretty(&json!({
            "title": title,
            "request": request,
            "processes": processes,
            "command": command(it),
            "source": source(from),
            "files": files,
            "bytes": bytes,
            "missing_blobs": missing_blobs,
            "missing_bytes": missing_bytes,
            "keepers": keepers,
            "candidates": candidates.iter().map(candidate).collect::<Vec<_>>(),
        }))
    }

    fn submission(&self, submission: &Submission) -> String {
        let Submission {
            id,
            title,
            request,
            private,
            continues,
            command: it,
            source: from,
            keepers,
            keepers_online,
            sent_blobs,
            sent_bytes,
            there_blobs,
        } = submission;
        pretty(&json!({
            "id": id,
            "title": title,
            "request": request,
            "private": private,
            "continues": continues,
            "command": command(it),
            "source": source(from),
            "keeper_ids": keepers,
            "survives_losses": survived_losses(keepers.len(), *keepers_online),
            "sent_blobs": sent_blobs,
            "sent_bytes": sent_bytes,
            "there_blobs": there_blobs,
        }))
    }

    fn recovery(&self, recovery: &Recovery) -> String {
        let Recovery { id, short: _, keepers, lost: gone, from, epoch, seq, next } = recovery;
        let lost = |Lost { node, heard_s }: &Lost| json!({ "node": node, "heard_s": heard_s });
        pretty(&json!({
            "id": id,
            "keepers_before": keepers,
            "lost": gone.iter().map(lost).collect::<Vec<_>>(),
            "from": from,
            "epoch_before": epoch,
            "seq": seq,
            "keepers": next,
        }))
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn job(job: &Job, now_ms: u64) -> Value {
    let Job {
        id,
        short,
        title,
        user,
        user_id,
        private,
        request,
        command: it,
        source: from,
        code,
        continues,
        submitted_at_ms,
        state,
        history,
        outcome,
        stopped_by,
        keepers,
        keepers_online,
        epoch,
        steward,
        term,
        recovered,
        retries,
        retried,
        policy,
        lost_after_ms,
        keep_every_ms,
        attempt,
        ranks,
        usage: Usage { compute_percent, memory_percent },
    } = job;
    let change = |Change { state, at_ms, reason }: &Change| json!({ "state": state.to_string(), "at": iso8601(*at_ms), "reason": reason });
    json!({
        "id": id,
        "short": short,
        "title": title,
        "user": user,
        "user_id": user_id,
        "private": private,
        "request": request,
        "resources": resources(ranks),
        "command": it.as_ref().map_or(Value::Null, command),
        "source": source(from),
        "code": code,
        "continues": continues,
        "submitted_at": iso8601(*submitted_at_ms),
        "state": state.to_string(),
        "since": iso8601(job.since_ms()),
        "since_s": now_ms.saturating_sub(job.since_ms()) / 1000,
        "history": history.iter().map(change).collect::<Vec<_>>(),
        "outcome": outcome.as_ref().map(ToString::to_string),
        "exit_code": outcome.as_ref().map(|it| crate::status::Status::of_outcome(it).0),
        "lost_reason": match outcome {
            Some(Outcome::Lost { reason }) => json!(reason),
            _ => Value::Null,
        },
        "stopped_by": stopped_by,
        "keepers": keepers,
        "epoch": epoch,
        "survives_losses": survived_losses(keepers.len(), *keepers_online),
        "steward": steward,
        "term": term,
        "recovered": recovered,
        "retries": retries,
        "retried": retried,
        "policy": policy.to_string(),
        "lost_after_s": lost_after_ms / 1000,
        "keep_every_s": (*keep_every_ms > 0).then_some(keep_every_ms / 1000),
        "attempt": attempt,
        "ranks": ranks.iter().map(rank).collect::<Vec<_>>(),
        "compute_percent": compute_percent,
        "memory_percent": memory_percent,
    })
}

/// What the job was given, all ranks together.
fn resources(ranks: &[Rank]) -> Value {
    json!({
        "processes": ranks.len(),
        "gpus": ranks.iter().map(|rank| rank.gpus.len()).sum::<usize>(),
        "cpu_cores": ranks.iter().map(|rank| u64::from(rank.cpu_cores)).sum::<u64>(),
        "ram_mib": ranks.iter().map(|rank| rank.ram_mib).sum::<u64>(),
    })
}

fn rank(rank: &Rank) -> Value {
    let Rank { rank, group, process, node, node_id, gpus, cpu_cores, ram_mib, state, end, copies } =
        rank;
    let end = end.as_ref();
    let RankEnd { ending, result, keep, artifacts, note, log_bytes, at_ms } = match end {
        Some(end) => end,
        None => &RankEnd::bare(p2pit_protocol::job::Ending::NeverStarted, 0),
    };
    let ended = |value: Value| if end.is_some() { value } else { Value::Null };
    json!({
        "rank": rank,
        "group": group,
        "process": process,
        "node": node,
        "node_id": node_id,
        "gpus": gpus,
        "cpu_cores": cpu_cores,
        "ram_mib": ram_mib,
        "state": state.to_string(),
        "ending": ended(json!(ending.to_string())),
        "exit_code": ended(json!(ending.code())),
        "ended_at": ended(json!(iso8601(*at_ms))),
        "result": result,
        "keep": keep,
        "artifacts": artifacts,
        "note": note,
        "log_bytes": ended(json!(log_bytes)),
        "holders": copies.as_ref().map(|copies| &copies.holders),
        "copies": copies.as_ref().map(copies_of),
    })
}

fn copies_of(copies: &Copies) -> Value {
    let Copies { holders: _, copying, saves, cannot } = copies;
    let save = |(node, seq): &(String, u64)| json!({ "node": node, "seq": seq });
    let refusal = |(node, reason): &(String, String)| json!({ "node": node, "reason": reason });
    json!({
        "copying": copying,
        "saves": saves.iter().map(save).collect::<Vec<_>>(),
        "cannot": cannot.iter().map(refusal).collect::<Vec<_>>(),
    })
}

fn command(command: &Command) -> Value {
    match command {
        Command::Script => json!({ "script": ".compute" }),
        Command::Direct(text) => json!({ "direct": text }),
    }
}

fn source(source: &Source) -> Value {
    let Source { remote, commit, diff_lines, untracked } = source;
    json!({
        "remote": remote,
        "commit": commit,
        "diff_lines": diff_lines,
        "untracked": untracked,
    })
}

fn node(info: &NodeInfo) -> Value {
    let NodeInfo {
        node,
        name,
        owner,
        owner_name,
        client,
        away,
        reach,
        advert_age_s,
        capacity: Capacity { gpus, cpu_cores, ram_mib },
        not_free,
        free_cpu_cores,
        free_ram_mib,
        owner_only,
        control,
        data,
    } = info;
    let state = |it: &Gpu| {
        let state = not_free.iter().find(|(uuid, _)| *uuid == it.uuid);
        gpu_state(state.map_or(GpuState::Free, |(_, state)| *state))
    };
    let gpus = gpus.iter().map(|it| {
        let mut value = gpu(it);
        value["state"] = json!(state(it));
        value
    });
    json!({
        "id": node,
        "name": name,
        "owner": owner_name,
        "owner_id": owner,
        "client": client,
        "away": away,
        "reach": reach,
        "advert_age_s": advert_age_s,
        "gpus": gpus.collect::<Vec<_>>(),
        "cpu_cores": cpu_cores,
        "cpu_cores_free": free_cpu_cores,
        "ram_mib": ram_mib,
        "ram_mib_free": free_ram_mib,
        "owner_only": owner_only,
        "control": control,
        "data": data,
    })
}

fn gpu(Gpu { uuid, model, full_name, memory_bytes, simulated }: &Gpu) -> Value {
    json!({
        "uuid": uuid,
        "model": model,
        "full_name": full_name,
        "memory_bytes": memory_bytes,
        "simulated": simulated,
    })
}

fn gpu_state(state: GpuState) -> &'static str {
    match state {
        GpuState::Free => "free",
        GpuState::Used => "used",
        GpuState::Foreign => "foreign",
    }
}

fn reading(reading: &GpuReading) -> Value {
    let GpuReading {
        uuid: _,
        simulated: _,
        utilisation_percent,
        memory_used_bytes,
        memory_total_bytes,
        temperature_celsius,
        power_milliwatts,
        compute_processes,
    } = reading;
    let process =
        |(pid, bytes): &(u32, Option<u64>)| json!({ "pid": pid, "memory_used_bytes": bytes });
    json!({
        "utilisation_percent": utilisation_percent,
        "memory_used_bytes": memory_used_bytes,
        "memory_total_bytes": memory_total_bytes,
        "temperature_celsius": temperature_celsius,
        "power_milliwatts": power_milliwatts,
        "processes": compute_processes.iter().map(process).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use p2pit_protocol::job::{Ending, State};

    use super::*;
    use crate::view::samples::{self, NOW_MS};

    #[test]
    fn jobs_are_an_array_of_objects_that_keep_the_promised_keys() {
        let jobs = Jobs {
            now_ms: NOW_MS,
            jobs: vec![
                samples::job(State::Running, None),
                samples::job(State::Done, Some(Outcome::Failed { code: 3 })),
            ],
        };
        let overview = Overview { jobs: jobs.clone(), eligible: 1 };
        for text in [Json.jobs(&jobs), Json.status(&overview)] {
            let value: Value = serde_json::from_str(&text).unwrap();
            let [running, failed] = &value.as_array().unwrap()[..] else { panic!("{text}") };
            for key in ["id", "title", "user", "state", "outcome", "request", "resources"] {
                assert!(running.get(key).is_some(), "{key} in {text}");
            }
            assert_eq!(running["id"].as_str().unwrap().len(), 52);
            assert_eq!((&running["state"], &running["outcome"]), (&json!("RUNNING"), &Value::Null));
            assert_eq!(running["since_s"], 60);
            assert_eq!(running["submitted_at"], "2025-06-15T15:05:10.000Z");
            assert_eq!(running["resources"]["gpus"], 1);
            let rank = &running["ranks"][0];
            assert_eq!(rank["gpus"], json!(["SIM-x-0"]));
            assert_eq!((&rank["state"], &rank["exit_code"]), (&json!("running"), &Value::Null));
            assert!(rank["node"].is_string());
            assert_eq!(
                (&failed["outcome"], &failed["exit_code"]),
                (&json!("failed(3)"), &json!(3))
            );
        }
    }

    #[test]
    fn a_job_says_who_keeps_and_drives_it_and_what_it_survives() {
        let job = samples::job(State::Running, None);
        let text = Json.job(&job, NOW_MS);
        let value: Value = serde_json::from_str(&text).unwrap();
        let part = |keys: &[&str]| {
            let fields = keys.iter().map(|key| ((*key).to_owned(), value[*key].clone()));
            Value::Object(fields.collect())
        };
        let numbers = part(&["epoch", "term", "attempt", "survives_losses", "lost_after_s"]);
        let expected = json!({
            "epoch": 1, "term": 4, "attempt": 1, "survives_losses": 1, "lost_after_s": 86_400
        });
        assert_eq!(numbers, expected);
        let after_failure = part(&["retries", "retried", "policy", "recovered"]);
        let expected =
            json!({ "retries": 3, "retried": 1, "policy": "restart", "recovered": false });
        assert_eq!(after_failure, expected);
        assert_eq!(value["keepers"].as_array().unwrap().len(), 3);
        assert_eq!(value["steward"], value["keepers"][1]);
    }

    #[test]
    fn a_rank_that_ended_says_how() {
        let mut job = samples::job(State::Done, None);
        job.ranks[0].end = Some(RankEnd::bare(Ending::Signaled { signal: 9 }, NOW_MS));
        let value = super::job(&job, NOW_MS);
        assert_eq!(value["ranks"][0]["ending"], "killed by signal 9");
        assert_eq!(value["ranks"][0]["exit_code"], 137);
    }
}
