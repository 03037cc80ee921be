/*
 * Where page data comes from: the contract between the pager and whatever can read an image.
 *
 *   make (qpc_source_open_file() and its like)
 *       |
 *       v
 *   read, read, read ... read         by pager threads
 *       |
 *       v
 *   qpc_source_close()                after the last pager that uses it is destroyed
 *
 * A kind of source is a table of operations; struct qpc_source is the first member of whatever it
 * keeps. Making one may allocate, connect and fail in words. Reading is the fault path:
 *
 * - Thread model: parallel. Several pager threads may read one source at the same moment, and they
 *   know nothing of each other; what has to be serialised the source serialises itself. No thread
 *   holds the GIL, and a source never takes it.
 * - read() allocates nothing and takes no lock over a system call that another reader needs.
 * - All or nothing: 0, and every byte of the range was the image's while the source still had it;
 *   or a positive errno, and the buffer means nothing. Never a short read, never zeros in the place
 *   of data. ENODATA: the source ends before the range does.
 * - A read that waits for something that may never come (a server that hangs) can be cancelled, so
 *   that a pager can be stopped: see qpc_source_cancel(). One that waits for a disk need not.
 * - An error is not the end: the same range is asked for again later, and a source that works again
 *   answers. It is the pager that waits between attempts; a source reports what is so now.
 * - The range is never empty, lies in the block that the caller was given, and is a multiple of the
 *   page size; the offset may be any.
 */
#ifndef QPC_SOURCE_H
#define QPC_SOURCE_H

#include "error.h"

/* cdef-begin */
struct qpc_source;

/*
 * A regular file, read with pread(2). Takes the descriptor over: it is closed with the source, but
 * not if this fails.
 */
struct qpc_source *qpc_source_open_file(int fd, struct qpc_error *err);

/*
 * While this is on, a read that waits for what may never come ends at once with ECANCELED, and none
 * begins to wait. Of a source with several readers all are meant; who is to read on asks again. Any
 * thread may call it.
 */
void qpc_source_cancel(struct qpc_source *source, int on);

/* For who is no pager: 0, or the errno for which there is no data. */
int qpc_source_read_once(struct qpc_source *source, uint64_t offset, uint64_t length, void *buffer);

/* Nobody may be reading any more. NULL is allowed. */
void qpc_source_close(struct qpc_source *source);
/* cdef-end */

/* One range of several that are read together. */
struct qpc_source_part {
    uint64_t offset;
    uint64_t length;
    void *buffer;
    int errnum; /* the answer, as of read() */
};

struct qpc_source_operations {
    int (*read)(struct qpc_source *source, uint64_t offset, uint64_t length, void *buffer);
    /*
     * Several ranges, each with its own answer: for a source that can have them at the same time, or
     * check once for all of them. NULL: one after the other.
     */
    void (*read_parts)(struct qpc_source *source, struct qpc_source_part *parts, uint32_t count);
    void (*cancel)(struct qpc_source *source, int on); /* NULL: reads never wait for long */
    void (*close)(struct qpc_source *source);          /* frees it */
};

struct qpc_source {
    const struct qpc_source_operations *operations;
};

static inline int qpc_source_read(struct qpc_source *source, uint64_t offset, uint64_t length,
                                  void *buffer)
{
    return source->operations->read(source, offset, length, buffer);
}

static inline void qpc_source_read_parts(struct qpc_source *source, struct qpc_source_part *parts,
                                         uint32_t count)
{
    if (count > 1 && source->operations->read_parts) {
        source->operations->read_parts(source, parts, count);
        return;
    }
    for (uint32_t i = 0; i < count; i++)
        parts[i].errnum =
            qpc_source_read(source, parts[i].offset, parts[i].length, parts[i].buffer);
}

#endif
