//! What a gate says to the store and hears from it. Values only: no clock, no I/O.
//!
//! # The protocol
//! A gate gives permits of a shared limit only out of a *reservation* that the store has counted beforehand, in full,
//! against the limit. So a decision needs nobody. The store holds one count per (key, tier, window length), cut
//! into sub-buckets by the store's own clock; a call ([`Ask`]) tells it what was spent and what is still held, and
//! asks for more; an atomic script (`script.lua`, the same in `memory.rs`) answers ([`Answer`]).
//!
//! - *Labels.* A reservation is counted in a sub-bucket in which, at the latest, it can be spent: the script
//!   chooses the label, and says how long it has to run. The gate counts that time from **before it sent the
//!   call**, by its own monotonic clock. So its clock need not agree with anybody's.
//! - *Stamps.* What the gate reports as spent moves from the label to the sub-bucket of the report, or stays where
//!   that is earlier. Either is no earlier than when it was spent.
//! - *Sequence.* A gate's field is replaced by calls of a higher number only, and each call says all that the gate has
//!   ever spent, so a call that is lost, repeated, late or overtaken changes nothing.
//! - *Several calls at once.* A request that finds nothing reserved waits for a call of its own, not for the one before it to
//!   come back first. So grants are told as a sum: the answer says all that was ever granted, the next call how much
//!   of that the gate had heard of. The rest it may still hear of, so it stays reserved; and it goes towards what the
//!   call wants, so each call wants all that is wanted, whichever of them arrives. The label of what is held never
//!   moves back, as the gate may have been told the later one.
//!
//! # Why never more than L
//! Take any interval of length W and the last grant that a permit in it was spent from, made at T. Every
//! other permit of the interval was granted before T and spent after T − W, so it lies in a sub-bucket that ends
//! after T − W: it is still counted at T. The script at T grants at most L less all that is counted.
//! What a gate has given up is counted no more, and it is never spent: the gate took it out of its hands before it said so,
//! or has heard of it and left it, and believes no answer that tells of it again, as the sum is one it knows.
//!
//! # A store that forgets
//! What was granted in between, and not heard of, is never handed on: the first calls under an identity give it up.
//! Its [`Identity`], read after the calls on the same connection, is the running server's id and a token that is lost with
//! the data. Grants under an identity count for a gate once every gate that could hold permits has told
//! its whole history under it (`members.rs`).

use std::fmt;
use std::sync::Arc;

/// How finely the store counts: sub-buckets to a window. Twice as fine for short windows as the gate's own 60, because
/// there a round trip is a good part of a sub-bucket, and what is kept for a minute takes little room.
pub fn buckets(window_ms: u64) -> u64 {
    if window_ms < 4_000 {
        240
    } else if window_ms < 60_000 {
        120
    } else {
        60
    }
}

/// One window's life in one process: the process's random number, and a count of its windows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FieldId {
    /// Random. Never a time: clones of a machine would have the same.
    pub process: u64,
    /// Which of the process's windows.
    pub window: u32,
}

impl fmt::Display for FieldId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:x}", self.process, self.window)
    }
}

/// A window's call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ask {
    /// Whose.
    pub id: FieldId,
    /// Higher than that of every earlier call of this id.
    pub sequence: u64,
    /// The limit's permits.
    pub limit: u32,
    /// The window's length in milliseconds.
    pub window_ms: u64,
    /// All that was ever spent under this id.
    pub spent: u64,
    /// What is held and may yet be spent.
    pub reserved: u32,
    /// How much the gate has heard to have been granted to this id, ever. What it holds of more than that it does not know yet.
    pub granted: u64,
    /// The gate believes no answer to an earlier call: what it has not heard of is given up.
    pub afresh: bool,
    /// The latest sub-bucket in which what is held, or was, may be spent; 0 before the first grant.
    pub held_until: u64,
    /// The latest sub-bucket in which what was spent since the last answer can have been; 0: it may have been any.
    pub spent_until: u64,
    /// How many more than `reserved`.
    pub want: u32,
    /// How long they will be needed for, in milliseconds.
    pub hold_ms: u64,
    /// How much longer than W a permit counts, in milliseconds, because the clock may have changed.
    pub slack_ms: u64,
    /// The most that any caller's slack can be.
    pub keep_ms: u64,
    /// What was spent and when, for a store that does not know; `None` where it should.
    pub history: Option<History>,
}

