#include "source.h"

void qpc_source_cancel(struct qpc_source *source, int on)
{
    if (source->operations->cancel)
        source->operations->cancel(source, on);
}

void qpc_source_close(struct qpc_source *source)
{
    if (source)
        source->operations->close(source);
}
