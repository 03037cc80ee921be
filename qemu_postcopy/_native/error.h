/*
 * How the C core reports a failure: every function that can fail takes a
 * struct qpc_error as its last argument, fills it and returns -1 (or NULL).
 *
 * The text between the cdef marks of every header of this folder is what cffi
 * reads too, so it stays plain C declarations.
 */
#ifndef QPC_ERROR_H
#define QPC_ERROR_H

#include <stddef.h>
#include <stdint.h>

/* cdef-begin */
enum qpc_code {
    QPC_OK = 0,
    QPC_SYSTEM = 1,    /* a system call failed: errnum says how */
    QPC_INVALID = 2,   /* the caller's arguments make no sense */
    QPC_FORMAT = 3,    /* input data (stream, image) is malformed or truncated */
    QPC_TIMEOUT = 4,   /* a time limit ran out; nothing was changed */
    QPC_GONE = 5,      /* the target process is not there any more */
    QPC_REFUSED = 6,   /* the kernel or the target refused: missing rights, seccomp */
    QPC_UNSUPPORTED = 7 /* not on this architecture or kernel */
};

struct qpc_error {
    int code;          /* enum qpc_code */
    int errnum;        /* errno of the failed call, or 0 */
    char message[240]; /* one sentence, NUL-terminated */
};
/* cdef-end */

/* Fills *err (which may be NULL) and returns -1, so that callers can return it. */
int qpc_error_set(struct qpc_error *err, enum qpc_code code, int errnum,
                  const char *format, ...) __attribute__((format(printf, 4, 5)));

#endif
