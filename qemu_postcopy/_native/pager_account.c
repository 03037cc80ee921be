#include "pager_state.h"

/* So many neighbours are looked at; a full table must not make every fault walk through it. */
#define PROBES 16u

uint16_t qpc_pager_origin_slot(struct qpc_pager *p, uint32_t tid)
{
    uint32_t home = tid * 2654435769u >> 24; /* Fibonacci hashing: the upper 8 bits */

    if (!tid)
        return QPC_ORIGIN_UNKNOWN;
    for (uint32_t i = 0; i < PROBES; i++) {
        uint32_t slot = (home + i) % QPC_ORIGIN_TABLE;
        uint64_t there = GET(p->origins[slot].tid);

        if (!there)
            SET(p->origins[slot].tid, tid);
        if (!there || there == tid)
            return (uint16_t)slot;
    }
    return QPC_ORIGIN_OTHER;
}

void qpc_pager_account_answer(struct qpc_pager *p, uint16_t slot, unsigned bucket, uint64_t ns)
{
    COUNT(p->origins[slot].blocked_ns, ns);
    COUNT(p->origins[slot].latency_us[bucket], 1u);
}

void qpc_pager_read_origins(const struct qpc_pager *p, struct qpc_origin *ret)
{
    for (uint32_t i = 0; i < QPC_ORIGIN_SLOTS; i++) {
        ret[i].tid = GET(p->origins[i].tid);
        ret[i].faults = GET(p->origins[i].faults);
        ret[i].blocked_ns = GET(p->origins[i].blocked_ns);
        for (uint32_t j = 0; j < 24; j++)
            ret[i].latency_us[j] = GET(p->origins[i].latency_us[j]);
    }
}
