//! Routes: what they match, what they ask for, where they go.

use super::super::fault::{Path, did_you_mean};
use super::super::file;
use super::super::scalar::host_name;
use super::super::settings::{Access, PathPattern, PublicLimit, Route, Segment};
use super::upstreams::CONTROL;
use super::{Resolver, names_of};

/// The tier of a route that names none.
pub(super) const DEFAULT_TIER: &str = "default";

/// Methods that a rule can match: those of RFC 9110, PATCH, QUERY and WebDAV's.
const METHODS: [&str; 20] = [
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "OPTIONS",
    "QUERY",
    "PROPFIND",
    "PROPPATCH",
    "MKCOL",
    "COPY",
    "MOVE",
    "LOCK",
    "UNLOCK",
    "REPORT",
    "SEARCH",
    "PURGE",
    "LINK",
    "UNLINK",
];

/// What routes refer to.
struct Names<'a> {
    scopes: Vec<&'a str>,
    tiers: Vec<&'a str>,
    environments: Vec<&'a str>,
    upstreams: Vec<&'a str>,
    default_upstream: Option<&'a str>,
}

impl Resolver {
    pub(super) fn routes(&mut self, file: &file::File) -> Vec<Route> {
        let root = Path::root().key("routes");
        let mut upstreams = names_of(&file.upstreams);
        let default_upstream = self.default_upstream(file, &upstreams);
        if file.control.is_some() && !upstreams.contains(&CONTROL) {
            upstreams.push(CONTROL);
        }
        let names = Names {
            scopes: match &file.scopes {
                file::Scopes::List(list) => list
                    .iter()
                    .map(|scope| match scope {
                        file::Scope::Name(name) => name.as_str(),
                        file::Scope::Described(scope) => scope.name.as_str(),
                    })
                    .collect(),
                file::Scopes::Described(named) => names_of(named),
            },
            tiers: names_of(&file.tiers),
            environments: names_of(&file.keys.environments.0),
            upstreams,
            default_upstream,
        };
        let mut resolved: Vec<Route> = Vec::new();
        for (index, route) in file.routes.iter().enumerate() {
            let path = root.index(index);
            let route = self.route(&path, route, &names);
            self.apart_from(&path, &route, &resolved);
            resolved.push(route);
        }
        if file.gate.is_some() && !resolved.iter().any(Route::is_catch_all) {
            match names.default_upstream {
                Some(upstream) => resolved.push(default_rule(upstream)),
                None if self.is_faulty(&Path::root().key("upstreams")) => {}
                None => self.fault(
                    &root,
                    "nothing says where requests go that no route matches: add {name: default, match: {path: \"/**\"}, upstream: NAME}, or set gate.default_upstream",
                ),
            }
        }
        self.default_tier(&resolved, &names, file.routes.len());
        resolved
    }

