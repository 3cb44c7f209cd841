//! Connections: how many, for how long, and how they end.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_io_timeout::TimeoutStream;

use crate::Options;

/// Between two tries where the system has no more handles.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections until `stop` says so. What is given back ends them when their answers are out.
pub(crate) async fn accept(
    listener: TcpListener,
    router: Router,
    options: &Options,
    mut stop: watch::Receiver<bool>,
) -> GracefulShutdown {
    let room = Arc::new(Semaphore::new(options.max_connections));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = async {
                let permit = Arc::clone(&room).acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
            _ = stop.wait_for(|stopped| *stopped) => return graceful,
        };
        match accepted {
            (Ok(permit), Ok((stream, _))) => {
                let connection = connection(stream, router.clone(), options.io_timeout);
                let connection = graceful.watch(connection);
                tokio::spawn(async move {
                    // It broke off, or idled too long: nobody is there to be told.
                    let _ = connection.await;
                    drop(permit);
                });
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(PAUSE).await;
            }
            (Err(_), _) => return graceful,
        }
    }
}

type Io = TokioIo<std::pin::Pin<Box<TimeoutStream<TcpStream>>>>;

/// A connection whose other end has to send its requests and to take its answers in time.
fn connection(
    stream: TcpStream,
    router: Router,
    patience: Duration,
) -> http1::Connection<Io, TowerToHyperService<Router>> {
    // Pieces of a text are small and wanted at once; where the system refuses, they come later.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(patience));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router))
}
