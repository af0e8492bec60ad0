//! TLS from files: certificates of listeners, chosen by SNI and exchanged without a restart, and what a client trusts
//! and shows. rustls with ring; nothing here listens or connects.
//!
//! [`watch`] looks at the files of all listeners once a second and reads them again when they have changed and hold
//! still, so that a certificate and its key that are written one after the other are taken over together. Whatever is
//! wrong with new files, what was served before stays in force, and the log says why.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// What a TLS listener needs.
#[derive(Clone, Debug)]
pub struct TlsSettings {
    /// Chains and keys. The first is served to clients that send no name, or an unknown one.
    pub certificates: Vec<CertificateFiles>,
    /// Also offer HTTP/2 by ALPN.
    pub http2: bool,
    /// Refuse TLS 1.2.
    pub only_tls13: bool,
    /// Demand a client certificate that one of these authorities issued (a PEM file).
    pub client_authorities: Option<PathBuf>,
}

/// Where a certificate chain (leaf first) and its key lie, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The chain.
    pub chain: PathBuf,
    /// The private key: PKCS #8, PKCS #1 or SEC 1.
    pub key: PathBuf,
}

/// The TLS side of a listener. [`ListenerTls::reload`] exchanges what new connections get; open ones keep theirs.
pub struct ListenerTls {
    settings: TlsSettings,
    served: ArcSwap<Served>,
}

/// What new connections get.
struct Served {
    config: Arc<ServerConfig>,
    /// The end of each leaf's validity, in the order of the settings.
    expiries: Vec<i64>,
}

/// Why certificates could not be used.
#[derive(Debug)]
pub struct TlsError {
    /// The file at fault.
    pub file: PathBuf,
    /// What is wrong with it. Never a key's content.
    pub what: String,
}

impl TlsError {
    fn new(file: &Path, what: impl fmt::Display) -> Self {
        TlsError {
            file: file.to_owned(),
            what: what.to_string(),
        }
    }
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.what)
    }
}

impl std::error::Error for TlsError {}

impl fmt::Debug for ListenerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ListenerTls")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl ListenerTls {
    /// Reads the certificates.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub fn load(settings: TlsSettings) -> Result<Self, TlsError> {
        let served = ArcSwap::from_pointee(read(&settings)?);
        Ok(ListenerTls { settings, served })
    }

    /// Reads the certificates again. What was served before stays in force if one of them cannot be used.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.served.store(Arc::new(read(&self.settings)?));
        Ok(())
    }

    /// Says what [`ListenerTls::reload`] would.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub fn check(&self) -> Result<(), TlsError> {
        read(&self.settings).map(drop)
    }

    /// What the next connection gets.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.served.load().config.clone()
    }

    /// Each certificate's file and the end of its validity, in seconds since the Unix epoch.
    pub fn expiries(&self) -> Vec<(PathBuf, i64)> {
        let files = self.settings.certificates.iter().map(|files| files.chain.clone());
        files.zip(self.served.load().expiries.iter().copied()).collect()
    }

    /// What can be seen from outside of the files: it changes when they are written or replaced.
    fn fingerprint(&self) -> Vec<Option<Seen>> {
        let pairs = self.settings.certificates.iter();
        let files = pairs.flat_map(|files| [&files.chain, &files.key]);
        files
            .chain(&self.settings.client_authorities)
            .map(|file| Seen::of(file))
            .collect()
    }
}

/// A file as it was when it was last looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    inode: u64,
    size: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Seen {
    /// `None` while there is no such file, as between the two steps of a careless replacement.
    fn of(file: &Path) -> Option<Self> {
        let metadata = fs::metadata(file).ok()?;
        Some(Seen {
            inode: metadata.ino(),
            size: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        })
    }
}

/// Reads the certificates of `listeners` again whenever their files change, until it is dropped.
pub async fn watch(listeners: Vec<Arc<ListenerTls>>) {
    struct Watched {
        tls: Arc<ListenerTls>,
        in_force: Vec<Option<Seen>>,
        last: Vec<Option<Seen>>,
    }
    let mut watched: Vec<Watched> = listeners
        .into_iter()
        .map(|tls| Watched {
            in_force: tls.fingerprint(),
            last: tls.fingerprint(),
            tls,
        })
        .collect();
    loop {
        tokio::time::sleep(LOOKED_AT_EVERY).await;
        for watched in &mut watched {
            let now = watched.tls.fingerprint();
            let holds_still = now == watched.last;
            watched.last.clone_from(&now);
            if now == watched.in_force || !holds_still {
                continue;
            }
            // Also where it fails: it is tried again when the files change again, and said once.
            watched.in_force = now;
            match watched.tls.reload() {
                Ok(()) => {
                    for (file, expires) in watched.tls.expiries() {
                        log::info!(
                            "{} has changed: the new certificate is served, valid until {}",
                            file.display(),
                            jiff::Timestamp::from_second(expires).unwrap_or_default()
                        );
                    }
                }
                Err(error) => log::error!("certificates were not exchanged, the old ones are served on: {error}"),
            }
        }
    }
}

/// A person who renews a certificate waits for it no longer than this twice; a look costs a microsecond a file.
const LOOKED_AT_EVERY: Duration = Duration::from_secs(1);

/// What a client trusts and shows, read and checked.
#[derive(Clone, Debug, Default)]
pub struct ClientFiles {
    /// Authorities (DER) to trust instead of the system's.
    pub authorities: Option<Vec<Vec<u8>>>,
    /// For mutual TLS.
    pub identity: Option<Identity>,
}

