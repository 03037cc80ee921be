/*
 * Page data in files: which pages hold data, copies that keep holes, and the way back into a
 * migration stream. A hole is a known zero page; a page of zeros counts as a hole everywhere.
 * No state: any thread may call any function; descriptors' own offsets may be moved by lseek(2).
 */
#ifndef QPC_PAGE_FILE_H
#define QPC_PAGE_FILE_H

#include "error.h"

/* cdef-begin */
/* size is at least 8 bytes. */
int qpc_page_is_zero(const void *page, size_t size);

/*
 * Finds the runs of pages in data (size bytes) that are not all zero: ret[2n] is the offset of run
 * n, ret[2n + 1] its length, both in bytes. ret has room for size / page_size numbers plus 2.
 * Returns the number of runs.
 */
uint32_t qpc_page_runs(const void *data, uint64_t size, uint32_t page_size, uint64_t *ret);

/* Makes a range read as zeros without taking space; zeros are written where holes cannot be. */
int qpc_page_file_punch(int fd, uint64_t offset, uint64_t length, struct qpc_error *err);

/*
 * The next range of data at or after offset and before end, by SEEK_DATA and SEEK_HOLE: 1 with
 * ret[0] its begin and ret[1] its end, or 0 where only holes are left. A file system that knows
 * no holes gives everything.
 */
int qpc_page_file_next_data(int fd, uint64_t offset, uint64_t end, uint64_t *ret,
                            struct qpc_error *err);

/*
 * Sets one bit per page of page_size bytes (least significant first) in bitmap where the page has
 * data. The file must cover the range. Other bits are cleared. Returns how many were set.
 */
int64_t qpc_page_file_bitmap(int fd, uint64_t offset, uint64_t length, uint64_t page_size,
                             uint8_t *bitmap, struct qpc_error *err);

/*
 * Copies pages that are not zero from one file into a hole of another. bitmap says which source
 * pages count (NULL: those with data); written (may be NULL) gets a bit set for each page copied.
 * cancel_fd: an eventfd that ends it with ECANCELED when readable, or -1.
 */
int qpc_page_file_copy(int in_fd, uint64_t in_offset, const uint8_t *bitmap, uint64_t length,
                       uint32_t page_size, int out_fd, uint64_t out_offset, uint8_t *written,
                       int cancel_fd, struct qpc_error *err);

/*
 * Appends one record per page of the block to a migration stream, zero pages included.
 * bitmap and cancel_fd as above; page_size is the target's.
 */
int qpc_page_file_write_records(int in_fd, uint64_t in_offset, const uint8_t *bitmap,
                                uint64_t length, uint32_t page_size, const char *name, int out_fd,
                                int cancel_fd, struct qpc_error *err);
/* cdef-end */

#endif
