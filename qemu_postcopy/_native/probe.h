/*
 * What this process may do to others and to memory on this host, found out by doing it
 * (`qemu-postcopy doctor`).  Each probe cleans up after itself and leaves nothing running.
 *
 * A probe returns 0, or -1 with err->errnum telling what the kernel said.
 */
#ifndef QPC_PROBE_H
#define QPC_PROBE_H

#include <stdint.h>

#include "error.h"

/* cdef-begin */
enum qpc_userfaultfd_way {
    QPC_WAY_DEVICE = 0,   /* /dev/userfaultfd (Linux 6.1): a question of file permissions */
    QPC_WAY_SYSCALL = 1,  /* userfaultfd(2): CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1 */
    QPC_WAY_USER_MODE = 2 /* userfaultfd(2) with UFFD_USER_MODE_ONLY: no rights, no kernel faults */
};

/* Opens a userfaultfd in this way, asks it for the features that the kernel knows, closes it. */
int qpc_probe_userfaultfd(int way, uint64_t *features, struct qpc_error *err);

/*
 * PTRACE_SEIZE of a process made for this: a child of the tracer, or (stranger) one that is not a
 * descendant of it, which is what a QEMU started by somebody else is. Both have our own user id.
 */
int qpc_probe_ptrace(int stranger, struct qpc_error *err);

/* pidfd_open(2) of a child and pidfd_getfd(2) of a descriptor that only the child has. */
int qpc_probe_pidfd_getfd(struct qpc_error *err);

/*
 * Whether pages that are missing in shared memory under a userfaultfd stay missing when the kernel
 * makes a huge page of what is around them (khugepaged, MADV_COLLAPSE): 1 if so, 0 if it fills them
 * with zeros, which no fault tells of (before "mm/khugepaged: skip shmem with userfaultfd", 2023), -1
 * where that cannot be found out. Takes about a millisecond.
 */
int qpc_probe_collapse(struct qpc_error *err);
/* cdef-end */

#endif
