#!/bin/bash
# Owns: what is done inside the Debian of engine.sanitizer.ts: `guest.sh address|thread TEST...` builds the engine with that
# sanitizer, proves that it finds a fault that was made on purpose, and runs the tests on that engine. Ends with 0 when the
# sanitizer had nothing to say.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

sanitizer=$1
shift
target=x86_64-unknown-linux-gnu
export KEYGATE_SANITIZER=$sanitizer
# The compiler takes -Z options; nothing is built without the sanitizer, the standard library included.
cargo=(env RUSTC_BOOTSTRAP=1 CARGO_PROFILE_RELEASE_LTO=false CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
	"RUSTFLAGS=-Zsanitizer=$sanitizer -Zexternal-clangrt --cfg sanitized"
	cargo build --quiet --release -Zbuild-std --target $target --target-dir "/targets/$sanitizer")
# It must know of the stacks that handshakes run on.
features=()
[ "$sanitizer" = address ] && features=(--features corosensei/sanitizer)

"${cargo[@]}" --lib --locked --manifest-path src/engine/Cargo.toml "${features[@]}"
"${cargo[@]}" --manifest-path test/sanitizers/canary/Cargo.toml
cp "/targets/$sanitizer/$target/release/libkeygate_engine.so" src/engine/keygate-engine.node
# Tests build it when it is missing, which would be slow under the sanitizer.
cargo build --quiet --release --locked --manifest-path test/fault-module/Cargo.toml

# Node is no part of what is looked at. Leaks: V8 keeps what it has to the end.
common=halt_on_error=1:exitcode=66
export ASAN_OPTIONS=$common:detect_leaks=0
export TSAN_OPTIONS=$common:ignore_noninstrumented_modules=1:die_after_fork=0
runtime=$(echo /usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt."${sanitizer:0:1}"san-x86_64.so)
canary=/targets/$sanitizer/$target/release/libcanary.so
if LD_PRELOAD=$runtime timeout 60 node -e "process.dlopen({ exports: {} }, '$canary')" >/tmp/canary 2>&1 || ! grep -q 'SUMMARY: .*Sanitizer' /tmp/canary; then
	echo "the $sanitizer sanitizer does not find a fault that is there:"
	cat /tmp/canary
	exit 1
fi
# Memory is measured where no sanitizer takes its share.
LD_PRELOAD=$runtime exec node --test --test-concurrency=1 --test-skip-pattern="in little memory" "$@"
