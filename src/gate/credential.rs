//! Which credential a request carries: `x-api-key: K` or `Authorization: Bearer K`.
//!
//! Both are equivalent (RFC 6750 section 2.1 for the second); both with the same K are accepted. Two different
//! ones, or either header twice, are refused: two readers could disagree on whose request it is.

use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderName};

/// The request header that carries an API key on its own.
pub static X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// A key as it was presented: not yet checked, and never to be logged.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Presented<'a> {
    key: &'a [u8],
    /// Whether `Authorization` carried it, and so must not travel upstream.
    in_authorization: bool,
}

impl<'a> Presented<'a> {
    /// The bytes of the key.
    pub fn bytes(&self) -> &'a [u8] {
        self.key
    }

    /// Whether the `Authorization` header carried the key (alone, or beside `x-api-key`). One of another scheme
    /// is not ours and passes on untouched.
    pub fn in_authorization(&self) -> bool {
        self.in_authorization
    }
}

/// Why a request has no one credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoCredential {
    /// Neither header carries a key.
    Missing,
    /// Two different keys, or one of the headers twice.
    Conflicting,
}

/// Finds the one credential of a request.
///
/// One walk over the fields, which are few: asking the map for two names hashes both, and costs twice as much.
///
/// # Errors
/// [`NoCredential`] where there is none, or more than one.
#[inline]
pub fn find(headers: &HeaderMap) -> Result<Presented<'_>, NoCredential> {
    let (mut api_key, mut authorization) = (None, None);
    for (name, value) in headers {
        let found = if *name == X_API_KEY {
            &mut api_key
        } else if *name == AUTHORIZATION {
            &mut authorization
        } else {
            continue;
        };
        if found.replace(value.as_bytes()).is_some() {
            return Err(NoCredential::Conflicting);
        }
    }
    match (api_key, authorization.and_then(bearer_token)) {
        (Some(key), None) => Ok(Presented {
            key,
            in_authorization: false,
        }),
        (None, Some(key)) => Ok(Presented {
            key,
            in_authorization: true,
        }),
        (Some(one), Some(other)) if one == other => Ok(Presented {
            key: one,
            in_authorization: true,
        }),
        (Some(_), Some(_)) => Err(NoCredential::Conflicting),
        (None, None) => Err(NoCredential::Missing),
    }
}

/// The token of a `Bearer` credential: the scheme in any case, then one or more spaces (RFC 9110 section 11.4).
/// `None` where the scheme is another one.
pub(super) fn bearer_token(value: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer";
    let (scheme, rest) = value.split_at_checked(SCHEME.len())?;
    if !scheme.eq_ignore_ascii_case(SCHEME) {
        return None;
    }
    if rest.is_empty() {
        return Some(rest);
    }
    rest.starts_with(b" ").then(|| rest.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    fn key(pairs: &[(&'static str, &'static str)]) -> Result<Vec<u8>, NoCredential> {
        find(&headers(pairs)).map(|presented| presented.bytes().to_vec())
    }

    #[test]
    fn either_header_carries_the_key() {
        for pairs in [
            [("x-api-key", "K")],
            [("authorization", "Bearer K")],
            [("authorization", "bEARER    K")],
            [("authorization", "Bearer K  ")],
        ] {
            assert_eq!(key(&pairs), Ok(b"K".to_vec()), "{pairs:?}");
        }
        assert_eq!(
            key(&[("x-api-key", "K"), ("authorization", "Bearer K")]),
            Ok(b"K".to_vec())
        );
    }

    #[test]
    fn another_scheme_is_not_ours() {
        assert_eq!(key(&[("authorization", "Basic eDp5")]), Err(NoCredential::Missing));
        assert_eq!(key(&[("authorization", "BearerK")]), Err(NoCredential::Missing));
        let both = headers(&[("x-api-key", "K"), ("authorization", "Basic eDp5")]);
        assert!(!find(&both).ok().unwrap().in_authorization());
    }

    #[test]
    fn two_keys_or_a_header_twice_conflict() {
        for pairs in [
            [("x-api-key", "K"), ("authorization", "Bearer L")],
            [("x-api-key", "K"), ("x-api-key", "K")],
            [("authorization", "Bearer K"), ("authorization", "Bearer K")],
            [("authorization", "Bearer K"), ("authorization", "Basic eDp5")],
        ] {
            assert_eq!(key(&pairs), Err(NoCredential::Conflicting), "{pairs:?}");
        }
    }

    #[test]
    fn an_empty_key_is_a_key_that_is_wrong_not_missing() {
        assert_eq!(key(&[("x-api-key", "")]), Ok(vec![]));
        assert_eq!(key(&[("authorization", "Bearer")]), Ok(vec![]));
        assert_eq!(key(&[]), Err(NoCredential::Missing));
    }
}
