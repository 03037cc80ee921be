#include "stream_records.h"

#include <string.h>

/* Flags of features whose pages cannot be read here, and the capability that makes QEMU use them. */
static const struct {
    uint32_t flag;
    const char *name;
    const char *capability;
} refused_flags[] = {
    { 0x40, "XBZRLE", "xbzrle" },
    { 0x80, "HOOK", "rdma-pin-all (RDMA)" },
    { 0x100, "COMPRESS_PAGE", "compress" },
    { 0x200, "MULTIFD_FLUSH", "multifd" },
};

int qpc_record_check_flags(uint32_t flags, uint64_t at, struct qpc_error *err)
{
    uint32_t kind = flags & ~(uint32_t)QPC_RECORD_CONTINUE;

    for (size_t i = 0; i < sizeof(refused_flags) / sizeof(refused_flags[0]); i++)
        if (flags & refused_flags[i].flag)
            return qpc_error_set(err, QPC_FORMAT, 0,
                                 "RAM record at offset %llu has the flag %s: switch the migration "
                                 "capability %s off",
                                 (unsigned long long)at, refused_flags[i].name,
                                 refused_flags[i].capability);
    if (kind == QPC_RECORD_PAGE || kind == QPC_RECORD_ZERO || flags == QPC_RECORD_EOS)
        return 0;
    return qpc_error_set(err, QPC_FORMAT, 0,
                         "RAM record at offset %llu has the unexpected flags %#x%s",
                         (unsigned long long)at, flags,
                         flags & QPC_RECORD_MEM_SIZE ? " (a second block list)" : "");
}

int qpc_record_check_block(const char *name, uint64_t length, uint32_t page_size,
                           struct qpc_error *err)
{
    size_t name_length = strlen(name);

    if (page_size < QPC_PAGE_BYTES_MIN || page_size > QPC_PAGE_BYTES_MAX ||
        page_size & (page_size - 1))
        return qpc_error_set(err, QPC_INVALID, 0, "%u bytes is no possible target page size",
                             page_size);
    if (name_length == 0 || name_length > QPC_NAME_BYTES_MAX || length > QPC_BLOCK_BYTES_MAX ||
        length % page_size)
        return qpc_error_set(err, QPC_FORMAT, 0,
                             "RAM block \"%.64s\" of %llu bytes is impossible", name,
                             (unsigned long long)length);
    return 0;
}
