//! A world to break by hand: `cargo run -p p2pit-tests --bin p2pit-world -- sim:1xv100 none`.
//!
//! One machine for each argument, with these GPUs. It reads what to do from standard input, a
//! line each; `help` says what there is. At its end nothing of the world stays.

#![expect(clippy::print_stdout, reason = "this is what it is for")]

use std::{
    io::{BufRead as _, Write as _},
    time::Duration,
};

use p2pit_tests::{Delay, World};

const HELP: &str = "\
n1 WORDS…              `p2pit WORDS…` on that machine, such as: n2 run Try [v100] -d 'sleep 60'
cut n1,n2 n3           nothing travels between these and those;  cut1: in that direction only
isolate n1             the same, between it and all others
lose n1 50             50 of 1000 packets to it and of those from it are lost
heal                   no cut and no loss any more
slow n1 8mbit          its line, in each direction;  slow n1 off
delay n1 80 20 50      what it sends is 80 ms late, up to 20 ms more, 50 of 1000 not at all
unplug n1, plug n1     its cable
kill n1, restart n1    its daemon: kill -9, and started again
stop n1, go n1         its daemon stands still, and goes on
off n1, boot n1        its machine; after `boot` no daemon runs yet
rules                  what is dropped and how often, and the lines
quit";

fn main() {
    let gpus: Vec<String> = std::env::args().skip(1).collect();
    let gpus: Vec<&str> = gpus.iter().map(String::as_str).collect();
    let gpus = if gpus.is_empty() { vec!["none", "sim:1xv100", "sim:1xv100"] } else { gpus };
    let Some(mut world) = World::of(&gpus) else { std::process::exit(1) };
    println!("{} machines, in {}\n{HELP}", gpus.len(), world.path().display());
    for line in prompted() {
        let words = split(&line);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if words == ["quit"] {
            break;
        }
        // A slip of the fingers is no reason to lose the world.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            carry_out(&mut world, &words);
        }));
        if done.is_err() {
            println!("`help` says what there is");
        }
    }
}

fn carry_out(world: &mut World, words: &[&str]) {
    let names = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
    let number = |text: &str| text.parse::<u32>().expect("that is no number");
    match words {
        [] => {}
        ["help"] => println!("{HELP}"),
        [verb @ ("cut" | "cut1"), some, others] => {
            let (some, others) = (names(some), names(others));
            let some: Vec<&str> = some.iter().map(String::as_str).collect();
            let others: Vec<&str> = others.iter().map(String::as_str).collect();
            world.cut_one_way(&some, &others);
            if *verb == "cut" {
                world.cut_one_way(&others, &some);
            }
        }
        ["isolate", name] => world.isolate(name),
        ["lose", name, per_mille] => world.lose(name, number(per_mille)),
        ["heal"] => world.heal(),
        ["slow", name, "off"] => world.slow(name, None),
        ["slow", name, rate] => world.slow(name, Some(rate)),
        ["delay", name, by, more @ ..] => {
            let [jitter, early] = [0, 1].map(|n| more.get(n).map_or(0, |text| number(text)));
            let ms = |ms: u32| Duration::from_millis(ms.into());
            let delay = Delay { by: ms(number(by)), jitter: ms(jitter), early_per_mille: early };
            println!("late: {}", world.delay(name, delay));
        }
        ["unplug", name] => world.unplug(name, true),
        ["plug", name] => world.unplug(name, false),
        ["kill", name] => world.named(name).crash(),
        ["restart", name] => world.named(name).restart(),
        ["stop", name] => world.stop(world.named(name)),
        ["go", name] => world.go_on(world.named(name)),
        ["off", name] => world.power_off(name),
        ["boot", name] => world.boot(name),
        ["rules"] => println!("{}", world.describe()),
        [name, rest @ ..] => {
            let ended = world.named(name).p2pit(rest);
            print!("{}{}", ended.stdout, ended.stderr);
            if ended.code != 0 {
                println!("(exit code {})", ended.code);
            }
        }
    }
}

/// The lines of standard input, each asked for.
fn prompted() -> impl Iterator<Item = String> {
    let mut lines = std::io::stdin().lock().lines();
    std::iter::from_fn(move || {
        print!("> ");
        // Nobody there to ask is nobody there to answer.
        std::io::stdout().flush().ok()?;
        lines.next()?.ok()
    })
}

/// Words, with quotes around those that have spaces.
fn split(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_in_a_shell() {
        let line = "n1 run  'Two words' \"[v100]\" -d 'echo \"it\"; sleep 1' ''";
        let words = ["n1", "run", "Two words", "[v100]", "-d", "echo \"it\"; sleep 1", ""];
        assert_eq!(split(line), words);
    }
}
