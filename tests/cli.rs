//! The command line as a person meets it: output, exit codes, and what it sends to servers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;

/// A command without this machine's own settings.
fn tollgate(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.args(args);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TOLLGATE")) {
        command.env_remove(name);
    }
    command
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn with_input(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("ended by itself, not by a signal")
}

/// A server that answers with what it is given, once each, and tells what it was asked.
struct Canned {
    url: String,
    requests: mpsc::Receiver<String>,
}

impl Canned {
    fn new(answers: Vec<(u16, &'static str)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (tell, requests) = mpsc::channel();
        thread::spawn(move || {
            for (status, body) in answers {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream);
                let (mut head, mut length) = (String::new(), 0);
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                    if line.trim().is_empty() {
                        break;
                    }
                    head.push_str(&line);
                }
                let mut sent = vec![0; length];
                reader.read_exact(&mut sent).unwrap();
                let mut stream = reader.into_inner();
                write!(
                    stream,
                    "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                )
                .unwrap();
                tell.send(format!("{head}\n{}", String::from_utf8_lossy(&sent)))
                    .unwrap();
            }
        });
        Self { url, requests }
    }

    fn call(&self, args: &[&str]) -> Output {
        run(tollgate(args)
            .env("TOLLGATE_URL", &self.url)
            .env("TOLLGATE_TOKEN", "pxm_token"))
    }

    fn request(&self) -> String {
        self.requests.recv_timeout(std::time::Duration::from_secs(10)).unwrap()
    }
}

#[test]
fn usage_faults_exit_with_2() {
    for args in [
        &["nonsense"][..],
        &[],
        &["keys", "create"],
        &["dev", "--port", "1"],
        &["reload", "--wait", "soon"],
    ] {
        let output = run(&mut tollgate(args));
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
        assert!(stdout(&output).is_empty(), "{args:?}");
    }
    let help = run(&mut tollgate(&["--help"]));
    assert_eq!(code(&help), 0);
    assert!(stdout(&help).contains("Exit codes: 0 fine, 1 failure, 2 usage, 3 invalid configuration"));
}

#[test]
fn check_tells_every_mistake_and_exits_with_3() {
    let output = run(&mut tollgate(&["check", "-c", "tests/bad_conf/ten_mistakes.yaml"]));
    assert_eq!(code(&output), 3);
    assert_eq!(
        stdout(&output),
        std::fs::read_to_string("tests/bad_conf/ten_mistakes.txt").unwrap()
    );
    assert_eq!(stderr(&output), "10 mistakes\n");

    let output = run(&mut tollgate(&[
        "check",
        "--format",
        "json",
        "-c",
        "tests/bad_conf/limit_0.yaml",
    ]));
    assert_eq!(code(&output), 3);
    let said: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(said["faults"][0]["path"], "tiers.default.limit");
    assert!(stderr(&output).is_empty());

    let run_output = run(&mut tollgate(&["run", "-c", "tests/bad_conf/limit_0.yaml"]));
    assert_eq!(code(&run_output), 3);
    assert!(
        stderr(&run_output).contains("tiers.default.limit: must be from 1"),
        "{}",
        stderr(&run_output)
    );
}

