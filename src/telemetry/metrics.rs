//! Prometheus metrics. Each is described once, and read from its source when it is asked for: nothing is counted twice.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;

/// Everything about a metric that does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// As it is exposed: a counter's ends in `_total`, a histogram's in `_seconds`.
    pub name: &'static str,
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// A sentence.
    pub help: &'static str,
}

/// What kinds of metric there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, from 0 at the start of the process.
    Counter,
    Gauge,
    /// Of durations in seconds.
    Histogram,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        })
    }
}

impl Description {
    /// A counter.
    pub const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Description {
            name,
            kind: Kind::Counter,
            labels,
            help,
        }
    }

    /// A gauge.
    pub const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Description {
            name,
            kind: Kind::Gauge,
            labels,
            help,
        }
    }

    /// A histogram of seconds.
    pub const fn histogram(name: &'static str, help: &'static str) -> Self {
        Description {
            name,
            kind: Kind::Histogram,
            labels: &[],
            help,
        }
    }

    /// The name without what the exposition format adds by itself.
    fn stem(&self) -> &'static str {
        let suffix = match self.kind {
            Kind::Counter => "_total",
            Kind::Gauge => "",
            Kind::Histogram => "_seconds",
        };
        self.name.strip_suffix(suffix).unwrap_or(self.name)
    }
}

/// One sample: the values of its labels, in the order of the description, and its own.
pub type Sample = (Vec<String>, f64);

/// A histogram as its source has it.
#[derive(Clone, Debug)]
pub struct HistogramSample {
    /// Upper bounds in seconds and the count of each bucket (not cumulative); the last bound is infinity.
    pub buckets: Vec<(f64, u64)>,
    /// The sum, in seconds.
    pub sum: f64,
}

/// How metrics are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// OpenMetrics 1.0, which Prometheus asks for.
    OpenMetrics,
    /// Prometheus' own text format 0.0.4, for whoever asks for nothing: `curl`, `promtool`.
    Text,
}

impl Exposition {
    /// By the `Accept` field of a request.
    pub fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") {
            Exposition::OpenMetrics
        } else {
            Exposition::Text
        }
    }

    /// The media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Exposition::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Exposition::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// All metrics of the process.
#[derive(Default)]
pub struct Metrics {
    registry: Registry,
    counters: Vec<&'static str>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// A counter or a gauge, with a sample for each combination of its labels' values.
    pub fn add(&mut self, what: &'static Description, read: impl Fn() -> Vec<Sample> + Send + Sync + 'static) {
        if what.kind == Kind::Counter {
            self.counters.push(what.stem());
        }
        self.registry.register_collector(Box::new(SampleCollector {
            what,
            read: Box::new(read),
        }));
    }

    /// A counter or a gauge without labels.
    pub fn add_one(&mut self, what: &'static Description, read: impl Fn() -> f64 + Send + Sync + 'static) {
        self.add(what, move || vec![(vec![], read())]);
    }

    /// A histogram.
    pub fn add_histogram(
        &mut self,
        what: &'static Description,
        read: impl Fn() -> HistogramSample + Send + Sync + 'static,
    ) {
        self.registry.register_collector(Box::new(HistogramCollector {
            what,
            read: Box::new(read),
        }));
    }

    /// The text of `/metrics`.
    pub fn render(&self, exposition: Exposition) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        match exposition {
            Exposition::OpenMetrics => text,
            Exposition::Text => self.as_text_format(&text),
        }
    }

    /// The text format differs in its comments alone: units are unknown to it, and counters are named in full.
    fn as_text_format(&self, open_metrics: &str) -> String {
        let mut text = String::with_capacity(open_metrics.len());
        for line in open_metrics.lines() {
            let mut words = line.splitn(4, ' ');
            let (hash, keyword, name) = (words.next(), words.next(), words.next());
            match (hash, keyword, name) {
                (Some("#"), Some("UNIT" | "EOF"), _) => continue,
                (Some("#"), Some(keyword), Some(name)) if self.counters.contains(&name) => {
                    let rest = words.next().unwrap_or_default();
                    text.push_str(&format!("# {keyword} {name}_total {rest}"));
                }
                _ => text.push_str(line),
            }
            text.push('\n');
        }
        text
    }
}

struct SampleCollector {
    what: &'static Description,
    read: Box<dyn Fn() -> Vec<Sample> + Send + Sync>,
}

