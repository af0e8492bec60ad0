//! What is fuzzed: each target takes any bytes, and asserts what must hold for all of them. Run by cargo-fuzz
//! (`fuzz_targets/`) and, with a generator, by `tests/fuzz_smoke.rs`.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use tollgate::clock::Clock;
use tollgate::gate::key::{Checksum, Foreign, KeyForms};
use tollgate::gate::{FailedAttemptsSettings, Gate, credential};
use tollgate::proxy::client_address::{TrustedProxies, client_address, forwarded_fields, parse_proxy_header};
use tollgate::proxy::frames::{FrameLimits, FrameWatch};
use tollgate::proxy::guard::PaceLimits;
use tollgate::proxy::strict::{BodyFraming, ChunkCheck, HeadCheck, HeadLimits, PathRules, check_head, check_target};
use tollgate::{config, feed, gate, meter};

/// A target: a name, and the function.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("chunks", chunks),
    ("config", config),
    ("credential", credential),
    ("feed_lines", feed_lines),
    ("forwarded", forwarded),
    ("frames", frames),
    ("journal", journal),
    ("key_form", key_form),
    ("path", path),
    ("proxy_header", proxy_header),
    ("spool", spool),
    ("strict_head", strict_head),
];

const LIMITS: HeadLimits = HeadLimits {
    bytes: 32 * 1024,
    fields: 100,
    target_bytes: 8192,
    paths: PathRules::Strict,
};

/// A target that passes has one reading: decoding it, once or twice, moves no segment.
pub fn path(data: &[u8]) {
    let strict = check_target(data, PathRules::Strict);
    let relaxed = check_target(data, PathRules::Relaxed);
    if relaxed.is_ok() {
        let path = data.split(|b| *b == b'?').next().unwrap_or_default();
        for segment in decode(path).split(|b| matches!(b, b'/' | b'\\')) {
            let stem = segment.split(|b| *b == b';').next().unwrap_or_default();
            assert!(stem != b"." && stem != b"..", "dots pass");
        }
    }
    if strict.is_err() {
        return;
    }
    assert!(relaxed.is_ok(), "strict is stricter");
    let text = std::str::from_utf8(data).expect("what passes is ASCII");
    let uri: Uri = text.parse().expect("what passes is a target for other parsers, too");
    assert_eq!(
        uri.path_and_query().map(|target| target.as_str()),
        Some(text),
        "and it is the same target"
    );
    assert!(uri.authority().is_none());
    let path = text.split('?').next().unwrap_or_default().as_bytes();
    let once = decode(path);
    let twice = decode(&once);
    assert!(std::str::from_utf8(&once).is_ok());
    let segments = |path: &[u8]| path.iter().filter(|b| **b == b'/').count();
    for decoded in [&once, &twice] {
        assert_eq!(segments(decoded), segments(path), "a slash appeared");
        assert!(decoded.iter().all(|b| *b >= 0x20 && *b != 0x7f && *b != b'\\'));
        let inner: Vec<&[u8]> = decoded[1..].split(|b| *b == b'/').collect();
        for (i, segment) in inner.iter().enumerate() {
            assert!(*segment != b"." && *segment != b"..");
            assert!(!segment.is_empty() || i == inner.len() - 1, "an empty segment");
        }
    }
}

fn decode(bytes: &[u8]) -> Vec<u8> {
    let digit = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    let mut decoded = Vec::new();
    let mut i = 0;
    while i < bytes.len() {
        let pair = (
            bytes.get(i + 1).copied().and_then(digit),
            bytes.get(i + 2).copied().and_then(digit),
        );
        match (bytes[i], pair) {
            (b'%', (Some(high), Some(low))) => {
                decoded.push(high << 4 | low);
                i += 3;
            }
            (b, _) => {
                decoded.push(b);
                i += 1;
            }
        }
    }
    decoded
}

