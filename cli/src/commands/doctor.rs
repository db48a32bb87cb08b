//! `p2pit doctor`: what works between this machine and the others, and what to do about the
//! rest.

use p2pit_node::api::types::{Checkup, Severity, path};

use crate::{args::Globals, client::Client, output::Output, session::Session, status::Status};

/// What `join` says at its end: what is between this machine and the others.
const SHORT: [&str; 6] = ["members", "udp", "reachable", "clock", "data", "disk"];
/// Of these, also what works, though not in the best way.
const SHORT_NOTES: [&str; 2] = ["udp", "reachable"];

/// Try what works on this machine and between it and the others, and say what to do
///
/// Members are asked to dial this node, and are dialled. Each line says how bad it is: `ok`;
/// `note`, where it works though not in the best way; `warning`, where something does
/// not; `problem`, where this node cannot take part as it is. Exit code: 0 without warnings, 1
/// with some, 2 with problems.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  p2pit doctor\n  \
    p2pit doctor --json | jq '.[] | select(.severity != \"ok\")'")]
pub(crate) struct Args {
    /// One JSON array
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(globals: &Globals, out: &Output, args: Args) -> anyhow::Result<Status> {
    let session = Session::open(globals, out).await?;
    let checkup: Checkup = session.client.post(path::DOCTOR, &()).await?;
    out.data(out.format(args.json).checkup(&checkup))?;
    Ok(match worst(&checkup) {
        Severity::Ok | Severity::Note => Status::DONE,
        Severity::Warning => Status::FAILED,
        Severity::Problem => Status::BROKEN,
    })
}

fn worst(checkup: &Checkup) -> Severity {
    checkup.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
}

/// The short form: what a newcomer should know of the network around it. Where that cannot be
/// had the node is what it is all the same.
pub(crate) async fn short(client: &Client, out: &Output) {
    let checkup: Checkup = match client.post(path::DOCTOR, &()).await {
        Ok(checkup) => checkup,
        Err(reason) => {
            return out.warn(&format!("the network was not looked at: {reason:#}"));
        }
    };
    let told = checkup.findings.iter().filter(|finding| SHORT.contains(&finding.check.as_str()));
    let mut any = false;
    for finding in told {
        match finding.severity {
            Severity::Ok => continue,
            Severity::Note if !SHORT_NOTES.contains(&finding.check.as_str()) => continue,
            Severity::Note => out.note(&finding.finding),
            Severity::Warning | Severity::Problem => out.warn(&finding.finding),
        }
        any = true;
    }
    if any {
        out.note("`p2pit doctor` says what that means, and what to do");
    }
}

#[cfg(test)]
mod tests {
    use p2pit_node::api::types::Finding;

    use super::*;

    #[test]
    fn the_worst_finding_decides() {
        let checkup = |severities: &[Severity]| Checkup {
            findings: severities
                .iter()
                .map(|severity| Finding {
                    check: "udp".to_owned(),
                    severity: *severity,
                    finding: String::new(),
                    hint: None,
                })
                .collect(),
        };
        assert_eq!(worst(&checkup(&[])), Severity::Ok);
        assert_eq!(worst(&checkup(&[Severity::Note, Severity::Ok])), Severity::Note);
        let all = [Severity::Warning, Severity::Problem, Severity::Note];
        assert_eq!(worst(&checkup(&all)), Severity::Problem);
    }
}
