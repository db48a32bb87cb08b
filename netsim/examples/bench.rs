//! Measures how fast the simulator is: `cargo run --release -p p2pit-netsim --example bench --
//! [SEEDS]` runs that many long seeds on one thread and prints simulated node-hours for each
//! minute of CPU time.

use p2pit_netsim::{Ending, Options, run, search::cpu_time};

fn main() -> anyhow::Result<()> {
    let seeds = std::env::args().nth(1).map_or(Ok(4), |text| text.parse::<u64>())?;
    let (mut hours, mut seconds, mut jobs) = (0.0, 0.0, 0);
    for seed in 0..seeds {
        let options = Options { nodes: 50, clients: 2, span_ms: 1_800_000, ..Options::long(seed) };
        let before = cpu_time();
        let report = run(options, false)?;
        let cpu = cpu_time().saturating_sub(before).as_secs_f64();
        let node_hours = report.node_ms() as f64 / 3_600_000.0;
        let fine = report.ending == Ending::Fine;
        let text = format!(
            "seed {seed}: {:.1} node-hours in {cpu:.2} s, {} jobs, {} events, {} messages, fine: {fine}\n",
            node_hours, report.counts.jobs, report.counts.events, report.counts.messages
        );
        std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes())?;
        if !fine {
            let text = format!("{}\n", report.ending);
            std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes())?;
        }
        (hours, seconds) = (hours + node_hours, seconds + cpu);
        jobs += report.counts.jobs;
    }
    let text = format!(
        "{:.0} node-hours per CPU-minute at {:.1} jobs per node-hour\n",
        hours * 60.0 / seconds,
        jobs as f64 / hours
    );
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes())?;
    Ok(())
}
