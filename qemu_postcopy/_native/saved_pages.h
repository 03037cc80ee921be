/*
 * Where in a save file each page of a guest lies, and page data read from there: a save file served
 * in place, the step that takes the place of its conversion.
 *
 *   scan the RAM sections of a stream (a file, mapped; page data is stepped over, not read)
 *   -> runs: pages that lie one behind the other in the file -> a source that reads by them
 *
 * The file is somebody else's. Nothing in it is trusted: every length is checked before it is used,
 * and a file that is cut short under the scan is an error, not a SIGBUS. What is read later is
 * checked to be the same file still: its size and the time it was last written to, and in front of
 * each page its record's header.
 */
#ifndef QPC_SAVED_PAGES_H
#define QPC_SAVED_PAGES_H

#include "error.h"
#include "source.h"

/* cdef-begin */
/*
 * Pages first_page to first_page + count - 1 of a block, with data. The first one's data begins at
 * offset in the file. head_bytes is what stands between the begin of its record and its data: 8, or
 * more where the block's name is in it; each further page has a record's header of 8 bytes before
 * its data. 0: there are no records, the data lie one behind the other (mapped-ram).
 */
struct qpc_saved_run {
    uint64_t first_page;
    uint64_t offset;
    uint32_t count;
    uint32_t head_bytes;
};

/* Page records of one block. */
struct qpc_saved_counts {
    uint64_t pages_data; /* records with data; a page that comes twice counts twice */
    uint64_t pages_zero;
    uint64_t pages_known; /* pages that have data in the end */
};

struct qpc_saved_scan;

/* fd: a regular file; not closed. One thread uses a scan. */
struct qpc_saved_scan *qpc_saved_scan_create(int fd, struct qpc_error *err);
void qpc_saved_scan_destroy(struct qpc_saved_scan *scan);

/*
 * Declares a block; returns its index. Of a lazy block it is noted where its pages lie; records of
 * the others are for the device state. page_size as for qpc_stream_add_block().
 */
int qpc_saved_scan_add_block(struct qpc_saved_scan *scan, const char *name, uint64_t length,
                             uint32_t page_size, int lazy, struct qpc_error *err);

/*
 * Walks the page records from offset in the file up to and with the EOS flag. Records of blocks
 * that are not lazy are appended to records_fd, unless it is -1. Returns 0 and in *end the offset behind them; or 1
 * after every 64 MiB, to be called again with *end, so that the caller can say how it goes, or stop.
 */
int qpc_saved_scan_section(struct qpc_saved_scan *scan, uint64_t offset, int records_fd,
                           uint64_t *end, struct qpc_error *err);
int qpc_saved_scan_counts(const struct qpc_saved_scan *scan, uint32_t block,
                          struct qpc_saved_counts *ret, struct qpc_error *err);

/*
 * The runs of a lazy block, by page; of pages that came twice the last. Returns how many there are,
 * and fills ret with as many of them as capacity allows. A page in none is known to be zero.
 */
uint64_t qpc_saved_scan_runs(const struct qpc_saved_scan *scan, uint32_t block,
                             struct qpc_saved_run *ret, uint64_t capacity);

/* The same of a mapped-ram block: bitmap has one bit per page, least significant first. */
uint64_t qpc_saved_bitmap_runs(const uint8_t *bitmap, uint64_t pages, uint64_t offset,
                               uint32_t page_size, struct qpc_saved_run *ret, uint64_t capacity);

/* What a file must be still: fstat(2). */
struct qpc_saved_identity {
    uint64_t size;
    int64_t mtime_seconds;
    int64_t mtime_nanoseconds;
};

/*
 * A source for one block of length bytes: offset 0 is the block's first byte, and what is read is
 * whole pages of page_size. Takes the descriptor over as qpc_source_open_file() does; runs are
 * checked and copied. ESTALE: the file was written to since it was scanned, so that nothing in it
 * can be relied on any more.
 */
struct qpc_source *qpc_source_open_saved(int fd, const struct qpc_saved_run *runs,
                                         uint64_t run_count, uint64_t length, uint32_t page_size,
                                         const struct qpc_saved_identity *identity,
                                         struct qpc_error *err);

/*
 * Sets a bit for each page of block_page_size bytes in which any page of the runs lies; the bitmap
 * has one for each of the block's pages and is zero before. The runs must have been accepted by
 * qpc_source_open_saved().
 */
void qpc_saved_data_bitmap(const struct qpc_saved_run *runs, uint64_t run_count,
                           uint32_t page_size, uint64_t block_page_size, uint8_t *bitmap);
/* cdef-end */

#endif
