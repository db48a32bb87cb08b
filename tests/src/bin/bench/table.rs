//! p2pit beside something else: measured in turns, compared in pairs, one row each.
//!
//! A machine has better and worse minutes. So whatever is compared takes turns in the
//! same minutes, and a ratio is the median of the ratios of the turns.

use std::{
    fmt,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::turns::Runner;

/// Of what a figure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Seconds,
    JobsPerSecond,
    MebibytesPerSecond,
    Mebibytes,
    PercentOfCore,
}

impl Unit {
    fn more_is_better(self) -> bool {
        matches!(self, Self::JobsPerSecond | Self::MebibytesPerSecond)
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::Seconds if value < 0.1 => format!("{:.1} ms", value * 1e3),
            Self::Seconds if value < 1.0 => format!("{:.0} ms", value * 1e3),
            Self::Seconds => format!("{value:.2} s"),
            Self::JobsPerSecond => format!("{value:.0} jobs/s"),
            Self::MebibytesPerSecond => format!("{value:.0} MiB/s"),
            Self::Mebibytes => format!("{value:.1} MiB"),
            Self::PercentOfCore => format!("{value:.2} % of a core"),
        }
    }
}

/// One figure of each turn.
#[derive(Debug, Clone)]
pub(crate) struct Figures {
    unit: Unit,
    turns: Vec<f64>,
}

impl Figures {
    pub(crate) fn new(unit: Unit) -> Self {
        Self { unit, turns: Vec::new() }
    }

    /// Of a single turn.
    pub(crate) fn one(unit: Unit, figure: f64) -> Self {
        Self { unit, turns: vec![figure] }
    }

    pub(crate) fn add(&mut self, figure: f64) {
        self.turns.push(figure);
    }

    pub(crate) fn median(&self) -> f64 {
        median(self.turns.clone())
    }

    /// How much more p2pit takes than the other.
    fn more_than(&self, other: &Self) -> f64 {
        median(self.turns.iter().zip(&other.turns).map(|(ours, theirs)| ours - theirs).collect())
    }

    /// How much p2pit takes for one that the other takes: below 1 it is ahead.
    fn ratio_to(&self, other: &Self) -> f64 {
        let pairs = self.turns.iter().zip(&other.turns);
        let ratios = pairs.map(|(ours, theirs)| match self.unit.more_is_better() {
            true => theirs / ours,
            false => ours / theirs,
        });
        median(ratios.collect())
    }
}

/// The median, and with several turns the range.
impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.unit.show(self.median()))?;
        let mut sorted = self.turns.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted[..] {
            [min, .., max] => write!(f, " ({}–{})", self.unit.show(min), self.unit.show(max)),
            _ => Ok(()),
        }
    }
}

/// Not a number where there are none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

/// Why something could not be measured beside p2pit on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Absent {
    /// It is in these packages of Debian.
    NotInstalled(&'static str),
    NeedsRoot,
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInstalled(packages) => {
                write!(f, "not installed (`apt-get install {packages}`)")
            }
            Self::NeedsRoot => f.write_str("needs root"),
        }
    }
}

/// What is to be reached.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    /// By p2pit's own figure, whatever the other does: at most, or for a rate at least.
    Figure(f64),
    /// By the ratio: at most.
    Ratio(f64),
    /// By how much more it is than the other: at most.
    Added(f64),
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    what: &'static str,
    ours: Figures,
    other: Option<(&'static str, Result<Figures, Absent>)>,
    pub(crate) goal: Option<Goal>,
}

impl Row {
    /// p2pit alone.
    pub(crate) fn of(what: &'static str, ours: Figures) -> Self {
        Self { what, ours, other: None, goal: None }
    }

