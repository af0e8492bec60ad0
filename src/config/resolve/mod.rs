//! From shapes to settings: names, ranges and combinations, every fault at once.

mod control;
mod gate;
mod names;
mod routes;
mod upstreams;

use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use super::check::{Checked, Places};
use super::expand::read_trimmed;
use super::fault::{Fault, Path, did_you_mean, listed};
use super::file;
use super::scalar::Span;
use super::settings::{Certificate, Config, Secret, Tier};

/// The shortest token that is taken: 96 bits if it is written in hexadecimal digits of a good generator.
const MIN_TOKEN: usize = 16;

/// Resolves what the check of the shapes has left; the faults of both.
pub(super) fn resolve(file: &file::File, checked: Checked, base: &FilePath) -> Result<Config, Vec<Fault>> {
    let mut resolver = Resolver {
        faults: checked.faults,
        faulty: checked.faulty,
        places: checked.places,
        base: base.to_owned(),
    };
    let config = resolver.config(file);
    if resolver.faults.is_empty() {
        Ok(config)
    } else {
        Err(resolver.faults)
    }
}

struct Resolver {
    faults: Vec<Fault>,
    faulty: Vec<Path>,
    places: Places,
    base: PathBuf,
}

impl Resolver {
    fn config(&mut self, file: &file::File) -> Config {
        let root = Path::root();
        if file.gate.is_none() && file.control.is_none() && !self.is_faulty(&root) {
            self.fault(
                &root,
                "neither a section `gate` nor a section `control`: nothing to run",
            );
        }
        let keys = self.keys(&file.keys);
        let scopes = self.scopes(&file.scopes);
        let mut tiers = self.tiers(&file.tiers);
        let plans = self.plans(&file.plans, &file.tiers);
        let upstreams = self.upstreams(file);
        let routes = self.routes(file);
        let admin = file.admin.as_ref().map(|admin| self.admin(admin));
        let cluster = file
            .cluster
            .as_ref()
            .map(|cluster| self.cluster(cluster, file.gate.is_some()));
        let gate = file.gate.as_ref().map(|gate| self.gate(gate, file, &routes));
        let control = file.control.as_ref().map(|control| self.control(control, file));
        self.listeners_apart(file);
        if gate.is_some() && !tiers.iter().any(|tier| tier.name == routes::DEFAULT_TIER) {
            // Nothing uses it, or its absence was told: so that whoever has a gate has a tier of that name.
            let window = Duration::from_secs(3600);
            tiers.push(Tier {
                name: routes::DEFAULT_TIER.to_owned(),
                limit: 1000,
                window,
            });
        }
        Config {
            gate,
            keys,
            scopes,
            tiers,
            plans,
            upstreams,
            routes,
            control,
            admin,
            cluster,
            log: self.log(&file.log),
        }
    }

    /// A fault of a setting's value, unless that setting's fault has been told already.
    fn fault(&mut self, path: &Path, message: impl Into<String>) {
        if !self.is_faulty(path) {
            let at = self.places.value(path);
            let (line, column) = (at.line, at.column);
            self.faults.push(Fault {
                line,
                column,
                path: path.as_str().to_owned(),
                message: message.into(),
            });
            self.faulty.push(path.clone());
        }
    }

    /// A fault of a setting's name.
    fn fault_of_key(&mut self, path: &Path, message: impl Into<String>) {
        if !self.is_faulty(path) {
            let at = self.places.key(path);
            let (line, column) = (at.line, at.column);
            self.faults.push(Fault {
                line,
                column,
                path: path.as_str().to_owned(),
                message: message.into(),
            });
        }
    }

    fn is_faulty(&self, path: &Path) -> bool {
        self.faulty.iter().any(|faulty| faulty.covers(path))
    }

    /// A name that must be one of `names`.
    fn known(&mut self, path: &Path, kind: &str, name: &str, names: &[&str]) {
        if names.contains(&name) {
            return;
        }
        let known = match names {
            [] => format!("no {kind} is defined"),
            names => format!("{kind}s: {}", listed(names.iter().copied(), 20)),
        };
        self.fault(
            path,
            format!(
                "unknown {kind} \"{name}\"{} ({known})",
                did_you_mean(name, names.iter().copied())
            ),
        );
    }

    /// A key that must be one of `names`.
    fn known_key(&mut self, path: &Path, kind: &str, name: &str, names: &[&str]) {
        if !names.contains(&name) {
            let known = listed(names.iter().copied(), 20);
            let suggestion = did_you_mean(name, names.iter().copied());
            self.fault_of_key(
                path,
                format!("unknown {kind} \"{name}\"{suggestion} ({kind}s: {known})"),
            );
        }
    }

