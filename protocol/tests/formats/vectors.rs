//! The vectors on disk are what the specimens encode to, read as what they were, and leave
//! out no variant of any type.
//!
//! Where a format changes on purpose, its version is raised (see `wire::WIRE_VERSION` and the
//! tags of `identity::Domain`) and the vectors are written anew: [`BLESS`].

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use p2pit_protocol::{
    JobId, Now, Peer, PoolId, UserId,
    identity::{Domain, KeyPair, SignedBytes},
    job::VerifiedSpec,
    message::{Message, Piece, Soft},
    peer::{Config, Slot},
    record::{Certificate, LinkProof, Value, check_receipt, follow},
    roster::{Roster, SignedClaim, Statement},
    sabotage::Sabotage,
    wire,
};

use crate::{
    formats,
    specimens::{self, Specimen},
    variants,
};

const BLESS: &str = "P2PIT_BLESS=1 cargo test -p p2pit-protocol --test formats vectors::";

/// Where they are; written anew first, where that was asked for.
pub(crate) fn folder() -> &'static Path {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors");
        if env::var_os("P2PIT_BLESS").is_some() {
            bless(&folder, &specimens::all());
        }
        folder
    });
    &FOLDER
}

fn file_of(specimen: &Specimen) -> String {
    format!("{}/{}.bin", specimen.format, specimen.name)
}

/// A line for each vector, `hash length file`, and one for each id, `id what text`.
fn manifest(specimens: &[Specimen]) -> String {
    let mut lines = vec![format!("wire {}", wire::WIRE_VERSION)];
    for specimen in specimens {
        let hash = blake3::hash(&specimen.bytes).to_hex();
        lines.push(format!("{} {:>5} {}", &hash[..32], specimen.bytes.len(), file_of(specimen)));
    }
    for (what, id) in specimens::ids() {
        lines.push(format!("id {what} {id}"));
    }
    lines.join("\n") + "\n"
}

/// Every file in the folder, by its path below it.
fn on_disk() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let formats = fs::read_dir(folder()).into_iter().flatten();
    for format in formats.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        for file in fs::read_dir(&format).unwrap() {
            let path = file.unwrap().path();
            let name = path.strip_prefix(folder()).unwrap().to_str().unwrap().to_owned();
            files.insert(name, fs::read(&path).unwrap());
        }
    }
    files
}

fn bless(folder: &Path, specimens: &[Specimen]) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
    for specimen in specimens {
        let path = folder.join(file_of(specimen));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &specimen.bytes).unwrap();
    }
    fs::write(folder.join("MANIFEST"), manifest(specimens)).unwrap();
}

#[test]
fn vectors_on_disk_are_what_the_specimens_encode_to() {
    let specimens = specimens::all();
    let mut found = on_disk();
    let mut wrong = Vec::new();
    for specimen in &specimens {
        let file = file_of(specimen);
        match found.remove(&file) {
            None => wrong.push(format!("{file} is not there")),
            Some(bytes) if bytes != specimen.bytes => wrong.push(format!("{file} differs")),
            Some(_) => {}
        }
    }
    wrong.extend(found.keys().map(|file| format!("{file} is of nothing")));
    let kept = fs::read_to_string(folder().join("MANIFEST")).unwrap_or_default();
    let made = manifest(&specimens);
    for line in made.lines().filter(|line| !kept.contains(line)) {
        wrong.push(format!("not in the manifest: {line}"));
    }
    if kept.lines().count() != made.lines().count() {
        wrong.push("the manifest has more or fewer lines".to_owned());
    }
    assert!(
        wrong.is_empty(),
        "a format is not what it was: nodes of two versions, and the journals of this one, would \
         not be understood. If that is meant, raise the version of what changed and then write \
         the vectors anew with\n    {BLESS}\n{}",
        wrong.join("\n")
    );
}

#[test]
fn every_vector_reads_as_what_it_was_and_is_written_the_same() {
    for (file, bytes) in on_disk() {
        let (format, name) = file.split_once('/').unwrap();
        let format = formats::ALL.iter().find(|f| f.name == format);
        let format = format.unwrap_or_else(|| panic!("{file}: add its format to formats.rs"));
        let written = (format.recode)(&bytes);
        match (format.name, name) {
            // People write in many ways, and it is shown in one.
            ("request", "wrong.bin") => assert!(written.is_err(), "{file}"),
            ("request", _) => {
                let once = written.unwrap_or_else(|e| panic!("{file}: {e}"));
                assert_eq!((format.recode)(&once).as_ref(), Ok(&once), "{file}");
            }
            _ => assert_eq!(written.as_ref(), Ok(&bytes), "{file}"),
        }
    }
}

#[test]
fn every_format_has_vectors() {
    let with: BTreeSet<&str> = specimens::all().iter().map(|specimen| specimen.format).collect();
    let all: BTreeSet<&str> = formats::ALL.iter().map(|format| format.name).collect();
    assert_eq!(with, all);
}

