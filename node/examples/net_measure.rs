use std::time::{Duration, Instant};
use p2pit_node::network::*;
use p2pit_protocol::{PeerId, PoolId, identity::KeyPair};
async fn start(seed: u8) -> (PeerId, Network, tokio::sync::mpsc::Receiver<Event>) {
    let key = KeyPair::from_seed(&[seed; 32]);
    let id = PeerId(key.public());
    let (n, e) = Network::start(NetworkConfig { key, pool: PoolId([1; 32]), listen: "127.0.0.1:0".parse().unwrap() }).await.unwrap();
    n.set_members((1..4).map(|s| PeerId(KeyPair::from_seed(&[s; 32]).public())).collect());
    (id, n, e)
}
fn stat() -> (f64, u64) {
    let s = std::fs::read_to_string("/proc/self/stat").unwrap();
    let f: Vec<&str> = s.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let t: f64 = (f[11].parse::<u64>().unwrap() + f[12].parse::<u64>().unwrap()) as f64 / 100.0;
    let st = std::fs::read_to_string("/proc/self/status").unwrap();
    let rss = st.lines().find(|l| l.starts_with("VmRSS")).unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    (t, rss)
}
fn main() {
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).with_writer(std::io::stderr).init();
    let args: Vec<String> = std::env::args().collect();
    let mt = args.get(2).is_some_and(|a| a == "mt");
    let rt = if mt { tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap() } else { tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap() };
    rt.block_on(async {
        match args[1].as_str() {
            "rtt" => {
                let (ia, a, mut ea) = start(1).await;
                let (ib, b, mut eb) = start(2).await;
                let b2 = b.clone();
                tokio::spawn(async move { while let Some(e) = eb.recv().await { if let Event::Message { bytes, .. } = e { b2.send(ia, bytes.to_vec()); } } });
                a.dial(ib, b.listen_addrs());
                while !matches!(ea.recv().await.unwrap(), Event::Connected(..)) {}
                let mut t = vec![];
                for i in 0..3000 {
                    let s = Instant::now();
                    a.send(ib, vec![1; 200]);
                    while !matches!(ea.recv().await.unwrap(), Event::Message { .. }) {}
                    if i > 200 { t.push(s.elapsed()); }
                }
                t.sort();
                println!("rtt message+reply p50 {:?} p90 {:?} p99 {:?}", t[t.len() / 2], t[t.len() * 9 / 10], t[t.len() * 99 / 100]);
                let s = Instant::now();
                for _ in 0..1000 { a.send(ib, vec![1; 200]); }
                let mut n = 0;
                while n < 1000 { if let Event::Message { .. } = ea.recv().await.unwrap() { n += 1 } }
                println!("1000 in flight, both ways: {:?}", s.elapsed());
            }
            // idle: one process per node; `idle SEED [port...]`
            "idle" => {
                let seed: u8 = args[3].parse().unwrap();
                println!("{:?} before", stat());
                let (_, a, mut ea) = start(seed).await;
                std::fs::write(format!("/tmp/netm.{seed}"), a.listen_addrs()[0].to_string()).unwrap();
                for other in 1..seed {
                    let at = std::fs::read_to_string(format!("/tmp/netm.{other}")).unwrap();
                    a.dial(PeerId(KeyPair::from_seed(&[other; 32]).public()), vec![at.parse().unwrap()]);
                }
                tokio::spawn(async move { while let Some(e) = ea.recv().await { eprintln!("{e:?}"); } });
                tokio::time::sleep(Duration::from_secs(10)).await;
                let (c0, r) = stat();
                tokio::time::sleep(Duration::from_secs(60)).await;
                let (c1, r1) = stat();
                println!("node {seed}: cpu {:.3} % of a core, rss {r} -> {r1} KiB", (c1 - c0) / 60.0 * 100.0);
            }
            _ => {}
        }
    });
}
