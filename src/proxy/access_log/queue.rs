//! Lines on their way to the writer: requests append to the last of some chunks, the writer takes away the first.
//!
//! The lock is held while one line is copied or one chunk changes hands, never while anything is written. A request
//! wakes the writer only where it sleeps with nothing to do, or rests while much has come; each of the two happens
//! once, however many requests come, until the writer looks again.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What leaves in one write, as long as no line is longer. As much as a pipe takes, and some two hundred lines.
const CHUNK_BYTES: usize = 64 << 10;

/// For how long the first line of a chunk waits for others. A busy gate writes a hundred times a second then, which
/// costs it nothing, and who watches the log does not see that it is late.
pub(super) const LINGER: Duration = Duration::from_millis(10);

/// Lines that wait, between the requests and the writer.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    /// The writer has something to do. Nobody else waits for it.
    due: Condvar,
    reopened: Condvar,
}

/// Lines that are written together.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    pub(super) bytes: Vec<u8>,
    pub(super) lines: usize,
}

/// What the writer is to do.
#[derive(Debug)]
pub(super) enum Task {
    Write(Chunk),
    /// To open its file anew, and to say so by [`Queue::reopened`].
    Reopen(Turn),
    End,
}

/// Which of the calls to open anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn(u64);

impl Queue {
    /// Takes up to `room` lines.
    pub(super) fn new(room: usize) -> Self {
        Queue {
            waiting: Mutex::new(Waiting::new(room)),
            due: Condvar::new(),
            reopened: Condvar::new(),
        }
    }

    /// Whether there was room for the line.
    pub(super) fn push(&self, line: &[u8]) -> bool {
        let pushed = self.waiting().push(line);
        if pushed == Pushed::AndWakes {
            self.due.notify_one();
        }
        pushed != Pushed::NoRoom
    }

