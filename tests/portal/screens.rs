//! Every screen, judged by axe-core in light, dark and at 360 px; and their pictures, where somebody wants them:
//! `TOLLGATE_SCREENSHOTS=directory cargo nextest run --test portal every_screen`.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::browser::Browser;
use super::program::{PASSWORD, Program, Visitor};

#[tokio::test(flavor = "multi_thread")]
async fn every_screen_is_accessible_and_fits_a_phone() {
    let program = Program::start().await;
    let browser = Browser::start().await;
    let visitor = Visitor::new(&program.portal);
    let mut screens = Screens {
        browser: &browser,
        base: &program.portal,
        pictures: std::env::var_os("TOLLGATE_SCREENSHOTS").map(PathBuf::from),
        faults: Vec::new(),
    };
    for (name, path) in [
        ("login", "/login"),
        ("register", "/register"),
        ("operator-login", "/operator/login"),
    ] {
        screens.visit(name, path).await;
    }
    let key = fill(&program, &visitor).await;
    screens.sign_in(&visitor).await;
    let member = [
        ("overview", "/".to_owned()),
        ("keys", "/keys".to_owned()),
        ("keys-none", "/keys?q=nothing+like+it".to_owned()),
        ("create", "/keys/new".to_owned()),
        ("key", format!("/keys/{key}")),
        ("edit", format!("/keys/{key}/edit")),
        ("rotate", format!("/keys/{key}/rotate")),
        ("revoke", format!("/keys/{key}/revoke")),
        ("usage", "/usage?range=24h".to_owned()),
        ("usage-30d", "/usage?range=30d&by=key".to_owned()),
        ("audit", "/audit".to_owned()),
        ("tokens", "/tokens".to_owned()),
        ("settings", "/settings".to_owned()),
    ];
    for (name, path) in member {
        screens.visit(name, &path).await;
    }
    // The pages that answer a form.
    screens.post("reveal", &format!("/keys/{key}/rotate"), "").await;
    screens.post("already", "", "location.reload()").await;
    screens
        .post(
            "create-faults",
            "/keys/new",
            "document.querySelector('form.stack').noValidate = true",
        )
        .await;
    screens
        .post(
            "revoked",
            &format!("/keys/{key}/revoke"),
            "document.querySelector('#confirm').value = 'Billing service'",
        )
        .await;
    browser.complaints().await;

    let operator = Visitor::new(&program.portal);
    operator
        .post("/operator/login", &[("token", &program.token("admin"))])
        .await
        .redirected();
    let token = operator.form_token("/operator/invitations").await;
    operator
        .post(
            "/operator/invitations",
            &[("form_token", &token), ("note", "Beta customer")],
        )
        .await
        .expect(200);
    screens.sign_in(&operator).await;
    let organization = visitor.get("/settings").await.between("<code>org_", "</code>");
    let operators = [
        ("operator-gates", "/operator".to_owned()),
        ("operator-organizations", "/operator/organizations".to_owned()),
        (
            "operator-organization",
            format!("/operator/organizations/org_{organization}"),
        ),
        ("operator-keys", "/operator/keys".to_owned()),
        ("operator-key", format!("/operator/keys/{key}")),
        ("operator-plans", "/operator/plans".to_owned()),
        ("operator-invitations", "/operator/invitations".to_owned()),
        ("operator-audit", "/operator/audit".to_owned()),
    ];
    for (name, path) in operators {
        screens.visit(name, &path).await;
    }
    let faults = screens.faults;
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    browser.close().await;
}

struct Screens<'a> {
    browser: &'a Browser,
    base: &'a str,
    pictures: Option<PathBuf>,
    faults: Vec<String>,
}

impl Screens<'_> {
    async fn sign_in(&self, visitor: &Visitor) {
        let cookie = visitor.cookie.lock().unwrap().clone();
        let (name, value) = cookie.split_once('=').unwrap();
        self.browser.go(&format!("{}/login", self.base)).await;
        let set = json!({"name": name, "value": value, "url": self.base});
        self.browser.devtools("Network.setCookie", set).await;
    }

    async fn visit(&mut self, name: &str, path: &str) {
        self.browser.dark(false).await;
        self.browser.resize(1280, 900).await;
        self.browser.go(&format!("{}{path}", self.base)).await;
        self.look(name).await;
    }

    /// Sends the form of a page, after a script, and looks at what answers.
    async fn post(&mut self, name: &str, path: &str, script: &str) {
        self.browser.dark(false).await;
        self.browser.resize(1280, 900).await;
        if path.is_empty() {
            self.browser.page.refresh().await.unwrap();
        } else {
            self.browser.go(&format!("{}{path}", self.base)).await;
            self.browser.evaluate(script).await;
            self.browser.click(".actions button:not(.quiet)").await;
        }
        self.browser.find("h1").await;
        self.look(name).await;
    }

    /// Serious and critical faults of the page as it is.
    async fn axe(&self) -> Vec<Value> {
        if self.browser.evaluate("return !window.axe").await == true {
            self.browser
                .page
                .execute("(0, eval)(arguments[0])", vec![json!(AXE)])
                .await
                .unwrap();
        }
        let found = self.browser.page.execute_async(AXE_RUN, vec![]).await.unwrap();
        found.as_array().unwrap().clone()
    }

    async fn look(&mut self, name: &str) {
        // What the console says about this page, before axe adds anything of its own.
        let complaints = self.browser.complaints().await;
        let complaints = complaints.iter().filter(|text| !text.contains("status of 422"));
        self.faults
            .extend(complaints.map(|text| format!("{name}: console: {text}")));
        for (variant, dark, width) in [
            ("light", false, 1280),
            ("dark", true, 1280),
            ("360", false, 360),
            ("360-dark", true, 360),
        ] {
            self.browser.dark(dark).await;
            self.browser.resize(width, 900).await;
            // Colours and widths are judged apart: dark on a phone has nothing of its own.
            let found = match variant {
                "360-dark" => Vec::new(),
                _ => self.axe().await,
            };
            for fault in found {
                self.faults.push(format!("{name} ({variant}): {fault}"));
            }
            let wide = self
                .browser
                .evaluate("return document.documentElement.scrollWidth")
                .await
                .as_u64()
                .unwrap();
            if wide > u64::from(width) {
                self.faults.push(format!("{name} ({variant}): {wide} px wide"));
            }
            if let Some(directory) = &self.pictures {
                std::fs::create_dir_all(directory).unwrap();
                let tall = self
                    .browser
                    .evaluate("return document.documentElement.scrollHeight")
                    .await
                    .as_u64()
                    .unwrap();
                self.browser.resize(width, (tall as u32).clamp(400, 4_000)).await;
                let picture = self.browser.page.screenshot().await.unwrap();
                std::fs::write(directory.join(format!("{name}-{variant}.png")), picture).unwrap();
            }
        }
        self.browser.complaints().await;
    }
}

