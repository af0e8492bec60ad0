//! Upstreams: the servers behind the gate.

use std::time::Duration;

use super::super::fault::Path;
use super::super::file;
use super::super::settings::{Balance, Health, Protocol, Server, Servers, Timeouts, Upstream, UpstreamTarget};
use super::{Resolver, names_of};

/// The upstream that means the control plane of the same process.
pub(super) const CONTROL: &str = "control";

impl Resolver {
    pub(super) fn upstreams(&mut self, file: &file::File) -> Vec<Upstream> {
        let root = Path::root().key("upstreams");
        if file.gate.is_some() && file.upstreams.0.is_empty() && file.control.is_none() {
            self.fault(
                &root,
                "missing; a gate needs an upstream, for example api: {servers: [\"127.0.0.1:9000\"]}",
            );
        }
        let mut resolved = Vec::new();
        for (name, upstream) in &file.upstreams.0 {
            let path = root.key(name);
            self.name(&path, "an upstream", name);
            resolved.push(Upstream {
                name: name.clone(),
                target: UpstreamTarget::Servers(self.servers(&path, upstream)),
                timeouts: self.timeouts(&path.key("timeouts"), &upstream.timeouts),
                retries: upstream.retries,
            });
        }
        if file.gate.is_some() && file.control.is_some() && !names_of(&file.upstreams).contains(&CONTROL) {
            let timeouts = self.timeouts(&root, &file::Timeouts::default());
            resolved.push(Upstream {
                name: CONTROL.to_owned(),
                target: UpstreamTarget::Control,
                timeouts,
                retries: 0,
            });
        }
        resolved
    }

    fn servers(&mut self, path: &Path, upstream: &file::Upstream) -> Servers {
        let mut servers: Vec<Server> = Vec::new();
        for (index, server) in upstream.servers.iter().enumerate() {
            let path = path.key("servers").index(index);
            let (address, weight) = match server {
                file::Server::Address(address) => (&address.0, 1),
                file::Server::Weighted(server) => (&server.address.0, server.weight),
            };
            if servers.iter().any(|other| other.address == *address) {
                self.fault(
                    &path,
                    format!(
                        "\"{address}\" is listed twice; write {{address: \"{address}\", weight: 2}} for a double share"
                    ),
                );
            }
            servers.push(Server {
                address: address.clone(),
                weight,
            });
        }
        Servers {
            servers,
            balance: match upstream.balance {
                file::Balance::RoundRobin => Balance::RoundRobin,
                file::Balance::Random => Balance::Random,
            },
            health: upstream
                .health
                .as_ref()
                .map(|health| self.health(&path.key("health"), health)),
            tls: upstream.tls.as_ref().map(|tls| self.client_tls(&path.key("tls"), tls)),
            protocol: match upstream.protocol {
                file::Protocol::Http1 => Protocol::Http1,
                file::Protocol::Http2 => Protocol::Http2,
            },
        }
    }

    fn health(&mut self, path: &Path, health: &file::Health) -> Health {
        if !health.path.starts_with('/') || !health.path.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.fault(
                &path.key("path"),
                format!("\"{}\" is not a path; expected one such as /healthz", health.path),
            );
        }
        let least = Duration::from_millis(100);
        let every = self.span(&path.key("every"), health.every, least, Duration::from_secs(3600));
        let written = self.places.was_written(&path.key("timeout"));
        // A default must not turn a short `every` into a fault.
        let timeout = if written {
            health.timeout.0
        } else {
            health.timeout.0.min(every)
        };
        if self.is_faulty(&path.key("every")) {
            // What `timeout` is measured by is wrong itself.
        } else if timeout > every {
            self.fault(
                &path.key("timeout"),
                format!("{} is longer than every ({})", health.timeout, health.every),
            );
        } else if timeout.is_zero() {
            self.fault(
                &path.key("timeout"),
                format!("must be from 1ms to {}, found 0s", health.every),
            );
        }
        Health {
            path: health.path.clone(),
            every,
            timeout,
            unhealthy_after: health.unhealthy_after,
            healthy_after: health.healthy_after,
        }
    }

    fn timeouts(&mut self, path: &Path, timeouts: &file::Timeouts) -> Timeouts {
        Timeouts {
            connect: self.timeout(&path.key("connect"), timeouts.connect),
            read: self.timeout(&path.key("read"), timeouts.read),
            write: self.timeout(&path.key("write"), timeouts.write),
            idle: self.timeout(&path.key("idle"), timeouts.idle),
        }
    }
}
