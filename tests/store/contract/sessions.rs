//! Sessions and access tokens.

use futures_util::future::join_all;
use tollgate::control::model::AccessToken;
use tollgate::control::store::{EndSessions, MOST_SESSIONS};

use crate::parts::*;

pub async fn sessions_come_and_go(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    let caller = caller();
    let stamp = at(&caller, 0);
    for index in 0..MOST_SESSIONS + 3 {
        store
            .begin_session(&session("acme", &format!("s{index}"), index), None, stamp)
            .await
            .unwrap();
    }
    let list = store.sessions("usr_acme", 0).await.unwrap();
    assert_eq!((list.len() as i64, list[0].id.as_str()), (MOST_SESSIONS, "ses_s52"));
    assert_eq!(
        store.session(&digest("s2"), 0).await.unwrap(),
        None,
        "the oldest gave way"
    );
    let (found, whose) = store.session(&digest("s9"), 0).await.unwrap().unwrap();
    assert_eq!((found, whose), (session("acme", "s9", 9).session, user("acme")));
    assert_eq!(
        store.session(&digest("s9"), 10_009).await.unwrap(),
        None,
        "its time is over"
    );
    store.touch_session("ses_s9", 5_000).await.unwrap();
    store.touch_session("ses_s9", 4_000).await.unwrap();
    assert_eq!(store.sessions("usr_acme", 0).await.unwrap()[0].last_used_at_ms, 5_000);
    // Signing in again ends the session that the browser brought along.
    store
        .begin_session(&session("acme", "new", 60), Some(&digest("s9")), stamp)
        .await
        .unwrap();
    assert_eq!(store.session(&digest("s9"), 0).await.unwrap(), None);
    assert_eq!(
        store.end_sessions("usr_acme", EndSessions::One("ses_s52"), stamp).await,
        Ok(1)
    );
    assert_eq!(
        store.end_sessions("usr_acme", EndSessions::One("ses_s52"), stamp).await,
        Ok(0)
    );
    let rest = store
        .end_sessions("usr_acme", EndSessions::AllBut("ses_new"), stamp)
        .await;
    assert_eq!(rest, Ok(MOST_SESSIONS as u64 - 2));
    store
        .change_password("usr_acme", "$new$", &session("acme", "last", 70), stamp)
        .await
        .unwrap();
    let left = store.sessions("usr_acme", 0).await.unwrap();
    assert_eq!(
        left.iter().map(|session| session.id.as_str()).collect::<Vec<_>>(),
        ["ses_last"]
    );
    let known = store.credentials_by_user("usr_acme").await.unwrap().unwrap();
    assert_eq!(known.password_hash, "$new$");
    store.prune(10_070).await.unwrap();
    assert_eq!(store.sessions("usr_acme", 0).await.unwrap(), []);
}

pub async fn tokens_come_and_go(place: Place) {
    let (store, other) = (place.store.clone(), place.again().await);
    register(&*store, "acme").await;
    let caller = caller();
    let token = |name: &str| AccessToken {
        id: format!("tok_{name}"),
        organization_id: "org_acme".into(),
        name: name.into(),
        last_four: "abcd".into(),
        created_at_ms: 5,
        expires_at_ms: Some(100),
        last_used_at_ms: None,
    };
    let stamp = at(&caller, 5);
    let names: Vec<String> = (0..8).map(|number| number.to_string()).collect();
    let tries = join_all(names.iter().enumerate().map(|(index, name)| {
        let store = if index % 2 == 0 { &store } else { &other };
        let token = token(name);
        async move { store.create_token(&token, &digest(&token.name), 3, stamp).await }
    }))
    .await;
    assert_eq!(tries.iter().filter(|tried| tried.is_ok()).count(), 3, "{tries:?}");
    let list = store.tokens("org_acme").await.unwrap();
    let first = &list[0];
    assert_eq!(
        store.token(&digest(&first.name), 99).await.unwrap().as_ref(),
        Some(first)
    );
    assert_eq!(store.token(&digest(&first.name), 100).await.unwrap(), None);
    store.touch_token(&first.id, 50).await.unwrap();
    store.touch_token(&first.id, 40).await.unwrap();
    assert_eq!(
        store
            .token(&digest(&first.name), 0)
            .await
            .unwrap()
            .unwrap()
            .last_used_at_ms,
        Some(50)
    );
    assert_eq!(store.delete_token("org_bolt", &first.id, stamp).await, Ok(false));
    assert_eq!(store.delete_token("org_acme", &first.id, stamp).await, Ok(true));
    assert_eq!(store.tokens("org_acme").await.unwrap().len(), 2);
}
