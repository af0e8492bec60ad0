//! How keys come and go.

use super::*;
use std::collections::HashMap;

#[test]
fn a_resync_forgets_what_it_does_not_name_and_is_whole_or_nothing() {
    let fixture = Fixture::new([key(1, 1), key(2, 1)]);
    let mut abandoned = fixture.gate.resync(2).unwrap();
    abandoned.add(&key(3, 1)).unwrap();
    abandoned
        .add(&KeyUpdate {
            revoked: true,
            ..key(1, 1)
        })
        .unwrap();
    assert_eq!(fixture.gate.apply(key(4, 11)), Err(KeyError::Busy));
    drop(abandoned);
    assert_eq!(fixture.reason("/things", 1), Ok(()));
    assert_eq!(fixture.reason("/things", 3), Err("INVALID_API_KEY"));
    assert_eq!(fixture.gate.key_count(), 2);
    fixture.resync([key(2, 1), key(3, 1)], 20).unwrap();
    assert_eq!(fixture.reason("/things", 1), Err("INVALID_API_KEY"));
    assert_eq!(fixture.reason("/things", 2), Ok(()));
    assert_eq!(fixture.reason("/things", 3), Ok(()));
    assert_eq!(fixture.gate.revision(), Some(20));
    assert_eq!(
        fixture.resync([key(1, 1)], 19),
        Err(KeyError::Stale {
            in_force: 20,
            offered: 19
        })
    );
    assert_eq!(fixture.reason("/things", 2), Ok(()));
}

#[test]
fn changes_are_applied_in_order_and_old_ones_passed_over() {
    let fixture = Fixture::new([key(1, 1)]);
    fixture
        .gate
        .apply(KeyUpdate {
            disabled: true,
            ..key(1, 12)
        })
        .unwrap();
    fixture.gate.apply(key(1, 11)).unwrap();
    assert_eq!(fixture.reason("/things", 1), Err("DISABLED_API_KEY"));
    fixture.gate.forget("key_1", 13).unwrap();
    assert_eq!(fixture.reason("/things", 1), Err("INVALID_API_KEY"));
    assert_eq!((fixture.gate.revision(), fixture.gate.key_count()), (Some(13), 0));
    assert_eq!(
        fixture.gate.apply(KeyUpdate {
            secrets: vec![with_secret(1, None)],
            ..key(5, 14)
        }),
        Ok(()),
        "a forgotten key's secret is free"
    );
    assert_eq!(
        fixture.gate.apply(key(1, 15)),
        Err(KeyError::SecretTaken { id: "key_1".into() })
    );
}

#[test]
fn an_exported_snapshot_says_what_was_put_in() {
    let long = "key_with_an_id_that_does_not_fit_into_its_slot";
    let keys = [
        KeyUpdate {
            secrets: vec![with_secret(1, Some(START_MS)), with_secret(9, None)],
            ..key(1, 10)
        },
        KeyUpdate {
            id: long.into(),
            expires_at_ms: Some(START_MS + 5),
            disabled: true,
            ..key(2, 10)
        },
    ];
    let fixture = Fixture::new(keys.clone());
    let mut exported = vec![];
    assert_eq!(fixture.gate.export_keys(&mut |key| exported.push(key)), Some(10));
    exported.sort_by(|a, b| a.id.cmp(&b.id));
    for key in &mut exported {
        key.secrets
            .sort_by_key(|secret| secret.not_after_ms.unwrap_or(i64::MAX));
    }
    assert!(exported == keys, "{exported:?}");
    assert_eq!(fixture.reason("/things", 2), Err("DISABLED_API_KEY"));
}

#[test]
fn many_keys_with_equal_prefixes_of_their_digests_are_told_apart() {
    // 200,000 secrets: about 4.7 pairs share their first four bytes.
    let fixture = Fixture::new((0..200_000).map(|n| key(n, 1)));
    for n in (0..200_000).step_by(97) {
        assert_eq!(fixture.reason("/things", n), Ok(()), "{n}");
    }
    let in_force = fixture.gate.in_force.load();
    let snapshot = in_force.snapshot.as_ref().unwrap();
    let is_there = |n: &u32| {
        let digest = SecretDigest::of(secret(*n).as_bytes());
        snapshot.find(&fixture.gate.slots, &digest).is_some()
    };
    assert_eq!((0..200_000).filter(is_there).count(), 200_000);
}

