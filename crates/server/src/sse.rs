//! Streams of server-sent events out of the events of texts.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Serialize;

use crate::refusal::Refusal;
use crate::run::Texts;
use crate::scheduler::Event;

/// How often a silent stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What a kind of request makes of events.
pub(crate) trait Chunks: Send + Unpin + 'static {
    /// Sent before anything else.
    fn begin(&mut self, out: &mut Out);
    /// Something happened to the text of this number.
    fn event(&mut self, text: usize, event: Event, out: &mut Out) -> Result<(), Refusal>;
    /// Sent after everything else.
    fn end(&mut self, out: &mut Out);
}

/// Data of events to send.
#[derive(Debug, Default)]
pub(crate) struct Out(VecDeque<String>);

impl Out {
    pub fn push(&mut self, chunk: &impl Serialize) {
        // Strings, numbers and lists of them have a JSON form.
        self.0.push_back(serde_json::to_string(chunk).unwrap_or_default());
    }
}

/// The response that streams.
pub(crate) fn response(texts: Texts, mut chunks: impl Chunks) -> Response {
    let mut out = Out::default();
    chunks.begin(&mut out);
    let stream = ChunkStream {
        texts,
        chunks,
        out,
        ended: false,
    };
    let mut response = Sse::new(stream)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response();
    // Proxies would hold pieces back otherwise.
    let no = axum::http::HeaderValue::from_static("no");
    response.headers_mut().insert("x-accel-buffering", no);
    response
}

struct ChunkStream<C> {
    texts: Texts,
    chunks: C,
    out: Out,
    ended: bool,
}

impl<C: Chunks> ChunkStream<C> {
    fn take(&mut self, event: Option<(usize, Event)>) {
        let refusal = match event {
            Some((_, Event::Failed(failure))) => self.texts.refusal(&failure),
            Some((text, event)) => match self.chunks.event(text, event, &mut self.out) {
                Ok(()) => return,
                Err(refusal) => refusal,
            },
            None => {
                self.ended = true;
                self.chunks.end(&mut self.out);
                self.out.0.push_back("[DONE]".to_owned());
                return;
            }
        };
        self.ended = true;
        self.out.0.push_back(refusal.json());
    }
}

impl<C: Chunks> Stream for ChunkStream<C> {
    type Item = Result<SseEvent, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(data) = self.out.0.pop_front() {
                return Poll::Ready(Some(Ok(SseEvent::default().data(data))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            match self.texts.poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(event) => self.take(event),
            }
        }
    }
}