    fn default_upstream<'a>(&mut self, file: &'a file::File, upstreams: &[&'a str]) -> Option<&'a str> {
        if let Some(name) = file.gate.as_ref().and_then(|gate| gate.default_upstream.as_deref()) {
            self.known(
                &Path::root().key("gate").key("default_upstream"),
                "upstream",
                name,
                upstreams,
            );
            return Some(name);
        }
        match upstreams {
            [only] => Some(only),
            several => several.iter().copied().find(|name| *name == "default"),
        }
    }

    /// The tier `default` exists if a route with a key uses it. Told once, not for each route.
    fn default_tier(&mut self, routes: &[Route], names: &Names<'_>, written: usize) {
        let uses = |route: &Route| matches!(&route.access, Access::Key { tier, .. } if tier == DEFAULT_TIER);
        if names.tiers.contains(&DEFAULT_TIER) || self.is_faulty(&Path::root().key("routes")) {
            return;
        }
        let Some(first) = routes.iter().position(uses) else {
            return;
        };
        let path = Path::root().key("routes").index(first);
        if first < written && self.places.was_written(&path.key("tier")) {
            return; // Told there, as an unknown tier.
        }
        let who = if first < written {
            path.as_str().to_owned()
        } else {
            "the default rule".to_owned()
        };
        self.fault(
            &Path::root().key("tiers").key(DEFAULT_TIER),
            format!(
                "missing; it is the tier of routes that name none (here {who}): default: {{limit: 1000, window: 1h}}"
            ),
        );
    }

    fn route(&mut self, path: &Path, route: &file::Route, names: &Names<'_>) -> Route {
        self.name(&path.key("name"), "a route", &route.name);
        let matches = path.key("match");
        let upstream = self.upstream(path, route, names);
        if let Some(name) = &route.sandbox_upstream {
            self.upstream_known(&path.key("sandbox_upstream"), name, names);
            if route.public.is_some() {
                self.fault_of_key(
                    &path.key("sandbox_upstream"),
                    "a public route asks for no key, so there is no sandbox environment to go by",
                );
            }
        }
        Route {
            name: route.name.clone(),
            host: route
                .matches
                .host
                .as_ref()
                .map(|host| self.host(&matches.key("host"), host)),
            methods: self.methods(&matches.key("methods"), route.matches.methods.as_deref()),
            path: self.pattern(&matches.key("path"), &route.matches.path),
            access: self.access(path, route, names),
            upstream,
            sandbox_upstream: route.sandbox_upstream.clone(),
            upgrade: route.upgrade,
        }
    }

    fn upstream(&mut self, path: &Path, route: &file::Route, names: &Names<'_>) -> String {
        match (&route.upstream, names.default_upstream) {
            (Some(name), _) => {
                self.upstream_known(&path.key("upstream"), name, names);
                name.clone()
            }
            (None, Some(default)) => default.to_owned(),
            (None, None) => {
                if !self.is_faulty(&Path::root().key("upstreams")) {
                    let known = names.upstreams.join(", ");
                    self.fault(
                        &path.key("upstream"),
                        format!("missing; expected the name of an upstream ({known})"),
                    );
                }
                String::new()
            }
        }
    }

    fn upstream_known(&mut self, path: &Path, name: &str, names: &Names<'_>) {
        if self.is_faulty(&Path::root().key("upstreams")) {
            return;
        }
        if name == CONTROL && !names.upstreams.contains(&CONTROL) {
            self.fault(
                path,
                "\"control\" means the control plane of the same process, but there is no section `control`; add it, or an upstream of that name",
            );
            return;
        }
        self.known(path, "upstream", name, &names.upstreams);
    }

    fn access(&mut self, path: &Path, route: &file::Route, names: &Names<'_>) -> Access {
        let Some(public) = &route.public else {
            if let Some(scope) = &route.scope
                && !self.is_faulty(&Path::root().key("scopes"))
            {
                self.known(&path.key("scope"), "scope", scope, &names.scopes);
            }
            if let Some(tier) = &route.tier
                && !self.is_faulty(&Path::root().key("tiers"))
            {
                self.known(&path.key("tier"), "tier", tier, &names.tiers);
            }
            return Access::Key {
                scope: route.scope.clone(),
                tier: route.tier.clone().unwrap_or_else(|| DEFAULT_TIER.to_owned()),
                environments: self.environments(&path.key("environments"), route.environments.as_deref(), names),
            };
        };
        for (name, given) in [
            ("scope", route.scope.is_some()),
            ("tier", route.tier.is_some()),
            ("environments", route.environments.is_some()),
        ] {
            if given {
                self.fault_of_key(
                    &path.key(name),
                    "a public route asks for no key; take this away, or `public`",
                );
            }
        }
        let public_path = path.key("public");
        let limit = match (public.limit, public.window) {
            (Some(limit), Some(window)) => Some(PublicLimit {
                limit,
                window: self.window(&public_path.key("window"), window),
            }),
            (Some(_), None) => {
                self.fault(
                    &public_path.key("window"),
                    "missing; a limit needs a window, for example window: 1h",
                );
                None
            }
            (None, Some(_)) => {
                self.fault(
                    &public_path.key("limit"),
                    "missing; a window needs a limit, for example limit: 20",
                );
                None
            }
            (None, None) => None,
        };
        Access::Public { limit }
    }

    fn environments(&mut self, path: &Path, environments: Option<&[String]>, names: &Names<'_>) -> Vec<String> {
        let Some(environments) = environments else {
            return Vec::new();
        };
        if environments.is_empty() {
            self.fault(path, "must not be empty; leave it out for every environment");
        }
        let mut resolved: Vec<String> = Vec::new();
        for (index, name) in environments.iter().enumerate() {
            let path = path.index(index);
            self.known(&path, "environment", name, &names.environments);
            if resolved.contains(name) {
                self.fault(&path, format!("environment \"{name}\" is listed twice"));
            } else {
                resolved.push(name.clone());
            }
        }
        resolved
    }

    fn host(&mut self, path: &Path, host: &str) -> String {
        let lower = host.to_ascii_lowercase();
        let named_port = lower
            .rsplit_once(':')
            .is_some_and(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
        if lower.contains('*') {
            self.fault(path, format!("\"{host}\": a host is written whole, without *"));
        } else if named_port && lower.parse::<std::net::IpAddr>().is_err() {
            self.fault(path, format!("\"{host}\": a host is matched without its port"));
        } else if lower.parse::<std::net::IpAddr>().is_err()
            && let Err(message) = host_name(&lower)
        {
            self.fault(path, message);
        }
        lower
    }

    fn methods(&mut self, path: &Path, methods: Option<&[String]>) -> Vec<String> {
        let Some(methods) = methods else { return Vec::new() };
        if methods.is_empty() {
            self.fault(path, "must not be empty; leave it out for every method");
        }
        let mut resolved: Vec<String> = Vec::new();
        for (index, method) in methods.iter().enumerate() {
            let path = path.index(index);
            if matches!(method.as_str(), "TRACE" | "CONNECT") {
                self.fault(&path, format!("{method} is always refused"));
            } else if !METHODS.contains(&method.as_str()) {
                self.fault(
                    &path,
                    format!("unknown method \"{method}\"{}", did_you_mean(method, METHODS)),
                );
            } else if resolved.contains(method) {
                self.fault(&path, format!("method {method} is listed twice"));
            } else {
                resolved.push(method.clone());
            }
        }
        resolved
    }

    fn pattern(&mut self, path: &Path, text: &str) -> PathPattern {
        parse_pattern(text).unwrap_or_else(|message| {
            self.fault(path, message);
            PathPattern {
                segments: Vec::new(),
                and_below: false,
                trailing_slash: true,
            }
        })
    }

    /// A name of its own, and a match of its own: two rules that match the same request equally well are a mistake.
    fn apart_from(&mut self, path: &Path, route: &Route, before: &[Route]) {
        let root = Path::root().key("routes");
        if let Some(first) = before.iter().position(|other| other.name == route.name) {
            self.fault(
                &path.key("name"),
                format!("\"{}\" is the name of {} too", route.name, root.index(first).as_str()),
            );
        }
        let matches = path.key("match");
        if self.is_faulty(&matches.key("path")) || self.is_faulty(&matches.key("methods")) {
            return;
        }
        for (index, other) in before.iter().enumerate() {
            let theirs = root.index(index).key("match");
            if other.host != route.host || other.path != route.path || self.is_faulty(&theirs.key("path")) {
                continue;
            }
            let both: Vec<&str> = route
                .methods
                .iter()
                .filter(|method| other.methods.contains(method))
                .map(String::as_str)
                .collect();
            let who = format!("{} (\"{}\")", root.index(index).as_str(), other.name);
            if route.methods.is_empty() && other.methods.is_empty() {
                self.fault(&matches, format!("matches the same requests as {who}"));
            } else if !both.is_empty() {
                self.fault(
                    &matches,
                    format!("matches the same {} requests as {who}", both.join(" and ")),
                );
            }
        }
    }
}

/// The rule for what no other matches: any valid key, tier `default`.
fn default_rule(upstream: &str) -> Route {
    Route {
        name: "default".to_owned(),
        host: None,
        methods: Vec::new(),
        path: PathPattern {
            segments: Vec::new(),
            and_below: true,
            trailing_slash: false,
        },
        access: Access::Key {
            scope: None,
            tier: DEFAULT_TIER.to_owned(),
            environments: Vec::new(),
        },
        upstream: upstream.to_owned(),
        sandbox_upstream: None,
        upgrade: false,
    }
}

/// A pattern of canonical paths: what the gate refuses as a path cannot be matched, so it is refused here too.
fn parse_pattern(text: &str) -> Result<PathPattern, String> {
    let Some(rest) = text.strip_prefix('/') else {
        return Err(format!("\"{text}\" does not begin with /"));
    };
    if let Some(bad) = text
        .chars()
        .find(|c| !matches!(c, '!'..='~') || matches!(c, '%' | '\\' | '?' | '#' | '"' | '<' | '>'))
    {
        return Err(match bad {
            '%' => format!("\"{text}\": % is not part of a pattern; write the characters themselves"),
            '?' => format!("\"{text}\": a pattern matches the path alone, without the query"),
            bad => format!("\"{text}\": {bad:?} cannot be part of a path"),
        });
    }
    if rest.is_empty() {
        return Ok(PathPattern {
            segments: Vec::new(),
            and_below: false,
            trailing_slash: true,
        });
    }
    let mut parts: Vec<&str> = rest.split('/').collect();
    let and_below = parts.last() == Some(&"**");
    let trailing_slash = parts.last() == Some(&"");
    if and_below || trailing_slash {
        parts.pop();
    }
    let mut segments = Vec::with_capacity(parts.len());
    for part in parts {
        segments.push(match part {
            "" => return Err(format!("\"{text}\": // is refused in requests, so nothing would match")),
            "." | ".." => {
                return Err(format!(
                    "\"{text}\": {part} segments are refused in requests, so nothing would match"
                ));
            }
            "**" => return Err(format!("\"{text}\": ** stands only at the end")),
            "*" => Segment::Any,
            part if part.contains('*') => {
                return Err(format!(
                    "\"{text}\": * stands for a whole segment, not for a part of one"
                ));
            }
            part => Segment::Literal(part.to_owned()),
        });
    }
    Ok(PathPattern {
        segments,
        and_below,
        trailing_slash,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_read_back_as_written() {
        for text in [
            "/",
            "/**",
            "/a",
            "/a/",
            "/a/**",
            "/a/*/c/**",
            "/api/v1/permissions/check",
            "/*",
            "/a;b/c",
        ] {
            assert_eq!(parse_pattern(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn patterns_that_match_nothing_are_refused() {
        for text in [
            "", "a", "*", "/a//b", "//", "/./a", "/a/..", "/**/a", "/a*", "/a**", "/a/%2f", "/a?b", "/a#b", "/a\\b",
            "/é", "/a b",
        ] {
            assert!(parse_pattern(text).is_err(), "{text:?}");
        }
    }
}
