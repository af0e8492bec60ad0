//! The life of a key, in a browser: from the first visit to its end.

use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::browser::Browser;
use super::program::{PASSWORD, Program};

#[tokio::test(flavor = "multi_thread")]
async fn a_key_from_registration_to_its_end() {
    let program = Program::start().await;
    program.gate_name().await;
    let browser = Browser::start().await;
    let permissions =
        json!({"origin": program.portal, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]});
    browser.devtools("Browser.grantPermissions", permissions).await;

    // Register.
    browser.go(&program.portal).await;
    assert!(browser.url().await.ends_with("/login"));
    browser.click("a[href='/register']").await;
    browser.fill("#name", "Acme Rockets").await;
    browser.fill("#email", "dev@example.com").await;
    browser.fill("#password", PASSWORD).await;
    browser.click("main button[type=submit]").await;

    // Reveal and copy.
    let shown = browser.find("#secret").await.prop("value").await.unwrap().unwrap();
    assert!(shown.starts_with("pxk_dev_"), "{shown}");
    assert!(browser.find("#line").await.text().await.unwrap().contains(&shown));
    assert!(!browser.url().await.contains(&shown));
    browser.click("[data-copy=secret]").await;
    for _ in 0..50 {
        let said = browser
            .evaluate("return document.getElementById('announcer').textContent")
            .await;
        if said == "Copied to the clipboard" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let said = browser
        .evaluate("return document.getElementById('announcer').textContent")
        .await;
    assert_eq!(said, "Copied to the clipboard");
    let copied = browser
        .page
        .execute_async("navigator.clipboard.readText().then(arguments[0])", vec![])
        .await
        .unwrap();
    let first = copied.as_str().unwrap().to_owned();
    assert_eq!(first, shown);

    // What was copied passes the gate.
    assert_eq!(program.request(&first).await, (200, String::new()));
    // So does the line to paste, as it stands.
    let line = browser.find("#line").await.text().await.unwrap();
    let pasted = Command::new("sh").args(["-c", &line]).output().unwrap();
    let answer = String::from_utf8_lossy(&pasted.stdout);
    assert!(answer.starts_with("HTTP/1.1 200"), "{line}\n{answer}");

    // A reload shows nothing and makes nothing.
    browser.page.refresh().await.unwrap();
    browser.says("Already created").await;
    assert!(!browser.page.source().await.unwrap().contains(&first));
    browser.click("main a.button").await;
    assert_eq!(
        browser
            .page
            .find_all(fantoccini::Locator::Css("table.keys tbody tr"))
            .await
            .unwrap()
            .len(),
        1
    );
    browser.click("table.keys td.name a").await;
    browser.find("#secrets").await;
    let key_page = browser.url().await;

    // Usage appears.
    let mut seen = false;
    for _ in 0..100 {
        browser.go(&key_page).await;
        let data = browser
            .find("[data-chart]")
            .await
            .attr("data-chart")
            .await
            .unwrap()
            .unwrap();
        let data: Vec<Vec<u64>> = serde_json::from_str(&data).unwrap();
        seen = data[1].iter().sum::<u64>() == 2;
        if seen {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(seen, "the two requests did not appear");
    browser.find(".chart canvas").await;
    assert!(browser.text().await.contains("just now") || browser.text().await.contains("second"));

    // Rotate; both work.
    browser.click("a[href$='/rotate']").await;
    browser.says("Rotate “Default key”").await;
    browser.click("main form button[type=submit]").await;
    browser.says("Key rotated").await;
    let second = browser.find("#secret").await.prop("value").await.unwrap().unwrap();
    assert_ne!(first, second);
    assert_eq!(program.request(&first).await.0, 200);
    assert_eq!(program.request(&second).await.0, 200);
    browser.click("main a.primary").await;
    browser.says("dies in 24 hours").await;

    // End the grace: the old one is refused.
    browser.click("form[action$='/end-grace'] button").await;
    browser.says("Only the newest secret is accepted").await;
    browser.says("Confirmed by 1 of 1 gate.").await;
    assert_eq!(program.request(&first).await, (401, "REVOKED_API_KEY".to_owned()));
    assert_eq!(program.request(&second).await.0, 200);

    // Disable and enable.
    browser.click("form[action$='/disable'] button").await;
    browser.says("The key is disabled").await;
    assert_eq!(program.request(&second).await, (401, "DISABLED_API_KEY".to_owned()));
    browser.click("form[action$='/enable'] button").await;
    browser.says("The key is enabled").await;
    assert_eq!(program.request(&second).await.0, 200);
    assert_eq!(browser.complaints().await, Vec::<String>::new());

    // Revoke, with its name typed.
    browser.click("a[href$='/revoke']").await;
    browser.fill("#confirm", "default").await;
    browser.click("main form button[type=submit]").await;
    browser.says("Nothing was revoked").await;
    assert_eq!(program.request(&second).await.0, 200);
    // The browser itself notes the status 422 of the answer that says so.
    browser.complaints().await;
    browser.find("#confirm").await.clear().await.unwrap();
    browser.fill("#confirm", "Default key").await;
    browser.click("main form button[type=submit]").await;
    browser.says("revoked for good").await;
    browser.says("Confirmed by 1 of 1 gate.").await;
    assert_eq!(program.request(&second).await, (401, "REVOKED_API_KEY".to_owned()));

    // Sign out: the pages are closed.
    browser.click("form[action='/logout'] button").await;
    browser.says("You are signed out").await;
    browser.go(&key_page).await;
    assert!(browser.url().await.contains("/login?next=/keys/"));
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    browser.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn search_filters_presets_and_charts_answer_at_once() {
    let program = Program::start().await;
    let browser = Browser::start().await;
    browser.go(&format!("{}/register", program.portal)).await;
    browser.fill("#name", "Acme").await;
    browser.fill("#email", "search@example.com").await;
    browser.fill("#password", PASSWORD).await;
    browser.click("main button[type=submit]").await;
    browser.find("#secret").await;

    // A preset ticks without losing what was typed.
    browser.go(&format!("{}/keys/new", program.portal)).await;
    browser.fill("#name", "Reports").await;
    browser.click("[data-preset=read]").await;
    let ticked = browser
        .evaluate("return document.querySelectorAll('input[name=scope]:checked').length")
        .await;
    assert!(ticked.as_u64().unwrap() >= 3, "{ticked}");
    assert_eq!(
        browser.find("#name").await.prop("value").await.unwrap().unwrap(),
        "Reports"
    );
    assert!(!browser.find("#own-day").await.is_displayed().await.unwrap());
    browser.click("input[name=environment][value=test]").await;
    // Enter in a field sends the form, not a preset.
    browser.fill("#name", " 2027\u{e007}").await;
    browser.says("Key created").await;
    browser.says("Reports 2027").await;

    // The list follows while one types, and the address follows the list.
    browser.go(&format!("{}/keys", program.portal)).await;
    browser.says("Default key").await;
    browser.fill("#q", "report").await;
    for _ in 0..100 {
        if !browser.text().await.contains("Default key") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let text = browser.text().await;
    assert!(text.contains("Reports 2027") && !text.contains("Default key"), "{text}");
    assert!(browser.url().await.contains("q=report"), "{}", browser.url().await);
    browser.page.refresh().await.unwrap();
    assert_eq!(browser.find("#q").await.prop("value").await.unwrap().unwrap(), "report");

    // Dark mode redraws the chart.
    browser.go(&format!("{}/usage", program.portal)).await;
    browser.find(".chart canvas").await;
    browser.dark(true).await;
    browser.find(".chart canvas").await;
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    browser.close().await;
}
