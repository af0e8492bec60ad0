//! Headless Chromium, driven through chromedriver.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fantoccini::elements::Element;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use tempfile::TempDir;

pub struct Browser {
    pub page: Client,
    driver: Child,
    driver_url: String,
    session: String,
    http: reqwest::Client,
    /// The browser's own files; removed at the end.
    _profile: TempDir,
}

impl Browser {
    pub async fn start() -> Self {
        Self::with(json!({})).await
    }

    /// With preferences of the profile.
    pub async fn with(preferences: Value) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (driver, port) = start_driver();
        let driver_url = format!("http://127.0.0.1:{port}");
        let profile = tempfile::tempdir().unwrap();
        let user_data = format!("--user-data-dir={}", profile.path().display());
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--window-size=1280,900",
            &user_data,
        ];
        let capabilities = json!({
            "goog:chromeOptions": {"args": arguments, "prefs": preferences},
            "goog:loggingPrefs": {"browser": "ALL"},
        });
        let mut builder = ClientBuilder::new(HttpConnector::new());
        builder.capabilities(capabilities.as_object().unwrap().clone());
        let page = builder.connect(&driver_url).await.unwrap_or_else(|error| {
            panic!("chromedriver cannot start Chromium (apt install chromium chromium-driver): {error}")
        });
        let session = page.session_id().await.unwrap().unwrap();
        Self {
            page,
            driver,
            driver_url,
            session,
            http: reqwest::Client::new(),
            _profile: profile,
        }
    }

    pub async fn go(&self, url: &str) {
        self.page.goto(url).await.unwrap();
    }

    pub async fn find(&self, css: &str) -> Element {
        let wait = self.page.wait().at_most(Duration::from_secs(20));
        match wait.for_element(Locator::Css(css)).await {
            Ok(element) => element,
            Err(error) => panic!("no {css} on {}: {error}\n{}", self.url().await, self.text().await),
        }
    }

    pub async fn click(&self, css: &str) {
        self.find(css).await.click().await.unwrap();
    }

    /// Types into a field, after what is there.
    pub async fn fill(&self, css: &str, text: &str) {
        self.find(css).await.send_keys(text).await.unwrap();
    }

    /// The text of the page, as a reader sees it.
    pub async fn text(&self) -> String {
        match self.page.find(Locator::Css("body")).await {
            Ok(body) => body.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    pub async fn url(&self) -> String {
        self.page.current_url().await.unwrap().to_string()
    }

    /// Waits until the page says something.
    pub async fn says(&self, text: &str) {
        for _ in 0..200 {
            if self.text().await.contains(text) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{} does not say {text:?}:\n{}", self.url().await, self.text().await);
    }

    pub async fn evaluate(&self, script: &str) -> Value {
        self.page.execute(script, vec![]).await.unwrap()
    }

    /// A command of the DevTools protocol.
    pub async fn devtools(&self, command: &str, parameters: Value) -> Value {
        let body = json!({"cmd": command, "params": parameters});
        self.command("goog/cdp/execute", body).await
    }

    pub async fn dark(&self, dark: bool) {
        let value = if dark { "dark" } else { "light" };
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": value}]});
        self.devtools("Emulation.setEmulatedMedia", features).await;
    }

    pub async fn resize(&self, width: u32, height: u32) {
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500});
        self.devtools("Emulation.setDeviceMetricsOverride", metrics).await;
    }

    /// What the console has said since the last call: everything from a warning upwards, and every word of a
    /// violated security policy.
    pub async fn complaints(&self) -> Vec<String> {
        let entries = self.command("se/log", json!({"type": "browser"})).await;
        let entries = entries.as_array().unwrap().iter();
        let is_bad = |entry: &&Value| {
            let text = entry["message"].as_str().unwrap_or_default();
            entry["level"] == "SEVERE" || entry["level"] == "WARNING" || text.contains("Content Security Policy")
        };
        entries
            .filter(is_bad)
            .map(|entry| entry["message"].as_str().unwrap().to_owned())
            .collect()
    }

    async fn command(&self, path: &str, body: Value) -> Value {
        let url = format!("{}/session/{}/{path}", self.driver_url, self.session);
        let text = self
            .http
            .post(url)
            .json(&body)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert!(answer["value"]["error"].is_null(), "{path}: {text}");
        answer["value"].clone()
    }

    pub async fn close(mut self) {
        let _ = self.page.clone().close().await;
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // After a failed assertion: chromedriver ends its browser when it is asked to, not when it is killed.
        let url = format!("{}/session/{}", self.driver_url, self.session);
        let _ = Command::new("curl")
            .args(["-s", "-m", "5", "-X", "DELETE", &url])
            .stdout(Stdio::null())
            .status();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

fn start_driver() -> (Child, u16) {
    let mut driver = Command::new("chromedriver")
        .arg("--port=0")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("the portal's tests need Chromium and its driver (apt install chromium chromium-driver): {error}")
        });
    let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
    let port = loop {
        let line = lines.next().expect("chromedriver says its port").unwrap();
        if let Some((_, rest)) = line.split_once("successfully on port ") {
            break rest.trim_end_matches('.').parse().unwrap();
        }
    };
    // Read to its end, so that it never waits for a full pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (driver, port)
}