    /// A duration within its bounds; an unbounded end is a thousand years.
    fn span(&mut self, path: &Path, span: Span, least: Duration, most: Duration) -> Duration {
        if span.0 < least || span.0 > most {
            self.fault(
                path,
                format!("must be from {} to {}, found {span}", Span(least), Span(most)),
            );
        }
        span.0
    }

    /// A timeout: from a millisecond to a day. 0 would mean "never" to some readers and "at once" to others.
    fn timeout(&mut self, path: &Path, span: Span) -> Duration {
        self.span(path, span, Duration::from_millis(1), Duration::from_secs(24 * 3600))
    }

    /// The window of a limit: from 1 s to 30 days, as design and window arithmetic have it.
    fn window(&mut self, path: &Path, span: Span) -> Duration {
        self.span(path, span, Duration::from_secs(1), Duration::from_secs(30 * 24 * 3600))
    }

    /// A path of the file system, from the configuration file's directory where it is relative.
    fn file_path(&mut self, path: &Path, text: &str) -> PathBuf {
        if text.trim().is_empty() {
            self.fault(path, "empty; expected a path");
        }
        self.base.join(text)
    }

    /// A file that must be there when the configuration is used: certificates, keys.
    fn existing_file(&mut self, path: &Path, text: &str) -> PathBuf {
        let file = self.file_path(path, text);
        if !self.is_faulty(path) {
            match std::fs::File::open(&file).and_then(|file| file.metadata()) {
                Ok(metadata) if metadata.is_dir() => self.fault(path, format!("{} is a directory", file.display())),
                Ok(_) => {}
                Err(error) => {
                    self.fault(
                        path,
                        format!("cannot read {}: {}", file.display(), super::expand::plain(&error)),
                    );
                }
            }
        }
        file
    }

    /// A certificate with its key; either alone is a fault.
    fn certificate(&mut self, path: &Path, cert: Option<&str>, key: Option<&str>) -> Option<Certificate> {
        if self.is_faulty(&path.key("cert")) || self.is_faulty(&path.key("key")) {
            return None;
        }
        match (cert, key) {
            (Some(cert), Some(key)) => Some(Certificate {
                cert: self.existing_file(&path.key("cert"), cert),
                key: self.existing_file(&path.key("key"), key),
            }),
            (Some(cert), None) => {
                self.existing_file(&path.key("cert"), cert);
                self.fault(path, "`cert` without `key`: expected the private key's file too");
                None
            }
            (None, Some(key)) => {
                self.existing_file(&path.key("key"), key);
                self.fault(path, "`key` without `cert`: expected the certificate's file too");
                None
            }
            (None, None) => None,
        }
    }

    /// A secret from the file itself or from a file of its own, of which there must be exactly one.
    fn secret(&mut self, path: &Path, name: &str, text: Option<&file::SecretText>, file: Option<&str>) -> Secret {
        let (inline, in_file) = (path.key(name), path.key(&format!("{name}_file")));
        if self.is_faulty(&inline) || self.is_faulty(&in_file) {
            return Secret::new("");
        }
        let (place, value) = match (text, file) {
            (Some(text), None) => (inline, Ok(text.0.clone())),
            (None, Some(file)) => (in_file, read_trimmed(&self.base.join(file))),
            (Some(_), Some(_)) => (
                in_file,
                Err(format!("given together with `{name}`; one of the two is enough")),
            ),
            (None, None) => (
                inline,
                Err(format!(
                    "missing; expected {name}_file: PATH, or {name}: \"${{VARIABLE}}\""
                )),
            ),
        };
        match value {
            Ok(value) if value.len() < MIN_TOKEN => {
                self.fault(
                    &place,
                    format!(
                        "too short for a secret: {} characters, at least {MIN_TOKEN} are needed",
                        value.len()
                    ),
                );
            }
            Ok(value) if !value.bytes().all(|byte| byte.is_ascii_graphic()) => {
                self.fault(
                    &place,
                    "a secret is visible ASCII characters without spaces, on one line",
                );
            }
            Ok(value) => return Secret::new(value),
            Err(message) => self.fault(&place, message),
        }
        Secret::new("")
    }

    /// A name of a tier, an upstream, …: what reads well in headers, logs and metrics.
    fn name(&mut self, path: &Path, kind: &str, name: &str) {
        let well_formed = !name.is_empty()
            && name.len() <= 64
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | ':' | '.'));
        if !well_formed {
            self.fault_of_key(
                path,
                format!("\"{name}\" cannot name {kind}: letters, digits, _ - : and . only, a letter or digit first, at most 64"),
            );
        }
    }
}

/// The names of a mapping.
fn names_of<T>(named: &file::Named<T>) -> Vec<&str> {
    named.0.iter().map(|(name, _)| name.as_str()).collect()
}
