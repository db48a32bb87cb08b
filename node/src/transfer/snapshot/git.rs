//! What git says about a checkout, asked of the git program.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::{Deserialize, Serialize};

/// Where the code of a job comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GitInfo {
    /// Of `origin`, else of the first remote; without credentials.
    pub remote: Option<String>,
    /// Absent before the first commit.
    pub commit: Option<String>,
    /// Absent where none is checked out.
    pub branch: Option<String>,
    /// Lines added and removed in tracked files since the commit.
    pub diff_lines: u64,
    /// Files that git neither tracks nor ignores.
    pub untracked: u64,
}

/// The top of the checkout that `dir` is in.
pub(super) fn top_of_checkout(dir: &Path) -> Option<&Path> {
    dir.ancestors().find(|above| above.join(".git").symlink_metadata().is_ok())
}

/// Files of patterns that are in no directory of the checkout, the weakest first: those of
/// the user, wherever git's configuration names them, and those of the repository, wherever
/// it has its git directory. `None` where git does not say.
pub(super) fn excludes(program: &OsStr, dir: &Path) -> Option<Vec<PathBuf>> {
    let path_of = |output: Vec<u8>| {
        let path = output.strip_suffix(b"\n").unwrap_or(&output);
        dir.join(OsStr::from_bytes(path))
    };
    let own = run(program, dir, &["rev-parse", "--git-path", "info/exclude"]).ok()?;
    // Fails where none is set.
    let users = run(program, dir, &["config", "--type=path", "--get", "core.excludesFile"]);
    let users =
        users.ok().map(path_of).or_else(|| default_excludes(&|name| std::env::var_os(name)));
    Some(users.into_iter().chain([path_of(own)]).collect())
}

/// As git's manual has it for `core.excludesFile`.
fn default_excludes(env: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(config.join("git/ignore"))
}

/// The tracked paths below `dir`, relative to it, those of submodules included. The
/// error is a sentence for the user.
pub(super) fn tracked(program: &OsStr, dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    // A submodule that is half set up must not cost us the rest.
    let listed = run(program, dir, &["ls-files", "-z", "--cached", "--recurse-submodules"])
        .or_else(|_| run(program, dir, &["ls-files", "-z", "--cached"]))?;
    Ok(nul_separated(&listed).map(<[u8]>::to_vec).collect())
}

/// The error is a sentence for the user.
pub(super) fn info(program: &OsStr, dir: &Path) -> Result<GitInfo, String> {
    let status = run(
        program,
        dir,
        &["status", "--porcelain=v2", "--branch", "-z", "-uall", "--no-renames", "--", "."],
    )?;
    let mut info = GitInfo {
        remote: remote(program, dir)?,
        commit: None,
        branch: None,
        diff_lines: 0,
        untracked: 0,
    };
    let mut is_changed = false;
    for line in nul_separated(&status) {
        let text = String::from_utf8_lossy(line);
        match text.split_once(' ') {
            Some(("#", header)) => match header.split_once(' ') {
                Some(("branch.oid", "(initial)")) | Some(("branch.head", "(detached)")) => {}
                Some(("branch.oid", commit)) => info.commit = Some(commit.to_owned()),
                Some(("branch.head", branch)) => info.branch = Some(branch.to_owned()),
                _ => {}
            },
            Some(("?", _)) => info.untracked += 1,
            Some(("1" | "2" | "u", _)) => is_changed = true,
            _ => {}
        }
    }
    if is_changed {
        let base = if info.commit.is_some() { "HEAD" } else { "--cached" };
        let args = [
            "diff",
            "--numstat",
            "--no-renames",
            "--no-ext-diff",
            "--no-textconv",
            base,
            "--",
            ".",
        ];
        info.diff_lines = changed_lines(&run(program, dir, &args)?);
    }
    Ok(info)
}

/// The sum of a `--numstat`; binary files have `-` for numbers and count nothing.
fn changed_lines(numstat: &[u8]) -> u64 {
    String::from_utf8_lossy(numstat)
        .lines()
        .flat_map(|line| line.split('\t').take(2))
        .filter_map(|number| number.parse::<u64>().ok())
        .sum()
}

