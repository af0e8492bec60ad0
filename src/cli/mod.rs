//! Words from a person → calls.

use crate::{app, config};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "tollgate", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Dev {
        #[arg(long, default_value = "./data")]
        data: PathBuf,
        #[arg(long, default_value = "127.0.0.1:8080")]
        listen: String,
        #[arg(long, default_value = "127.0.0.1:8081")]
        control: String,
        #[arg(long, default_value = "127.0.0.1:9090")]
        admin: String,
    },
    Run {
        #[arg(short, long, default_value = "conf/tollgate.yaml")]
        config: PathBuf,
    },
}

/// Runs the command.
pub fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Dev {
            data,
            listen,
            control,
            admin,
        } => app::dev(app::DevOptions {
            data,
            listen,
            control,
            admin,
        }),
        Command::Run { config } => match config::load(&config, &config::process_env) {
            Ok(loaded) => app::run(
                loaded,
                app::RunOptions {
                    config_path: Some(config),
                },
            ),
            Err(faults) => Err(faults.into()),
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tollgate: {error}");
            ExitCode::FAILURE
        }
    }
}
