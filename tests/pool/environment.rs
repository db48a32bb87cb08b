//! The environment of a process.

use std::collections::BTreeMap;

use p2pit_tests::{Pool, lines_of};
use serde_json::Value;

#[test]
fn every_process_of_a_gang_with_two_groups_is_told_who_it_is_and_where_all_are() {
    let pool = Pool::of(&["sim:1xv100", "sim:2xgtx1070"]);
    let node = pool.node(1);
    let args = [
        "run",
        "Env",
        "2:[],[2:gtx1070]",
        "-l",
        "--env",
        "MINE=a b",
        "--env",
        "CUDA_VISIBLE_DEVICES=all",
        "-d",
        "env | sort; echo dirs; cd $SRC_DIR && ls -d ../keep ../tmp $SHARED_DIR $DATA_ROOT/shared",
    ];
    let log = node.p2pit(&args).ok();
    let job = node.job("@last");
    let ranks = job["ranks"].as_array().unwrap();
    let envs: Vec<BTreeMap<&str, &str>> =
        (0..3).map(|worker| environment(&lines_of(&log, worker))).collect();

    // Group, process, local rank, and rank of the node, of each rank.
    let node_of = |rank: usize| ranks[rank]["node"].as_str().unwrap();
    for (rank, (group, process)) in [(0, 0), (0, 1), (1, 0)].into_iter().enumerate() {
        let env = &envs[rank];
        let number = |n: usize| n.to_string();
        let before = |other: &&usize| node_of(**other) == node_of(rank);
        let mates: Vec<usize> = (0..3).filter(|other| before(&other)).collect();
        let mut nodes: Vec<&str> = Vec::new();
        for other in 0..3 {
            if !nodes.contains(&node_of(other)) {
                nodes.push(node_of(other));
            }
        }
        let node_rank = nodes.iter().position(|it| *it == node_of(rank)).unwrap();
        let gpus: Vec<&str> =
            ranks[rank]["gpus"].as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect();
        assert_eq!(gpus.len(), 2 * group);
        let expected = [
            ("NUM_GROUPS", "2".to_owned()),
            ("NUM_PROCESSES_GROUP0", "2".to_owned()),
            ("NUM_PROCESSES_GROUP1", "1".to_owned()),
            ("HOST_GROUP0_PROCESS0", "127.0.0.1".to_owned()),
            ("HOST_GROUP0_PROCESS1", "127.0.0.1".to_owned()),
            ("HOST_GROUP1_PROCESS0", "127.0.0.1".to_owned()),
            ("GROUP_INDEX", number(group)),
            ("PROCESS_INDEX", number(process)),
            ("WORKER_INDEX", number(rank)),
            ("RANK", number(rank)),
            ("WORLD_SIZE", "3".to_owned()),
            ("LOCAL_RANK", number(mates.iter().position(|it| *it == rank).unwrap())),
            ("NODE_RANK", number(node_rank)),
            ("MASTER_ADDR", "127.0.0.1".to_owned()),
            ("JOB_ID", job["id"].as_str().unwrap().to_owned()),
            ("CUDA_VISIBLE_DEVICES", gpus.join(",")),
            ("MINE", "a b".to_owned()),
            ("USER", "anna".to_owned()),
            ("PWD", env["SRC_DIR"].to_owned()),
        ];
        for (name, value) in expected {
            assert_eq!(env.get(name).copied(), Some(&*value), "{name} of rank {rank}");
        }
        assert_eq!(env["SRC_DIR"], format!("{}/src", env["JOB_DIR"]));
        assert_eq!(env["SHARED_DIR"], format!("{}/shared", env["DATA_ROOT"]));
        assert!(env["MASTER_PORT"].parse::<u16>().is_ok_and(|port| port > 0));
        assert_eq!(env["MASTER_PORT"], envs[0]["MASTER_PORT"]);
        assert_eq!(env["JOB_NUMBER"], envs[0]["JOB_NUMBER"]);
        assert!(env["JOB_NUMBER"].parse::<u32>().is_ok(), "{}", env["JOB_NUMBER"]);
        for name in ["RESULT_FILE", "USER_DIR", "HOME", "TMPDIR", "PATH"] {
            assert!(env.get(name).is_some_and(|value| value.starts_with('/')), "{name}");
        }
        for name in env.keys() {
            assert!(!name.starts_with("P2PIT_"), "{name} is the daemon's own");
            let is_told = !name.starts_with("HOST_GROUP") && !name.starts_with("NUM_PROCESSES");
            assert!(is_told || expected_names().contains(name), "{name} names nobody");
        }
        let said = lines_of(&log, u32::try_from(rank).unwrap());
        let dirs = said.iter().skip_while(|line| **line != "dirs").skip(1).count();
        assert_eq!(dirs, 4, "{said:?}");
    }
    assert_eq!(job["resources"]["gpus"], Value::from(2));
    assert!(log.contains("CUDA_VISIBLE_DEVICES is set by the pool"), "{log}");
}

fn expected_names() -> [&'static str; 5] {
    [
        "NUM_PROCESSES_GROUP0",
        "NUM_PROCESSES_GROUP1",
        "HOST_GROUP0_PROCESS0",
        "HOST_GROUP0_PROCESS1",
        "HOST_GROUP1_PROCESS0",
    ]
}

/// What `env` printed.
fn environment<'a>(lines: &[&'a str]) -> BTreeMap<&'a str, &'a str> {
    lines.iter().take_while(|line| **line != "dirs").filter_map(|it| it.split_once('=')).collect()
}