/// A new variant of [`Message`], [`Slot`] or [`Soft`] does not compile here until it is named,
/// and then fails until it has a specimen.
#[test]
fn every_message_slot_and_piece_of_soft_state_has_a_vector() {
    fn slot_name(slot: &Slot) -> &'static str {
        match slot {
            Slot::Genesis => "genesis",
            Slot::Statement(_) => "statement",
            Slot::Record(_) => "record",
            Slot::Hold(_) => "hold",
            Slot::Work(..) => "work",
            Slot::Tombstone(..) => "tombstone",
            Slot::End(..) => "end",
            Slot::Term(_) => "term",
            Slot::Refused(_) => "refused",
        }
    }
    fn soft_name(soft: &Soft) -> &'static str {
        match soft.piece() {
            Piece::Advert(_) => "advert",
            Piece::Head(_) => "head",
            Piece::Statement(_) => "statement",
        }
    }
    let specimens = specimens::all();
    let of = |format: &str| -> BTreeMap<String, Vec<u8>> {
        let of_format = specimens.iter().filter(|specimen| specimen.format == format);
        of_format.map(|specimen| (specimen.name.clone(), specimen.bytes.clone())).collect()
    };
    for (name, bytes) in of("slot") {
        assert_eq!(slot_name(&wire::decode(&bytes).unwrap()), name);
    }
    for (name, bytes) in of("soft") {
        assert_eq!(soft_name(&wire::decode(&bytes).unwrap()), name);
    }
    for message in specimens::messages() {
        assert!(of("message").contains_key(message.name()), "{}", message.name());
    }
}

/// Of every enum that any vector contains, however deep inside: all its variants occur.
#[test]
fn no_variant_of_any_type_is_without_a_vector() {
    let seen = variants::of_all(&specimens::all());
    let missing: Vec<String> = seen
        .iter()
        .flat_map(|(name, seen)| {
            let absent = seen.all.iter().enumerate().filter(|(i, _)| !seen.met.contains(i));
            absent.map(move |(_, variant)| format!("{name}::{variant}"))
        })
        .collect();
    assert!(missing.is_empty(), "add to specimens.rs: {missing:?}");
    // The walk does see what is deep inside.
    for name in ["Message", "Slot", "Piece", "Kind", "LinkProof", "Ending", "RefusalCode", "Phase"]
    {
        assert!(seen.contains_key(name), "{name} was not met: {:?}", seen.keys());
    }
    assert_eq!(seen["Message"].all.len(), specimens::messages().len());
}

// ---- what vectors prove ---------------------------------------------------------------

