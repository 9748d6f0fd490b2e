//! Owns the small stacks on which handshake steps run, so that a step that needs a signature can be suspended on the
//! I/O thread and resumed when a lane has signed. Knows nothing of TLS messages, tokens or sockets. I/O thread only.
//!
//! rustls asks for a signature by an ordinary call deep inside its state machine and wants the answer as the return
//! value. Blocking there would stall every connection of the worker; moving the connection to another thread would tie a
//! token's lane to a whole handshake, lose the connection when the module hangs, and send resumptions through the token.
//! So the step runs on a stack of its own, and "call" becomes "suspend":
//!
//! ```text
//!   Step::start ──run──> Finished(T)
//!        │
//!        └──run──> WantsSignature ──resume(answer)──> Finished(T) | WantsSignature
//! ```
//!
//! A step that nobody waits for any more is resumed with `Abandoned` until it has returned: it never unwinds half-way.

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use rustls::SignatureScheme;
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use crate::signing::PrivateKey;

/// What a suspended step waits for.
pub struct SignatureWanted {
    pub key: Arc<PrivateKey>,
    pub scheme: SignatureScheme,
    pub message: Vec<u8>,
    /// How long a connection waits for it.
    pub deadline_in: Duration,
}

/// No signature: the token refused, the deadline passed, or the connection is gone. The caller of `resume` knows which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abandoned;

type Answer = Result<Vec<u8>, Abandoned>;

/// What a step has come to.
pub enum Progress<T> {
    Finished(T),
    WantsSignature(SignatureWanted),
}

/// Virtual size of a stack; only touched pages count. The deepest step measured (ML-KEM key agreement in a TLS 1.3
/// handshake) uses a fifth of it; `a_handshake_leaves_most_of_its_stack_untouched` holds that.
const STACK_BYTES: usize = if cfg!(sanitized) { 8 } else { 1 } * 128 * 1024;
/// Stacks kept for reuse: as many as sign at once on a busy worker. More are made and unmapped on demand.
const STACKS_KEPT_MAX: usize = 64;
/// A step is abandoned by answering its requests with an error; no TLS state machine asks twice more.
const ABANDON_ROUNDS_MAX: usize = 4;

thread_local! {
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
    /// Invariant: Some exactly while a step runs on this thread, and then it is that step's own yielder.
    static RUNNING: Cell<Option<NonNull<Yielder<Answer, SignatureWanted>>>> = const { Cell::new(None) };
}

/// A handshake step that has been suspended.
pub struct Step<T: 'static> {
    // Invariant: Some until drop.
    coroutine: Option<Coroutine<Answer, SignatureWanted, T, DefaultStack>>,
}

impl<T: 'static> Step<T> {
    /// Makes a step from `run`. It starts with the first `resume`.
    ///
    /// # Errors
    /// No memory for a stack.
    pub fn new(run: impl FnOnce() -> T + 'static) -> std::io::Result<Self> {
        let stack = STACKS.with_borrow_mut(Vec::pop).map_or_else(|| DefaultStack::new(STACK_BYTES), Ok)?;
        let coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<Answer, SignatureWanted>, _| {
            RUNNING.set(Some(NonNull::from(yielder)));
            let _not_running = ClearRunning;
            run()
        });
        Ok(Self { coroutine: Some(coroutine) })
    }

    /// Runs the step until it ends or wants a signature. The answer to the first resume is not looked at.
    pub fn resume(&mut self, answer: Answer) -> Progress<T> {
        let Some(coroutine) = self.coroutine.as_mut() else { unreachable!("taken only by drop") };
        match coroutine.resume(answer) {
            CoroutineResult::Return(value) => Progress::Finished(value),
            CoroutineResult::Yield(wanted) => Progress::WantsSignature(wanted),
        }
    }
}

