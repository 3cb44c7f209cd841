//! A few things kept in the order of their last use.

use std::sync::Arc;

/// The newest first; what was not used for longest is dropped.
#[derive(Debug)]
pub(crate) struct Recent<T> {
    kept: Vec<Arc<T>>,
    limit: usize,
}

impl<T> Recent<T> {
    /// Nothing yet, `limit` things at most.
    pub fn new(limit: usize) -> Self {
        Recent {
            kept: Vec::new(),
            limit,
        }
    }

    /// The newest thing of which `wanted` holds.
    pub fn find(&mut self, wanted: impl Fn(&T) -> bool) -> Option<Arc<T>> {
        let at = self.kept.iter().position(|t| wanted(t))?;
        self.kept.get_mut(..=at)?.rotate_right(1);
        self.kept.first().cloned()
    }

    /// Number of things kept of which `wanted` holds.
    pub fn count(&self, wanted: impl Fn(&T) -> bool) -> usize {
        self.kept.iter().filter(|t| wanted(t)).count()
    }

    /// Adds something.
    pub fn insert(&mut self, thing: Arc<T>) {
        self.kept.truncate(self.limit.saturating_sub(1));
        self.kept.insert(0, thing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_is_dropped() {
        let mut recent = Recent::new(2);
        recent.insert(Arc::new(1));
        recent.insert(Arc::new(2));
        assert_eq!(recent.find(|&t| t == 1).as_deref(), Some(&1));
        recent.insert(Arc::new(3));
        assert_eq!(recent.find(|&t| t == 2), None);
        assert_eq!(recent.find(|&t| t == 1).as_deref(), Some(&1));
    }
}