fn vector(file: &str) -> Vec<u8> {
    fs::read(folder().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn of_anybody(_: UserId) -> bool {
    true
}

#[test]
fn ids_follow_from_the_vectors() {
    let signed: SignedBytes = wire::decode(&vector("signed/job-spec.bin")).unwrap();
    let spec = VerifiedSpec::verify(signed).unwrap();
    assert_eq!(spec.job, JobId::of(&vector("job-spec/full.bin")));
    assert_eq!(PoolId::of(&vector("genesis/lab.bin")), spec.spec.pool);
    let manifest = fs::read_to_string(folder().join("MANIFEST")).unwrap();
    for line in [format!("id job {}", spec.job), format!("id pool {}", spec.spec.pool)] {
        assert!(manifest.lines().any(|kept| kept == line), "{line}");
    }
}

#[test]
fn signed_vectors_hold_in_their_domain_and_in_no_other() {
    let domain_of = |name: &str| match name.split('-').next().unwrap() {
        "statement" => Domain::Statement,
        "invite" => Domain::InviteProof,
        "join" => Domain::JoinProof,
        "advert" => Domain::Advert,
        "job" => Domain::JobSpec,
        "user" => Domain::UserRequest,
        "receipt" => Domain::Receipt,
        "head" => Domain::Head,
        "force" => Domain::ForceRecover,
        other => panic!("which domain is {other} signed in?"),
    };
    // Exhaustive, so that a new domain is noticed.
    let index = |domain| match domain {
        Domain::Statement => 0,
        Domain::InviteProof => 1,
        Domain::JoinProof => 2,
        Domain::Advert => 3,
        Domain::JobSpec => 4,
        Domain::UserRequest => 5,
        Domain::Receipt => 6,
        Domain::Head => 7,
        Domain::ForceRecover => 8,
    };
    let domains = [
        Domain::Statement,
        Domain::InviteProof,
        Domain::JoinProof,
        Domain::Advert,
        Domain::JobSpec,
        Domain::UserRequest,
        Domain::Receipt,
        Domain::Head,
        Domain::ForceRecover,
    ];
    let mut used = BTreeSet::new();
    for (file, bytes) in on_disk() {
        let Some(name) = file.strip_prefix("signed/") else { continue };
        let signed: SignedBytes = wire::decode(&bytes).unwrap();
        let own = domain_of(name.trim_end_matches(".bin"));
        used.insert(index(own));
        for domain in domains {
            assert_eq!(signed.verify(domain).is_ok(), domain == own, "{file} as {domain:?}");
        }
    }
    assert_eq!(used.len(), domains.len(), "a domain has no vector");
    let claim: SignedClaim = wire::decode(&vector("signed-claim/claim.bin")).unwrap();
    assert_eq!(claim.open().unwrap().to_bytes(), vector("claim/claim.bin"));
}

#[test]
fn certificates_hold_and_with_any_byte_changed_do_not() {
    let spec = specimens::verified_spec();
    let holds = |bytes: &[u8]| -> Option<Value> {
        let certificate: Certificate = wire::decode(bytes).ok()?;
        certificate.verify(&spec, of_anybody).ok()
    };
    for (name, certificate) in specimens::certificates() {
        let bytes = vector(&format!("certificate/{name}.bin"));
        assert_eq!(wire::decode(&bytes).as_ref(), Ok(&certificate), "{name}");
        let value = holds(&bytes).unwrap_or_else(|| panic!("{name} does not hold"));
        assert_eq!(wire::encode(&value), certificate.value_bytes);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            assert_eq!(holds(&changed), None, "{name} with byte {at} changed");
        }
        let proved_by_user =
            |link: &p2pit_protocol::record::Link| matches!(link.proof, LinkProof::Forced(_));
        let verified = certificate.verify(&spec, |_| false);
        assert_eq!(verified.is_ok(), !certificate.links.iter().any(proved_by_user), "{name}");
        let keepers = follow(&spec, &certificate.links, of_anybody).unwrap();
        for receipt in &certificate.receipts {
            assert!(check_receipt(receipt, &keepers).is_some(), "{name}");
            assert_eq!(check_receipt(receipt, &[]), None, "{name}");
        }
    }
}

#[test]
fn the_statements_make_a_roster_and_an_empty_book_takes_the_journal_back() {
    let mut roster = Roster::new(vector("genesis/lab.bin")).unwrap();
    for (name, _) in specimens::statements() {
        let signed = wire::decode(&vector(&format!("signed/statement-{name}.bin"))).unwrap();
        let inserted = roster.insert(signed).unwrap();
        assert!(roster.applies(inserted.id), "{name}");
    }
    assert_eq!(roster.len(), specimens::statements().len());

    let mut peer = Peer::new(Config {
        key: specimens::node_key(1),
        store: p2pit_protocol::StoreId([1; 16]),
        boot: p2pit_protocol::BootId([1; 16]),
        boot_count: 1,
        genesis: specimens::genesis_bytes(),
        client: false,
        seed: [0; 32],
        sabotage: Sabotage::default(),
    })
    .unwrap();
    let now = Now { boot_ms: 3_600_000, wall_ms: specimens::WALL_MS };
    for (name, slot, value) in specimens::journal() {
        let key = vector(&format!("slot/{name}.bin"));
        assert_eq!(key, slot.to_bytes());
        peer.restore(&key, &value, now).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    peer.restored().unwrap();
    let (holds, works) = peer.book();
    assert_eq!((holds.count(), works.count()), (1, 1));
    assert_eq!(peer.records().count(), 1);
    let statement: SignedBytes = wire::decode(&vector("signed/statement-invite.bin")).unwrap();
    assert!(peer.roster().contains(Statement::id(&statement)));
}

/// What is private to its module is journalled in the form the vectors have.
#[test]
fn a_refusal_is_journalled_in_the_form_of_its_vector() {
    let stranger = KeyPair::from_seed(&[99; 32]);
    let mut peer = Peer::new(Config {
        key: specimens::node_key(1),
        store: p2pit_protocol::StoreId([1; 16]),
        boot: p2pit_protocol::BootId([1; 16]),
        boot_count: 1,
        genesis: specimens::genesis_bytes(),
        client: false,
        seed: [0; 32],
        sabotage: Sabotage::default(),
    })
    .unwrap();
    let now = Now { boot_ms: 3_600_000, wall_ms: specimens::WALL_MS };
    for (_, signed) in specimens::statements() {
        peer.restore(
            &Slot::Statement(Statement::id(&signed)).to_bytes(),
            &wire::encode(&signed),
            now,
        )
        .unwrap();
    }
    peer.restored().unwrap();
    let mut spec = specimens::job_spec();
    spec.owner = UserId(stranger.public());
    let spec = SignedBytes::sign(&stranger, Domain::JobSpec, spec.to_bytes());
    let job = JobId::of(&spec.bytes);
    peer.handle_message(
        peer.id(),
        Message::Init { spec, receipts: Vec::new(), refused: None },
        now,
    );
    let key = Slot::Refused(job).to_bytes();
    let write = core::iter::from_fn(|| peer.poll_write()).find(|write| write.key == key);
    let value = write.expect("the refusal is journalled").value.unwrap();
    let (until_ms, reason): (u64, String) = wire::decode(&value).unwrap();
    assert!(until_ms > specimens::WALL_MS);
    assert!(reason.contains("not a user of this pool"), "{reason}");
}