    /// The first of those that took turns, which is p2pit, beside each of the others.
    pub(crate) fn all(what: &'static str, runners: &[Runner<'_>]) -> Vec<Self> {
        let [ours, others @ ..] = runners else { return Vec::new() };
        let beside = |other: &Runner<'_>| {
            let other = Some((other.name, other.figures()));
            Some(Self { other, ..Self::of(what, ours.figures().ok()?) })
        };
        others.iter().filter_map(beside).collect()
    }

    #[must_use]
    pub(crate) fn beside(mut self, name: &'static str, figures: Result<Figures, Absent>) -> Self {
        self.other = Some((name, figures));
        self
    }

    #[must_use]
    pub(crate) fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }

    fn ratio(&self) -> Option<f64> {
        let (_, figures) = self.other.as_ref()?;
        Some(self.ours.ratio_to(figures.as_ref().ok()?))
    }

    fn more(&self) -> Option<f64> {
        let (_, figures) = self.other.as_ref()?;
        Some(self.ours.more_than(figures.as_ref().ok()?))
    }

    /// `None` where there is no goal, or nothing to hold against it.
    fn is_met(&self) -> Option<bool> {
        let (reached, goal, more_is_better) = match self.goal? {
            Goal::Figure(goal) => (self.ours.median(), goal, self.ours.unit.more_is_better()),
            Goal::Ratio(goal) => (self.ratio()?, goal, false),
            Goal::Added(goal) => (self.more()?, goal, false),
        };
        Some(if more_is_better { reached >= goal } else { reached <= goal })
    }

    fn line(&self, is_first: bool) -> String {
        let none = || "–".to_owned();
        let (what, ours) = match is_first {
            true => (self.what.to_owned(), self.ours.to_string()),
            false => Default::default(),
        };
        let other = self.other.as_ref().map_or_else(none, |(name, figures)| match figures {
            Ok(figures) => format!("{name}: {figures}"),
            Err(absent) => format!("{name}: {absent}"),
        });
        // There is none to nothing.
        let ratio = self.ratio().filter(|ratio| ratio.is_finite());
        let ratio = ratio.map_or_else(none, |ratio| format!("{ratio:.2}"));
        let goal = self.goal.map_or_else(none, |goal| match goal {
            Goal::Figure(goal) if self.ours.unit.more_is_better() => {
                format!("≥ {}", self.ours.unit.show(goal))
            }
            Goal::Figure(goal) => format!("≤ {}", self.ours.unit.show(goal)),
            Goal::Ratio(goal) => format!("ratio ≤ {goal:.2}"),
            Goal::Added(goal) => {
                let is = self.more().map_or_else(none, |more| self.ours.unit.show(more));
                format!("at most {} more; it is {is}", self.ours.unit.show(goal))
            }
        });
        let met = match self.is_met() {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "–",
        };
        format!("| {what} | {ours} | {other} | {ratio} | {goal} | {met} |")
    }
}

/// All rows as Markdown. What is said of p2pit in one row is not repeated in the next.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut lines = vec![
        "| what | p2pit | beside it | ratio | goal | met |".to_owned(),
        "|---|---|---|---|---|---|".to_owned(),
    ];
    let mut last = None;
    for row in rows {
        lines.push(row.line(last != Some(row.what)));
        last = Some(row.what);
    }
    lines.join("\n")
}

/// How long a command took, which must succeed, and what it printed.
pub(crate) fn timed(command: &mut Command) -> Result<(Duration, String)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let ended = command.output();
    let took = start.elapsed();
    let Output { status, stdout, stderr } =
        ended.with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let said = String::from_utf8_lossy(&stderr);
    ensure!(status.success(), "{command:?} ended with {status}: {said}");
    Ok((took, String::from_utf8_lossy(&stdout).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_that_of_the_turns_and_below_one_p2pit_is_ahead() {
        let ours = Figures { unit: Unit::Seconds, turns: vec![1.0, 10.0, 1.2] };
        let theirs = Figures { unit: Unit::Seconds, turns: vec![2.0, 20.0, 2.4] };
        let row = beside(ours, Ok(theirs)).goal(Goal::Ratio(0.6));
        let line = "| copy | 1.20 s (1.00 s–10.00 s) | other: 2.40 s (2.00 s–20.00 s) | 0.50 \
                    | ratio ≤ 0.60 | yes |";
        assert_eq!(row.line(true), line);
    }

    #[test]
    fn what_is_added_is_the_median_of_the_differences_of_the_turns() {
        let ours = Figures { unit: Unit::Seconds, turns: vec![1.0, 10.0, 1.2] };
        let theirs = Figures { unit: Unit::Seconds, turns: vec![0.98, 9.0, 1.17] };
        for (goal, met) in [(0.031, "yes"), (0.029, "**no**")] {
            let row = beside(ours.clone(), Ok(theirs.clone())).goal(Goal::Added(goal));
            let line = row.line(false);
            assert!(line.contains("more; it is 30.0 ms"), "{line}");
            assert!(line.ends_with(&format!("| {met} |")), "{line}");
        }
    }

    #[test]
    fn of_a_rate_more_is_better() {
        let [ours, theirs] =
            [100.0, 50.0].map(|rate| Figures { unit: Unit::JobsPerSecond, turns: vec![rate] });
        let row = beside(ours, Ok(theirs)).goal(Goal::Figure(101.0));
        let line = "| copy | 100 jobs/s | other: 50 jobs/s | 0.50 | ≥ 101 jobs/s | **no** |";
        assert_eq!(row.line(true), line);
    }

    #[test]
    fn what_is_not_there_is_said_and_nothing_is_held_against_it() {
        let ours = Figures { unit: Unit::Seconds, turns: vec![0.02] };
        let absent = Err(Absent::NotInstalled("it"));
        let rows = [Row::of("copy", ours.clone()), beside(ours, absent).goal(Goal::Ratio(1.0))];
        let line = "|  |  | other: not installed (`apt-get install it`) | – | ratio ≤ 1.00 | – |";
        assert_eq!(table(&rows).lines().last(), Some(line));
    }

    fn beside(ours: Figures, theirs: Result<Figures, Absent>) -> Row {
        Row::of("copy", ours).beside("other", theirs)
    }
}
