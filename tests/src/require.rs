//! What a machine may lack, and whether a test may be skipped for it.

use crate::Node;

/// Names, with commas between, what this machine has: a test that would be skipped for the
/// want of it fails instead.
const REQUIRE: &str = "P2PIT_TEST_REQUIRE";

/// Whether jobs of this node run in namespaces of their own; says so where they do not.
///
/// # Panics
/// Where they do not although `P2PIT_TEST_REQUIRE` names `namespaces`.
#[must_use]
pub fn has_namespaces(node: &Node) -> bool {
    let isolation = node.me()["isolation"].as_str().unwrap_or_default().to_owned();
    isolation == "namespaces" || skip("namespaces", &isolation)
}

/// Whether this process may do what only root may; says so where it may not.
///
/// # Panics
/// Where it may not although `P2PIT_TEST_REQUIRE` names `root`.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root() || skip("root", "this is an ordinary user")
}

fn skip(what: &str, reason: &str) -> bool {
    let required = std::env::var(REQUIRE).unwrap_or_default();
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