/// A head that passes is read by httparse in the same way, and does not depend on how it is cut.
pub fn strict_head(data: &[u8]) {
    let whole = check_head(data, LIMITS);
    let mut check = HeadCheck::new(LIMITS);
    let cut = data.len() / 2;
    let resumed = match check.resume(&data[..cut]) {
        Ok(None) => match check.resume(data) {
            Ok(Some(framing)) => Some(Ok(framing)),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        },
        Ok(Some(framing)) => Some(Ok(framing)),
        Err(error) => Some(Err(error)),
    };
    match resumed {
        Some(resumed) => assert_eq!(resumed, whole, "the cut mattered"),
        None => assert!(whole.is_err()),
    }
    let Ok(framing) = whole else { return };
    let mut fields = [httparse::EMPTY_HEADER; 101];
    let mut request = httparse::Request::new(&mut fields);
    let parsed = request.parse(data).expect("another parser accepts it");
    assert_eq!(
        parsed,
        httparse::Status::Complete(framing.head_bytes),
        "and it ends at the same place"
    );
    let named = |name: &str| {
        let of = |field: &&httparse::Header<'_>| field.name.eq_ignore_ascii_case(name);
        request
            .headers
            .iter()
            .filter(of)
            .map(|field| field.value)
            .collect::<Vec<_>>()
    };
    assert_eq!(named("host").len(), 1);
    let (lengths, encodings) = (named("content-length"), named("transfer-encoding"));
    match framing.body {
        BodyFraming::Chunked => assert!(lengths.is_empty() && encodings == [b"chunked"] && request.version == Some(1)),
        BodyFraming::Length(length) => {
            assert!(encodings.is_empty() && lengths.len() <= 1);
            let said = lengths
                .first()
                .map_or(0, |value| std::str::from_utf8(value).unwrap().parse::<u64>().unwrap());
            assert_eq!(length, said);
        }
    }
    if framing.is_plain {
        // What goes upstream is cut out by us, and is what another parser finds.
        let plain = check.plain_head(data).expect("it is plain");
        assert_eq!(Some(plain.method()), request.method.map(str::as_bytes));
        assert_eq!(Some(plain.target()), request.path.map(str::as_bytes));
        let cut = plain.fields().map(|(name, value)| (name.to_vec(), value.to_vec()));
        let found = request
            .headers
            .iter()
            .map(|field| (field.name.as_bytes().to_vec(), field.value.to_vec()));
        assert_eq!(cut.collect::<Vec<_>>(), found.collect::<Vec<_>>());
    }
    let mut target = request.path.expect("a complete request has a target");
    if let Some((start, end)) = framing.authority {
        let (url, authority) = (target, named("host")[0]);
        target = &target[end - start..];
        assert!(
            url[..end - start]
                .to_ascii_lowercase()
                .as_bytes()
                .ends_with(&authority.to_ascii_lowercase())
        );
    }
    assert!(target == "*" || check_target(target.as_bytes(), PathRules::Strict).is_ok());
    for field in request.headers.iter() {
        assert!(field.value.iter().all(|b| (*b >= 0x20 && *b != 0x7f) || *b == b'\t'));
    }
}