    /// Waits for the writer's next task. What it has written it gives back, to be filled again.
    pub(super) fn next(&self, written: Chunk) -> Task {
        let mut waiting = self.waiting();
        waiting.take_back(written);
        loop {
            waiting = match waiting.step(Instant::now()) {
                Step::Do(task) => return task,
                Step::Sleep => self.due.wait(waiting).unwrap_or_else(PoisonError::into_inner),
                Step::Rest(time) => {
                    let woken = self.due.wait_timeout(waiting, time);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Has the writer open its file anew, and waits until it has, or `within` is over.
    pub(super) fn reopen(&self, within: Duration) {
        let mut waiting = self.waiting();
        waiting.asked_to_reopen.0 += 1;
        let turn = waiting.asked_to_reopen;
        self.due.notify_one();
        let waited = self
            .reopened
            .wait_timeout_while(waiting, within, |waiting| waiting.reopened < turn);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// The file was opened anew.
    pub(super) fn reopened(&self, turn: Turn) {
        self.waiting().reopened = turn;
        self.reopened.notify_all();
    }

    /// Has the writer end, after it has written what waits.
    pub(super) fn end(&self) {
        self.waiting().end(Instant::now());
        self.due.notify_one();
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Waiting {
    /// None of them is empty.
    chunks: VecDeque<Chunk>,
    /// An empty one, to be used next.
    spare: Option<Chunk>,
    /// In all chunks.
    lines: usize,
    room: usize,
    writer: Writer,
    /// When the first line has waited long enough, once the writer has seen it.
    until: Option<Instant>,
    asked_to_reopen: Turn,
    reopened: Turn,
    /// When the writer ends, unless lines come still: some answers are sent before their lines are here.
    ends: Option<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
enum Writer {
    /// Until somebody wakes it.
    Sleeps,
    /// For a while, until more has come.
    Rests,
    /// Looks again by itself.
    Works,
    Ended,
}

#[derive(Debug, PartialEq, Eq)]
enum Pushed {
    NoRoom,
    Quietly,
    AndWakes,
}

#[derive(Debug)]
enum Step {
    Sleep,
    Rest(Duration),
    Do(Task),
}

impl Waiting {
    fn new(room: usize) -> Self {
        Waiting {
            chunks: VecDeque::new(),
            spare: None,
            lines: 0,
            room,
            writer: Writer::Works,
            until: None,
            asked_to_reopen: Turn::default(),
            reopened: Turn::default(),
            ends: None,
        }
    }

    fn push(&mut self, line: &[u8]) -> Pushed {
        if self.lines >= self.room || self.writer == Writer::Ended {
            return Pushed::NoRoom;
        }
        match self.chunks.back_mut() {
            Some(last) if last.bytes.len() + line.len() <= CHUNK_BYTES => last.push(line),
            _ => {
                // A chunk never grows, so that nothing is moved under the lock but this line.
                let spare = self.spare.take_if(|_| line.len() <= CHUNK_BYTES);
                let mut next = spare.unwrap_or_else(|| Chunk::of(line.len()));
                next.push(line);
                self.chunks.push_back(next);
            }
        }
        self.lines += 1;
        let wakes = match self.writer {
            Writer::Sleeps => true,
            Writer::Rests => self.is_much(),
            Writer::Works | Writer::Ended => false,
        };
        if !wakes {
            return Pushed::Quietly;
        }
        self.writer = Writer::Works;
        Pushed::AndWakes
    }

    fn step(&mut self, now: Instant) -> Step {
        self.writer = Writer::Works;
        if self.reopened < self.asked_to_reopen {
            return Step::Do(Task::Reopen(self.asked_to_reopen));
        }
        if !self.chunks.is_empty() && !self.is_much() && self.ends.is_none() {
            let until = *self.until.get_or_insert(now + LINGER);
            if now < until {
                self.writer = Writer::Rests;
                return Step::Rest(until - now);
            }
        }
        match self.take() {
            Some(chunk) => Step::Do(Task::Write(chunk)),
            None => self.idle(now),
        }
    }

    fn idle(&mut self, now: Instant) -> Step {
        match self.ends {
            Some(ends) if now >= ends => {
                self.writer = Writer::Ended;
                Step::Do(Task::End)
            }
            ends => {
                self.writer = Writer::Sleeps;
                ends.map_or(Step::Sleep, |ends| Step::Rest(ends - now))
            }
        }
    }

    /// A chunk is full, or half of the room is used.
    fn is_much(&self) -> bool {
        self.chunks.len() > 1 || self.lines * 2 >= self.room
    }

    fn take(&mut self) -> Option<Chunk> {
        let first = self.chunks.pop_front()?;
        self.lines -= first.lines;
        if self.chunks.is_empty() {
            self.until = None;
        }
        Some(first)
    }

    fn take_back(&mut self, mut written: Chunk) {
        // What one long line has taken is given back to the system.
        if written.bytes.capacity() == CHUNK_BYTES {
            written.bytes.clear();
            written.lines = 0;
            self.spare = Some(written);
        }
    }

    fn end(&mut self, now: Instant) {
        self.ends.get_or_insert(now + LINGER);
    }
}

impl Chunk {
    fn of(bytes: usize) -> Self {
        Chunk {
            bytes: Vec::with_capacity(bytes.max(CHUNK_BYTES)),
            lines: 0,
        }
    }

    fn push(&mut self, line: &[u8]) {
        self.bytes.extend_from_slice(line);
        self.lines += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 1_000;

    /// A writer that has found nothing to do.
    fn asleep() -> (Waiting, Instant) {
        let (mut waiting, now) = (Waiting::new(ROOM), Instant::now());
        assert!(matches!(waiting.step(now), Step::Sleep));
        (waiting, now)
    }

    /// What is written now.
    fn written(step: Step) -> (usize, Vec<u8>) {
        match step {
            Step::Do(Task::Write(chunk)) => (chunk.lines, chunk.bytes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lines_that_come_together_leave_together_in_their_order() {
        let (mut waiting, start) = asleep();
        assert_eq!(waiting.push(b"1\n"), Pushed::AndWakes, "the writer sleeps");
        assert_eq!(waiting.push(b"2\n"), Pushed::Quietly, "it is on its way");
        assert!(matches!(waiting.step(start), Step::Rest(LINGER)));
        assert_eq!(waiting.push(b"3\n"), Pushed::Quietly, "it comes by itself");
        let just_before = start + LINGER - Duration::from_nanos(1);
        assert!(matches!(waiting.step(just_before), Step::Rest(_)));
        assert_eq!(written(waiting.step(start + LINGER)), (3, b"1\n2\n3\n".to_vec()));
        assert_eq!(waiting.push(b"4\n"), Pushed::Quietly, "it writes, and looks again");
        assert!(
            matches!(waiting.step(start + LINGER), Step::Rest(LINGER)),
            "a time of its own"
        );
    }

    #[test]
    fn a_writer_at_rest_is_woken_once_by_a_full_chunk() {
        let (mut waiting, now) = asleep();
        let line = [b'x'; CHUNK_BYTES / 4];
        waiting.push(&line);
        assert!(matches!(waiting.step(now), Step::Rest(_)));
        let pushed: Vec<_> = (0..5).map(|_| waiting.push(&line)).collect();
        let woken: Vec<_> = (0..5).filter(|n| pushed[*n] == Pushed::AndWakes).collect();
        assert_eq!(woken, [3], "the fifth line begins another chunk");
        assert_eq!(written(waiting.step(now)).0, 4);
        assert!(
            matches!(waiting.step(now), Step::Rest(LINGER)),
            "what is begun waits for more"
        );
        assert_eq!(written(waiting.step(now + LINGER)).0, 2);
    }

    #[test]
    fn a_writer_at_rest_is_woken_before_there_is_no_room() {
        let (mut waiting, now) = asleep();
        waiting.push(b"\n");
        assert!(matches!(waiting.step(now), Step::Rest(_)));
        let woken: Vec<_> = (2..=ROOM).filter(|_| waiting.push(b"\n") == Pushed::AndWakes).collect();
        assert_eq!(woken, [ROOM / 2]);
        assert_eq!(waiting.push(b"\n"), Pushed::NoRoom);
        assert_eq!(written(waiting.step(now)).0, ROOM);
        assert_eq!(waiting.push(b"\n"), Pushed::Quietly, "there is room again");
    }

    #[test]
    fn what_waits_is_bounded_and_nothing_taken_is_lost() {
        let (mut waiting, now) = asleep();
        let pushed = (0..ROOM + 5).filter(|n| waiting.push(format!("{n:0200}\n").as_bytes()) != Pushed::NoRoom);
        assert_eq!(pushed.count(), ROOM);
        let bytes: usize = waiting.chunks.iter().map(|chunk| chunk.bytes.capacity()).sum();
        assert!(bytes < ROOM * 201 + CHUNK_BYTES, "{bytes}");
        waiting.end(now);
        let mut text = vec![];
        while !waiting.chunks.is_empty() {
            text.extend(written(waiting.step(now)).1);
        }
        let numbers = String::from_utf8(text).unwrap();
        let numbers: Vec<usize> = numbers.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers, (0..ROOM).collect::<Vec<_>>());
    }

    #[test]
    fn the_end_waits_for_nothing_but_late_lines() {
        let (mut waiting, now) = asleep();
        waiting.push(b"1\n");
        waiting.end(now);
        assert_eq!(written(waiting.step(now)).0, 1, "at once");
        assert!(matches!(waiting.step(now), Step::Rest(LINGER)));
        assert_eq!(waiting.push(b"2\n"), Pushed::AndWakes);
        assert_eq!(written(waiting.step(now)).0, 1, "at once as well");
        assert!(matches!(waiting.step(now + LINGER), Step::Do(Task::End)));
        assert_eq!(waiting.push(b"3\n"), Pushed::NoRoom, "nobody would write it");
    }

    #[test]
    fn a_file_is_opened_anew_before_more_is_written_for_each_who_asks() {
        let (mut waiting, now) = asleep();
        waiting.push(b"1\n");
        waiting.asked_to_reopen = Turn(2);
        let Step::Do(Task::Reopen(turn)) = waiting.step(now) else {
            panic!()
        };
        assert_eq!(turn, Turn(2));
        // Somebody asks while it is being opened.
        waiting.asked_to_reopen = Turn(3);
        waiting.reopened = turn;
        assert!(matches!(waiting.step(now), Step::Do(Task::Reopen(Turn(3)))));
        waiting.reopened = Turn(3);
        assert!(matches!(waiting.step(now), Step::Rest(LINGER)));
    }

    #[test]
    fn a_chunk_is_filled_again_unless_a_long_line_was_in_it() {
        let (mut waiting, now) = asleep();
        waiting.end(now);
        for (length, is_kept) in [(1, true), (CHUNK_BYTES + 1, false), (CHUNK_BYTES, true)] {
            waiting.push(&vec![b'x'; length]);
            let Step::Do(Task::Write(chunk)) = waiting.step(now) else {
                panic!()
            };
            assert_eq!(chunk.bytes.len(), length);
            waiting.spare = None;
            waiting.take_back(chunk);
            assert_eq!(waiting.spare.is_some(), is_kept);
        }
    }
}
