//! Words from a person → calls. Nothing is decided here; exit codes and messages are.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | fine |
//! | 1 | failure |
//! | 2 | usage |
//! | 3 | invalid configuration |
//! | 4 | not reachable |
//! | 5 | refused |

mod account;
mod args;
mod client;
mod configuration;
mod keys;
mod offline;
mod operate;
mod output;

use std::fmt;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use output::Output;

/// The command line, as clap describes it: for completions, the man page and tests.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Ignored: where help or an error cannot be printed there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let mut output = Output::new(cli.json);
    match dispatch(cli, &mut output) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough (`tollgate … | head`) is no failure.
        Err(Failure {
            exit: Exit::ClosedPipe, ..
        }) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                output.failure(&failure);
            }
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn dispatch(cli: Cli, output: &mut Output) -> Result<(), Failure> {
    match cli.command {
        Command::Dev(args) => operate::dev(args),
        Command::Run(args) => operate::run(args),
        Command::Check(args) => configuration::check(&args, output),
        Command::Config(command) => configuration::config(command, output),
        Command::Reload(args) => operate::reload(&args, output),
        Command::Upgrade(args) => operate::upgrade(&args, output),
        Command::Status(args) => operate::status(&args, output),
        Command::Healthcheck(args) => operate::healthcheck(&args, output),
        Command::Migrate(args) => operate::migrate(args, output),
        Command::Completions { shell } => configuration::completions(shell, output),
        Command::Man { dir } => configuration::man(dir.as_deref(), output),
        Command::Openapi(connection) => account::openapi(&connection, output),
        Command::Keys(command) => keys::keys(command, output),
        Command::Orgs(command) => account::orgs(command, output),
        Command::Tokens(command) => account::tokens(command, output),
        Command::Usage(args) => account::usage(&args, output),
        Command::Audit(args) => account::audit(&args, output),
    }
}

/// How a command ends when it does not end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Exit {
    /// The reader of our output is gone.
    ClosedPipe = 0,
    Failure = 1,
    Usage = 2,
    InvalidConfiguration = 3,
    NotReachable = 4,
    Refused = 5,
}

/// Why a command did not end well: one or more lines for a person, and what a program gets with `--json`.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    message: String,
    /// Replaces the message with `--json`.
    json: Option<serde_json::Value>,
}

impl Failure {
    fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self {
            exit,
            message: message.to_string(),
            json: None,
        }
    }
}

impl From<crate::config::Faults> for Failure {
    fn from(faults: crate::config::Faults) -> Self {
        Self {
            exit: Exit::InvalidConfiguration,
            message: faults.to_string(),
            json: serde_json::to_value(&faults).ok(),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::new(Exit::ClosedPipe, ""),
            _ => Self::new(Exit::Failure, error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command().debug_assert();
    }
}
