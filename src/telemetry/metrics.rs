//! Prometheus metrics. Each is read from its source when it is asked for: nothing is counted twice.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;

/// One sample: its labels and its value.
pub type Sample = (Vec<(&'static str, String)>, f64);

/// A histogram as its source has it.
#[derive(Clone, Debug)]
pub struct HistogramSample {
    /// Upper bounds in seconds and the count of each bucket (not cumulative); the last bound is infinity.
    pub buckets: Vec<(f64, u64)>,
    /// The sum, in seconds.
    pub sum: f64,
}

/// All metrics of the process.
pub struct Metrics(Registry);

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics(Registry::with_prefix("tollgate"))
    }
}

impl Metrics {
    /// A counter, possibly with labels. `_total` is added to its name.
    pub fn counter(
        &mut self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> Vec<Sample> + Send + Sync + 'static,
    ) {
        self.add(name, help, MetricType::Counter, read);
    }

    /// A gauge, possibly with labels.
    pub fn gauge(
        &mut self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> Vec<Sample> + Send + Sync + 'static,
    ) {
        self.add(name, help, MetricType::Gauge, read);
    }

    /// A histogram of seconds. `_seconds` is added to its name.
    pub fn histogram(
        &mut self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> HistogramSample + Send + Sync + 'static,
    ) {
        self.0.register_collector(Box::new(HistogramCollector {
            name,
            help,
            read: Box::new(read),
        }));
    }

    /// The text of `/metrics` (OpenMetrics 1.0).
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.0);
        text
    }

    fn add(
        &mut self,
        name: &'static str,
        help: &'static str,
        kind: MetricType,
        read: impl Fn() -> Vec<Sample> + Send + Sync + 'static,
    ) {
        self.0.register_collector(Box::new(SampleCollector {
            name,
            help,
            kind,
            read: Box::new(read),
        }));
    }
}

struct SampleCollector {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    read: Box<dyn Fn() -> Vec<Sample> + Send + Sync>,
}

impl fmt::Debug for SampleCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Collector for SampleCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let samples = Samples {
            kind: self.kind,
            samples: (self.read)(),
        };
        samples.encode(encoder.encode_descriptor(self.name, self.help, None, self.kind)?)
    }
}

struct Samples {
    kind: MetricType,
    samples: Vec<Sample>,
}

impl EncodeMetric for Samples {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (labels, value) in &self.samples {
            if labels.is_empty() {
                // Through a family it would be written with empty braces.
                self.encode_value(&mut encoder, *value)?;
            } else {
                self.encode_value(&mut encoder.encode_family(labels)?, *value)?;
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        self.kind
    }
}

impl Samples {
    fn encode_value(&self, encoder: &mut MetricEncoder<'_>, value: f64) -> fmt::Result {
        match self.kind {
            MetricType::Counter => encoder.encode_counter::<NoLabelSet, _, f64>(&value, None),
            _ => encoder.encode_gauge(&value),
        }
    }
}

struct HistogramCollector {
    name: &'static str,
    help: &'static str,
    read: Box<dyn Fn() -> HistogramSample + Send + Sync>,
}

impl fmt::Debug for HistogramCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Collector for HistogramCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sample = (self.read)();
        let count = sample.buckets.iter().map(|(_, count)| count).sum();
        encoder
            .encode_descriptor(self.name, self.help, Some(&Unit::Seconds), MetricType::Histogram)?
            .encode_histogram::<NoLabelSet>(sample.sum, count, &sample.buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_read_when_asked_for_and_named_by_convention() {
        let mut metrics = Metrics::default();
        metrics.counter("requests", "Requests.", || {
            vec![(vec![("code", "PASSED".into()), ("tier", "a\"b".into())], 3.0)]
        });
        metrics.gauge("snapshot_keys", "Keys.", || vec![(vec![], 2.0)]);
        metrics.histogram("decision", "Time.", || HistogramSample {
            buckets: vec![(0.1, 1), (f64::INFINITY, 2)],
            sum: 4.5,
        });
        let text = metrics.render();
        for line in [
            "tollgate_requests_total{code=\"PASSED\",tier=\"a\\\"b\"} 3.0",
            "tollgate_snapshot_keys 2.0",
            "tollgate_decision_seconds_bucket{le=\"0.1\"} 1",
            "tollgate_decision_seconds_bucket{le=\"+Inf\"} 3",
            "tollgate_decision_seconds_sum 4.5",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
