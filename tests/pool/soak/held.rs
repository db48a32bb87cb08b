//! Who holds what a job left, as `show job:ID --json` says.

use serde_json::Value;

/// So many nodes have what each process left, or the reason of DONE says why not.
const HOLDERS: usize = 2;

/// What DONE says where fewer may have it than should although all nodes are there again: others
/// refused to hold it, or the node that had it was given up.
const EXCUSES: [&str; 2] = [" cannot hold it: ", "not copied before"];

/// The processes of a job that left something which fewer than two nodes have, with these.
pub(super) fn held_by_few(job: &Value) -> Vec<(u64, Vec<String>)> {
    let ranks = job["ranks"].as_array().into_iter().flatten();
    let few = ranks.filter(|rank| has_left(rank)).filter_map(|rank| {
        let mut holders: Vec<String> = strings(&rank["holders"]).collect();
        holders.sort_unstable();
        holders.dedup();
        (holders.len() < HOLDERS).then(|| (rank["rank"].as_u64().unwrap_or(u64::MAX), holders))
    });
    few.collect()
}

/// Whether the job says itself that fewer nodes have what it left than should.
pub(super) fn excuse(job: &Value) -> Option<&str> {
    let reason =
        job["history"].as_array()?.last().filter(|it| it["state"] == "DONE")?["reason"].as_str()?;
    EXCUSES.iter().any(|excuse| reason.contains(excuse)).then_some(reason)
}

/// Whether a process of the job that ran on this node left something.
pub(super) fn has_left_at(job: &Value, node: &str) -> bool {
    let mut ranks = job["ranks"].as_array().into_iter().flatten();
    ranks.any(|rank| rank["node"] == node && has_left(rank))
}

fn has_left(rank: &Value) -> bool {
    rank["log_bytes"].as_u64().is_some_and(|bytes| bytes > 0)
        || !rank["keep"].is_null()
        || !rank["artifacts"].is_null()
}

fn strings(of: &Value) -> impl Iterator<Item = String> {
    of.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job(reason: Option<&str>, holders: &[&[&str]]) -> Value {
        let ranks = holders.iter().enumerate().map(|(rank, holders)| {
            json!({ "rank": rank, "node": format!("n{rank}"), "log_bytes": 9, "keep": null,
                    "artifacts": null, "holders": holders })
        });
        json!({ "history": [{ "state": "RUNNING", "reason": "the other keepers are away" },
                            { "state": "DONE", "reason": reason }],
                "ranks": ranks.collect::<Vec<_>>() })
    }

    #[test]
    fn two_nodes_are_to_have_what_each_process_left() {
        assert_eq!(held_by_few(&job(None, &[&["n0", "n1"], &["n1", "n3", "n2"]])), []);
        let few = held_by_few(&job(None, &[&["n0", "n1"], &["n1"]]));
        assert_eq!(few, [(1, vec!["n1".to_owned()])]);
        // The same one twice is one.
        assert_eq!(held_by_few(&job(None, &[&["n0", "n0"]])), [(0, vec!["n0".to_owned()])]);
    }

    #[test]
    fn holders_that_are_not_told_are_none_and_who_left_nothing_needs_none() {
        let mut it = job(None, &[&["n0", "n1"]]);
        it["ranks"][0]["holders"] = Value::Null;
        assert_eq!(held_by_few(&it), [(0, vec![])]);
        assert!(has_left_at(&it, "n0") && !has_left_at(&it, "n1"));
        it["ranks"][0]["log_bytes"] = json!(0);
        assert_eq!(held_by_few(&it), []);
        assert!(!has_left_at(&it, "n0"));
        it["ranks"][0]["artifacts"] = json!("a tree");
        assert_eq!(held_by_few(&it), [(0, vec![])]);
    }

    #[test]
    fn only_the_reason_of_done_is_an_excuse() {
        let full =
            "what one process left is on 1 node, not on 2: n2 cannot hold it: the disk is full";
        assert_eq!(excuse(&job(Some(full), &[&["n0"]])), Some(full));
        // They are there again when it is looked at, and should have made up for it.
        let away = "what one process left is on 1 node, not on 2: the other keepers are away";
        assert_eq!(excuse(&job(Some(away), &[&["n0"]])), None);
        let gone = "what one process left was not copied before its node was gone";
        assert_eq!(excuse(&job(Some(gone), &[&[]])), Some(gone));
        assert_eq!(excuse(&job(Some("its process ended"), &[&["n0"]])), None);
        assert_eq!(excuse(&job(None, &[&["n0"]])), None);
    }
}
