//! Owns: one fault of each kind that the sanitizers are to find, in a library that Node loads as it loads the engine: where they
//! do not find these, they would not find the engine's. Runs when it is loaded; KEYGATE_SANITIZER says which fault.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::hint::black_box;
use std::thread;

/// What Node calls when it has loaded a library (Node-API). Not an initialiser of the library: the linker's lock is held while
/// those run, and a sanitizer that has something to say waits for it.
#[unsafe(no_mangle)]
pub extern "C" fn napi_register_module_v1(_env: *mut c_void, exports: *mut c_void) -> *mut c_void {
    match std::env::var("KEYGATE_SANITIZER").as_deref() {
        Ok("address") => use_after_free(),
        Ok("thread") => race(),
        other => panic!("KEYGATE_SANITIZER: expected address or thread, found {other:?}"),
    }
    exports
}

fn use_after_free() {
    let freed = {
        let boxed = black_box(Box::new(7_u64));
        black_box(&raw const *boxed)
    };
    // SAFETY: none; that is what it is for.
    println!("{}", unsafe { freed.read_volatile() });
}

struct Shared(UnsafeCell<u64>);
// SAFETY: none; that is what it is for.
unsafe impl Sync for Shared {}
static SHARED: Shared = Shared(UnsafeCell::new(0));

fn race() {
    let count = || {
        for _ in 0..1000 {
            // SAFETY: none; that is what it is for.
            unsafe { *black_box(SHARED.0.get()) += 1 };
        }
    };
    let other = thread::spawn(count);
    count();
    let _ = other.join();
}
