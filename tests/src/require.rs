//! What a machine may lack, and whether a test may be skipped for it.

use std::{env, path::PathBuf, process::Command, sync::OnceLock};

use crate::Node;

/// Names, with commas between, what this machine has: a test that would be skipped for the
/// want of it fails instead.
const REQUIRE: &str = "P2PIT_TEST_REQUIRE";
/// Names a directory of wheels: what `examples/digits/requirements.txt` asks for.
const PYTHON_PACKAGES: &str = "P2PIT_TEST_PYTHON_PACKAGES";
/// Where jobs look for programs.
const PATH_OF_JOBS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Whether jobs of this node run in namespaces of their own; says so where they do not.
///
/// # Panics
/// Where they do not although `P2PIT_TEST_REQUIRE` names `namespaces`.
#[must_use]
pub fn has_namespaces(node: &Node) -> bool {
    let isolation = node.me()["isolation"].as_str().unwrap_or_default().to_owned();
    isolation == "namespaces" || skip("namespaces", &isolation)
}

/// The directory with the Python packages that the examples need; says so where none is
/// named. No test fetches them by itself.
///
/// # Panics
/// Where none is named although `P2PIT_TEST_REQUIRE` names `python-packages`.
#[must_use]
pub fn python_packages() -> Option<PathBuf> {
    let dir = env::var_os(PYTHON_PACKAGES).map(PathBuf::from);
    if dir.is_none() {
        skip("python-packages", &format!("{PYTHON_PACKAGES} is not set; `.ci/run` shows how"));
    }
    dir
}

/// Whether the Python that jobs find has PyTorch; says so where it has not.
///
/// # Panics
/// Where it has not although `P2PIT_TEST_REQUIRE` names `torch`.
#[must_use]
pub fn has_torch() -> bool {
    let mut python = Command::new("env");
    python.args(["-i", &format!("PATH={PATH_OF_JOBS}"), "python3", "-c", "import torch"]);
    let reason = match python.output() {
        Ok(ended) if ended.status.success() => return true,
        Ok(ended) => String::from_utf8_lossy(&ended.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    skip("torch", reason.lines().last().unwrap_or_default())
}

/// Whether this process may do what only root may; says so where it may not.
///
/// # Panics
/// Where it may not although `P2PIT_TEST_REQUIRE` names `root`.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root() || skip("root", "this is an ordinary user")
}

/// Whether networks can be laid out here, each in a namespace of its own and with rules of
/// `nft`; says so where they cannot.
///
/// # Panics
/// Where they cannot although `P2PIT_TEST_REQUIRE` names `root`, who else could.
#[must_use]
pub(crate) fn has_internets() -> bool {
    static LACKS: OnceLock<Option<String>> = OnceLock::new();
    let lacks = LACKS.get_or_init(|| {
        let space = format!("reach-try-{}", std::process::id());
        let at = format!("--net=/run/netns/{space}");
        let tries: [&[&str]; 3] = [
            &["ip", "netns", "add", &space],
            &["ip", "-n", &space, "link", "add", "br0", "type", "bridge"],
            &["nsenter", &at, "nft", "add", "table", "ip", "try"],
        ];
        let lacks = tries.iter().find_map(|words| lack_of(words));
        // There may be none to remove.
        let _ = lack_of(&["ip", "netns", "delete", &space]);
        lacks
    });
    lacks.as_ref().is_none_or(|reason| skip("root", reason))
}

/// Why a command does not succeed here.
fn lack_of(words: &[&str]) -> Option<String> {
    let line = words.join(" ");
    match Command::new(words[0]).args(&words[1..]).output() {
        Ok(ended) if ended.status.success() => None,
        Ok(ended) => Some(format!("{line}: {}", String::from_utf8_lossy(&ended.stderr).trim())),
        Err(error) => Some(format!("{line}: {error}")),
    }
}

pub(crate) fn skip(what: &str, reason: &str) -> bool {
    let required = env::var(REQUIRE).unwrap_or_default();
    assert!(
        !required.split(',').any(|required| required == what),
        "{REQUIRE} names `{what}`, which this machine does not have: {reason}"
    );
    #[expect(clippy::print_stderr, reason = "a test that tests nothing must not go unseen")]
    {
        eprintln!("skipped for want of {what}: {reason}");
    }
    false
}