fn remote(program: &OsStr, dir: &Path) -> Result<Option<String>, String> {
    let args = ["config", "-z", "--get-regexp", r"^remote\..*\.url$"];
    // Fails as well when there is no remote; whether git works is asked elsewhere.
    let Ok(listed) = run(program, dir, &args) else { return Ok(None) };
    let text = String::from_utf8_lossy(&listed);
    let urls: Vec<(&str, &str)> = text.split('\0').filter_map(|l| l.split_once('\n')).collect();
    let origin = urls.iter().find(|(key, _)| *key == "remote.origin.url");
    Ok(origin.or(urls.first()).map(|(_, url)| without_credentials(url)))
}

/// A remote as it may be shown to others: a user name stays for ssh, where it is part of
/// the address; nothing that could be a secret does.
fn without_credentials(url: &str) -> String {
    let url: String = url.chars().filter(|c| !c.is_control()).take(1024).collect();
    let Some((scheme, rest)) = url.split_once("://") else { return url };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    // With an unescaped `/` in a password, what looks like the port is not a number.
    let is_port = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let has_bad_port = !authority.contains(['@', '['])
        && authority.split_once(':').is_some_and(|(_, port)| !is_port(port));
    let (user_info, address) = match (has_bad_port, rest.rsplit_once('@')) {
        (true, Some((_, after))) => ("", after.to_owned()),
        (true, None) => ("", authority.split(':').next().unwrap_or_default().to_owned()),
        (false, _) => match authority.rsplit_once('@') {
            Some((user_info, host)) => (user_info, format!("{host}{path}")),
            None => ("", rest.to_owned()),
        },
    };
    let is_ssh = scheme.contains("ssh");
    let address = if is_ssh { &address } else { address.split(['?', '#']).next().unwrap_or("") };
    match user_info.split(':').next() {
        Some(user) if is_ssh && !user.is_empty() => format!("{scheme}://{user}@{address}"),
        _ => format!("{scheme}://{address}"),
    }
}

fn run(program: &OsStr, dir: &Path, args: &[&str]) -> Result<Vec<u8>, String> {
    let output = Command::new(program)
        .arg("-C")
        .arg(dir)
        // We only look: no lock taken, no helper of the repository started.
        .args(["-c", "core.fsmonitor=false"])
        .args(args)
        .env("GIT_OPTIONAL_LOCKS", "0")
        .env("LC_ALL", "C")
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .env_remove("GIT_INDEX_FILE")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("`{}` does not run: {error}", program.display()))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    let reason = reason.lines().next().unwrap_or("no reason given");
    Err(format!("`{} {}` failed: {reason}", program.display(), args[0]))
}

fn nul_separated(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remotes_are_shown_without_secrets() {
        for (url, shown) in [
            ("https://user:token@host/lab/x.git", "https://host/lab/x.git"),
            ("https://token@host/x", "https://host/x"),
            ("https://user:pa@ss@host:8443/x", "https://host:8443/x"),
            ("https://user:pa/ss@host/x", "https://host/x"),
            ("https://user:pa?ss@host/x", "https://host/x"),
            ("https://user:pass", "https://user"),
            ("https://host/@scope/x", "https://host/@scope/x"),
            ("https://host:8443/@scope/x", "https://host:8443/@scope/x"),
            ("https://host/x?private_token=t#f", "https://host/x"),
            ("https://[::1]:80/@x", "https://[::1]:80/@x"),
            ("ssh://git@host:22/x", "ssh://git@host:22/x"),
            ("ssh://git:secret@host/x", "ssh://git@host/x"),
            ("git@host:lab/x.git", "git@host:lab/x.git"),
            ("/srv/git/x.git", "/srv/git/x.git"),
            ("https://host\n/x", "https://host/x"),
        ] {
            assert_eq!(without_credentials(url), shown, "{url}");
        }
    }

    #[test]
    fn the_users_own_patterns_are_where_git_looks_for_them() {
        let path = |set: &[(&str, &str)]| {
            let env = |name: &str| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into())
            };
            default_excludes(&env).map(|path| path.display().to_string())
        };
        let home = ("HOME", "/home/anna");
        assert_eq!(path(&[home]).as_deref(), Some("/home/anna/.config/git/ignore"));
        assert_eq!(path(&[home, ("XDG_CONFIG_HOME", "/x")]).as_deref(), Some("/x/git/ignore"));
        let empty = ("XDG_CONFIG_HOME", "");
        assert_eq!(path(&[home, empty]).as_deref(), Some("/home/anna/.config/git/ignore"));
        assert_eq!(path(&[empty]), None);
    }

    #[test]
    fn binary_files_count_no_lines() {
        assert_eq!(changed_lines(b"3\t1\ta.py\n-\t-\tx.bin\n10\t0\tb\n"), 14);
    }
}
