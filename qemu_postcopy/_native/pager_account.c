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

        if (there == tid)
            return (uint16_t)slot;
        if (!there) {
            SET(p->origins[slot].tid, tid);
            qpc_pager_notify(p); /* its name can be asked for while it waits for this page */
            return (uint16_t)slot;
        }
    }
    return QPC_ORIGIN_OTHER;
}

/* --- virtual CPUs ---------------------------------------------------------------------------- */

static void note_stopped(struct qpc_pager *p, uint64_t now)
{
    COUNT(p->vcpus.stopped, 1u);
    if (GET(p->vcpus.stopped) == GET(p->vcpus.count))
        SET(p->vcpus.all_stopped_since_ns, now);
}

static void note_running(struct qpc_pager *p, uint64_t now)
{
    uint64_t since = GET(p->vcpus.all_stopped_since_ns);

    if (since) {
        COUNT(p->vcpus.all_stopped_ns, now - since);
        SET(p->vcpus.all_stopped_since_ns, 0);
    }
    COUNT(p->vcpus.stopped, (uint64_t)-1);
}

/* Takes over what qpc_pager_name_vcpus() said. */
static void adopt_vcpus(struct qpc_pager *p, uint32_t version, uint64_t now)
{
    uint32_t count = atomic_load_explicit(&p->named_vcpu_count, memory_order_relaxed);

    p->vcpu_version = version;
    while (GET(p->vcpus.stopped))
        note_running(p, now);
    for (uint32_t i = 0; i < QPC_ORIGIN_SLOTS; i++)
        p->is_vcpu[i] = 0;
    SET(p->vcpus.count, 0);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t tid = atomic_load_explicit(&p->named_vcpus[i], memory_order_relaxed);
        uint16_t slot = qpc_pager_origin_slot(p, tid);

        if (slot >= QPC_ORIGIN_TABLE) {
            /* It shares its number with others: what is not known of one is not known of all. */
            for (uint32_t j = 0; j < QPC_ORIGIN_SLOTS; j++)
                p->is_vcpu[j] = 0;
            SET(p->vcpus.count, 0);
            return;
        }
        COUNT(p->vcpus.count, (uint64_t)!p->is_vcpu[slot]);
        p->is_vcpu[slot] = 1;
    }
    for (uint32_t i = 0; i < QPC_ORIGIN_TABLE; i++) {
        if (p->is_vcpu[i] && GET(p->origins[i].waiting))
            note_stopped(p, now);
    }
}

static void heed_vcpus(struct qpc_pager *p, uint64_t now)
{
    uint32_t version = atomic_load_explicit(&p->named_vcpu_version, memory_order_acquire);

    if (version != p->vcpu_version)
        adopt_vcpus(p, version, now);
}

void qpc_pager_name_vcpus(struct qpc_pager *p, const uint32_t *tids, uint32_t count)
{
    if (count > QPC_ORIGIN_TABLE)
        count = 0;
    for (uint32_t i = 0; i < count; i++)
        atomic_store_explicit(&p->named_vcpus[i], tids[i], memory_order_relaxed);
    atomic_store_explicit(&p->named_vcpu_count, count, memory_order_relaxed);
    /* Release: who sees the version sees the numbers. */
    atomic_fetch_add_explicit(&p->named_vcpu_version, 1, memory_order_release);
}

void qpc_pager_read_vcpus(const struct qpc_pager *p, struct qpc_vcpu_account *ret)
{
    ret->count = GET(p->vcpus.count);
    ret->stopped = GET(p->vcpus.stopped);
    ret->all_stopped_ns = GET(p->vcpus.all_stopped_ns);
    ret->all_stopped_since_ns = GET(p->vcpus.all_stopped_since_ns);
}

/* --- faults ---------------------------------------------------------------------------------- */

void qpc_pager_account_begin(struct qpc_pager *p, const struct fault *fault)
{
    uint16_t slot = fault->slot;

    heed_vcpus(p, fault->read_ns);
    COUNT(p->blocks[fault->block].account.waiting, 1u);
    COUNT(p->origins[slot].waiting, 1u);
    if (GET(p->origins[slot].waiting) == 1) {
        SET(p->origins[slot].waiting_since_ns, fault->read_ns);
        if (p->is_vcpu[slot])
            note_stopped(p, fault->read_ns);
    }
}

void qpc_pager_account_end(struct qpc_pager *p, const struct fault *fault, uint64_t now)
{
    uint16_t slot = fault->slot;

    heed_vcpus(p, now);
    COUNT(p->blocks[fault->block].account.waiting, (uint64_t)-1);
    COUNT(p->origins[slot].waiting, (uint64_t)-1);
    if (GET(p->origins[slot].waiting) == 0) {
        SET(p->origins[slot].waiting_since_ns, 0);
        if (p->is_vcpu[slot])
            note_running(p, now);
    }
}

void qpc_pager_account_answer(struct qpc_pager *p, const struct fault *fault, unsigned bucket,
                              uint64_t now)
{
    COUNT(p->origins[fault->slot].blocked_ns, now - fault->read_ns);
    COUNT(p->origins[fault->slot].latency_us[bucket], 1u);
    qpc_pager_account_end(p, fault, now);
}

void qpc_pager_read_origins(const struct qpc_pager *p, struct qpc_origin *ret)
{
    for (uint32_t i = 0; i < QPC_ORIGIN_SLOTS; i++) {
        ret[i].tid = GET(p->origins[i].tid);
        ret[i].faults = GET(p->origins[i].faults);
        ret[i].blocked_ns = GET(p->origins[i].blocked_ns);
        ret[i].waiting = GET(p->origins[i].waiting);
        ret[i].waiting_since_ns = GET(p->origins[i].waiting_since_ns);
        for (uint32_t j = 0; j < 24; j++)
            ret[i].latency_us[j] = GET(p->origins[i].latency_us[j]);
    }
}

void qpc_pager_read_blocks(const struct qpc_pager *p, struct qpc_block_account *ret)
{
    for (uint32_t i = 0; i < p->block_count; i++) {
        const struct block *b = &p->blocks[i];

        ret[i].faults = GET(b->account.faults);
        ret[i].waiting = GET(b->account.waiting);
        ret[i].pages_data = GET(b->account.pages_data);
        ret[i].pages_data_missing = GET(b->account.pages_data_missing);
        ret[i].pages_removed = GET(b->account.pages_removed);
        ret[i].pages_unmapped = GET(b->account.pages_unmapped);
    }
}