/// Makes an organisation that looks lived in, and gives the id of its busiest key.
async fn fill(program: &Program, visitor: &Visitor) -> String {
    visitor.register("Acme Rockets", "jo@acme.example").await;
    let login = [("email", "jo@acme.example"), ("password", PASSWORD)];
    let phone = "Mozilla/5.0 (iPhone; CPU iPhone OS 19_0 like Mac OS X) AppleWebKit/605.1.15 Version/19.0 Safari/604.1";
    Visitor::new(&program.portal)
        .post_with("/login", &login, &[("user-agent", phone)])
        .await
        .redirected();
    let laptop = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0";
    let other = visitor.post_with("/login", &login, &[("user-agent", laptop)]).await;
    other.redirected();
    let (billing, first) = visitor
        .create_key("Billing service", "live", &["messaging:send", "permissions:check"])
        .await;
    let (mobile, _) = visitor.create_key("Mobile app", "live", &["permissions:check"]).await;
    let (nightly, _) = visitor
        .create_key("Nightly export", "live", &["exports:create", "storage:read"])
        .await;
    let (tests, _) = visitor.create_key("Integration tests", "test", &["storage:read"]).await;
    let (old, _) = visitor
        .create_key(
            "Old importer",
            "live",
            &["storage:upload", "storage:read", "events:manage"],
        )
        .await;
    let expiry = [
        ("name", "Nightly export"),
        ("scope", "exports:create"),
        ("scope", "storage:read"),
        ("expiry", "7"),
    ];
    visitor
        .post(&format!("/keys/{nightly}/edit"), &expiry)
        .await
        .redirected();
    visitor.post(&format!("/keys/{tests}/disable"), &[]).await.redirected();
    visitor
        .post(&format!("/keys/{old}/revoke"), &[("confirm", "Old importer")])
        .await
        .redirected();
    let token = visitor.form_token("/tokens").await;
    visitor
        .post(
            "/tokens",
            &[("form_token", &token), ("name", "Deploy pipeline"), ("expiry", "90")],
        )
        .await
        .expect(200);
    let token = visitor.form_token(&format!("/keys/{billing}/rotate")).await;
    visitor
        .post(
            &format!("/keys/{billing}/rotate"),
            &[("form_token", &token), ("grace", "86400")],
        )
        .await
        .expect(200);
    for _ in 0..3 {
        assert_eq!(program.request(&first).await.0, 200);
    }
    let gate = program.gate_name().await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 60;
    let mut permits = Vec::new();
    let mut refusals = Vec::new();
    for back in 0..24 * 30_u64 {
        let minute = now - back * 60 - 1;
        // Days have a shape: quiet nights, busy afternoons.
        let hour = (minute / 60) % 24;
        let day = 20 + 300 * (12 - hour.abs_diff(14).min(12)) / 12;
        let wave = 1 + (back * 7919) % 40;
        for (key, tier, share) in [
            (&billing, "default", 2),
            (&mobile, "permissions:check", 5),
            (&nightly, "default", 1),
        ] {
            let count = (day + wave) * share / 2 + (if back == 0 { 40 } else { 0 });
            permits.push(json!({"key": key, "tier": tier, "environment": "live", "minute": minute, "count": count}));
        }
        if back % 3 == 0 {
            let count = 1 + wave / 2;
            refusals.push(json!({"key": mobile, "environment": "live", "tier": "permissions:check", "code": "RATE_LIMITED", "minute": minute, "count": count}));
            refusals.push(json!({"key": billing, "environment": "live", "tier": "default", "code": "INSUFFICIENT_SCOPE", "minute": minute, "count": wave / 6}));
        }
    }
    program
        .count(&gate, 1, Value::Array(permits), Value::Array(refusals))
        .await;
    // The counts of the three requests come within a second; they make the old secret one that is still used.
    tokio::time::sleep(std::time::Duration::from_millis(2_500)).await;
    billing
}

const AXE: &str = include_str!("assets/axe.min.js");
/// Runs axe and tells serious and critical faults, each in a line.
const AXE_RUN: &str = r#"
    const [done] = arguments;
    axe.run(document, {resultTypes: ["violations"]}).then((result) => done(result.violations
        .filter((v) => v.impact === "serious" || v.impact === "critical")
        .map((v) => `${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160) + " " + n.any.map((c) => c.message).join("; ").slice(0, 200)).join(" | ")}`)),
        (error) => done([String(error)]));
"#;
