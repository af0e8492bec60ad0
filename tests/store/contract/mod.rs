//! The contract: what each test asserts must hold on every engine.

use futures_util::future::BoxFuture;

use crate::parts::Place;

mod accounts;
mod feed;
mod keys;
mod ledger;
mod sessions;

pub type Test = fn(Place) -> BoxFuture<'static, ()>;

macro_rules! contract {
    ($($subject:ident { $($test:ident),* $(,)? })*) => {
        pub const CONTRACT: &[(&str, Test)] = &[$($((stringify!($test), |place| Box::pin($subject::$test(place)))),*),*];
    };
}

contract! {
    accounts {
        an_account_is_whole_or_not_there,
        an_invitation_is_used_once,
        organizations_are_changed_and_paged,
        a_new_plan_is_told_for_every_key,
        facts_are_replaced,
    }
    keys {
        a_key_is_kept_as_it_was_given,
        a_change_that_fails_leaves_nothing,
        limits_hold_for_those_who_come_at_once,
        an_outcome_is_recorded_once_and_replayed,
        keys_are_filtered_sorted_and_paged,
    }
    feed {
        revisions_become_visible_in_order,
        a_snapshot_is_of_one_moment,
        what_was_revoked_long_ago_is_forgotten,
        a_resync_goes_beyond_every_claim,
        gates_are_remembered_as_they_speak,
    }
    sessions {
        sessions_come_and_go,
        tokens_come_and_go,
    }
    ledger {
        a_batch_counts_once_whoever_takes_it,
        a_gap_that_never_closes_costs_one_row,
        usage_is_summed_by_what_was_asked,
        an_hour_is_folded_once_whoever_does_it,
        a_last_use_only_moves_forward,
        each_secret_has_its_own_last_use,
        a_key_of_nobody_may_be_any_text,
        the_audit_log_is_read_newest_first,
        a_nul_is_nowhere,
    }
}
