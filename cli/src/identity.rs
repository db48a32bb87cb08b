//! The user's key: found, made on first use, and what it signs.

use std::path::Path;

pub(crate) use p2pit_node::daemon::wall_ms;
use p2pit_node::home::{KeyFileError, KeyKind, load_key, load_or_create_key};
use p2pit_protocol::{
    PeerId, PoolId, UserId,
    identity::{KeyPair, SignedBytes},
    message::Command,
    roster::{Name, REQUEST_AHEAD_MS_MAX, UserRequest},
    wire,
};

use crate::problem::Problem;

/// A person, as a command acts for one.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    key: KeyPair,
}

impl Identity {
    /// The key in `path`.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        match load_key(path, KeyKind::User) {
            Ok(key) => Ok(Self { key }),
            Err(error @ KeyFileError::Missing { .. }) => Err(Problem::request(error.to_string())
                .hint("`--identity FILE` names your key; `p2pit join` makes one on first use")
                .into()),
            Err(error) => Err(error.into()),
        }
    }

    /// The key in `path`, made now where there is none; whether it is new.
    pub(crate) fn load_or_create(path: &Path) -> anyhow::Result<(Self, bool)> {
        let (key, is_new) = load_or_create_key(path, KeyKind::User)?;
        Ok((Self { key }, is_new))
    }

    pub(crate) fn user(&self) -> UserId {
        UserId(self.key.public())
    }

    pub(crate) fn key(&self) -> &KeyPair {
        &self.key
    }

    /// A command to `audience`, good once at each of them and for a minute.
    pub(crate) fn request(
        &self,
        pool: PoolId,
        audience: impl IntoIterator<Item = PeerId>,
        command: &Command,
    ) -> anyhow::Result<SignedBytes> {
        let request = UserRequest {
            pool,
            audience: audience.into_iter().collect(),
            nonce: random()?,
            expires_wall_ms: wall_ms() + REQUEST_AHEAD_MS_MAX,
            command: wire::encode(command),
        };
        Ok(request.sign(&self.key))
    }
}

pub(crate) fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
    Ok(bytes)
}

/// The name a person is likely to want in a pool.
pub(crate) fn login_name() -> Name {
    let named = |variable| std::env::var(variable).ok().filter(|name| !name.is_empty());
    let login = named("USER").or_else(|| named("LOGNAME")).or_else(account_name);
    Name::from_any(login.as_deref().unwrap_or("user"))
}

/// What the system calls the user of this process.
fn account_name() -> Option<String> {
    let uid = rustix::process::geteuid().as_raw();
    let mut buffer = vec![0; ACCOUNT_BYTES_MAX];
    let mut account = std::mem::MaybeUninit::<libc::passwd>::uninit();
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are to live memory of the sizes given.
    let failed = unsafe {
        libc::getpwuid_r(
            uid,
            account.as_mut_ptr(),
            buffer.as_mut_ptr(),
            buffer.len(),
            &raw mut found,
        )
    };
    if failed != 0 || found.is_null() {
        return None;
    }
    // SAFETY: `found` points to `account`, which was filled in; its name is a string in
    // `buffer`, which lives until the end of this function.
    let name = unsafe { std::ffi::CStr::from_ptr((*found).pw_name) };
    name.to_str().ok().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// For the texts of one account.
const ACCOUNT_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use p2pit_protocol::identity::Domain;

    use super::*;

    #[test]
    fn a_missing_key_is_no_key_to_be_made_by_any_command() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity");
        let error = Identity::load(&path).unwrap_err();
        assert!(error.downcast_ref::<Problem>().is_some());
        assert!(!path.exists());
        let (made, is_new) = Identity::load_or_create(&path).unwrap();
        assert!(is_new);
        assert_eq!(Identity::load(&path).unwrap().user(), made.user());
    }

    #[test]
    fn a_request_names_pool_audience_and_a_minute_and_no_two_are_the_same() {
        let identity = Identity { key: KeyPair::from_seed(&[1; 32]) };
        let node = PeerId(KeyPair::from_seed(&[2; 32]).public());
        let pool = PoolId([3; 32]);
        let signed = identity.request(pool, [node], &Command::Node).unwrap();
        let request: UserRequest =
            wire::decode(signed.verify(Domain::UserRequest).unwrap()).unwrap();
        assert_eq!((request.pool, request.audience), (pool, [node].into()));
        assert_eq!(wire::decode::<Command>(&request.command), Ok(Command::Node));
        let ahead = request.expires_wall_ms - wall_ms();
        assert!((50_000..=REQUEST_AHEAD_MS_MAX).contains(&ahead), "{ahead}");
        assert_ne!(identity.request(pool, [node], &Command::Node).unwrap(), signed);
    }
}
