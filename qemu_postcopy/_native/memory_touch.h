/*
 * Memory to page, and ways to touch it that never need Python's lock, for qemu_postcopy.region: a
 * thread that stands in a page fault inside one of these calls holds up no other Python thread.
 *
 * Addresses are this process's own. Calls that can fail return -errno; loads and stores of memory
 * that is poisoned, or that a descriptor with UFFD_FEATURE_SIGBUS watches, end in SIGBUS.
 */
#ifndef QPC_MEMORY_TOUCH_H
#define QPC_MEMORY_TOUCH_H

#include <stdint.h>

/* cdef-begin */
/* A new mapping at a multiple of `alignment`; descriptor -1: anonymous. Returns its address. */
int64_t qpc_memory_map(uint64_t length, uint64_t alignment, int descriptor, int shared);
int qpc_memory_unmap(uint64_t address, uint64_t length);
/* mremap(2) with MREMAP_MAYMOVE | MREMAP_FIXED onto `to`. */
int qpc_memory_remap(uint64_t address, uint64_t length, uint64_t to);
int qpc_memory_advise(uint64_t address, uint64_t length, int advice);

uint64_t qpc_memory_load(uint64_t address);
void qpc_memory_store(uint64_t address, uint64_t value);
void qpc_memory_fill(uint64_t address, uint64_t length, int byte);
void qpc_memory_read(uint64_t address, void *into, uint64_t length);
void qpc_memory_write(uint64_t address, const void *from, uint64_t length);
/* Offset of the first byte that differs, or -1. */
int64_t qpc_memory_compare(uint64_t address, const void *expected, uint64_t length);

/* process_vm_readv(2) of our own memory: the kernel does the touching. Returns bytes or -errno. */
int64_t qpc_memory_read_by_kernel(uint64_t address, void *into, uint64_t length);

/* fork(2); the child loads the word and exits with its lowest byte. Returns the child's id. */
int qpc_memory_load_in_child(uint64_t address);

enum qpc_touch {
    QPC_TOUCH_READ = 0,   /* loads the first word of each page */
    QPC_TOUCH_CHECK = 1,  /* ... which must be `base` + the page's index */
    QPC_TOUCH_COUNT = 2   /* ... and adds 1 to the second word, atomically */
};

struct qpc_touchers;

/*
 * `threads` native threads, each of which touches every page once, in a shuffled order of its own.
 * NULL with *errnum where they cannot be had.
 */
struct qpc_touchers *qpc_touchers_create(uint64_t address, uint64_t page_size, uint64_t pages,
                                         uint32_t threads, int touch, uint64_t base,
                                         uint64_t seed, int *errnum);
/* Pages touched so far, and how many of them were not as expected; any thread may ask. */
uint64_t qpc_touchers_touched(struct qpc_touchers *touchers);
uint64_t qpc_touchers_wrong(struct qpc_touchers *touchers);
/* Waits for all of them; 0, or -ETIMEDOUT. */
int qpc_touchers_join(struct qpc_touchers *touchers, uint64_t timeout_ms);
/* Only after a join that returned 0. */
void qpc_touchers_destroy(struct qpc_touchers *touchers);
/* cdef-end */

#endif