#[test]
fn our_own_configurations_are_fine() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(at("feed.token"), "a-feed-token-for-tests").unwrap();
    std::fs::write(at("admin.token"), "an-admin-token-for-tests").unwrap();
    std::fs::write(at("keys.ndjson"), "").unwrap();
    let mut full = tollgate(&["check"]);
    full.env("TOLLGATE_FEED_TOKEN_FILE", at("feed.token"))
        .env("TOLLGATE_ADMIN_TOKEN_FILE", at("admin.token"));
    let output = run(&mut full);
    assert_eq!(code(&output), 0, "{}", stdout(&output));
    assert!(stdout(&output).contains("fine (gate \"gate-1\", control plane, 24 routes, 4 tiers, 3 upstreams)"));
    let mut cluster = tollgate(&["check", "-c", "conf/cluster.yaml"]);
    cluster
        .env("TOLLGATE_FEED_TOKEN_FILE", at("feed.token"))
        .env("TOLLGATE_ADMIN_TOKEN_FILE", at("admin.token"));
    let output = run(&mut cluster);
    assert_eq!(code(&output), 0, "{}", stdout(&output));
    let output = run(tollgate(&["check", "-c", "conf/minimal.yaml"]).env("KEYS", at("keys.ndjson")));
    assert_eq!(code(&output), 0, "{}", stdout(&output));

    // What `config init` writes is what `check` accepts, and what is there already stays.
    let fresh = at("fresh.yaml");
    assert_eq!(code(&run(&mut tollgate(&["config", "init", &fresh]))), 0);
    assert_eq!(code(&run(&mut tollgate(&["check", "-c", &fresh]))), 0);
    assert_eq!(code(&run(&mut tollgate(&["config", "init", &fresh]))), 1);

    // The address that it is to protect goes where it belongs, in either form.
    for form in [&["config", "init"][..], &["config", "init", "--full"]] {
        let of = |address: &str| run(tollgate(form).args(["--upstream", address]));
        let output = of("api.internal:8000");
        assert_eq!(code(&output), 0);
        assert_eq!(
            stdout(&output).matches("UPSTREAM:-api.internal:8000}").count(),
            1,
            "{form:?}"
        );
        let output = of("http://api.internal:8000");
        assert_eq!(code(&output), 2);
        assert!(stderr(&output).contains("without \"http://\""), "{}", stderr(&output));
    }
}

#[test]
fn config_show_fills_in_defaults_and_hides_secrets() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("gate.yaml");
    let text = "version: 1\ngate:\n  listen: [{address: \"127.0.0.1:0\"}]\n  feed: {url: \"http://127.0.0.1:8081\", token: \"${FEED}\"}\ntiers: {default: {limit: 5, window: 1h}}\nupstreams: {one: {servers: [\"127.0.0.1:9\"]}}\ncluster: {url: \"redis://user:hunter2@127.0.0.1:6379\"}\n";
    std::fs::write(&file, text).unwrap();
    let show = |args: &[&str]| {
        let output = run(tollgate(args)
            .arg("-c")
            .arg(&file)
            .env("FEED", "canary-of-the-feed-token"));
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        let said = stdout(&output);
        assert!(!said.contains("canary") && !said.contains("hunter2"), "{said}");
        said
    };
    let yaml = show(&["config", "show"]);
    assert!(
        yaml.contains("head_deadline: 10s") && yaml.contains("default_grace: 24h"),
        "{yaml}"
    );
    let json: serde_json::Value = serde_json::from_str(&show(&["config", "show", "--json"])).unwrap();
    assert_eq!(json["gate"]["limits"]["head_bytes"], 32768);
}

#[test]
fn keys_are_made_hashed_and_verified_offline() {
    let fresh = run(&mut tollgate(&["keys", "new", "--prefix", "pxk_test_"]));
    let secret = stdout(&fresh);
    assert!(secret.starts_with("pxk_test_") && secret.trim().len() == 45, "{secret}");

    let line = with_input(
        &mut tollgate(&[
            "keys",
            "hash",
            "--id",
            "key_me",
            "--environment",
            "test",
            "--scope",
            "a:b,c:d",
        ]),
        &secret,
    );
    let line: serde_json::Value = serde_json::from_str(&stdout(&line)).unwrap();
    assert_eq!(
        (&line["type"], &line["id"], &line["environment"]),
        (&"key".into(), &"key_me".into(), &"test".into())
    );
    assert_eq!(line["scopes"], serde_json::json!(["a:b", "c:d"]));
    assert_eq!(line["secrets"][0]["sha256"].as_str().unwrap().len(), 64);
    assert!(!line.to_string().contains(secret.trim()));

    let good = with_input(&mut tollgate(&["keys", "verify"]), &secret);
    assert_eq!(
        (code(&good), stdout(&good).as_str()),
        (0, "well formed: prefix pxk_test_, checksum right\n")
    );
    let cut = with_input(&mut tollgate(&["keys", "verify"]), &secret.trim()[..44]);
    assert_eq!(code(&cut), 1);
    assert!(stderr(&cut).contains("not well formed: ") && !stderr(&cut).contains(&secret.trim()[..44]));
    let nothing = run(&mut tollgate(&["keys", "hash"]));
    assert_eq!(code(&nothing), 2);
}

