//! Those that are compared take turns, so that all have the same good and bad minutes.

use anyhow::Result;

use crate::table::{Absent, Figures, Unit};

/// One that takes turns, or cannot on this machine.
pub(crate) struct Runner<'a> {
    pub(crate) name: &'static str,
    run: Result<Box<dyn FnMut() -> Result<f64> + 'a>, Absent>,
    figures: Figures,
}

impl<'a> Runner<'a> {
    /// `run` gives the figure of one turn, in `unit`.
    pub(crate) fn new(
        name: &'static str,
        unit: Unit,
        run: impl FnMut() -> Result<f64> + 'a,
    ) -> Self {
        Self { name, run: Ok(Box::new(run)), figures: Figures::new(unit) }
    }

    /// Only where what it needs is there.
    #[must_use]
    pub(crate) fn if_there(mut self, there: Result<(), Absent>) -> Self {
        if let Err(absent) = there {
            self.run = Err(absent);
        }
        self
    }

    /// Runs it once; does nothing where it cannot.
    pub(crate) fn turn(&mut self, counts: bool) -> Result<()> {
        let Ok(run) = &mut self.run else { return Ok(()) };
        let figure = run()?;
        if counts {
            self.figures.add(figure);
        }
        Ok(())
    }

    pub(crate) fn figures(&self) -> Result<Figures, Absent> {
        self.run.as_ref().map(|_| self.figures.clone()).map_err(|absent| *absent)
    }
}

/// Everybody once, and again, `turns` times after `warm_ups` that do not count.
pub(crate) fn in_turns(runners: &mut [Runner<'_>], warm_ups: usize, turns: usize) -> Result<()> {
    for turn in 0..warm_ups + turns {
        runners.iter_mut().try_for_each(|runner| runner.turn(turn >= warm_ups))?;
    }
    Ok(())
}
