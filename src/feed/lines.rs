//! A byte stream → lines, each with its newline and none longer than it may be.

use super::parse::MAX_LINE_BYTES;

/// Cuts a byte stream into lines, without copying those that lie within one chunk.
#[derive(Default)]
pub struct LineSplitter {
    /// The start of a line whose end has not come yet. Never longer than [`MAX_LINE_BYTES`].
    partial: Vec<u8>,
}

impl LineSplitter {
    /// Hands every complete line of `chunk`, with its newline, to `each`, which may stop by an error.
    pub fn push<E: From<LineTooLong>>(
        &mut self,
        mut chunk: &[u8],
        each: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(end) = memchr::memchr(b'\n', chunk) {
            let (line, rest) = chunk.split_at(end + 1);
            chunk = rest;
            if self.partial.len() + line.len() > MAX_LINE_BYTES {
                return Err(LineTooLong.into());
            }
            if self.partial.is_empty() {
                each(line)?;
            } else {
                self.partial.extend_from_slice(line);
                each(&self.partial)?;
                self.partial.clear();
            }
        }
        if self.partial.len() + chunk.len() > MAX_LINE_BYTES {
            return Err(LineTooLong.into());
        }
        self.partial.extend_from_slice(chunk);
        Ok(())
    }

    /// What came after the last newline.
    pub fn rest(&self) -> &[u8] {
        &self.partial
    }
}

/// A line has more than [`MAX_LINE_BYTES`].
#[derive(Debug)]
pub struct LineTooLong;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Long;
    impl From<LineTooLong> for Long {
        fn from(_: LineTooLong) -> Self {
            Long
        }
    }

    #[test]
    fn lines_come_out_the_same_however_the_stream_is_cut() {
        let stream = b"one\ntwo\n\nfour and more\nrest";
        for size in 1..=stream.len() {
            let (mut splitter, mut lines) = (LineSplitter::default(), Vec::new());
            for chunk in stream.chunks(size) {
                splitter
                    .push::<Long>(chunk, &mut |line| {
                        lines.push(line.to_vec());
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(
                lines,
                [&b"one\n"[..], b"two\n", b"\n", b"four and more\n"],
                "chunks of {size}"
            );
            assert_eq!(splitter.rest(), b"rest");
        }
    }

    #[test]
    fn an_endless_line_is_stopped_at_the_cap() {
        let mut splitter = LineSplitter::default();
        let mut pushed = 0;
        while splitter.push::<Long>(&[b'x'; 1000], &mut |_| Ok(())).is_ok() {
            pushed += 1000;
            assert!(pushed <= MAX_LINE_BYTES);
        }
        assert!(splitter.rest().len() <= MAX_LINE_BYTES);
        let mut whole = vec![b'x'; MAX_LINE_BYTES];
        whole.push(b'\n');
        assert!(LineSplitter::default().push::<Long>(&whole, &mut |_| Ok(())).is_err());
    }
}
