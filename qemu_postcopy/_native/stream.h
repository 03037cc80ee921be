/*
 * A migration stream, read once from a pipe, socket or file: the step of a
 * snapshot that guest downtime depends on.
 *
 *   buffered reader -> (caller parses section headers) -> qpc_stream_ram_section()
 *   takes one RAM section apart: pages of lazy blocks into page files, pages of
 *   the other (eager) blocks as records into the device state file
 *
 * Nothing in the stream is trusted. One thread uses a stream; only
 * qpc_stream_cancel() and qpc_stream_read_progress() may be called from others.
 * Format: QEMU, docs/devel/migration/main.rst and migration/ram.c.
 */
#ifndef QPC_STREAM_H
#define QPC_STREAM_H

#include "error.h"

/* cdef-begin */
/* Since qpc_stream_create(); each right, but not of one and the same moment. */
struct qpc_stream_progress {
    uint64_t bytes;      /* consumed */
    uint64_t pages_data; /* page records with data, of any block */
    uint64_t pages_zero; /* zero page records, and data records that were all zero */
};

/* Page records of one block, and what became of them. */
struct qpc_stream_counts {
    uint64_t pages_data;
    uint64_t pages_zero;
    uint64_t pages_written; /* lazy blocks: pages that hold data now */
};

struct qpc_stream;

/*
 * offset is the position of fd's next byte in the stream, for messages and for
 * seeking. fd is not closed. A pipe is made as large as it may be.
 */
struct qpc_stream *qpc_stream_create(int fd, uint64_t offset, struct qpc_error *err);
void qpc_stream_destroy(struct qpc_stream *stream);

/* Exactly size bytes; the end of the stream before that is QPC_FORMAT with the offset. */
int qpc_stream_read(struct qpc_stream *stream, void *buffer, uint64_t size, struct qpc_error *err);
/* Up to size (at most 1024) bytes without consuming them; returns how many there are. */
int qpc_stream_peek(struct qpc_stream *stream, void *buffer, uint32_t size, struct qpc_error *err);
uint64_t qpc_stream_offset(const struct qpc_stream *stream);
/* Goes on at offset; needs a seekable descriptor whose own offset equals the stream's. */
int qpc_stream_seek(struct qpc_stream *stream, uint64_t offset, struct qpc_error *err);
/* Appends all that is left to out_fd. */
int qpc_stream_copy_rest(struct qpc_stream *stream, int out_fd, struct qpc_error *err);

/*
 * Declares a block; returns its index. page_fd: where its pages go, page_offset being the block's
 * first byte there; the range must be a hole. -1: an eager block. page_size (a power of two, 1 KiB
 * to 64 KiB) is the target's page size and must be the same for all blocks.
 */
int qpc_stream_add_block(struct qpc_stream *stream, const char *name, uint64_t length,
                         uint32_t page_size, int page_fd, uint64_t page_offset,
                         struct qpc_error *err);
int qpc_stream_read_counts(const struct qpc_stream *stream, uint32_t block,
                           struct qpc_stream_counts *ret, struct qpc_error *err);
/* One bit per page, least significant first: holds data. Lives as long as the stream. */
const uint8_t *qpc_stream_written_bitmap(const struct qpc_stream *stream, uint32_t block);

/*
 * Consumes page records up to and with the EOS flag. Pages of lazy blocks go to their files, a
 * zero page being a hole there; a later page replaces an earlier one. Records of eager blocks are
 * appended to records_fd in stream order, unless it is -1. Returns 0.
 */
int qpc_stream_ram_section(struct qpc_stream *stream, int records_fd, struct qpc_error *err);

/* Makes the current and every later call fail with QPC_SYSTEM, ECANCELED. Any thread. */
void qpc_stream_cancel(struct qpc_stream *stream);
/* The eventfd that qpc_stream_cancel() makes readable; owned by the stream. */
int qpc_stream_cancel_fd(const struct qpc_stream *stream);
/* Any thread, at any time. */
void qpc_stream_read_progress(const struct qpc_stream *stream, struct qpc_stream_progress *ret);
/* cdef-end */

#endif
