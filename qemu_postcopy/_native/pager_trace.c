#include "pager_state.h"

void qpc_pager_record(struct qpc_pager *p, struct qpc_trace *trace,
                      struct qpc_trace_record *records)
{
    p->trace = trace;
    p->trace_records = records;
    p->trace_capacity = trace->capacity;
    p->trace_count = trace->count;
}

void qpc_pager_trace_answer(struct qpc_pager *p, const struct fault *fault, uint64_t now,
                            int is_gone)
{
    const struct block *b = &p->blocks[fault->block];
    enum qpc_trace_answer answer = QPC_TRACE_DATA;

    if (p->trace_count >= p->trace_capacity) {
        __atomic_store_n(&p->trace->lost, p->trace->lost + 1, __ATOMIC_RELAXED);
        return;
    }
    if (is_gone)
        answer = QPC_TRACE_GONE;
    else if (!has_data(b, fault->page) || page_state(b, fault->page) >= QPC_PAGE_REMOVED)
        answer = QPC_TRACE_ZERO;
    p->trace_records[p->trace_count++] = (struct qpc_trace_record){
        .read_ns = fault->read_ns,
        .tid = fault->tid,
        .page = (uint32_t)fault->page,
        .latency_ns = (uint32_t)min_u64(now - fault->read_ns, UINT32_MAX),
        .block = (uint16_t)fault->block,
        .answer = (uint8_t)answer,
        .attempts = (uint8_t)min_u64(fault->attempts, 255),
    };
    /* Release: a reader that sees the count sees the record. */
    __atomic_store_n(&p->trace->count, p->trace_count, __ATOMIC_RELEASE);
}
