//! From a [`Command`] to what the kernel executes.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr},
    fs::File,
    io::Read as _,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{
    spec::{Command, ProcessSpec},
    sys::Pointers,
};

const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where a shell is looked for besides `PATH`, bash first.
const SHELLS: [&str; 5] =
    ["/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh", "/usr/bin/sh"];
/// As far as the kernel reads a `#!` line, at least.
const SHEBANG_BYTES_MAX: u64 = 4096;
/// Processes of jobs call themselves this where nothing else is asked.
const USER_NAME: &str = "p2pit";

/// Something to try to execute.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) program: CString,
    pub(super) args: Pointers,
}

/// In the order to try them; the next one where a file is missing or is no program.
pub(super) fn candidates(
    spec: &ProcessSpec,
    env: &BTreeMap<String, String>,
) -> Result<Vec<Candidate>> {
    let mut attempts: Vec<Vec<Vec<u8>>> = Vec::new();
    let bytes = |text: &OsStr| text.as_bytes().to_vec();
    let tail = match &spec.command {
        Command::Direct { text } => vec![b"-c".to_vec(), text.clone().into_bytes()],
        Command::Script { path } => {
            let path = spec.work_dir.join(path);
            let script = bytes(path.as_os_str());
            let file =
                File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let mode = file.metadata().context("cannot read its mode")?.permissions().mode();
            let mut head = Vec::new();
            file.take(SHEBANG_BYTES_MAX)
                .read_to_end(&mut head)
                .with_context(|| format!("cannot read {}", path.display()))?;
            if let Some(mut interpreter) = interpreter(&head) {
                interpreter.push(script);
                return Ok(vec![candidate(interpreter)?]);
            }
            if mode & 0o111 != 0 {
                attempts.push(vec![script.clone()]);
            }
            vec![script]
        }
    };
    for shell in shells(env) {
        let mut args = vec![bytes(shell.as_os_str())];
        args.extend(tail.iter().cloned());
        attempts.push(args);
    }
    attempts.into_iter().map(candidate).collect()
}

/// The whole environment: what was asked for over what every process gets.
pub(super) fn environment(spec: &ProcessSpec) -> BTreeMap<String, String> {
    let tmp = spec.tmp_dir.to_string_lossy().into_owned();
    // Inside a sandbox, paths of sockets below `/tmp` stay within their 108 bytes.
    let tmp_dir = if spec.isolation.is_isolated() { "/tmp".into() } else { tmp.clone() };
    let mut env: BTreeMap<String, String> = [
        ("PATH", PATH_DEFAULT.into()),
        ("HOME", tmp),
        ("TMPDIR", tmp_dir),
        ("USER", USER_NAME.into()),
        ("LOGNAME", USER_NAME.into()),
        ("LANG", "C.UTF-8".into()),
        ("PWD", spec.work_dir.to_string_lossy().into_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    env.extend(spec.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    env
}

pub(super) fn encode_environment(env: &BTreeMap<String, String>) -> Result<Pointers> {
    let entry = |(name, value): (&String, &String)| {
        CString::new(format!("{name}={value}"))
            .with_context(|| format!("the environment variable `{name}` contains a zero byte"))
    };
    Ok(Pointers::new(env.iter().map(entry).collect::<Result<_>>()?))
}

fn candidate(args: Vec<Vec<u8>>) -> Result<Candidate> {
    let args: Vec<CString> = args
        .into_iter()
        .map(CString::new)
        .collect::<Result<_, _>>()
        .context("the command contains a zero byte")?;
    let program = args.first().context("no command")?.clone();
    Ok(Candidate { program, args: Pointers::new(args) })
}

/// As the kernel reads `#!`: an interpreter and at most one argument.
pub(crate) fn interpreter(head: &[u8]) -> Option<Vec<Vec<u8>>> {
    let line = head.strip_prefix(b"#!")?.split(|&b| b == b'\n').next()?.trim_ascii();
    let split = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    let (program, argument) = line.split_at(split);
    let parts = [program, argument.trim_ascii()];
    let parts: Vec<_> = parts.iter().filter(|part| !part.is_empty()).map(|p| p.to_vec()).collect();
    (!parts.is_empty()).then_some(parts)
}

fn shells(env: &BTreeMap<String, String>) -> Vec<PathBuf> {
    let in_path = env.get("PATH").map(String::as_str).unwrap_or(PATH_DEFAULT).split(':');
    let in_path = in_path.filter(|dir| dir.starts_with('/')).map(|dir| Path::new(dir).join("bash"));
    in_path.chain(SHELLS.iter().map(PathBuf::from)).filter(|shell| shell.exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shebang_line_is_read_as_the_kernel_reads_it() {
        let read = |text: &str| {
            interpreter(text.as_bytes())
                .map(|parts| parts.into_iter().map(|p| String::from_utf8(p).unwrap()).collect())
        };
        let words =
            |words: &[&str]| Some(words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(read("#!/bin/sh\nx"), words(&["/bin/sh"]));
        assert_eq!(
            read("#! /usr/bin/env  python3 -u \r\n"),
            words(&["/usr/bin/env", "python3 -u"])
        );
        assert_eq!(read("#!\n"), None);
        assert_eq!(read("echo #!/bin/sh"), None);
    }
}
