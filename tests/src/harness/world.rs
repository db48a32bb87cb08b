//! A pool whose nodes have machines of their own.

use std::{collections::BTreeMap, ops::Deref, path::PathBuf, sync::Arc};

use rustix::process::Signal;

use super::{
    collect::collect,
    machine::{Place, Rights},
    net::{self, Router},
    relay::{Delay, Relay},
};
use crate::{Node, Pool, require};

/// Milliseconds by which a daemon's wall clock is off, for
/// [`Node::restart_with`]. Only debug builds of the daemon look at it.
pub const WALL_CLOCK_OFF_MS: &str = "P2PIT_TEST_CLOCK_OFFSET_MS";

/// The directory of the pool that all machines share.
const SHARED: &str = "shared";

/// Nodes with machines of their own, and the network between them. Everything of it goes when
/// it is dropped.
#[derive(Debug)]
pub struct World {
    // In the order in which they have to go: what runs, what it ran on, what was between.
    pool: Pool,
    relay: Option<Relay>,
    machines: BTreeMap<String, Machine>,
    router: Router,
    rights: Rights,
}

#[derive(Debug)]
struct Machine {
    place: Arc<Place>,
    boots: u32,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Somebody may still have the node.
        self.place.switch_off();
    }
}

impl Deref for World {
    type Target = Pool;

    fn deref(&self) -> &Pool {
        &self.pool
    }
}

impl World {
    /// A world without machines; `None`, said, where this user can have none here.
    ///
    /// # Panics
    /// Where it cannot although `P2PIT_TEST_REQUIRE` names `namespaces`.
    #[must_use]
    pub fn empty() -> Option<Self> {
        let is_root = rustix::process::geteuid().is_root();
        let rights = if is_root { Rights::Root } else { Rights::OwnUsers };
        match Router::new(rights) {
            Ok(router) => {
                let (pool, machines) = (Pool::empty(), BTreeMap::new());
                let shared = pool.path().join(SHARED);
                std::fs::create_dir(shared).expect("the pool's directory can be written to");
                Some(Self { pool, relay: None, machines, router, rights })
            }
            Err(reason) => {
                let _ = require::skip("namespaces", &reason);
                None
            }
        }
    }

    /// Machines `n1`, `n2` and so on, each with these GPUs, that all know of each other.
    #[track_caller]
    #[must_use]
    pub fn of(gpus: &[&str]) -> Option<Self> {
        let mut world = Self::empty()?;
        for (n, gpus) in (1..).zip(gpus) {
            world.add(&format!("n{n}"), &["--gpus", gpus, "--cpus", "4"]);
        }
        world.wait_until_assembled();
        Some(world)
    }

    /// A further machine with a node of the pool's first user; the first founds the pool.
    #[track_caller]
    pub fn add(&mut self, name: &str, flags: &[&str]) -> Node {
        let node = self.add_machine(name);
        let listen = format!("{}:4001", self.address(name));
        let flags = [&["--listen", &listen], flags].concat();
        self.pool.add_node(node, &flags)
    }

    /// A further machine with a home that nothing was done with. The pool does not know it.
    ///
    /// # Panics
    /// Where the machine cannot be made, or has been made before.
    #[track_caller]
    pub fn add_machine(&mut self, name: &str) -> Node {
        let n = u8::try_from(self.machines.len() + 1).expect("a world has few machines");
        let scratch = self.pool.path().join("output");
        let place = Arc::new(Place::new(name, net::address(n), &scratch));
        let machine = Machine { place: Arc::clone(&place), boots: 0 };
        let before = self.machines.insert(name.to_owned(), machine);
        assert!(before.is_none(), "there is a machine {name}");
        self.boot(name);
        self.pool.home(name).at_place(place)
    }

    /// Switches a machine on that is off. No daemon runs there yet.
    ///
    /// # Panics
    /// Where it is on.
    #[track_caller]
    pub fn boot(&mut self, name: &str) {
        let shared = self.shared();
        let machine = self.machines.get_mut(name).unwrap_or_else(|| panic!("no machine {name}"));
        assert!(!machine.place.is_on(), "the machine {name} is on");
        machine.boots += 1;
        let place = &machine.place;
        let on = place
            .switch_on(self.rights, &self.router.holder, machine.boots, &shared)
            .and_then(|()| {
                let connected = place.with(|it| self.router.connect(it, place.address()));
                connected.unwrap_or(Ok(()))
            });
        on.unwrap_or_else(|e| panic!("the machine {name} does not start: {e}"));
    }

    /// Ends everything that runs on a machine, as a power cut does. Its files stay.
    #[track_caller]
    pub fn power_off(&self, name: &str) {
        let place = self.place(name);
        place.switch_off();
        self.router.disconnect(place.address());
    }