/// Chunks end at the same place however they are cut, and their sizes are what httparse reads.
pub fn chunks(data: &[u8]) {
    let mut whole = ChunkCheck::default();
    let end = whole.advance(data);
    let mut parts = ChunkCheck::default();
    let mut consumed = 0;
    let mut failed = None;
    for part in data.chunks(3) {
        if parts.is_done() {
            break;
        }
        match parts.advance(part) {
            Ok(used) => consumed += used,
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    match end {
        Err(error) => assert_eq!(failed, Some(error)),
        Ok(end) => {
            assert_eq!((failed, consumed, parts.is_done()), (None, end, whole.is_done()));
        }
    }
    if end.is_ok() && whole.is_done() {
        let mut rest = data;
        loop {
            let parsed = httparse::parse_chunk_size(rest).expect("another parser accepts it");
            let httparse::Status::Complete((start, size)) = parsed else {
                panic!("it is complete")
            };
            rest = &rest[start..];
            if size == 0 {
                break;
            }
            rest = &rest[size as usize..];
            assert!(rest.starts_with(b"\r\n"));
            rest = &rest[2..];
        }
    }
}

/// Frames are followed alike however they are cut; no stream of bytes makes the watch panic or grow without bound.
pub fn frames(data: &[u8]) {
    let limits = FrameLimits {
        deadline: Duration::from_secs(10),
        body: PaceLimits {
            grace: Duration::from_secs(20),
            bytes_per_second: 500,
        },
        resets_per_minute: u32::MAX,
        control_frames_per_second: u32::MAX,
        stream_window: 65_535,
    };
    let mut whole = FrameWatch::new(limits);
    let mut parts = FrameWatch::new(limits);
    let (mut at_once, mut in_parts) = (data.to_vec(), data.to_vec());
    let outcome = whole.received(&mut at_once);
    let mut part_outcome = Ok(());
    for part in in_parts.chunks_mut(5) {
        part_outcome = part_outcome.and_then(|()| parts.received(part));
    }
    assert_eq!(outcome, part_outcome);
    if outcome.is_ok() {
        assert_eq!(whole.patience(), parts.patience());
        assert_eq!(at_once, in_parts);
    }
    whole.sent(data);
    let _ = whole.waited(Duration::from_secs(1));
}

/// A stranger is always itself; behind a proxy of ours the client is somebody that the chain names.
pub fn forwarded(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for (i, line) in data.split(|b| *b == b'\n').take(8).enumerate() {
        let name = if i % 2 == 0 { "x-forwarded-for" } else { "forwarded" };
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(HeaderName::from_static(name), value);
        }
    }
    let trusted = TrustedProxies::new(vec!["10.0.0.0/8".parse().expect("a network")]);
    let stranger: IpAddr = "192.0.2.1".parse().expect("an address");
    assert_eq!(client_address(stranger, &headers, &trusted).client, stranger);
    let proxy: IpAddr = "10.0.0.1".parse().expect("an address");
    let found = client_address(proxy, &headers, &trusted);
    let (again, chain, _) = forwarded_fields(proxy, false, &headers, &trusted);
    assert_eq!(found, again);
    let chain = chain.to_str().expect("addresses are ASCII");
    assert!(
        chain.ends_with("10.0.0.1") && chain.starts_with(&found.client.to_string()),
        "{chain}"
    );
    assert!(chain.split(", ").all(|hop| hop.parse::<IpAddr>().is_ok()));
}

/// No PROXY header makes the parser read beyond it.
pub fn proxy_header(data: &[u8]) {
    if let Some((fixed, payload)) = data.split_first_chunk::<16>() {
        let _ = parse_proxy_header(fixed, payload);
    }
}

/// A credential that is found is one that was sent, and two different ones are never taken for one.
pub fn credential(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|b| *b == b'\n').take(6) {
        let (name, value) = match line.split_first() {
            Some((b'A', value)) => ("authorization", value),
            Some((b'K', value)) => ("x-api-key", value),
            _ => continue,
        };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(HeaderName::from_static(name), value);
        }
    }
    if let Ok(found) = credential::find(&headers) {
        let bytes = found.bytes();
        let sent = |value: &HeaderValue| {
            value
                .as_bytes()
                .windows(bytes.len().max(1))
                .any(|window| window == bytes)
                || bytes.is_empty()
        };
        assert!(headers.values().any(sent));
        assert!(
            headers.get_all("x-api-key").iter().count() <= 1,
            "a doubled key is refused"
        );
    }
}

/// A key of ours that is admitted has the right length and alphabet, and no other byte in any place would do.
pub fn key_form(data: &[u8]) {
    let ours = KeyForms::new(["pxk_live_", "pxk_test_"], Checksum::Required, Foreign::Refuse);
    let lax = KeyForms::new(["pxk_live_"], Checksum::Optional, Foreign::Accept);
    let _ = lax.admits(data);
    if ours.admits(data) {
        assert_eq!(data.len(), 9 + 30 + 6);
        assert!(data.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_'));
        let mut changed = data.to_vec();
        for i in 0..changed.len() {
            changed[i] = if changed[i] == b'x' { b'y' } else { b'x' };
            assert!(!ours.admits(&changed), "a CRC finds every change of one byte");
            changed[i] = data[i];
        }
    }
}

/// No text makes the configuration's reader panic, and what it says fits its places.
pub fn config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = config::load_text("fuzz.yaml", &text, Path::new("/nonexistent"), &|_| None);
}

/// Lines are the same however the stream is cut.
pub fn feed_lines(data: &[u8]) {
    let _ = feed::parse::Line::parse(data);
    let lines = |size: usize| {
        let mut splitter = feed::lines::LineSplitter::default();
        let mut lines: Vec<Vec<u8>> = Vec::new();
        for chunk in data.chunks(size) {
            let pushed = splitter.push(chunk, &mut |line: &[u8]| {
                lines.push(line.to_vec());
                Ok::<(), feed::lines::LineTooLong>(())
            });
            if pushed.is_err() {
                return None;
            }
        }
        Some((lines, splitter.rest().to_vec()))
    };
    let (one, three) = (lines(data.len().max(1)), lines(3));
    if one.is_some() && three.is_some() {
        assert_eq!(one, three);
    }
}

