//! A key is shown once and then nowhere.

use crate::harness::Tollgate;
use reqwest::{Method, StatusCode};
use std::fs;
use std::path::Path;

#[tokio::test]
async fn a_raw_key_is_in_no_file_log_metric_or_table() {
    let tollgate = Tollgate::start().await;
    let account = tollgate.register("secret@example.com").await;
    let key = tollgate.create_key(&account, "live", &[]).await;
    for secret in [&account.key, &key.secret] {
        assert_eq!(tollgate.ask("/any", secret).await.status(), StatusCode::OK);
        let bearer = tollgate.get("/any").header("authorization", format!("Bearer {secret}"));
        assert_eq!(bearer.send().await.unwrap().status(), StatusCode::OK);
        // A key where it does not belong must not get into a log either.
        let _ = tollgate.get(&format!("/any?api_key={secret}")).send().await.unwrap();
    }
    let metrics = tollgate
        .client
        .get(format!("{}/metrics", tollgate.admin))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let status = tollgate
        .client
        .get(format!("{}/status", tollgate.admin))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let listed = tollgate
        .call(&account, Method::GET, "/keys", serde_json::Value::Null)
        .await
        .to_string();
    let printed = tollgate.key.clone();
    let seen = [
        ("metrics", metrics),
        ("status", status),
        ("list", listed),
        ("output", tollgate.output()),
    ];
    for secret in [&account.key, &key.secret] {
        // The random part alone would be enough to rebuild the key.
        let random = &secret[9..39];
        for (name, text) in &seen {
            assert!(!text.contains(random), "the key is in the {name}");
        }
    }
    let data = tollgate.stop();
    let mut files = 0;
    for secret in [&account.key, &key.secret, &printed] {
        each_file(data.path(), &mut |path, bytes| {
            files += 1;
            // `dev` prints its own key on stdout, once: that is where it is for.
            let shown = *secret == printed && path.ends_with("stdout");
            let needle = &secret.as_bytes()[9..39];
            assert!(
                shown || !bytes.windows(needle.len()).any(|window| window == needle),
                "a key is in {}",
                path.display()
            );
        });
    }
    assert!(
        files > 15,
        "the database, the spool, the journal and the logs were searched: {files} files"
    );
}

fn each_file(dir: &Path, each: &mut dyn FnMut(&Path, &[u8])) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            each_file(&path, each);
        } else if path.is_file() {
            each(&path, &fs::read(&path).unwrap());
        }
    }
}