/// What a gate has spent, by the store's sub-buckets.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct History {
    /// How much of what was spent is in here, or too old to count.
    pub base: u64,
    /// Sub-bucket and count, oldest first.
    pub counts: Vec<(u64, u64)>,
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.base)?;
        self.counts.iter().try_for_each(|(epoch, n)| write!(f, " {epoch}:{n}"))
    }
}

/// What the store says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The call was taken in.
    Done(Grant),
    /// A later call came before: nothing was changed.
    Overtaken,
    /// The store does not know this id, and should: nothing was changed. To be asked again with the history.
    Unknown,
}

/// A call that was taken in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    /// All that was ever granted to this id.
    pub granted: u64,
    /// The sub-bucket that all which is now held counts in. Where the call came after what was held had lapsed, that is
    /// the old one, and nothing was granted.
    pub label: u64,
    /// For how long it may be spent, in milliseconds; may be negative.
    pub valid_ms: i64,
    /// What counts against the limit now, over all gates, this grant included.
    pub total: i64,
    /// When the oldest that counts leaves, in milliseconds from now; 0 where nothing counts.
    pub leaves_ms: u64,
    /// The sub-bucket that the newly spent was counted in.
    pub stamp: u64,
}

/// Which store it is, and which content: `TOKEN.RUN_ID`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity(pub Arc<str>);

impl Identity {
    /// Of a content's token and a server's run id.
    pub fn new(token: &str, run_id: &str) -> Self {
        Identity(format!("{token}.{run_id}").into())
    }
}

/// A gate's sign of life.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The process.
    pub id: u64,
    /// The gate's name.
    pub name: Arc<str>,
    /// What the store's content is to be called if it has no name.
    pub candidate: String,
    /// The identity that all the gate knows was told to.
    pub refilled: String,
    /// The highest number of a gate that this one has heard of.
    pub seen: u64,
    /// When an identity was lost (ms of the store's clock) under which gates were known that are missed since; 0: none is.
    pub unresolved_ms: u64,
    /// It ends in good order.
    pub left: bool,
    /// The version of the list that it has; `None` to hear it in any case.
    pub version: Option<u64>,
    /// After so long without a sign of life a gate is forgotten.
    pub forget_ms: u64,
}

/// What it hears.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Census {
    /// The store's time in milliseconds.
    pub now_ms: u64,
    /// When this content began.
    pub born_ms: u64,
    /// The version of the list.
    pub version: u64,
    /// This gate's number.
    pub joined: u64,
    /// The highest number.
    pub joins: u64,
    /// All gates, this one among them, where the list is another than the gate has.
    pub gates: Option<Vec<Entry>>,
}

/// A gate in the list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The process.
    pub id: u64,
    /// Its number.
    pub joined: u64,
    /// See [`Hello::seen`].
    pub seen: u64,
    /// When it was last heard, in milliseconds of the store's clock.
    pub last_ms: u64,
    /// See [`Hello::unresolved_ms`].
    pub unresolved_ms: u64,
    /// It ended in good order.
    pub left: bool,
    /// The identity that it has told its history to.
    pub refilled: String,
    /// Its name.
    pub name: String,
}

/// Several calls that go together, and the check of who answered.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Batch {
    /// The connection there is may hang: to be sent over a new one.
    pub anew: bool,
    /// Sent first.
    pub hello: Option<Hello>,
    /// The windows' names and calls.
    pub asks: Vec<(Arc<str>, Ask)>,
}

/// The answers to a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BatchAnswer {
    /// Read after all else; `None` while the content has no name.
    pub token: Option<String>,
    /// The server's.
    pub run_id: String,
    /// The answer to the hello, if there was one.
    pub census: Option<Census>,
    /// The answers to the calls, in their order; `None` where the store refused one.
    pub answers: Vec<Option<Answer>>,
}

impl BatchAnswer {
    /// Who answered.
    pub fn identity(&self) -> Option<Identity> {
        self.token.as_ref().map(|token| Identity::new(token, &self.run_id))
    }
}

/// What a gate does while the store is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnLoss {
    /// Gives its share of what was left.
    Share,
    /// Gives what it had reserved.
    Closed,
    /// Counts alone.
    Local,
}