/// Nothing that was not written by us, with our token, puts a key into force.
pub fn spool(data: &[u8]) {
    in_scratch(|directory| {
        std::fs::write(directory.join("keys.spool"), data).expect("a scratch file");
        let gate = Arc::new(Gate::new(gate_settings()).expect("settings that name nothing unknown"));
        let settings = feed::Settings::new("fuzz", source(), directory);
        let _ = feed::Feed::new(settings, gate.clone(), Clock::manual(1_800_000_000_000)).load();
        assert_eq!(gate.key_count(), 0);
    });
}

/// Whatever the journal holds, loading it ends, and says what it found. Behind a zero come records that are given the
/// checksums that they need to be believed; anything else is a file as it is.
pub fn journal(data: &[u8]) {
    let sealed = match data.split_first() {
        Some((0, records)) => Some(sealed_journal(records)),
        _ => None,
    };
    in_scratch(|directory| {
        std::fs::write(directory.join("windows.journal"), sealed.as_deref().unwrap_or(data)).expect("a scratch file");
        let settings = meter::Settings::new("fuzz", None, directory);
        let clock = Clock::manual(1_800_000_000_000);
        if let Ok(meter) = meter::Meter::new(settings, gate_with_a_key(), clock) {
            let _ = meter.load_journal();
        }
    });
}

/// Records are separated by 0xff.
fn sealed_journal(records: &[u8]) -> Vec<u8> {
    let mut file = b"TGJOURN\x01".to_vec();
    for record in records.split(|byte| *byte == 0xff) {
        file.extend_from_slice(&(record.len() as u32).to_le_bytes());
        file.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(record).to_le_bytes());
        file.extend_from_slice(record);
    }
    file
}

/// Runs in a directory of its own, which the next input of this thread finds as this one leaves it.
fn in_scratch(run: impl FnOnce(&Path)) {
    // In memory where there is such a place: a disk would be all that is tested.
    let make = || {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        }
        .expect("a scratch directory")
    };
    thread_local! {
        static SCRATCH: std::cell::OnceCell<tempfile::TempDir> = const { std::cell::OnceCell::new() };
    }
    SCRATCH.with(|scratch| run(scratch.get_or_init(make).path()));
}

/// One for all inputs, so that what a journal restores meets what others restored before it.
fn gate_with_a_key() -> Arc<Gate> {
    static GATE: OnceLock<Arc<Gate>> = OnceLock::new();
    let make = || {
        let gate = Gate::new(gate_settings()).expect("settings that name nothing unknown");
        let key = gate::KeyUpdate {
            revision: 1,
            id: "key_1".into(),
            organization: "org_1".into(),
            environment: "live".into(),
            plan: "starter".into(),
            ..gate::KeyUpdate::default()
        };
        let mut resync = gate.resync(1).expect("no other writer");
        resync.add(&key).expect("a key that fits the settings");
        resync.commit(1).expect("the first revision");
        Arc::new(gate)
    };
    GATE.get_or_init(make).clone()
}

fn gate_settings() -> gate::Settings {
    gate::Settings {
        environments: vec![gate::EnvironmentSettings {
            name: "live".into(),
            prefix: "pxk_live_".into(),
            billed: true,
        }],
        checksum: Checksum::Required,
        foreign: Foreign::Refuse,
        tiers: vec![(
            "default".into(),
            gate::limit::Limit::new(100, 3_600_000).expect("a limit"),
        )],
        plans: vec![gate::PlanSettings {
            name: "starter".into(),
            ..gate::PlanSettings::default()
        }],
        routes: vec![],
        default_upstream: "up".into(),
        failed_attempts: FailedAttemptsSettings::default(),
    }
}

/// Made once: its client reads the system's certificates.
fn source() -> feed::Source {
    static SOURCE: OnceLock<feed::Source> = OnceLock::new();
    let make = || {
        let client = feed::http_client("http://127.0.0.1", &feed::Tls::default()).expect("a client");
        feed::Source::http("http://127.0.0.1:1", feed::Token::new("fuzz").expect("a token"), client)
    };
    SOURCE.get_or_init(make).clone()
}
