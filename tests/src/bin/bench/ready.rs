//! From the start of a daemon to when it is of use.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use p2pit_node::{
    api::types::{Me, path},
    home::Home,
};
use p2pit_tests::Pool;

use crate::{Options, api::get, figures::Times};

const POLL: Duration = Duration::from_millis(2);
const CONNECTED_WITHIN: Duration = Duration::from_secs(60);
const TARGET_MS: f64 = 500.0;

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "it is what this program is for")]
pub(crate) fn run(options: &Options) -> Result<()> {
    let pool = Pool::of(&["sim:1xv100", "sim:1xv100", "sim:1xv100"]);
    let node = pool.node(3);
    let home = Home::existing(node.home())?.context("the node has no home")?;
    let runs = options.runs.div_ceil(5);
    eprintln!("{runs} starts …");
    let (mut answers, mut connected) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        node.shut_down();
        let start = Instant::now();
        let running = node.start(&["join", "--detach"]);
        let took_ms = || start.elapsed().as_secs_f64() * 1e3;
        let mut answered = None;
        loop {
            // Refused while nobody listens.
            if let Ok(me) = get::<Me>(&home, path::ME) {
                answered.get_or_insert_with(took_ms);
                if me.connected > 0 {
                    break;
                }
            }
            ensure!(start.elapsed() < CONNECTED_WITHIN, "no member is met in time");
            thread::sleep(POLL);
        }
        connected.push(took_ms());
        answers.extend(answered);
        running.end().ended(0);
    }
    println!("| a daemon starts again in its pool | target | p50 | p90 | max |");
    println!("|---|---|---|---|---|");
    for (what, times) in [("its API answers", answers), ("and a member is connected", connected)] {
        let times = Times::of(times)?;
        let figures = [50, 90, 100].map(|p| format!("{:.0} ms", times.percentile(p)));
        println!("| {what} | ≤ {TARGET_MS} ms | {} |", figures.join(" | "));
    }
    Ok(())
}
