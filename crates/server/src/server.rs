//! A server from its start to its end.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use crate::app::{App, Hosts, router};
use crate::metrics::Metrics;
use crate::models::{Model, Models};
use crate::run::now;
use crate::scheduler::{Limits, Scheduler};
use crate::{Error, Options, listen};

/// Threads that talk with clients; texts are computed elsewhere.
const TALKING_THREADS: usize = 2;
/// Threads for templates, tokenizers and encoders.
const PREPARING_THREADS: usize = 4;
/// For the last words of texts that were ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Models bound to an address. Nothing is answered before [`Server::run`].
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
    address: SocketAddr,
    stop: watch::Sender<bool>,
}

/// Stops a server from another thread.
#[derive(Debug, Clone)]
pub struct Handle {
    stop: watch::Sender<bool>,
}

impl Handle {
    /// Takes no further requests, lets running texts go on for [`Options::grace`] and has [`Server::run`] return.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }
}

impl Server {
    /// Takes the address and starts the threads that generate.
    ///
    /// # Errors
    /// [`Error::Option`], [`Error::NoModel`] and [`Error::SameName`] for what cannot be served, [`Error::Bind`] for an
    /// address that cannot be had.
    pub fn bind(models: Vec<Model>, options: Options) -> Result<Self, Error> {
        options.check()?;
        let (models, sources) = Models::new(models)?;
        let address = options.address;
        let bound = TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        });
        let (listener, address) = bound.map_err(|source| Error::Bind { address, source })?;
        let limits = Limits {
            active: options.max_concurrency,
            waiting: options.queue,
            workers: options.workers.min(options.max_concurrency),
        };
        let metrics = Metrics::new();
        let scheduler = Scheduler::start(sources, limits, metrics.clone())?;
        let hosts = if address.ip().is_loopback() && options.api_keys.is_empty() {
            Hosts::Loopback
        } else {
            Hosts::Any
        };
        let app = App {
            options,
            models,
            scheduler,
            metrics,
            created: now(),
            stopping: AtomicBool::new(false),
            hosts,
        };
        Ok(Server {
            app: Arc::new(app),
            listener,
            address,
            stop: watch::Sender::new(false),
        })
    }

    /// Where it listens, with the port that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What stops it.
    pub fn handle(&self) -> Handle {
        Handle {
            stop: self.stop.clone(),
        }
    }

    /// Answers requests until a [`Handle`] says to stop, and ends well: running texts have [`Options::grace`] to finish.
    ///
    /// # Errors
    /// [`Error::System`] when the system gives no threads.
    pub fn run(self) -> Result<(), Error> {
        let router = router(&self.app)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(TALKING_THREADS)
            .max_blocking_threads(PREPARING_THREADS)
            .thread_name("http")
            .enable_all()
            .build()?;
        let app = Arc::clone(&self.app);
        let ended: Result<(), Error> = runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(self.listener)?;
            tracing::info!(address = %self.address, "listening");
            let open = listen::accept(listener, router, &app.options, self.stop.subscribe()).await;
            tracing::info!("stopping");
            app.stopping.store(true, Ordering::Relaxed);
            app.scheduler.stop();
            let finished = open.shutdown();
            tokio::pin!(finished);
            if tokio::time::timeout(app.options.grace, &mut finished)
                .await
                .is_err()
            {
                tracing::warn!("texts were cut short");
                app.scheduler.abort();
                // Those who do not read do not hold the server up.
                let _ = tokio::time::timeout(LAST_WORDS, finished).await;
            }
            Ok(())
        });
        runtime.shutdown_timeout(LAST_WORDS);
        tracing::info!("stopped");
        ended
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}
