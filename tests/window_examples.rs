//! What the window does, by example; `window_model.rs` holds the same promises against an exact log.

use tollgate::gate::limit::Limit;
use tollgate::gate::window::{Refused, Taken, Window, WindowCounts};

const S: u64 = 1_000_000_000;
/// Some time after the clock's origin, at the start of a sub-bucket of every window used here.
const T0: u64 = 1_000 * 3_600 * S;

fn limit(permits: u32, window_ms: u64) -> Limit {
    Limit::new(permits, window_ms).unwrap()
}

fn retry_after(refused: Refused) -> u32 {
    match refused {
        Refused::Limited { retry_after_s, .. } => retry_after_s,
        other => panic!("refused, but {other:?}"),
    }
}

#[test]
fn permits_count_down_and_come_back_after_a_window_and_a_sub_bucket() {
    let hourly = limit(3, 3_600_000);
    let window = Window::new(hourly, T0);
    assert_eq!(
        window.take(hourly, 1, T0),
        Ok(Taken {
            remaining: 2,
            reset_s: 3_660
        })
    );
    assert_eq!(
        window.take(hourly, 1, T0 + 10 * S),
        Ok(Taken {
            remaining: 1,
            reset_s: 3_650
        })
    );
    assert_eq!(
        window.take(hourly, 1, T0 + 60 * S),
        Ok(Taken {
            remaining: 0,
            reset_s: 3_600
        })
    );
    let refused = window.take(hourly, 1, T0 + 61 * S + 1);
    assert_eq!(
        refused,
        Err(Refused::Limited {
            retry_after_s: 3_599,
            reset_s: 3_599
        })
    );
    assert_eq!(window.peek(hourly, 1, T0 + 61 * S + 1), refused.map(drop));
    assert!(window.take(hourly, 1, T0 + 3_660 * S - 1).is_err());
    assert_eq!(window.peek(hourly, 1, T0 + 3_660 * S), Ok(()));
    assert_eq!(
        window.take(hourly, 1, T0 + 3_660 * S),
        Ok(Taken {
            remaining: 1,
            reset_s: 60
        })
    );
}

#[test]
fn a_cost_is_taken_whole_or_not_at_all() {
    let ten = limit(10, 60_000);
    let window = Window::new(ten, T0);
    assert_eq!(window.take(ten, 11, T0), Err(Refused::NeverFits));
    assert_eq!(window.take(ten, 7, T0).unwrap().remaining, 3);
    assert_eq!(retry_after(window.take(ten, 4, T0).unwrap_err()), 61);
    assert_eq!(window.take(ten, 3, T0).unwrap().remaining, 0);
    assert_eq!(
        window.take(ten, 0, T0),
        Ok(Taken {
            remaining: 0,
            reset_s: 61
        })
    );
    assert_eq!(window.used(T0), 10);
    assert_eq!(window.used(T0 + 61 * S), 0);
}

#[test]
fn a_changed_limit_applies_at_once_to_what_is_counted() {
    let (low, high) = (limit(70, 60_000), limit(1_000, 60_000));
    let window = Window::new(high, T0);
    for sub_bucket in 0..10 {
        window.take(high, 10, T0 + sub_bucket * S).unwrap();
    }
    let now = T0 + 10 * S;
    // 100 are counted: of 70, 31 have to leave first, and the fourth sub-bucket with a permit frees them.
    assert_eq!(retry_after(window.take(low, 1, now).unwrap_err()), 54);
    assert_eq!(window.take(high, 1, now).unwrap().remaining, 899);
    assert!(window.take(low, 1, T0 + 63 * S).is_err());
    assert_eq!(window.take(low, 1, T0 + 65 * S).unwrap().remaining, 18);
}

#[test]
fn a_window_too_small_for_its_limit_says_so_and_moves_without_loss() {
    for (window_ms, fits, outgrown, bytes) in [
        (60_000, 63, 64, 168),
        (60_000, 1_023, 1_024, 232),
        (60_000, 32_767, 32_768, 312),
        (60_000, Limit::MAX_PERMITS, 0, 552),
        (3_600_000, 255, 256, 168),
        (3_600_000, 8_191, 8_192, 232),
        (86_400_000, 524_287, 524_288, 312),
        (86_400_000, Limit::MAX_PERMITS, 0, 552),
    ] {
        let (step, seconds) = (window_ms / 60 * 1_000_000, (window_ms / 60_000) as u32);
        let small = limit(fits, window_ms);
        let window = Window::new(small, T0);
        assert_eq!(window.bytes(), bytes);
        assert_eq!(window.take(small, fits, T0).unwrap().remaining, 0);
        assert!(
            window.take(small, 1, T0 + 59 * step).is_err(),
            "full to the brim of its bits"
        );
        if outgrown == 0 {
            continue;
        }
        let large = limit(outgrown, window_ms);
        assert_eq!(window.take(large, 1, T0 + 30 * step), Err(Refused::Outgrown));
        let counts = window.close_and_export();
        assert_eq!(window.take(small, 1, T0 + 500 * step), Err(Refused::Retired));
        assert_eq!(window.close_and_export(), counts, "every helper sees the same");
        let moved = Window::import(large, &counts, T0 + 30 * step);
        assert_eq!(
            moved.take(large, 1, T0 + 30 * step),
            Ok(Taken {
                remaining: 0,
                reset_s: 31 * seconds
            })
        );
        assert_eq!(
            retry_after(moved.take(large, 1, T0 + 30 * step).unwrap_err()),
            31 * seconds
        );
    }
}

