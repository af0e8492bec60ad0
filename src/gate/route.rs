//! Routes: which rule a request falls under.
//!
//! The rules are compiled into a tree of path segments. Most specific wins, segment by segment from the left:
//! a literal before `*` (one segment) before `**` (the rest, none included); a rule for the request's host
//! before one for any host; a rule that names the method before one for all methods.
//!
//! A literal is compared with the *decoded* segment: `/%72egister` must not slip past the rule for `/register`
//! into a laxer one, because the upstream will decode it. One trailing `/` is ignored for the same reason.
//! Ambiguous paths (dot segments, encoded slashes, …) never get here: `proxy/strict` refuses them.

use super::limit::Limit;
use super::scope::{NameId, NameSet};
use http::{HeaderValue, Method};
use std::collections::HashMap;
use std::sync::Arc;

/// One rule, as the hot path uses it.
#[derive(Debug)]
pub struct Route {
    /// Its name in the configuration.
    pub name: Box<str>,
    /// Who may pass.
    pub access: Access,
    /// Where live requests go.
    pub upstream: Box<str>,
    /// Where requests of sandbox environments go, if elsewhere.
    pub sandbox_upstream: Option<Box<str>>,
    /// Whether `Upgrade` (WebSocket) is let through.
    pub upgrade: bool,
    pub(crate) id: RouteId,
}

/// The number of a rule among those compiled with it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RouteId(pub(crate) u32);

impl Route {
    /// The tier that requests under this rule are counted in, if in any.
    pub fn tier(&self) -> Option<&Tier> {
        match &self.access {
            Access::Public(limit) => limit.as_ref().map(|limit| &*limit.tier),
            Access::Keyed { tier, .. } => Some(tier),
        }
    }
}

/// Who may pass a rule.
#[derive(Debug)]
pub enum Access {
    /// Anybody; with a limit, that many per client address.
    Public(Option<PublicLimit>),
    /// Holders of a key.
    Keyed {
        /// The scope that the key must hold, or any key.
        scope: Option<RequiredScope>,
        /// The bucket that the request is counted in.
        tier: Arc<Tier>,
        /// The environments whose keys may pass, or all.
        environments: Option<NameSet>,
    },
}

/// The limit of a public rule, per client address.
#[derive(Debug)]
pub struct PublicLimit {
    /// The limit.
    pub limit: Limit,
    pub(crate) tier: Arc<Tier>,
}

/// A scope that a rule asks for.
#[derive(Debug)]
pub struct RequiredScope {
    /// Its name, for the challenge.
    pub name: Box<str>,
    pub(crate) id: NameId,
}

/// A bucket of rules that share one limit.
#[derive(Debug)]
pub struct Tier {
    /// Its name, which is also the policy name in `RateLimit-Policy`.
    pub name: Box<str>,
    /// The same, as a value ready to be sent upstream.
    pub header: HeaderValue,
    pub(crate) id: NameId,
}

/// The pattern of a rule: what a request must look like to fall under it.
#[derive(Clone, Debug, Default)]
pub struct Pattern {
    /// The host, without port, or any.
    pub host: Option<String>,
    /// The methods; none listed means all.
    pub methods: Vec<Method>,
    /// The path: literal segments, `*` for one segment, `**` at the end for the rest.
    pub path: String,
}

/// Two rules that match exactly the same requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clash {
    /// The names of the two.
    pub routes: (Box<str>, Box<str>),
}

/// All rules, compiled.
#[derive(Debug, Default)]
pub struct Routes {
    any_host: Node,
    hosts: HashMap<Box<str>, Node>,
}

#[derive(Debug, Default)]
struct Node {
    literals: Vec<(Box<[u8]>, Node)>,
    one: Option<Box<Node>>,
    here: Leaf,
    rest: Leaf,
}

/// The rules that end at one place, those that name methods first.
#[derive(Debug, Default)]
struct Leaf {
    by_method: Vec<(Vec<Method>, Arc<Route>)>,
    all: Option<Arc<Route>>,
}

impl Routes {
    /// Compiles the rules.
    ///
    /// # Errors
    /// [`Clash`] where two rules match the same requests.
    pub fn new(rules: impl IntoIterator<Item = (Pattern, Arc<Route>)>) -> Result<Self, Clash> {
        let mut routes = Routes::default();
        for (pattern, route) in rules {
            let mut node = match &pattern.host {
                Some(host) => routes.hosts.entry(host.to_ascii_lowercase().into()).or_default(),
                None => &mut routes.any_host,
            };
            let mut leaf = None;
            for segment in segments(pattern.path.as_bytes()) {
                match segment {
                    b"**" => leaf = Some(()),
                    b"*" => node = node.one.get_or_insert_default(),
                    literal => node = node.literal_mut(literal),
                }
            }
            let leaf = if leaf.is_some() { &mut node.rest } else { &mut node.here };
            leaf.add(pattern.methods, route)?;
        }
        Ok(routes)
    }

