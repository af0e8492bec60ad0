//! `check`, `config …`, completions and the manual pages.

use std::io::Write;
use std::path::Path;

use clap_complete::Shell;
use serde_json::json;

use super::args::{CheckArgs, CheckFormat, ConfigCommand, SchemaFormat};
use super::output::Output;
use super::{Exit, Failure, command};
use crate::config;

pub fn check(args: &CheckArgs, output: &mut Output) -> Result<(), Failure> {
    if args.format == CheckFormat::Json {
        output.set_json();
    }
    let path = &args.file.config;
    match config::load(path, &config::process_env) {
        Ok(config) => {
            if output.is_json() {
                return output.value(&json!({"file": path.display().to_string(), "faults": []}));
            }
            let mut parts = Vec::new();
            parts.extend(config.gate.as_ref().map(|gate| format!("gate \"{}\"", gate.name)));
            parts.extend(config.control.as_ref().map(|_| "control plane".to_owned()));
            let counts = [
                (config.routes.len(), "route"),
                (config.tiers.len(), "tier"),
                (config.upstreams.len(), "upstream"),
            ];
            parts.extend(counts.map(|(count, what)| format!("{count} {what}{}", if count == 1 { "" } else { "s" })));
            output.text(&format!("{}: fine ({})", path.display(), parts.join(", ")))
        }
        Err(faults) => {
            // The faults are this command's result, so they go to standard output in either form.
            if output.is_json() {
                output.value(&serde_json::to_value(&faults).unwrap_or_default())?;
            } else {
                output.text(&faults.to_string())?;
            }
            let count = faults.faults.len();
            output.remark(&format!("{count} {}", if count == 1 { "mistake" } else { "mistakes" }));
            Err(Failure {
                exit: Exit::InvalidConfiguration,
                message: String::new(),
                json: None,
            })
        }
    }
}

pub fn config(command: ConfigCommand, output: &Output) -> Result<(), Failure> {
    match command {
        ConfigCommand::Show(file) if output.is_json() => {
            output.value(&config::show_json(&file.config, &config::process_env)?)
        }
        ConfigCommand::Show(file) => output.text(&config::show(&file.config, &config::process_env)?),
        ConfigCommand::Schema {
            format: SchemaFormat::Json,
        } => output.value(&config::json_schema()),
        ConfigCommand::Schema {
            format: SchemaFormat::Markdown,
        } => output.text(&config::reference()),
        ConfigCommand::Init { file, full, upstream } => {
            let text = config::beginning(full, upstream.as_deref());
            match file {
                None => output.text(&text),
                Some(path) => write_new(&path, &text, output),
            }
        }
    }
}

fn write_new(path: &Path, text: &str, output: &Output) -> Result<(), Failure> {
    let fault =
        |error: std::io::Error| Failure::new(Exit::Failure, format!("cannot write {}: {error}", path.display()));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(fault)?;
    file.write_all(text.as_bytes()).map_err(fault)?;
    output.remark(&format!(
        "Wrote {}. Check it with: tollgate check -c {}",
        path.display(),
        path.display()
    ));
    Ok(())
}

pub fn completions(shell: Shell, output: &Output) -> Result<(), Failure> {
    // Into memory first: clap_complete panics where its writer fails, and a closed pipe is no panic.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "tollgate", &mut script);
    output.text(&String::from_utf8_lossy(&script))
}

pub fn man(directory: Option<&Path>, output: &Output) -> Result<(), Failure> {
    match directory {
        Some(directory) => {
            clap_mangen::generate_to(command(), directory).map_err(|error| {
                Failure::new(
                    Exit::Failure,
                    format!("cannot write into {}: {error}", directory.display()),
                )
            })?;
            output.remark(&format!("Wrote the pages into {}.", directory.display()));
            Ok(())
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command()).render(&mut page)?;
            output.text(&String::from_utf8_lossy(&page))
        }
    }
}
