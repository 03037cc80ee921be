/*
 * Makes one thread of another process open a userfaultfd for its own memory (ptrace(2)), and
 * takes a copy of the descriptor over (pidfd_getfd(2)). The original stays open in the target.
 * The same way it is made to drop private pages.
 *
 * The tracing is done by a short-lived child of the caller. Three things rest on that:
 * - A thread that cannot be stopped cannot be detached either (PTRACE_DETACH wants a stopped
 *   tracee); the end of the child detaches it and withdraws the pending PTRACE_INTERRUPT.
 * - The caller may be the target's parent: ptrace stops are reported to the tracer alone, so no
 *   waitpid elsewhere in the caller (subprocess, asyncio) can take one away.
 * - The child blocks every signal: an impatient Ctrl-C does not leave a half-done system call.
 *
 * Registers are read and written as a whole set, floating point and SIMD state is never touched,
 * and the thread's signals are blocked meanwhile, so they stay queued with all they carry.
 */
#ifndef QPC_INJECT_H
#define QPC_INJECT_H

#include <stdint.h>

#include "error.h"

/* cdef-begin */
struct qpc_injection {
    int remote_fd;     /* the userfaultfd's number in the target */
    int tid;           /* the thread that opened it */
    int threads_tried; /* with those that did not stop in time */
    int device_errno;  /* why /dev/userfaultfd could not be opened there, 0 if it could */
    int passed_errno;  /* why passing device_fd failed as well, 0 if it did not */
    int syscall_errno; /* why userfaultfd(2) failed as well, 0 if it did not */
    uint64_t wait_ns;  /* from the request until that thread stood still */
    uint64_t stop_ns;  /* how long it stood still */
};

/*
 * pidfd must have been opened for pid by the caller, who knows what process it is: it tells a
 * reused PID apart. Threads are tried in order, again and again, each for at most per_thread_ms, all
 * for at most total_ms. Blocks until done; any thread may call it. On failure nothing is changed in the
 * target. device_fd is an open /dev/userfaultfd, or -1: where the target may not open that device
 * itself (another user, a private /dev, a device cgroup), it is given this one over a socket for a
 * moment; the descriptor made from it is for the target's memory, since USERFAULTFD_IOC_NEW takes
 * that of whoever calls it. QPC_GONE: the process died. QPC_REFUSED: no right to trace it (errnum is set), or the
 * target may not open a userfaultfd (device_errno, passed_errno, syscall_errno). QPC_TIMEOUT: no thread stopped.
 * A thread that waits in a kernel-mode fault and is tried in vain does not sleep any more until
 * its page is there: it repeats the fault (seen on Linux 6.18; one more message comes).
 */
int qpc_inject_userfaultfd(int pid, int pidfd, const int *tids, int count, int per_thread_ms,
                           int total_ms, int device_fd, struct qpc_injection *out,
                           struct qpc_error *err);

/*
 * Has a thread drop its process's private pages in [start, start+length) (MADV_DONTNEED_LOCKED, or
 * MADV_DONTNEED before Linux 5.18): what only that process itself can do. The rest as above.
 * QPC_REFUSED with errnum: the kernel did not drop them. The thread stands still meanwhile, some
 * 50 ms per GiB: total_ms must allow for that.
 */
int qpc_inject_discard(int pid, int pidfd, const int *tids, int count, int per_thread_ms,
                       int total_ms, uint64_t start, uint64_t length, struct qpc_error *err);

/* A close-on-exec copy of descriptor remote_fd of the process behind pidfd. */
int qpc_fd_take(int pidfd, int remote_fd, struct qpc_error *err);

/*
 * Drops CAP_SYS_PTRACE from the calling thread's effective, permitted and inheritable sets, for
 * good (capabilities(7)): to be called before other threads exist, since each has its own sets.
 * Afterwards /proc/PID/{maps,fd,mem} and pidfd_getfd of a process that holds a capability which
 * this one lacks are refused, also between processes of root: read the layout first. An open
 * userfaultfd needs no right any more.
 */
int qpc_capability_drop_ptrace(struct qpc_error *err);
/* cdef-end */

#endif
