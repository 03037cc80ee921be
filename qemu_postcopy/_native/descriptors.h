/*
 * When another process opens something: looked at so often, and at so little cost, as Python could
 * not. Runs in a thread of the caller's that does nothing else and holds no lock.
 */
#ifndef QPC_DESCRIPTORS_H
#define QPC_DESCRIPTORS_H

#include <stdint.h>

#include "error.h"

/* cdef-begin */
/* What was seen last of a process's descriptors. */
struct qpc_descriptors {
    uint64_t count;   /* as st_size of /proc/PID/fd says it (Linux 6.2), or 0 */
    uint64_t numbers; /* a sum over their numbers, which differs where they do */
};

/* Reads it; -1 where the process has ended. */
int qpc_descriptors_read(int directory, struct qpc_descriptors *ret, struct qpc_error *err);

/*
 * Waits until it is no more as *known, which is brought up to date: looks at the count every
 * period_us, at the numbers every tenth time. `directory`: /proc/PID/fd, open for reading, used by
 * nobody else. Returns 1 then, 0 when stop_fd is readable, -1 where the process has ended.
 */
int qpc_descriptors_wait(int directory, int stop_fd, uint32_t period_us,
                         struct qpc_descriptors *known, struct qpc_error *err);
/* cdef-end */

#endif
