//! The shapes of all commands. The doc comments are the help texts.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// The front door of an HTTP API: keys, scopes, exact limits, metering.
#[derive(Debug, Parser)]
#[command(
    name = "tollgate",
    version,
    propagate_version = true,
    max_term_width = 110,
    after_help = "Exit codes: 0 fine, 1 failure, 2 usage, 3 invalid configuration, 4 not reachable, 5 refused."
)]
pub struct Cli {
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run everything in one process to try it out: demo upstream, control plane, portal and gate.
    Dev(DevArgs),
    /// Run the roles that the configuration has sections for: gate, control, or both.
    Run(RunArgs),
    /// Check a configuration file and print every mistake in it. Exits with 3 if there is any.
    Check(CheckArgs),
    /// Let a running process read its configuration again: whole or not at all.
    Reload(ReloadArgs),
    /// Replace a running process by a new one from the same program file and configuration, without losing a request
    /// or a count.
    Upgrade(UpgradeArgs),
    /// Show how a running process is.
    Status(AdminArgs),
    /// Exit with 0 if a running process can serve requests.
    Healthcheck(AdminArgs),
    /// Show a configuration, its JSON Schema, or one to begin with.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print completions for a shell.
    Completions { shell: clap_complete::Shell },
    /// Print the manual page.
    Man {
        /// Write the pages of all commands into this directory instead.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Print the OpenAPI document of the control API.
    Openapi(Connection),
    /// Issue, rotate, revoke and check API keys.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Organisations (the operator's token is needed, except for `show` without an id).
    #[command(subcommand)]
    Orgs(OrgsCommand),
    /// Access tokens of your organisation.
    #[command(subcommand)]
    Tokens(TokensCommand),
    /// What your organisation's keys have used.
    Usage(UsageArgs),
    /// Who did what, when, from where.
    Audit(AuditArgs),
    /// The control plane's database: its version, migrations, a backup.
    Migrate(MigrateArgs),
}

#[derive(Debug, Args)]
pub struct DevArgs {
    /// Where keys, usage and tokens are kept. Started again on the same data, everything is still there.
    #[arg(long, value_name = "DIR", default_value = "./data")]
    pub data: PathBuf,
    /// The gate's address; port 0 takes a free one, as for the others.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub listen: String,
    /// The control plane's and the portal's address.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8081")]
    pub control: String,
    /// The operator's address: metrics, health, reload.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9090")]
    pub admin: String,
}

#[derive(Debug, Args)]
pub struct ConfigFile {
    /// The configuration file.
    #[arg(short, long, value_name = "FILE", default_value = "conf/tollgate.yaml")]
    pub config: PathBuf,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub file: ConfigFile,
    /// Take over the listeners and counts of the process that runs with this state directory, when it gets QUIT (within
    /// a minute). `tollgate upgrade` does both.
    #[arg(long)]
    pub upgrade: bool,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub file: ConfigFile,
    /// How to print the mistakes.
    #[arg(long, value_enum, default_value_t = CheckFormat::Human)]
    pub format: CheckFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CheckFormat {
    Human,
    Json,
}

#[derive(Debug, Args)]
pub struct AdminArgs {
    /// The operator's listener of the running process. Without it: that of the configuration file given by -c,
    /// else http://127.0.0.1:9090.
    #[arg(long, value_name = "URL", env = "TOLLGATE_ADMIN")]
    pub admin: Option<String>,
    /// A configuration file that says where the operator's listener is.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ReloadArgs {
    #[command(flatten)]
    pub admin: AdminArgs,
    /// How long to wait until the new configuration is in force.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub wait: Duration,
}

#[derive(Debug, Args)]
pub struct UpgradeArgs {
    #[command(flatten)]
    pub admin: AdminArgs,
    /// How long to wait until the new process serves, and before that for an earlier upgrade to be through.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub wait: Duration,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print a configuration with all variables replaced and all defaults filled in. Secrets are not shown.
    Show(ConfigFile),
    /// Print the JSON Schema for editors, or the reference page of every setting.
    Schema {
        #[arg(long, value_enum, default_value_t = SchemaFormat::Json)]
        format: SchemaFormat,
    },
    /// Print a configuration to begin with, or write it to a file.
    Init {
        /// Where to write it. A file that is there already is left alone.
        file: Option<PathBuf>,
        /// A complete example with a control plane instead of the smallest useful one.
        #[arg(long)]
        full: bool,
        /// Where the service listens that is to be protected.
        #[arg(long, value_name = "HOST:PORT", value_parser = server_address)]
        upstream: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SchemaFormat {
    Json,
    Markdown,
}

/// Where the control plane is and who asks.
#[derive(Clone, Debug, Args)]
pub struct Connection {
    /// The control plane.
    #[arg(
        long,
        value_name = "URL",
        env = "TOLLGATE_URL",
        default_value = "http://127.0.0.1:8081"
    )]
    pub url: String,
    /// A file with the access token (pxm_…). Without it: the variable TOLLGATE_TOKEN.
    #[arg(long, value_name = "FILE", env = "TOLLGATE_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
}

/// Whether to wait until gates have applied a change.
#[derive(Clone, Copy, Debug, Args)]
pub struct Applied {
    /// Wait until every live gate has applied the change, for so long at most; exits with 1 if one has not.
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "5s", value_parser = duration)]
    pub wait: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Create a key. Its secret is printed this once.
    Create {
        #[command(flatten)]
        connection: Connection,
        /// What people call it.
        #[arg(long)]
        name: String,
        /// live, test, dev or what the configuration has.
        #[arg(long, value_name = "NAME")]
        environment: String,
        /// What it may do; repeat it or separate with commas.
        #[arg(long, value_name = "NAME", value_delimiter = ',', required = true)]
        scope: Vec<String>,
        /// When it expires: a date (2027-01-31T00:00:00Z) or a time from now (90d).
        #[arg(long, value_name = "WHEN")]
        expires: Option<String>,
        /// Makes a repetition harmless: the same value creates one key.
        #[arg(long, value_name = "TEXT")]
        idempotency_key: Option<String>,
        #[command(flatten)]
        applied: Applied,
    },
    /// List keys.
    List {
        #[command(flatten)]
        connection: Connection,
        #[arg(long, value_name = "NAME")]
        environment: Option<String>,
        /// active, rotating, expiring, expired, disabled or revoked.
        #[arg(long, value_name = "WORD")]
        status: Option<String>,
        #[arg(long, value_name = "NAME")]
        scope: Option<String>,
        /// Part of a name or an id.
        #[arg(long, value_name = "TEXT")]
        search: Option<String>,
        /// At most so many.
        #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
        limit: usize,
        /// As the operator: keys of every organisation, or of the one given.
        #[arg(long, value_name = "ORGANIZATION", num_args = 0..=1, default_missing_value = "")]
        operator: Option<String>,
    },
    /// Show a key.
    Show {
        #[command(flatten)]
        target: KeyTarget,
    },
    /// Give a key a new secret, printed this once. The old one stays valid for a grace period.
    Rotate {
        #[command(flatten)]
        connection: Connection,
        /// The key's id (key_…).
        id: String,
        /// How long the old secret stays valid; 0s: it ends now. Without it: what the control plane has set (24h).
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        grace: Option<Duration>,
        /// Makes a repetition harmless: the same value rotates once.
        #[arg(long, value_name = "TEXT")]
        idempotency_key: Option<String>,
        #[command(flatten)]
        applied: Applied,
    },
    /// End the grace period of a key's old secrets now.
    EndGrace {
        #[command(flatten)]
        connection: Connection,
        /// The key's id (key_…).
        id: String,
        #[command(flatten)]
        applied: Applied,
    },
    /// Refuse a key until it is enabled again.
    Disable {
        #[command(flatten)]
        target: KeyTarget,
        #[command(flatten)]
        applied: Applied,
    },
    /// Accept a disabled key again.
    Enable {
        #[command(flatten)]
        target: KeyTarget,
        #[command(flatten)]
        applied: Applied,
    },
    /// Refuse a key for good.
    Revoke {
        #[command(flatten)]
        target: KeyTarget,
        #[command(flatten)]
        applied: Applied,
    },
    /// Turn secrets of another system into key lines of a static key file (offline).
    Import(ImportArgs),
    /// Check the form and the checksum of a secret read from standard input (offline).
    Verify {
        /// The configuration whose prefixes are ours. Without it the checksum alone is checked.
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Read a secret from standard input and print its line for a static key file (offline).
    Hash(LineArgs),
    /// Print a fresh secret: random, with checksum (offline).
    New {
        /// What it begins with.
        #[arg(long, default_value = "pxk_live_")]
        prefix: String,
    },
}

#[derive(Debug, Args)]
pub struct KeyTarget {
    #[command(flatten)]
    pub connection: Connection,
    /// The key's id (key_…).
    pub id: String,
    /// As the operator, whatever organisation it belongs to.
    #[arg(long)]
    pub operator: bool,
}

/// What a key line says beside the secret.
#[derive(Clone, Debug, Args)]
pub struct LineArgs {
    /// The key's id. Without it: one made from the digest, the same each time.
    #[arg(long)]
    pub id: Option<String>,
    /// Whose it is.
    #[arg(long, value_name = "ID", default_value = "")]
    pub organization: String,
    #[arg(long, value_name = "NAME", default_value = "live")]
    pub environment: String,
    /// What it may do; repeat it or separate with commas.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub scope: Vec<String>,
    #[arg(long, value_name = "NAME", default_value = "starter")]
    pub plan: String,
    /// When it expires: a date (2027-01-31T00:00:00Z) or a time from now (90d).
    #[arg(long, value_name = "WHEN")]
    pub expires: Option<String>,
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// One secret a line; or, with a first line that names the columns, values separated by commas or tabs
    /// (secret, id, organization, environment, scopes (by spaces), plan, expires). `-`: standard input.
    pub file: PathBuf,
    #[command(flatten)]
    pub line: LineArgs,
}

#[derive(Debug, Subcommand)]
pub enum OrgsCommand {
    /// List organisations.
    List {
        #[command(flatten)]
        connection: Connection,
        /// Part of a name or an id.
        #[arg(long, value_name = "TEXT")]
        search: Option<String>,
        /// At most so many.
        #[arg(long, value_name = "NUMBER", default_value_t = 1000)]
        limit: usize,
    },
    /// Show an organisation; without an id, your own.
    Show {
        #[command(flatten)]
        connection: Connection,
        id: Option<String>,
    },
    /// Change an organisation's plan or name.
    Update {
        #[command(flatten)]
        connection: Connection,
        id: String,
        #[arg(long, value_name = "NAME", required_unless_present = "name")]
        plan: Option<String>,
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        applied: Applied,
    },
    /// List the plans and their limits.
    Plans(Connection),
    /// List the gates with their revision, lag and version.
    Gates(Connection),
    /// Make an invitation, where registration is by invitation. It is printed this once.
    Invite {
        #[command(flatten)]
        connection: Connection,
        /// For whom, for your own memory.
        #[arg(long, default_value = "")]
        note: String,
        /// When it expires: a date or a time from now (14d).
        #[arg(long, value_name = "WHEN")]
        expires: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum TokensCommand {
    /// List access tokens.
    List(Connection),
    /// Create an access token. It is printed this once.
    Create {
        #[command(flatten)]
        connection: Connection,
        #[arg(long)]
        name: String,
        /// When it expires: a date or a time from now (90d).
        #[arg(long, value_name = "WHEN")]
        expires: Option<String>,
    },
    /// Delete an access token.
    Delete {
        #[command(flatten)]
        connection: Connection,
        /// The token's id (tok_…).
        id: String,
    },
}

#[derive(Debug, Args)]
pub struct UsageArgs {
    #[command(flatten)]
    pub connection: Connection,
    /// From when: a date or a time ago (7d). Without it: 24 hours before `to`.
    #[arg(long, value_name = "WHEN")]
    pub from: Option<String>,
    /// Until when. Without it: now.
    #[arg(long, value_name = "WHEN")]
    pub to: Option<String>,
    #[arg(long, value_enum, default_value_t = Granularity::Hour)]
    pub granularity: Granularity,
    /// key, tier, environment, or several with commas.
    #[arg(long, value_name = "WORDS")]
    pub by: Option<String>,
    /// Only this key.
    #[arg(long, value_name = "ID")]
    pub key: Option<String>,
    /// Only this tier.
    #[arg(long, value_name = "NAME")]
    pub tier: Option<String>,
    /// Only this environment.
    #[arg(long, value_name = "NAME")]
    pub environment: Option<String>,
    /// Print CSV.
    #[arg(long)]
    pub csv: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Granularity {
    Minute,
    Hour,
    Day,
}

#[derive(Debug, Args)]
pub struct AuditArgs {
    #[command(flatten)]
    pub connection: Connection,
    /// Only this action, such as key.rotate.
    #[arg(long, value_name = "WORD")]
    pub action: Option<String>,
    /// Only what was done to this (key_…, tok_…).
    #[arg(long, value_name = "ID")]
    pub target: Option<String>,
    /// Only what this user or token did.
    #[arg(long, value_name = "ID")]
    pub actor: Option<String>,
    /// From when: a date or a time ago (7d).
    #[arg(long, value_name = "WHEN")]
    pub from: Option<String>,
    /// At most so many lines.
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    pub limit: usize,
    /// As the operator: every organisation, or the one given.
    #[arg(long, value_name = "ORGANIZATION", num_args = 0..=1, default_missing_value = "")]
    pub operator: Option<String>,
}

#[derive(Debug, Args)]
pub struct MigrateArgs {
    #[command(subcommand)]
    pub action: MigrateCommand,
}

#[derive(Debug, Subcommand)]
pub enum MigrateCommand {
    /// Show which migrations have been applied.
    Status(ConfigFile),
    /// Apply the missing migrations.
    Up(ConfigFile),
    /// Copy the SQLite database to a file, also while it is in use. For PostgreSQL there is pg_dump.
    Backup {
        #[command(flatten)]
        file: ConfigFile,
        /// Where to; must not exist.
        to: PathBuf,
    },
    /// Copy a SQLite database into the empty PostgreSQL database of the configuration, and verify the copy.
    /// Stop the control plane before; gates serve on meanwhile.
    Copy {
        #[command(flatten)]
        file: ConfigFile,
        /// The SQLite file to copy.
        #[arg(long, value_name = "PATH")]
        from: PathBuf,
    },
}

/// An upstream's `HOST:PORT`, as in the configuration file.
fn server_address(text: &str) -> Result<String, String> {
    crate::config::parse_server_address(text)
}

/// `500ms`, `30s`, `5m`, `24h`, `30d`, as in the configuration file.
pub fn duration(text: &str) -> Result<Duration, String> {
    crate::config::parse_duration(text)
}