impl fmt::Debug for SampleCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what.name)
    }
}

impl Collector for SampleCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let samples = Samples {
            what: self.what,
            samples: (self.read)(),
        };
        let kind = samples.metric_type();
        samples.encode(encoder.encode_descriptor(self.what.stem(), self.what.help, None, kind)?)
    }
}

struct Samples {
    what: &'static Description,
    samples: Vec<Sample>,
}

impl EncodeMetric for Samples {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (values, value) in &self.samples {
            let labels: Vec<(&str, &str)> = self
                .what
                .labels
                .iter()
                .copied()
                .zip(values.iter().map(String::as_str))
                .collect();
            if labels.is_empty() {
                // Through a family it would be written with empty braces.
                self.encode_value(&mut encoder, *value)?;
            } else {
                self.encode_value(&mut encoder.encode_family(&labels)?, *value)?;
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        match self.what.kind {
            Kind::Counter => MetricType::Counter,
            _ => MetricType::Gauge,
        }
    }
}

impl Samples {
    fn encode_value(&self, encoder: &mut MetricEncoder<'_>, value: f64) -> fmt::Result {
        match self.what.kind {
            Kind::Counter => encoder.encode_counter::<NoLabelSet, _, f64>(&value, None),
            _ => encoder.encode_gauge(&value),
        }
    }
}

struct HistogramCollector {
    what: &'static Description,
    read: Box<dyn Fn() -> HistogramSample + Send + Sync>,
}

impl fmt::Debug for HistogramCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what.name)
    }
}

impl Collector for HistogramCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sample = (self.read)();
        let count = sample.buckets.iter().map(|(_, count)| count).sum();
        encoder
            .encode_descriptor(
                self.what.stem(),
                self.what.help,
                Some(&Unit::Seconds),
                MetricType::Histogram,
            )?
            .encode_histogram::<NoLabelSet>(sample.sum, count, &sample.buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_read_when_asked_for_and_named_by_convention() {
        static REQUESTS: Description = Description::counter("tollgate_requests_total", &["code", "tier"], "Requests.");
        static KEYS: Description = Description::gauge("tollgate_snapshot_keys", &[], "Keys.");
        static DECISION: Description = Description::histogram("tollgate_decision_seconds", "Time.");
        let mut metrics = Metrics::default();
        metrics.add(&REQUESTS, || vec![(vec!["PASSED".into(), "a\"b".into()], 3.0)]);
        metrics.add_one(&KEYS, || 2.0);
        metrics.add_histogram(&DECISION, || HistogramSample {
            buckets: vec![(0.1, 1), (f64::INFINITY, 2)],
            sum: 4.5,
        });
        let both = [
            "tollgate_requests_total{code=\"PASSED\",tier=\"a\\\"b\"} 3.0",
            "tollgate_snapshot_keys 2.0",
            "tollgate_decision_seconds_bucket{le=\"0.1\"} 1",
            "tollgate_decision_seconds_bucket{le=\"+Inf\"} 3",
            "tollgate_decision_seconds_sum 4.5",
            "# TYPE tollgate_decision_seconds histogram",
            "# HELP tollgate_snapshot_keys Keys.",
        ];
        let open_metrics = [
            "# TYPE tollgate_requests counter",
            "# UNIT tollgate_decision_seconds seconds",
            "# EOF",
        ];
        let text = [
            "# TYPE tollgate_requests_total counter",
            "# HELP tollgate_requests_total Requests.",
        ];
        for (exposition, own, others) in [
            (Exposition::OpenMetrics, &open_metrics[..], &text[..]),
            (Exposition::Text, &text[..], &open_metrics[..]),
        ] {
            let rendered = metrics.render(exposition);
            let has = |line: &&str| rendered.lines().any(|l| l == *line);
            let missing: Vec<_> = both.iter().chain(own).filter(|line| !has(line)).collect();
            assert!(missing.is_empty(), "{missing:?} are not in\n{rendered}");
            assert!(!others.iter().any(has), "{rendered}");
        }
        assert_eq!(
            Exposition::accepted("application/openmetrics-text;version=1.0.0,*/*;q=0.1"),
            Exposition::OpenMetrics
        );
        assert_eq!(Exposition::accepted("*/*"), Exposition::Text);
    }
}