#[test]
fn another_window_length_takes_the_counts_along() {
    let (hourly, brief, daily) = (limit(100, 3_600_000), limit(100, 10_000), limit(100, 86_400_000));
    let window = Window::new(hourly, T0);
    window.take(hourly, 60, T0).unwrap();
    window.take(hourly, 30, T0 + 600 * S + 5).unwrap();
    let now = T0 + 600 * S + 6;
    assert_eq!(window.take(daily, 1, now), Err(Refused::Outgrown));
    let counts = window.close_and_export();
    assert_eq!(
        counts.iter().collect::<Vec<_>>(),
        [(T0 + 60 * S - 1, 60), (T0 + 660 * S - 1, 30)]
    );
    assert_eq!(Window::import(daily, &counts, now).used(now), 90);
    // The 60 cannot have been given within the last ten seconds, the 30 can: not later than now, though.
    let briefly = Window::import(brief, &counts, now);
    assert_eq!(briefly.used(now), 30);
    assert_eq!(briefly.used(now + 11 * S), 0);
}

#[test]
fn only_idle_windows_retire() {
    let two = limit(2, 1_000);
    let window = Window::new(two, T0);
    window.take(two, 1, T0).unwrap();
    assert!(!window.retire_if_idle(T0 + S));
    assert!(!window.is_retired());
    assert!(window.retire_if_idle(T0 + S + S / 60 + 1));
    assert_eq!(window.take(two, 1, T0 + 9 * S), Err(Refused::Retired));
    assert_eq!(window.peek(two, 1, T0 + 9 * S), Err(Refused::Retired));
    assert!(window.retire_if_idle(T0), "closed stays closed");
    assert_eq!(window.used(T0), 0);
}

#[test]
fn counts_go_through_a_journal_unchanged() {
    let minute = limit(5_000, 60_000);
    let window = Window::new(minute, T0);
    for step in 0..90 {
        window
            .take(minute, 1 + step as u32, T0 + step * S + 7)
            .unwrap_or(Taken {
                remaining: 0,
                reset_s: 0,
            });
    }
    let now = T0 + 89 * S + 8;
    let counts = window.export(now);
    assert_eq!(counts.total(), u64::from(window.used(now)));
    let read_back = WindowCounts::from_pairs(counts.iter().collect::<Vec<_>>().into_iter().rev());
    let restored = Window::import(minute, &read_back, now);
    assert_eq!(restored.export(now), counts);
    for later in [0, 1, 30, 59, 60, 61] {
        assert_eq!(restored.used(now + later * S), window.used(now + later * S));
    }
    // Twice the counts: a journal merged with what was taken since.
    let mut twice = counts.clone();
    twice.merge(&read_back);
    assert_eq!(Window::import(minute, &twice, now).used(now), 2 * window.used(now));
}

#[test]
fn counts_beyond_what_can_be_counted_refuse_until_they_leave() {
    let most = limit(Limit::MAX_PERMITS, 60_000);
    let counts = WindowCounts::from_pairs([(T0, u32::MAX), (T0 + 10 * S, 1_000), (T0 + 3_000 * S, 5)]);
    let window = Window::import(most, &counts, T0 + 20 * S);
    assert_eq!(window.used(T0 + 20 * S), Limit::MAX_PERMITS);
    assert_eq!(
        window.used(T0 + 61 * S),
        1_005,
        "what claims to come from the future is counted as of now"
    );
    assert_eq!(window.used(T0 + 81 * S), 0);
}

#[test]
fn the_end_of_the_epochs_fails_closed() {
    let one = limit(1, 1_000);
    let last_epoch = (1_u64 << 33) - 2;
    let end_ns = (last_epoch + 1) * S / 60; // exact, as 2^33 - 1 is no multiple of 3: rounded down
    let window = Window::new(one, end_ns - 10 * S);
    assert!(window.take(one, 1, end_ns).is_ok());
    assert!(window.take(one, 1, end_ns).is_err());
    for late in [end_ns + 1, end_ns + 100 * S, u64::MAX / 4, u64::MAX] {
        let never = Err(Refused::Limited {
            retry_after_s: u32::MAX,
            reset_s: u32::MAX,
        });
        assert_eq!(window.take(one, 1, late), never);
        assert_eq!(window.peek(one, 1, late), never.map(drop));
        assert_eq!(Window::new(one, late).take(one, 1, late), never);
    }
    // The longest window never gets there: its time stands still first.
    let slow = limit(1, Limit::MAX_WINDOW_MS);
    let window = Window::new(slow, u64::MAX);
    assert!(window.take(slow, 1, u64::MAX).is_ok());
    assert!(window.take(slow, 1, u64::MAX).is_err());
}

#[test]
fn a_clock_that_goes_back_refunds_nothing() {
    let two = limit(2, 60_000);
    let window = Window::new(two, T0);
    window.take(two, 1, T0 + 100 * S).unwrap();
    window.take(two, 1, T0).unwrap();
    for back in [T0 + 99 * S, T0, T0 - 1_000 * S, 0] {
        assert!(window.take(two, 1, back).is_err());
        assert!(!window.retire_if_idle(back));
    }
    // It was counted where the window was, so it leaves with the other.
    assert_eq!(window.used(T0 + 160 * S), 2);
    assert_eq!(window.used(T0 + 161 * S), 0);
}
