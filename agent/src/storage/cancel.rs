// SPDX-License-Identifier: Apache-2.0
//! Asking long work to stop.

use tokio::sync::watch;

/// Tells work under way whether it is still wanted. Clones are told the same.
#[derive(Debug, Clone)]
pub struct Cancel(Option<watch::Receiver<bool>>);

impl Cancel {
    /// For work that nobody can cancel.
    #[must_use]
    pub fn never() -> Self {
        Self(None)
    }

    /// Should the work stop? For loops that block.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.as_ref().is_some_and(|signal| *signal.borrow())
    }

    /// Comes back once the work should stop. Never, if that can no longer happen.
    pub async fn cancelled(&self) {
        if let Some(signal) = &self.0
            && signal.clone().wait_for(|stop| *stop).await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }
}

/// The work stops when the watched value becomes `true`.
impl From<watch::Receiver<bool>> for Cancel {
    fn from(signal: watch::Receiver<bool>) -> Self {
        Self(Some(signal))
    }
}
