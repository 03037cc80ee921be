/*
 * The flags of page records in a migration stream: QEMU, migration/ram.c, RAM_SAVE_FLAG_*, in the
 * low bits of a page's offset. For those that read records.
 */
#ifndef QPC_STREAM_RECORDS_H
#define QPC_STREAM_RECORDS_H

#include "error.h"

enum {
    QPC_RECORD_ZERO = 0x02,
    QPC_RECORD_MEM_SIZE = 0x04,
    QPC_RECORD_PAGE = 0x08,
    QPC_RECORD_EOS = 0x10,
    QPC_RECORD_CONTINUE = 0x20,
};

#define QPC_NAME_BYTES_MAX 255u
#define QPC_PAGE_BYTES_MIN 1024u
#define QPC_PAGE_BYTES_MAX 65536u
#define QPC_BLOCKS_MAX 4096u
#define QPC_BLOCK_BYTES_MAX (1ull << 46)

/* QPC_FORMAT unless it is a page, a zero page or the end mark. at: the record's offset. */
int qpc_record_check_flags(uint32_t flags, uint64_t at, struct qpc_error *err);

/* Whether a block can be: QPC_INVALID or QPC_FORMAT if not. */
int qpc_record_check_block(const char *name, uint64_t length, uint32_t page_size,
                           struct qpc_error *err);

#endif