impl<T: 'static> Drop for Step<T> {
    fn drop(&mut self) {
        let Some(mut coroutine) = self.coroutine.take() else { return };
        let mut rounds = 0;
        while coroutine.started() && !coroutine.done() && rounds < ABANDON_ROUNDS_MAX {
            drop(coroutine.resume(Err(Abandoned)));
            rounds += 1;
        }
        // A step that is still not done is unwound by the coroutine's own drop, and its stack is not reused.
        if coroutine.done() {
            STACKS.with_borrow_mut(|stacks| {
                if stacks.len() < STACKS_KEPT_MAX {
                    stacks.push(coroutine.into_stack());
                }
            });
        }
    }
}

/// Called by the signer inside a step: suspends the step until the signature is there.
///
/// # Errors
/// `Abandoned` when there will be no signature, or when no step is running: the caller is then on a thread that must not
/// wait for a token, so it fails closed.
pub fn suspend_for_signature(wanted: SignatureWanted) -> Answer {
    let Some(yielder) = RUNNING.take() else { return Err(Abandoned) };
    // SAFETY: RUNNING is set only by the coroutine body that is now executing (it is cleared whenever that body is
    // suspended or has returned), and the yielder lives on that body's stack frame, which encloses this call.
    let answer = unsafe { yielder.as_ref() }.suspend(wanted);
    RUNNING.set(Some(yielder));
    answer
}

/// Clears RUNNING also when the step panics: the panic goes on in the I/O thread, where the pointer would dangle.
struct ClearRunning;

impl Drop for ClearRunning {
    fn drop(&mut self) {
        RUNNING.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::tests::pair;
    use corosensei::stack::Stack;

    #[test]
    fn a_step_that_wants_nothing_finishes_at_once() {
        let mut step = Step::new(|| 42).expect("a stack");
        assert!(matches!(step.resume(Err(Abandoned)), Progress::Finished(42)));
    }

    #[test]
    fn outside_a_step_there_is_no_waiting_for_a_signature() {
        assert!(RUNNING.get().is_none());
    }

    #[test]
    fn a_panic_in_a_step_reaches_the_caller_and_leaves_the_thread_usable() {
        let mut step = Step::new(|| -> u8 { panic!("as intended by the test") }).expect("a stack");
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| step.resume(Err(Abandoned))));
        assert!(caught.is_err());
        assert!(RUNNING.get().is_none());
        drop(step);
        let mut next = Step::new(|| 1).expect("a stack");
        assert!(matches!(next.resume(Err(Abandoned)), Progress::Finished(1)));
    }

    #[test]
    fn a_handshake_leaves_most_of_its_stack_untouched() {
        const UNTOUCHED: u8 = 0xA5;
        let (mut server, mut client) = pair("1.3", "X25519MLKEM768");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("memory");
        server.receive(&hello);

        let stack = DefaultStack::new(STACK_BYTES).expect("a stack");
        let (low, high) = (stack.limit().get(), stack.base().get());
        // The lowest pages are the guard's.
        let low = low + 4 * 4096;
        // SAFETY: the range is the writable part of a stack that nothing runs on yet, and it lives in STACKS afterwards.
        unsafe { std::slice::from_raw_parts_mut(low as *mut u8, high - low - 4096) }.fill(UNTOUCHED);
        STACKS.with_borrow_mut(|stacks| stacks.push(stack));

        let mut step = Step::new(move || server.advance(&mut Vec::new())).expect("a stack");
        assert!(matches!(step.resume(Err(Abandoned)), Progress::Finished(Ok(_))));
        drop(step);

        // SAFETY: as above; the step has ended.
        let used = unsafe { std::slice::from_raw_parts(low as *const u8, high - low - 4096) }
            .iter()
            .position(|byte| *byte != UNTOUCHED)
            .map_or(0, |first| high - low - first);
        println!("stack used: {used} of {STACK_BYTES} bytes");
        assert!(used < STACK_BYTES / 2, "{used} bytes");
    }
}
