//! Without JavaScript: every change is a form, and every form is guarded.

use super::browser::Browser;
use super::program::{PASSWORD, Program, Visitor};

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_by_forms_alone() {
    let program = Program::start().await;
    program.gate_name().await;
    let visitor = Visitor::new(&program.portal);

    // What is wrong is told field by field, and what was typed stays.
    let fields = [("name", "Acme"), ("email", "nonsense"), ("password", "short")];
    let page = visitor.post("/register", &fields).await.expect(422);
    page.says("The e-mail address must be an e-mail address");
    page.says("The password must have 8 to 1024 characters");
    page.says("value=\"Acme\"");
    assert!(!page.body.contains("short\""), "a password must not come back");

    let first = visitor.register("Acme", "plain@example.com").await;
    assert_eq!(program.request(&first).await.0, 200);
    let fields = [("name", "Acme"), ("email", "plain@example.com"), ("password", PASSWORD)];
    let again = visitor.post("/register", &fields).await.expect(200);
    again.says("Already created");
    assert!(!again.body.contains(&first));
    // A stranger is not told so.
    Visitor::new(&program.portal)
        .post("/register", &fields)
        .await
        .expect(409)
        .says("Sign in instead");

    // Create; a reload of the answer makes no second key.
    let token = visitor.form_token("/keys/new").await;
    let mut fields = vec![
        ("form_token", &*token),
        ("name", "billing"),
        ("environment", "live"),
        ("expiry", "30"),
    ];
    fields.push(("scope", "messaging:send"));
    let page = visitor.post("/keys/new", &fields).await.expect(200);
    let secret = page.secret();
    assert!(secret.starts_with("pxk_live_"));
    let id = page.between("primary\" href=\"/keys/", "\"");
    for again in [
        fields.clone(),
        [fields.clone(), vec![("scope", "storage:read")]].concat(),
    ] {
        let page = visitor.post("/keys/new", &again).await.expect(200);
        page.says("Already created");
        assert!(!page.body.contains(&secret));
    }
    let list = visitor.get("/keys").await.expect(200);
    assert_eq!(list.body.matches("<td class=\"name\">").count(), 2);
    list.says("pxk_live_…");
    // Only forms of ours make keys, and not for ever.
    for token in ["", "portal-0-0123456789012345678", "x"] {
        let fields = [("form_token", token), ("name", "n"), ("environment", "live")];
        visitor
            .post("/keys/new", &fields)
            .await
            .expect(422)
            .says("open for too long");
    }

    // A preset without JavaScript keeps what was typed.
    let fields = [("name", "kept"), ("environment", "test"), ("preset", "read")];
    let page = visitor.post("/keys/new", &fields).await.expect(200);
    page.says("value=\"kept\"");
    page.says("value=\"storage:read\" checked");
    assert!(!page.body.contains("value=\"storage:delete\" checked"));

    // Edit.
    let path = format!("/keys/{id}");
    let fields = [("name", "billing 2"), ("scope", "storage:read"), ("expiry", "keep")];
    let target = visitor.post(&format!("{path}/edit"), &fields).await.redirected();
    let page = visitor.get(&target).await.expect(200);
    page.says("billing 2");
    page.says("storage:read");
    page.says("in 30 days");
    visitor
        .post(&format!("{path}/edit"), &[("name", "")])
        .await
        .expect(422)
        .says("The name is required");

    // Rotate, with a length of one's own; reload.
    let token = visitor.form_token(&format!("{path}/rotate")).await;
    let own = [
        ("form_token", &*token),
        ("grace", "own"),
        ("own_number", "2"),
        ("own_unit", "3600"),
    ];
    let page = visitor.post(&format!("{path}/rotate"), &own).await.expect(200);
    let second = page.secret();
    visitor
        .post(&format!("{path}/rotate"), &own)
        .await
        .expect(200)
        .says("Already created");
    let page = visitor.get(&path).await.expect(200);
    page.says("dies <time");
    page.says("in 2 hours</time>");
    assert_eq!(program.request(&second).await.0, 200);
    let token = visitor.form_token(&format!("{path}/rotate")).await;
    let long = [
        ("form_token", &*token),
        ("grace", "own"),
        ("own_number", "31"),
        ("own_unit", "86400"),
    ];
    visitor
        .post(&format!("{path}/rotate"), &long)
        .await
        .expect(422)
        .says("must be from 0 to 2592000");

    // End the grace, disable, enable, revoke.
    let target = visitor.post(&format!("{path}/end-grace"), &[]).await.redirected();
    visitor.get(&target).await.expect(200).says("Confirmed by 1 of 1 gate.");
    assert_eq!(program.request(&secret).await, (401, "REVOKED_API_KEY".into()));
    visitor.post(&format!("{path}/disable"), &[]).await.redirected();
    assert_eq!(program.request(&second).await, (401, "DISABLED_API_KEY".into()));
    visitor.post(&format!("{path}/enable"), &[]).await.redirected();
    visitor
        .post(&format!("{path}/revoke"), &[("confirm", "billing")])
        .await
        .expect(422);
    visitor
        .post(&format!("{path}/revoke"), &[("confirm", " billing  2 ")])
        .await
        .redirected();
    assert_eq!(program.request(&second).await, (401, "REVOKED_API_KEY".into()));
    visitor.get(&format!("{path}/rotate")).await.expect(409);

    // Access tokens are revealed once too.
    let token = visitor.form_token("/tokens").await;
    let fields = [("form_token", &*token), ("name", "deploy"), ("expiry", "90")];
    let page = visitor.post("/tokens", &fields).await.expect(200);
    let access = page.secret();
    assert!(access.starts_with("pxm_"));
    visitor
        .post("/tokens", &fields)
        .await
        .expect(200)
        .says("Already created");
    let list = visitor.get("/tokens").await.expect(200);
    assert_eq!(list.body.matches("<td class=\"name\">").count(), 1);
    assert!(!list.body.contains(&access));
    let id = list.between("action=\"/tokens/", "/delete\"");
    visitor.post(&format!("/tokens/{id}/delete"), &[]).await.redirected();
    visitor
        .post("/tokens", &fields)
        .await
        .expect(200)
        .says("Already created");

    // The usage as CSV, with the session of the browser.
    let page = visitor.get("/usage?range=30d&by=key").await.expect(200);
    let csv = page
        .between("href=\"/api/v1/usage", "\"")
        .replace("&amp;", "&")
        .replace("&#38;", "&");
    let csv = visitor.get(&format!("/api/v1/usage{csv}")).await;
    assert_eq!(csv.status, 200);
    assert!(
        csv.body.starts_with("start,key,tier,environment,permits"),
        "{}",
        csv.body
    );

    // Settings: rename, other sessions, password.
    visitor
        .post("/settings/organization", &[("name", "Acme 2")])
        .await
        .redirected();
    visitor.get("/settings").await.expect(200).says("Acme 2");
    let other = Visitor::new(&program.portal);
    other
        .post("/login", &[("email", "plain@example.com"), ("password", PASSWORD)])
        .await
        .redirected();
    other.get("/keys").await.expect(200);
    visitor.get("/settings").await.expect(200).says("End all others");
    let wrong = [
        ("currentPassword", "not this one"),
        ("newPassword", "another long password"),
    ];
    visitor
        .post("/settings/password", &wrong)
        .await
        .expect(422)
        .says("The current password is wrong");
    let before = visitor.cookie.lock().unwrap().clone();
    let right = [("currentPassword", PASSWORD), ("newPassword", "another long password")];
    visitor.post("/settings/password", &right).await.redirected();
    assert_ne!(*visitor.cookie.lock().unwrap(), before, "the session has a new id");
    visitor.get("/settings").await.expect(200);
    assert_eq!(other.get("/keys").await.redirected(), "/login?next=/keys");
    for path in ["/audit", "/audit?action=key.rotate", "/"] {
        visitor.get(path).await.expect(200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_guarded() {
    let program = Program::start().await;
    let visitor = Visitor::new(&program.portal);
    visitor.register("Acme", "guard@example.com").await;
    let (id, _) = visitor.create_key("mine", "live", &[]).await;
    let own = [
        "/logout".to_owned(),
        "/keys/new".to_owned(),
        format!("/keys/{id}/edit"),
        format!("/keys/{id}/rotate"),
        format!("/keys/{id}/end-grace"),
        format!("/keys/{id}/disable"),
        format!("/keys/{id}/enable"),
        format!("/keys/{id}/revoke"),
        "/tokens".to_owned(),
        "/settings/organization".to_owned(),
        "/settings/password".to_owned(),
        "/settings/sessions/end-others".to_owned(),
        "/login".to_owned(),
        "/register".to_owned(),
        "/operator/login".to_owned(),
    ];
    // Pages of other sites may not send forms.
    for path in &own {
        for header in [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("origin", "https://evil.example"),
            ("origin", "null"),
        ] {
            let page = visitor
                .post_with(path, &[("confirm", "mine")], &[header])
                .await
                .expect(403);
            page.says("A page of another site sent this request");
        }
    }
    visitor.get(&format!("/keys/{id}")).await.expect(200).says("Active");

    // Somebody else's things are not found, for reading and for writing.
    let stranger = Visitor::new(&program.portal);
    stranger.register("Other", "stranger@example.com").await;
    for path in ["", "/edit", "/rotate", "/revoke", "/applied?revision=1"] {
        let page = stranger.get(&format!("/keys/{id}{path}")).await.expect(404);
        page.says("belongs to somebody else");
        assert!(!page.body.contains("mine"));
    }
    for path in ["edit", "rotate", "end-grace", "disable", "enable", "revoke"] {
        stranger
            .post(&format!("/keys/{id}/{path}"), &[("confirm", "mine")])
            .await
            .expect(404);
    }
    stranger.get(&format!("/usage?key={id}")).await.expect(404);
    stranger
        .post("/tokens/tok_0123456789012345678/delete", &[])
        .await
        .expect(404);
    stranger
        .post("/settings/sessions/ses_0123456789012345678/end", &[])
        .await
        .expect(404);
    let audit = stranger.get(&format!("/audit?target={id}")).await.expect(200);
    audit.says("No entries");

    // The cookie that somebody planted is not the session.
    let cookie = stranger.cookie.lock().unwrap().clone();
    let victim = Visitor::new(&program.portal);
    *victim.cookie.lock().unwrap() = cookie.clone();
    let page = victim
        .post("/login", &[("email", "guard@example.com"), ("password", PASSWORD)])
        .await;
    let line = page.headers["set-cookie"].to_str().unwrap().to_owned();
    assert!(
        line.starts_with("tollgate_session=") && !line.starts_with(&cookie),
        "{line}"
    );
    assert!(
        line.contains("; HttpOnly") && line.contains("; SameSite=Lax") && line.contains("; Path=/"),
        "{line}"
    );
    assert!(
        stranger.get("/keys").await.redirected().starts_with("/login"),
        "the planted session ends"
    );

    // Nobody is sent to another site after signing in.
    for next in ["//evil.example", "https://evil.example", "/\\evil.example"] {
        let fields = [("email", "guard@example.com"), ("password", PASSWORD), ("next", next)];
        assert_eq!(
            Visitor::new(&program.portal).post("/login", &fields).await.redirected(),
            "/"
        );
    }
    let fields = [
        ("email", "guard@example.com"),
        ("password", PASSWORD),
        ("next", "/keys?q=a"),
    ];
    assert_eq!(
        Visitor::new(&program.portal).post("/login", &fields).await.redirected(),
        "/keys?q=a"
    );
    let nobody = Visitor::new(&program.portal);
    let wrong = nobody
        .post(
            "/login",
            &[("email", "guard@example.com"), ("password", "wrong password")],
        )
        .await
        .expect(401);
    let unknown = nobody
        .post(
            "/login",
            &[("email", "nobody@example.com"), ("password", "wrong password")],
        )
        .await
        .expect(401);
    assert_eq!(wrong.body.replace("guard@", ""), unknown.body.replace("nobody@", ""));

    // The operator's pages want the operator's token, not a session.
    assert_eq!(visitor.get("/operator").await.redirected(), "/operator/login");
    nobody.post("/operator/login", &[("token", "wrong")]).await.expect(401);
    *nobody.cookie.lock().unwrap() = "tollgate_operator=99999999999999.op_x.00".to_owned();
    assert_eq!(nobody.get("/operator/keys").await.redirected(), "/operator/login");
    let operator = Visitor::new(&program.portal);
    let page = operator
        .post("/operator/login", &[("token", &program.token("admin"))])
        .await;
    let line = page.headers["set-cookie"].to_str().unwrap().to_owned();
    assert!(
        line.contains("; HttpOnly") && line.contains("; SameSite=Strict"),
        "{line}"
    );
    assert!(!line.contains(&program.token("admin")));
    assert_eq!(page.redirected(), "/operator");
    operator
        .get(&format!("/operator/keys/{id}"))
        .await
        .expect(200)
        .says("mine");
    assert!(operator.get("/keys").await.redirected().starts_with("/login"));

    // A page that does not exist is a page; the API's refusals stay JSON.
    visitor.get("/nowhere").await.expect(404).says("Page not found");
    let json = visitor.get("/api/v1/nowhere").await.expect(404);
    assert_eq!(json.headers["content-type"], "application/json");
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_text_is_text_everywhere() {
    let program = Program::start().await;
    let hostile = [
        "<img src=x onerror=\"window.pwned=1\">",
        "\"><script>window.pwned=1</script>",
        "' onfocus='window.pwned=1' autofocus x='",
        "{{7*7}}${7*7}</title></textarea><svg onload=window.pwned=1>",
    ];
    let browser = Browser::start().await;
    for (index, text) in hostile.iter().enumerate() {
        let visitor = Visitor::new(&program.portal);
        visitor.register(text, &format!("x{index}@example.com")).await;
        // The user agent of a session is shown too.
        let login = [("email", &*format!("x{index}@example.com")), ("password", PASSWORD)];
        visitor
            .post_with("/login", &login, &[("user-agent", text)])
            .await
            .redirected();
        let (id, _) = visitor.create_key(text, "live", &["storage:read"]).await;
        let token = visitor.form_token("/tokens").await;
        visitor
            .post("/tokens", &[("form_token", &token), ("name", text)])
            .await
            .expect(200);
        let operator = Visitor::new(&program.portal);
        operator
            .post("/operator/login", &[("token", &program.token("admin"))])
            .await
            .redirected();
        let token = operator.form_token("/operator/invitations").await;
        operator
            .post("/operator/invitations", &[("form_token", &token), ("note", text)])
            .await
            .expect(200);
        let organization = visitor
            .get("/settings")
            .await
            .expect(200)
            .between("<code>org_", "</code>");
        let q = super::program::encode(text);
        let member = [
            "/".to_owned(),
            "/keys".to_owned(),
            format!("/keys?q={q}&status={q}&scope={q}&sort={q}&after={q}"),
            format!("/keys/{id}"),
            format!("/keys/{id}/edit"),
            format!("/keys/{id}/rotate"),
            format!("/keys/{id}/revoke"),
            format!("/keys/new?name={q}&environment={q}&expires_on={q}&expiry={q}"),
            format!("/usage?by=key&tier={q}&environment={q}&range={q}"),
            format!("/audit?target={q}"),
            "/audit".to_owned(),
            "/tokens".to_owned(),
            "/settings".to_owned(),
            format!("/register?name={q}&email={q}"),
            format!("/keys/{q}"),
        ];
        let operators = [
            "/operator".to_owned(),
            format!("/operator/organizations?q={q}"),
            format!("/operator/organizations/org_{organization}"),
            format!("/operator/keys?q={q}&organization={q}"),
            format!("/operator/keys/{id}"),
            "/operator/invitations".to_owned(),
            "/operator/audit".to_owned(),
        ];
        for (who, paths) in [(&visitor, &member[..]), (&operator, &operators[..])] {
            let cookie = who.cookie.lock().unwrap().clone();
            let (name, value) = cookie.split_once('=').unwrap();
            browser.go(&format!("{}/assets/icon.svg", program.portal)).await;
            let set = serde_json::json!({"name": name, "value": value, "url": program.portal});
            browser.devtools("Network.setCookie", set).await;
            for path in paths {
                let page = who.get(path).await;
                assert!(
                    page.status == 200 || path.contains(&format!("/keys/{q}")),
                    "{path}: {}",
                    page.status
                );
                assert!(!page.body.contains(text), "{path} has it as it is");
                assert!(
                    !page.body.contains("window.pwned=1\">") && !page.body.contains("49$"),
                    "{path}"
                );
                browser.go(&format!("{}{path}", program.portal)).await;
                assert!(
                    browser.evaluate("return window.pwned ?? null").await.is_null(),
                    "{path} ran it"
                );
            }
        }
        visitor.get("/keys").await.says(&askama_escaped(text));
    }
    let complaints: Vec<_> = browser
        .complaints()
        .await
        .into_iter()
        .filter(|text| !text.contains("status of 404"))
        .collect();
    assert_eq!(complaints, Vec::<String>::new());
    browser.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_without_javascript_registers_creates_rotates_and_revokes() {
    let program = Program::start().await;
    program.gate_name().await;
    let browser = Browser::start().await;
    browser
        .devtools(
            "Emulation.setScriptExecutionDisabled",
            serde_json::json!({"value": true}),
        )
        .await;
    browser.go(&format!("{}/register", program.portal)).await;
    browser.fill("#name", "Acme").await;
    browser.fill("#email", "noscript@example.com").await;
    browser.fill("#password", PASSWORD).await;
    browser.click("main button[type=submit]").await;
    let first = browser.find("#secret").await.attr("value").await.unwrap().unwrap();
    assert_eq!(program.request(&first).await.0, 200);
    // What only scripts can do is not offered.
    assert!(!browser.find("[data-copy=secret]").await.is_displayed().await.unwrap());
    browser.page.refresh().await.unwrap();
    browser.says("Already created").await;
    browser.go(&format!("{}/keys/new", program.portal)).await;
    browser.fill("#name", "billing").await;
    browser.click("input[name=environment][value=live]").await;
    browser.click("input[name=scope][value='messaging:send']").await;
    browser.click(".actions button.primary").await;
    let second = browser.find("#secret").await.attr("value").await.unwrap().unwrap();
    assert_eq!(program.request(&second).await.0, 200);
    browser.click("main a.primary").await;
    browser.click("a[href$='/rotate']").await;
    browser.click("input[name=grace][value='3600']").await;
    browser.click("main form button[type=submit]").await;
    let third = browser.find("#secret").await.attr("value").await.unwrap().unwrap();
    assert_eq!(
        (program.request(&second).await.0, program.request(&third).await.0),
        (200, 200)
    );
    browser.click("main a.primary").await;
    browser.click("a[href$='/revoke']").await;
    browser.fill("#confirm", "billing").await;
    browser.click("main form button[type=submit]").await;
    browser.says("Confirmed by 1 of 1 gate.").await;
    assert_eq!(program.request(&third).await, (401, "REVOKED_API_KEY".into()));
    browser.close().await;
}

/// As templates write text.
fn askama_escaped(text: &str) -> String {
    let escape = |c: char| match c {
        '<' => "&#60;".to_owned(),
        '>' => "&#62;".to_owned(),
        '&' => "&#38;".to_owned(),
        '"' => "&#34;".to_owned(),
        '\'' => "&#39;".to_owned(),
        other => other.to_string(),
    };
    text.chars().map(escape).collect()
}