    /// A directory of the test that every machine has as `/mnt`, jobs included. They read there,
    /// lock files there, and write into a FIFO there.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.pool.path().join(SHARED)
    }

    /// Nothing travels between these any more, in either direction.
    #[track_caller]
    pub fn cut(&self, some: &[&str], others: &[&str]) {
        self.cut_one_way(some, others);
        self.cut_one_way(others, some);
    }

    /// Nothing from one of the first reaches one of the second any more.
    #[track_caller]
    pub fn cut_one_way(&self, from: &[&str], to: &[&str]) {
        let to: Vec<_> = to.iter().map(|name| self.address(name)).collect();
        let from: Vec<_> = from.iter().map(|name| self.address(name)).collect();
        let pairs = from.iter().flat_map(|from| to.iter().map(|to| (*from, *to)));
        self.router.cut(pairs);
    }

    /// As [`Self::cut`], between one machine and all others.
    #[track_caller]
    pub fn isolate(&self, name: &str) {
        let others: Vec<String> = self.machines.keys().filter(|it| *it != name).cloned().collect();
        let others: Vec<&str> = others.iter().map(String::as_str).collect();
        self.cut(&[name], &others);
    }

    /// Of 1000 packets to and of 1000 from this machine so many are lost.
    #[track_caller]
    pub fn lose(&self, name: &str, per_mille: u32) {
        self.router.lose(self.address(name), per_mille);
    }

    /// Every cut and every loss ends.
    pub fn heal(&self) {
        self.router.heal();
    }

    /// As [`Self::heal`], for what concerns one machine.
    #[track_caller]
    pub fn heal_one(&self, name: &str) {
        self.router.heal_one(self.address(name));
    }

    /// Packets that were cut off or lost since cuts and losses were last changed: that a fault
    /// was one.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.router.dropped()
    }

    /// Pulls a machine's cable, or puts it in again.
    #[track_caller]
    pub fn unplug(&self, name: &str, is_out: bool) {
        self.router.plug(self.address(name), !is_out);
    }

    /// Each direction of a machine's line carries so much, in the words of `tc`, such as
    /// `10mbit`; `None`: as much as it can.
    #[track_caller]
    pub fn slow(&self, name: &str, rate: Option<&str>) {
        let place = self.place(name);
        place.with(|holder| self.router.slow(holder, place.address(), rate));
    }

    /// What a machine sends is late from now on, by `tc netem` or by a relay. Whether it is:
    /// `false`, said, where neither can be had.
    ///
    /// # Panics
    /// Where neither can although `P2PIT_TEST_REQUIRE` names `root`.
    #[track_caller]
    pub fn delay(&mut self, name: &str, delay: Delay) -> bool {
        let at = self.address(name);
        if self.router.netem(at, &delay.for_netem()).is_ok() {
            return true;
        }
        if self.relay.is_none() {
            match Relay::start(&self.router) {
                Ok(relay) => self.relay = Some(relay),
                Err(reason) => return require::skip("root", &format!("no relay: {reason}")),
            }
        }
        if let Some(relay) = &self.relay {
            relay.set(at, delay);
            self.router.detour(at, true);
        }
        true
    }

    /// Packets that the relay has carried, and how many of them overtook an earlier one.
    #[must_use]
    pub fn relayed(&self) -> Option<(u64, u64)> {
        self.relay.as_ref().map(Relay::carried)
    }

    /// The rules that cut and lose, with their counts, and the lines: for people.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{}\n{}", self.router.rules(), self.router.lines_now())
    }

    /// The daemon of this node stands still.
    #[track_caller]
    pub fn stop(&self, node: &Node) {
        node.daemon().signal(Signal::STOP);
    }

    /// It goes on.
    #[track_caller]
    pub fn go_on(&self, node: &Node) {
        node.daemon().signal(Signal::CONT);
    }

    /// The node of this name.
    #[track_caller]
    #[must_use]
    pub fn named(&self, name: &str) -> &Node {
        let found = self.pool.nodes().iter().find(|node| node.name() == name);
        found.unwrap_or_else(|| panic!("no node {name}"))
    }

    #[track_caller]
    fn place(&self, name: &str) -> &Place {
        let machine = self.machines.get(name);
        &machine.unwrap_or_else(|| panic!("no machine {name}")).place
    }

    #[track_caller]
    fn address(&self, name: &str) -> std::net::Ipv4Addr {
        self.place(name).address()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let at = self.pool.path().join("collected");
            // A second panic would hide the first.
            let collected = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                collect(&at, self.pool.nodes(), &self.router)
            }));
            let count = collected.map_or(0, |files| files.len());
            #[expect(clippy::print_stderr, reason = "the test runner shows it with the failure")]
            {
                eprintln!("collected {count} files of what the world said: {}", at.display());
            }
        }
    }
}