#[test]
fn keys_are_imported_or_none_is() {
    let table = "id,secret,scopes\nkey_1,the-secret-of-somebody-else,a:b c:d\nkey_2,another-secret-of-theirs,\n";
    let output = with_input(&mut tollgate(&["keys", "import", "-", "--environment", "live"]), table);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let lines: Vec<serde_json::Value> = stdout(&output)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        (&lines[0]["id"], &lines[0]["scopes"]),
        (&"key_1".into(), &serde_json::json!(["a:b", "c:d"]))
    );
    assert!(!stdout(&output).contains("secret-of"));

    let repeated = with_input(
        &mut tollgate(&["keys", "import", "-"]),
        "the-secret-of-somebody-else\nthe-secret-of-somebody-else\nshort\n",
    );
    assert_eq!(code(&repeated), 1);
    assert!(stdout(&repeated).is_empty());
    assert!(
        stderr(&repeated).contains("line 2: the secret of") && stderr(&repeated).contains("line 3: "),
        "{}",
        stderr(&repeated)
    );
    assert!(!stderr(&repeated).contains("somebody-else"));
}

#[test]
fn a_secret_is_alone_on_standard_output() {
    let answer = r#"{"success":true,"data":{"id":"key_1","apiKey":"pxk_live_x","revision":7,"applied":{"gates":["gate-1"],"pending":[]}}}"#;
    let server = Canned::new(vec![(201, answer)]);
    let output = server.call(&[
        "keys",
        "create",
        "--name",
        "Shop",
        "--environment",
        "live",
        "--scope",
        "messaging:send",
        "--expires",
        "2030-01-31",
        "--idempotency-key",
        "once",
        "--wait",
    ]);
    assert_eq!((code(&output), stdout(&output).as_str()), (0, "pxk_live_x\n"));
    assert!(stderr(&output).contains("key_1") && !stderr(&output).contains("pxk_live_x"));
    let request = server.request();
    assert!(
        request.starts_with("POST /api/v1/keys?wait=all&wait_seconds=5 HTTP/1.1"),
        "{request}"
    );
    assert!(
        request.contains("authorization: Bearer pxm_token") && request.contains("idempotency-key: once"),
        "{request}"
    );
    let body: serde_json::Value = serde_json::from_str(request.lines().last().unwrap()).unwrap();
    let expected = serde_json::json!({
        "name": "Shop", "environment": "live", "scopes": ["messaging:send"], "expiresAt": "2030-01-31T00:00:00.000Z",
    });
    assert_eq!(body, expected);
}

#[test]
fn lists_follow_their_pages() {
    let first = r#"{"success":true,"data":{"items":[{"id":"key_1","name":"one","environment":"live","status":"active","masked":"pxk_live_…abcd","lastUsedAt":null}],"nextCursor":"ab"}}"#;
    let second = r#"{"success":true,"data":{"items":[{"id":"key_2","name":"two"}],"nextCursor":null}}"#;
    let server = Canned::new(vec![(200, first), (200, second)]);
    let output = server.call(&["keys", "list", "--status", "active"]);
    let said = stdout(&output);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 3, "{said}");
    assert!(
        lines[0].starts_with("ID     NAME  ENVIRONMENT") && lines[2].starts_with("key_2  two"),
        "{said}"
    );
    assert!(
        server
            .request()
            .starts_with("GET /api/v1/keys?status=active&limit=100 ")
    );
    assert!(server.request().contains("cursor=ab"));
}