#[test]
fn thousands_of_changes_later_every_secret_is_found_and_none_that_is_gone() {
    // Enough to make a new base of the map several times over; the digest is of the secret that a key has at the time.
    const CHANGES: u32 = 7_000;
    let fixture = Fixture::new((0..100).map(|n| key(n, 1)));
    let mut living: HashMap<u32, u32> = (0..100).map(|n| (n, n)).collect();
    for change in 0..CHANGES {
        let (n, revision) = (change * 7 % 300, 11 + u64::from(change));
        let (before, after) = (living.get(&n).copied(), 1_000 + change);
        if change % 5 == 4 {
            fixture.gate.forget(&format!("key_{n}"), revision).unwrap();
            living.remove(&n);
        } else {
            // Rotated without grace, or there anew.
            let secrets = vec![with_secret(after, None)];
            fixture
                .gate
                .apply(KeyUpdate {
                    secrets,
                    ..key(n, revision)
                })
                .unwrap();
            living.insert(n, after);
        }
        if let Some(gone) = before {
            assert!(!fixture.gate.has_secret(secret(gone).as_bytes()), "{change}: {gone}");
        }
    }
    for (n, held) in &living {
        assert!(fixture.gate.has_secret(secret(*held).as_bytes()), "key_{n}");
    }
    assert_eq!(fixture.gate.key_count(), living.len());
    let slots = fixture.gate.with_writer(|writer| writer.slot_ids().end).unwrap();
    assert!(slots < 400, "{slots} slots for at most 300 keys at a time");
}

#[test]
fn a_slot_is_not_given_to_another_key_while_a_reader_may_be_in_it() {
    let fixture = Fixture::new([key(1, 1)]);
    let id_in_slot_0 = || fixture.gate.slots.key_id(0).as_str().to_owned();
    assert_eq!(id_in_slot_0(), "key_1");
    // What a request holds on to that is put aside in the middle of its decision.
    let reader = fixture.gate.in_force.load();
    fixture.gate.forget("key_1", 11).unwrap();
    assert_eq!(
        fixture.reason("/things", 1),
        Err("INVALID_API_KEY"),
        "gone for all others"
    );
    for n in 2..50 {
        fixture.gate.apply(key(n, 10 + u64::from(n))).unwrap();
        assert_eq!(id_in_slot_0(), "key_1");
    }
    drop(reader);
    for n in 50..60 {
        fixture.gate.apply(key(n, 10 + u64::from(n))).unwrap();
    }
    assert_ne!(id_in_slot_0(), "key_1");
    for n in 2..60 {
        assert!(fixture.gate.has_secret(secret(n).as_bytes()), "{n}");
    }
}

#[test]
fn a_permit_goes_on_saying_what_it_was_given_for_while_thousands_of_changes_reuse_what_they_can() {
    let fixture = Fixture::new([key(1, 1)]);
    let of_organization = |n: u32| KeyUpdate {
        organization: format!("org_{n}").into(),
        expires_at_ms: Some(i64::MAX - i64::from(n)),
        ..key(1, 100 + u64::from(n))
    };
    fixture.gate.apply(of_organization(0)).unwrap();
    let permit = fixture.ask("/things", &secret(1)).unwrap();
    for n in 1..3_000 {
        fixture.gate.apply(of_organization(n)).unwrap();
    }
    assert_eq!(permit.holder().unwrap().organization(), "org_0");
    let now = fixture.ask("/things", &secret(1)).unwrap();
    assert_eq!(now.holder().unwrap().organization(), "org_2999");
    // Numbers are used again: 3,000 different terms have had a handful of them.
    let known = fixture.gate.in_force.load().facts.terms.clone();
    assert!((20..3_000).all(|id| known.get(id).is_none()));
}
