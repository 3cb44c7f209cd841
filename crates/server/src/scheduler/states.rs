//! Which state a text is generated in: the conversations that idle, and how a prompt finds the one it continues.

use candle_coreml_llm::Session;

/// From this many tokens on that a prompt shares with an idle conversation, copying that conversation's state is worth
/// more than computing them. When it is all of the prompt, the first token comes at once.
const FORK_TOKENS: usize = 32;

/// A conversation nobody works on.
#[derive(Debug)]
pub(crate) struct Idle {
    pub model: usize,
    pub session: Session,
}

/// Where a text begins.
#[derive(Debug)]
pub(crate) enum Place {
    /// In this state, which becomes its own.
    Take(Idle),
    /// In a copy of this state, which goes back to the idle ones.
    Copy(Idle),
    /// In a fresh state.
    Fresh,
}

/// The idle conversations, the one used last at the end.
#[derive(Debug, Default)]
pub(crate) struct States {
    idle: Vec<Idle>,
}

impl States {
    pub fn len(&self) -> usize {
        self.idle.len()
    }

    pub fn put(&mut self, idle: Idle) {
        self.idle.push(idle);
    }

    /// Finds the place for `prompt`. `room` says whether one more state may be made; the second value is a state that has
    /// to go for it, where there is no room.
    ///
    /// A prompt that goes on where a conversation ended takes its state. One that shares only a beginning leaves the
    /// conversation whole as long as there is room, and otherwise costs the one that was not used for longest.
    pub fn place(&mut self, model: usize, prompt: &[u32], room: bool) -> (Place, Option<Idle>) {
        let mut best: Option<(usize, usize)> = None;
        for (at, idle) in self.idle.iter().enumerate().filter(|(_, i)| i.model == model) {
            let common = common(&idle.session, prompt);
            if best.is_none_or(|(_, most)| common >= most) {
                best = Some((at, common));
            }
        }
        // A prompt of one token is its own last one, which is decoded in any case.
        let best = best.filter(|&(_, common)| common > 0);
        let whole = |at: usize, common: usize| {
            self.idle
                .get(at)
                .is_some_and(|idle| common >= idle.session.cached_tokens())
        };
        if let Some((at, _)) = best.filter(|&(at, common)| whole(at, common)) {
            return (Place::Take(self.idle.remove(at)), None);
        }
        let copy = best
            .filter(|&(_, common)| common >= FORK_TOKENS || common + 1 >= prompt.len())
            .map(|(at, _)| at);
        match (room, copy) {
            (true, Some(at)) => (Place::Copy(self.idle.remove(at)), None),
            (true, None) => (Place::Fresh, None),
            (false, None | Some(0)) => self.take_oldest(model),
            (false, Some(at)) => {
                let source = self.idle.remove(at);
                let oldest = self.idle.remove(0);
                (Place::Copy(source), Some(oldest))
            }
        }
    }

    fn take_oldest(&mut self, model: usize) -> (Place, Option<Idle>) {
        if self.idle.is_empty() {
            return (Place::Fresh, None);
        }
        let oldest = self.idle.remove(0);
        if oldest.model == model {
            (Place::Take(oldest), None)
        } else {
            (Place::Fresh, Some(oldest))
        }
    }
}

/// Tokens at the beginning of `prompt` that a session has computed.
fn common(session: &Session, prompt: &[u32]) -> usize {
    let computed = session.tokens().iter().take(session.cached_tokens());
    computed.zip(prompt).take_while(|(a, b)| a == b).count()
}