#[test]
fn refusals_and_silence_have_their_codes() {
    let refused = r#"{"success":false,"error":{"code":"VALIDATION_ERROR","message":"Something is wrong.","requestId":"req_1","fields":[{"field":"name","message":"is required"}]}}"#;
    let server = Canned::new(vec![
        (422, refused),
        (
            500,
            r#"{"success":false,"error":{"code":"INTERNAL_ERROR","message":"No."}}"#,
        ),
    ]);
    let output = server.call(&["tokens", "create", "--name", " "]);
    assert_eq!(code(&output), 5);
    assert_eq!(
        stderr(&output),
        "tollgate: Something is wrong. (VALIDATION_ERROR)\n  name is required\n"
    );
    assert_eq!(code(&server.call(&["tokens", "list"])), 1);

    // A port that was just free: nobody listens there.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{free}");
    let output = run(tollgate(&["keys", "list"])
        .env("TOLLGATE_URL", &url)
        .env("TOLLGATE_TOKEN", "pxm_token"));
    assert_eq!(code(&output), 4, "{}", stderr(&output));
    assert_eq!(code(&run(tollgate(&["healthcheck"]).env("TOLLGATE_ADMIN", &url))), 4);
    assert_eq!(code(&run(&mut tollgate(&["keys", "list"]))), 2, "without a token");
}

#[test]
fn changes_that_gates_have_not_applied_are_failures() {
    let answer = r#"{"success":true,"data":{"id":"key_1","status":"revoked","applied":{"gates":["gate-1"],"pending":["gate-2"]}}}"#;
    let server = Canned::new(vec![(200, answer)]);
    let output = server.call(&["keys", "revoke", "key_1/../x", "--wait", "2s"]);
    assert_eq!(code(&output), 1);
    assert!(
        stderr(&output).contains("not yet applied by: gate-2"),
        "{}",
        stderr(&output)
    );
    let request = server.request();
    assert!(
        request.starts_with("DELETE /api/v1/keys/key_1%2F%2E%2E%2Fx?wait=all&wait_seconds=2 "),
        "{request}"
    );
}

#[test]
fn reload_is_truthful() {
    let done = r#"{"success":true,"data":{"reloaded":true,"needsRestart":["gate.listen"]}}"#;
    let refused =
        r#"{"success":false,"error":{"code":"INVALID_CONFIGURATION","message":"t.yaml:1:1: version: missing"}}"#;
    let server = Canned::new(vec![
        (200, done),
        (422, refused),
        (200, "ok\n"),
        (503, "not ready: no snapshot\n"),
    ]);
    let call = |args: &[&str]| run(tollgate(args).env("TOLLGATE_ADMIN", &server.url));
    let output = call(&["reload"]);
    assert_eq!(code(&output), 0);
    assert!(stdout(&output).contains("gate.listen: has changed, and takes effect at a restart"));
    assert!(server.request().starts_with("POST /reload "));
    let output = call(&["reload", "--wait", "5s"]);
    assert_eq!(code(&output), 3);
    assert!(
        stderr(&output).contains("t.yaml:1:1: version: missing") && stderr(&output).contains("Nothing was changed.")
    );
    assert_eq!(code(&call(&["healthcheck"])), 0);
    let output = call(&["healthcheck"]);
    assert_eq!(
        (code(&output), stderr(&output).as_str()),
        (1, "tollgate: not ready: no snapshot\n")
    );
}

