//! Owns where the engine's Rust code gets its memory: small objects from mimalloc, large ones from the process' allocator.
//! Knows nothing of what they are for. Every thread.
//!
//! A handshake makes some hundred small objects and frees most of them, which is what glibc is slow at. rustls makes one of
//! 16 KiB for each record and frees it at once: glibc gives the same memory again, still in the cache, where mimalloc goes
//! through all blocks of that size first.

use std::alloc::{GlobalAlloc, Layout, System};

use mimalloc::MiMalloc;

/// Below a full record, and above nearly everything that a handshake makes.
const SMALL_BYTES_MAX: usize = 8 * 1024;

pub struct BySize;

// SAFETY: both allocators keep the trait's promises, and a block always goes back to the one that gave it: which one that is
// depends only on the layout, and callers free and resize a block with the layout of its allocation.
unsafe impl GlobalAlloc for BySize {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe { if is_small(layout) { MiMalloc.alloc(layout) } else { System.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe { if is_small(layout) { MiMalloc.alloc_zeroed(layout) } else { System.alloc_zeroed(layout) } }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on, to the allocator that `alloc` chose for the same layout.
        unsafe {
            if is_small(layout) { MiMalloc.dealloc(block, layout) } else { System.dealloc(block, layout) }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `size`, rounded up to the alignment, is a size.
        let resized = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (is_small(layout), is_small(resized)) {
            // SAFETY: the caller's promises are passed on, to the allocator that gave the block and keeps it.
            (true, true) => unsafe { MiMalloc.realloc(block, layout, size) },
            // SAFETY: as above.
            (false, false) => unsafe { System.realloc(block, layout, size) },
            // SAFETY: the caller promises that neither size is 0 and that the block is as long as its layout says. A new block
            // does not overlap it. When there is none, the old one stays as it was.
            _ => unsafe {
                let moved = self.alloc(resized);
                if !moved.is_null() {
                    moved.copy_from_nonoverlapping(block, layout.size().min(size));
                    self.dealloc(block, layout);
                }
                moved
            },
        }
    }
}

fn is_small(layout: Layout) -> bool {
    layout.size() <= SMALL_BYTES_MAX
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_survive_every_crossing_of_the_limit() {
        let mut bytes = Vec::new();
        for size in [100, 8_192, 8_193, 16_406, 1 << 20] {
            bytes.resize(size, 7_u8);
            bytes.shrink_to_fit();
        }
        for size in [16_406, 8_193, 8_192, 100] {
            bytes.truncate(size);
            bytes.shrink_to_fit();
            assert_eq!(bytes, vec![7; size]);
        }
        let zeroed = [vec![0_u8; 8_192], vec![0_u8; 8_193]].concat();
        assert!(zeroed.iter().all(|byte| *byte == 0));
    }
}