/// A certificate chain and its private key.
#[derive(Clone)]
pub struct Identity {
    /// DER, leaf first.
    pub chain: Vec<Vec<u8>>,
    /// DER: PKCS #8, PKCS #1 or SEC 1.
    pub key: Vec<u8>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({} certificates)", self.chain.len())
    }
}

impl ClientFiles {
    /// Reads them.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub fn load(authorities: Option<&Path>, identity: Option<&CertificateFiles>) -> Result<Self, TlsError> {
        let authorities = authorities.map(|file| {
            let chain = certificates(file)?;
            trust(file, &chain)?;
            Ok(chain.iter().map(|certificate| certificate.to_vec()).collect())
        });
        let identity = identity.map(|files| {
            let provider = rustls::crypto::ring::default_provider();
            let certified = certified_key(files, &provider)?;
            let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| TlsError::new(&files.key, error))?;
            Ok(Identity {
                chain: certified.cert.iter().map(|certificate| certificate.to_vec()).collect(),
                key: key.secret_der().to_vec(),
            })
        });
        Ok(ClientFiles {
            authorities: authorities.transpose()?,
            identity: identity.transpose()?,
        })
    }
}

/// Begins an HTTP client of our own for the server at `url`. It follows no redirect, which could carry a token to somebody
/// else. Where no authority is needed none is looked for: a machine that has none is no reason to fail.
pub fn client_of(url: &str) -> reqwest::ClientBuilder {
    // reqwest takes the process's provider. Where one is installed already, that one is kept.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("tollgate/", env!("CARGO_PKG_VERSION")));
    if is_plain(url) {
        builder.tls_certs_only([])
    } else {
        builder
    }
}

/// Whether what lies at `url` is reached without TLS.
pub fn is_plain(url: &str) -> bool {
    url.starts_with("http://")
}

fn read(settings: &TlsSettings) -> Result<Served, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificates = settings
        .certificates
        .iter()
        .map(|files| certified_key(files, &provider))
        .collect::<Result<Vec<_>, _>>()?;
    let expiries = settings
        .certificates
        .iter()
        .zip(&certificates)
        .map(|(files, certified)| expiry(&files.chain, &certified.cert[0]))
        .collect::<Result<Vec<_>, _>>()?;
    let versions: &[&rustls::SupportedProtocolVersion] = if settings.only_tls13 {
        &[&rustls::version::TLS13]
    } else {
        &[&rustls::version::TLS13, &rustls::version::TLS12]
    };
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .expect("ring has cipher suites for TLS 1.2 and 1.3");
    let builder = match &settings.client_authorities {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let roots = trust(file, &self::certificates(file)?)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| TlsError::new(file, error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(BySni { certificates }));
    config.alpn_protocols = if settings.http2 {
        vec![b"h2".to_vec(), b"http/1.1".to_vec()]
    } else {
        vec![b"http/1.1".to_vec()]
    };
    // Resumption by tickets: no state per client.
    if let Ok(ticketer) = rustls::crypto::ring::Ticketer::new() {
        config.ticketer = ticketer;
    }
    Ok(Served {
        config: Arc::new(config),
        expiries,
    })
}

/// The certificates of a PEM file; at least one.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_file_iter(file)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|error| TlsError::new(file, error))?;
    if found.is_empty() {
        return Err(TlsError::new(file, "no certificate in this file"));
    }
    Ok(found)
}

fn trust(file: &Path, authorities: &[CertificateDer<'static>]) -> Result<rustls::RootCertStore, TlsError> {
    let mut roots = rustls::RootCertStore::empty();
    for authority in authorities {
        roots
            .add(authority.clone())
            .map_err(|error| TlsError::new(file, error))?;
        // Parsed as the libraries that will use it do, whose own failure would be a panic.
        expiry(file, authority)?;
    }
    Ok(roots)
}

/// The end of a certificate's validity, in seconds since the Unix epoch.
fn expiry(file: &Path, certificate: &CertificateDer<'_>) -> Result<i64, TlsError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| TlsError::new(file, error))?;
    Ok(parsed.validity().not_after.timestamp())
}

fn certified_key(files: &CertificateFiles, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, TlsError> {
    let chain = certificates(&files.chain)?;
    ParsedCertificate::try_from(&chain[0]).map_err(|error| TlsError::new(&files.chain, error))?;
    for certificate in &chain {
        expiry(&files.chain, certificate)?;
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| TlsError::new(&files.key, error))?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| TlsError::new(&files.key, error))?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| {
        let what = format!("this key does not belong to {}", files.chain.display());
        TlsError::new(&files.key, what)
    })?;
    Ok(Arc::new(certified))
}

/// The certificate whose names cover the one that the client asks for.
#[derive(Debug)]
struct BySni {
    certificates: Vec<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let first = self.certificates.first()?;
        if self.certificates.len() == 1 {
            return Some(first.clone());
        }
        let covering = hello.server_name().and_then(|name| {
            let name = ServerName::try_from(name).ok()?;
            self.certificates.iter().find(|certified| {
                // Parsed anew for each handshake: a microsecond beside the handshake's hundreds.
                ParsedCertificate::try_from(&certified.cert[0])
                    .is_ok_and(|parsed| verify_server_name(&parsed, &name).is_ok())
            })
        });
        Some(covering.unwrap_or(first).clone())
    }
}