#[test]
fn the_database_is_migrated_and_copied() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(at("feed.token"), "a-feed-token-for-tests").unwrap();
    std::fs::write(at("admin.token"), "an-admin-token-for-tests").unwrap();
    let text = "version: 1\ncontrol:\n  listen: \"127.0.0.1:0\"\n  database: sqlite://tollgate.db\n  feed_token_file: feed.token\n  admin_token_file: admin.token\n";
    std::fs::write(at("control.yaml"), text).unwrap();
    let migrate = |args: &[&str]| {
        let output = run(tollgate(&["migrate"]).args(args).args(["-c", &at("control.yaml")]));
        (code(&output), stdout(&output), stderr(&output))
    };
    let (exit, said, _) = migrate(&["status"]);
    assert!(exit == 0 && said.contains("missing"), "{said}");
    let (exit, said, why) = migrate(&["up"]);
    assert!(
        exit == 0 && said.contains("applied") && !said.contains("missing"),
        "{said}{why}"
    );
    let (exit, said, why) = migrate(&["backup", &at("copy.db")]);
    assert!(exit == 0 && said.contains("copy.db"), "{said}{why}");
    assert!(Path::new(&at("copy.db")).metadata().unwrap().len() > 0);
}

#[test]
fn a_closed_pipe_is_no_panic() {
    for args in [
        &["config", "schema"][..],
        &["completions", "bash"],
        &["man"],
        &["--help"],
        &["config", "init", "--full"],
        &["config", "show", "-c", "conf/minimal.yaml"],
        &["check", "--json", "-c", "tests/bad_conf/ten_mistakes.yaml"],
        &["keys", "new"],
        &["man", "--help"],
    ] {
        let mut child = tollgate(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let expected = if args[0] == "config" && args[1] == "show" { 3 } else { 0 };
        assert_eq!(code(&output), expected, "{args:?}: {}", stderr(&output));
        assert!(!stderr(&output).contains("panicked"), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn completions_manual_and_schema_are_printed() {
    let printed = |args: &[&str]| {
        let output = run(&mut tollgate(args));
        assert_eq!(code(&output), 0, "{args:?}: {}", stderr(&output));
        stdout(&output)
    };
    assert!(printed(&["completions", "zsh"]).starts_with("#compdef tollgate"));
    assert!(printed(&["man"]).contains(".TH tollgate 1"));
    let schema: serde_json::Value = serde_json::from_str(&printed(&["config", "schema"])).unwrap();
    assert_eq!(schema["properties"]["routes"]["x-applies"], "reload");
    assert_eq!(schema["$defs"]["Gate"]["properties"]["listen"]["x-applies"], "restart");
    let directory = tempfile::tempdir().unwrap();
    printed(&["man", "--dir", &directory.path().display().to_string()]);
    assert!(directory.path().join("tollgate-keys-rotate.1").exists());
}

/// Each command of the control API: what it asks, and that `--json` prints nothing but JSON.
#[test]
fn every_command_asks_what_its_name_says() {
    let one = r#"{"success":true,"data":{"id":"key_1","apiKey":"pxk_live_x","name":"n","status":"active","token":"pxm_x","invitation":"inv_x"}}"#;
    let many = r#"{"success":true,"data":{"items":[{"id":"key_1","name":"n","tiers":[{"name":"default","limit":5}]}],"nextCursor":null}}"#;
    for (args, answer, asked) in [
        (&["keys", "list"][..], many, "GET /api/v1/keys?"),
        (&["keys", "list", "--operator"], many, "GET /api/v1/admin/keys?"),
        (&["keys", "show", "key_1"], one, "GET /api/v1/keys/key_1 "),
        (
            &["keys", "rotate", "key_1", "--grace", "1h"],
            one,
            "POST /api/v1/keys/key_1/rotate ",
        ),
        (
            &["keys", "end-grace", "key_1"],
            one,
            "POST /api/v1/keys/key_1/end-grace ",
        ),
        (&["keys", "disable", "key_1"], one, "PATCH /api/v1/keys/key_1 "),
        (
            &["keys", "enable", "key_1", "--operator"],
            one,
            "PATCH /api/v1/admin/keys/key_1 ",
        ),
        (&["keys", "revoke", "key_1"], one, "DELETE /api/v1/keys/key_1 "),
        (&["orgs", "list"], many, "GET /api/v1/admin/organizations?"),
        (&["orgs", "show"], one, "GET /api/v1/organization "),
        (
            &["orgs", "show", "org_1"],
            one,
            "GET /api/v1/admin/organizations/org_1 ",
        ),
        (
            &["orgs", "update", "org_1", "--plan", "business"],
            one,
            "PATCH /api/v1/admin/organizations/org_1 ",
        ),
        (&["orgs", "plans"], many, "GET /api/v1/plans "),
        (&["orgs", "gates"], many, "GET /api/v1/admin/gates "),
        (
            &["orgs", "invite", "--note", "you"],
            one,
            "POST /api/v1/admin/invitations ",
        ),
        (&["tokens", "list"], many, "GET /api/v1/tokens "),
        (&["tokens", "create", "--name", "n"], one, "POST /api/v1/tokens "),
        (&["tokens", "delete", "tok_1"], one, "DELETE /api/v1/tokens/tok_1 "),
        (&["usage", "--from", "7d"], many, "GET /api/v1/usage?"),
        (&["audit"], many, "GET /api/v1/audit?"),
        (&["audit", "--operator"], many, "GET /api/v1/admin/audit?"),
        (&["openapi"], r#"{"openapi":"3.1.0"}"#, "GET /openapi.json "),
    ] {
        let server = Canned::new(vec![(200, answer), (200, answer)]);
        let output = server.call(args);
        assert_eq!(code(&output), 0, "{args:?}: {}", stderr(&output));
        let request = server.request();
        assert!(request.starts_with(asked), "{args:?} asked {request}");
        assert!(
            request.contains("authorization: Bearer pxm_token") || args == ["openapi"],
            "{args:?}: {request}"
        );
        let output = server.call(&[args, &["--json"]].concat());
        assert_eq!(code(&output), 0, "{args:?} --json: {}", stderr(&output));
        let said = stdout(&output);
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(&said);
        assert!(parsed.is_ok(), "{args:?} --json printed {said}");
    }
}

#[test]
fn every_command_has_help_completions_and_a_page() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().display().to_string();
    assert_eq!(code(&run(&mut tollgate(&["man", "--dir", &dir]))), 0);
    let scripts: Vec<String> = ["bash", "zsh", "fish", "elvish", "powershell"]
        .map(|shell| {
            let output = run(&mut tollgate(&["completions", shell]));
            assert_eq!(code(&output), 0, "{shell}");
            stdout(&output)
        })
        .into();
    let mut commands = vec![(vec![], tollgate::cli::command())];
    let mut seen = 0;
    while let Some((path, command)) = commands.pop() {
        assert!(
            path.is_empty() || command.get_about().is_some(),
            "{path:?} says nothing about itself"
        );
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
            let path: Vec<String> = path.iter().cloned().chain([inner.get_name().to_owned()]).collect();
            let page = directory.path().join(format!("tollgate-{}.1", path.join("-")));
            assert!(page.exists(), "{}", page.display());
            for script in &scripts {
                assert!(script.contains(inner.get_name()), "{path:?} is not completed");
            }
            let mut args: Vec<&str> = path.iter().map(String::as_str).collect();
            args.push("--help");
            assert_eq!(code(&run(&mut tollgate(&args))), 0, "{args:?}");
            seen += 1;
            commands.push((path, inner.clone()));
        }
    }
    assert!(seen > 35, "{seen} commands");
}

#[test]
fn status_prints_what_a_process_says_of_itself() {
    let said = r#"{"version":"0.1.0","gate":{"name":"gate-1","ready":true}}"#;
    let server = Canned::new(vec![(200, said), (200, said)]);
    let call = |args: &[&str]| run(tollgate(args).env("TOLLGATE_ADMIN", &server.url));
    let text = call(&["status"]);
    assert!(
        code(&text) == 0 && stdout(&text).contains("gate-1"),
        "{}",
        stdout(&text)
    );
    let json: serde_json::Value = serde_json::from_str(&stdout(&call(&["status", "--json"]))).unwrap();
    assert_eq!(json["gate"]["ready"], true);
}