    /// The rule that a request falls under, if any. `host` may carry a port; `path` is without the query.
    #[inline]
    pub fn find(&self, host: &str, path: &str, method: &Method) -> Option<&Arc<Route>> {
        let path = path.as_bytes();
        let escaped = memchr::memchr(b'%', path).is_some();
        if !self.hosts.is_empty()
            && let Some(node) = self.host_node(host)
            && let Some(route) = node.find(rest_of(path), escaped, method)
        {
            return Some(route);
        }
        self.any_host.find(rest_of(path), escaped, method)
    }

    fn host_node(&self, host: &str) -> Option<&Node> {
        let name = match host.rfind(':') {
            // In `[::1]:80` the port follows the bracket, and in `[::1]` there is none.
            Some(colon) if !host[colon..].contains(']') => &host[..colon],
            _ => host,
        };
        let name = name.strip_suffix('.').unwrap_or(name);
        if name.bytes().any(|b| b.is_ascii_uppercase()) {
            return self
                .hosts
                .iter()
                .find(|(host, _)| host.eq_ignore_ascii_case(name))
                .map(|(_, node)| node);
        }
        self.hosts.get(name)
    }
}

impl Node {
    fn literal_mut(&mut self, literal: &[u8]) -> &mut Node {
        let at = match self.literals.iter().position(|(name, _)| **name == *literal) {
            Some(at) => at,
            None => {
                self.literals.push((literal.into(), Node::default()));
                self.literals.len() - 1
            }
        };
        &mut self.literals[at].1
    }

    /// `rest` is what follows this node: `None` at the end of the path, else the remaining segments. `escaped`: there may
    /// be percent-encoding in it.
    fn find(&self, rest: Option<&[u8]>, escaped: bool, method: &Method) -> Option<&Arc<Route>> {
        let (mut node, mut rest) = (self, rest);
        loop {
            let Some(path) = rest else {
                return node.here.find(method).or_else(|| node.rest.find(method));
            };
            match node.literal(path, escaped) {
                // Were nothing found there, there would be nothing to come back for.
                Some((next, after)) if node.one.is_none() && node.rest.is_empty() => (node, rest) = (next, after),
                literal => return node.find_among(literal, path, escaped, method),
            }
        }
    }

    /// The most specific of what this node has.
    fn find_among<'r>(
        &'r self,
        literal: Option<(&'r Node, Option<&[u8]>)>,
        path: &[u8],
        escaped: bool,
        method: &Method,
    ) -> Option<&'r Arc<Route>> {
        if let Some((node, after)) = literal
            && let Some(route) = node.find(after, escaped, method)
        {
            return Some(route);
        }
        if let Some(node) = &self.one
            && let Some(route) = node.find(split(path).1, escaped, method)
        {
            return Some(route);
        }
        self.rest.find(method)
    }

    /// The literal that the first segment is, and what follows. Most segments are compared as they stand, without looking
    /// for their end.
    #[inline]
    fn literal<'p>(&self, path: &'p [u8], escaped: bool) -> Option<(&Node, Option<&'p [u8]>)> {
        self.literals.iter().find_map(|(literal, node)| {
            let after = match path.split_at_checked(literal.len()) {
                Some((segment, after)) if after.first().is_none_or(|next| *next == b'/') && *segment == **literal => {
                    rest_of(after)
                }
                _ if escaped => {
                    let (segment, after) = split(path);
                    decodes_to(segment, literal).then_some(after)?
                }
                _ => return None,
            };
            Some((node, after))
        })
    }
}

impl Leaf {
    fn add(&mut self, methods: Vec<Method>, route: Arc<Route>) -> Result<(), Clash> {
        let clash = |other: &Route| {
            Err(Clash {
                routes: (other.name.clone(), route.name.clone()),
            })
        };
        if methods.is_empty() {
            if let Some(other) = &self.all {
                return clash(other);
            }
            self.all = Some(route);
            return Ok(());
        }
        if let Some((_, other)) = self
            .by_method
            .iter()
            .find(|(held, _)| held.iter().any(|m| methods.contains(m)))
        {
            return clash(other);
        }
        self.by_method.push((methods, route));
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.by_method.is_empty() && self.all.is_none()
    }

    #[inline]
    fn find(&self, method: &Method) -> Option<&Arc<Route>> {
        let named = self
            .by_method
            .iter()
            .find(|(methods, _)| methods.contains(method))
            .map(|(_, route)| route);
        named.or(self.all.as_ref())
    }
}

/// What follows the leading `/`, or `None` where nothing does: `/` and `/a/` end like `` and `/a`.
fn rest_of(path: &[u8]) -> Option<&[u8]> {
    let rest = path.strip_prefix(b"/").unwrap_or(path);
    (!rest.is_empty()).then_some(rest)
}

fn segments(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    rest_of(path)
        .into_iter()
        .flat_map(|rest| rest.split(|b| *b == b'/'))
        .filter(|segment| !segment.is_empty())
}

/// The first segment, and what follows it.
fn split(path: &[u8]) -> (&[u8], Option<&[u8]>) {
    match path.iter().position(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], rest_of(&path[slash..])),
        None => (path, None),
    }
}

