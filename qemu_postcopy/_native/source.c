#include "source.h"

void qpc_source_cancel(struct qpc_source *source, int on)
{
    if (source->operations->cancel)
        source->operations->cancel(source, on);
}

int qpc_source_read_once(struct qpc_source *source, uint64_t offset, uint64_t length, void *buffer)
{
    return qpc_source_read(source, offset, length, buffer);
}

void qpc_source_close(struct qpc_source *source)
{
    if (source)
        source->operations->close(source);
}
