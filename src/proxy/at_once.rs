//! Filters that never wait.
//!
//! `#[async_trait]` puts the future of every filter on the heap, and Pingora calls ten of them a request. A filter that
//! has nothing to wait for can do its work when it is called and return a future that is ready. Where that holds no
//! value either it has no size, and `Box::pin` then asks the allocator for nothing.

use pingora::Result;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// What `#[async_trait]` makes of `async fn … -> T`.
pub(super) type Filter<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The outcome of a filter that went well or failed.
pub(super) fn filtered<'a>(outcome: Result<()>) -> Filter<'a, Result<()>> {
    match outcome {
        Ok(()) => Box::pin(Filtered),
        Err(error) => Box::pin(std::future::ready(Err(error))),
    }
}

/// The answer of a filter that decides whether Pingora goes on.
pub(super) fn answered<'a, const ANSWER: bool>() -> Filter<'a, Result<bool>> {
    Box::pin(Answered::<ANSWER>)
}

/// The end of a filter that cannot fail.
pub(super) fn done<'a>() -> Filter<'a, ()> {
    Box::pin(Done)
}

struct Filtered;
struct Answered<const ANSWER: bool>;
struct Done;

impl Future for Filtered {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl<const ANSWER: bool> Future for Answered<ANSWER> {
    type Output = Result<bool>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<bool>> {
        Poll::Ready(Ok(ANSWER))
    }
}

impl Future for Done {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}
