//! TLS on the edge's listeners: rustls with ring, certificates chosen by SNI and exchanged without a restart.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use pingora::listeners::tls::Acceptor;
use rustls::ServerConfig;
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;

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

/// The TLS side of a listener. [`EdgeTls::reload`] exchanges what new connections get; open ones keep theirs.
pub struct EdgeTls {
    settings: TlsSettings,
    acceptor: ArcSwap<Acceptor>,
}

/// Why certificates could not be used.
#[derive(Debug)]
pub struct TlsError {
    /// The file at fault.
    pub file: PathBuf,
    /// What is wrong with it. Never a key's content.
    pub what: String,
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.what)
    }
}

impl std::error::Error for TlsError {}

impl fmt::Debug for EdgeTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EdgeTls")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl EdgeTls {
    /// Reads the certificates.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub fn load(settings: TlsSettings) -> Result<Self, TlsError> {
        let acceptor = ArcSwap::from_pointee(acceptor(&settings)?);
        Ok(EdgeTls { settings, acceptor })
    }

    /// Reads the certificates again. What was served before stays in force if one of them cannot be used.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.acceptor.store(Arc::new(acceptor(&self.settings)?));
        Ok(())
    }

    /// The acceptor for the next connection.
    pub(super) fn acceptor(&self) -> Arc<Acceptor> {
        self.acceptor.load_full()
    }
}

fn acceptor(settings: &TlsSettings) -> Result<Acceptor, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificates = settings
        .certificates
        .iter()
        .map(|files| certified_key(files, &provider))
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
            let fail = |what: String| TlsError {
                file: file.clone(),
                what,
            };
            let mut roots = rustls::RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(file).map_err(|error| fail(error.to_string()))? {
                let certificate = certificate.map_err(|error| fail(error.to_string()))?;
                roots.add(certificate).map_err(|error| fail(error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| fail(error.to_string()))?;
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
    Ok(Acceptor::from_server_config(Arc::new(config)))
}

fn certified_key(files: &CertificateFiles, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, TlsError> {
    let fail = |what: String| TlsError {
        file: files.chain.clone(),
        what,
    };
    let chain = CertificateDer::pem_file_iter(&files.chain)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|error| fail(error.to_string()))?;
    let leaf = chain
        .first()
        .ok_or_else(|| fail("no certificate in this file".to_owned()))?;
    ParsedCertificate::try_from(leaf).map_err(|error| fail(error.to_string()))?;
    let key_fail = |what: String| TlsError {
        file: files.key.clone(),
        what,
    };
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| key_fail(error.to_string()))?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| key_fail(error.to_string()))?;
    let certified = CertifiedKey::new(chain, key);
    certified
        .keys_match()
        .map_err(|_| key_fail(format!("this key does not belong to {}", files.chain.display())))?;
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
