//! The path: one spelling for what is matched and forwarded.

use super::Ambiguity;
use super::bytes::{CLASS, PLAIN_PATH, QUERY, hex};

/// How a path is read (`paths` in the configuration).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathRules {
    /// One spelling for each path: the one that is matched is the one that is forwarded.
    #[default]
    Strict,
    /// For upstreams that need `//`, `;`, `%2F` or encodings that are not UTF-8 in a path. Dot segments in any
    /// spelling, backslashes, control bytes and broken percent-encodings are refused all the same.
    Relaxed,
}

/// Checks an origin-form target, `/path?query`: section 8's canonical path. The query may be anything visible but `#`.
///
/// # Errors
/// Why the path could be read as another one.
pub fn check_target(target: &[u8], rules: PathRules) -> Result<(), Ambiguity> {
    if target.first() != Some(&b'/') {
        return Err(Ambiguity::TargetForm);
    }
    let path_end = memchr::memchr(b'?', target).unwrap_or(target.len());
    check_path(&target[..path_end], rules)?;
    for &b in &target[path_end..] {
        if CLASS[b as usize] & QUERY == 0 {
            return Err(if b == b'#' {
                Ambiguity::TargetFragment
            } else {
                Ambiguity::TargetByte
            });
        }
    }
    Ok(())
}

fn check_path(path: &[u8], rules: PathRules) -> Result<(), Ambiguity> {
    let strict = rules == PathRules::Strict;
    let mut i = 0;
    let mut segment_start = 0;
    let mut utf8 = Utf8::default();
    while i < path.len() {
        let b = path[i];
        if b != b'%' && !utf8.is_whole() {
            return Err(Ambiguity::PercentUtf8);
        }
        if CLASS[b as usize] & PLAIN_PATH != 0 {
            i += 1;
            continue;
        }
        match b {
            b'/' => {
                if i > 0 {
                    check_segment(&path[segment_start..i], strict)?;
                }
                segment_start = i + 1;
            }
            b'%' => {
                let byte = percent_byte(path, i)?;
                if strict {
                    utf8 = utf8.push(byte)?;
                }
                match byte {
                    b'\\' => return Err(Ambiguity::PathBackslash),
                    b'.' => return Err(Ambiguity::PathEncodedDot),
                    0..0x20 | 0x7f => return Err(Ambiguity::PathEncodedControl),
                    b'/' if strict => return Err(Ambiguity::PathEncodedSlash),
                    b'/' => {
                        // A slash to whoever decodes before it looks for dots.
                        check_segment(&path[segment_start..i], strict)?;
                        segment_start = i + 3;
                    }
                    b'%' if strict && is_hex_pair(path, i + 3) => return Err(Ambiguity::PercentDouble),
                    b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' if strict => {
                        return Err(Ambiguity::PathEncodedPlain);
                    }
                    _ => {}
                }
                i += 2;
            }
            b'\\' => return Err(Ambiguity::PathBackslash),
            b'#' => return Err(Ambiguity::TargetFragment),
            // Nothing before it: an empty segment to whoever cuts parameters off.
            b';' if strict && i == segment_start => return Err(Ambiguity::PathSemicolon),
            b';' => {}
            _ => return Err(Ambiguity::TargetByte),
        }
        i += 1;
    }
    let last = &path[segment_start..];
    if !last.is_empty() {
        check_segment(last, strict)?;
    }
    if utf8.is_whole() {
        Ok(())
    } else {
        Err(Ambiguity::PercentUtf8)
    }
}

/// What servers that know path parameters (RFC 3986 section 3.3) make of a path with `;`: servlet containers cut each
/// segment at its `;`, others cut the path at the first. `None` where there is no `;`, so that all read the same.
///
/// A path may pass where each of these falls under the rule that the path as it stands falls under.
pub fn without_parameters(path: &str) -> Option<[String; 2]> {
    let first = memchr::memchr(b';', path.as_bytes())?;
    let stems: Vec<&str> = path
        .split('/')
        .map(|segment| segment.split(';').next().unwrap_or(segment))
        .collect();
    Some([stems.join("/"), path[..first].to_owned()])
}

/// A segment that is not the path's (possibly empty) last one, or that is not empty.
fn check_segment(segment: &[u8], strict: bool) -> Result<(), Ambiguity> {
    match segment.first() {
        None => {
            if strict {
                return Err(Ambiguity::PathEmptySegment);
            }
        }
        Some(b'.') => {
            // What stands before a `;`, encoded or not, is the segment to servers that know path parameters.
            let dots = segment.iter().take_while(|b| **b == b'.').count();
            if matches!(&segment[dots..], [] | [b';', ..] | [b'%', b'3', b'b' | b'B', ..]) {
                return Err(Ambiguity::PathDots);
            }
        }
        Some(_) => {}
    }
    Ok(())
}

/// The byte that the percent sign at `at` encodes.
fn percent_byte(path: &[u8], at: usize) -> Result<u8, Ambiguity> {
    match (path.get(at), path.get(at + 1), path.get(at + 2)) {
        (Some(b'%'), Some(high), Some(low)) => match (hex(*high), hex(*low)) {
            (Some(high), Some(low)) => Ok(high << 4 | low),
            _ => Err(Ambiguity::PercentForm),
        },
        _ => Err(Ambiguity::PercentForm),
    }
}

fn is_hex_pair(path: &[u8], at: usize) -> bool {
    path.get(at).is_some_and(u8::is_ascii_hexdigit) && path.get(at + 1).is_some_and(u8::is_ascii_hexdigit)
}

