//! TLS for the data plane: the certificates of libp2p's TLS specification, with the cipher
//! that this machine is fastest at.
//!
//! libp2p's own configuration puts ChaCha20-Poly1305 first. A processor with instructions
//! for AES encrypts two to four times as many bytes with AES-GCM, and on a fast network
//! that is what limits a transfer. The client's order decides in TLS 1.3.

use std::sync::Arc;

use libp2p_tls::certificate;
use quinn::rustls::{
    self, CertificateError, DigitallySignedStruct, DistinguishedName, NoKeyLog, SignatureScheme,
    SupportedCipherSuite,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider,
        aws_lc_rs::{
            self,
            cipher_suite::{
                TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
            },
        },
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// For connections to us: whoever calls proves an identity, which one is judged later.
pub(super) fn server(identity: &libp2p_identity::Keypair) -> Result<rustls::ServerConfig, Failure> {
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(VERSIONS)?
        .with_client_cert_verifier(Arc::new(Verifier))
        .with_cert_resolver(Arc::new(certified(identity)?));
    tls.key_log = Arc::new(NoKeyLog {});
    // A resumed session would skip the proof of identity.
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;
    Ok(tls)
}

/// For connections from us.
pub(super) fn client(identity: &libp2p_identity::Keypair) -> Result<rustls::ClientConfig, Failure> {
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(VERSIONS)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier))
        .with_client_cert_resolver(Arc::new(certified(identity)?));
    tls.key_log = Arc::new(NoKeyLog {});
    tls.resumption = Resumption::disabled();
    tls.enable_early_data = false;
    Ok(tls)
}

const VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = cipher_suites(has_aes());
    provider
}

fn cipher_suites(has_aes: bool) -> Vec<SupportedCipherSuite> {
    let (aes, chacha) =
        ([TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384], [TLS13_CHACHA20_POLY1305_SHA256]);
    match has_aes {
        true => aes.into_iter().chain(chacha).collect(),
        false => chacha.into_iter().chain(aes).collect(),
    }
}

fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has_aes = std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    let has_aes = std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has_aes = false;
    has_aes
}

/// A fresh certificate that binds its key to the identity.
fn certified(identity: &libp2p_identity::Keypair) -> Result<SingleCertAndKey, Failure> {
    let (certificate, key) = certificate::generate(identity)?;
    let key = aws_lc_rs::sign::any_ecdsa_type(&key)?;
    Ok(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key)))
}

/// Accepts whoever proves to hold the identity in the certificate.
#[derive(Debug)]
struct Verifier;

/// Everything that a certificate says is checked where it is parsed: its signature by its
/// own key, and that of the identity over that key.
fn check(
    end_entity: &CertificateDer<'_>,
    more: &[CertificateDer<'_>],
) -> Result<(), rustls::Error> {
    if !more.is_empty() {
        return Err(rustls::Error::General("more than one certificate".to_owned()));
    }
    certificate::parse(end_entity).map(drop).map_err(|_| bad_certificate())
}

fn check_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    let certificate = certificate::parse(certificate).map_err(|_| bad_certificate())?;
    certificate
        .verify_signature(signed.scheme, message, signed.signature())
        .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadSignature))?;
    Ok(HandshakeSignatureValid::assertion())
}

fn bad_certificate() -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

/// What the specification asks implementations to take, RSA left out: identities here are
/// ed25519, and the certificates that we and libp2p make are ECDSA.
fn schemes() -> Vec<SignatureScheme> {
    vec![
        SignatureScheme::ECDSA_NISTP384_SHA384,
        SignatureScheme::ECDSA_NISTP256_SHA256,
        SignatureScheme::ED25519,
    ]
}

fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General("TLS 1.3 or nothing".to_owned()))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        check(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        check(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cipher_is_what_the_processor_is_made_for() {
        let first = |has_aes| cipher_suites(has_aes)[0].suite();
        assert_eq!(first(true), rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert_eq!(first(false), rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
    }

    #[test]
    fn no_change_of_a_certificate_makes_another_identity_of_it() {
        let identity = libp2p_identity::Keypair::ed25519_from_bytes([7; 32]).unwrap();
        let (good, _) = certificate::generate(&identity).unwrap();
        assert!(check(&good, &[]).is_ok());
        assert!(check(&good, std::slice::from_ref(&good)).is_err());
        for at in 0..good.len() {
            let mut bytes = good.to_vec();
            bytes[at] ^= 1;
            let changed = CertificateDer::from(bytes);
            // Some bits of the encoding mean nothing.
            if let Ok(parsed) = certificate::parse(&changed) {
                assert_eq!(parsed.peer_id(), identity.public().to_peer_id(), "{at}");
            }
        }
        assert!(check(&CertificateDer::from(good[..good.len() - 1].to_vec()), &[]).is_err());
    }

    #[test]
    fn a_certificate_without_its_key_is_nobody() {
        let keypair = |seed| libp2p_identity::Keypair::ed25519_from_bytes([seed; 32]).unwrap();
        let (honest, other) = (keypair(1), keypair(2));
        // Somebody shows the certificate that another has shown him.
        let (stolen, _) = certificate::generate(&honest).unwrap();
        let (_, key) = certificate::generate(&other).unwrap();
        let key = aws_lc_rs::sign::any_ecdsa_type(&key).unwrap();
        let stolen = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![stolen], key)));
        let mut thief = client(&other).unwrap();
        thief.client_auth_cert_resolver = Arc::clone(&stolen) as _;
        assert!(shake_hands(thief, server(&honest).unwrap()).is_err());
        let mut thief = server(&other).unwrap();
        thief.cert_resolver = stolen;
        assert!(shake_hands(client(&honest).unwrap(), thief).is_err());
        assert!(shake_hands(client(&honest).unwrap(), server(&other).unwrap()).is_ok());
    }

    fn shake_hands(
        client: rustls::ClientConfig,
        server: rustls::ServerConfig,
    ) -> Result<(), rustls::Error> {
        let name = ServerName::try_from("p2pit").unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = rustls::ServerConnection::new(Arc::new(server)).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut sent = Vec::new();
            client.write_tls(&mut sent).unwrap();
            server.read_tls(&mut &sent[..]).unwrap();
            server.process_new_packets()?;
            let mut sent = Vec::new();
            server.write_tls(&mut sent).unwrap();
            client.read_tls(&mut &sent[..]).unwrap();
            client.process_new_packets()?;
        }
        Ok(())
    }
}