/// Whether a segment is the literal once its percent-encoding is undone.
fn decodes_to(segment: &[u8], literal: &[u8]) -> bool {
    if segment.len() <= literal.len() {
        return segment == literal;
    }
    let mut rest = segment;
    for expected in literal {
        let decoded = match rest {
            [b'%', high, low, after @ ..] => match (hex_digit(*high), hex_digit(*low)) {
                (Some(high), Some(low)) => {
                    rest = after;
                    high << 4 | low
                }
                _ => return false,
            },
            [byte, after @ ..] => {
                rest = after;
                *byte
            }
            [] => return false,
        };
        if decoded != *expected {
            return false;
        }
    }
    rest.is_empty()
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(patterns: &[(&str, &[Method], Option<&str>)]) -> Routes {
        Routes::new(patterns.iter().map(|(path, methods, host)| {
            let name = format!("{} {path} {}", host.unwrap_or(""), methods.len());
            let pattern = Pattern {
                host: host.map(str::to_owned),
                methods: methods.to_vec(),
                path: (*path).to_owned(),
            };
            (pattern, Arc::new(route(&name)))
        }))
        .unwrap()
    }

    fn route(name: &str) -> Route {
        Route {
            name: name.into(),
            access: Access::Public(None),
            upstream: "up".into(),
            sandbox_upstream: None,
            upgrade: false,
            id: RouteId::default(),
        }
    }

    fn found(routes: &Routes, host: &str, path: &str, method: Method) -> Option<String> {
        routes.find(host, path, &method).map(|route| route.name.to_string())
    }

    #[test]
    fn the_most_specific_rule_wins() {
        let routes = routes(&[
            ("/**", &[], None),
            ("/a/**", &[], None),
            ("/a/*", &[], None),
            ("/a/b", &[], None),
            ("/a/b", &[Method::POST], None),
            ("/a/*/c", &[], None),
        ]);
        for (path, method, expected) in [
            ("/", Method::GET, " /** 0"),
            ("/x", Method::GET, " /** 0"),
            ("/a", Method::GET, " /a/** 0"),
            ("/a/", Method::GET, " /a/** 0"),
            ("/a/b", Method::GET, " /a/b 0"),
            ("/a/b/", Method::GET, " /a/b 0"),
            ("/a/b", Method::POST, " /a/b 1"),
            ("/a/x", Method::GET, " /a/* 0"),
            ("/a/x/c", Method::GET, " /a/*/c 0"),
            ("/a/b/c", Method::GET, " /a/*/c 0"),
            ("/a/b/d", Method::GET, " /a/** 0"),
            ("/ab", Method::GET, " /** 0"),
        ] {
            assert_eq!(
                found(&routes, "h", path, method.clone()).as_deref(),
                Some(expected),
                "{method} {path}"
            );
        }
    }

    #[test]
    fn a_rule_that_does_not_name_the_method_is_passed_over() {
        let routes = routes(&[("/**", &[], None), ("/a/check", &[Method::POST], None)]);
        assert_eq!(
            found(&routes, "h", "/a/check", Method::POST).as_deref(),
            Some(" /a/check 1")
        );
        assert_eq!(found(&routes, "h", "/a/check", Method::GET).as_deref(), Some(" /** 0"));
    }

    #[test]
    fn an_encoded_literal_falls_under_the_same_rule() {
        let routes = routes(&[("/**", &[], None), ("/register", &[], None)]);
        for path in [
            "/register",
            "/%72egister",
            "/%72%65gister",
            "/registe%72",
            "/%72%65%67%69%73%74%65%72",
        ] {
            assert_eq!(
                found(&routes, "h", path, Method::GET).as_deref(),
                Some(" /register 0"),
                "{path}"
            );
        }
        for path in ["/%52egister", "/register%20", "/registe%7", "/Register"] {
            assert_eq!(
                found(&routes, "h", path, Method::GET).as_deref(),
                Some(" /** 0"),
                "{path}"
            );
        }
    }

    #[test]
    fn a_host_of_its_own_comes_first_whatever_its_case_and_port() {
        let routes = routes(&[("/**", &[], None), ("/a", &[], Some("api.example.com"))]);
        for host in [
            "api.example.com",
            "API.example.com:8080",
            "api.example.com.",
            "api.example.com:443",
        ] {
            assert_eq!(
                found(&routes, host, "/a", Method::GET).as_deref(),
                Some("api.example.com /a 0"),
                "{host}"
            );
            assert_eq!(
                found(&routes, host, "/b", Method::GET).as_deref(),
                Some(" /** 0"),
                "{host}"
            );
        }
        assert_eq!(found(&routes, "[::1]:80", "/a", Method::GET).as_deref(), Some(" /** 0"));
    }

    #[test]
    fn two_equal_rules_clash() {
        let pattern = Pattern {
            path: "/a/**".into(),
            ..Pattern::default()
        };
        let clash = Routes::new([
            (pattern.clone(), Arc::new(route("one"))),
            (pattern, Arc::new(route("two"))),
        ])
        .unwrap_err();
        assert_eq!(clash.routes, ("one".into(), "two".into()));
    }

    #[test]
    fn nothing_matches_where_no_rule_does() {
        assert_eq!(found(&routes(&[("/a", &[], None)]), "h", "/b", Method::GET), None);
    }
}