/// Where in a UTF-8 sequence of percent-encoded bytes a path is. Overlong forms such as `%C0%AF` are slashes to some
/// decoders and garbage to others, so only what Unicode's table 3-7 has as well-formed passes.
#[derive(Clone, Copy, Default)]
struct Utf8 {
    /// Continuation bytes to come.
    left: u8,
    /// What the next one may be: `low..=high`. Only the first is ever narrower than 80 to BF.
    low: u8,
    high: u8,
}

impl Utf8 {
    fn is_whole(self) -> bool {
        self.left == 0
    }

    fn push(self, byte: u8) -> Result<Self, Ambiguity> {
        if self.left > 0 {
            return if (self.low..=self.high).contains(&byte) {
                Ok(Utf8 {
                    left: self.left - 1,
                    low: 0x80,
                    high: 0xbf,
                })
            } else {
                Err(Ambiguity::PercentUtf8)
            };
        }
        let (left, low, high) = match byte {
            0..=0x7f => (0, 0, 0),
            0xc2..=0xdf => (1, 0x80, 0xbf),
            0xe0 => (2, 0xa0, 0xbf),
            0xed => (2, 0x80, 0x9f),
            0xe1..=0xef => (2, 0x80, 0xbf),
            0xf0 => (3, 0x90, 0xbf),
            0xf1..=0xf3 => (3, 0x80, 0xbf),
            0xf4 => (3, 0x80, 0x8f),
            _ => return Err(Ambiguity::PercentUtf8),
        };
        Ok(Utf8 { left, low, high })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Result<(), Ambiguity> {
        check_target(text.as_bytes(), PathRules::Strict)
    }

    #[test]
    fn paths_have_one_spelling() {
        for good in [
            "/",
            "/a",
            "/a/",
            "/a/b.c",
            "/.well-known/x",
            "/a..b/...c",
            "/caf%C3%A9",
            "/a%20b",
            "/u/a%40b.c",
            "/a%3Ab",
            "/100%25",
            "/a:b@c,d=e!f$g&h'i(j)k*l+m~n",
            "/a?x=//..%2f;%zz\\",
            "/a;x=1",
            "/a;x=1/b;y",
        ] {
            assert_eq!(path(good), Ok(()), "{good}");
        }
        let bad = [
            ("a", Ambiguity::TargetForm),
            ("//", Ambiguity::PathEmptySegment),
            ("/a//b", Ambiguity::PathEmptySegment),
            ("/a//", Ambiguity::PathEmptySegment),
            ("/.", Ambiguity::PathDots),
            ("/..", Ambiguity::PathDots),
            ("/a/./b", Ambiguity::PathDots),
            ("/a/../b", Ambiguity::PathDots),
            ("/a/.../b", Ambiguity::PathDots),
            ("/a/..?x", Ambiguity::PathDots),
            ("/a/..;/b", Ambiguity::PathDots),
            ("/a/.;x/b", Ambiguity::PathDots),
            ("/a/..;x", Ambiguity::PathDots),
            ("/;x/b", Ambiguity::PathSemicolon),
            ("/a/;", Ambiguity::PathSemicolon),
            ("/a/..%3B/b", Ambiguity::PathDots),
            ("/a\\b", Ambiguity::PathBackslash),
            ("/a%5cb", Ambiguity::PathBackslash),
            ("/a%2Fb", Ambiguity::PathEncodedSlash),
            ("/a%2e%2e/b", Ambiguity::PathEncodedDot),
            ("/a%00", Ambiguity::PathEncodedControl),
            ("/a%0d", Ambiguity::PathEncodedControl),
            ("/a%7f", Ambiguity::PathEncodedControl),
            ("/%61", Ambiguity::PathEncodedPlain),
            ("/a%", Ambiguity::PercentForm),
            ("/a%2", Ambiguity::PercentForm),
            ("/a%zz", Ambiguity::PercentForm),
            ("/a%u002f", Ambiguity::PercentForm),
            ("/a%252f", Ambiguity::PercentDouble),
            ("/a%25%32%66", Ambiguity::PathEncodedPlain),
            ("/a%c0%af", Ambiguity::PercentUtf8),
            ("/a%e9", Ambiguity::PercentUtf8),
            ("/a%ed%a0%80", Ambiguity::PercentUtf8),
            ("/a#b", Ambiguity::TargetFragment),
            ("/a?b#c", Ambiguity::TargetFragment),
            ("/a\"b", Ambiguity::TargetByte),
            ("/a\u{e9}", Ambiguity::TargetByte),
            ("/a?\u{e9}", Ambiguity::TargetByte),
            ("/a|b", Ambiguity::TargetByte),
        ];
        for (text, why) in bad {
            assert_eq!(path(text), Err(why), "{text}");
        }
    }

    #[test]
    fn parameters_are_cut_as_servers_cut_them() {
        assert_eq!(without_parameters("/a/b"), None);
        assert_eq!(
            without_parameters("/a;x=1/b;y;z/c"),
            Some(["/a/b/c".to_owned(), "/a".to_owned()])
        );
    }

    #[test]
    fn relaxed_paths_still_have_no_dots() {
        let relaxed = |text: &str| check_target(text.as_bytes(), PathRules::Relaxed);
        for good in ["/a//b", "/a;x=1/b", "/a%2Fb", "/%61", "/a%252f", "/a%e9"] {
            assert_eq!(relaxed(good), Ok(()), "{good}");
        }
        for bad in [
            "/a/../b",
            "/a/..;x/b",
            "/.;/",
            "/a%2e",
            "/a\\b",
            "/a%5c",
            "/a%00",
            "/a%4",
        ] {
            assert!(relaxed(bad).is_err(), "{bad}");
        }
    }
}
