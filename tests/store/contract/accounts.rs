//! Organisations, invitations, facts.

use futures_util::future::join_all;
use tollgate::control::model::{Fault, Invitation};
use tollgate::control::store::OrganizationQuery;
use tollgate::wire::FeedLine;

use crate::parts::*;

pub async fn an_account_is_whole_or_not_there(place: Place) {
    let store = &*place.store;
    let mut first = account("acme");
    first.key = Some(key("org_acme", "first"));
    let caller = caller();
    assert_eq!(store.create_account(&first, at(&caller, 500)).await, Ok(1));
    assert_eq!(
        store.organization("org_acme").await.unwrap().unwrap(),
        first.organization
    );
    let known = store.credentials_by_email("acme@example.com").await.unwrap().unwrap();
    assert_eq!(
        (known.user, known.password_hash),
        (user("acme"), "$argon2id$".to_owned())
    );
    assert!(store.credentials_by_user("usr_acme").await.unwrap().is_some());
    let (lines, through) = changes(store, 0).await;
    assert_eq!((lines.len(), through), (1, 1));

    // The same address again: nothing of it stays.
    let mut second = account("bolt");
    second.user.as_mut().unwrap().0.email = "acme@example.com".into();
    second.key = Some(key("org_bolt", "second"));
    assert_eq!(
        store.create_account(&second, at(&caller, 500)).await,
        Err(Fault::EmailTaken)
    );
    assert_eq!(store.organization("org_bolt").await.unwrap(), None);
    assert_eq!(store.revision().await, Ok(1));
    assert_eq!(
        register(store, "core").await,
        1,
        "an account without a key changes no revision"
    );
}

pub async fn an_invitation_is_used_once(place: Place) {
    let store = &*place.store;
    let caller = caller();
    let invitation = Invitation {
        id: "inv_1".into(),
        note: "for somebody".into(),
        created_at_ms: 1,
        expires_at_ms: 1_000,
        used_at_ms: None,
        used_by: None,
    };
    store
        .create_invitation(&invitation, &digest("i"), at(&caller, 1))
        .await
        .unwrap();
    assert_eq!(
        store.invitations(None, 10).await.unwrap(),
        std::slice::from_ref(&invitation)
    );
    let invited = |name: &str| {
        let mut account = account(name);
        account.invitation = Some(digest("i"));
        account
    };
    let late = store.create_account(&invited("late"), at(&caller, 1_000)).await;
    assert_eq!(late, Err(Fault::InvitationInvalid));
    let names = ["a111", "b222", "c333", "d444"];
    let stamp = at(&caller, 999);
    let tries = join_all(
        names
            .iter()
            .map(|name| async move { store.create_account(&invited(name), stamp).await }),
    )
    .await;
    assert_eq!(tries.iter().filter(|tried| tried.is_ok()).count(), 1, "{tries:?}");
    assert!(
        tries
            .iter()
            .all(|tried| matches!(tried, Ok(_) | Err(Fault::InvitationInvalid)))
    );
    let used = &store.invitations(None, 10).await.unwrap()[0];
    assert!(used.used_by.is_some() && used.used_at_ms == Some(999));
    assert_eq!(store.invitations(Some(&(1, "inv_1".into())), 10).await.unwrap(), []);
    assert_eq!(store.delete_invitation("inv_1", stamp).await, Ok(true));
    assert_eq!(store.delete_invitation("inv_1", stamp).await, Ok(false));
}

pub async fn organizations_are_changed_and_paged(place: Place) {
    let store = &*place.store;
    let caller = caller();
    for (index, name) in ["Zebra", "apple", "Äpfel", "100%"].iter().enumerate() {
        let mut account = account("x");
        account.organization.id = format!("org_{index}");
        account.organization.name = (*name).into();
        account.user = None;
        store.create_account(&account, at(&caller, 500)).await.unwrap();
    }
    let list = async |search: Option<&str>, after: Option<(i64, String)>| {
        let query = OrganizationQuery {
            search: search.map(str::to_owned),
            after,
            limit: 10,
        };
        let found = store.organizations(&query).await.unwrap();
        found
            .into_iter()
            .map(|organization| organization.name)
            .collect::<Vec<_>>()
    };
    assert_eq!(list(Some("ZEB"), None).await, ["Zebra"]);
    assert_eq!(list(Some("0%"), None).await, ["100%"]);
    assert_eq!(list(Some("_"), None).await, [""; 0]);
    assert_eq!(list(None, None).await.len(), 4);
    let first = OrganizationQuery {
        limit: 1,
        ..OrganizationQuery::default()
    };
    let first = store.organizations(&first).await.unwrap().pop().unwrap();
    assert_eq!(list(None, Some((first.created_at_ms, first.id.clone()))).await.len(), 3);
    let edited = store
        .edit_organization(&first.id, Some("Neu"), None, at(&caller, 1))
        .await;
    assert_eq!(edited.unwrap().unwrap().0.name, "Neu");
    assert_eq!(
        store
            .edit_organization("org_none", Some("n"), None, at(&caller, 1))
            .await,
        Ok(None)
    );
}

pub async fn a_new_plan_is_told_for_every_key(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    register(store, "bolt").await;
    for name in ["k001", "k002", "k003"] {
        create(store, "org_acme", name).await.unwrap();
    }
    create(store, "org_bolt", "k004").await.unwrap();
    let caller = caller();
    let edited = store
        .edit_organization("org_acme", None, Some("business"), at(&caller, 9))
        .await
        .unwrap();
    assert_eq!(edited.unwrap().1, 7);
    let (lines, through) = changes(store, 4).await;
    assert_eq!(through, 7);
    assert_eq!(lines.iter().map(revision).collect::<Vec<_>>(), [5, 6, 7]);
    for line in lines {
        let FeedLine::Key(line) = line else { panic!() };
        assert_eq!(
            (line.plan.as_str(), line.organization.as_str()),
            ("business", "org_acme")
        );
        assert_eq!(
            store.key(None, &line.id).await.unwrap().unwrap().revision,
            line.revision
        );
    }
    let same = store
        .edit_organization("org_acme", None, Some("business"), at(&caller, 9))
        .await
        .unwrap();
    assert_eq!(same.unwrap().1, 7, "nothing has changed");
}

pub async fn facts_are_replaced(place: Place) {
    let store = &*place.store;
    assert_eq!(store.fact("name").await, Ok(None));
    store.set_fact("name", "one").await.unwrap();
    store.set_fact("name", "two").await.unwrap();
    assert_eq!(store.fact("name").await.unwrap().as_deref(), Some("two"));
}
