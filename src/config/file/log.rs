//! Logs.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Logs.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::config) struct Log {
    /// The least important lines that are written.
    pub level: Level,
    /// Of the process's own lines.
    pub format: LogFormat,
    /// Where the process's own lines go: `stderr`, `stdout` or a file.
    pub path: LogPath,
    /// One line a request: `off`, or `{format, path}`.
    pub access: Access,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(in crate::config) enum Level {
    Off,
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// Format of the process's own lines; text, since a person reads them first.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(in crate::config) enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Format of access lines; JSON, since a machine reads them first.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(in crate::config) enum AccessFormat {
    #[default]
    Json,
    Text,
}

/// `stderr` by default.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub(in crate::config) struct LogPath(pub String);

impl Default for LogPath {
    fn default() -> Self {
        Self("stderr".to_owned())
    }
}

/// The access log.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub(in crate::config) enum Access {
    Switch(Switch),
    Settings(AccessSettings),
}

impl Default for Access {
    fn default() -> Self {
        Self::Settings(AccessSettings::default())
    }
}

/// `on` or `off`; YAML 1.1 reads both as truth values, so those are taken too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) enum Switch {
    On,
    Off,
}

impl Serialize for Switch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if *self == Self::On { "on" } else { "off" })
    }
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Truth(bool),
            Word(Word),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Word {
            On,
            Off,
        }
        Ok(match Either::deserialize(deserializer)? {
            Either::Truth(true) | Either::Word(Word::On) => Self::On,
            Either::Truth(false) | Either::Word(Word::Off) => Self::Off,
        })
    }
}

impl JsonSchema for Switch {
    fn schema_name() -> Cow<'static, str> {
        "Switch".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"enum": ["on", "off", true, false]})
    }
}

/// The access log.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::config) struct AccessSettings {
    /// `json` or `text`.
    pub format: AccessFormat,
    /// `stdout`, `stderr` or a file, opened again on reload.
    pub path: String,
    /// Lines that may wait to be written before more are dropped (and counted). 8,192: a second of a slow disk at full load.
    #[schemars(range(min = 16, max = 1_000_000))]
    pub buffer_lines: u32,
}

impl Default for AccessSettings {
    fn default() -> Self {
        Self {
            format: AccessFormat::Json,
            path: "stdout".to_owned(),
            buffer_lines: 8_192,
        }
    }
}
