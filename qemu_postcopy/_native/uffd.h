/*
 * The userfaultfd operations of the restore path, each ending in a named outcome
 * rather than in an errno (ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst).
 *
 * Every call works from any process that holds the descriptor: addresses are those of the
 * mapper, the process whose memory it controls.
 */
#ifndef QPC_UFFD_H
#define QPC_UFFD_H

#include <stdint.h>
#include <linux/userfaultfd.h>

#include "error.h"

/* The system's header may be older than its kernel (Debian 12: 6.1). */
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* cdef-begin */
enum qpc_outcome {
    QPC_FILLED = 0,          /* the whole range is filled now */
    QPC_ALREADY_PRESENT = 1, /* the first page of the rest was there already */
    QPC_RETRY = 2,           /* an event waits to be read first (EAGAIN); *done says how far it came */
    QPC_TARGET_GONE = 3,     /* the mapper has exited (ESRCH) */
    QPC_NOT_REGISTERED = 4,  /* no registered mapping covers the range (ENOENT) */
    QPC_FAILED = 5           /* anything else: see errno */
};

/* A descriptor of the calling process itself: /dev/userfaultfd, else userfaultfd(2). */
int qpc_uffd_open(struct qpc_error *err);

/* Every feature bit this kernel knows, asked of a descriptor of our own. */
int qpc_uffd_features(uint64_t *features, struct qpc_error *err);

/* UFFDIO_API with exactly these features. To be called once on a fresh descriptor. */
int qpc_uffd_api(int uffd, uint64_t features, struct qpc_error *err);

/* What the restore path asks for, cut down to what `available` has. */
uint64_t qpc_uffd_wanted_features(uint64_t available);

/*
 * Registers the range MISSING, with WP as well where the kernel allows it (a range cannot be
 * registered by a second descriptor later). Returns the mode taken.
 */
int qpc_uffd_register(int uffd, uint64_t start, uint64_t length, struct qpc_error *err);
int qpc_uffd_unregister(int uffd, uint64_t start, uint64_t length, struct qpc_error *err);
int qpc_uffd_wake(int uffd, uint64_t start, uint64_t length, struct qpc_error *err);

/*
 * Whether a thread of the mapper waits until an event is read, or is about to: from before it queues
 * the event until it has run on (mmap_changing, fs/userfaultfd.c).
 */
int qpc_uffd_event_pending(int uffd);
/* cdef-end */

/*
 * Fills [start, start+length) from `from`, or with zeros. *done is the count of bytes filled, also
 * where the outcome is not QPC_FILLED (the kernel may stop half-way). Without `wake` whoever waits there goes on waiting.
 */
enum qpc_outcome qpc_uffd_copy(int uffd, uint64_t start, const void *from, uint64_t length,
                               int wake, uint64_t *done);
enum qpc_outcome qpc_uffd_zeropage(int uffd, uint64_t start, uint64_t length, uint64_t *done);

#endif
